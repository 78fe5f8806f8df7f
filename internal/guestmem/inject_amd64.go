package guestmem

import (
	"bytes"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// maxStops bounds how many stops that nobody asked for are passed over, so that
// no stream of them can keep a machine stopped.
const maxStops = 100

// twinStack is the twin's stack pointer. Nothing is mapped there: should its
// tracer die before it holds the twin, the twin dies at its first step, before
// it can act as a second machine.
const twinStack = 8

// injector has the main thread of a process make system calls.
type injector struct {
	ranges   []linux.Mapping
	site     uint64 // the address of a syscall instruction
	filtered bool   // there is a seccomp filter
	first    bool   // it is the first process of its namespace
	thread   *linux.Tracee
	regs     unix.PtraceRegs // as they were, and will be
	mask     uint64
	stopped  bool // a SIGSTOP was held back
}

// newInjector looks at the process and does not touch it.
func newInjector(req twinRequest) (*injector, error) {
	site, err := findSyscall(req.PID)
	if err != nil {
		return nil, err
	}
	filtered, err := linux.Filtered(req.PID)
	if err != nil {
		return nil, err
	}
	first, err := linux.FirstOfNamespace(req.PID)
	if err != nil {
		return nil, err
	}
	return &injector{ranges: req.Ranges, site: site, filtered: filtered, first: first, thread: &linux.Tracee{TID: req.PID}}, nil
}

// findSyscall finds the instruction in the code that the kernel gives to every
// process.
func findSyscall(pid int) (uint64, error) {
	found, err := linux.FindMapping(pid, "[vdso]")
	if err != nil {
		return 0, err
	}
	const maxSize = 64 << 10
	for _, m := range found {
		code := make([]byte, min(m.End-m.Start, maxSize))
		if err := linux.ReadMemory(pid, code, []linux.Extent{{Addr: m.Start, Size: uint64(len(code))}}); err != nil {
			return 0, err
		}
		if i := bytes.Index(code, []byte{0x0f, 0x05}); i >= 0 {
			return m.Start + uint64(i), nil
		}
	}
	if err := linux.CheckAlive(pid); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%w: process %d has no vDSO with a system call", errdef.ErrUnsupported, pid)
}

// twin stops the main thread, has it make the twin, and lets it go on as if
// nothing had been. It must run on one operating system thread, which traces
// the twin from then on. claim is asked once the thread has stopped, and before
// anything is changed: false means that nobody waits any more.
func (x *injector) twin(claim func() bool) (twin *linux.Tracee, err error) {
	if x.thread, err = linux.Seize(x.thread.TID); err != nil {
		return nil, err
	}
	if err = x.stop(); err != nil {
		return nil, err
	}
	if !claim() {
		return nil, errors.Join(fmt.Errorf("%w: stop of process %d", errdef.ErrTimeout, x.thread.TID), x.thread.Detach())
	}
	if err = x.save(); err != nil {
		return nil, errors.Join(err, x.thread.Detach())
	}
	twin, err = x.forkMemory()
	err = errors.Join(err, x.restore())
	if err != nil && twin != nil {
		err, twin = errors.Join(err, killTwin(twin)), nil
	}
	return twin, err
}

// stop brings the thread to a stop in which its registers can be exchanged: on
// its way back to its program, after anything that it did in the kernel.
func (x *injector) stop() error {
	if err := x.thread.Interrupt(); err != nil {
		return err
	}
	for {
		s, err := x.thread.Wait()
		if err != nil || s.Event == unix.PTRACE_EVENT_STOP {
			return err
		}
		sig := s.Signal // on its way to the program
		if s.Event != 0 || sig == sysTrap {
			sig = 0
		}
		if err := errors.Join(x.thread.Interrupt(), x.thread.Continue(sig)); err != nil { // that stop has cancelled the first one
			return err
		}
	}
}

// sysTrap is how stops for system calls look.
const sysTrap = unix.SIGTRAP | 0x80

// save remembers the thread's state, holds all signals back, and sees that its
// filter lets the calls pass.
func (x *injector) save() (err error) {
	if x.regs, err = x.thread.Registers(); err != nil {
		return err
	}
	if x.mask, err = x.thread.SignalMask(); err != nil {
		return err
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACECLONE
	err = x.thread.SetOptions(options | unix.PTRACE_O_SUSPEND_SECCOMP)
	if err != nil && !x.filtered { // without a filter there is nothing to suspend
		err = x.thread.SetOptions(options)
	}
	if err != nil {
		return fmt.Errorf("suspend system call filter: %w", err)
	}
	return x.thread.SetSignalMask(^uint64(0))
}

// restore is the undo of stop and save.
func (x *injector) restore() error {
	// The registers may say that the kernel is to start a call again. It looks
	// at that in this kind of stop only.
	err := errors.Join(x.thread.Interrupt(), x.thread.Continue(0))
	if err == nil {
		err = x.waitStop()
	}
	err = errors.Join(err, x.thread.SetRegisters(x.regs), x.thread.SetSignalMask(x.mask), x.thread.Detach())
	if x.stopped {
		err = errors.Join(err, unix.Kill(x.thread.TID, unix.SIGSTOP))
	}
	return err
}

func (x *injector) waitStop() error {
	for range maxStops {
		s, err := x.thread.Wait()
		if err != nil || s.Event == unix.PTRACE_EVENT_STOP {
			return err
		}
		x.note(s)
		if err := errors.Join(x.dropTwin(s), x.thread.Interrupt(), x.thread.Continue(0)); err != nil {
			return err
		}
	}
	return fmt.Errorf("process %d does not stop", x.thread.TID)
}

// dropTwin kills a twin that was made by a call that we had given up.
func (x *injector) dropTwin(s linux.Stop) error {
	if s.Event != unix.PTRACE_EVENT_FORK && s.Event != unix.PTRACE_EVENT_CLONE {
		return nil
	}
	pid, err := x.thread.EventMessage()
	if err != nil {
		return err
	}
	return killTwin(&linux.Tracee{TID: pid})
}

// note remembers a signal that cannot be blocked.
func (x *injector) note(s linux.Stop) {
	x.stopped = x.stopped || s.Event == 0 && s.Signal == unix.SIGSTOP
}

// forkMemory makes the twin. Monitors keep the guest's memory out of their
// forks, so it is let in before and kept out again after.
func (x *injector) forkMemory() (twin *linux.Tracee, err error) {
	if err = x.advise(unix.MADV_DOFORK); err == nil {
		twin, err = x.fork()
	}
	return twin, errors.Join(err, x.advise(unix.MADV_DONTFORK))
}

func (x *injector) advise(advice uint64) error {
	for _, m := range x.ranges {
		if _, err := x.call(unix.SYS_MADVISE, m.Start, m.End-m.Start, advice); err != nil {
			return fmt.Errorf("advise memory of process %d: %w", x.thread.TID, err)
		}
	}
	return nil
}

// fork makes a process of the thread's parent, so that the source never hears
// of it. The first process of a namespace has no parent there, so the twin is its
// own child; the jail has it ignore that its children end, and then it hears
// nothing either. The twin shares the table of open files, which saves the
// copying.
func (x *injector) fork() (*linux.Tracee, error) {
	flags := unix.CLONE_FILES | unix.CLONE_FS | uint64(unix.SIGCHLD)
	if !x.first {
		flags |= unix.CLONE_PARENT
	}
	pid, err := x.call(unix.SYS_CLONE, flags, twinStack, 0)
	if pid == 0 {
		return nil, fmt.Errorf("clone process %d: %w", x.thread.TID, err)
	}
	twin := &linux.Tracee{TID: pid}
	_, waitErr := twin.Wait() // it is born stopped
	if waitErr == nil {
		err = errors.Join(err, twin.SetOptions(unix.PTRACE_O_EXITKILL))
	}
	if err = errors.Join(err, waitErr); err != nil {
		return nil, errors.Join(err, killTwin(twin))
	}
	return twin, nil
}

// call makes one system call. pid is that of a process that it has made, which
// may be there even when there is an error too.
func (x *injector) call(number uint64, a, b, c uint64) (pid int, err error) {
	for range maxStops {
		var result int64
		result, pid, err = x.callOnce(number, a, b, c)
		switch {
		case err != nil || pid != 0 || result >= 0:
			return pid, err
		case result <= -512: // a stop was pending; the kernel would try again
			continue
		default:
			return 0, callError(syscall.Errno(-result))
		}
	}
	return 0, fmt.Errorf("system call %d of process %d was interrupted too often", number, x.thread.TID)
}

// callError puts what the kernel said in a category.
func callError(errno syscall.Errno) error {
	switch errno {
	case unix.EPERM, unix.EINVAL, unix.ENOSYS:
		return fmt.Errorf("%w: %w", errdef.ErrUnsupported, errno)
	case unix.EAGAIN, unix.ENOMEM:
		return fmt.Errorf("%w: %w", errdef.ErrExhausted, errno)
	}
	return errno
}

func (x *injector) callOnce(number uint64, a, b, c uint64) (result int64, pid int, err error) {
	regs := x.regs
	regs.Rip, regs.Rax, regs.Orig_rax = x.site, number, ^uint64(0) // no call to start again
	regs.Rdi, regs.Rsi, regs.Rdx, regs.R10, regs.R8, regs.R9 = a, b, c, 0, 0, 0
	if err = x.thread.SetRegisters(regs); err != nil {
		return 0, 0, err
	}
	for range 2 { // its entry and its return
		made, stopErr := x.toSyscall()
		if made != 0 {
			pid = made
		}
		if stopErr != nil {
			return 0, pid, stopErr
		}
	}
	regs, err = x.thread.Registers()
	return int64(regs.Rax), pid, err
}

// toSyscall goes on to the next stop for a system call, and returns the pid of
// the process that was made on the way.
func (x *injector) toSyscall() (pid int, err error) {
	for range maxStops {
		if err := x.thread.ContinueToSyscall(); err != nil {
			return pid, err
		}
		s, err := x.thread.Wait()
		if err != nil || s.Signal == sysTrap && s.Event == 0 {
			return pid, err
		}
		switch s.Event {
		case unix.PTRACE_EVENT_FORK, unix.PTRACE_EVENT_CLONE:
			if pid, err = x.thread.EventMessage(); err != nil {
				return 0, err
			}
		case 0:
			x.note(s)
			if s.Signal != unix.SIGSTOP {
				return pid, fmt.Errorf("process %d got %v during a system call of ours", x.thread.TID, s.Signal)
			}
		}
	}
	return pid, fmt.Errorf("process %d stops too often", x.thread.TID)
}
