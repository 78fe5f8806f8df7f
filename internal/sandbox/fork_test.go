package sandbox

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmm"
)

func TestForksInheritAndAreIndependent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	labels := map[string]string{"job": "7"}
	ids := fork(t, m, 3, func(r *ForkRequest) { r.Labels = labels })
	labels["job"] = "8"
	for i, id := range ids {
		if got := sh(t, m, id, "cat state"); got != "warm" {
			t.Errorf("fork %d has %q, want what the template wrote", i, got)
		}
		sh(t, m, id, fmt.Sprintf("echo %d > state", i))
	}
	for i, id := range ids {
		if got := sh(t, m, id, "cat state"); got != fmt.Sprint(i) {
			t.Errorf("fork %d has %q, want what it wrote itself", i, got)
		}
		info, err := m.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		if info.State != Running || info.SnapshotTag != "py" || info.Labels["job"] != "7" || info.FromPool {
			t.Errorf("Get: %+v", info)
		}
	}
	list := m.List()
	for i := range list[1:] {
		if list[i+1].CreatedAt.Before(list[i].CreatedAt) {
			t.Error("List is not in order of age")
		}
	}
	for _, id := range ids {
		if err := m.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
		if err := m.Kill(t.Context(), id); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("second Kill: %v, want ErrNotFound", err)
		}
	}
	w.nothing(t, m)
}

func TestForkRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, func(c *Config) { c.Limits.Sandboxes = 3 })
	w.template(t, m)
	for name, tt := range map[string]struct {
		req  ForkRequest
		want error
	}{
		"none":              {ForkRequest{Snapshot: "py", N: 0}, errdef.ErrInvalid},
		"negative":          {ForkRequest{Snapshot: "py", N: -1}, errdef.ErrInvalid},
		"too-many-at-once":  {ForkRequest{Snapshot: "py", N: 100000}, errdef.ErrInvalid},
		"too-many-in-all":   {ForkRequest{Snapshot: "py", N: 4}, errdef.ErrExhausted},
		"unknown-snapshot":  {ForkRequest{Snapshot: "nope", N: 1}, errdef.ErrNotFound},
		"path":              {ForkRequest{Snapshot: "../py", N: 1}, errdef.ErrInvalid},
		"negative-ttl":      {ForkRequest{Snapshot: "py", N: 1, IdleTTL: -1}, errdef.ErrInvalid},
		"negative-lifetime": {ForkRequest{Snapshot: "py", N: 1, Lifetime: -1}, errdef.ErrInvalid},
		"negative-memory":   {ForkRequest{Snapshot: "py", N: 1, Limits: vmm.Limits{MemoryMiB: -1}}, errdef.ErrInvalid},
		"labels":            {ForkRequest{Snapshot: "py", N: 1, Labels: map[string]string{"a": strings.Repeat("x", maxLabels)}}, errdef.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := m.Fork(t.Context(), tt.req); !errors.Is(err, tt.want) {
				t.Errorf("Fork: %v, want %v", err, tt.want)
			}
		})
	}
	for _, id := range fork(t, m, 3) {
		if err := m.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	w.nothing(t, m)
}

func TestForkOfUnusableSnapshot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	snap := w.template(t, m)
	if err := m.CanFork(t.Context(), "py"); err != nil {
		t.Error(err)
	}
	t.Run("of-another-engine", func(t *testing.T) {
		w.engine.version = "-new"
		defer func() { w.engine.version = "" }()
		_, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1})
		if !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
			t.Errorf("Fork: %v, want ErrConflict and a hint", err)
		}
	})
	t.Run("without-its-image", func(t *testing.T) {
		if err := w.images.Remove("py"); err != nil {
			t.Fatal(err)
		}
		if _, err := w.images.GC(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		err := m.CanFork(t.Context(), snap.Digest)
		if !errors.Is(err, errdef.ErrConflict) || errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("CanFork: %v, want ErrConflict", err)
		}
	})
	w.nothing(t, m)
}

