package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
)

// writeLayer puts a layer into a stage: pages that are full of a byte each.
func writeLayer(st *Stage, device string, changed map[uint64]byte) error {
	f, err := os.OpenFile(st.LayerPath(), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w, err := guestmem.NewWriter(f, pages<<12)
	for page := range uint64(pages) {
		if b, ok := changed[page]; ok && err == nil {
			err = w.Write(page, bytes.Repeat([]byte{b}, 1<<12))
		}
	}
	if err == nil {
		_, err = w.Close()
	}
	return errors.Join(err, f.Close(), os.WriteFile(st.DevicePath(), []byte("device of "+device), 0o600))
}

// commitLayer commits what writeLayer writes, and gives up the stage.
func commitLayer(ctx context.Context, st *Stage, device string, parent Snapshot, changed map[uint64]byte, facts Facts) (snap Snapshot, err error) {
	defer func() { err = errors.Join(err, st.Abort()) }()
	if err = writeLayer(st, device, changed); err != nil {
		return Snapshot{}, err
	}
	m := testManifest()
	m.Parent = parent.Digest
	return st.Commit(ctx, m, facts)
}

// layer makes a layered snapshot whose page 1+depth, for one, is full of b.
func layer(t *testing.T, s *Store, tag string, parent Snapshot, b byte) Snapshot {
	t.Helper()
	return layerWith(t, s, tag, parent, b, Facts{})
}

func layerWith(t *testing.T, s *Store, tag string, parent Snapshot, b byte, facts Facts) Snapshot {
	t.Helper()
	st, err := s.StageReplace(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	changed := map[uint64]byte{uint64(1 + parent.Depth%8): b, 9: b, 0: 0}
	snap, err := commitLayer(t.Context(), st, fmt.Sprint(tag, b), parent, changed, facts)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// memoryOf reads all of a snapshot's memory through its chain.
func memoryOf(t fataler, s *Store, snap Snapshot) []byte {
	t.Helper()
	img, err := s.Image(snap)
	if err != nil {
		t.Fatal(err)
	}
	mem := make([]byte, img.Size())
	_, err = img.ReadAt(mem, 0)
	if err = errors.Join(err, img.Close()); err != nil {
		t.Fatal(err)
	}
	return mem
}

// mapped reads what a fork would have: the base, filled in.
func mapped(t fataler, s *Store, snap Snapshot) []byte {
	t.Helper()
	base, err := s.Base(snap)
	if err != nil {
		t.Fatal(err)
	}
	img, err := guestmem.OpenImage(base.Path, base.Layers...)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := io.ReadAll(io.NewSectionReader(img, 0, img.Size()))
	if err = errors.Join(err, img.Close()); err != nil {
		t.Fatal(err)
	}
	return mem
}

func TestLayerChain(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "hello")
	mid := layer(t, s, "mid", root, 7)
	leaf := layer(t, s, "leaf", mid, 8)
	if root.Depth != 0 || mid.Depth != 1 || leaf.Depth != 2 {
		t.Errorf("depths %d, %d, %d", root.Depth, mid.Depth, leaf.Depth)
	}
	want := make([]byte, pages<<12)
	copy(want[8<<12:], "hello")
	for page, b := range map[int]byte{1: 7, 2: 8, 9: 8} {
		copy(want[page<<12:], bytes.Repeat([]byte{b}, 1<<12))
	}
	if got := memoryOf(t, s, leaf); !bytes.Equal(got, want) {
		t.Error("the memory of the leaf is not what was written")
	}
	got, err := s.Resolve("leaf")
	if diff := cmp.Diff(leaf, got, cmp.AllowUnexported(Snapshot{})); err != nil || diff != "" {
		t.Errorf("%v (-committed +resolved):\n%s", err, diff)
	}
	chain, err := s.Chain(got)
	if err != nil || len(chain) != 3 || chain[0].Digest != root.Digest || chain[2].Tag != "leaf" || chain[1].Depth != 1 {
		t.Errorf("chain %v, %v", chain, err)
	}
	base, err := s.Base(leaf)
	wantBase := Base{Digest: root.Digest, Path: root.MemoryPath(), Layers: []string{mid.LayerPath(), leaf.LayerPath()}}
	if diff := cmp.Diff(wantBase, base); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if err = s.Verify(t.Context(), leaf); err != nil {
		t.Error(err)
	}
	all, err := s.List()
	if err != nil || len(all) != 3 || all[0].Tag != "leaf" || all[0].Depth != 2 || all[0].Status != StatusReady {
		t.Errorf("list: %+v, %v", all, err)
	}
	wantClean(t, s)
}

func TestLayerRefused(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	tests := map[string]struct {
		spoil func(st *Stage, m *Manifest) error
		want  error
	}{
		"both":           {func(st *Stage, _ *Manifest) error { return os.WriteFile(st.MemoryPath(), make([]byte, 1<<12), 0o600) }, errdef.ErrInvalid},
		"no-parent":      {func(_ *Stage, m *Manifest) error { m.Parent = ""; return nil }, errdef.ErrInvalid},
		"bad-parent":     {func(_ *Stage, m *Manifest) error { m.Parent = "sha256:../../etc"; return nil }, errdef.ErrInvalid},
		"missing-parent": {func(_ *Stage, m *Manifest) error { m.Parent = digestOf(nil); return nil }, errdef.ErrNotFound},
		"other-engine":   {func(_ *Stage, m *Manifest) error { m.Engine = "other"; return nil }, errdef.ErrInvalid},
		"other-version":  {func(_ *Stage, m *Manifest) error { m.EngineVersion = "2"; return nil }, errdef.ErrInvalid},
		"other-host":     {func(_ *Stage, m *Manifest) error { m.Host = testHost(); return nil }, errdef.ErrInvalid},
		"other-machine":  {func(_ *Stage, m *Manifest) error { m.Machine.VCPUs++; return nil }, errdef.ErrInvalid},
		"other-image":    {func(_ *Stage, m *Manifest) error { m.Image = digestOf(nil); return nil }, errdef.ErrInvalid},
		"cut-off":        {func(st *Stage, _ *Manifest) error { return os.Truncate(st.LayerPath(), 5000) }, errdef.ErrUnavailable},
		"empty":          {func(st *Stage, _ *Manifest) error { return os.Truncate(st.LayerPath(), 0) }, errdef.ErrUnavailable},
		"other-size":     {otherSize, errdef.ErrInvalid},
		"bad-follows":    {nil, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			st, err := s.Stage(t.Context(), "bad-"+name)
			if err != nil {
				t.Fatal(err)
			}
			m := testManifest()
			m.Parent = root.Digest
			err = writeLayer(st, "x", map[uint64]byte{3: 3})
			facts := Facts{Follows: "nothing"}
			if tt.spoil != nil {
				facts = Facts{}
				err = errors.Join(err, tt.spoil(st, &m))
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err = st.Commit(t.Context(), m, facts); !errors.Is(err, tt.want) {
				t.Errorf("commit: %v, want %v", err, tt.want)
			}
			if err = st.Abort(); err != nil {
				t.Error(err)
			}
			if _, err = s.Resolve("bad-" + name); !errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("it is there: %v", err)
			}
		})
	}
	t.Cleanup(func() {
		if names, err := s.list(objectsDir); err != nil || len(names) != 1 {
			t.Errorf("objects: %v, %v", names, err)
		}
		if names, err := s.list(stagingDir); err != nil || len(names) != 0 {
			t.Errorf("staging: %v, %v", names, err)
		}
		if problems, err := s.Check(context.Background()); err != nil || len(problems) > 0 { //nolint:usetesting // after the test's context
			t.Errorf("check: %v, %v", problems, err)
		}
	})
}

// otherSize writes a layer of a smaller memory.
func otherSize(st *Stage, _ *Manifest) error {
	f, err := os.OpenFile(st.LayerPath(), os.O_RDWR|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	w, err := guestmem.NewWriter(f, (pages-1)<<12)
	if err == nil {
		_, err = w.Close()
	}
	return errors.Join(err, f.Close())
}

func TestDepthIsBounded(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	s.files = hastyFiles{}
	snap := create(t, s, "d0", "a")
	for i := range MaxDepth {
		snap = layer(t, s, fmt.Sprint("d", i+1), snap, byte(i+1))
	}
	want := memoryOf(t, s, snap)
	st, err := s.Stage(t.Context(), "deep")
	if err != nil {
		t.Fatal(err)
	}
	_, err = commitLayer(t.Context(), st, "deep", snap, map[uint64]byte{1: 1}, Facts{})
	if !errors.Is(err, errdef.ErrExhausted) || !strings.Contains(errdef.Hint(err), "compact") {
		t.Errorf("layer %d: %v", MaxDepth+1, err)
	}
	whole, err := s.Compact(t.Context(), snap.Tag, "whole")
	if err != nil {
		t.Fatal(err)
	}
	if layer(t, s, "deep", whole, 3).Depth != 1 || !bytes.Equal(memoryOf(t, s, whole), want) {
		t.Error("what was compacted is not the same, or no good to go on from")
	}
	wantClean(t, s)
}

// What is missing or damaged below is as bad as what is so itself.
func TestDamagedAncestor(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(mid Snapshot) error{
		"missing":  func(mid Snapshot) error { return os.RemoveAll(mid.Dir()) },
		"no-layer": func(mid Snapshot) error { return os.Remove(mid.LayerPath()) },
		"short":    func(mid Snapshot) error { return os.Truncate(mid.LayerPath(), 1) },
		"manifest": func(mid Snapshot) error { return os.Truncate(filepath.Join(mid.Dir(), manifestFile), 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			mid := layer(t, s, "mid", create(t, s, "root", "a"), 1)
			leaf := layer(t, s, "leaf", mid, 2)
			if err := s.Flatten(t.Context(), leaf); err != nil {
				t.Fatal(err)
			}
			if err := spoil(mid); err != nil {
				t.Fatal(err)
			}
			_, err := s.Resolve("leaf")
			_, chainErr := s.Chain(leaf)
			_, baseErr := s.Base(leaf)
			_, imageErr := s.Image(leaf)
			for _, err = range []error{err, chainErr, baseErr, imageErr, s.Verify(t.Context(), leaf)} {
				if !errors.Is(err, errdef.ErrUnavailable) || errors.Is(err, errdef.ErrNotFound) || !strings.Contains(fmt.Sprint(err), "damaged") {
					t.Errorf("got %v", err)
				}
			}
			if name == "missing" && !strings.Contains(chainErr.Error(), "parent "+mid.Digest+" is missing") {
				t.Errorf("chain: %v", chainErr)
			}
			for _, snap := range list(t, s) {
				if want := snap.Tag != "root"; (snap.Status == StatusFailed) != want {
					t.Errorf("%s is %s", snap.Tag, snap.Status)
				}
			}
			problems, err := s.Check(t.Context())
			if err != nil || !slices.ContainsFunc(problems, func(p Problem) bool { return p.Object == leaf.Digest }) {
				t.Errorf("check: %v, %v", problems, err)
			}
		})
	}
}

func list(t *testing.T, s *Store) []Snapshot {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// Any flipped bit of a layer is found, by a fork of what stands on it too.
func TestFlippedBitsOfLayers(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	mid := layer(t, s, "mid", create(t, s, "root", "a"), 1)
	leaf := layer(t, s, "leaf", mid, 2)
	rapid.Check(t, func(rt *rapid.T) {
		snap := rapid.SampledFrom([]Snapshot{mid, leaf}).Draw(rt, "of")
		st, err := os.Stat(snap.LayerPath())
		if err != nil {
			rt.Fatal(err)
		}
		at := rapid.Int64Range(0, st.Size()*8-1).Draw(rt, "bit")
		flip(rt, snap.LayerPath(), at)
		verifyErr := s.Verify(t.Context(), leaf)
		problems, err := s.Check(t.Context())
		flip(rt, snap.LayerPath(), at)
		if bad := (*DigestError)(nil); !errors.As(verifyErr, &bad) {
			rt.Errorf("verify: %v", verifyErr)
		}
		if err != nil || len(problems) != 1 || problems[0].Object != snap.Digest {
			rt.Errorf("%v, %v", problems, err)
		}
	})
	if err := s.Verify(t.Context(), leaf); err != nil {
		t.Error(err)
	}
	wantClean(t, s)
}

func TestDependents(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	z := layer(t, s, "z", root, 1)
	b := layer(t, s, "b", z, 2)
	layer(t, s, "a", b, 3)
	layer(t, s, "c", root, 4)
	if _, err := make1(t.Context(), s, "w", "whole", b.Digest); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	got, err := s.Dependents(root.Digest)
	at := map[string]int{}
	for i, tag := range got {
		at[tag] = i
	}
	if err != nil || len(got) != 4 || at["z"] > at["a"] || at["z"] > at["w"] {
		t.Errorf("dependents of the root: %v, %v", got, err)
	}
	if got, err = s.Dependents(digestOf(nil)); err != nil || len(got) > 0 {
		t.Errorf("dependents of nothing: %v, %v", got, err)
	}
	wantClean(t, s)
}

// The base under a pinned fork stays, whatever its tag does.
func TestRemoveUnderPinnedFork(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	leaf := layer(t, s, "leaf", root, 1)
	pin, err := s.Pin(leaf)
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Close()
	if err = s.Remove(t.Context(), "leaf"); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("the pinned one was removed: %v", err)
	}
	if err = s.Remove(t.Context(), "root"); err != nil {
		t.Error(err)
	}
	if freed, gcErr := s.GC(t.Context(), false); gcErr != nil || len(freed.Objects) > 0 {
		t.Errorf("gc: %v, %v", freed, gcErr)
	}
	memoryOf(t, s, leaf)
	wantClean(t, s)
}

func TestCompact(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	root := create(t, s, "root", "a")
	leaf := layer(t, s, "leaf", layer(t, s, "mid", root, 1), 2)
	want := memoryOf(t, s, leaf)
	whole, err := s.Compact(t.Context(), "leaf", "whole")
	if err != nil {
		t.Fatal(err)
	}
	if whole.Depth != 0 || whole.Manifest.Parent != "" || whole.Manifest.Device != leaf.Manifest.Device || whole.BranchedFrom != "compact:leaf" {
		t.Errorf("compacted: %+v", whole)
	}
	got, err := os.ReadFile(whole.MemoryPath())
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the memory is another one: %v", err)
	}
	for name, tt := range map[string]struct {
		ref, to string
		want    error
	}{
		"itself":  {"leaf", "leaf", errdef.ErrInvalid},
		"exists":  {"leaf", "mid", errdef.ErrExists},
		"missing": {"nope", "x", errdef.ErrNotFound},
		"bad-tag": {"leaf", "../x", errdef.ErrInvalid},
	} {
		if _, err = s.Compact(t.Context(), tt.ref, tt.to); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, tag := range []string{"leaf", "mid", "root"} {
		if err = s.Remove(t.Context(), tag); err != nil {
			t.Error(err)
		}
	}
	if _, err = s.GC(t.Context(), false); err != nil {
		t.Error(err)
	}
	if all := list(t, s); len(all) != 1 || all[0].Status != StatusReady {
		t.Errorf("left: %v", all)
	}
	wantClean(t, s)
}

// A thousand branches of one source are no trouble.
func BenchmarkThousandBranches(b *testing.B) {
	s, err := Open(b.TempDir(), nil)
	if err != nil {
		b.Fatal(err)
	}
	s.files = hastyFiles{}
	root, err := make1(b.Context(), s, "root", "a", "")
	if err != nil {
		b.Fatal(err)
	}
	branch := func(n int) error {
		st, stageErr := s.StageReplace(b.Context(), fmt.Sprint("b", n))
		if stageErr != nil {
			return stageErr
		}
		_, commitErr := commitLayer(b.Context(), st, fmt.Sprint(n), root, map[uint64]byte{1: byte(n)}, Facts{})
		return commitErr
	}
	for n := range 1000 {
		if err = branch(n); err != nil {
			b.Fatal(err)
		}
	}
	for name, work := range map[string]func() error{
		"list":       func() error { _, err = s.List(); return err },
		"dependents": func() error { _, err = s.Dependents(root.Digest); return err },
		"gc":         func() error { _, err = s.GC(b.Context(), false); return err },
		"more":       func() error { return errors.Join(branch(1000), s.Remove(b.Context(), "b1000")) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if err = work(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// What a fork asks of the store before it starts a machine.
func BenchmarkFind(b *testing.B) {
	s, err := Open(b.TempDir(), nil)
	if err != nil {
		b.Fatal(err)
	}
	s.files = hastyFiles{}
	snap, err := make1(b.Context(), s, "d0", "a", "")
	if err != nil {
		b.Fatal(err)
	}
	for depth := range 33 {
		if depth > 0 {
			st, stageErr := s.Stage(b.Context(), fmt.Sprint("d", depth))
			if stageErr != nil {
				b.Fatal(stageErr)
			}
			if snap, err = commitLayer(b.Context(), st, "x", snap, map[uint64]byte{1: byte(depth)}, Facts{}); err != nil {
				b.Fatal(err)
			}
		}
		if !slices.Contains([]int{0, 1, 8, 32}, depth) {
			continue
		}
		b.Run(snap.Tag, func(b *testing.B) {
			for b.Loop() {
				found, findErr := s.Resolve(snap.Tag)
				_, baseErr := s.Base(found)
				if err = errors.Join(findErr, baseErr, s.Verify(b.Context(), found)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
