package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

// script is a side whose machines are not there; it notes what is done to it.
type script struct {
	name   string
	log    *journal
	fail   int // the fork that fails, from 1 on; 0: none
	deaf   bool
	alive  atomic.Int64
	forked atomic.Int64
}

// journal is what was done, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (s *script) prepare(_ context.Context, how start) error {
	s.log.add("%s prepares %s", s.name, how)
	return nil
}

func (s *script) raise(ctx context.Context, how start) (machine, error) {
	s.log.add("%s raises %s", s.name, how)
	if s.fail == int(s.forked.Add(1)) {
		return nil, fmt.Errorf("%w: no luck", errdef.ErrExhausted)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s.alive.Add(1)
	return &puppet{s: s}, nil
}

func (s *script) fork(ctx context.Context, n int, each func(machine, error)) error {
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() { each(s.raise(ctx, coldFork)) })
	}
	wg.Wait()
	return nil
}

func (s *script) freeze(context.Context) (frozen, error) {
	return frozen{freeze: time.Millisecond, commit: time.Second}, nil
}

func (s *script) close(context.Context) error { return nil }

type puppet struct {
	s    *script
	once sync.Once
}

func (p *puppet) with(ctx context.Context, ask func(context.Context, *guest.Client) error) error {
	if p.s.deaf {
		return errDeaf
	}
	return ask(ctx, nil)
}

func (p *puppet) memory() (private, shared int64, err error) { return 20 << 20, 30 << 20, nil }

func (p *puppet) end(context.Context) error {
	p.once.Do(func() { p.s.alive.Add(-1) })
	return nil
}

var errDeaf = errors.New("deaf")

// newSuite has two sides and one end point that answers at once.
func newSuite(a, b *script) *suite {
	log := &journal{}
	a.name, a.log, b.name, b.log = "A", log, "B", log
	return &suite{
		opts: Options{Rounds: 2, Forks: []int{3, 11}}, sides: []side{a, b}, result: &Result{},
		points: []point{{Ping, func(context.Context, *guest.Client) error { return nil }}},
	}
}

func (s *script) left(t *testing.T) {
	t.Helper()
	if n := s.alive.Load(); n != 0 {
		t.Errorf("%d machines of %s are left", n, s.name)
	}
}

func TestSidesTakeTurns(t *testing.T) {
	t.Parallel()
	a, b := &script{}, &script{}
	s := newSuite(a, b)
	if err := s.starts(t.Context(), poolFork); err != nil {
		t.Fatal(err)
	}
	ready := []string{"A prepares fork from the pool", "B prepares fork from the pool"}
	round := slices.Concat(ready, []string{"A raises fork from the pool"}, ready, []string{"B raises fork from the pool"})
	if diff := cmp.Diff(slices.Concat(round, round), a.log.lines); diff != "" {
		t.Error(diff)
	}
	if len(s.result.Rows) != 1 || s.result.Rows[0].Tine.Samples != 2 || s.result.Rows[0].Floor.Samples != 2 {
		t.Errorf("rows: %+v", s.result.Rows)
	}
	a.left(t)
	b.left(t)
}

func TestAnswerThatFailsEndsTheMachine(t *testing.T) {
	t.Parallel()
	a, b := &script{}, &script{deaf: true}
	s := newSuite(a, b)
	for name, work := range map[string]func() error{
		"start":      func() error { return s.starts(t.Context(), coldBoot) },
		"round_trip": func() error { return s.roundTrips(t.Context()) },
	} {
		if err := work(); !errors.Is(err, errDeaf) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	a.left(t)
	b.left(t)
}

func TestForkThatFailsIsCounted(t *testing.T) {
	t.Parallel()
	a, b := &script{fail: 2}, &script{}
	s := newSuite(a, b)
	if err := s.parallel(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := s.result.Parallel[0]
	if p.Forks != 3 || p.Tine.Answered != 2 || p.Tine.Error == "" || p.Floor.Answered != 3 || p.Floor.Error != "" {
		t.Errorf("parallel: %+v, floor %+v", p, p.Floor)
	}
	for _, row := range s.result.Rows { // of the eleven: they are nearest to ten
		if row.Tine.Samples != 11 || row.Floor.Samples != 11 || row.Unit != MiB {
			t.Errorf("memory: %+v", row)
		}
	}
	a.left(t)
	b.left(t)
}

func TestCanceledForkIsNoResult(t *testing.T) {
	t.Parallel()
	a, b := &script{}, &script{}
	s := newSuite(a, b)
	ctx, cancel := context.WithCancel(t.Context())
	s.points[0].ask = func(context.Context, *guest.Client) error { cancel(); return nil }
	if err := s.parallel(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	if len(s.result.Parallel) != 0 {
		t.Errorf("parallel: %+v", s.result.Parallel)
	}
	a.left(t)
	b.left(t)
}

func TestOptions(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		opts Options
		ok   bool
	}{
		"plain":      {Options{Rounds: 1, Forks: []int{1, 100}}, true},
		"no_forks":   {Options{Rounds: 1}, true},
		"no_rounds":  {Options{Forks: []int{1}}, false},
		"too_many":   {Options{Rounds: maxRounds + 1}, false},
		"zero_forks": {Options{Rounds: 1, Forks: []int{1, 0}}, false},
		"over_limit": {Options{Rounds: 1, Forks: []int{101}}, false},
		"too_long":   {Options{Rounds: 1, Forks: make([]int, maxForks+1)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := tt.opts.check(100); (err == nil) != tt.ok || err != nil && !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("error %v", err)
			}
		})
	}
}
