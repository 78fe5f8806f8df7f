package guestmem

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// Source is the memory of a machine at one instant: a Space whose process does
// not run, a Copy, or a Twin. Offsets are those of the image that the machine
// maps.
type Source interface {
	// Private calls yield with the pages that differ from the image's, or may;
	// ascending, in runs that do not touch.
	Private(yield func(first, count uint64) bool) error
	// ReadAt reads whole pages, of those that Private names.
	ReadAt(p []byte, off int64) (int, error)
}

// Copy is what a process's private pages were when Space.Copy took them.
type Copy struct {
	mem   []byte
	runs  []pageRun
	at    []uint64 // of each run: its first page in mem
	pages uint64
}

// newCopy maps memory for as many pages as there may be. Only what is written
// to takes memory.
func newCopy(size uint64) (*Copy, error) {
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if errors.Is(err, unix.ENOMEM) {
		return nil, fmt.Errorf("%w: room for %d bytes: %w", errdef.ErrExhausted, size, err)
	}
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	// Without huge pages, faults cost more than the copying. It may be refused.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	return &Copy{mem: mem}, nil
}

// place gives each run its place.
func (c *Copy) place(runs []pageRun) {
	c.runs, c.at, c.pages = runs, make([]uint64, len(runs)), 0
	for i, r := range runs {
		c.at[i] = c.pages
		c.pages += r.count
	}
}

// Close frees the memory. Nothing may be reading from c.
func (c *Copy) Close() error {
	mem := c.mem
	c.mem, c.runs, c.at, c.pages = nil, nil, nil, 0
	if mem == nil {
		return nil
	}
	if err := unix.Munmap(mem); err != nil {
		return fmt.Errorf("free copy of memory: %w", err)
	}
	return nil
}

// Private yields the pages that were copied.
func (c *Copy) Private(yield func(first, count uint64) bool) error {
	for _, r := range c.runs {
		if !yield(r.first, r.count) {
			return nil
		}
	}
	return nil
}

// Pages returns how many pages were copied.
func (c *Copy) Pages() uint64 { return c.pages }

// ReadAt reads from pages that were copied; others are errdef.ErrInvalid.
func (c *Copy) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		pos := uint64(off) + uint64(done)
		i := sort.Search(len(c.runs), func(i int) bool { return c.runs[i].end()*PageSize > pos })
		if i == len(c.runs) || c.runs[i].first*PageSize > pos {
			return done, fmt.Errorf("%w: offset %#x was not copied", errdef.ErrInvalid, pos)
		}
		r := c.runs[i]
		in := pos - r.first*PageSize
		done += copy(p[done:], c.mem[c.at[i]*PageSize+in:][:r.count*PageSize-in])
	}
	return done, nil
}

func privateRuns(src Source) ([]pageRun, error) {
	var runs []pageRun
	err := src.Private(func(first, count uint64) bool {
		runs = append(runs, pageRun{first, count})
		return true
	})
	return runs, err
}

func imageRuns(img *Image) []pageRun {
	var runs []pageRun
	img.Ranges(func(first, count uint64) bool {
		runs = append(runs, pageRun{first, count})
		return true
	})
	return runs
}

// piece is a run of pages and who knows what they hold.
type piece struct {
	pageRun
	from io.ReaderAt
}

// Save writes the layer that makes parent into src: the pages of src that
// differ from parent's, ascending. origin is the image of the snapshot that the
// machine was forked from: what is not private in src is as it is there. Both
// images have the same base; parent may be origin.
func Save(ctx context.Context, src Source, origin, parent *Image, w *Writer) error {
	spans, err := candidates(src, origin, parent)
	if err != nil {
		return fmt.Errorf("save layer: %w", err)
	}
	d := differ{w: w, parent: parent, was: make([]byte, batchPages*PageSize), now: make([]byte, batchPages*PageSize)}
	for _, s := range spans {
		for s.count > 0 {
			if ctx.Err() != nil {
				return fmt.Errorf("save layer: %w", context.Cause(ctx))
			}
			n := min(s.count, batchPages)
			if err = d.save(s.from, pageRun{s.first, n}); err != nil {
				return fmt.Errorf("save layer: %w", err)
			}
			s.pageRun = pageRun{s.first + n, s.count - n}
		}
	}
	return nil
}

