package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/vmm"
)

// commandLine is that of a machine, with a network card if there is a tap.
func commandLine(t *testing.T, tap *os.File) *launcher {
	t.Helper()
	spec := vmm.Common{Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1, Net: tap != nil}}
	dir, err := os.MkdirTemp("", "net") //nolint:usetesting // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	spec.ID, spec.Dir, spec.Root = "x", dir, filepath.Join(dir, "root")
	if err = errors.Join(os.WriteFile(spec.Root, nil, 0o600), os.Truncate(spec.Root, pmemAlign)); err != nil {
		t.Fatal(err)
	}
	l := newLauncher(&Engine{accel: TCG}, spec)
	t.Cleanup(l.closeOpened)
	l.device, l.tap = "a-disk", tap
	if err = l.machine(); err != nil {
		t.Fatal(err)
	}
	for i := range l.args {
		l.args[i] = strings.ReplaceAll(l.args[i], dir, "DIR")
	}
	return l
}

// TestNetworkCardComesLast: but for its card, a machine with one is like one
// without, whose command line snapshots that exist depend on.
func TestNetworkCardComesLast(t *testing.T) {
	t.Parallel()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	plain := commandLine(t, nil)
	carded := commandLine(t, null)
	want := slices.Concat(plain.args, []string{
		"-netdev", "tap,id=net,fd=5,vhost=off",
		"-device", "virtio-net-pci,netdev=net,mac=02:74:69:6e:65:02,romfile=,mq=off,guest_announce=off",
	})
	if !slices.Equal(carded.args, want) {
		t.Errorf("with a network card\n%q, want\n%q", carded.args, want)
	}
	if carded.files[5-3] != null {
		t.Error("descriptor 5 is not the tap")
	}
	if slices.Contains(carded.opened, null) {
		t.Error("the tap is the caller's to close")
	}
	if at := slices.Index(plain.args, "a-disk"); at != len(plain.args)-1 {
		t.Errorf("the disk is not the last device: %q", plain.args)
	}
}
