package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// root is a file that names an object and so keeps it: a tag, or what a
// sandbox that has no machine holds.
type root struct {
	name string
	held bool
	path string
	// file and err are what roots found in it.
	file tagFile
	err  error
}

// tagRoot is where a tag becomes a path, and the only place.
func (s *Store) tagRoot(tag string) (root, error) { return s.root(tagsDir, tag) }

// heldRoot is the same for what is held.
func (s *Store) heldRoot(name string) (root, error) { return s.root(heldDir, name) }

func (s *Store) root(dir, name string) (root, error) {
	if err := CheckTag(name); err != nil {
		return root{}, err
	}
	return root{name: name, held: dir == heldDir, path: s.path(dir, name+tagSuffix)}, nil
}

// staging is the name under staging/ of what is being written for the root. A
// tag has no colon.
func (r root) staging() string {
	if r.held {
		return "held:" + r.name
	}
	return r.name
}

// tag is what a person calls it.
func (r root) tag() string {
	if r.held {
		return ""
	}
	return r.name
}

func (r root) read() (tagFile, error) {
	data, err := readFile(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return tagFile{}, notFound(r.name)
	}
	if err != nil {
		return tagFile{}, fmt.Errorf("snapshot %s: %w", r.name, err)
	}
	t, err := decodeTag(data)
	if err != nil {
		return tagFile{}, fmt.Errorf("snapshot %s: %w", r.name, err)
	}
	return t, nil
}

func (s *Store) readTag(tag string) (tagFile, error) {
	r, err := s.tagRoot(tag)
	if err != nil {
		return tagFile{}, err
	}
	return r.read()
}

// roots returns all roots, read.
func (s *Store) roots() ([]root, error) {
	var roots []root
	for _, dir := range []string{tagsDir, heldDir} {
		names, err := s.names(dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			r, err := s.root(dir, name)
			if err != nil {
				return nil, err
			}
			if r.file, r.err = r.read(); errors.Is(r.err, errdef.ErrNotFound) {
				continue // removed meanwhile
			}
			roots = append(roots, r)
		}
	}
	return roots, nil
}

// StageHeld begins a snapshot that keeps a sandbox without a machine. It is
// like StageReplace, but what it makes is found by Held, under the name, and
// is in no list.
func (s *Store) StageHeld(ctx context.Context, name string) (*Stage, error) {
	r, err := s.heldRoot(name)
	if err != nil {
		return nil, err
	}
	return s.stage(ctx, r, true)
}

// Held finds what was staged by StageHeld. It has no tag.
func (s *Store) Held(name string) (Snapshot, error) {
	r, err := s.heldRoot(name)
	if err != nil {
		return Snapshot{}, err
	}
	return s.resolveRoot(r, nil)
}

// HeldNames returns the names that Held knows.
func (s *Store) HeldNames() ([]string, error) { return s.names(heldDir) }

// DropHeld forgets a name, and removes the snapshot if nothing else names it.
// One that is pinned is left to GC.
func (s *Store) DropHeld(ctx context.Context, name string) error {
	r, err := s.heldRoot(name)
	if err != nil {
		return err
	}
	err = s.locked(ctx, func() error { return s.dropHeldLocked(r) })
	if err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return fmt.Errorf("drop held snapshot %s: %w", name, err)
	}
	return err
}

func (s *Store) dropHeldLocked(r root) error {
	t, readErr := r.read()
	if errors.Is(readErr, errdef.ErrNotFound) {
		return readErr
	}
	if err := s.removeRoot(r); err != nil {
		return err
	}
	if readErr != nil { // it pointed at nothing
		return nil
	}
	return s.dropUnusedLocked(t.Digest)
}

// Retag points a tag at a snapshot that is there, whatever it is called. With
// replace the tag may exist: the snapshot that it pointed at goes, if nothing
// names or pins it any more. It returns errdef.ErrConflict while another
// writes the tag. Nobody prunes the tag after that.
func (s *Store) Retag(ctx context.Context, tag string, to Snapshot, replace bool) (Snapshot, error) {
	r, err := s.tagRoot(tag)
	if err != nil {
		return Snapshot{}, err
	}
	if err = checkDigest(to.Digest); err != nil {
		return Snapshot{}, fmt.Errorf("tag snapshot %s: %w", tag, err)
	}
	st := &Stage{store: s, root: r, replace: replace, dir: s.path(stagingDir, r.staging())}
	var snap Snapshot
	err = s.locked(ctx, func() error {
		snap, err = s.retagLocked(st, to)
		return err
	})
	if err != nil {
		return Snapshot{}, fmt.Errorf("tag snapshot %s: %w", tag, err)
	}
	return snap, nil
}

