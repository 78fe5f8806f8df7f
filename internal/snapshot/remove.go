package snapshot

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// Remove removes a tag, and with the last tag the snapshot itself, unless
// another was branched from it: then it goes with that one, by GC. It returns
// errdef.ErrConflict, and removes nothing, while the snapshot is pinned.
//
// The tag goes first, so that no instant has a tag that points nowhere; the
// object then loses its name at once, and its files after that.
func (s *Store) Remove(ctx context.Context, tag string) error {
	err := s.locked(ctx, func() error { return s.removeLocked(tag) })
	if err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return fmt.Errorf("remove snapshot %s: %w", tag, err)
	}
	return err
}

func (s *Store) removeLocked(tag string) error {
	r, err := s.tagRoot(tag)
	if err != nil {
		return err
	}
	t, err := r.read()
	if errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	if err != nil { // a tag that cannot be read points at nothing
		return s.removeRoot(r)
	}
	used, err := s.usedLocked(t.Digest, r.path)
	if err != nil {
		return err
	}
	if used {
		return s.removeRoot(r)
	}
	l, err := s.lockObject(t.Digest)
	if err != nil {
		return err
	}
	defer func() { _ = l.release() }() // only read
	if err = s.removeRoot(r); err != nil {
		return err
	}
	if err = s.trashObject(t.Digest); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.emptyTrash()
}

// usedLocked reports whether a root other than the file except, or another
// object's manifest, names the object. A root that cannot be read may name
// anything.
func (s *Store) usedLocked(digest, except string) (bool, error) {
	roots, err := s.roots()
	if err != nil {
		return false, err
	}
	for _, r := range roots {
		if r.path != except && (r.err != nil || r.file.Digest == digest) {
			return true, nil
		}
	}
	parents, err := s.parents()
	for _, parent := range parents {
		if parent == digest {
			return true, nil
		}
	}
	return false, err
}

