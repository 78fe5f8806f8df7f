package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// maxCmdline bounds how much of a process's argument list is read.
const maxCmdline = 128 << 10

// Process is one process, and never another one that has got its number. It
// need not be a child. Its methods are safe for concurrent use, but for Close.
type Process struct {
	PID       int
	StartTime uint64
	pidfd     int
}

// StartTime returns when a process started, in clock ticks since boot. With
// the pid and the boot's BootID it names one process for ever.
func StartTime(pid int) (uint64, error) {
	st, err := readStat(pid)
	return st.start, err
}

// OpenProcess takes hold of the process pid that started at start. It returns
// errdef.ErrNotFound when that process is gone, is a zombie, or pid is now
// another process.
func OpenProcess(pid int, start uint64) (*Process, error) {
	fd, err := retry(func() (int, error) { return unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK) })
	if err != nil {
		return nil, processError("open", pid, err)
	}
	// Only now does pid stand for what fd is.
	st, err := readStat(pid)
	if err == nil && (st.start != start || st.dead()) {
		err = fmt.Errorf("%w: process %d of start time %d", errdef.ErrNotFound, pid, start)
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return &Process{PID: pid, StartTime: start, pidfd: fd}, nil
}

// Signal sends sig, or returns errdef.ErrNotFound when the process is gone.
func (p *Process) Signal(sig unix.Signal) error {
	_, err := retry(func() (int, error) { return 0, unix.PidfdSendSignal(p.pidfd, sig, nil, 0) })
	return processError("signal", p.PID, err)
}

// Wait returns nil when the process has ended, though it may be a zombie yet,
// or the cause of ctx. It takes no thread while it waits.
func (p *Process) Wait(ctx context.Context) error {
	fd, err := unix.FcntlInt(uintptr(p.pidfd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return processError("wait for", p.PID, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd") // of our own: waits have deadlines of their own
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer func() {
		stop()
		_ = f.Close() // only polled
	}()
	err = waitReadable(f)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return processError("wait for", p.PID, err)
}

// Close lets go of the process, which goes on.
func (p *Process) Close() error { return unix.Close(p.pidfd) }

func waitReadable(f *os.File) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var pollErr error
	err = conn.Read(func(fd uintptr) (done bool) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, e := retry(func() (int, error) { return unix.Poll(fds, 0) })
		pollErr = e
		return n > 0 || e != nil
	})
	return errors.Join(err, pollErr)
}

// processError adds the process and the category to err.
func processError(verb string, pid int, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: process %d", errdef.ErrNotFound, pid)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: %s process %d: %w", errdef.ErrDenied, verb, pid, err)
	default:
		return fmt.Errorf("%s process %d: %w", verb, pid, err)
	}
}

// stat is what is used of /proc/PID/stat.
type stat struct {
	state byte
	start uint64
}

func (s stat) dead() bool { return s.state == 'Z' || s.state == 'X' }

func readStat(pid int) (stat, error) {
	data, err := readProc(pid, "stat", 4096)
	if err != nil {
		return stat{}, err
	}
	st, err := parseStat(data)
	if err != nil {
		return stat{}, fmt.Errorf("read state of process %d: %w", pid, err)
	}
	return st, nil
}

// parseStat starts after the last parenthesis, for the name in front of it may
// hold anything, spaces and parentheses too.
func parseStat(data []byte) (stat, error) {
	const state, start = 0, 19 // fields 3 and 22 of proc(5)
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= start || len(fields[state]) != 1 {
		return stat{}, fmt.Errorf("%w: stat line of %d fields", errdef.ErrInvalid, len(fields))
	}
	ticks, err := strconv.ParseUint(fields[start], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("%w: start time %q", errdef.ErrInvalid, fields[start])
	}
	return stat{fields[state][0], ticks}, nil
}

// BootID returns the random identifier of the host's present boot.
func BootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// FindProcesses returns the processes that match accepts, by number and
// arguments. Kernel threads and zombies have no arguments and are not asked
// about, nor are processes that end while it looks.
func FindProcesses(match func(pid int, argv []string) bool) ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer func() { _ = dir.Close() }() // only read
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []int
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue // not a process
		}
		argv, err := arguments(pid)
		if err != nil && !errors.Is(err, errdef.ErrNotFound) {
			return nil, err
		}
		if len(argv) > 0 && match(pid, argv) {
			found = append(found, pid)
		}
	}
	return found, nil
}

func arguments(pid int) ([]string, error) {
	data, err := readProc(pid, "cmdline", maxCmdline)
	if err != nil || len(data) == 0 {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00"), nil
}

func procPath(pid int, name string) string {
	return "/proc/" + strconv.Itoa(pid) + "/" + name
}

// readProc reads at most limit bytes of a file of a process.
func readProc(pid int, name string, limit int64) ([]byte, error) {
	f, err := os.Open(procPath(pid, name))
	if err != nil {
		return nil, processError("read "+name+" of", pid, err)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit))
	_ = f.Close() // only read
	if err != nil {
		return nil, processError("read "+name+" of", pid, err)
	}
	return data, nil
}

// retry calls a system call again for as long as a signal interrupts it.
func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}
