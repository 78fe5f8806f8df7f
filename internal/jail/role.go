package jail

import (
	"errors"
	"fmt"
	"math"
	"os/signal"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/network"
)

// Serve is the launcher: a process in namespaces of its own, which makes ready,
// waits for a job, and becomes the job's program. It returns when it was sent
// away, or could not: whoever started it has been told why.
//
// All that it does about itself is this thread's: the program comes to be on it.
// What Go's runtime opens for itself meanwhile is below FirstFile, and closed
// when the program starts.
func Serve() error {
	runtime.LockOSThread()
	unix.CloseOnExec(socketFD)
	_ = unix.Close(selfFD) // it was needed to get here
	var s setup
	fds, err := receiveMessage(socketFD, &s)
	if err != nil {
		return err
	}
	made, err := prepare(s, fds)
	closeAll(fds)
	if sendErr := sendMessage(socketFD, failure(err), made...); err != nil || sendErr != nil {
		return errors.Join(err, sendErr)
	}
	closeAll(made)
	var j job
	if fds, err = receiveMessage(socketFD, &j); err != nil {
		return err
	}
	err = become(s, j, fds)
	return errors.Join(err, sendMessage(socketFD, failure(err)))
}

// prepare makes the namespaces what the program will find. It returns the
// descriptors of its network, if it is to have one.
func prepare(s setup, fds []int) (made []int, err error) {
	if err = growTable(); err != nil {
		return nil, fmt.Errorf("make room for files: %w", err)
	}
	if fds, err = enterGroups(s.Entrances, fds); err != nil {
		return nil, fmt.Errorf("enter control groups: %w", err)
	}
	unix.Umask(0o077) // and not what the daemon happens to have
	if err = unix.Sethostname([]byte("tine")); err != nil {
		return nil, fmt.Errorf("name host: %w", err)
	}
	if s.Link {
		if made, err = setUpNetwork(s, fds); err != nil {
			return nil, fmt.Errorf("set up network: %w", err)
		}
	}
	if err = enterTree(s.Tree, fds); err == nil {
		err = dropBounds()
	}
	if err == nil && s.Own {
		err = mountRun(s.User)
	}
	if err != nil {
		closeAll(made)
		return nil, fmt.Errorf("enter root: %w", err)
	}
	return made, nil
}

func setUpNetwork(s setup, fds []int) ([]int, error) {
	if s.Tuns < 0 || s.Tuns > len(fds) {
		return nil, fmt.Errorf("%w: %d tap devices, and %d files came along", errdef.ErrInvalid, s.Tuns, len(fds))
	}
	tuns := fds[len(fds)-s.Tuns:]
	switch {
	case s.Own && s.Tuns == 2:
		return network.SetupNamed(tuns[0], tuns[1], s.User)
	case s.Own:
		return network.SetupNamed(-1, -1, s.User)
	case s.Tuns == 1:
		return network.Setup(tuns[0])
	default:
		return network.Setup(-1)
	}
}

// enterGroups enters the control groups that the first n descriptors are the doors
// of, and returns the others.
func enterGroups(n int, fds []int) ([]int, error) {
	if n < 0 || n > len(fds) {
		return nil, fmt.Errorf("%w: %d groups, and %d files came along", errdef.ErrInvalid, n, len(fds))
	}
	for _, fd := range fds[:n] {
		if _, err := unix.Write(fd, []byte("0")); err != nil {
			return nil, err
		}
	}
	return fds[n:], nil
}

// growTable makes the table of descriptors as large as it will have to be. In a
// process with threads the kernel waits some 8 ms for that, which is better
// spent before there is a job.
func growTable() error {
	fd, err := unix.FcntlInt(socketFD, unix.F_DUPFD_CLOEXEC, firstHigh)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// become leaves all behind that the program must not have, and is the program.
// It returns only when that failed.
func become(s setup, j job, fds []int) error {
	if len(fds) != j.Files+len(j.Copies) || j.Files < 1 {
		return fmt.Errorf("%w: job of %d files and %d to copy came with %d", errdef.ErrInvalid, j.Files, len(j.Copies), len(fds))
	}
	fds, copies := fds[:j.Files], fds[j.Files:]
	for i, name := range j.Copies {
		if err := copyIntoRun(name, copies[i]); err != nil {
			return fmt.Errorf("copy %s: %w", name, err)
		}
	}
	if err := limit(j); err != nil {
		return fmt.Errorf("limit resources: %w", err)
	}
	if err := place(fds); err != nil {
		return fmt.Errorf("place files: %w", err)
	}
	// Children of the program, which is the first process of its namespace, are
	// the twins of live branches: nobody has to wait for them.
	signal.Ignore(unix.SIGCHLD)
	if err := dropPrivileges(s.User); err != nil {
		return fmt.Errorf("drop privileges: %w", err)
	}
	if j.DieWithParent {
		// Becoming another user has cleared it.
		if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
			return fmt.Errorf("die with parent: %w", err)
		}
	}
	if err := restrictFiles(j.Landlock, s.Own); err != nil {
		return fmt.Errorf("restrict by Landlock: %w", err)
	}
	listener, err := installFilter(s.Own)
	if err != nil {
		return fmt.Errorf("install system call filter: %w", err)
	}
	if err := sendMessage(socketFD, answer{Listener: true}, listener); err != nil {
		return err
	}
	if err := unix.Close(listener); err != nil {
		return err
	}
	if err := unix.Exec(j.Path, j.Args, j.Env); err != nil {
		return fmt.Errorf("execute %s: %w", j.Path, err)
	}
	return nil
}

// The descriptors of a program's files begin at FirstFile, well above those
// that Go's runtime has opened for itself, which must stay what they are until
// the program starts. The files wait above firstHigh for their places.
const (
	FirstFile = 64
	firstHigh = 512
)

// place makes the descriptors 1 and 2 of the first file, and FirstFile and up of
// the others. All else is closed when the program starts.
func place(files []int) error {
	high := make([]int, len(files))
	for i, fd := range files {
		h, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, firstHigh)
		if err != nil {
			return err
		}
		high[i] = h
	}
	err := errors.Join(unix.Dup3(high[0], 1, 0), unix.Dup3(high[0], 2, 0))
	for i, h := range high[1:] {
		err = errors.Join(err, unix.Dup3(h, FirstFile+i, 0))
	}
	end := uint(FirstFile + len(files) - 1)
	return errors.Join(err,
		unix.CloseRange(3, FirstFile-1, unix.CLOSE_RANGE_CLOEXEC),
		unix.CloseRange(end, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC))
}
