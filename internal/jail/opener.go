package jail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
)

// question is struct seccomp_notif, reply struct seccomp_notif_resp, and gift
// struct seccomp_notif_addfd of seccomp_unotify(2).
type question struct {
	id     uint64
	pid    uint32
	_      uint32
	number int32
	_      uint32
	_      uint64
	args   [6]uint64
}

type reply struct {
	id    uint64
	value int64
	errno int32
	flags uint32
}

type gift struct {
	id       uint64
	flags    uint32
	source   uint32
	number   uint32
	newFlags uint32
}

// opener answers the questions of a filter while a program starts: it opens
// files on the program's behalf. A program without rights to any file of the
// host's gets the few that it is for, by the names on its command line, and with
// no more rights than each needs: QEMU 7.2 opens the image that it maps privately
// for reading and writing, and gets a descriptor that only reads.
//
// What it does not know the program may try for itself, which gets it no further
// than the tree that it sees. When the opener has closed, all that it would have
// been asked fails.
type opener struct {
	listener *os.File
	process  int                                    // a pidfd of the program
	files    map[string]*os.File                    // the caller's, who keeps them open until close
	before   map[string]func(context.Context) error // yet to be called
	ctx      context.Context                        // for those; ends with close
	cancel   context.CancelFunc
	wake     *os.File // its other end closes to end the opener
	stop     *os.File
	done     chan struct{}
	executed atomic.Bool // the program runs; before that the launcher may be interrupted, and try again
	err      error       // why it ended early; set before done is closed
	sockets  listening
}

func newOpener(ctx context.Context, listener *os.File, pid int, files map[string]*os.File, before map[string]func(context.Context) error) (_ *opener, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(listener.Close)
	o := &opener{listener: listener, files: files, before: maps.Clone(before), done: make(chan struct{})}
	if o.process, err = unix.PidfdOpen(pid, 0); err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	u.Add(func() error { return unix.Close(o.process) })
	if o.wake, o.stop, err = os.Pipe(); err != nil {
		return nil, err
	}
	o.ctx, o.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go o.serve()
	return o, nil
}

// close ends the opener, and with it the filter's questions.
func (o *opener) close() error {
	o.cancel()
	err := o.stop.Close()
	<-o.done
	return errors.Join(err, o.err)
}

func (o *opener) serve() {
	defer close(o.done)
	defer func() { _ = errors.Join(o.listener.Close(), o.wake.Close(), unix.Close(o.process)) }() // nothing was written to them
	for {
		more, err := o.wait()
		if err == nil && more {
			err = o.answerOne()
		}
		if err != nil || !more {
			o.err = err
			return
		}
	}
}

// wait reports whether there is a question; false is the end.
func (o *opener) wait() (bool, error) {
	fds := []unix.PollFd{
		{Fd: int32(o.listener.Fd()), Events: unix.POLLIN},
		{Fd: int32(o.wake.Fd()), Events: unix.POLLIN},
	}
	err := ignoreInterrupts(func() error { _, err := unix.Poll(fds, -1); return err })
	return err == nil && fds[1].Revents == 0 && fds[0].Revents&unix.POLLIN != 0, err
}

func (o *opener) answerOne() error {
	var q question
	err := o.ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&q))
	if errors.Is(err, unix.ENOENT) {
		return nil // whoever asked is gone
	}
	if err != nil {
		return fmt.Errorf("read question of a filter: %w", err)
	}
	r := reply{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	switch q.number {
	case unix.SYS_EXECVE, unix.SYS_EXECVEAT:
		if o.executed.Load() {
			r.flags, r.errno = 0, -int32(unix.EPERM)
		}
	case unix.SYS_OPEN:
		err = o.open(&q, q.args[0], &r)
	case unix.SYS_OPENAT:
		err = o.open(&q, q.args[1], &r)
	case unix.SYS_LISTEN:
		r.flags, r.errno = 0, -int32(o.listen(int(int32(q.args[0])), int(int32(q.args[1]))))
	}
	if err != nil {
		r.flags, r.value, r.errno = 0, 0, -int32(unix.EIO)
	}
	sendErr := o.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	if errors.Is(sendErr, unix.ENOENT) {
		sendErr = nil
	}
	return errors.Join(err, sendErr)
}

// open gives the program a copy of the descriptor for the path at an address, if
// there is one. Should the program change the path meanwhile, it gains nothing:
// what it is given is what we have read.
func (o *opener) open(q *question, addr uint64, r *reply) error {
	path, err := readString(int(q.pid), addr)
	if err != nil {
		return nil //nolint:nilerr // a bad address is the program's own error, and the kernel tells it so
	}
	f := o.files[path]
	if f == nil {
		return nil
	}
	if before := o.before[path]; before != nil {
		delete(o.before, path)
		if err = before(o.ctx); err != nil {
			return fmt.Errorf("before %s is opened: %w", path, err)
		}
	}
	again, err := reopen(f)
	if err != nil {
		return fmt.Errorf("open %s again: %w", path, err)
	}
	defer func() { _ = unix.Close(again) }() // the program has its own
	g := gift{id: q.id, source: uint32(again), newFlags: unix.O_CLOEXEC}
	fd, err := o.ioctlResult(unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&g))
	if errors.Is(err, unix.ENOENT) {
		return nil // whoever asked is gone, or asks again after a signal
	}
	if err != nil {
		return fmt.Errorf("hand over %s: %w", path, err)
	}
	r.flags, r.value = 0, int64(fd)
	return nil
}

// reopen opens a file again as it is open, at its beginning: a program may open a
// file several times, and expects a position of its own in each. A device it gets
// as it is: opened again, it would be one of this process's namespaces.
func reopen(f *os.File) (fd int, err error) {
	var st unix.Stat_t
	if err = unix.Fstat(int(f.Fd()), &st); err != nil {
		return -1, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFCHR {
		return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return -1, err
	}
	return unix.Open("/proc/self/fd/"+strconv.Itoa(int(f.Fd())), flags&unix.O_ACCMODE|unix.O_CLOEXEC, 0)
}

// readString reads a path of at most PATH_MAX bytes, page by page, as what is
// behind it may not be there.
func readString(pid int, addr uint64) (string, error) {
	var text []byte
	for len(text) < unix.PathMax {
		part := make([]byte, linux.PageSize-int(addr%linux.PageSize))
		if err := linux.ReadMemory(pid, part, []linux.Extent{{Addr: addr, Size: uint64(len(part))}}); err != nil {
			return "", err
		}
		if last, _, end := bytes.Cut(part, []byte{0}); end {
			return string(append(text, last...)), nil
		}
		text = append(text, part...)
		addr += uint64(len(part))
	}
	return "", fmt.Errorf("%w: path of more than %d bytes", errdef.ErrInvalid, unix.PathMax)
}

func (o *opener) ioctl(request uint, arg unsafe.Pointer) error {
	_, err := o.ioctlResult(request, arg)
	return err
}

func (o *opener) ioctlResult(request uint, arg unsafe.Pointer) (result int, err error) {
	err = ignoreInterrupts(func() error {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, o.listener.Fd(), uintptr(request), uintptr(arg))
		if errno != 0 {
			return errno
		}
		result = int(r)
		return nil
	})
	return result, err
}
