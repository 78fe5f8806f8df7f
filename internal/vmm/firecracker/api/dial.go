package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

var errDied = fmt.Errorf("%w: the process has ended", errdef.ErrUnavailable)

// maxPath is what a path in a socket's address may be long, without the zero at
// its end (unix(7)).
const maxPath = len(unix.RawSockaddrUnix{}.Path) - 1

// dialUnix connects to the unix socket at path, however long that is.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	if len(path) <= maxPath {
		return d.DialContext(ctx, "unix", path)
	}
	dir, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer dir.Close() //nolint:errcheck // it was only named
	short := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), filepath.Base(path))
	if len(short) > maxPath {
		return nil, fmt.Errorf("%w: %s is too long a name for a socket", errdef.ErrInvalid, filepath.Base(path))
	}
	return d.DialContext(ctx, "unix", short)
}

// Between a socket's appearance and the moment when somebody listens on it
// lies one system call of Firecracker's, whose end nothing tells of: connections
// are refused until then. It is tried again after these times.
const (
	firstRetry = 200 * time.Microsecond
	lastRetry  = 20 * time.Millisecond
)

// await connects to a socket that may yet have to be made.
func await(ctx context.Context, path string, died <-chan struct{}) (net.Conn, error) {
	// Who looks before he watches can miss what comes between.
	dir, err := watch(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	defer dir.close()
	delay := firstRetry
	for {
		c, err := dialUnix(ctx, path)
		if err == nil {
			return c, nil
		}
		var retry <-chan time.Time // nil waits for ever: for the directory to change
		switch {
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist):
		case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EAGAIN): // EAGAIN: many are waiting to be accepted
			retry = time.After(delay)
			delay = min(2*delay, lastRetry)
		default:
			return nil, fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
		}
		select {
		case <-dir.changed:
		case <-retry:
		case <-died:
			return nil, errDied
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// watcher tells that a directory has changed.
type watcher struct {
	inotify *os.File
	changed chan struct{} // holds one token if it has since somebody looked
	done    chan struct{}
}

func watch(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrExhausted, os.NewSyscallError("inotify_init1", err))
	}
	// A mode that lets one in may come after the socket.
	_, err = unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_ATTRIB|unix.IN_ONLYDIR)
	if err != nil {
		_ = unix.Close(fd)
		err = &fs.PathError{Op: "watch", Path: dir, Err: err}
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
		}
		return nil, err
	}
	w := &watcher{
		inotify: os.NewFile(uintptr(fd), "inotify"),
		changed: make(chan struct{}, 1),
		done:    make(chan struct{}),
	}
	go w.run()
	return w, nil
}

// run passes on that there were events; which, is for the next look to find out.
func (w *watcher) run() {
	defer close(w.done)
	var events [4 << 10]byte
	for {
		if _, err := w.inotify.Read(events[:]); err != nil {
			return
		}
		select {
		case w.changed <- struct{}{}:
		default:
		}
	}
}

func (w *watcher) close() {
	_ = w.inotify.Close() // wakes run
	<-w.done
}
