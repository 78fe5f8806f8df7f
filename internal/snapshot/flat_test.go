package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// tree is a store with a chain of three.
func tree(t *testing.T) (s *Store, root, mid, leaf Snapshot) {
	t.Helper()
	s = newStore(t)
	root = create(t, s, "root", "a")
	mid = layer(t, s, "mid", root, 1)
	return s, root, mid, layer(t, s, "leaf", mid, 2)
}

func TestFlatten(t *testing.T) {
	t.Parallel()
	s, root, mid, leaf := tree(t)
	if err := errors.Join(s.Flatten(t.Context(), mid), s.Flatten(t.Context(), root)); err != nil {
		t.Fatal(err)
	}
	want := memoryOf(t, s, leaf)
	base, err := s.Base(leaf)
	if err != nil || base.Digest != mid.Digest || base.Path != mid.FlatPath() || !slices.Equal(base.Layers, []string{leaf.LayerPath()}) {
		t.Errorf("base %+v, %v", base, err)
	}
	if !bytes.Equal(mapped(t, s, leaf), want) {
		t.Error("what a fork maps is not the memory")
	}
	first, err := stampOf(mid.FlatPath())
	if err != nil {
		t.Fatal(err)
	}
	if err = s.Flatten(t.Context(), mid); err != nil {
		t.Fatal(err)
	}
	if again, stampErr := stampOf(mid.FlatPath()); stampErr != nil || again != first {
		t.Errorf("made again: %v", stampErr)
	}
	if _, err = os.Lstat(root.FlatPath()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a whole one has a flat one: %v", err)
	}
	wantClean(t, openStore(t, s.dir))
	if base, err = s.Base(mid); err != nil || base.Path != mid.FlatPath() || len(base.Layers) != 0 {
		t.Errorf("after opening again: %+v, %v", base, err)
	}
}

// A flat image that changed is trusted no more, and swept.
func TestFlatIsDistrusted(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(mid Snapshot) error{
		"written":   func(mid Snapshot) error { return os.WriteFile(mid.FlatPath(), make([]byte, pages<<12), 0o600) },
		"touched":   func(mid Snapshot) error { return os.Chtimes(mid.FlatPath(), time.Time{}, time.Unix(7, 0)) },
		"short":     func(mid Snapshot) error { return os.Truncate(mid.FlatPath(), 4096) },
		"gone":      func(mid Snapshot) error { return os.Remove(mid.FlatPath()) },
		"no-memo":   func(mid Snapshot) error { return os.Remove(mid.flatMemoPath()) },
		"torn-memo": func(mid Snapshot) error { return os.Truncate(mid.flatMemoPath(), 9) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, root, mid, _ := tree(t)
			if err := s.Flatten(t.Context(), mid); err != nil {
				t.Fatal(err)
			}
			if err := spoil(mid); err != nil {
				t.Fatal(err)
			}
			if base, err := s.Base(mid); err != nil || base.Path != root.MemoryPath() {
				t.Errorf("base %+v, %v", base, err)
			}
			wantClean(t, s)
			dry, err := s.GC(t.Context(), true)
			if err != nil || len(dry.Leftovers) != 1 {
				t.Errorf("would sweep %v, %v", dry, err)
			}
			openStore(t, s.dir)
			if _, found, useErr := mid.flatUse(); useErr != nil || found {
				t.Errorf("not swept: %v", useErr)
			}
			if err = s.Flatten(t.Context(), mid); err != nil {
				t.Error(err)
			}
			if base, baseErr := s.Base(mid); baseErr != nil || base.Path != mid.FlatPath() {
				t.Errorf("after another try: %+v, %v", base, baseErr)
			}
		})
	}
}

