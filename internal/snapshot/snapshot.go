// Package snapshot keeps frozen machines: immutable objects named by the digest
// of their manifest, and tags that point at them.
//
// An object has a machine's memory, or a layer: what of it differs from another
// object, its parent. It is whole from the instant it has its name, and is never
// changed but for caches beside it. It is never removed while a tag, a sandbox
// without a machine, another object's manifest or a live pin still names it.
// Any number of processes may share one store; whatever one of them was doing
// when it was killed is taken back by the next that opens it.
// docs/formats/snapshot.md describes the files.
//
// The package knows nothing of how machines run: see vmm.
package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// The names in a store's directory and in an object's.
const (
	objectsDir = "objects"
	tagsDir    = "tags"
	heldDir    = "held"
	stagingDir = "staging"
	trashDir   = "trash"
	lockFile   = "lock"

	manifestFile = "manifest.json"
	memoryFile   = "memory"
	layerFile    = "layer"
	deviceFile   = "device"
	memoFile     = "verified.json"
	flatFile     = "flat"
	flatMemoFile = "flat.json"

	tagSuffix = ".json"
)

// minPrefix is the fewest hex digits that may stand for a digest.
const minPrefix = 12

// Status says whether a snapshot can be forked.
type Status string

// A snapshot is ready, or is being written by a live process, or is damaged:
// Snapshot.Problem then says how.
const (
	StatusReady   Status = "ready"
	StatusWriting Status = "writing"
	StatusFailed  Status = "failed"
)

// Store is a directory of snapshots. Its methods are safe for concurrent use,
// by several processes too.
type Store struct {
	dir    string
	logger *slog.Logger
	files  files

	decoded decoded
	hashed  hashed
}

// Snapshot is one snapshot as it was found. Only a ready one has a Manifest.
type Snapshot struct {
	// Tag is "" when the snapshot was found by its digest.
	Tag      string
	Digest   string
	Status   Status
	Problem  string
	Manifest Manifest
	Facts
	// Depth is the number of layers between the snapshot and the whole image
	// that they stand on: 0 for a whole image.
	Depth int

	dir string
}

// Dir is the snapshot's directory.
func (s Snapshot) Dir() string { return s.dir }

// MemoryPath is the file of a whole memory. What a fork maps is for Store.Base
// to say.
func (s Snapshot) MemoryPath() string { return filepath.Join(s.dir, memoryFile) }

// LayerPath is the file of a layered snapshot's own pages.
func (s Snapshot) LayerPath() string { return filepath.Join(s.dir, layerFile) }

// FlatPath is where Flatten keeps a layered snapshot's whole memory. Only Base
// knows whether there is one that is to be trusted.
func (s Snapshot) FlatPath() string { return filepath.Join(s.dir, flatFile) }

// DevicePath is the file of device state.
func (s Snapshot) DevicePath() string { return filepath.Join(s.dir, deviceFile) }

// DiskUse returns how many bytes of disk the snapshot takes, with its share of
// what others have too.
func (s Snapshot) DiskUse() (int64, error) { return diskUse(s.dir) }

// Open opens the store in dir, which it makes when it is missing, and removes
// what crashed writers left there.
func Open(dir string, logger *slog.Logger) (*Store, error) {
	return open(dir, logger, osFiles{})
}

func open(dir string, logger *slog.Logger, f files) (*Store, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: dir, logger: logger, files: f}
	for _, name := range []string{objectsDir, tagsDir, heldDir, stagingDir, trashDir} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			return nil, fmt.Errorf("open snapshot store: %w", durable.Describe("make", dir, err))
		}
	}
	lock, err := durable.TryLock(s.path(lockFile), false)
	if errors.Is(err, errdef.ErrConflict) { // someone is at work, and tidies up itself
		return s, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open snapshot store: %w", err)
	}
	if _, err = s.sweepLocked(false); err != nil {
		err = fmt.Errorf("open snapshot store: %w", err)
	}
	if err = errors.Join(err, durable.Unlock(lock)); err != nil {
		return nil, err
	}
	return s, nil
}

// Resolve finds a snapshot by its tag, or by its digest: "sha256:" and at
// least twelve hex digits, or the digits alone. It returns errdef.ErrNotFound
// when there is none and errdef.ErrUnavailable when it is damaged, as far as
// that shows without reading it all; see Verify.
func (s *Store) Resolve(ref string) (Snapshot, error) {
	if digits, ok := strings.CutPrefix(ref, digestPrefix); ok {
		return s.resolveDigest(ref, digits)
	}
	if err := CheckTag(ref); err != nil {
		return Snapshot{}, err
	}
	snap, err := s.resolveTag(ref, nil)
	if errors.Is(err, errdef.ErrNotFound) && isHex(ref, minPrefix) {
		return s.resolveDigest(ref, ref)
	}
	return snap, err
}

