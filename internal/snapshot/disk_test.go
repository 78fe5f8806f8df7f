package snapshot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

func remembered(snap Snapshot) bool {
	_, ok := verified(snap)
	return ok
}

// rawDisk is the oldest file of a disk of 1 MiB.
func rawDisk(content string) []byte {
	return append([]byte(content), make([]byte, 1<<20-len(content))...)
}

// withDisk commits a snapshot of a machine with a disk of 1 MiB.
func withDisk(t *testing.T, s *Store, tag string, fill func(st *Stage) error) (Snapshot, error) {
	t.Helper()
	st, err := s.StageReplace(t.Context(), tag)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() {
		if abortErr := st.Abort(); abortErr != nil {
			t.Error(abortErr)
		}
	}()
	if err = errors.Join(write(st, tag), fill(st)); err != nil {
		return Snapshot{}, err
	}
	m := testManifest()
	m.Machine.DiskMiB = 1
	return st.Commit(t.Context(), m, Facts{})
}

func mustDisk(t *testing.T, s *Store, tag string, fill func(st *Stage) error) Snapshot {
	t.Helper()
	snap, err := withDisk(t, s, tag, fill)
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// newDisk is a template with a disk, and a machine's file on that.
func newDisk(t *testing.T, s *Store) (template Snapshot, top string) {
	t.Helper()
	template = mustDisk(t, s, "template", func(st *Stage) error { return os.WriteFile(st.DiskPath(), rawDisk("raw"), 0o600) })
	top = filepath.Join(t.TempDir(), "top")
	if err := os.WriteFile(top, []byte("top"), 0o600); err != nil {
		t.Fatal(err)
	}
	return template, top
}

func contentOf(t *testing.T, paths []string) (all []string) {
	t.Helper()
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(bytes.TrimRight(data, "\x00")))
	}
	return all
}

// TestDisk: a snapshot has all of its disk, and shares the files with others.
func TestDisk(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	template, top := newDisk(t, s)
	branch := mustDisk(t, s, "branch", func(st *Stage) error {
		return st.LinkDisk(t.Context(), append(template.DiskPaths(), top))
	})
	if diff := cmp.Diff([]string{"raw", "top"}, contentOf(t, branch.DiskPaths())); diff != "" {
		t.Error(diff)
	}
	if branch.Manifest.Disk[0] != template.Manifest.Disk[0] {
		t.Errorf("disk %+v, the template's is %+v", branch.Manifest.Disk, template.Manifest.Disk)
	}
	one, err := stampOf(template.DiskPaths()[0])
	if err != nil {
		t.Fatal(err)
	}
	if other, statErr := stampOf(branch.DiskPaths()[0]); statErr != nil || one != other {
		t.Errorf("the oldest file is another: %+v and %+v, %v", one, other, statErr)
	}
	for _, ref := range []string{"template", "branch"} {
		snap, resolveErr := s.Resolve(ref)
		if resolveErr != nil || len(snap.DiskPaths()) != len(snap.Manifest.Disk) {
			t.Errorf("%s: disk %q, %v", ref, snap.DiskPaths(), resolveErr)
		}
	}
	// Each keeps what it needs.
	if err = errors.Join(s.Remove(t.Context(), "template"), os.Remove(top)); err != nil {
		t.Fatal(err)
	}
	wantClean(t, s)
	whole, err := s.Compact(t.Context(), "branch", "whole")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(branch.Manifest.Disk, whole.Manifest.Disk); diff != "" {
		t.Error(diff)
	}
	wantClean(t, s)
}