// Check finds a flipped bit that no stamp shows, and no fork maps it then.
func TestCheckFindsFlippedBitsOfFlat(t *testing.T) {
	t.Parallel()
	s, _, _, leaf := tree(t)
	rapid.Check(t, func(rt *rapid.T) {
		if err := s.Flatten(t.Context(), leaf); err != nil {
			rt.Fatal(err)
		}
		st, err := os.Stat(leaf.FlatPath())
		if err != nil {
			rt.Fatal(err)
		}
		flip(rt, leaf.FlatPath(), rapid.Int64Range(0, st.Size()*8-1).Draw(rt, "bit"))
		if err = os.Chtimes(leaf.FlatPath(), time.Time{}, st.ModTime()); err != nil {
			rt.Fatal(err)
		}
		problems, err := s.Check(t.Context())
		if err != nil || len(problems) != 1 || problems[0].Object != leaf.Digest {
			rt.Errorf("%v, %v", problems, err)
		}
		if base, baseErr := s.Base(leaf); baseErr != nil || base.Path == leaf.FlatPath() {
			rt.Errorf("still trusted: %+v, %v", base, baseErr)
		}
	})
	wantClean(t, s)
}

// A damaged ancestor never gets into a flat image.
func TestFlattenOfDamaged(t *testing.T) {
	t.Parallel()
	s, root, _, leaf := tree(t)
	flip(t, root.MemoryPath(), 99)
	err := s.Flatten(t.Context(), leaf)
	if bad := (*DigestError)(nil); !errors.As(err, &bad) {
		t.Errorf("flatten: %v", err)
	}
	if _, compactErr := s.Compact(t.Context(), "leaf", "whole"); !errors.As(compactErr, new(*DigestError)) {
		t.Errorf("compact: %v", compactErr)
	}
	if _, found, useErr := leaf.flatUse(); useErr != nil || found {
		t.Errorf("left something: %v", useErr)
	}
	if names, listErr := s.list(stagingDir); listErr != nil || len(names) > 0 {
		t.Errorf("staging: %v, %v", names, listErr)
	}
}

