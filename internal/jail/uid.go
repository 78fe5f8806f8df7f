package jail

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Programs have user ids of a range that neither distributions, nor systemd, nor
// the tools that give ranges to containers hand out (systemd's UIDS-GIDS page
// calls it unused).
const (
	firstUID  = 1_900_000_000
	countUIDs = 1 << 16
)

// uidLease is a user id that no other program of this host has. It is held by a
// lock that the program inherits, so it lasts for as long as the program does,
// whatever becomes of the daemon. Should the program let go of the lock, the id
// still is not leased again while a process has it.
type uidLease struct {
	id   int
	lock *os.File
}

// leaseUID takes one that is free. Which, is chance: files that a user might have
// left somewhere do not come to belong to the next one.
func leaseUID(dir string) (*uidLease, error) {
	start := rand.IntN(countUIDs) //nolint:gosec // nothing depends on its being hard to guess
	for i := range countUIDs {
		id := firstUID + (start+i)%countUIDs
		lock, err := lockUID(dir, id)
		if err == nil {
			return &uidLease{id: id, lock: lock}, nil
		}
		if !errors.Is(err, errdef.ErrConflict) {
			return nil, fmt.Errorf("lease user id: %w", err)
		}
	}
	return nil, fmt.Errorf("%w: no user id is free in %s", errdef.ErrExhausted, dir)
}

// lockUID returns errdef.ErrConflict when the id is another's. The program gets
// the file that it returns, which therefore only reads.
func lockUID(dir string, id int) (_ *os.File, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	path := filepath.Join(dir, strconv.Itoa(id))
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	u.Add(f.Close)
	if err = durable.TryLockFile(f, false); err != nil {
		return nil, err
	}
	same, err := durable.Names(path, f)
	if err == nil && (!same || hasProcess(id)) { // if not, it was swept while we opened it
		err = fmt.Errorf("%w: user id %d", errdef.ErrConflict, id)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// hasProcess reports whether there is a process of a user. The kernel looks at
// all processes only if it knows the user.
func hasProcess(uid int) bool {
	_, err := unix.Getpriority(unix.PRIO_USER, uid)
	return !errors.Is(err, unix.ESRCH)
}

// Close gives up this process's hold on the lease.
func (l *uidLease) Close() error { return l.lock.Close() }

// sweepUIDs removes the lock files of programs that have ended.
func sweepUIDs(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue // not a lease
		}
		path := filepath.Join(dir, e.Name())
		lock, err := durable.TryLock(path, false)
		if errors.Is(err, errdef.ErrConflict) {
			continue
		}
		if err == nil { // whoever waits for it finds that the name is another file's
			err = errors.Join(os.Remove(path), lock.Close())
		}
		if err != nil {
			return err
		}
	}
	return nil
}
