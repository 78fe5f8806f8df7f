package qemu

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// network gives the machine its network card, if it has one. It comes after all
// other devices, so that theirs is the same layout with it and without.
//
// The card has no ROM, as nothing boots from it, and one queue. QEMU itself
// moves packets: vhost would need another device of the host's. And a restored
// guest is not asked to announce itself to the link, where nobody else is.
func (l *launcher) network() {
	if !l.spec.Machine.Net {
		return
	}
	l.args = append(l.args,
		"-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", l.give(l.spec.NIC)),
		"-device", fmt.Sprintf("virtio-net-pci,netdev=net,mac=%s,romfile=,mq=off,guest_announce=off", vmm.GuestNet().GuestMAC),
	)
}

// checkNetwork sees that there is a tap if the machine has a network card.
func checkNetwork(c vmm.Common) error {
	switch {
	case !c.Machine.Net && c.NIC == nil:
		return nil
	case !c.Machine.Net:
		return fmt.Errorf("%w: a tap for a machine without a network card", errdef.ErrInvalid)
	case c.NIC == nil:
		return fmt.Errorf("%w: no tap for the machine's network card", errdef.ErrInvalid)
	}
	if err := checkTap(c.NIC); err != nil {
		return fmt.Errorf("network card: %s: %w", c.NIC.Name(), err)
	}
	return nil
}

// tapFlags is how a tap must have been made. What the guest's driver and the
// card agreed on depends on the header that packets have, and is frozen with
// the machine: it must be the same for all of its forks.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// checkTap asks the kernel how a tap was made.
func checkTap(f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var req unix.Ifreq
	var ioctlErr error
	err = raw.Control(func(fd uintptr) { ioctlErr = unix.IoctlIfreq(int(fd), unix.TUNGETIFF, &req) })
	if err = errors.Join(err, os.NewSyscallError("ioctl TUNGETIFF", ioctlErr)); err != nil {
		return fmt.Errorf("%w: not a tap: %w", errdef.ErrInvalid, err)
	}
	if flags := req.Uint16(); flags&tapFlags != tapFlags || flags&unix.IFF_MULTI_QUEUE != 0 {
		return fmt.Errorf("%w: a tap with flags %#x, and it needs %#x", errdef.ErrInvalid, flags, tapFlags)
	}
	return nil
}
