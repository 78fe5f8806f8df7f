package jail

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
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
// whatever becomes of the daemon.
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
		lock, err := durable.TryLock(filepath.Join(dir, strconv.Itoa(id)), false)
		if err == nil {
			return &uidLease{id: id, lock: lock}, nil
		}
		if !errors.Is(err, errdef.ErrConflict) {
			return nil, fmt.Errorf("lease user id: %w", err)
		}
	}
	return nil, fmt.Errorf("%w: no user id is free in %s", errdef.ErrExhausted, dir)
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
