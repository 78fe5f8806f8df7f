package jail

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

const tunDevice = "/dev/net/tun"

// openTun opens the device that taps are made by in the network namespace of the
// process pid. What is made by it is there. Only root can do so, and has to: on
// many hosts no other user may open the device, and a launcher is one.
func openTun(pid int) (*os.File, error) {
	type result struct {
		file *os.File
		err  error
	}
	made := make(chan result)
	go func() {
		// Never unlocked when it fails to come back: the thread ends then.
		runtime.LockOSThread()
		file, back, err := openTunThere(pid)
		if back {
			runtime.UnlockOSThread()
		}
		made <- result{file, err}
	}()
	r := <-made
	if r.err != nil {
		return nil, fmt.Errorf("open tap device: %w", r.err)
	}
	return r.file, nil
}

// openTunThere also says whether the thread is in its own namespace again.
func openTunThere(pid int) (file *os.File, back bool, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, true, err
	}
	defer func() { _ = own.Close() }() // only entered
	there, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		return nil, true, err
	}
	defer func() { _ = there.Close() }()
	if err = unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, true, os.NewSyscallError("setns", err)
	}
	file, err = os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err != nil {
		err = errdef.WithHint(fmt.Errorf("%w: %w", errdef.ErrUnsupported, err), "modprobe tun")
	}
	if backErr := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); backErr != nil {
		_ = file.Close() // of no use to a caller that is told of an error
		return nil, false, errors.Join(err, os.NewSyscallError("setns", backErr))
	}
	return file, true, err
}
