package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/progress"
)

// newFlatFile is a flat image being written. Its name is that of a temporary
// file, so what a crash leaves of it is swept.
const newFlatFile = ".tine-tmp-flat"

// flatMemo vouches for a flat image for as long as that keeps its stamp. It is
// written after the image is on disk.
type flatMemo struct {
	Version int    `json:"version"`
	Digest  string `json:"digest"`
	stamp
}

func (m *flatMemo) encode() []byte {
	data, err := json.Marshal(m)
	if err != nil { // numbers and a digest always encode
		return nil
	}
	return append(data, '\n')
}

func decodeFlatMemo(data []byte) (flatMemo, error) {
	var m flatMemo
	err := decodeStrict(data, &m, &m.Version)
	if err == nil {
		err = checkDigest(m.Digest)
	}
	if err != nil {
		return flatMemo{}, fmt.Errorf("read flat memo: %w", err)
	}
	return m, nil
}

func (s Snapshot) flatMemoPath() string { return filepath.Join(s.dir, flatMemoFile) }

// flatMemo returns the memo if there is a flat image that it vouches for.
func (s Snapshot) flatMemo() (flatMemo, bool) {
	data, err := readFile(s.flatMemoPath())
	if err != nil {
		return flatMemo{}, false
	}
	m, err := decodeFlatMemo(data)
	if err != nil {
		return flatMemo{}, false
	}
	now, err := stampOf(s.FlatPath())
	return m, err == nil && now == m.stamp
}

// flatHolds reports whether there is a flat image of that size to be trusted.
func (s Snapshot) flatHolds(size int64) bool {
	m, ok := s.flatMemo()
	return ok && m.Size == size
}

// Flatten makes the whole memory of a layered snapshot beside its layer, for
// forks to map. It does nothing when there is one, and waits for one that is
// being made. What it makes can go again at any time, see DropFlat.
func (s *Store) Flatten(ctx context.Context, snap Snapshot) error {
	if !snap.Manifest.Layered() {
		return nil
	}
	pin, err := s.Pin(snap)
	if err != nil {
		return err
	}
	defer func() { _ = pin.Close() }() // only read
	chain, err := s.Chain(snap)
	if err != nil {
		return err
	}
	// The layer's file is there for all to lock, and nobody else does.
	lock, err := durable.Lock(ctx, snap.LayerPath())
	if err != nil {
		return fmt.Errorf("flatten snapshot %s: %w", snap.ref(), err)
	}
	if err = errors.Join(s.flatten(ctx, chain), durable.Unlock(lock)); err != nil {
		return fmt.Errorf("flatten snapshot %s: %w", snap.ref(), err)
	}
	return nil
}

// flatten is for who holds the lock of the last one's layer.
func (s *Store) flatten(ctx context.Context, chain []Snapshot) error {
	snap := chain[len(chain)-1]
	if snap.flatHolds(chain[0].Manifest.Memory.Size) {
		return nil
	}
	if err := s.verifyChain(ctx, chain); err != nil {
		return err
	}
	if err := room(snap.dir, chain); err != nil {
		return err
	}
	path := filepath.Join(snap.dir, newFlatFile)
	f, err := s.newFlat(ctx, path)
	if err != nil {
		return err
	}
	if err = flatten(ctx, chain, f); err == nil {
		err = s.publishFlat(ctx, snap, path)
	}
	if err != nil {
		err = errors.Join(err, s.removeIfThere(path))
	}
	return errors.Join(err, durable.Unlock(f)) // not before it has its name, or it is swept
}

// newFlat makes the temporary file, over one that a crash left. Sweeping it
// takes the store's lock, and then finds it locked.
func (s *Store) newFlat(ctx context.Context, path string) (f *os.File, err error) {
	err = s.locked(ctx, func() error {
		if err = s.removeIfThere(path); err != nil {
			return err
		}
		if f, err = s.files.create(path); err != nil {
			return err
		}
		if err = durable.TryLockFile(f, false); err != nil {
			return errors.Join(err, f.Close())
		}
		return nil
	})
	return f, err
}

// publishFlat gives the flat image its name, and vouches for it last.
func (s *Store) publishFlat(ctx context.Context, snap Snapshot, path string) error {
	if err := s.files.syncFile(path); err != nil {
		return err
	}
	before, err := stampOf(path)
	if err != nil {
		return err
	}
	sum, err := hashFile(ctx, path)
	if err != nil {
		return err
	}
	if err = s.files.rename(path, snap.FlatPath()); err != nil {
		return err
	}
	memo := flatMemo{Version: Version, Digest: sum.Digest, stamp: before}
	if err = s.files.syncDir(snap.dir); err == nil {
		err = s.files.write(snap.flatMemoPath(), memo.encode())
	}
	if err != nil { // it is of no use, and takes room
		return errors.Join(err, s.files.remove(snap.FlatPath()))
	}
	return nil
}

// flatten writes the memory of a chain into an empty file.
func flatten(ctx context.Context, chain []Snapshot, f *os.File) error {
	progress.Report(ctx, step, "joining memory and layers")
	img, err := openImage(chain)
	if err != nil {
		return err
	}
	return errors.Join(img.Flatten(ctx, f), img.Close())
}

// room checks that the disk can take a chain's memory once more: it has at
// most the pages that all of them have, and at most all there are.
func room(dir string, chain []Snapshot) error {
	var need int64
	for _, c := range chain {
		use, err := linux.DiskUse(filepath.Join(c.dir, c.Manifest.contents()[0].name))
		if err != nil {
			return err
		}
		need += use
	}
	need = min(need, chain[0].Manifest.Memory.Size)
	free, err := linux.FreeSpace(dir)
	if err != nil {
		return err
	}
	if free < need {
		err = fmt.Errorf("%w: %d MiB are free where snapshots are kept, and the memory may need %d", errdef.ErrExhausted, free>>20, need>>20)
		return errdef.WithHint(err, "free some space: tine snapshot gc, tine image rm")
	}
	return nil
}