func (s *Store) resolveTag(tag string, seen known) (Snapshot, error) {
	r, err := s.tagRoot(tag)
	if err != nil {
		return Snapshot{}, err
	}
	return s.resolveRoot(r, seen)
}

func (s *Store) resolveRoot(r root, seen known) (Snapshot, error) {
	t, err := r.read()
	if err != nil {
		return Snapshot{}, err
	}
	snap, err := s.load(t.Digest, seen)
	if err == nil {
		snap.Tag, snap.Facts = r.tag(), t.Facts
		return snap, nil
	}
	// Removed, and perhaps made anew, while it was being looked at.
	if now, again := r.read(); again != nil || now.Digest != t.Digest {
		return Snapshot{}, notFound(r.name)
	}
	return Snapshot{}, damaged(r.name, err)
}

// load reads an object, and sees that all is there that its memory is made of.
func (s *Store) load(digest string, seen known) (Snapshot, error) {
	snap := Snapshot{Digest: digest, Status: StatusReady, dir: s.objectPath(digest)}
	m, err := s.readObject(digest)
	if err != nil {
		return Snapshot{}, err
	}
	snap.Manifest = m
	chain, err := s.chain(snap, seen)
	if err != nil {
		return Snapshot{}, err
	}
	snap.Depth = len(chain) - 1
	return snap, nil
}

func (s *Store) resolveDigest(ref, digits string) (Snapshot, error) {
	if !isHex(digits, minPrefix) {
		return Snapshot{}, errdef.WithHint(fmt.Errorf("%w: snapshot %q", errdef.ErrInvalid, ref),
			"give at least 12 hex digits of the digest")
	}
	names, err := s.list(objectsDir)
	if err != nil {
		return Snapshot{}, err
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !strings.HasPrefix(name, digits) })
	switch len(names) {
	case 0:
		return Snapshot{}, notFound(ref)
	case 1:
	default:
		return Snapshot{}, fmt.Errorf("%w: snapshot %s may be any of %d", errdef.ErrInvalid, ref, len(names))
	}
	digest := digestPrefix + names[0]
	snap, err := s.load(digest, nil)
	if err != nil {
		if _, gone := os.Lstat(s.objectPath(digest)); errors.Is(gone, fs.ErrNotExist) {
			return Snapshot{}, notFound(ref)
		}
		return Snapshot{}, damaged(ref, err)
	}
	return snap, nil
}

func notFound(ref string) error { return fmt.Errorf("snapshot %s: %w", ref, errdef.ErrNotFound) }

// damaged hides the category of the cause: what is missing is not what the
// caller asked for, but a part of it.
func damaged(ref string, cause error) error {
	return errdef.WithHint(fmt.Errorf("%w: snapshot %s is damaged: %v", errdef.ErrUnavailable, ref, cause), //nolint:errorlint // see above
		"tine snapshot check tells all that is wrong; remove the snapshot and create it again")
}

// List returns all tagged snapshots and those being written, by tag.
func (s *Store) List() ([]Snapshot, error) {
	tags, err := s.tags()
	if err != nil {
		return nil, err
	}
	var all []Snapshot
	seen := known{}
	for _, tag := range tags {
		snap, found := s.look(tag, seen)
		if found {
			all = append(all, snap)
		}
	}
	writing, err := s.writing()
	if err != nil {
		return nil, err
	}
	for _, tag := range writing {
		if !slices.Contains(tags, tag) {
			all = append(all, Snapshot{Tag: tag, Status: StatusWriting})
		}
	}
	slices.SortFunc(all, func(a, b Snapshot) int { return strings.Compare(a.Tag, b.Tag) })
	return all, nil
}

// look is Resolve for a list: what is wrong is part of the answer.
func (s *Store) look(tag string, seen known) (Snapshot, bool) {
	snap, err := s.resolveTag(tag, seen)
	switch {
	case err == nil:
		return snap, true
	case errors.Is(err, errdef.ErrNotFound):
		return Snapshot{}, false
	}
	bad := Snapshot{Tag: tag, Status: StatusFailed, Problem: err.Error()}
	if t, tagErr := s.readTag(tag); tagErr == nil {
		bad.Digest, bad.Facts = t.Digest, t.Facts
	}
	return bad, true
}

// tags returns the names under tags/ that are tags.
func (s *Store) tags() ([]string, error) { return s.names(tagsDir) }

// names returns the names under tags/, or held/, that can be there.
func (s *Store) names(dir string) ([]string, error) {
	files, err := s.list(dir)
	var names []string
	for _, file := range files {
		if name, ok := strings.CutSuffix(file, tagSuffix); ok && CheckTag(name) == nil {
			names = append(names, name)
		}
	}
	return names, err
}