func TestFlattenCancelled(t *testing.T) {
	t.Parallel()
	s, _, _, leaf := tree(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("ctrl-c")
	cancel(cause)
	if err := s.Flatten(ctx, leaf); !errors.Is(err, cause) {
		t.Errorf("flatten: %v", err)
	}
	if _, err := s.Compact(ctx, "leaf", "whole"); !errors.Is(err, cause) {
		t.Errorf("compact: %v", err)
	}
	entries, err := os.ReadDir(leaf.Dir())
	if err != nil || len(entries) != 4 {
		t.Errorf("%v, %v", entries, err)
	}
	wantClean(t, s)
}

// A machine that maps a flat image pins the snapshot that it was forked from,
// which may be one higher up.
func TestDropFlat(t *testing.T) {
	t.Parallel()
	s, _, mid, leaf := tree(t)
	other := layer(t, s, "other", mid, 5)
	if err := s.Flatten(t.Context(), mid); err != nil {
		t.Fatal(err)
	}
	for _, pinned := range []Snapshot{mid, leaf, other} {
		pin, err := s.Pin(pinned)
		if err != nil {
			t.Fatal(err)
		}
		if err = s.DropFlat(t.Context(), mid); !errors.Is(err, errdef.ErrConflict) {
			t.Errorf("dropped while %s is pinned: %v", pinned.Tag, err)
		}
		if freed, dropErr := s.DropFlats(t.Context(), false); dropErr != nil || len(freed.Leftovers) > 0 {
			t.Errorf("dropped while %s is pinned: %v, %v", pinned.Tag, freed, dropErr)
		}
		if err = pin.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if base, err := s.Base(leaf); err != nil || base.Path != mid.FlatPath() {
		t.Errorf("base %+v, %v", base, err)
	}
	if err := s.Flatten(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.DropFlat(t.Context(), other), s.DropFlat(t.Context(), other)); err != nil {
		t.Errorf("drop, and again: %v", err)
	}
	dry, err := s.DropFlats(t.Context(), true)
	if err != nil || len(dry.Leftovers) != 1 || dry.Bytes == 0 {
		t.Errorf("dry run: %v, %v", dry, err)
	}
	wet, err := s.DropFlats(t.Context(), false)
	if err != nil || fmt.Sprint(wet) != fmt.Sprint(dry) {
		t.Errorf("said %v, did %v, %v", dry, wet, err)
	}
	if base, baseErr := s.Base(leaf); baseErr != nil || len(base.Layers) != 2 {
		t.Errorf("base %+v, %v", base, baseErr)
	}
	wantClean(t, s)
}

// roleFlatten flattens, when it is told to, what is tagged leaf.
func roleFlatten() error {
	s, err := Open(".", nil)
	if err != nil {
		return err
	}
	snap, err := s.Resolve("leaf")
	if err != nil {
		return err
	}
	if err = waitForParent(); err != nil {
		return err
	}
	if err = s.Flatten(context.Background(), snap); err != nil {
		return err
	}
	if base, baseErr := s.Base(snap); baseErr != nil || base.Path != snap.FlatPath() {
		return fmt.Errorf("base %+v, %w", base, baseErr)
	}
	return nil
}

func TestFlattenByManyProcesses(t *testing.T) {
	t.Parallel()
	s, _, _, leaf := tree(t)
	var all []process
	for range 4 {
		all = append(all, start(t, "flatten", s.dir))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := s.Flatten(t.Context(), leaf); err != nil {
				t.Error(err)
			}
		})
	}
	for _, p := range all {
		if err := p.in.Close(); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	for _, p := range all {
		if err := p.Wait(); err != nil {
			t.Errorf("a process: %v", err)
		}
	}
	entries, err := os.ReadDir(leaf.Dir())
	if err != nil || len(entries) != 6 {
		t.Errorf("%v, %v", entries, err)
	}
	wantClean(t, s)
}

// The store opens, and is swept, while an image is being made.
func TestSweepSparesFlatInTheMaking(t *testing.T) {
	t.Parallel()
	s, _, _, leaf := tree(t)
	path := filepath.Join(leaf.Dir(), newFlatFile)
	f, err := s.newFlat(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err = s.GC(t.Context(), false); err != nil {
			t.Error(err)
		}
		wantClean(t, s)
		if _, err = os.Lstat(path); err != nil {
			t.Errorf("swept: %v", err)
		}
	}
	if err = f.Close(); err != nil {
		t.Fatal(err)
	}
	openStore(t, s.dir)
	if _, err = os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dead one was not swept: %v", err)
	}
}

// Others open the store, collect and drop, while images are made.
func TestFlattenWhileSwept(t *testing.T) {
	t.Parallel()
	s, _, mid, leaf := tree(t)
	s.files = hastyFiles{}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for _, disturb := range []func() error{
		func() error { _, err := open(s.dir, nil, hastyFiles{}); return err },
		func() error { _, err := s.GC(ctx, false); return err },
		func() error { _, err := s.DropFlats(ctx, false); return err },
	} {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := disturb(); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	want := memoryOf(t, s, leaf)
	for range 40 {
		pin, err := s.Pin(leaf)
		if err != nil {
			t.Fatal(err)
		}
		if err = errors.Join(s.Flatten(ctx, mid), s.Flatten(ctx, leaf)); err != nil {
			t.Error(err)
		}
		if base, baseErr := s.Base(leaf); baseErr != nil || base.Path != leaf.FlatPath() {
			t.Errorf("a pinned one was dropped: %+v, %v", base, baseErr)
		}
		if !bytes.Equal(mapped(t, s, leaf), want) {
			t.Error("what a fork maps is not the memory")
		}
		if err = pin.Close(); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	wg.Wait()
	wantClean(t, s)
}

func FuzzDecodeFlatMemo(f *testing.F) {
	good := flatMemo{Version: Version, Digest: digestOf(nil), stamp: stamp{1, 2, 3}}
	f.Add(good.encode())
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeFlatMemo(data)
		if err != nil {
			return
		}
		if again, againErr := decodeFlatMemo(m.encode()); againErr != nil || again != m {
			t.Errorf("%q became %+v, %v", data, again, againErr)
		}
	})
}
