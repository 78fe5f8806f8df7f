package agent

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/guestproto"
)

// outb writes to a port. Without the right to it the kernel sends SIGSEGV.
func outb(port uint16, value uint8)

// outb2 writes a byte to one port and then to another, with as little between
// the two as can be.
func outb2(first, second uint16)

// machinePorts are the ports of a deterministic machine.
type machinePorts struct{}

// knock tells the host of a letter and returns when it has been answered.
func (machinePorts) knock() error {
	return withPorts(func() { outb2(guestproto.PortPing, guestproto.PortGate) })
}

// stop stops the machine, and returns when it runs again.
func (machinePorts) stop() error {
	const stop = 1
	return withPorts(func() { outb(guestproto.PortStop, stop) })
}

// withPorts calls f with the right to use ports. It is this thread's, and only
// for as long: a child would inherit it, through exec too.
func withPorts(f func()) error {
	const all, none = 3, 0
	if _, _, errno := unix.RawSyscall(unix.SYS_IOPL, all, 0, 0); errno != 0 {
		return os.NewSyscallError("iopl", errno)
	}
	f()
	if _, _, errno := unix.RawSyscall(unix.SYS_IOPL, none, 0, 0); errno != 0 {
		return os.NewSyscallError("iopl", errno)
	}
	return nil
}
