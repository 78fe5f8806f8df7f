package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
)

// Isolation is what the measurements of isolation need beside the daemon.
type Isolation struct {
	// Unjailed is an engine like the daemon's own, without a jail. The caller
	// closes it.
	Unjailed vmm.Engine
	// Jail says how to open jails like that of the daemon's engine. Its Groups
	// must not be that engine's own.
	Jail jail.Config
}

// jailLimit is how much the jail may add to a fork, in ms.
const jailLimit = 5

// ward measures what isolation costs.
type ward struct {
	opts   Options
	sub    *subject
	dirs   *dirs
	result *Result
}

// measureIsolation is Measure for isolation.
func measureIsolation(ctx context.Context, sub *subject, opts Options) (_ *Result, err error) {
	switch {
	case opts.Isolation.Unjailed == nil:
		return nil, fmt.Errorf("%w: there is no engine without a jail to compare with", errdef.ErrUnsupported)
	case !sub.d.Sandboxes.Engine.Caps().Jail:
		err = fmt.Errorf("%w: this host has no jail to measure", errdef.ErrUnsupported)
		return nil, errdef.WithHint(err, "tine doctor says what is missing")
	}
	work, err := os.MkdirTemp(filepath.Dir(sub.d.Sandboxes.Dir), "bench-")
	if err != nil {
		return nil, fmt.Errorf("make work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	w := &ward{opts: opts, sub: sub, dirs: &dirs{root: work}, result: sub.result(opts)}
	for _, part := range []struct {
		name string
		do   func(context.Context) error
	}{{"jail", w.jail}, {"parts of the jail", w.cells}, {"network", w.network}, {"proxy", w.proxy}} {
		if err = w.try(ctx, part.name, part.do); err != nil {
			return nil, err
		}
	}
	return w.result, nil
}

// try does a part. One that fails becomes a row that says why, unless ctx has
// ended.
func (w *ward) try(ctx context.Context, name string, part func(context.Context) error) error {
	err := part(ctx)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err != nil {
		w.result.Isolation = append(w.result.Isolation, IsolationRow{Row: Row{Step: name, Unit: none}, Error: err.Error()})
	}
	return nil
}

// add adds a row: samples of what is measured, and of its floor if there are any.
func (w *ward) add(row IsolationRow, tine, floor []float64, goals ...goal) {
	row.Tine = summarize(tine)
	if len(floor) > 0 {
		sum := summarize(floor)
		row.Floor, row.Ratio = &sum, ratio(row.Tine.Median, sum.Median)
	}
	for _, goal := range goals {
		row.Targets = append(row.Targets, goal(&row.Row))
	}
	w.result.Isolation = append(w.result.Isolation, row)
}

// atMostOf is for a number that should not be larger, whatever the floor is.
func atMostOf(limit float64, unit string) goal {
	return func(r *Row) Target {
		return Target{Goal: fmt.Sprintf("at most %g %s", limit, unit), Value: r.Tine.Median, Met: r.Tine.Median <= limit}
	}
}

// byTurns measures each side once in a turn, A, B, A, B. The first turn is for
// warming up.
func (w *ward) byTurns(ctx context.Context, name string, rounds int, sides ...measured) ([][]float64, error) {
	samples := make([][]float64, len(sides))
	for i := range rounds + 1 {
		progress.ReportAmount(ctx, step, "measuring "+name, int64(i), int64(rounds))
		for side, what := range sides {
			took, err := what(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			if i > 0 {
				samples[side] = append(samples[side], took)
			}
		}
	}
	return samples, nil
}

// differences are those of samples that were taken by turns: the host is the same
// for the two of one turn, more than it is for all of a side.
func differences(a, b []float64) []float64 {
	var all []float64
	for i := range min(len(a), len(b)) {
		all = append(all, a[i]-b[i])
	}
	return all
}

// restTime is how long the host is left alone before a sample: the jail makes new
// launchers 50 ms after some were taken, and they must not be in the way.
const restTime = 150 * time.Millisecond

func rest(ctx context.Context) error {
	timer := time.NewTimer(restTime)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// manager makes a manager of the bench's own, whose sandboxes end with it.
func (w *ward) manager(ctx context.Context, engine vmm.Engine, net sandbox.NetConfig) (*sandbox.Manager, func() error, error) {
	dir, err := w.dirs.make()
	if err != nil {
		return nil, nil, err
	}
	d := w.sub.d.Sandboxes
	m, err := sandbox.NewManager(ctx, sandbox.Config{
		Dir: dir, Engine: engine, Snapshots: d.Snapshots, Images: d.Images, Logger: d.Logger, Limits: d.Limits, Net: net, Ephemeral: true,
	})
	if err != nil {
		return nil, nil, err
	}
	return m, func() error {
		ending, cancel := late(ctx)
		defer cancel()
		return m.Close(ending)
	}, nil
}

// jail measures forks with the jail and without, by turns.
func (w *ward) jail(ctx context.Context) (err error) {
	ours := w.sub.d.Sandboxes.Engine
	jailed, end, err := w.manager(ctx, ours, sandbox.NetConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	free, endFree, err := w.manager(ctx, w.opts.Isolation.Unjailed, sandbox.NetConfig{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, endFree()) }()
	bare, pools := w.opts.Isolation.Unjailed, []*sandbox.Manager{jailed, free}
	for _, p := range []pair{
		{string(coldFork), Exec, w.fork(jailed, point{Exec, askExec}), w.fork(free, point{Exec, askExec})},
		{string(coldFork), Ping, w.fork(jailed, point{Ping, askPing}), w.fork(free, point{Ping, askPing})},
		{"machine restored, not run", "", w.restored(ours), w.restored(bare)},
		{string(poolFork), Exec, w.pooled(jailed, pools), w.pooled(free, pools)}, // last: the pools stay
	} {
		if err = w.try(ctx, p.name, func(ctx context.Context) error { return w.beside(ctx, p) }); err != nil {
			return err
		}
	}
	return nil
}

// pair is what is measured with the jail, and without.
type pair struct {
	name, point string
	tine, floor measured
}

// beside adds the rows of a pair: both, and what the jail adds.
func (w *ward) beside(ctx context.Context, p pair) error {
	got, err := w.byTurns(ctx, p.name+" with a jail and without", w.opts.Rounds, p.tine, p.floor)
	if err != nil {
		return err
	}
	head := IsolationRow{Row: Row{Step: p.name, Point: p.point, Unit: Milliseconds}, FloorIs: "the same engine without a jail"}
	w.add(head, got[0], got[1])
	head.Step, head.FloorIs = "the jail adds to: "+p.name, ""
	head.Note = "differences within a turn"
	w.add(head, differences(got[0], got[1]), nil, atMostOf(jailLimit, Milliseconds))
	return nil
}

// fork forks a sandbox, asks it once and ends it.
func (w *ward) fork(m *sandbox.Manager, p point) measured {
	return func(ctx context.Context) (took float64, err error) {
		if err = rest(ctx); err != nil {
			return 0, err
		}
		ctx, cancel := bound(ctx, sampleTime)
		defer cancel()
		begin := time.Now()
		f, err := forkOne(ctx, m, sandbox.ForkRequest{Snapshot: w.sub.snap.Digest, NoPool: true})
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, f.end(ctx)) }()
		err = f.with(ctx, p.ask)
		return ms(time.Since(begin)), err
	}
}

// pooled takes a parked fork, has it execute something and ends it. It begins
// when all pools are full.
func (w *ward) pooled(m *sandbox.Manager, pools []*sandbox.Manager) measured {
	return func(ctx context.Context) (took float64, err error) {
		ctx, cancel := bound(ctx, sampleTime)
		defer cancel()
		for _, p := range pools {
			if err = fillPool(ctx, p, w.sub.snap.Digest); err != nil {
				return 0, err
			}
		}
		if err = rest(ctx); err != nil {
			return 0, err
		}
		begin := time.Now()
		f, err := forkOne(ctx, m, sandbox.ForkRequest{Snapshot: w.sub.snap.Digest})
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, f.end(ctx)) }()
		if info, getErr := m.Get(f.id); getErr != nil || !info.FromPool {
			return 0, errors.Join(errNotWoken(), getErr)
		}
		err = f.with(ctx, askExec)
		return ms(time.Since(begin)), err
	}
}

// forkOne makes one sandbox. The caller ends it.
func forkOne(ctx context.Context, m *sandbox.Manager, req sandbox.ForkRequest) (*forked, error) {
	req.N = 1
	results, err := m.Fork(ctx, req)
	if err == nil {
		err = results[0].Err
	}
	if err != nil {
		return nil, err
	}
	return &forked{m, results[0].Sandbox.ID}, nil
}

// restored brings a machine up to where it could run, which no guest code has a
// part in.
func (w *ward) restored(engine vmm.Engine) measured {
	return func(ctx context.Context) (took float64, err error) {
		if err = rest(ctx); err != nil {
			return 0, err
		}
		dir, err := w.dirs.make()
		if err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		begin := time.Now()
		vm, err := engine.Restore(ctx, vmm.RestoreSpec{
			Common: vmm.Common{ID: "bench", Dir: dir, Machine: w.sub.snap.Manifest.Machine, Root: w.sub.img.RootPath(), DieWithParent: true},
			Memory: w.sub.snap.MemoryPath(), Device: w.sub.snap.DevicePath(), Paused: true,
		})
		if err != nil {
			return 0, err
		}
		took = ms(time.Since(begin))
		ending, cancel := late(ctx)
		defer cancel()
		return took, vm.Kill(ending)
	}
}

// crowdSize is how many sandboxes are forked at once: the largest number that
// was asked for.
func (o *Options) crowdSize() int { return slices.Max(append([]int{0}, o.Forks...)) }