// writing returns the tags that live processes are writing. A staging
// directory is locked for just as long as its writer lives. Looking takes the
// lock for an instant, which must not make a writer believe that it is not
// alone: so writers claim theirs under the store's lock.
func (s *Store) writing() ([]string, error) {
	names, err := s.list(stagingDir)
	names = slices.DeleteFunc(names, func(name string) bool { return CheckTag(name) != nil }) // held ones
	if err != nil || len(names) == 0 {
		return nil, err
	}
	lock, err := durable.TryLock(s.path(lockFile), true)
	if errors.Is(err, errdef.ErrConflict) { // a writer is at it just now
		return names, nil
	}
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		dir, lockErr := lockDir(s.path(stagingDir, name), true)
		if lockErr == nil {
			_ = durable.Unlock(dir) // nobody writes it: Open or GC removes it
		}
		return !errors.Is(lockErr, errdef.ErrConflict)
	})
	return names, durable.Unlock(lock)
}

// Pin keeps a snapshot from being removed for as long as the file it returns
// is open, in this process or in one that inherits it. Give it up by closing
// it. It returns errdef.ErrNotFound when the snapshot is gone.
func (s *Store) Pin(snap Snapshot) (*os.File, error) {
	path := filepath.Join(snap.dir, manifestFile)
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(snap.ref())
	}
	if err != nil {
		return nil, fmt.Errorf("pin snapshot %s: %w", snap.ref(), err)
	}
	// Only one who may remove it holds the lock, for a moment.
	if err = durable.LockFile(f, true); err == nil {
		if same, nameErr := durable.Names(path, f); nameErr != nil || !same {
			err = errors.Join(notFound(snap.ref()), nameErr)
		}
	}
	if err != nil {
		_ = durable.Unlock(f) // only read
		return nil, err
	}
	return f, nil
}

func (s Snapshot) ref() string {
	if s.Tag != "" {
		return s.Tag
	}
	return s.Digest
}

// locked runs work while no other process changes the store.
func (s *Store) locked(ctx context.Context, work func() error) error {
	lock, err := durable.Lock(ctx, s.path(lockFile))
	if err != nil {
		return err
	}
	return errors.Join(work(), durable.Unlock(lock))
}

func (s *Store) path(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

// objectPath is for digests that checkDigest has seen.
func (s *Store) objectPath(digest string) string {
	return s.path(objectsDir, strings.TrimPrefix(digest, digestPrefix))
}

// list returns the names in one of the store's directories, sorted.
func (s *Store) list(name string) ([]string, error) {
	entries, err := os.ReadDir(s.path(name))
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// readObject reads an object's manifest, and sees that it is the one with that
// digest and that its files have their sizes. Their content is for Verify.
func (s *Store) readObject(digest string) (Manifest, error) {
	m, err := s.readManifest(digest)
	if err != nil {
		return Manifest{}, err
	}
	for _, f := range m.contents() {
		if err = checkSize(filepath.Join(s.objectPath(digest), f.name), f.Size); err != nil {
			return Manifest{}, err
		}
	}
	return m, nil
}

func (s *Store) readManifest(digest string) (Manifest, error) {
	data, err := readFile(filepath.Join(s.objectPath(digest), manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return Manifest{}, fmt.Errorf("object %s: %w", digest, errdef.ErrNotFound)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("object %s: %w", digest, err)
	}
	if got := digestOf(data); got != digest {
		return Manifest{}, &DigestError{File: manifestFile, Want: digest, Got: got}
	}
	m, err := s.decoded.manifest(digest, data)
	if err != nil {
		return Manifest{}, fmt.Errorf("object %s: %w", digest, err)
	}
	return m, nil
}

func checkSize(path string, want int64) error {
	st, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case !st.Mode().IsRegular():
		return fmt.Errorf("%w: %s is no regular file", errdef.ErrUnavailable, path)
	case st.Size() != want:
		return fmt.Errorf("%w: %s has %d bytes, its manifest says %d", errdef.ErrUnavailable, path, st.Size(), want)
	}
	return nil
}

// readFile reads a manifest or a tag, and no more than one can have.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	data, err := readJSON(f)
	_ = f.Close() // only read
	return data, err
}

// lockDir opens a staging directory and takes its lock.
func lockDir(path string, shared bool) (*os.File, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err = durable.TryLockFile(dir, shared); err != nil {
		_ = dir.Close() // only read
		return nil, err
	}
	return dir, nil
}

// diskUse adds up the files in a directory. Of one that others have too, by a
// link, it counts a share.
func diskUse(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if err = unix.Lstat(path, &st); err != nil {
			return 0, &fs.PathError{Op: "stat", Path: path, Err: err}
		}
		sum += st.Blocks * 512 / int64(max(st.Nlink, 1))
	}
	return sum, nil
}
