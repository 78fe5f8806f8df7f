package durable

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// The bounds between which Lock's pauses grow: waiting in flock itself cannot
// be called off.
const (
	minPause = time.Millisecond
	maxPause = 20 * time.Millisecond
)

// Lock takes the exclusive lock on the file path, which it creates when it is
// missing, and waits for it until ctx ends. Release it with Unlock. A process
// that inherits the file holds the lock too.
func Lock(ctx context.Context, path string) (*os.File, error) {
	for pause := minPause; ; pause = min(2*pause, maxPause) {
		f, err := TryLock(path, false)
		if !errors.Is(err, errdef.ErrConflict) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for lock %s: %w", path, context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}

// TryLock takes the lock on the file path, which it creates when it is
// missing, or returns errdef.ErrConflict at once when someone holds it. Any
// number may share a lock, while nobody holds it exclusively.
func TryLock(path string, shared bool) (*os.File, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if err = TryLockFile(f, shared); err != nil {
			_ = f.Close() // never written to
			return nil, err
		}
		same, err := Names(path, f)
		if err == nil && same {
			return f, nil
		}
		if err = errors.Join(err, Unlock(f)); err != nil {
			return nil, err
		}
	}
}

// TryLockFile is TryLock on an open file or directory. Whoever removes or
// renames locked files must take care that Names still holds afterwards.
func TryLockFile(f *os.File, shared bool) error {
	how := unix.LOCK_EX
	if shared {
		how = unix.LOCK_SH
	}
	err := flock(f, how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		// A child of ours between fork and exec has copies of files that we have
		// closed, and their locks: let it get there, and look again.
		syscall.ForkLock.RLock()
		syscall.ForkLock.RUnlock() //nolint:staticcheck // empty on purpose: only to wait
		err = flock(f, how|unix.LOCK_NB)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%w: %s is locked", errdef.ErrConflict, f.Name())
	}
	return err
}

// LockFile takes the lock on an open file or directory and waits for it, with
// no way to call it off: it is for locks that are only held for moments.
func LockFile(f *os.File, shared bool) error {
	if shared {
		return flock(f, unix.LOCK_SH)
	}
	return flock(f, unix.LOCK_EX)
}

// Unlock gives up the lock on f, for all processes that inherited it too, and
// closes f. To give up only one's own hold, close f instead.
func Unlock(f *os.File) error {
	return errors.Join(flock(f, unix.LOCK_UN), f.Close())
}

// Names reports whether path leads to the very file that is open as f.
func Names(path string, f *os.File) (bool, error) {
	there, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	here, err := f.Stat()
	if err != nil {
		return false, err
	}
	return os.SameFile(there, here), nil
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}
