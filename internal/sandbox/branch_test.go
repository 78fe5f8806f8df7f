package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

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
	fork(t, m, hot, from("b"))
	eventually(t, "the flat image", func() bool {
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
