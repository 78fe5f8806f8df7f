package daemon

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/fake"
)

// smallDisk is a state directory on a file system of its own.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := stateDir(t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount("tine-test", dir, "tmpfs", 0, "size=4m,mode=0700")
	if errors.Is(err, unix.EPERM) {
		t.Skip("only root can make a small disk")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves no room on the disk of a directory, and returns what frees it.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	for size := 64 << 10; size > 0; {
		if _, err = f.Write(make([]byte, size)); err != nil {
			size /= 2
		}
	}
	if err = f.Close(); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

// TestStartOnFullDisk: what there is can be asked, nothing is done that cannot
// be remembered, and all is well once there is room.
func TestStartOnFullDisk(t *testing.T) {
	t.Parallel()
	dir := smallDisk(t)
	_, _, stop := start(t, fake.New(), Config{StateDir: dir})
	stop()
	free := fill(t, dir)
	_, r, stop := start(t, fake.New(), Config{StateDir: dir})
	degraded := func() string {
		status, _, body := r.ask(t, "tcp", http.MethodGet, "/healthz", "")
		var health struct {
			OK       bool
			Degraded string
		}
		if err := json.Unmarshal([]byte(body), &health); err != nil || status != http.StatusOK || !health.OK {
			t.Fatalf("health: %d %s", status, body)
		}
		return health.Degraded
	}
	if why := degraded(); !strings.Contains(why, "no space left") {
		t.Errorf("health says %q", why)
	}
	for _, path := range []string{"/v1/sandboxes", "/v1/snapshots", "/v1/images", "/version"} {
		if status, _, body := r.ask(t, "unix", http.MethodGet, path, ""); status != http.StatusOK {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
	status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/snapshots/gc", "")
	var no refused
	if err := json.Unmarshal([]byte(body), &no); err != nil || status != http.StatusServiceUnavailable || !strings.Contains(no.Hint, "make room") {
		t.Errorf("an act: %d %s", status, body)
	}
	free()
	for deadline := time.Now().Add(10 * time.Second); degraded() != "" && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	if status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/snapshots/gc", ""); status != http.StatusOK {
		t.Errorf("once there is room: %d %s", status, body)
	}
	stop()
	if starts := find(auditLines(t, filepath.Join(dir, "audit")), "event", "daemon.start"); len(starts) != 2 {
		t.Errorf("%d starts", len(starts))
	}
}
