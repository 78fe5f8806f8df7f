package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// DigestError says that a file is not what its digest says. It is in the
// category errdef.ErrUnavailable: the snapshot cannot be used.
type DigestError struct {
	File, Want, Got string
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("%s has digest %s, want %s", e.File, e.Got, e.Want)
}

// Unwrap returns the error's category.
func (e *DigestError) Unwrap() error { return errdef.ErrUnavailable }

// content is a file that a manifest names.
type content struct {
	name string
	File
}

func (m *Manifest) contents() []content {
	return []content{{memoryFile, m.Memory}, {deviceFile, m.Device}}
}

// memo remembers which files had their digests when they were last read. It
// holds as long as they keep inode, size and time of change.
type memo struct {
	Version int              `json:"version"`
	Files   map[string]stamp `json:"files"`
}

type stamp struct {
	Inode   uint64 `json:"inode"`
	Size    int64  `json:"size"`
	MtimeNS int64  `json:"mtime_ns"`
}

func (m memo) encode() []byte {
	data, err := json.Marshal(m)
	if err != nil { // numbers and file names always encode
		return nil
	}
	return append(data, '\n')
}

func stampOf(path string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return stamp{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return stamp{st.Ino, st.Size, st.Mtim.Nano()}, nil
}

// Verify sees that the files of a snapshot are what its digest says. It reads
// them only when they have changed since it, or Commit, last did. The error is
// a *DigestError when a file is not what it should be.
func (s *Store) Verify(ctx context.Context, snap Snapshot) error {
	if verified(snap) {
		return nil
	}
	verdict, err := verify(ctx, snap)
	if err != nil {
		return fmt.Errorf("verify snapshot %s: %w", snap.ref(), err)
	}
	if err = s.files.replace(filepath.Join(snap.dir, memoFile), verdict.encode()); err != nil {
		s.logger.WarnContext(ctx, "verdict not remembered", "snapshot", snap.ref(), "error", err)
	}
	return nil
}

// verified reports whether the memo holds.
func verified(snap Snapshot) bool {
	data, err := readFile(filepath.Join(snap.dir, memoFile))
	if err != nil {
		return false
	}
	var m memo
	if decodeStrict(data, &m, &m.Version) != nil {
		return false
	}
	for _, c := range snap.Manifest.contents() {
		now, err := stampOf(filepath.Join(snap.dir, c.name))
		if err != nil || m.Files[c.name] != now || now.Size != c.Size {
			return false
		}
	}
	return true
}

// verify reads everything.
func verify(ctx context.Context, snap Snapshot) (memo, error) {
	sums, stamps, err := hashAll(ctx, snap.dir)
	if err != nil {
		return memo{}, err
	}
	for _, c := range snap.Manifest.contents() {
		if got := sums[c.name]; got != c.File {
			return memo{}, &DigestError{File: filepath.Join(snap.dir, c.name), Want: c.Digest, Got: got.Digest}
		}
	}
	return stamps, nil
}

// hashAll reads the files of a snapshot. A file that changes meanwhile gets a
// stamp that will not match.
func hashAll(ctx context.Context, dir string) (map[string]File, memo, error) {
	sums, m := map[string]File{}, memo{Version: Version, Files: map[string]stamp{}}
	for _, name := range []string{memoryFile, deviceFile} {
		path := filepath.Join(dir, name)
		before, err := stampOf(path)
		if err != nil {
			return nil, memo{}, err
		}
		if sums[name], err = hashFile(ctx, path); err != nil {
			return nil, memo{}, err
		}
		m.Files[name] = before
	}
	return sums, m, nil
}

// hashFile returns a regular file's digest and size.
func hashFile(ctx context.Context, path string) (File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return File{}, err
	}
	defer func() { _ = f.Close() }() // only read
	st, err := f.Stat()
	if err != nil {
		return File{}, err
	}
	if !st.Mode().IsRegular() {
		return File{}, fmt.Errorf("%w: %s is no regular file", errdef.ErrUnavailable, path)
	}
	h := sha256.New()
	size, err := io.CopyBuffer(h, &reader{ctx: ctx, f: f, total: st.Size()}, make([]byte, 1<<20))
	if err != nil {
		return File{}, err
	}
	return File{Digest: digestPrefix + hex.EncodeToString(h.Sum(nil)), Size: size}, nil
}

// reader reads a file until ctx ends, and tells how far it is.
type reader struct {
	ctx            context.Context // of the one call that reads
	f              *os.File
	done, reported int64
	total          int64
}

const reportEvery = 32 << 20

