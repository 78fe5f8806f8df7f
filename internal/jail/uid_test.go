package jail

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

func TestLeasesDiffer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	leases := make([]*uidLease, 64)
	var wg sync.WaitGroup
	for i := range leases {
		wg.Go(func() {
			var err error
			if leases[i], err = leaseUID(dir); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	seen := map[int]bool{}
	for _, l := range leases {
		if l == nil {
			continue
		}
		if seen[l.id] || l.id < firstUID || l.id >= firstUID+countUIDs {
			t.Errorf("leased user id %d", l.id)
		}
		seen[l.id] = true
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// child runs cat, which ends when the function that is returned is called.
func child(t *testing.T, change func(*exec.Cmd)) (end func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	change(cmd)
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return end
}

// A lease is held by whoever has its file, and swept when nobody has.
func TestLeaseOutlivesItsMaker(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	held, err := leaseUID(dir)
	if err != nil {
		t.Fatal(err)
	}
	free, err := leaseUID(dir)
	if err != nil {
		t.Fatal(err)
	}
	end := child(t, func(c *exec.Cmd) { c.ExtraFiles = []*os.File{held.lock} })
	if err = errors.Join(held.Close(), free.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err = lockUID(dir, held.id); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("lease that a process holds: %v", err)
	}
	if err = os.WriteFile(filepath.Join(dir, "notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err = os.Mkdir(filepath.Join(dir, "lost+found"), 0o700); err != nil {
		t.Fatal(err)
	}
	checkSweep(t, dir, strconv.Itoa(held.id), "lost+found", "notes")
	end()
	checkSweep(t, dir, "lost+found", "notes")
}

// checkSweep sweeps until that is all that is left: a process that another test
// starts has our files for an instant.
func checkSweep(t *testing.T, dir string, want ...string) {
	t.Helper()
	var got []string
	for late := time.Now().Add(10 * time.Second); time.Now().Before(late); time.Sleep(time.Millisecond) {
		if err := sweepUIDs(dir); err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		got = nil
		for _, e := range entries {
			got = append(got, e.Name())
		}
		if slices.Equal(got, want) {
			return
		}
	}
	t.Errorf("left are %v, want %v", got, want)
}

// A program that has let go of its lease keeps its user id.
func TestUserIDInUse(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: not root")
	}
	const id = firstUID + countUIDs + 1 // none that is leased
	dir := t.TempDir()
	end := child(t, func(c *exec.Cmd) {
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
	})
	if _, err := lockUID(dir, id); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("user id of a process: %v", err)
	}
	end()
	lock, err := lockUID(dir, id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = io.WriteString(lock, "x"); err == nil {
		t.Error("a program could fill the filesystem of leases")
	}
	if err = lock.Close(); err != nil {
		t.Error(err)
	}
}
