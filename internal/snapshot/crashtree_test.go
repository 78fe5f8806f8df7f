package snapshot

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
)

// prepareTree makes the store that changes of a tree start from: layers, flat
// images, what is held, and garbage of all kinds.
func prepareTree(t *testing.T) string {
	t.Helper()
	s := newStore(t)
	root := create(t, s, "root", "a")
	mid := layer(t, s, "mid", root, 1)
	leaf := layer(t, s, "leaf", mid, 2)
	head := mid
	for i := range 2 {
		head = layerWith(t, s, fmt.Sprint("auto", i), head, byte(10+i), Facts{Auto: true, BranchedFrom: "sb", CreatedAt: time.Unix(int64(i), 0).UTC()})
	}
	held := hold(t, s, "sb", leaf, 4)
	lost := layer(t, s, "lost2", layer(t, s, "lost1", leaf, 7), 8)
	if err := errors.Join(
		s.Flatten(t.Context(), mid), s.Flatten(t.Context(), held), s.Flatten(t.Context(), lost),
		os.Remove(s.path(tagsDir, "lost1.json")), os.Remove(s.path(tagsDir, "lost2.json")),
		os.Remove(held.flatMemoPath()),
		os.WriteFile(filepath.Join(leaf.Dir(), newFlatFile), []byte("half"), 0o600),
		os.Mkdir(s.path(stagingDir, "held:stale"), 0o700),
		os.WriteFile(s.path(stagingDir, "held:stale", layerFile), []byte("half"), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return s.dir
}

// dyingStage is a stage whose writer dies as a process does when work fails.
func dyingStage(t *testing.T, st *Stage, err error, parent Snapshot) error {
	t.Helper()
	if err != nil {
		return err
	}
	defer func() {
		if st.claim != nil {
			_ = durable.Unlock(st.claim)
		}
	}()
	if err = writeLayer(st, "new", map[uint64]byte{2: 77, 5: 0}); err != nil {
		return err
	}
	m := testManifest()
	m.Parent = parent.Digest
	_, err = st.Commit(t.Context(), m, Facts{CreatedAt: time.Unix(1, 0).UTC()})
	return err
}

func must(t *testing.T, s *Store, tag string) Snapshot {
	t.Helper()
	snap, err := s.Resolve(tag)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

var treeChanges = map[string]func(s *Store, t *testing.T) error{
	"layer": func(s *Store, t *testing.T) error {
		st, err := s.Stage(t.Context(), "new")
		return dyingStage(t, st, err, must(t, s, "leaf"))
	},
	"layer-replace": func(s *Store, t *testing.T) error {
		st, err := s.StageReplace(t.Context(), "auto1")
		return dyingStage(t, st, err, must(t, s, "auto0"))
	},
	"held": func(s *Store, t *testing.T) error {
		st, err := s.StageHeld(t.Context(), "new")
		return dyingStage(t, st, err, must(t, s, "leaf"))
	},
	"held-replace": func(s *Store, t *testing.T) error {
		st, err := s.StageHeld(t.Context(), "sb")
		return dyingStage(t, st, err, must(t, s, "leaf"))
	},
	"drop-held": func(s *Store, t *testing.T) error { return s.DropHeld(t.Context(), "sb") },
	"compact": func(s *Store, t *testing.T) error {
		_, err := s.Compact(t.Context(), "leaf", "whole")
		return err
	},
	"flatten": func(s *Store, t *testing.T) error { return s.Flatten(t.Context(), must(t, s, "leaf")) },
	"flatten-anew": func(s *Store, t *testing.T) error {
		snap, err := s.Held("sb")
		if err != nil {
			return err
		}
		return s.Flatten(t.Context(), snap)
	},
	"drop-flats": func(s *Store, t *testing.T) error { _, err := s.DropFlats(t.Context(), false); return err },
	"retag": func(s *Store, t *testing.T) error {
		_, err := s.Retag(t.Context(), "best", must(t, s, "auto1"), false)
		return err
	},
	"retag-replace": func(s *Store, t *testing.T) error {
		_, err := s.Retag(t.Context(), "auto1", must(t, s, "leaf"), true)
		return err
	},
	"prune": func(s *Store, t *testing.T) error {
		_, _, err := s.Prune(t.Context(), PrunePolicy{})
		return err
	},
	"remove-leaf":   func(s *Store, t *testing.T) error { return s.Remove(t.Context(), "auto1") },
	"remove-parent": func(s *Store, t *testing.T) error { return s.Remove(t.Context(), "mid") },
	"gc":            func(s *Store, t *testing.T) error { _, err := s.GC(t.Context(), false); return err },
}

// readTree reads everything that a store promises: of each name a digest of
// its memory and device, as forks get them.
func readTree(t *testing.T, s *Store) map[string]string {
	t.Helper()
	got := map[string]string{}
	add := func(name string, snap Snapshot) {
		device, err := os.ReadFile(snap.DevicePath())
		if err = errors.Join(err, s.Verify(t.Context(), snap)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		mem := mapped(t, s, snap)
		if whole := memoryOf(t, s, snap); string(whole) != string(mem) {
			t.Errorf("%s: the flat memory is another one", name)
		}
		got[name] = fmt.Sprintf("%x", sha256.Sum256(append(mem, device...)))
	}
	for _, snap := range list(t, s) {
		switch snap.Status {
		case StatusReady:
			add(snap.Tag, snap)
		case StatusFailed:
			t.Errorf("%s: %s", snap.Tag, snap.Problem)
		}
	}
	names, err := s.HeldNames()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		snap, heldErr := s.Held(name)
		if heldErr != nil {
			t.Errorf("held %s: %v", name, heldErr)
			continue
		}
		add("held:"+name, snap)
	}
	return got
}

// wantTree sees that each name has what it had before a change or what it
// should have after it.
func wantTree(t *testing.T, at string, s *Store, done bool, was, want map[string]string) {
	t.Helper()
	for _, look := range []string{"as left", "opened again and cleaned"} {
		if look != "as left" {
			var err error
			if s, err = open(s.dir, nil, hastyFiles{}); err != nil {
				t.Fatal(err)
			}
			if _, err = s.GC(t.Context(), false); err != nil {
				t.Errorf("%s: gc: %v", at, err)
			}
		}
		got := readTree(t, s)
		for name := range all(was, want, got) {
			if got[name] != want[name] && (done || got[name] != was[name]) {
				t.Errorf("%s, %s: done %t, %s is %.8s, was %.8s", at, look, done, name, got[name], was[name])
			}
		}
		wantClean(t, s)
	}
	if freed, err := s.GC(t.Context(), true); err != nil || len(freed.Objects)+len(freed.Leftovers) > 0 {
		t.Errorf("%s: left %v, %v", at, freed, err)
	}
	for _, dir := range []string{stagingDir, trashDir} {
		if names, err := s.list(dir); err != nil || len(names) > 0 {
			t.Errorf("%s: %s has %v, %v", at, dir, names, err)
		}
	}
	temp, err := filepath.Glob(s.path("*", "*", ".tine-tmp-*"))
	if err != nil || len(temp) > 0 {
		t.Errorf("%s: %v, %v", at, temp, err)
	}
}

func all(maps ...map[string]string) map[string]bool {
	names := map[string]bool{}
	for _, m := range maps {
		for name := range m {
			names[name] = true
		}
	}
	return names
}

// A process that dies, or a disk that is full, at any step of any change of a
// tree breaks nothing.
func TestCutTreeAfterEveryStep(t *testing.T) {
	t.Parallel()
	template := prepareTree(t)
	clone := func(t *testing.T, f files) *Store {
		dir := t.TempDir()
		if err := copyStore(dir, template); err != nil {
			t.Fatal(err)
		}
		return &Store{dir: dir, logger: slog.New(slog.DiscardHandler), files: f}
	}
	was := readTree(t, clone(t, osFiles{}))
	for name, work := range treeChanges {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			oracle := clone(t, osFiles{})
			if err := work(oracle, t); err != nil {
				t.Fatal(err)
			}
			want := readTree(t, oracle)
			if changes := !strings.Contains("gc drop-flats flatten flatten-anew", name); changes == cmp.Equal(was, want) {
				t.Errorf("it changes from %v to %v", was, want)
			}
			for steps := range 100 {
				with := []error{errDead, unix.ENOSPC}[steps%2]
				f := &cutFiles{left: steps, with: with}
				s := clone(t, f)
				err := work(s, t)
				if err != nil && !errors.Is(err, with) {
					t.Errorf("cut after %d: %v", steps, err)
				}
				wantTree(t, fmt.Sprintf("cut after %d", steps), openless(s), err == nil, was, want)
				if f.left > 0 {
					t.Logf("%d steps", steps)
					return
				}
			}
			t.Error("the work never ends")
		})
	}
}

// copyStore copies a store with the stamps of its files, so that what is
// vouched for stays so, as far as inodes allow: memos are written anew.
func copyStore(to, from string) error {
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	memos, err := filepath.Glob(filepath.Join(to, objectsDir, "*", flatMemoFile))
	for _, path := range memos {
		data, readErr := os.ReadFile(path)
		m, decodeErr := decodeFlatMemo(data)
		now, stampErr := stampOf(filepath.Join(filepath.Dir(path), flatFile))
		m.stamp = now
		err = errors.Join(err, readErr, decodeErr, stampErr, os.WriteFile(path, m.encode(), 0o600))
	}
	return err
}