func TestOneFailingChild(t *testing.T) {
	t.Parallel()
	for _, all := range []bool{false, true} {
		t.Run(fmt.Sprintf("all-or-nothing-%v", all), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			w.template(t, m)
			w.engine.onStep(failOnce("dial", 3, fail))
			var told atomic.Int32
			results, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 5, AllOrNothing: all, Each: func(ForkResult) { told.Add(1) }})
			if err != nil {
				t.Fatal(err)
			}
			injected, failed := 0, 0
			for i, r := range results {
				if r.Index != i {
					t.Errorf("result %d has index %d", i, r.Index)
				}
				if errors.Is(r.Err, errInjected) {
					injected++
				}
				if r.Err == nil {
					ping(t, m, r.Sandbox.ID)
					continue
				}
				if failed++; r.Sandbox.ID != "" {
					t.Error("a failed child has a sandbox")
				}
			}
			want := map[bool]int{false: 1, true: 5}[all]
			if injected != 1 || failed != want || int(told.Load()) != 5 || len(m.List()) != 5-want {
				t.Errorf("%d injected, %d failed, %d told, %d listed", injected, failed, told.Load(), len(m.List()))
			}
			killAll(t, m)
			w.nothing(t, m)
		})
	}
}

func killAll(t testing.TB, m *Manager) {
	t.Helper()
	for _, i := range m.List() {
		if err := m.Kill(t.Context(), i.ID); err != nil {
			t.Error(err)
		}
	}
}

// TestCanceledFork: who cancels gets nothing, and nothing is left.
func TestCanceledFork(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"restore", "dial", "say"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			w.template(t, m)
			ctx, cancel := context.WithCancelCause(t.Context())
			why := errors.New("ctrl-C")
			var once sync.Once
			w.engine.onStep(failOnce(step, 4, func(ctx context.Context) error {
				once.Do(func() { cancel(why) })
				return hang(ctx)
			}))
			if results, err := m.Fork(ctx, ForkRequest{Snapshot: "py", N: 6}); !errors.Is(err, why) {
				t.Errorf("Fork: %v, %v, want the cause", results, err)
			}
			w.nothing(t, m)
		})
	}
}

// TestLateFork: a deadline leaves the children that were in time.
func TestLateFork(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	w.engine.onStep(failOnce("restore", 2, hang))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	results, err := m.Fork(ctx, ForkRequest{Snapshot: "py", N: 3})
	if err != nil {
		t.Fatal(err)
	}
	late := 0
	for _, r := range results {
		if errors.Is(r.Err, context.DeadlineExceeded) {
			late++
		}
	}
	if late < 1 || len(m.List()) != 3-late {
		t.Errorf("%d late, %d listed", late, len(m.List()))
	}
	killAll(t, m)
	w.nothing(t, m)
}

// TestFailuresLeaveNothing tries a fault at every step of a fork and of a
// template.
func TestFailuresLeaveNothing(t *testing.T) {
	t.Parallel()
	soon := func(c *Config) {
		c.Limits.Identity, c.Limits.Boot, c.Limits.Warmup = 200*time.Millisecond, 200*time.Millisecond, time.Millisecond
	}
	for mode, fault := range map[string]func(context.Context) error{"fails": fail, "hangs": hang} {
		for _, step := range []string{"restore", "dial", "say"} {
			t.Run("fork-"+step+"-"+mode, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				maker := w.manager(t)
				w.template(t, maker)
				m := w.manager(t, soon)
				w.engine.onStep(failOnce(step, 1, fault))
				results, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1})
				if err != nil {
					t.Fatal(err)
				}
				if err = results[0].Err; err == nil {
					t.Fatal("Fork succeeded")
				}
				if mode == "hangs" && !errors.Is(err, errdef.ErrTimeout) {
					t.Errorf("Fork: %v, want ErrTimeout", err)
				}
				w.nothing(t, m)
			})
		}
		for _, at := range []struct {
			step string
			nth  int
		}{{"start", 1}, {"dial", 1}, {"say", 1}, {"say", 2}, {"freeze", 1}} {
			if at == (struct {
				step string
				nth  int
			}{"say", 2}) && mode == "hangs" {
				continue // the warm-up's bound: 15 s of grace
			}
			t.Run(fmt.Sprintf("template-%s-%d-%s", at.step, at.nth, mode), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				m := w.manager(t, soon)
				w.engine.onStep(failOnce(at.step, at.nth, fault))
				_, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py", Warmup: []string{"true"}})
				if err == nil {
					t.Fatal("CreateSnapshot succeeded")
				}
				if mode == "hangs" && !errors.Is(err, errdef.ErrTimeout) {
					t.Errorf("CreateSnapshot: %v, want ErrTimeout", err)
				}
				w.nothing(t, m)
			})
		}
	}
}

func TestForkWhileSnapshotIsRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			err := w.snaps.Remove(context.WithoutCancel(t.Context()), "py")
			if err == nil {
				return
			}
			if !errors.Is(err, errdef.ErrConflict) {
				t.Errorf("Remove: %v", err)
				return
			}
		}
	})
	for range 20 {
		results, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 2})
		if err != nil {
			if !errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("Fork: %v, want ErrNotFound", err)
			}
			break
		}
		for _, r := range results {
			if r.Err != nil {
				t.Errorf("child: %v", r.Err)
			}
		}
		killAll(t, m)
	}
	wg.Wait()
	w.nothing(t, m)
}

func TestCloseWhileForking(t *testing.T) {
	t.Parallel()
	for _, ephemeral := range []bool{true, false} {
		t.Run(fmt.Sprintf("ephemeral-%v", ephemeral), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t, func(c *Config) { c.Ephemeral = ephemeral })
			w.template(t, m)
			before := fork(t, m, 2)
			reached := make(chan struct{})
			w.engine.onStep(failOnce("dial", 2, func(ctx context.Context) error {
				close(reached)
				return hang(ctx)
			}))
			var results []ForkResult
			var wg sync.WaitGroup
			wg.Go(func() {
				var err error
				if results, err = m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 4}); err != nil {
					t.Errorf("Fork: %v", err)
				}
			})
			<-reached
			closeManager(t, m)
			wg.Wait()
			handedOut := len(before)
			for _, r := range results {
				if r.Err == nil {
					handedOut++
				} else if !errors.Is(r.Err, errClosed) {
					t.Errorf("child: %v, want errClosed", r.Err)
				}
			}
			checkClosed(t, m, before[0])
			want := 0
			if !ephemeral {
				want = handedOut
			}
			if n, left := w.engine.alive(), len(names(t, m.Dir)); n != want || left != want {
				t.Errorf("%d machines and %d directories left, want %d", n, left, want)
			}
			w.engine.onStep(nil)
			again := w.manager(t, lasting)
			if n := len(again.List()); n != want {
				t.Errorf("%d adopted, want %d", n, want)
			}
			killAll(t, again)
			w.nothing(t, again)
		})
	}
}

// checkClosed tries every call on a closed Manager.
func checkClosed(t *testing.T, m *Manager, id string) {
	t.Helper()
	closeManager(t, m) // again
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"Fork":    func() error { _, err := m.Fork(ctx, ForkRequest{Snapshot: "py", N: 1}); return err },
		"Get":     func() error { _, err := m.Get(id); return err },
		"Kill":    func() error { return m.Kill(ctx, id) },
		"With":    func() error { return tryPing(ctx, m, id) },
		"SetPool": func() error { return m.SetPool(ctx, "py", 1) },
		"CreateSnapshot": func() error {
			_, err := m.CreateSnapshot(ctx, SnapshotRequest{Tag: "other", Image: "py"})
			return err
		},
	} {
		if err := call(); !errors.Is(err, errClosed) {
			t.Errorf("%s after Close: %v, want errClosed", name, err)
		}
	}
}

func TestDeath(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	ids := fork(t, m, 2)
	// One call is under way when it happens.
	err := m.With(t.Context(), ids[0], func(ctx context.Context, c *guest.Client) error {
		if !w.engine.Crash(seatOf(m, ids[0]), errors.New("killed by a test")) {
			t.Error("nothing to crash")
		}
		_, err := c.Run(ctx, guest.ExecSpec{Argv: []string{"/bin/true"}}, nil, 1<<10)
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "killed by a test") {
		t.Errorf("a call under way got %v, want the reason", err)
	}
	info, err := m.Get(ids[0])
	if err != nil || info.State != Dead || info.Reason != "killed by a test" {
		t.Errorf("Get: %+v, %v", info, err)
	}
	if err := tryPing(t.Context(), m, ids[0]); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("With: %v, want ErrConflict", err)
	}
	if _, _, err := m.Memory(ids[0]); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("Memory: %v, want ErrConflict", err)
	}
	ping(t, m, ids[1])
	killAll(t, m)
	w.nothing(t, m)
}