// TestDiskIsReadOnce: a file of a disk that a store knows is not read again
// for another snapshot, but Check does.
func TestDiskIsReadOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	template, top := newDisk(t, openStore(t, dir))
	s := openStore(t, dir) // which knows nothing yet
	if err := s.Verify(t.Context(), template); err != nil {
		t.Fatal(err)
	}
	// What nobody does: so that reading it would show.
	spoil(t, template.DiskPaths()[0])
	link := func(st *Stage) error { return st.LinkDisk(t.Context(), append(template.DiskPaths(), top)) }
	branch := mustDisk(t, s, "branch", link)
	if branch.Manifest.Disk[0] != template.Manifest.Disk[0] {
		t.Error("the file that was known has been read")
	}
	problems, err := s.Check(t.Context())
	if err != nil || len(problems) != 2 {
		t.Errorf("check: %v, %v, want a problem for each", problems, err)
	}
}

// spoil changes a file and leaves its times.
func spoil(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt([]byte("spoilt"), 100)
	if err = errors.Join(err, f.Close(), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

func TestDiskRefused(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	_, top := newDisk(t, s)
	for name, fill := range map[string]func(st *Stage) error{
		"none":           func(*Stage) error { return nil },
		"another size":   func(st *Stage) error { return os.WriteFile(st.DiskPath(), []byte("short"), 0o600) },
		"a gap":          func(st *Stage) error { return os.WriteFile(filepath.Join(st.Dir(), "disk.2"), rawDisk(""), 0o600) },
		"no regular one": func(st *Stage) error { return os.Symlink(top, st.DiskPath()) },
	} {
		if snap, err := withDisk(t, s, "bad", fill); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %+v, %v, want ErrInvalid", name, snap, err)
		}
	}
	st, err := s.Stage(t.Context(), "plain")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = st.Abort() }()
	if err = errors.Join(write(st, "plain"), os.WriteFile(st.DiskPath(), rawDisk(""), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err = st.Commit(t.Context(), testManifest(), Facts{}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a disk for a machine without one: %v, want ErrInvalid", err)
	}
	if err = st.LinkDisk(t.Context(), make([]string, MaxDisk+1)); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("too many files: %v, want ErrExhausted", err)
	}
	if err = st.LinkDisk(t.Context(), []string{top + ".missing"}); !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrExist) {
		t.Errorf("a file that is missing: %v", err)
	}
	wantClean(t, s)
}

// noLinks are files on a filesystem of their own.
type noLinks struct{ osFiles }

func (noLinks) link(oldPath, newPath string) error {
	return &os.LinkError{Op: "link", Old: oldPath, New: newPath, Err: unix.EXDEV}
}

func TestDiskCopied(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	s.files = noLinks{}
	template, top := newDisk(t, s)
	branch := mustDisk(t, s, "branch", func(st *Stage) error {
		return st.LinkDisk(t.Context(), append(template.DiskPaths(), top))
	})
	if diff := cmp.Diff([]string{"raw", "top"}, contentOf(t, branch.DiskPaths())); diff != "" {
		t.Error(diff)
	}
	if use, err := linux.DiskUse(branch.DiskPaths()[0]); err != nil || use > 64<<10 {
		t.Errorf("the copy takes %d bytes, %v", use, err)
	}
	wantClean(t, s)
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := withDisk(t, s, "canceled", func(st *Stage) error { return st.LinkDisk(canceled, template.DiskPaths()) })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// TestDiskUse: what several have is shared out among them.
func TestDiskUse(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	alone := mustDisk(t, s, "one", func(st *Stage) error {
		return os.WriteFile(st.DiskPath(), []byte(strings.Repeat("x", 1<<20)), 0o600)
	})
	before, err := alone.DiskUse()
	if err != nil || before < 1<<20 {
		t.Fatalf("%d bytes, %v", before, err)
	}
	other := mustDisk(t, s, "two", func(st *Stage) error { return st.LinkDisk(t.Context(), alone.DiskPaths()) })
	for _, snap := range []Snapshot{alone, other} {
		if after, err := snap.DiskUse(); err != nil || after > before-(1<<20)/2 {
			t.Errorf("%d bytes, and %d alone, %v", after, before, err)
		}
	}
}
