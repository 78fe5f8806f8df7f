package durable

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestWriteFile(t *testing.T) {
	t.Parallel()
	for name, write := range map[string]func(string, []byte, fs.FileMode) error{"write": WriteFile, "replace": Replace} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "f")
			for _, content := range []string{"one", "two and more", ""} {
				if err := write(path, []byte(content), 0o640); err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(path)
				if err != nil || string(got) != content {
					t.Fatalf("got %q, %v; want %q", got, err, content)
				}
			}
			st, err := os.Stat(path)
			if err != nil || st.Mode() != 0o640 {
				t.Errorf("mode %v, %v; want 0640", st.Mode(), err)
			}
			wantNames(t, filepath.Dir(path), "f")
		})
	}
}

func TestWriteFileErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := WriteFile(filepath.Join(dir, "no", "f"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing directory: %v", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "d", "full"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(filepath.Join(dir, "d"), []byte("x"), 0o600); err == nil {
		t.Error("a directory was replaced by a file")
	}
	wantNames(t, dir, "d")
}

// fullDisk has room for names and none for data.
type fullDisk struct{ osFiles }

type fullTemp struct{ temp }

func (f fullDisk) createTemp(dir string, perm fs.FileMode) (temp, error) {
	tmp, err := f.osFiles.createTemp(dir, perm)
	return fullTemp{tmp}, err
}

func (fullTemp) Write([]byte) (int, error) { return 0, unix.ENOSPC }

func TestWriteFileFullDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	err := write(fullDisk{}, path, []byte("x"), 0o600, true)
	if !errors.Is(err, errdef.ErrExhausted) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("full disk: %v", err)
	}
	wantNames(t, filepath.Dir(path))
}

func TestCommitDir(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	stage, final := filepath.Join(dir, "stage"), filepath.Join(dir, "final")
	makeTree := func() {
		if err := os.MkdirAll(filepath.Join(stage, "sub"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(stage, "sub", "f"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	makeTree()
	if err := CommitDir(stage, final); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, "final")
	makeTree()
	if err := CommitDir(stage, final); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("second commit: %v", err)
	}
	wantNames(t, dir, "final", "stage")
}

func TestRemoveTemp(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, name := range []string{"keep", tempPrefix + "left", ".tine-other"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	live, err := osFiles{}.createTemp(dir, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err = RemoveTemp(dir); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, ".tine-other", filepath.Base(live.Name()), "keep")
	if err = live.release(); err != nil {
		t.Fatal(err)
	}
	if err = RemoveTemp(dir); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, ".tine-other", "keep")
}

func TestLock(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	held, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = TryLock(path, true); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("shared beside exclusive: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("tired of waiting")
	cancel(cause)
	if _, err = Lock(ctx, path); !errors.Is(err, cause) {
		t.Errorf("cancelled wait: %v", err)
	}
	if err = Unlock(held); err != nil {
		t.Fatal(err)
	}
	first, err := TryLock(path, true)
	if err != nil {
		t.Fatal(err)
	}
	second, err := TryLock(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = TryLock(path, false); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("exclusive beside shared: %v", err)
	}
	if err = errors.Join(Unlock(first), Unlock(second)); err != nil {
		t.Fatal(err)
	}
}

// A lock file that is removed while others wait for it must not let two in.
func TestLockRemovedFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "lock")
	var wg sync.WaitGroup
	inside := make(chan struct{}, 1)
	for range 8 {
		wg.Go(func() {
			for range 20 {
				f, err := Lock(t.Context(), path)
				if err != nil {
					t.Error(err)
					return
				}
				select {
				case inside <- struct{}{}:
				default:
					t.Error("two hold the lock")
					return
				}
				<-inside
				// From here on the name is free for others, though f is locked.
				if err = errors.Join(os.Remove(path), Unlock(f)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, e := range entries {
		got[e.Name()] = true
	}
	for _, name := range want {
		if !got[name] {
			t.Errorf("%s is missing", name)
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("%s was left", name)
	}
}
