package api_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/wire"
)

// TestCreateSnapshotOfRootfs makes a snapshot as forkd's clients ask for it.
// That a real filesystem boots is for cmd/tine's tests to see.
func TestCreateSnapshotOfRootfs(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	dir := t.TempDir()
	kernel, rootfs := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "rootfs.ext4")
	for _, path := range []string{kernel, rootfs} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	body := func(tag, kernel, rootfs, more string) string {
		return fmt.Sprintf(`{"tag":%q,"kernel":%q,"rootfs":%q%s}`, tag, kernel, rootfs, more)
	}
	a := send(t, "POST", url+"/v1/snapshots", "application/json", body("of-rootfs", kernel, rootfs, `,"rw":true,"boot_wait_secs":60,"tap":"tap0"`))
	snap := decode[wire.Snapshot](t, a.body)
	if a.status != 201 || snap.Status != wire.SnapshotStatusReady {
		t.Errorf("status %d, %s", a.status, a.body)
	}
	if !strings.Contains(snap.Warning, "kernel") || !strings.Contains(snap.Warning, "tap") {
		t.Errorf("warning %q", snap.Warning)
	}
	for name, tt := range map[string]struct{ body, says string }{
		"unsafe-tag":   {body("../x", "/none", "/none", ""), "tag"},
		"no-kernel":    {body("x", "/none/vmlinux", "/none", ""), "kernel not found: /none/vmlinux"},
		"no-rootfs":    {body("x", kernel, "/none/rootfs", `,"boot_wait_secs":61`), "rootfs not found: /none/rootfs"},
		"kernel-alone": {body("x", kernel, "", ""), "rootfs is missing"},
		"directory":    {body("x", kernel, dir, ""), "rootfs is not a file"},
		"boot-wait":    {body("of-rootfs", kernel, rootfs, `,"boot_wait_secs":61`), "boot_wait_secs must be ≤ 60"},
		"exists":       {body("of-rootfs", kernel, rootfs, ""), "snapshot of-rootfs already exists; DELETE first"},
		"both":         {body("x", kernel, rootfs, `,"image":"py"`), "not both"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := send(t, "POST", url+"/v1/snapshots", "application/json", tt.body)
			if got := decode[wire.Error](t, a.body); a.status != 400 || !strings.Contains(got.Error, tt.says) {
				t.Errorf("status %d, %s, want 400 that says %q", a.status, a.body, tt.says)
			}
		})
	}
}
