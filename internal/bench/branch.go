package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
)

// modes are the ways to take a branch, the default one first.
func modes() []sandbox.Mode { return []sandbox.Mode{sandbox.Live, sandbox.Diff, sandbox.Full} }

// What is measured of branches when the options do not say.
func defaultMemory() []int { return []int{512, 2048} }
func defaultDirty() []int  { return []int{0, 20, 200, 1024} }
func defaultDepths() []int { return []int{0, 1, 3, 8, 32} }

// Bounds on what can be asked for of branches. A lineage gets no deeper by
// itself; see package sandbox.
const (
	maxCases  = 16
	maxDepth  = 32
	minMemory = 128     // MiB
	maxMemory = 1 << 20 // MiB
)

// headroom is what a guest needs beside the memory that a worker holds, in MiB.
const headroom = 192

// branches fills in what the options leave open, and checks them.
func (o *Options) branches() error {
	if o.Memory == nil {
		o.Memory = defaultMemory()
	}
	if o.Dirty == nil {
		o.Dirty = defaultDirty()
	}
	if o.Depths == nil {
		o.Depths = defaultDepths()
	}
	for _, l := range []struct {
		what        string
		list        []int
		least, most int
	}{
		{"MiB of memory", o.Memory, minMemory, maxMemory},
		{"MiB written", o.Dirty, 0, maxMemory},
		{"branches deep", o.Depths, 0, maxDepth},
	} {
		if len(l.list) > maxCases {
			return fmt.Errorf("%w: %d numbers of %s, %d allowed", errdef.ErrInvalid, len(l.list), l.what, maxCases)
		}
		for _, n := range l.list {
			if n < l.least || n > l.most {
				return fmt.Errorf("%w: %d %s: it must be %d to %d", errdef.ErrInvalid, n, l.what, l.least, l.most)
			}
		}
	}
	return nil
}

// load is what the guest does that is branched.
type load struct {
	dirty   int  // MiB that it holds and has written
	writing bool // and goes on writing; else it looks at the clock
}

func (l load) String() string {
	switch {
	case l.dirty == 0:
		return "idle"
	case l.writing:
		return fmt.Sprintf("%d MiB, being written", l.dirty)
	}
	return fmt.Sprintf("%d MiB, still", l.dirty)
}

// liveDirty is how much may be dirty for the target of a live pause, in MiB,
// and how much a guest that writes holds at most.
const liveDirty = 200

// loads are those that fit in a guest: each amount written and left alone, and
// one of them being written all the time.
func loads(memory int, dirty []int) []load {
	var all []load
	most := 0
	for _, mib := range slices.Sorted(slices.Values(dirty)) {
		if mib > 0 && mib+headroom > memory {
			break
		}
		all = append(all, load{dirty: mib})
		if mib <= liveDirty {
			most = mib
		}
	}
	if most > 0 {
		all = append(all, load{dirty: most, writing: true})
	}
	return all
}

// fewMiB is the amount that is written where the amount is not the point: the
// least of the options' that is any.
func fewMiB(memory int, dirty []int) int {
	for _, l := range loads(memory, dirty) {
		if l.dirty > 0 {
			return l.dirty
		}
	}
	return 1
}

// grove measures branches, in guests of several sizes.
type grove struct {
	opts   Options
	sub    *subject
	dirs   *dirs
	result *Result
}

// measureBranches is Measure for branches.
func measureBranches(ctx context.Context, sub *subject, opts Options) (_ *Result, err error) {
	if err = opts.branches(); err != nil {
		return nil, err
	}
	work, err := os.MkdirTemp(filepath.Dir(sub.d.Sandboxes.Dir), "bench-")
	if err != nil {
		return nil, fmt.Errorf("make work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	g := &grove{opts: opts, sub: sub, dirs: &dirs{root: work}, result: sub.result(opts)}
	for _, memory := range opts.Memory {
		if err = g.grow(ctx, memory); err != nil {
			return nil, fmt.Errorf("guest of %d MiB: %w", memory, err)
		}
	}
	return g.result, nil
}

// grow measures everything in guests of one size. A part that fails becomes a row
// that says why, unless ctx has ended: the others may take long, and are good.
func (g *grove) grow(ctx context.Context, memory int) (err error) {
	p, err := newPlot(ctx, g.sub, g.dirs, memory)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	few := fewMiB(memory, g.opts.Dirty)
	try := func(name string, part func() error) {
		if err != nil {
			return
		}
		switch failed := part(); {
		case failed != nil && ctx.Err() != nil:
			err = fmt.Errorf("%s: %w", name, failed)
		case failed != nil:
			g.result.Branches = append(g.result.Branches, BranchRow{
				MemoryMiB: memory, Case: name, Row: Row{Step: "failed", Unit: none}, Warning: name + ": " + failed.Error(),
			})
		}
	}
	try("ways to save device state", func() error { return g.ways(ctx, p, few) })
	for _, l := range loads(memory, g.opts.Dirty) {
		try("branch a guest, "+l.String(), func() error { return g.pauses(ctx, p, l) })
	}
	try("branches in a row", func() error { return g.consecutive(ctx, p, few) })
	try("rollback", func() error { return g.rollbacks(ctx, p, few) })
	try("suspend and resume", func() error { return g.suspends(ctx, p, few) })
	try("deep trees", func() error { return g.depths(ctx, p) })
	return err
}

// add adds a row: samples of Tine, and of the floor if there are any.
func (g *grove) add(row BranchRow, unit string, tine, floor []float64, goals ...goal) {
	row.Unit, row.Tine = unit, summarize(tine)
	if len(floor) > 0 {
		sum := summarize(floor)
		row.Floor, row.Ratio = &sum, ratio(row.Tine.Median, sum.Median)
	}
	for _, goal := range goals {
		row.Targets = append(row.Targets, goal(&row.Row))
	}
	g.result.Branches = append(g.result.Branches, row)
}

// goal judges a row.
type goal func(*Row) Target

// atMost is for a ratio that should not be larger.
func atMost(limit float64, of string) goal {
	return func(r *Row) Target {
		return Target{Goal: fmt.Sprintf("at most %.4gx %s", limit, of), Value: r.Ratio, Met: r.Ratio > 0 && r.Ratio <= limit}
	}
}

// atMostAbove is for a time that should not be longer than the floor and so
// many ms.
func atMostAbove(ms float64, of string) goal {
	return func(r *Row) Target {
		t := Target{Goal: fmt.Sprintf("at most %g ms and %s", ms, of), Value: r.Tine.Median}
		t.Met = r.Floor != nil && r.Tine.Median <= r.Floor.Median+ms
		return t
	}
}

// deepest is the largest of the depths.
func deepest(depths []int) int { return slices.MaxFunc(append([]int{0}, depths...), cmp.Compare[int]) }
