package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/snapshot"
)

// branch makes a branch that must succeed.
func branch(t testing.TB, m *Manager, id string, req BranchRequest) snapshot.Snapshot {
	t.Helper()
	snap, err := m.Branch(t.Context(), id, req)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func from(tag string) func(*ForkRequest) {
	return func(req *ForkRequest) { req.Snapshot = tag }
}

// sound checks that the store is, and that no stage is left.
func (w *world) sound(t testing.TB) {
	t.Helper()
	problems, err := w.snaps.Check(t.Context())
	if err != nil || len(problems) > 0 {
		t.Errorf("check: %v, %v", problems, err)
	}
	if left := names(t, filepath.Join(w.dir, "snapshots", "staging")); len(left) > 0 {
		t.Errorf("left in staging: %v", left)
	}
}

func TestBranchIsOneInstant(t *testing.T) {
	t.Parallel()
	for _, mode := range []Mode{"", Full, Diff, Live} {
		t.Run("mode-"+string(mode), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			py := w.template(t, m)
			id := fork(t, m, 1)[0]
			sh(t, m, id, "echo before > at")
			snap := branch(t, m, id, BranchRequest{Tag: "b", Mode: mode})
			sh(t, m, id, "echo after > at; echo source > mine")

			kids := fork(t, m, 2, from("b"))
			sh(t, m, kids[0], "echo sibling > mine")
			got := []string{sh(t, m, id, "cat state at mine"), sh(t, m, kids[0], "cat state at mine"), sh(t, m, kids[1], "cat state at; test ! -e mine && echo none")}
			want := []string{"warm\nafter\nsource", "warm\nbefore\nsibling", "warm\nbefore\nnone"}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
			if snap.BranchedFrom != id || snap.PauseMS <= 0 || snap.Follows != py.Digest || snap.Auto {
				t.Errorf("facts: %+v", snap.Facts)
			}
			parent, did := py.Digest, Diff // nothing here can make a twin
			if mode == Full {
				parent, did = "", Full
			}
			if snap.Manifest.Parent != parent || Mode(snap.Mode) != did {
				t.Errorf("parent %q, mode %s; want %q, %s", snap.Manifest.Parent, snap.Mode, parent, did)
			}
			if says := strings.Contains(snap.Warning, "no live branch"); says != (mode == "" || mode == Live) {
				t.Errorf("warning: %q", snap.Warning)
			}
			if info, err := m.Get(id); err != nil || info.Head != snap.Digest || info.Branches != 1 || info.State != Running {
				t.Errorf("source: %+v, %v", info, err)
			}
			w.sound(t)
		})
	}
}

func TestBranchesMakeATree(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	py := w.template(t, m)
	id := fork(t, m, 1)[0]
	var parents []string
	var tags []string
	for i := range 3 {
		sh(t, m, id, fmt.Sprintf("echo %d >> steps", i))
		snap := branch(t, m, id, BranchRequest{})
		tags = append(tags, snap.Tag)
		parents = append(parents, snap.Manifest.Parent)
		if snap.Depth != i+1 || !snap.Auto || !strings.HasPrefix(snap.Tag, "branch-"+id+"-") {
			t.Errorf("branch %d: depth %d, tag %s, auto %v", i, snap.Depth, snap.Tag, snap.Auto)
		}
	}
	kid := fork(t, m, 1, from(tags[1]))[0]
	if got := sh(t, m, kid, "cat steps"); got != "0\n1" {
		t.Errorf("fork of the second: %q", got)
	}
	leaf := branch(t, m, kid, BranchRequest{Tag: "leaf"})
	second, err := w.snaps.Resolve(tags[1])
	if err != nil {
		t.Fatal(err)
	}
	if parents[0] != py.Digest || leaf.Manifest.Parent != second.Digest || leaf.Depth != 3 {
		t.Errorf("parents %v, leaf %+v", parents, leaf.Manifest)
	}

	// The middle goes; what is after it stays what it was.
	for _, tag := range tags[:2] {
		if err := w.snaps.Remove(t.Context(), tag); err != nil {
			t.Error(err)
		}
	}
	third := fork(t, m, 1, from(tags[2]))[0]
	if got := sh(t, m, third, "cat steps"); got != "0\n1\n2" {
		t.Errorf("fork of the third: %q", got)
	}
	w.sound(t)
}

