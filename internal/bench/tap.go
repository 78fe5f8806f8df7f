package bench

import (
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

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
func newBareTap() (*bareTap, error) {
	type result struct {
		t   *bareTap
		err error
	}
	made := make(chan result)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		t, err := makeBareTap()
		made <- result{t, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, fmt.Errorf("make a bare tap: %w", r.err)
	}
	return r.t, nil
}

// makeBareTap puts this thread in a namespace of its own. A socket stays in that
// in which it was made, and so do those that it accepts.
func makeBareTap() (_ *bareTap, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, os.NewSyscallError("unshare", err)
	}
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