// candidates returns the pages in which src may differ from parent, ascending:
// its own, and those in which origin differs from parent.
func candidates(src Source, origin, parent *Image) ([]piece, error) {
	private, err := privateRuns(src)
	if err != nil {
		return nil, err
	}
	var spans []piece
	for _, r := range private {
		spans = append(spans, piece{r, src})
	}
	if origin == parent {
		return spans, nil
	}
	for _, r := range subtract(union(imageRuns(origin), imageRuns(parent)), private) {
		spans = append(spans, piece{r, origin})
	}
	slices.SortFunc(spans, func(a, b piece) int { return cmp.Compare(a.first, b.first) })
	return spans, nil
}

// differ writes the pages that are not as they were.
type differ struct {
	w        *Writer
	parent   *Image
	was, now []byte
}

func (d *differ) save(from io.ReaderAt, r pageRun) error {
	off, size := int64(r.first*PageSize), r.count*PageSize
	now, was := d.now[:size], d.was[:size]
	if _, err := from.ReadAt(now, off); err != nil {
		return err
	}
	if _, err := d.parent.ReadAt(was, off); err != nil {
		return err
	}
	return runsOf(now, func(page []byte, at uint64) bool { return !bytes.Equal(page, was[at:at+PageSize]) },
		func(data []byte, at uint64, differs bool) error {
			if !differs {
				return nil
			}
			return d.w.Write(r.first+at/PageSize, data)
		})
}

// runsOf cuts p into runs of pages that have the property or have not.
func runsOf(p []byte, has func(page []byte, at uint64) bool, yield func(data []byte, at uint64, has bool) error) error {
	size := uint64(len(p))
	for start := uint64(0); start < size; {
		first := has(p[start:start+PageSize], start)
		end := start + PageSize
		for end < size && has(p[end:end+PageSize], end) == first {
			end += PageSize
		}
		if err := yield(p[start:end], start, first); err != nil {
			return err
		}
		start = end
	}
	return nil
}

// SaveWhole writes the whole memory of src to f, which is empty: origin's, and
// src's private pages over it. Pages of zeros are holes.
func SaveWhole(ctx context.Context, src Source, origin *Image, f *os.File) error {
	if err := origin.Flatten(ctx, f); err != nil {
		return fmt.Errorf("save memory: %w", err)
	}
	runs, err := privateRuns(src)
	if err != nil {
		return fmt.Errorf("save memory: %w", err)
	}
	buf := make([]byte, batchPages*PageSize)
	for _, b := range split(runs, batchPages) {
		if ctx.Err() != nil {
			return fmt.Errorf("save memory: %w", context.Cause(ctx))
		}
		p := buf[:b.pages*PageSize]
		if err := readEach(src, p, b.runs); err != nil {
			return fmt.Errorf("save memory: %w", err)
		}
		for _, r := range b.runs {
			if err := writeSparse(f, p[:r.count*PageSize], int64(r.first*PageSize)); err != nil {
				return fmt.Errorf("save memory to %s: %w", f.Name(), err)
			}
			p = p[r.count*PageSize:]
		}
	}
	return nil
}

// writeSparse writes whole pages and makes holes of those of zeros.
func writeSparse(f *os.File, p []byte, off int64) error {
	var zero [PageSize]byte
	return runsOf(p, func(page []byte, _ uint64) bool { return bytes.Equal(page, zero[:]) },
		func(data []byte, at uint64, zeros bool) error {
			if zeros {
				err := linux.PunchHole(f, off+int64(at), int64(len(data)))
				if !errors.Is(err, errdef.ErrUnsupported) {
					return err
				}
			}
			_, err := f.WriteAt(data, off+int64(at))
			return err
		})
}