func TestFailedBranchLeavesNothing(t *testing.T) {
	t.Parallel()
	fault := errors.New("no luck")
	for _, step := range []string{"pause", "save-device", "resume"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			w.template(t, m)
			id := fork(t, m, 1)[0]
			first := true
			w.engine.onStep(func(_ context.Context, at string) error {
				if at == step && first {
					first = false
					return fault
				}
				return nil
			})
			if _, err := m.Branch(t.Context(), id, BranchRequest{Tag: "b"}); !errors.Is(err, fault) {
				t.Errorf("got %v", err)
			}
			w.engine.onStep(nil)
			if step == "resume" { // the one thing that leaves it paused: whoever asks next may try again
				if err := m.boxes[id].machine().Resume(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			ping(t, m, id)
			if _, err := w.snaps.Resolve("b"); !errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("resolve: %v", err)
			}
			branch(t, m, id, BranchRequest{Tag: "b"})
			w.sound(t)
		})
	}
}

func TestBranchRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, func(cfg *Config) { cfg.Limits.Branches = 1 })
	w.template(t, m)
	ids := fork(t, m, 2)
	tests := map[string]struct {
		id   string
		req  BranchRequest
		want error
	}{
		"unknown":  {"sb-aaaaaaaaaaaa", BranchRequest{}, errdef.ErrNotFound},
		"taken":    {ids[0], BranchRequest{Tag: "py"}, errdef.ErrExists},
		"bad-tag":  {ids[0], BranchRequest{Tag: "../x"}, errdef.ErrInvalid},
		"bad-mode": {ids[0], BranchRequest{Mode: "quick"}, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		if _, err := m.Branch(t.Context(), tt.id, tt.req); !errors.Is(err, tt.want) {
			t.Errorf("%s: got %v, want %v", name, err, tt.want)
		}
	}

	// One that is under way holds its tag and its place.
	hold, held := make(chan struct{}), make(chan struct{})
	w.engine.onStep(func(_ context.Context, at string) error {
		if at == "save-device" {
			close(held)
			<-hold
		}
		return nil
	})
	done := make(chan error)
	go func() {
		_, err := m.Branch(t.Context(), ids[0], BranchRequest{Tag: "b"})
		done <- err
	}()
	<-held
	w.engine.onStep(nil)
	if _, err := m.Branch(t.Context(), ids[1], BranchRequest{}); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("over the cap: %v", err)
	}
	if _, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "b", Image: "py"}); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("tag of another verb: %v", err)
	}
	if _, err := m.Fork(t.Context(), ForkRequest{Snapshot: "b", N: 1}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("fork of half a branch: %v", err)
	}
	close(hold)
	if err := <-done; err != nil {
		t.Error(err)
	}
	w.engine.Crash(seatOf(m, ids[1]), errors.New("bad luck"))
	eventually(t, "its death", func() bool { info, err := m.Get(ids[1]); return err == nil && info.State == Dead })
	if _, err := m.Branch(t.Context(), ids[1], BranchRequest{}); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("of a dead one: %v", err)
	}
}

func TestBranchThatNobodyWaitsFor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	snap := branch(t, m, id, BranchRequest{Tag: "b", NoWait: true})
	if snap.Status != snapshot.StatusWriting || snap.PauseMS <= 0 {
		t.Errorf("early: %+v", snap)
	}
	eventually(t, "the branch", func() bool { s, err := w.snaps.Resolve("b"); return err == nil && s.BranchedFrom == id })
	eventually(t, "its end", func() bool { return len(m.Branches()) == 0 })
	w.sound(t)
}