// dropUnusedLocked removes an object, if it is there, and nothing names it any
// more or pins it.
func (s *Store) dropUnusedLocked(digest string) error {
	used, err := s.usedLocked(digest, "")
	if err != nil || used {
		return err
	}
	err = s.dropLocked(digest)
	if errors.Is(err, errdef.ErrConflict) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// dropLocked removes an object, or returns errdef.ErrConflict when it is pinned.
func (s *Store) dropLocked(digest string) error {
	l, err := s.lockObject(digest)
	if err != nil {
		return err
	}
	defer func() { _ = l.release() }() // only read
	if err = s.trashObject(digest); err != nil {
		return err
	}
	return s.emptyTrash()
}

// lease is a lock on an object against pins; with no file there was nothing
// to pin.
type lease struct{ file *os.File }

func (l lease) release() error {
	if l.file == nil {
		return nil
	}
	return durable.Unlock(l.file)
}

// lockObject takes the lock that pins share, or returns errdef.ErrConflict.
func (s *Store) lockObject(digest string) (lease, error) {
	f, err := os.Open(filepath.Join(s.objectPath(digest), manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return lease{}, nil
	}
	if err != nil {
		return lease{}, err
	}
	if err = durable.TryLockFile(f, false); err == nil {
		return lease{f}, nil
	}
	_ = f.Close() // only read
	if errors.Is(err, errdef.ErrConflict) {
		err = errdef.WithHint(fmt.Errorf("%w: it is in use", errdef.ErrConflict),
			"sandboxes run from it: tine ls shows them, tine rm ends them")
	}
	return lease{}, err
}

// trashObject takes an object's name away.
func (s *Store) trashObject(digest string) error {
	name := strings.TrimPrefix(digest, digestPrefix)
	if err := s.files.rename(s.path(objectsDir, name), s.path(trashDir, name+"-"+rand.Text())); err != nil {
		return err
	}
	return s.files.syncDir(s.path(objectsDir))
}

func (s *Store) emptyTrash() error {
	names, err := s.list(trashDir)
	for _, name := range names {
		err = errors.Join(err, s.files.removeAll(s.path(trashDir, name)))
	}
	return err
}

// Freed is what GC removed, or would remove.
type Freed struct {
	// Objects are the digests of snapshots that nothing names.
	Objects []string `json:"objects"`
	// Leftovers are parts that crashed processes left.
	Leftovers []string `json:"leftovers"`
	// Bytes is how much disk they took.
	Bytes int64 `json:"bytes"`
}

// GC removes the snapshots that no tag, pin or other snapshot needs, and what
// crashed processes left. With dryRun it only says what it would remove.
func (s *Store) GC(ctx context.Context, dryRun bool) (Freed, error) {
	var freed Freed
	err := s.locked(ctx, func() error {
		var err error
		if freed, err = s.sweepLocked(dryRun); err != nil {
			return err
		}
		return s.collectLocked(dryRun, &freed)
	})
	if err != nil {
		return freed, fmt.Errorf("collect snapshot garbage: %w", err)
	}
	return freed, nil
}

func (s *Store) collectLocked(dryRun bool, freed *Freed) error {
	unused, err := s.unusedLocked(nil)
	if err != nil {
		return err
	}
	return s.freeLocked(unused, dryRun, freed)
}

// freeLocked removes objects that nothing needs, but for those that are pinned.
func (s *Store) freeLocked(unused []string, dryRun bool, freed *Freed) error {
	for _, digest := range unused {
		size, sizeErr := diskUse(s.objectPath(digest))
		if sizeErr != nil {
			return sizeErr
		}
		var err error
		if !dryRun {
			err = s.dropLocked(digest)
		}
		if errors.Is(err, errdef.ErrConflict) {
			return nil // pinned just now, and so are those below it
		}
		if err != nil {
			return err
		}
		freed.Objects = append(freed.Objects, digest)
		freed.Bytes += size
	}
	return nil
}

// unusedLocked returns the objects that cannot be reached from a pin or a root
// other than those given, each before its parent: so dying after any of them
// leaves no object without its parent.
func (s *Store) unusedLocked(except []root) ([]string, error) {
	names, err := s.objects()
	if err != nil {
		return nil, err
	}
	live, err := s.named(except)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		l, lockErr := s.lockObject(digestPrefix + name)
		if errors.Is(lockErr, errdef.ErrConflict) {
			live = append(live, digestPrefix+name)
		} else if err = errors.Join(lockErr, l.release()); err != nil {
			return nil, err
		}
	}
	parents, err := s.parents()
	if err != nil {
		return nil, err
	}
	reached := reach(live, parents)
	var unused []string
	for _, name := range names {
		digest := digestPrefix + name
		if _, readable := parents[digest]; reached[digest] && !readable {
			return nil, errdef.WithHint(damagedObject(digest), "it may stand on anything: remove the snapshots that tine snapshot ls calls failed")
		}
		if !reached[digest] {
			unused = append(unused, digest)
		}
	}
	return childrenFirst(unused, parents), nil
}

func damagedObject(digest string) error {
	return fmt.Errorf("%w: object %s has no manifest that can be read", errdef.ErrUnavailable, digest)
}

// named returns the digests that roots name.
func (s *Store) named(except []root) ([]string, error) {
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	var digests []string
	for _, r := range roots {
		switch {
		case r.err != nil && r.held:
			return nil, errdef.WithHint(r.err, "it may point at anything: remove the file "+r.path)
		case r.err != nil:
			return nil, errdef.WithHint(r.err, "it may point at anything: remove it with tine snapshot rm "+r.name)
		case !slices.ContainsFunc(except, func(e root) bool { return e.path == r.path }):
			digests = append(digests, r.file.Digest)
		}
	}
	return digests, nil
}

// reach returns the digests given and all that their parents lead to.
func reach(digests []string, parents map[string]string) map[string]bool {
	reached := map[string]bool{}
	for _, digest := range digests {
		for digest != "" && !reached[digest] {
			reached[digest] = true
			digest = parents[digest]
		}
	}
	return reached
}

// childrenFirst sorts objects so that each comes before its parent.
func childrenFirst(digests []string, parents map[string]string) []string {
	age := map[string]int{}
	for _, digest := range digests {
		age[digest] = len(reach([]string{digest}, parents))
	}
	slices.SortStableFunc(digests, func(a, b string) int { return age[b] - age[a] })
	return digests
}

// objects returns the names under objects/ that an object can have.
func (s *Store) objects() ([]string, error) {
	names, err := s.list(objectsDir)
	return slices.DeleteFunc(names, func(name string) bool { return checkDigest(digestPrefix+name) != nil }), err
}

// sweepLocked removes stages whose writer is dead, trash, and temporary files.
func (s *Store) sweepLocked(dryRun bool) (Freed, error) {
	freed := Freed{Objects: []string{}, Leftovers: []string{}}
	stages, err := s.list(stagingDir)
	if err != nil {
		return freed, err
	}
	trash, err := s.list(trashDir)
	if err != nil {
		return freed, err
	}
	for _, name := range stages {
		if err = s.sweep(filepath.Join(stagingDir, name), dryRun, &freed); err != nil {
			return freed, err
		}
	}
	for _, name := range trash {
		if err = s.sweep(filepath.Join(trashDir, name), dryRun, &freed); err != nil {
			return freed, err
		}
	}
	if err = s.sweepFlats(dryRun, &freed); err != nil || dryRun {
		return freed, err
	}
	return freed, s.removeTemp()
}

// sweep removes one directory, unless its writer lives.
func (s *Store) sweep(name string, dryRun bool, freed *Freed) error {
	path := s.path(name)
	dir, err := lockDir(path, false)
	if errors.Is(err, errdef.ErrConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = durable.Unlock(dir) }() // only read
	if size, sizeErr := diskUse(path); sizeErr == nil {
		freed.Bytes += size
	}
	freed.Leftovers = append(freed.Leftovers, name)
	if dryRun {
		return nil
	}
	return s.files.removeAll(path)
}

func (s *Store) removeTemp() error {
	names, err := s.objects()
	if err != nil {
		return err
	}
	err = errors.Join(durable.RemoveTemp(s.path(tagsDir)), durable.RemoveTemp(s.path(heldDir)))
	for _, name := range names {
		err = errors.Join(err, durable.RemoveTemp(s.path(objectsDir, name)))
	}
	return err
}
