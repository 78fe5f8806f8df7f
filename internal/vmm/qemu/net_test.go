package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// commandLine is that of a machine.
func commandLine(t *testing.T, spec vmm.Common) *launcher {
	t.Helper()
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
	l.device = "a-disk"
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
	plain := commandLine(t, vmm.Common{Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1}})
	carded := commandLine(t, vmm.Common{Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1, Net: true}, NIC: null})
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

func TestCheckNetwork(t *testing.T) {
	t.Parallel()
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for name, tt := range map[string]struct {
		net     bool
		nic     *os.File
		refused bool
	}{
		"neither": {}, "no tap": {net: true, refused: true}, "no card": {nic: null, refused: true},
		"not a tap": {net: true, nic: null, refused: true},
	} {
		err = checkNetwork(vmm.Common{Machine: vmm.Machine{Net: tt.net}, NIC: tt.nic})
		if tt.refused != errors.Is(err, errdef.ErrInvalid) || !tt.refused && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestCheckTap makes taps, in a network namespace of its own.
func TestCheckTap(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot make a network namespace and taps in it")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Errorf("make a network namespace: %v", err)
			return
		}
		for name, tt := range map[string]struct {
			flags uint16
			good  bool
		}{
			"tap0": {tapFlags, true}, "tap1": {unix.IFF_TAP | unix.IFF_NO_PI, false},
			"tun0": {unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR, false},
			"tap2": {tapFlags | unix.IFF_MULTI_QUEUE, false}, "none": {},
		} {
			tap, err := openTap(name, tt.flags)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			err = checkTap(tap)
			if tt.good && err != nil || !tt.good && !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("%s: %v", name, err)
			}
			_ = tap.Close()
		}
	}()
	<-done
}

// openTap makes an interface that is there for as long as the file is open;
// without flags it makes none.
func openTap(name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	tap := os.NewFile(uintptr(fd), name)
	if flags == 0 {
		return tap, nil
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, tap.Close())
	}
	req.SetUint16(flags)
	if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return nil, errors.Join(err, tap.Close())
	}
	return tap, nil
}
