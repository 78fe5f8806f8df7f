package bench

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
)

// step is what this package's progress events are about.
const step = "bench"

// Bounds on the time of one sample; a guest that hangs ends the bench.
const (
	sampleTime = 3 * time.Minute
	groupTime  = 15 * time.Minute
)

// idle is the number of forks whose memory is looked at, or the nearest to it
// that is measured.
const idle = 10

// suite measures everything on all sides, which take turns, so that what else
// the host does hits them alike.
type suite struct {
	opts   Options
	sides  []side // Tine, then the floor if there is one
	points []point
	snap   snapshot.Snapshot
	result *Result
}

// slow is the number of rounds for what takes seconds.
func (s *suite) slow() int { return (s.opts.Rounds + 2) / 3 }

func (s *suite) run(ctx context.Context) error {
	for _, how := range []start{coldFork, poolFork, coldBoot} {
		if err := s.starts(ctx, how); err != nil {
			return err
		}
	}
	if err := s.endPools(ctx); err != nil {
		return err
	}
	for _, work := range []func(context.Context) error{s.roundTrips, s.parallel, s.freezes, s.sizes} {
		if err := work(ctx); err != nil {
			return err
		}
	}
	return nil
}

// turns has the sides take turns: A, B, A, B.
func (s *suite) turns(n int, measure func(i, which int) error) error {
	for i := range n {
		for which := range s.sides {
			if err := measure(i, which); err != nil {
				return err
			}
		}
	}
	return nil
}

// samples makes room for the samples of each side.
func (s *suite) samples() [][]float64 { return make([][]float64, len(s.sides)) }

// starts measures how long a start takes to each end point.
func (s *suite) starts(ctx context.Context, how start) error {
	rounds := s.opts.Rounds
	if how == coldBoot {
		rounds = s.slow()
	}
	for _, p := range s.points {
		got := s.samples()
		err := s.turns(rounds, func(i, which int) error {
			progress.ReportAmount(ctx, step, fmt.Sprintf("measuring %s to %s", how, p.name), int64(i+1), int64(rounds))
			took, err := s.first(ctx, how, which, p)
			got[which] = append(got[which], ms(took))
			return err
		})
		if err != nil {
			return fmt.Errorf("%s to %s: %w", how, p.name, err)
		}
		s.result.addRow(string(how), p.name, Milliseconds, got)
	}
	return nil
}

// first brings a machine up, asks it once and ends it. All sides are ready
// before it begins, so that none of them works in the background.
func (s *suite) first(ctx context.Context, how start, which int, p point) (took time.Duration, err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	for _, side := range s.sides {
		if err = side.prepare(ctx, how); err != nil {
			return 0, err
		}
	}
	begin := time.Now()
	m, err := s.sides[which].raise(ctx, how)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.end(ctx)) }()
	err = m.with(ctx, p.ask)
	return time.Since(begin), err
}

// endPools ends what the sides have parked, which would else be in the way.
func (s *suite) endPools(ctx context.Context) error {
	var errs []error
	for _, side := range s.sides {
		errs = append(errs, side.close(ctx))
	}
	return errors.Join(errs...)
}

// repeats is how often a round trip to an end point is measured.
func repeats(point string) (warm, measured int) {
	switch point {
	case Ping:
		return 20, 200
	case Eval:
		return 5, 50
	}
	return 3, 20
}

// roundTrips measures answers of one warm fork of each side.
func (s *suite) roundTrips(ctx context.Context) (err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	machines := make([]machine, len(s.sides))
	for i, side := range s.sides {
		if machines[i], err = side.raise(ctx, coldFork); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, machines[i].end(ctx)) }()
	}
	for _, p := range s.points {
		progress.Report(ctx, step, "measuring round trips of "+p.name)
		warm, measured := repeats(p.name)
		got := s.samples()
		err = s.turns(warm+measured, func(i, which int) error {
			begin := time.Now()
			failed := machines[which].with(ctx, p.ask)
			if took := time.Since(begin); i >= warm {
				got[which] = append(got[which], ms(took))
			}
			return failed
		})
		if err != nil {
			return fmt.Errorf("round trip of %s: %w", p.name, err)
		}
		s.result.addRow(stepRoundTrip, p.name, Milliseconds, got)
	}
	return nil
}

// group gathers what becomes of forks made side by side.
type group struct {
	mu       sync.Mutex
	machines []machine
	times    []float64
	wall     float64
	err      error // the first

	private, shared []float64 // MiB
}

// parallel measures forks side by side, and the memory of those that are as
// many as idle, or nearly.
func (s *suite) parallel(ctx context.Context) error {
	var memory [][]*group
	shown := 0 // how many forks memory is of
	for _, n := range s.opts.Forks {
		for _, p := range s.points {
			if p.name == Eval {
				continue // a first answer is a ping here
			}
			groups, err := s.parallelOne(ctx, n, p)
			if err != nil {
				return fmt.Errorf("%d forks at once to %s: %w", n, p.name, err)
			}
			if p.name == Ping && (memory == nil || distance(n) < distance(shown)) {
				memory, shown = groups, n
			}
		}
	}
	s.memory(memory)
	return nil
}

