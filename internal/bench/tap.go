package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// bareTap is the floor of a network: a tap in a namespace, with servers at its
// own address. There are no rules and no relay. The namespace goes with its
// files.
type bareTap struct {
	tap   *os.File
	world *world
}

// newBareTap makes one. It takes root.
func newBareTap() (t *bareTap, err error) {
	if _, err = inNamespace(func() error { t, err = makeBareTap(); return err }); err != nil {
		return nil, fmt.Errorf("make a bare tap: %w", err)
	}
	return t, nil
}

// inNamespace calls f on a thread that is in a network namespace of its own, and
// says how long that took to make. The thread comes back: if it ended, so would
// the machines that it has started, which die with their parent.
func inNamespace(f func() error) (took time.Duration, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		var back bool
		if took, back, err = visit(f); back {
			runtime.UnlockOSThread()
		}
	}()
	<-done
	return took, err
}

// visit is inNamespace for this thread. It also says whether the thread is back.
func visit(f func() error) (took time.Duration, back bool, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return 0, true, err
	}
	defer func() { _ = own.Close() }() // only entered
	begin := time.Now()
	err = unix.Unshare(unix.CLONE_NEWNET)
	took = time.Since(begin)
	if err != nil {
		return 0, true, os.NewSyscallError("unshare", err)
	}
	err = f()
	if backErr := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); backErr != nil {
		return took, false, errors.Join(err, os.NewSyscallError("setns", backErr))
	}
	return took, true, err
}

// makeBareTap makes one in the namespace of this thread. A socket stays in that
// in which it was made, and so do those that it accepts.
func makeBareTap() (_ *bareTap, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	t := &bareTap{}
	if t.tap, err = openBareTap(); err != nil {
		return nil, err
	}
	u.Add(t.tap.Close)
	if err = configureBareTap(); err != nil {
		return nil, err
	}
	t.world, err = newWorld(func(port int) (net.Listener, error) {
		return net.ListenTCP("tcp4", &net.TCPAddr{IP: vmm.GuestNet().Gateway.AsSlice(), Port: port})
	})
	return t, err
}

// bareTapName is that of its interface.
const bareTapName = "tap0"

// openBareTap makes the interface, with the header of virtio's that the guest's
// card has agreed on.
func openBareTap() (_ *os.File, err error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	req, err := unix.NewIfreq(bareTapName)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = os.NewSyscallError("TUNSETIFF", unix.IoctlIfreq(fd, unix.TUNSETIFF, req))
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "tap"), nil
}

func configureBareTap() error {
	n := vmm.GuestNet()
	link, err := netlink.LinkByName(bareTapName)
	if err != nil {
		return err
	}
	address := &netlink.Addr{IPNet: &net.IPNet{IP: n.Gateway.AsSlice(), Mask: net.CIDRMask(n.Guest.Bits(), 32)}}
	err = errors.Join(netlink.LinkSetHardwareAddr(link, n.GatewayMAC), netlink.AddrAdd(link, address), netlink.LinkSetUp(link))
	if err != nil {
		return fmt.Errorf("configure tap: %w", err)
	}
	return nil
}

func (t *bareTap) close() error { return errors.Join(t.tap.Close(), t.world.close()) }
