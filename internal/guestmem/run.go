package guestmem

import (
	"context"
	"io"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const (
	batchPages     = 256  // 1 MiB: what is read, compared and written at a time
	copyBatchPages = 2048 // 8 MiB: how much is copied between looks at the context
	maxBatchRuns   = 1024 // what the kernel takes in one call
)

// pageRun is count pages from first.
type pageRun struct{ first, count uint64 }

func (r pageRun) end() uint64 { return r.first + r.count }

// batch is a few runs of pages that together are not many.
type batch struct {
	runs  []pageRun
	at    uint64 // pages in the batches before it
	pages uint64
}

// split makes batches of at most maxPages pages; long runs are cut.
func split(runs []pageRun, maxPages uint64) []batch {
	var batches []batch
	var b batch
	flush := func() {
		if b.pages > 0 {
			batches = append(batches, b)
		}
		b = batch{at: b.at + b.pages}
	}
	for _, r := range runs {
		for r.count > 0 {
			if b.pages == maxPages || len(b.runs) == maxBatchRuns {
				flush()
			}
			n := min(r.count, maxPages-b.pages)
			b.runs = append(b.runs, pageRun{r.first, n})
			b.pages += n
			r = pageRun{r.first + n, r.count - n}
		}
	}
	flush()
	return batches
}

// parallel gives the batches to as many workers as there are cores. newWorker
// makes one: what it allocates is that worker's alone.
func parallel(ctx context.Context, batches []batch, newWorker func() func(batch) error) error {
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range min(runtime.GOMAXPROCS(0), len(batches)) {
		group.Go(func() error {
			work := newWorker()
			for i := next.Add(1) - 1; i < int64(len(batches)); i = next.Add(1) - 1 {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				if err := work(batches[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// readEach fills p with the runs of src, one after the other.
func readEach(src io.ReaderAt, p []byte, runs []pageRun) error {
	for _, r := range runs {
		n := r.count * PageSize
		if _, err := src.ReadAt(p[:n], int64(r.first*PageSize)); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// runJoiner puts runs that touch together before it yields them.
type runJoiner struct {
	yield   func(first, count uint64) bool
	last    pageRun
	stopped bool
}

// add reports whether more is wanted.
func (j *runJoiner) add(first, count uint64) bool {
	if j.last.count > 0 && j.last.end() == first {
		j.last.count += count
		return !j.stopped
	}
	j.flush()
	j.last = pageRun{first, count}
	return !j.stopped
}

// flush reports whether nobody has stopped.
func (j *runJoiner) flush() bool {
	if j.last.count > 0 && !j.stopped {
		j.stopped = !j.yield(j.last.first, j.last.count)
	}
	j.last = pageRun{}
	return !j.stopped
}

// union returns the pages that are in a or in b, both ascending.
func union(a, b []pageRun) []pageRun {
	var out []pageRun
	j := runJoiner{yield: func(first, count uint64) bool {
		out = append(out, pageRun{first, count})
		return true
	}}
	var end uint64 // all before it has been added
	for len(a) > 0 || len(b) > 0 {
		var r pageRun
		if len(b) == 0 || len(a) > 0 && a[0].first <= b[0].first {
			r, a = a[0], a[1:]
		} else {
			r, b = b[0], b[1:]
		}
		if r.end() > end {
			first := max(r.first, end)
			end = r.end()
			j.add(first, end-first)
		}
	}
	j.flush()
	return out
}

// subtract returns the pages that are in a and not in b, both ascending.
func subtract(a, b []pageRun) []pageRun {
	var out []pageRun
	for _, r := range a {
		for len(b) > 0 && b[0].end() <= r.first {
			b = b[1:]
		}
		for i := 0; i < len(b) && b[i].first < r.end() && r.count > 0; i++ {
			if b[i].first > r.first {
				out = append(out, pageRun{r.first, b[i].first - r.first})
			}
			first := max(r.first, min(b[i].end(), r.end()))
			r = pageRun{first, r.end() - first}
		}
		if r.count > 0 {
			out = append(out, r)
		}
	}
	return out
}
