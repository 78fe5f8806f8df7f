package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/snapshot"
)

func ready(m *Manager) int {
	n, _ := m.Pool("py")
	return n
}

func setPool(t testing.TB, m *Manager, n int) {
	t.Helper()
	if err := m.SetPool(t.Context(), "py", n); err != nil {
		t.Fatal(err)
	}
}

func TestPool(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	setPool(t, m, 3)
	eventually(t, "3 parked", func() bool { return ready(m) == 3 })
	if n := len(m.List()); n != 0 {
		t.Errorf("%d parked forks are listed", n)
	}
	for _, b := range m.all() {
		if _, err := m.Get(b.id); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("Get of a parked fork: %v, want ErrNotFound", err)
		}
	}
	ids := fork(t, m, 5)
	fromPool := 0
	for _, id := range ids {
		info, err := m.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		if info.FromPool {
			fromPool++
		}
		ping(t, m, id)
	}
	if fromPool != 3 {
		t.Errorf("%d of 5 came from a pool of 3", fromPool)
	}
	cold, err := m.Get(fork(t, m, 1, func(r *ForkRequest) { r.NoPool = true })[0])
	if err != nil || cold.FromPool {
		t.Errorf("with NoPool: %+v, %v", cold, err)
	}
	eventually(t, "the pool to be full again", func() bool { return ready(m) == 3 })
	if err := w.snaps.Remove(t.Context(), "py"); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("Remove of a snapshot with a pool: %v, want ErrConflict", err)
	}
	setPool(t, m, 1)
	if got, want := m.Pool("py"); got != 1 || want != 1 {
		t.Errorf("shrunk pool: %d of %d", got, want)
	}
	if n := len(m.all()); n != 7 { // 6 handed out
		t.Errorf("%d sandboxes after the pool has shrunk, want 7", n)
	}
	setPool(t, m, 0)
	killAll(t, m)
	w.nothing(t, m)
}

// TestPoolThatShrinks: those that are ended are those that were too many, also
// when the pool grows again at once.
func TestPoolThatShrinks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	for range 5 {
		setPool(t, m, 6)
		eventually(t, "some parked", func() bool { return ready(m) >= 4 })
		setPool(t, m, 1)
		setPool(t, m, 4)
		eventually(t, "4 parked", func() bool { return ready(m) == 4 })
	}
	eventually(t, "4 in all", func() bool { return len(m.all()) == 4 })
	for _, id := range fork(t, m, 4) {
		ping(t, m, id)
	}
	setPool(t, m, 0)
	killAll(t, m)
	w.nothing(t, m)
}

func TestPoolRefuses(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	for _, n := range []int{-1, maxPool + 1} {
		if err := m.SetPool(t.Context(), "py", n); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("SetPool of %d: %v, want ErrInvalid", n, err)
		}
	}
	for _, n := range []int{0, 1} {
		if err := m.SetPool(t.Context(), "py", n); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("SetPool of %d without a snapshot: %v, want ErrNotFound", n, err)
		}
	}
	w.nothing(t, m)
}

// TestPoolCounts: a parked fork has a place already.
func TestPoolCounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, func(c *Config) { c.Limits.Sandboxes = 2 })
	w.template(t, m)
	setPool(t, m, 5)
	eventually(t, "all places to be parked", func() bool { return ready(m) == 2 })
	if _, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 3}); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("Fork of 3: %v, want ErrExhausted", err)
	}
	if _, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1, NoPool: true}); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("Fork without the pool: %v, want ErrExhausted", err)
	}
	fork(t, m, 2)
	setPool(t, m, 0)
	killAll(t, m)
	w.nothing(t, m)
}

func TestParkedForkDies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	setPool(t, m, 2)
	eventually(t, "2 parked", func() bool { return ready(m) == 2 })
	dead := m.all()[0].id
	if !w.engine.Crash(seatOf(m, dead), errInjected) {
		t.Fatal("nothing to crash")
	}
	eventually(t, "another in its place", func() bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.boxes[dead] == nil && len(m.boxes) == 2
	})
	setPool(t, m, 0)
	w.nothing(t, m)
}

// TestParkedForkDoesNotWake: the caller gets a new one.
func TestParkedForkDoesNotWake(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	setPool(t, m, 1)
	eventually(t, "one parked", func() bool { return ready(m) == 1 })
	w.engine.onStep(failOnce("resume", 1, fail))
	info, err := m.Get(fork(t, m, 1)[0])
	if err != nil || info.FromPool {
		t.Errorf("Get: %+v, %v", info, err)
	}
	setPool(t, m, 0)
	killAll(t, m)
	w.nothing(t, m)
}

