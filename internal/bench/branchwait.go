package bench

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
)

// waits are the longest times, in ms, between two answers to one who pings all
// the time: around a branch, and in as long a time without one. The guest's own
// clock stands still while it is paused; that of the host does not.
type waits struct{ branched, quiet []float64 }

// clients measures the longest waits, with the modes taking turns.
func (g *grove) clients(ctx context.Context, s *scene, got map[sandbox.Mode]*waits) error {
	for i := range g.opts.Rounds {
		for _, mode := range modes() {
			progress.ReportAmount(ctx, step, fmt.Sprintf("pinging a guest of %d MiB, %s, while it is branched", s.plot.memory, s.load), int64(i+1), int64(g.opts.Rounds))
			if got[mode] == nil {
				got[mode] = &waits{}
			}
			if err := s.wait(ctx, mode, got[mode]); err != nil {
				return fmt.Errorf("mode %s: %w", mode, err)
			}
		}
	}
	return nil
}

// wait takes one branch under pings.
func (s *scene) wait(ctx context.Context, mode sandbox.Mode, w *waits) (err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	if err = s.work(ctx, workRest); err != nil {
		return err
	}
	begin := time.Now()
	ping := func() error { return askPing(ctx, s.client) }
	branched, err := longest(ping, func() error {
		snap, branchErr := s.plot.branch(ctx, s.fork, mode)
		if branchErr != nil {
			return branchErr
		}
		return s.plot.remove(ctx, snap.Tag)
	})
	if err != nil {
		return err
	}
	long := time.Since(begin)
	quiet, err := longest(ping, func() error { return pass(ctx, long) })
	w.branched, w.quiet = append(w.branched, branched), append(w.quiet, quiet)
	return err
}

// longest is the longest time between two answers, in ms, while work is done.
func longest(ask, work func() error) (most float64, err error) {
	var wg sync.WaitGroup
	var failed error
	stop := make(chan struct{})
	wg.Go(func() { failed = work(); close(stop) })
	last := time.Now()
	for err == nil && !closed(stop) {
		err = ask()
		most = max(most, ms(time.Since(last)))
		last = time.Now()
	}
	wg.Wait()
	if failed != nil {
		err = failed
	}
	return most, err
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// pass lets time pass.
func pass(ctx context.Context, long time.Duration) error {
	select {
	case <-time.After(long):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
