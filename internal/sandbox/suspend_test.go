package sandbox

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

func TestSuspendAndResume(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo 1 > count")
	for range 2 { // the second is of a machine that was resumed
		for range 2 { // and it is idempotent
			if info, err := m.Suspend(t.Context(), id); err != nil || info.State != Suspended || info.PID != 0 {
				t.Fatalf("suspend: %+v, %v", info, err)
			}
		}
		if n := w.engine.alive(); n != 0 {
			t.Errorf("%d machines", n)
		}
		if info, err := m.Resume(t.Context(), id); err != nil || info.State != Running {
			t.Fatalf("resume: %+v, %v", info, err)
		}
		sh(t, m, id, "echo 1 >> count")
	}
	if got := sh(t, m, id, "wc -l < count"); got != "3" {
		t.Errorf("count has %s lines", got)
	}
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	ping(t, m, id) // whoever uses it resumes it
	w.sound(t)
	if err := m.Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
	w.nothing(t, m)
}

func TestSuspendedSandboxes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo asleep > at")
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	branch(t, m, id, BranchRequest{Tag: "b"})
	if info, err := m.Get(id); err != nil || info.State != Suspended {
		t.Errorf("after a branch: %+v, %v", info, err)
	}
	if got := sh(t, m, fork(t, m, 1, from("b"))[0], "cat at"); got != "asleep" {
		t.Errorf("its fork: %q", got)
	}
	if _, err := m.Rollback(t.Context(), id, "py"); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, id, "test ! -e at && cat state"); got != "warm" {
		t.Errorf("rolled back: %q", got)
	}
	if held, err := w.snaps.HeldNames(); err != nil || len(held) > 0 {
		t.Errorf("held: %v, %v", held, err)
	}
	w.sound(t)
}

func TestFailedSuspendRunsOn(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"pause", "save-device"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			w.template(t, m)
			id := fork(t, m, 1)[0]
			fault := errors.New("no luck")
			w.engine.onStep(func(_ context.Context, at string) error {
				if at == step {
					return fault
				}
				return nil
			})
			if _, err := m.Suspend(t.Context(), id); !errors.Is(err, fault) {
				t.Errorf("got %v", err)
			}
			w.engine.onStep(nil)
			ping(t, m, id)
			w.sound(t)
		})
	}
}

func TestIdleSandboxIsSuspended(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1, func(req *ForkRequest) { req.IdleTTL, req.IdleSuspend = 50*time.Millisecond, true })[0]
	asleep := func() bool { info, err := m.Get(id); return err == nil && info.State == Suspended }
	eventually(t, "it to be suspended", asleep)
	ping(t, m, id)
	eventually(t, "it to be suspended again", asleep)
}

func TestSuspendedOutlivesTheDaemon(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, lasting)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo there > at")
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	closeManager(t, m)
	m = w.manager(t, lasting)
	if info, err := m.Get(id); err != nil || info.State != Suspended {
		t.Fatalf("after a restart: %+v, %v", info, err)
	}
	if got := sh(t, m, id, "cat at"); got != "there" {
		t.Errorf("resumed: %q", got)
	}
	if err := m.Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
}

func TestRollback(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo good > at")
	good := branch(t, m, id, BranchRequest{Tag: "good"})
	sh(t, m, id, "echo bad > at")
	info, err := m.Rollback(t.Context(), id, "good")
	if err != nil || info.ID != id || info.State != Running || info.Head != good.Digest {
		t.Fatalf("rollback: %+v, %v", info, err)
	}
	if got := sh(t, m, id, "cat at"); got != "good" {
		t.Errorf("rolled back: %q", got)
	}
	if n := w.engine.alive(); n != 1 {
		t.Errorf("%d machines", n)
	}
	if next := branch(t, m, id, BranchRequest{}); next.Manifest.Parent != good.Digest {
		t.Errorf("the next branch has parent %s", next.Manifest.Parent)
	}

	// One that fails changes nothing.
	sh(t, m, id, "echo again > at")
	for _, step := range []string{"restore", "dial"} {
		fault := errors.New("no luck")
		w.engine.onStep(func(_ context.Context, at string) error {
			if at == step {
				return fault
			}
			return nil
		})
		if _, err := m.Rollback(t.Context(), id, "good"); !errors.Is(err, fault) {
			t.Errorf("%s: got %v", step, err)
		}
		w.engine.onStep(nil)
		if got := sh(t, m, id, "cat at"); got != "again" {
			t.Errorf("%s: after the failure: %q", step, got)
		}
	}
	if _, err := m.Rollback(t.Context(), id, "nowhere"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("to no node: %v", err)
	}
	if seats, err := filepath.Glob(filepath.Join(m.dir(id), "[01]")); err != nil || len(seats) != 1 {
		t.Errorf("seats: %v, %v", seats, err)
	}
	w.sound(t)
}
