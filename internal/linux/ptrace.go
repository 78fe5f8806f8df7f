package linux

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// Tracee is a thread of another process under ptrace. Its methods are for the
// operating system thread that called Seize, and all but Interrupt and Wait
// want it stopped.
type Tracee struct{ TID int }

// Seize begins to trace a thread, which goes on running. It returns
// errdef.ErrUnsupported where the host does not allow that.
func Seize(tid int) (*Tracee, error) {
	t := &Tracee{TID: tid}
	err := t.trace("seize", unix.PTRACE_SEIZE, 0, 0)
	if err != nil && !processHasMemory(tid) { // a zombie cannot be traced, either
		err = t.describe("seize", unix.ESRCH)
	}
	return t, err
}

// Interrupt asks for a stop. Any other stop that comes first cancels it.
func (t *Tracee) Interrupt() error { return t.trace("interrupt", unix.PTRACE_INTERRUPT, 0, 0) }

// Continue lets the thread run, and gives it sig if that is not zero.
func (t *Tracee) Continue(sig unix.Signal) error {
	return t.trace("continue", unix.PTRACE_CONT, 0, uintptr(sig))
}

// ContinueToSyscall lets the thread run to its next entry to a system call or
// return from one.
func (t *Tracee) ContinueToSyscall() error {
	return t.trace("continue", unix.PTRACE_SYSCALL, 0, 0)
}

// Detach ends the tracing and lets the thread run.
func (t *Tracee) Detach() error { return t.trace("detach", unix.PTRACE_DETACH, 0, 0) }

// SetOptions sets PTRACE_O_ flags. It returns errdef.ErrUnsupported for those
// that this process may not use.
func (t *Tracee) SetOptions(options int) error {
	return t.trace("set options", unix.PTRACE_SETOPTIONS, 0, uintptr(options))
}

// Registers returns the thread's registers.
func (t *Tracee) Registers() (regs unix.PtraceRegs, err error) {
	return regs, t.describe("read registers", unix.PtraceGetRegs(t.TID, &regs))
}

// SetRegisters sets them.
func (t *Tracee) SetRegisters(regs unix.PtraceRegs) error {
	return t.describe("write registers", unix.PtraceSetRegs(t.TID, &regs))
}

// EventMessage returns what came with a ptrace event: of a fork, the new pid.
func (t *Tracee) EventMessage() (int, error) {
	msg, err := unix.PtraceGetEventMsg(t.TID)
	return int(msg), t.describe("read event", err)
}

// The requests that x/sys has no names for.
const (
	ptraceGetSigMask = 0x420a
	ptraceSetSigMask = 0x420b
)

// SignalMask returns which signals the thread blocks, one bit each.
func (t *Tracee) SignalMask() (mask uint64, err error) {
	err = t.trace("read signal mask", ptraceGetSigMask, unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask))) //nolint:gosec // G103: the kernel writes the mask
	runtime.KeepAlive(&mask)
	return mask, err
}

// SetSignalMask sets them. SIGKILL and SIGSTOP stay unblocked.
func (t *Tracee) SetSignalMask(mask uint64) error {
	err := t.trace("write signal mask", ptraceSetSigMask, unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask))) //nolint:gosec // G103: the kernel reads the mask
	runtime.KeepAlive(&mask)
	return err
}

// Stop says why a thread stopped.
type Stop struct {
	Signal unix.Signal
	Event  int // PTRACE_EVENT_, or zero
}

// Wait waits for the next stop. It returns errdef.ErrNotFound when the thread
// has ended instead; its end has been collected then.
func (t *Tracee) Wait() (Stop, error) {
	var ws unix.WaitStatus
	_, err := retry(func() (int, error) { return unix.Wait4(t.TID, &ws, unix.WALL, nil) })
	if err != nil {
		return Stop{}, t.describe("wait", err)
	}
	if !ws.Stopped() {
		return Stop{}, t.describe("wait", unix.ESRCH)
	}
	return Stop{Signal: ws.StopSignal(), Event: int(ws) >> 16}, nil
}

func (t *Tracee) trace(verb string, request, addr, data uintptr) error {
	_, err := retry(func() (int, error) {
		_, _, errno := unix.Syscall6(unix.SYS_PTRACE, request, uintptr(t.TID), addr, data, 0, 0)
		if errno != 0 {
			return 0, errno
		}
		return 0, nil
	})
	return t.describe(verb, err)
}

func (t *Tracee) describe(verb string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ECHILD):
		return fmt.Errorf("%w: process %d", errdef.ErrNotFound, t.TID)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: trace process %d: %s: %w", errdef.ErrUnsupported, t.TID, verb, err)
	default:
		return fmt.Errorf("trace process %d: %s: %w", t.TID, verb, err)
	}
}

// Filtered reports whether a process has a seccomp filter.
func Filtered(pid int) (bool, error) {
	mode, err := status(pid, "Seccomp:")
	return mode != "" && mode != "0", err // a kernel that has no filters says nothing
}

// FirstOfNamespace reports whether a process is the first of a namespace of
// processes: it can have no siblings there.
func FirstOfNamespace(pid int) (bool, error) {
	numbers, err := status(pid, "NSpid:") // one in each namespace, from the outermost on
	fields := strings.Fields(numbers)
	return len(fields) > 1 && fields[len(fields)-1] == "1", err
}

// status is what follows name in a process's status, or nothing.
func status(pid int, name string) (string, error) {
	data, err := readProc(pid, "status", 64<<10)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if value, found := strings.CutPrefix(line, name); found {
			return strings.TrimSpace(value), nil
		}
	}
	return "", nil
}

// WaitChild collects the end of a child that this process has not started, and
// waits for it. A process that is not a child is none of its business.
func WaitChild(pid int) error {
	_, err := retry(func() (int, error) { return unix.Wait4(pid, nil, unix.WALL, nil) })
	if errors.Is(err, unix.ECHILD) {
		return nil
	}
	return processError("wait for", pid, err)
}