func TestOldBranchesArePruned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, func(cfg *Config) { cfg.KeepBranches = 2 })
	w.template(t, m)
	id := fork(t, m, 1)[0]
	branch(t, m, id, BranchRequest{Tag: "named"})
	var tags []string
	for i := range 4 {
		sh(t, m, id, fmt.Sprintf("echo %d > at", i))
		tags = append(tags, branch(t, m, id, BranchRequest{}).Tag)
	}
	all, err := w.snaps.List()
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, snap := range all {
		left = append(left, snap.Tag)
	}
	want := append(slices.Sorted(slices.Values(tags[2:])), "named", "py")
	if diff := cmp.Diff(want, left); diff != "" {
		t.Error(diff)
	}
	if got := sh(t, m, fork(t, m, 1, from(tags[3]))[0], "cat at"); got != "3" {
		t.Errorf("the last one, whose parents were pruned: %q", got)
	}
	w.sound(t)
}

// TestBranchedAgainAndAgain: there is no end to it, and chains stay short.
func TestBranchedAgainAndAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	deepest := 0
	for i := range 2*maxLineage + 3 {
		sh(t, m, id, fmt.Sprintf("echo %d > at", i))
		snap := branch(t, m, id, BranchRequest{})
		deepest = max(deepest, snap.Depth)
	}
	if deepest > maxLineage {
		t.Errorf("a branch has %d layers", deepest)
	}
	last := branch(t, m, id, BranchRequest{})
	if got := sh(t, m, fork(t, m, 1, from(last.Tag))[0], "cat at"); got != fmt.Sprint(2*maxLineage+2) {
		t.Errorf("the last one: %q", got)
	}
	w.sound(t)
}

// TestBranchThatFailsLate: its caller has gone, and can still learn of it.
func TestBranchThatFailsLate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	w.engine.onStep(func(_ context.Context, at string) error {
		if at == "resume" { // where the layer is to be written there is something else by now
			return os.Mkdir(filepath.Join(w.dir, "snapshots", "staging", "b", "layer"), 0o700)
		}
		return nil
	})
	branch(t, m, id, BranchRequest{Tag: "b", NoWait: true})
	w.engine.onStep(nil)
	eventually(t, "the failure", func() bool { all := m.Branches(); return len(all) == 1 && all[0].Err != nil })
	if state := m.Branches()[0]; state.Tag != "b" || state.Sandbox != id {
		t.Errorf("state: %+v", state)
	}
	w.sound(t)
	ping(t, m, id)
	if info, err := m.Get(id); err != nil || info.Branches != 0 {
		t.Errorf("source: %+v, %v", info, err)
	}
	if !m.ForgetBranch("b") || m.ForgetBranch("b") || len(m.Branches()) != 0 {
		t.Error("it cannot be forgotten once")
	}
	branch(t, m, id, BranchRequest{Tag: "b"})
}

// TestBranchesSideBySide: of one sandbox and of several, in all modes, while
// earlier ones are being written.
func TestBranchesSideBySide(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, func(cfg *Config) { cfg.Limits.Branches = 64 })
	w.template(t, m)
	modes := []Mode{Live, Diff, Full}
	var group errgroup.Group
	for _, id := range fork(t, m, 3) {
		sh(t, m, id, "echo "+id+" > at")
		for i := range 4 {
			tag := fmt.Sprintf("%s-%d", id, i)
			group.Go(func() error {
				_, err := m.Branch(t.Context(), id, BranchRequest{Tag: tag, Mode: modes[i%3], NoWait: i%2 == 0})
				return err
			})
		}
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all to be written", func() bool { return len(m.Branches()) == 0 })
	all, err := w.snaps.List()
	if err != nil || len(all) != 13 {
		t.Fatalf("%d snapshots, %v", len(all), err)
	}
	for _, snap := range all {
		if snap.Tag == "py" {
			continue
		}
		if got := sh(t, m, fork(t, m, 1, from(snap.Tag))[0], "cat at"); got != snap.BranchedFrom {
			t.Errorf("%s is of %s, and has %q", snap.Tag, snap.BranchedFrom, got)
		}
	}
	w.sound(t)
}