// DropFlat removes the flat image of a snapshot, if it has one. It returns
// errdef.ErrConflict while that may be in use: as long as the snapshot, or one
// that stands on it, is pinned, or the image is being made.
func (s *Store) DropFlat(ctx context.Context, snap Snapshot) error {
	err := s.locked(ctx, func() error {
		parents, err := s.parents()
		if err != nil {
			return err
		}
		return s.dropFlatLocked(snap, parents)
	})
	if err != nil {
		return fmt.Errorf("drop the flat memory of snapshot %s: %w", snap.ref(), err)
	}
	return nil
}

// DropFlats removes the flat images that nothing can be using. With dryRun it
// only says what it would remove.
func (s *Store) DropFlats(ctx context.Context, dryRun bool) (Freed, error) {
	freed := Freed{Objects: []string{}, Leftovers: []string{}}
	err := s.locked(ctx, func() error { return s.dropFlatsLocked(dryRun, &freed) })
	if err != nil {
		return freed, fmt.Errorf("drop flat memories: %w", err)
	}
	return freed, nil
}

func (s *Store) dropFlatsLocked(dryRun bool, freed *Freed) error {
	names, err := s.objects()
	if err != nil {
		return err
	}
	parents, err := s.parents()
	if err != nil {
		return err
	}
	for _, name := range names {
		snap := Snapshot{Digest: digestPrefix + name, dir: s.path(objectsDir, name)}
		if err = s.freeFlat(snap, parents, dryRun, freed); err != nil {
			return err
		}
	}
	return nil
}

// freeFlat drops one flat image, unless it is in use, and adds it to freed.
func (s *Store) freeFlat(snap Snapshot, parents map[string]string, dryRun bool, freed *Freed) error {
	size, found, err := snap.flatUse()
	if err != nil || !found {
		return err
	}
	if dryRun {
		var l flatLease
		if l, err = s.leaseFlat(snap, parents); err == nil {
			err = l.release()
		}
	} else {
		err = s.dropFlatLocked(snap, parents)
	}
	if errors.Is(err, errdef.ErrConflict) {
		return nil
	}
	if err == nil {
		freed.Leftovers = append(freed.Leftovers, filepath.Join(objectsDir, filepath.Base(snap.dir), flatFile))
		freed.Bytes += size
	}
	return err
}

// flatUse returns how much disk the flat image and its memo take.
func (s Snapshot) flatUse() (size int64, found bool, err error) {
	for _, path := range []string{s.FlatPath(), s.flatMemoPath()} {
		use, useErr := linux.DiskUse(path)
		if errors.Is(useErr, fs.ErrNotExist) {
			continue
		}
		if useErr != nil {
			return 0, false, useErr
		}
		size, found = size+use, true
	}
	return size, found, nil
}

// dropFlatLocked takes the memo first, so that no instant vouches for what is
// not there.
func (s *Store) dropFlatLocked(snap Snapshot, parents map[string]string) error {
	l, err := s.leaseFlat(snap, parents)
	if err != nil {
		return err
	}
	defer func() { _ = l.release() }() // only read
	if err = s.removeIfThere(snap.flatMemoPath()); err != nil {
		return err
	}
	return s.removeIfThere(snap.FlatPath())
}

func (s *Store) removeIfThere(path string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return s.files.remove(path)
}

// flatLease keeps others from making a flat image, and from pinning what might
// map it.
type flatLease []lease

func (l flatLease) release() error {
	var err error
	for _, one := range l {
		err = errors.Join(err, one.release())
	}
	return err
}

// leaseFlat returns errdef.ErrConflict when the flat image may be in use. A
// fork of a snapshot higher up pins that one, and may map this one's image.
func (s *Store) leaseFlat(snap Snapshot, parents map[string]string) (held flatLease, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, held.release())
		}
	}()
	made := map[string]bool{snap.Digest: true}
	for level := []string{snap.Digest}; len(level) > 0; level = childrenOf(level, parents, made) {
		for _, digest := range level {
			var l lease
			if l, err = s.lockObject(digest); err != nil {
				return held, err
			}
			held = append(held, l)
		}
	}
	making, err := os.Open(snap.LayerPath())
	if errors.Is(err, fs.ErrNotExist) {
		return held, nil
	}
	if err != nil {
		return held, err
	}
	if err = durable.TryLockFile(making, false); err != nil {
		_ = making.Close() // only read
		return held, err
	}
	return append(held, lease{making}), nil
}

// sweepFlats removes flat images that nothing vouches for, and memos that
// vouch for nothing: what a crash, or a copy of the store, left.
func (s *Store) sweepFlats(dryRun bool, freed *Freed) error {
	names, err := s.objects()
	if err != nil {
		return err
	}
	var stale []Snapshot
	for _, name := range names {
		snap := Snapshot{Digest: digestPrefix + name, dir: s.path(objectsDir, name)}
		if _, ok := snap.flatMemo(); ok {
			continue
		}
		if _, found, useErr := snap.flatUse(); useErr == nil && found {
			stale = append(stale, snap)
		}
	}
	if len(stale) == 0 { // as a rule, and then there is no more to read
		return nil
	}
	parents, err := s.parents()
	if err != nil {
		return err
	}
	for _, snap := range stale {
		if err = s.freeFlat(snap, parents, dryRun, freed); err != nil {
			return err
		}
	}
	return nil
}
