package snapshot

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// hold commits a layer as what a sandbox holds.
func hold(t *testing.T, s *Store, name string, parent Snapshot, b byte) Snapshot {
	t.Helper()
	st, err := s.StageHeld(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	snap, err := commitLayer(t.Context(), st, fmt.Sprint("held", b), parent, map[uint64]byte{3: b}, Facts{Mode: "diff"})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func TestHeld(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	held := hold(t, s, "sb", root, 4)
	got, err := s.Held("sb")
	if diff := cmp.Diff(held, got, cmp.AllowUnexported(Snapshot{})); err != nil || diff != "" || got.Tag != "" || got.Mode != "diff" {
		t.Errorf("%v (-committed +found):\n%s", err, diff)
	}
	if all := list(t, s); len(all) != 1 {
		t.Errorf("listed: %v", all)
	}
	if names, namesErr := s.HeldNames(); namesErr != nil || !slices.Equal(names, []string{"sb"}) {
		t.Errorf("names %v, %v", names, namesErr)
	}
	if _, err = s.Resolve("sb"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a tag of that name: %v", err)
	}
	if err = s.Remove(t.Context(), "root"); err != nil {
		t.Fatal(err)
	}
	if freed, gcErr := s.GC(t.Context(), false); gcErr != nil || len(freed.Objects) > 0 {
		t.Errorf("gc: %v, %v", freed, gcErr)
	}
	memoryOf(t, s, held)
	next := hold(t, s, "sb", held, 5) // suspended once more
	if _, err = s.Resolve(held.Digest); err != nil {
		t.Errorf("what the next one stands on: %v", err)
	}
	wantClean(t, s)
	pin, err := s.Pin(next)
	if err != nil {
		t.Fatal(err)
	}
	if err = s.DropHeld(t.Context(), "sb"); err != nil {
		t.Errorf("drop what is pinned: %v", err)
	}
	memoryOf(t, s, next)
	if err = s.DropHeld(t.Context(), "sb"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("drop again: %v", err)
	}
	if _, err = s.Held("sb"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("found after all: %v", err)
	}
	if err = pin.Close(); err != nil {
		t.Fatal(err)
	}
	if freed, gcErr := s.GC(t.Context(), false); gcErr != nil || len(freed.Objects) != 3 {
		t.Errorf("gc: %v, %v", freed, gcErr)
	}
	wantEmpty(t, s)
}

func TestHeldIsDroppedWithItsObject(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	held := hold(t, s, "sb", root, 4)
	if err := s.DropHeld(t.Context(), "sb"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve(held.Digest); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("its object is left: %v", err)
	}
	for _, bad := range []string{"", "../tags/root", "a/b", "a:b"} {
		_, stageErr := s.StageHeld(t.Context(), bad)
		_, err := s.Held(bad)
		for _, err = range []error{err, stageErr, s.DropHeld(t.Context(), bad)} {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("%q: %v", bad, err)
			}
		}
	}
	wantClean(t, s)
}

func TestHeldIsChecked(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	held := hold(t, s, "sb", create(t, s, "root", "a"), 4)
	if err := errors.Join(
		os.WriteFile(s.path(heldDir, "torn.json"), []byte("{"), 0o600),
		os.WriteFile(s.path(heldDir, "notes"), nil, 0o600),
		os.RemoveAll(held.Dir()),
	); err != nil {
		t.Fatal(err)
	}
	problems, err := s.Check(t.Context())
	got := map[string]bool{}
	for _, p := range problems {
		got[p.Object] = true
	}
	if diff := cmp.Diff(map[string]bool{"held/torn": true, "held/notes": true, "held/sb": true}, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, err = s.GC(t.Context(), false); err == nil || !strings.Contains(errdef.Hint(err), "torn.json") {
		t.Errorf("gc: %v", err)
	}
	if err = errors.Join(s.DropHeld(t.Context(), "torn"), os.Remove(s.path(heldDir, "notes"))); err != nil {
		t.Error(err)
	}
	if _, err = s.Held("sb"); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("held, damaged: %v", err)
	}
	if err = s.DropHeld(t.Context(), "sb"); err != nil {
		t.Errorf("drop what is damaged: %v", err)
	}
	wantClean(t, s)
}

func TestRetag(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	auto := layerWith(t, s, "auto", root, 1, Facts{Auto: true, PauseMS: 1.5, BranchedFrom: "sb"})
	other := create(t, s, "main", "b")
	if _, err := s.Retag(t.Context(), "main", auto, false); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("over an existing tag: %v", err)
	}
	got, err := s.Retag(t.Context(), "main", auto, true)
	if err != nil || got.Tag != "main" || got.Digest != auto.Digest || got.Depth != 1 || got.Auto || got.PauseMS != 1.5 {
		t.Errorf("promoted: %+v, %v", got, err)
	}
	if now, findErr := s.Resolve("main"); findErr != nil || !cmp.Equal(now, got, cmp.AllowUnexported(Snapshot{})) {
		t.Errorf("found: %+v, %v", now, findErr)
	}
	if _, err = s.Resolve(other.Digest); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("the old one is left: %v", err)
	}
	byDigest, err := s.Resolve(auto.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if got, err = s.Retag(t.Context(), "again", byDigest, false); err != nil || got.BranchedFrom != "sb" {
		t.Errorf("by digest: %+v, %v", got, err)
	}
	if got, err = s.Retag(t.Context(), "auto", auto, true); err != nil || got.Auto {
		t.Errorf("onto itself: %+v, %v", got, err)
	}
	for name, tt := range map[string]struct {
		tag  string
		to   Snapshot
		want error
	}{
		"bad-tag":   {"a/b", auto, errdef.ErrInvalid},
		"no-digest": {"x", Snapshot{}, errdef.ErrInvalid},
		"gone":      {"x", other, errdef.ErrNotFound},
	} {
		if _, err = s.Retag(t.Context(), tt.tag, tt.to, true); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantClean(t, s)
}

// Whoever has claimed a tag is alone with it, whatever the others want to do.
func TestTagsAreClaimed(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	leaf := layer(t, s, "leaf", root, 1)
	st, err := s.Stage(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	_, again := s.StageReplace(t.Context(), "x")
	_, retag := s.Retag(t.Context(), "x", leaf, true)
	_, compact := s.Compact(t.Context(), "leaf", "x")
	for verb, err := range map[string]error{"stage": again, "retag": retag, "compact": compact} {
		if !errors.Is(err, errdef.ErrConflict) {
			t.Errorf("%s of a tag that is being written: %v", verb, err)
		}
	}
	held, err := s.StageHeld(t.Context(), "x")
	if err != nil {
		t.Fatalf("a name held is no tag: %v", err)
	}
	if _, err = s.StageHeld(t.Context(), "x"); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("held twice: %v", err)
	}
	if writing := list(t, s); len(writing) != 3 || writing[2].Status != StatusWriting {
		t.Errorf("list: %v", writing)
	}
	if err = errors.Join(st.Abort(), held.Abort()); err != nil {
		t.Error(err)
	}
	if _, err = s.Retag(t.Context(), "x", leaf, false); err != nil {
		t.Error(err)
	}
	wantClean(t, s)
}

// Of all who want a tag at once, one gets it.
func TestOneTagManyVerbs(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	leaf := layer(t, s, "leaf", root, 1)
	var won atomic.Int32
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			var err error
			switch other := openless(s); i % 3 {
			case 0:
				_, err = other.Retag(t.Context(), "x", leaf, false)
			case 1:
				_, err = other.Compact(t.Context(), "leaf", "x")
			case 2:
				var st *Stage
				if st, err = other.Stage(t.Context(), "x"); err == nil {
					_, err = commitLayer(t.Context(), st, "x", leaf, map[uint64]byte{5: 5}, Facts{})
				}
			}
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, errdef.ErrConflict) && !errors.Is(err, errdef.ErrExists):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d won", won.Load())
	}
	wantClean(t, s)
}