// TestBranchOfAForkFromAPool: what it did while it was parked is in its branch.
func TestBranchOfAForkFromAPool(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo base > base")
	branch(t, m, id, BranchRequest{Tag: "b"})
	if err := m.SetPool(t.Context(), "b", 1); err != nil { // which flattens it
		t.Fatal(err)
	}
	eventually(t, "a parked fork", func() bool { ready, _ := m.Pool("b"); return ready == 1 })
	kid := fork(t, m, 1, from("b"))[0]
	if info, err := m.Get(kid); err != nil || !info.FromPool {
		t.Errorf("not from the pool: %+v, %v", info, err)
	}
	sh(t, m, kid, "echo kid > kid")
	branch(t, m, kid, BranchRequest{Tag: "c"})
	if got := sh(t, m, fork(t, m, 1, from("c"))[0], "cat state base kid"); got != "warm\nbase\nkid" {
		t.Errorf("its branch: %q", got)
	}
	if err := m.SetPool(t.Context(), "b", 0); err != nil {
		t.Error(err)
	}
	w.sound(t)
}

func TestPromote(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	ids := fork(t, m, 2)
	sh(t, m, ids[0], "echo loser > winner")
	sh(t, m, ids[1], "echo winner > winner")
	branch(t, m, ids[0], BranchRequest{Tag: "best"})
	branch(t, m, ids[1], BranchRequest{Tag: "candidate"})
	if _, err := m.Promote(t.Context(), "candidate", "best"); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, fork(t, m, 1, from("best"))[0], "cat winner"); got != "winner" {
		t.Errorf("best is the %s", got)
	}
	if _, err := m.Promote(t.Context(), ids[0], "best"); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, m, fork(t, m, 1, from("best"))[0], "cat winner"); got != "loser" {
		t.Errorf("best is the %s", got)
	}
	w.sound(t)
}

func TestForksOfALayerFlattenIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo deep > at")
	snap := branch(t, m, id, BranchRequest{Tag: "b"})
	eventually(t, "the flat image", func() bool {
		fork(t, m, 1, from("b"))
		base, err := w.snaps.Base(snap)
		return err == nil && base.Digest == snap.Digest && len(base.Layers) == 0
	})
	if got := sh(t, m, fork(t, m, 1, from("b"))[0], "cat at"); got != "deep" {
		t.Errorf("fork of the flat image: %q", got)
	}
	w.sound(t)
}

func TestDiff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo 1 > gone; echo 1 > kept; echo 1 > grown")
	branch(t, m, id, BranchRequest{Tag: "b"})
	sh(t, m, id, "rm gone; echo 22 > grown; echo new > new")
	d, err := m.Diff(t.Context(), "b", id)
	if err != nil {
		t.Fatal(err)
	}
	want := []DiffEntry{
		{Path: "/gone", Change: "removed", Before: 2},
		{Path: "/grown", Change: "changed", What: "content", Before: 2, After: 3},
		{Path: "/new", Change: "added", After: 4},
	}
	if diff := cmp.Diff(want, d.Files); diff != "" {
		t.Error(diff)
	}
	same, err := m.Diff(t.Context(), "b", "b")
	if err != nil || len(same.Files) > 0 || same.Pages != 0 || same.TotalPages == 0 {
		t.Errorf("with itself: %+v, %v", same, err)
	}
	if n := len(m.List()); n != 1 {
		t.Errorf("%d sandboxes are listed", n)
	}
}
