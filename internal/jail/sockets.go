package jail

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// listening are the sockets of RunDir that a program listens on. The zero value is ready.
type listening struct {
	mu      sync.Mutex
	names   map[string]bool
	changed chan struct{} // closed when there is another name
}

// listen is the system call of that name, done on a socket of the program. So it
// is known when that is over, which nothing else tells of: the file is there
// before anyone listens. A program whose opener has closed can listen no more.
func (o *opener) listen(fd, backlog int) unix.Errno {
	own, err := unix.PidfdGetfd(o.process, fd, 0)
	if err != nil {
		return errnoOf(err)
	}
	defer func() { _ = unix.Close(own) }()
	addr, err := unix.Getsockname(own)
	if err != nil {
		return errnoOf(err)
	}
	local, ok := addr.(*unix.SockaddrUnix)
	if !ok || !o.sockets.room() {
		return unix.EPERM
	}
	if err = unix.Listen(own, backlog); err != nil {
		return errnoOf(err)
	}
	o.sockets.add(local.Name)
	return 0
}

func errnoOf(err error) unix.Errno {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno
	}
	return unix.EIO
}

// room bounds what a program can have us remember.
func (s *listening) room() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.names) < runInodes
}

// add adds the socket at a path, if that is in RunDir. One that has no directory
// is in that of the program, which is RunDir.
func (s *listening) add(path string) {
	if filepath.Dir(path) == RunDir {
		path = filepath.Base(path)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.names == nil {
		s.names = map[string]bool{}
	}
	s.names[path] = true
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

// has reports whether there is a socket of that name; if not, another will close
// the channel.
func (s *listening) has(name string) (bool, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.names[name], s.changed
}

// listens waits until the program listens on a socket of that name.
func (o *opener) listens(ctx context.Context, name string) error {
	for {
		there, changed := o.sockets.has(name)
		if there {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-o.done:
			return errors.Join(fmt.Errorf("%w: the program has ended, and did not listen on %s", errdef.ErrUnavailable, name), o.err)
		}
	}
}