func TestPrune(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	at := func(n int, from string) Facts {
		return Facts{Auto: true, BranchedFrom: from, CreatedAt: time.Unix(int64(n), 0).UTC()}
	}
	head := root
	for i := range 6 {
		head = layerWith(t, s, fmt.Sprint("x", i), head, byte(i+1), at(i, "x"))
	}
	named := layer(t, s, "named", head, 9)
	for i := range 3 {
		layerWith(t, s, fmt.Sprint("y", i), root, byte(20+i), at(i, "y"))
	}
	layerWith(t, s, "twin", root, 40, at(0, "")) // no branch, though nobody chose its tag
	y0, err := s.Resolve("y0")
	if err != nil {
		t.Fatal(err)
	}
	pin, err := s.Pin(y0)
	if err != nil {
		t.Fatal(err)
	}
	want := memoryOf(t, s, named)
	dry, wouldFree, err := s.Prune(t.Context(), PrunePolicy{KeepLast: 1, DryRun: true})
	if err != nil || len(list(t, s)) != 12 {
		t.Fatalf("dry run: %v", err)
	}
	tags, freed, err := s.Prune(t.Context(), PrunePolicy{KeepLast: 1})
	slices.Sort(tags)
	slices.Sort(dry)
	if diff := cmp.Diff([]string{"x0", "x1", "x2", "x3", "x4", "y1"}, tags); err != nil || diff != "" || !slices.Equal(tags, dry) {
		t.Errorf("%v, said %v (-want +got):\n%s", err, dry, diff)
	}
	if diff := cmp.Diff(wouldFree, freed); diff != "" || len(freed.Objects) != 1 || freed.Bytes == 0 {
		t.Errorf("freed (-said +done):\n%s", diff)
	}
	if !bytes.Equal(memoryOf(t, s, named), want) {
		t.Error("what it stands on was pruned")
	}
	if err = pin.Close(); err != nil {
		t.Fatal(err)
	}
	if err = s.Remove(t.Context(), "named"); err != nil {
		t.Fatal(err)
	}
	if tags, freed, err = s.Prune(t.Context(), PrunePolicy{}); err != nil || len(tags) != 3 || len(freed.Objects) != 3 {
		t.Errorf("keep none: %v, %v, %v", tags, freed, err)
	}
	if _, _, err = s.Prune(t.Context(), PrunePolicy{KeepLast: -1}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("keep the last -1: %v", err)
	}
	if freed, err = s.GC(t.Context(), false); err != nil || len(freed.Objects) != 5 {
		t.Errorf("gc of what was kept for a child: %v, %v", freed, err)
	}
	wantClean(t, s)
}