func distance(n int) int { return max(n-idle, idle-n) }

func (s *suite) parallelOne(ctx context.Context, n int, p point) ([][]*group, error) {
	groups := make([][]*group, len(s.sides))
	err := s.turns(s.slow(), func(i, which int) error {
		progress.ReportAmount(ctx, step, fmt.Sprintf("measuring %d forks at once to %s", n, p.name), int64(i+1), int64(s.slow()))
		g, err := s.together(ctx, s.sides[which], n, p)
		groups[which] = append(groups[which], g)
		return err
	})
	if err != nil {
		return nil, err
	}
	row := Parallel{Forks: n, Point: p.name, Tine: sum(groups[0])}
	if len(groups) > 1 {
		floor := sum(groups[1])
		row.Floor, row.Ratio = &floor, ratio(row.Tine.Wall.Median, floor.Wall.Median)
	}
	s.result.Parallel = append(s.result.Parallel, row)
	return groups, nil
}

// together forks n machines at once, asks each, and ends all when all have
// answered. A machine that fails is counted; it fails the bench only when ctx
// has ended or the whole was refused.
func (s *suite) together(ctx context.Context, from side, n int, p point) (_ *group, err error) {
	ctx, cancel := bound(ctx, groupTime)
	defer cancel()
	g := &group{}
	defer func() { err = errors.Join(err, g.end(ctx)) }()
	begin := time.Now()
	err = from.fork(ctx, n, func(m machine, err error) {
		if err == nil {
			g.add(m)
			err = m.with(ctx, p.ask)
		}
		g.answered(time.Since(begin), err)
	})
	g.wall = ms(time.Since(begin))
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == nil {
		g.look()
	}
	return g, err
}

func (g *group) add(m machine) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.machines = append(g.machines, m)
}

func (g *group) answered(after time.Duration, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil {
		g.times = append(g.times, ms(after))
	} else if g.err == nil {
		g.err = err
	}
}

// look reads how much memory the machines use while all are there. One that has
// died meanwhile shows none, and is told as the failure it is.
func (g *group) look() {
	for _, m := range g.machines {
		private, shared, err := m.memory()
		if err != nil {
			g.err = errors.Join(g.err, err)
			continue
		}
		g.private, g.shared = append(g.private, mib(private)), append(g.shared, mib(shared))
	}
}

func (g *group) end(ctx context.Context) error {
	errs := make([]error, len(g.machines))
	var wg sync.WaitGroup
	for i, m := range g.machines {
		wg.Go(func() { errs[i] = m.end(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// sum puts the rounds of one side together.
func sum(groups []*group) Group {
	out := Group{Answered: len(groups[0].times)}
	var walls, each []float64
	for _, g := range groups {
		out.Answered = min(out.Answered, len(g.times))
		walls, each = append(walls, g.wall), append(each, g.times...)
		if out.Error == "" && g.err != nil {
			out.Error = g.err.Error()
		}
	}
	out.Wall, out.Each = summarize(walls), summarize(each)
	return out
}

// memory adds the rows of what an idle fork uses.
func (s *suite) memory(groups [][]*group) {
	private, shared := s.samples(), s.samples()
	for which, rounds := range groups {
		for _, g := range rounds {
			private[which] = append(private[which], g.private...)
			shared[which] = append(shared[which], g.shared...)
		}
	}
	if len(groups) > 0 {
		s.result.addRow(stepPrivate, "", MiB, private)
		s.result.addRow(stepShared, "", MiB, shared)
	}
}

// freezes measures how long a warm template takes to become a snapshot.
func (s *suite) freezes(ctx context.Context) error {
	freeze, commit := s.samples(), s.samples()
	err := s.turns(s.slow(), func(i, which int) error {
		progress.ReportAmount(ctx, step, "measuring a snapshot", int64(i+1), int64(s.slow()))
		sample, cancel := bound(ctx, sampleTime)
		defer cancel()
		f, err := s.sides[which].freeze(sample)
		freeze[which] = append(freeze[which], ms(f.freeze))
		if f.commit > 0 {
			commit[which] = append(commit[which], ms(f.commit))
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	s.result.addRow(stepFreeze, "", Milliseconds, freeze)
	s.result.addRow(stepCommit, "", Milliseconds, commit)
	return nil
}

// sizes adds the size of the snapshot that was forked.
func (s *suite) sizes(context.Context) error {
	snap := s.snap
	disk, err := snap.DiskUse()
	if err != nil {
		return fmt.Errorf("size of snapshot: %w", err)
	}
	logical := snap.Manifest.Memory.Size + snap.Manifest.Device.Size
	s.result.addRow(stepLogical, "", MiB, [][]float64{{mib(logical)}})
	s.result.addRow(stepDisk, "", MiB, [][]float64{{mib(disk)}})
	return nil
}

// bound bounds one sample.
func bound(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("%w: no answer within %s", errdef.ErrTimeout, d))
}
