package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
)

// The targets of branches.
const (
	pauseLimit = 1.3  // times the floor, in mode diff
	pauseAbove = 10   // ms above the engine's own, in mode live
	diskLimit  = 1.05 // times what was written to
)

// taken is one branch, in ms and MiB.
type taken struct {
	pause, gap, total, disk float64
	// The floors.
	save, copy, write float64 // ms
	quiet             float64 // the longest gap without a branch
	dirtied           float64 // MiB
	warning           string
}

// pauses measures branches of one guest. Each is removed before the next, so
// that all are relative to the template and hold all that the guest has written.
func (g *grove) pauses(ctx context.Context, p *plot, l load) (err error) {
	f, err := p.fork(ctx, p.ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	got, waits := map[sandbox.Mode][]taken{}, map[sandbox.Mode]*waits{}
	err = f.with(ctx, func(ctx context.Context, c *guest.Client) error {
		return withWorker(ctx, c, l.dirty, func(w *worker) error {
			s := &scene{plot: p, fork: f, client: c, worker: w, load: l}
			if roundsErr := g.rounds(ctx, s, got); roundsErr != nil {
				return roundsErr
			}
			return g.clients(ctx, s, waits)
		})
	})
	if err != nil {
		return err
	}
	for _, mode := range modes() {
		row := BranchRow{MemoryMiB: p.memory, Case: l.String(), Mode: string(mode)}
		g.addPauses(row, l, got[mode])
		row.Step, row.Point = stepWait, Ping
		g.add(row, Milliseconds, waits[mode].branched, waits[mode].quiet)
	}
	return nil
}

// rounds has the modes take turns.
func (g *grove) rounds(ctx context.Context, s *scene, got map[sandbox.Mode][]taken) error {
	for i := range g.opts.Rounds {
		progress.ReportAmount(ctx, step, fmt.Sprintf("branching a guest of %d MiB, %s", s.plot.memory, s.load), int64(i+1), int64(g.opts.Rounds))
		for _, mode := range modes() {
			t, err := s.take(ctx, mode)
			if err != nil {
				return fmt.Errorf("mode %s: %w", mode, err)
			}
			got[mode] = append(got[mode], t)
		}
	}
	return nil
}

// scene is a guest that works while it is branched.
type scene struct {
	plot   *plot
	fork   *forked
	client *guest.Client
	worker *worker
	load   load
}

// take takes one branch, and measures the floor of it at once.
func (s *scene) take(ctx context.Context, mode sandbox.Mode) (t taken, err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	if err = s.work(ctx, workWatch); err != nil {
		return t, err
	}
	dirtied, err := s.plot.dirtied(s.fork)
	if err != nil {
		return t, err
	}
	begin := time.Now()
	snap, err := s.plot.branch(ctx, s.fork, mode)
	took := time.Since(begin)
	if err != nil {
		return t, err
	}
	defer func() { err = errors.Join(err, s.plot.remove(ctx, snap.Tag)) }()
	if t.gap, err = s.worker.gap(ctx); err != nil {
		return t, err
	}
	t.pause, t.total, t.disk, t.dirtied = snap.PauseMS, ms(took), mib(snap.DiffPhysicalBytes), mib(dirtied)
	t.warning = snap.Warning
	if t.quiet, err = s.quiet(ctx, took); err != nil {
		return t, err
	}
	return t, s.floor(ctx, &t, dirtied, snap.DiffPhysicalBytes)
}

// work has the worker begin: to write, if that is its load, or else what it is
// told.
func (s *scene) work(ctx context.Context, order string) error {
	if s.load.writing {
		order = workWrite
	}
	_, err := s.worker.tell(ctx, order)
	return err
}

// quiet is the longest gap in as long a time without a branch.
func (s *scene) quiet(ctx context.Context, long time.Duration) (float64, error) {
	if err := pass(ctx, long); err != nil {
		return 0, err
	}
	return s.worker.gap(ctx)
}

// floor measures what no branch can be quicker than. The guest rests.
func (s *scene) floor(ctx context.Context, t *taken, dirtied, stored int64) error {
	if _, err := s.worker.tell(ctx, workRest); err != nil {
		return err
	}
	f := s.plot.floor
	save, err := f.save(ctx)
	if err != nil {
		return err
	}
	copied, err := f.copy(dirtied)
	if err != nil {
		return err
	}
	written, err := f.write(stored)
	t.save, t.copy, t.write = ms(save), ms(copied), ms(written)
	return err
}

// addPauses adds the rows of one guest and mode.
func (g *grove) addPauses(row BranchRow, l load, all []taken) {
	of := func(what func(taken) float64) []float64 {
		var samples []float64
		for _, t := range all {
			samples = append(samples, what(t))
			if t.warning != "" {
				row.Warning = t.warning
			}
		}
		return samples
	}
	pause := of(func(t taken) float64 { return t.pause })
	row.Step = stepPause
	switch sandbox.Mode(row.Mode) {
	case sandbox.Live:
		g.add(row, Milliseconds, pause, of(func(t taken) float64 { return t.save }), livePause(l)...)
	case sandbox.Diff:
		g.add(row, Milliseconds, pause, of(func(t taken) float64 { return t.save + t.copy }), atMost(pauseLimit, "the floor"))
	default:
		g.add(row, Milliseconds, pause, of(func(t taken) float64 { return t.save + t.copy }))
	}
	row.Step = stepGap
	g.add(row, Milliseconds, of(func(t taken) float64 { return t.gap }), of(func(t taken) float64 { return t.quiet }))
	row.Step = stepTotal
	g.add(row, Milliseconds, of(func(t taken) float64 { return t.total }), of(func(t taken) float64 { return t.save + t.copy + t.write }))
	row.Step = stepStored
	disk, dirtied := of(func(t taken) float64 { return t.disk }), of(func(t taken) float64 { return t.dirtied })
	if sandbox.Mode(row.Mode) == sandbox.Full {
		g.add(row, MiB, disk, nil) // the whole memory
		return
	}
	g.add(row, MiB, disk, dirtied, atMost(diskLimit, "what was written to"))
}

// livePause is the target of a live pause, which says nothing of guests that
// have written more.
func livePause(l load) []goal {
	if l.dirty > liveDirty {
		return nil
	}
	return []goal{atMostAbove(pauseAbove, "the engine's own")}
}