func TestSharedSession(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	var mu sync.Mutex
	clients := map[*guest.Client]bool{}
	together := func() {
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				err := m.With(t.Context(), id, func(ctx context.Context, c *guest.Client) error {
					mu.Lock()
					clients[c] = true
					mu.Unlock()
					_, err := c.Ping(ctx)
					return err
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	together()
	for c := range clients {
		if err := c.Close(); err != nil { // the session breaks
			t.Error(err)
		}
	}
	together()
	if len(clients) != 2 {
		t.Errorf("%d sessions, want one before and one after the break", len(clients))
	}
}

// TestKillWhileInUse: calls under way end, and say why.
func TestKillWhileInUse(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	inside, got := make(chan struct{}), make(chan error)
	go func() {
		got <- m.With(t.Context(), id, func(ctx context.Context, _ *guest.Client) error {
			close(inside)
			return hang(ctx)
		})
	}()
	<-inside
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			if err := m.Kill(t.Context(), id); err != nil && !errors.Is(err, errdef.ErrNotFound) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if err := <-got; !errors.Is(err, errRemoved) {
		t.Errorf("With: %v, want errRemoved", err)
	}
	w.nothing(t, m)
}

func TestCanceledWith(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	b, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	b.hangUp()
	ctx, cancel := context.WithCancel(t.Context())
	w.engine.onStep(failOnce("dial", 1, func(ctx context.Context) error {
		cancel()
		return hang(ctx)
	}))
	if err := tryPing(ctx, m, id); !errors.Is(err, context.Canceled) {
		t.Errorf("With: %v, want context.Canceled", err)
	}
	ping(t, m, id)
}

// TestFailedKill: a sandbox that could not be ended is still there.
func TestFailedKill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	w.engine.onStep(failOnce("kill", 1, fail))
	if err := tryPing(t.Context(), m, id); err != nil {
		t.Error(err)
	}
	if err := m.Kill(t.Context(), id); !errors.Is(err, errInjected) {
		t.Errorf("Kill: %v, want the injected error", err)
	}
	if len(m.List()) != 1 || len(names(t, m.Dir)) != 1 {
		t.Error("the sandbox is not listed any more")
	}
	if err := m.Kill(t.Context(), id); err != nil {
		t.Errorf("second try: %v", err)
	}
	w.nothing(t, m)
}

func TestTimeToLive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	const ttl = 250 * time.Millisecond
	idle := fork(t, m, 1, func(r *ForkRequest) { r.IdleTTL = ttl })[0]
	old := fork(t, m, 1, func(r *ForkRequest) { r.Lifetime = ttl })[0]
	busy := fork(t, m, 1, func(r *ForkRequest) { r.IdleTTL = ttl })[0]
	forever := fork(t, m, 1)[0]
	err := m.With(t.Context(), busy, func(ctx context.Context, c *guest.Client) error {
		eventually(t, "the idle and the old one to go", func() bool { return len(m.List()) == 2 })
		_, err := c.Ping(ctx)
		return err
	})
	if err != nil {
		t.Errorf("a sandbox in use: %v", err)
	}
	for _, id := range []string{idle, old} {
		if _, err := m.Get(id); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("Get: %v, want ErrNotFound", err)
		}
	}
	eventually(t, "the busy one to go once it is idle", func() bool { return len(m.List()) == 1 })
	ping(t, m, forever)
	killAll(t, m)
	w.nothing(t, m)
}

func TestMemory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	if _, _, err := m.Memory("sb-none"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("Memory: %v, want ErrNotFound", err)
	}
	if start, err := linux.StartTime(m.self.PID); err != nil || start != m.self.StartTime {
		t.Errorf("the Manager takes itself for process %+v", m.self)
	}
}