func (r *reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.f.Read(p)
	r.done += int64(n)
	if r.done-r.reported >= reportEvery {
		r.reported = r.done
		progress.ReportAmount(r.ctx, step, "reading "+filepath.Base(r.f.Name()), r.done, r.total)
	}
	return n, err
}

// Problem is something wrong with the store.
type Problem struct {
	// Object is what it is about: a tag, a digest, or a path in the store.
	Object string `json:"object"`
	// Text says what is wrong.
	Text string `json:"problem"`
}

// Check reads the whole store again and returns all that is wrong with it. A
// snapshot cannot be removed while Check reads it.
func (s *Store) Check(ctx context.Context) ([]Problem, error) {
	c := checker{store: s}
	for _, check := range []func(context.Context) error{c.top, c.tags, c.objects} {
		if err := check(ctx); err != nil {
			return nil, fmt.Errorf("check snapshots: %w", err)
		}
	}
	return c.problems, nil
}

type checker struct {
	store    *Store
	problems []Problem
}

func (c *checker) add(object, text string) { c.problems = append(c.problems, Problem{object, text}) }

func (c *checker) top(context.Context) error {
	entries, err := os.ReadDir(c.store.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains([]string{objectsDir, tagsDir, stagingDir, trashDir, lockFile}, e.Name()) {
			c.add(e.Name(), "not a part of the store")
		}
	}
	return nil
}

func (c *checker) tags(context.Context) error {
	tags, err := c.store.tags()
	if err != nil {
		return err
	}
	names, err := c.store.list(tagsDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.ContainsFunc(tags, func(tag string) bool { return tag+tagSuffix == name }) && !durable.IsTemp(name) {
			c.add(filepath.Join(tagsDir, name), "not a tag")
		}
	}
	for _, tag := range tags {
		t, tagErr := c.store.readTag(tag)
		switch {
		case errors.Is(tagErr, errdef.ErrNotFound): // removed meanwhile
		case tagErr != nil:
			c.add(tag, tagErr.Error())
		default:
			c.target(tag, t.Digest)
		}
	}
	return nil
}

// target sees that there is something that the tag points at; what that is
// like is told once, of the object.
func (c *checker) target(tag, digest string) {
	_, err := os.Lstat(c.store.objectPath(digest))
	if !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if now, againErr := c.store.readTag(tag); againErr == nil && now.Digest == digest {
		c.add(tag, "points at "+digest+", which is not there")
	}
}

func (c *checker) objects(ctx context.Context) error {
	names, err := c.store.list(objectsDir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if checkDigest(digestPrefix+name) != nil {
			c.add(filepath.Join(objectsDir, name), "not an object")
			continue
		}
		if err = c.object(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// object reports what is wrong with one object, unless it is removed
// meanwhile.
func (c *checker) object(ctx context.Context, name string) error {
	snap := Snapshot{Digest: digestPrefix + name, dir: c.store.path(objectsDir, name)}
	pin, err := c.store.Pin(snap)
	if err == nil {
		defer func() { _ = pin.Close() }() // only read
		err = c.pinned(ctx, snap)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil {
		return nil
	}
	if _, statErr := os.Lstat(snap.dir); errors.Is(statErr, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, errdef.ErrNotFound) {
		err = errors.New("has no manifest")
	}
	c.add(snap.Digest, err.Error())
	return c.store.forget(snap)
}

// forget drops a verdict that has proved wrong: of a file that changed on the
// disk without anybody's writing to it.
func (s *Store) forget(snap Snapshot) error {
	err := s.files.remove(filepath.Join(snap.dir, memoFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (c *checker) pinned(ctx context.Context, snap Snapshot) error {
	m, err := c.store.readObject(snap.Digest)
	if err != nil {
		return err
	}
	snap.Manifest = m
	progress.Report(ctx, step, "checking "+snap.Digest)
	if _, err = verify(ctx, snap); err != nil {
		return err
	}
	if m.Parent != "" {
		if _, err = os.Lstat(c.store.objectPath(m.Parent)); err != nil {
			return fmt.Errorf("parent %s: %w", m.Parent, err)
		}
	}
	return c.undeclared(snap)
}

func (c *checker) undeclared(snap Snapshot) error {
	entries, err := os.ReadDir(snap.dir)
	for _, e := range entries {
		if !slices.Contains([]string{manifestFile, memoryFile, deviceFile, memoFile}, e.Name()) && !durable.IsTemp(e.Name()) {
			c.add(filepath.Join(objectsDir, filepath.Base(snap.dir), e.Name()), "not a part of the snapshot")
		}
	}
	return err
}