// model is what a store must hold, whatever is done to it.
type model struct {
	*rapid.T
	s    *Store
	want map[string][]byte // of tags, and of what is held as held:NAME
	t    *testing.T
}

func (m *model) names(held bool) []string {
	return slices.DeleteFunc(slices.Sorted(maps.Keys(m.want)), func(name string) bool { return strings.HasPrefix(name, "held:") != held })
}

func (m *model) find(name string) Snapshot {
	snap, err := m.s.Resolve(name)
	if rest, ok := strings.CutPrefix(name, "held:"); ok {
		snap, err = m.s.Held(rest)
	}
	if err != nil {
		m.Fatal(name, err)
	}
	return snap
}

func (m *model) any() Snapshot {
	return m.find(rapid.SampledFrom(slices.Sorted(maps.Keys(m.want))).Draw(m.T, "node"))
}

func (m *model) fatal(err error) {
	if err != nil {
		m.Fatal(err)
	}
}

// step changes store and model alike.
func (m *model) step() {
	ctx := m.t.Context()
	tag := rapid.SampledFrom([]string{"a", "b", "c", "d", "e"}).Draw(m.T, "tag")
	switch verb := rapid.SampledFrom([]string{"layer", "layer", "layer", "held", "remove", "drop", "retag", "compact", "flatten", "unflatten", "gc", "prune"}).Draw(m.T, "verb"); verb {
	case "layer", "held":
		m.layer(verb == "held", tag)
	case "remove":
		if m.want[tag] != nil && len(m.want) > 1 {
			m.fatal(m.s.Remove(ctx, tag))
			delete(m.want, tag)
		}
	case "drop":
		if m.want["held:"+tag] != nil && len(m.want) > 1 {
			m.fatal(m.s.DropHeld(ctx, tag))
			delete(m.want, "held:"+tag)
		}
	case "retag":
		to := m.any()
		mem := memoryOf(m.T, m.s, to)
		_, err := m.s.Retag(ctx, tag, to, true)
		m.fatal(err)
		m.want[tag] = mem
	case "compact":
		if from := m.any(); m.want[tag] == nil {
			_, err := m.s.Compact(ctx, from.ref(), tag)
			m.fatal(err)
			m.want[tag] = memoryOf(m.T, m.s, from)
		}
	case "flatten":
		m.fatal(m.s.Flatten(ctx, m.any()))
	case "unflatten":
		_, err := m.s.DropFlats(ctx, false)
		m.fatal(err)
	case "gc":
		_, err := m.s.GC(ctx, false)
		m.fatal(err)
	case "prune":
		tags, _, err := m.s.Prune(ctx, PrunePolicy{KeepLast: 1})
		m.fatal(err)
		for _, pruned := range tags {
			delete(m.want, pruned)
		}
	}
}

func (m *model) layer(held bool, tag string) {
	parent := m.any()
	mem := memoryOf(m.T, m.s, parent)
	changed := rapid.MapOfN(rapid.Uint64Range(0, pages-1), rapid.Byte(), 0, 5).Draw(m.T, "changed")
	stage, name := m.s.StageReplace, tag
	if held {
		stage, name = m.s.StageHeld, "held:"+tag
	}
	st, err := stage(m.t.Context(), tag)
	m.fatal(err)
	_, err = commitLayer(m.t.Context(), st, tag, parent, changed, Facts{Auto: rapid.Bool().Draw(m.T, "auto"), BranchedFrom: "sb"})
	m.fatal(err)
	for page, b := range changed {
		copy(mem[page<<12:], bytes.Repeat([]byte{b}, 1<<12))
	}
	m.want[name] = mem
}

// Whatever is done to some nodes of the tree, all others stay as they are.
func TestTreeProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		s := newStore(t)
		s.files = hastyFiles{}
		m := &model{T: rt, s: s, t: t, want: map[string][]byte{}}
		m.want["a"] = memoryOf(rt, s, create(t, s, "a", "hello"))
		for range rapid.IntRange(1, 12).Draw(rt, "steps") {
			m.step()
			for name, want := range m.want {
				snap := m.find(name)
				if !bytes.Equal(mapped(rt, s, snap), want) || !bytes.Equal(memoryOf(rt, s, snap), want) {
					rt.Fatalf("the memory of %s is another one", name)
				}
			}
			if got := len(list(t, s)); got != len(m.names(false)) {
				rt.Fatalf("%d tags, want %v", got, m.names(false))
			}
		}
		if problems, err := s.Check(t.Context()); err != nil || len(problems) > 0 {
			rt.Errorf("check: %v, %v", problems, err)
		}
	})
}