// retagLocked needs no stage: nobody else can take the tag under the lock.
func (s *Store) retagLocked(st *Stage, to Snapshot) (Snapshot, error) {
	if err := st.checkRoot(); err != nil {
		return Snapshot{}, err
	}
	claim, err := lockDir(st.dir, false)
	switch {
	case errors.Is(err, errdef.ErrConflict):
		return Snapshot{}, st.beingWritten()
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return Snapshot{}, err
	default: // what a dead writer left is for the next
		defer func() { _ = durable.Unlock(claim) }() // only read
	}
	snap, err := s.load(to.Digest, nil)
	if errors.Is(err, errdef.ErrNotFound) {
		return Snapshot{}, notFound(to.ref())
	}
	if err != nil {
		return Snapshot{}, damaged(to.ref(), err)
	}
	if snap.Facts, err = s.factsOf(to); err != nil {
		return Snapshot{}, err
	}
	snap.Tag, snap.Auto = st.root.name, false
	return snap, st.pointLocked(&tagFile{Version: Version, Digest: to.Digest, Facts: snap.Facts})
}

// factsOf returns what is known of the making of a snapshot: one found by its
// digest says nothing, but its tags may.
func (s *Store) factsOf(snap Snapshot) (Facts, error) {
	if !snap.CreatedAt.IsZero() {
		return snap.Facts, nil
	}
	roots, err := s.roots()
	for _, r := range roots {
		if r.err == nil && r.file.Digest == snap.Digest {
			return r.file.Facts, nil
		}
	}
	return Facts{CreatedAt: now()}, err
}

func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

// removeRoot removes a tag, or what is held, for good.
func (s *Store) removeRoot(r root) error {
	if err := s.files.remove(r.path); err != nil {
		return err
	}
	return s.files.syncDir(filepath.Dir(r.path))
}

// PrunePolicy says what Prune may remove.
type PrunePolicy struct {
	// KeepLast is how many of the newest snapshots to keep of each sandbox.
	KeepLast int
	// DryRun only says what would go.
	DryRun bool
}

// Prune removes tags that nobody chose, but for the newest of each sandbox and
// those of pinned snapshots, and the snapshots that nothing needs then. It
// returns the tags.
func (s *Store) Prune(ctx context.Context, p PrunePolicy) ([]string, Freed, error) {
	freed := Freed{Objects: []string{}, Leftovers: []string{}}
	if p.KeepLast < 0 {
		return nil, freed, fmt.Errorf("%w: prune snapshots: keep the last %d", errdef.ErrInvalid, p.KeepLast)
	}
	tags := []string{}
	err := s.locked(ctx, func() error {
		doomed, err := s.doomedLocked(p.KeepLast)
		if err != nil {
			return err
		}
		for _, r := range doomed {
			tags = append(tags, r.name)
		}
		return s.pruneLocked(doomed, p.DryRun, &freed)
	})
	if err != nil {
		return nil, freed, fmt.Errorf("prune snapshots: %w", err)
	}
	return tags, freed, nil
}

// doomedLocked returns the tags that Prune removes.
func (s *Store) doomedLocked(keep int) ([]root, error) {
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	// What was not taken of a sandbox is no branch, though nobody chose its tag.
	roots = slices.DeleteFunc(roots, func(r root) bool {
		return r.held || r.err != nil || !r.file.Auto || r.file.BranchedFrom == ""
	})
	slices.SortStableFunc(roots, func(a, b root) int { return b.file.CreatedAt.Compare(a.file.CreatedAt) })
	kept := map[string]int{}
	var doomed []root
	for _, r := range roots {
		if kept[r.file.BranchedFrom] < keep {
			kept[r.file.BranchedFrom]++
			continue
		}
		l, lockErr := s.lockObject(r.file.Digest)
		if errors.Is(lockErr, errdef.ErrConflict) {
			continue
		}
		if err = errors.Join(lockErr, l.release()); err != nil {
			return nil, err
		}
		doomed = append(doomed, r)
	}
	return doomed, nil
}

// pruneLocked removes all tags first, and then of their objects those that
// nothing needs.
func (s *Store) pruneLocked(doomed []root, dryRun bool, freed *Freed) error {
	unused, err := s.unusedLocked(doomed)
	if err != nil {
		return err
	}
	for _, r := range doomed {
		if dryRun {
			break
		}
		if err = s.removeRoot(r); err != nil {
			return err
		}
	}
	unused = slices.DeleteFunc(unused, func(digest string) bool {
		return !slices.ContainsFunc(doomed, func(r root) bool { return r.file.Digest == digest })
	})
	return s.freeLocked(unused, dryRun, freed)
}
