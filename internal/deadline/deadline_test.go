package deadline_test

import (
	"context"
	"errors"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tinevm/tine/internal/deadline"
)

func TestDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := deadline.New()
		if err := d.Context().Err(); err != nil {
			t.Errorf("without a deadline: %v", err)
		}
		// Who waits already is bound by one that is set, and moved, later.
		waits := d.Context()
		d.Set(time.Now().Add(time.Second))
		d.Set(time.Now().Add(time.Minute))
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if waits.Err() != nil {
			t.Error("the deadline before counts still")
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if err := context.Cause(waits); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("passed: %v", err)
		}
		// One that has passed can be taken back.
		d.Set(time.Time{})
		if err := d.Context().Err(); err != nil {
			t.Errorf("taken back: %v", err)
		}
		d.Set(time.Now().Add(-time.Second))
		if err := context.Cause(d.Context()); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("in the past: %v", err)
		}
	})
}

func TestClose(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		d := deadline.New()
		waits := d.Context()
		d.Set(time.Now().Add(time.Hour))
		if !d.Close(net.ErrClosed) || d.Close(os.ErrInvalid) {
			t.Error("it is the first call that closes")
		}
		d.Set(time.Time{})
		for _, ctx := range []context.Context{waits, d.Context()} {
			if err := context.Cause(ctx); !errors.Is(err, net.ErrClosed) {
				t.Errorf("closed: %v", err)
			}
		}
		late := deadline.New()
		late.Set(time.Now().Add(-time.Second))
		late.Close(net.ErrClosed)
		if err := context.Cause(late.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("closed after the deadline: %v", err)
		}
	})
}