func TestCloseWhileFilling(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"restore", "dial", "pause"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t, lasting)
			w.template(t, m)
			reached := make(chan struct{})
			w.engine.onStep(failOnce(step, 2, func(ctx context.Context) error {
				close(reached)
				return hang(ctx)
			}))
			setPool(t, m, 3)
			<-reached
			closeManager(t, m)
			w.nothing(t, m)
		})
	}
}

func TestEndPoolWhileFilling(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	reached := make(chan struct{})
	w.engine.onStep(failOnce("dial", 2, func(ctx context.Context) error {
		close(reached)
		return hang(ctx)
	}))
	setPool(t, m, 3)
	<-reached
	setPool(t, m, 0) // waits for the one that is being made
	w.nothing(t, m)
}

// TestReplacedSnapshotKeepsItsPool: the pool goes with the tag.
func TestReplacedSnapshotKeepsItsPool(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	old := w.template(t, m)
	setPool(t, m, 2)
	eventually(t, "2 parked", func() bool { return ready(m) == 2 })
	snap, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py", Replace: true, Warmup: []string{"echo new > state"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, want := m.Pool(old.Digest); want != 0 || snap.Digest == old.Digest {
		t.Errorf("the old snapshot has a pool of %d", want)
	}
	eventually(t, "2 parked of the new one", func() bool { return ready(m) == 2 })
	if got := sh(t, m, fork(t, m, 1)[0], "cat state"); got != "new" {
		t.Errorf("the fork has %q", got)
	}
	setPool(t, m, 0)
	killAll(t, m)
	w.nothing(t, m)
}

// TestPlaces: whatever happens, the places taken are the sandboxes that exist.
func TestPlaces(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	snap := w.template(t, w.manager(t))
	run := 0
	rapid.Check(t, func(r *rapid.T) {
		run++
		m, err := NewManager(t.Context(), Config{
			Dir: filepath.Join(w.dir, fmt.Sprint("run", run)), Engine: w.engine, Snapshots: w.snaps, Images: w.images,
			Ephemeral: true, Limits: Limits{Sandboxes: 6},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer closeManager(t, m)
		defer w.engine.onStep(nil)
		r.Repeat(map[string]func(*rapid.T){
			"fork":  func(r *rapid.T) { tryFork(r, t, m, snap) },
			"kill":  func(r *rapid.T) { withSome(r, m, func(b *box) { _ = m.Kill(t.Context(), b.id) }) },
			"crash": func(r *rapid.T) { withSome(r, m, func(b *box) { w.engine.Crash(seatOf(m, b.id), errInjected) }) },
			"pool": func(r *rapid.T) {
				_ = m.SetPool(t.Context(), snap.Digest, rapid.IntRange(0, 4).Draw(r, "want"))
			},
			"fault": func(r *rapid.T) {
				step := rapid.SampledFrom([]string{"restore", "dial", "say", "resume", "pause", "kill"}).Draw(r, "step")
				w.engine.onStep(failOnce(step, rapid.IntRange(1, 3).Draw(r, "nth"), fail))
			},
			"": func(r *rapid.T) { checkPlaces(r, m) },
		})
		w.engine.onStep(nil)
		settle(t, m, snap)
	})
	w.nothing(t, w.manager(t))
}

func tryFork(r *rapid.T, t *testing.T, m *Manager, snap snapshot.Snapshot) {
	req := ForkRequest{
		Snapshot: snap.Digest, N: rapid.IntRange(1, 4).Draw(r, "n"),
		AllOrNothing: rapid.Bool().Draw(r, "all"), NoPool: rapid.Bool().Draw(r, "no pool"),
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	if rapid.Bool().Draw(r, "cancel") {
		wg.Go(cancel)
	}
	_, _ = m.Fork(ctx, req)
	wg.Wait()
}

func withSome(r *rapid.T, m *Manager, f func(*box)) {
	if boxes := m.all(); len(boxes) > 0 {
		f(boxes[rapid.IntRange(0, 100).Draw(r, "which")%len(boxes)])
	}
}

// checkPlaces: nothing may be without a place; while something comes or goes
// there may be more places taken than sandboxes.
func checkPlaces(r *rapid.T, m *Manager) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held < len(m.boxes) || m.held > m.Limits.Sandboxes {
		r.Fatalf("%d places taken by %d sandboxes", m.held, len(m.boxes))
	}
}

// settle ends all sandboxes, by which all places must be free.
func settle(t *testing.T, m *Manager, snap snapshot.Snapshot) {
	if err := m.SetPool(t.Context(), snap.Digest, 0); err != nil {
		t.Error(err)
	}
	for _, b := range m.all() {
		if err := b.order(t.Context(), end); err != nil {
			t.Error(err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held != 0 || len(m.boxes) != 0 {
		t.Errorf("%d places taken by %d sandboxes when all are gone", m.held, len(m.boxes))
	}
	if left := names(t, m.Dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
