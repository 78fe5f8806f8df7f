package snapshot

import (
	"bytes"
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
	"github.com/tinevm/tine/internal/guestmem"
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

// Verify sees that the files of a snapshot, and of all that its memory is made
// of, are what their digests say. It reads them only when they have changed
// since it, or Commit, last did. The error is a *DigestError when a file is not
// what it should be.
func (s *Store) Verify(ctx context.Context, snap Snapshot) error {
	chain, err := s.Chain(snap)
	if err != nil {
		return err
	}
	return s.verifyChain(ctx, chain)
}

func (s *Store) verifyChain(ctx context.Context, chain []Snapshot) error {
	for _, snap := range chain {
		if err := s.verifyOne(ctx, snap); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) verifyOne(ctx context.Context, snap Snapshot) error {
	if m, ok := verified(snap); ok {
		s.hashed.note(&snap.Manifest, m)
		return nil
	}
	verdict, err := verify(ctx, snap)
	if err != nil {
		return fmt.Errorf("verify snapshot %s: %w", snap.ref(), err)
	}
	if err = s.files.replace(filepath.Join(snap.dir, memoFile), verdict.encode()); err != nil {
		s.logger.WarnContext(ctx, "verdict not remembered", "snapshot", snap.ref(), "error", err)
	}
	s.hashed.note(&snap.Manifest, verdict)
	return nil
}

// verified returns the memo if it holds.
func verified(snap Snapshot) (m memo, ok bool) {
	data, err := readFile(filepath.Join(snap.dir, memoFile))
	if err != nil {
		return memo{}, false
	}
	if decodeStrict(data, &m, &m.Version) != nil {
		return memo{}, false
	}
	for _, c := range snap.Manifest.contents() {
		now, err := stampOf(filepath.Join(snap.dir, c.name))
		if err != nil || m.Files[c.name] != now || now.Size != c.Size {
			return memo{}, false
		}
	}
	return m, true
}

// verify reads everything.
func verify(ctx context.Context, snap Snapshot) (memo, error) {
	contents := snap.Manifest.contents()
	var names []string
	for _, c := range contents {
		names = append(names, c.name)
	}
	sums, stamps, err := hashAll(ctx, snap.dir, names...)
	if err != nil {
		return memo{}, err
	}
	for _, c := range contents {
		if got := sums[c.name]; got != c.File {
			return memo{}, &DigestError{File: filepath.Join(snap.dir, c.name), Want: c.Digest, Got: got.Digest}
		}
	}
	return stamps, nil
}

// hashAll reads files of a snapshot. A file that changes meanwhile gets a stamp
// that will not match.
func hashAll(ctx context.Context, dir string, names ...string) (map[string]File, memo, error) {
	sums, m := map[string]File{}, memo{Version: Version, Files: map[string]stamp{}}
	for _, name := range names {
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
	size, err := io.CopyBuffer(h, &reader{ctx: ctx, f: f, total: st.Size()}, make([]byte, min(1<<20, max(st.Size(), 1))))
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
	for _, check := range []func(context.Context) error{c.top, c.roots, c.objects} {
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
		if !slices.Contains([]string{objectsDir, tagsDir, heldDir, stagingDir, trashDir, lockFile}, e.Name()) {
			c.add(e.Name(), "not a part of the store")
		}
	}
	return nil
}

func (c *checker) roots(context.Context) error {
	for _, dir := range []string{tagsDir, heldDir} {
		if err := c.strangers(dir); err != nil {
			return err
		}
	}
	roots, err := c.store.roots()
	if err != nil {
		return err
	}
	for _, r := range roots {
		if r.err != nil {
			c.add(r.object(), r.err.Error())
		} else {
			c.target(r)
		}
	}
	return nil
}

// object is what a problem with it is about.
func (r root) object() string {
	if r.held {
		return filepath.Join(heldDir, r.name)
	}
	return r.name
}

func (c *checker) strangers(dir string) error {
	names, err := c.store.names(dir)
	if err != nil {
		return err
	}
	files, err := c.store.list(dir)
	if err != nil {
		return err
	}
	for _, file := range files {
		if !slices.ContainsFunc(names, func(name string) bool { return name+tagSuffix == file }) && !durable.IsTemp(file) {
			c.add(filepath.Join(dir, file), "not a tag")
		}
	}
	return nil
}

// target sees that there is something that the root points at; what that is
// like is told once, of the object.
func (c *checker) target(r root) {
	_, err := os.Lstat(c.store.objectPath(r.file.Digest))
	if !errors.Is(err, fs.ErrNotExist) {
		return
	}
	if now, againErr := r.read(); againErr == nil && now.Digest == r.file.Digest {
		c.add(r.object(), "points at "+r.file.Digest+", which is not there")
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
	if m.Layered() {
		err = c.layered(ctx, snap)
	} else if m.Parent != "" {
		if _, err = os.Lstat(c.store.objectPath(m.Parent)); err != nil {
			err = fmt.Errorf("parent %s: %w", m.Parent, err)
		}
	}
	return errors.Join(err, c.undeclared(snap))
}

// layered reads the layer's pages by its own checksums, and sees that it has a
// chain to stand on. Its parents are looked at as objects of their own.
func (c *checker) layered(ctx context.Context, snap Snapshot) error {
	chain, err := c.store.chain(snap, nil)
	if err != nil {
		return err
	}
	if err = checkLayer(snap.LayerPath(), chain[0].Manifest.Memory.Size); err != nil {
		return err
	}
	l, err := guestmem.OpenLayer(snap.LayerPath())
	if err != nil {
		return err
	}
	if err = errors.Join(l.Verify(ctx), l.Close()); err != nil {
		return err
	}
	return c.flat(ctx, chain)
}

// flat compares the flat image, if there is one that forks would trust, with
// what it was made of.
func (c *checker) flat(ctx context.Context, chain []Snapshot) error {
	snap := chain[len(chain)-1]
	memo, ok := snap.flatMemo()
	if !ok {
		return nil // being made, or to be swept
	}
	err := compareFlat(ctx, chain, memo)
	if err == nil || ctx.Err() != nil {
		return err
	}
	if _, still := snap.flatMemo(); !still { // dropped meanwhile
		return nil
	}
	return errors.Join(err, c.store.removeIfThere(snap.flatMemoPath())) // no fork may trust it any more
}

func compareFlat(ctx context.Context, chain []Snapshot, memo flatMemo) error {
	path := chain[len(chain)-1].FlatPath()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	img, err := openImage(chain)
	if err != nil {
		return err
	}
	defer func() { _ = img.Close() }() // only read
	if memo.Size != img.Size() {
		return fmt.Errorf("%w: %s has %d bytes, the memory %d", errdef.ErrUnavailable, path, memo.Size, img.Size())
	}
	sum := sha256.New()
	flat := io.TeeReader(&reader{ctx: ctx, f: f, total: memo.Size}, sum)
	if err = sameContent(flat, io.NewSectionReader(img, 0, img.Size())); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if got := digestPrefix + hex.EncodeToString(sum.Sum(nil)); got != memo.Digest {
		return &DigestError{File: path, Want: memo.Digest, Got: got}
	}
	return nil
}

// sameContent reads both to their ends, unless they differ.
func sameContent(a, b io.Reader) error {
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; {
		n, err := io.ReadFull(a, p)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
		k, otherErr := io.ReadFull(b, q)
		if otherErr != nil && !errors.Is(otherErr, io.EOF) && !errors.Is(otherErr, io.ErrUnexpectedEOF) {
			return otherErr
		}
		if !bytes.Equal(p[:n], q[:k]) {
			return fmt.Errorf("%w: it differs from the memory and layers it was made of, after byte %d", errdef.ErrUnavailable, at)
		}
		if n < len(p) {
			return nil
		}
		at += int64(n)
	}
}

// fileNames are those that an object's directory may have.
func (s Snapshot) fileNames() []string {
	names := []string{manifestFile, memoFile}
	for _, f := range s.Manifest.contents() {
		names = append(names, f.name)
	}
	if s.Manifest.Layered() {
		names = append(names, flatFile, flatMemoFile)
	}
	return names
}

func (c *checker) undeclared(snap Snapshot) error {
	entries, err := os.ReadDir(snap.dir)
	for _, e := range entries {
		if !slices.Contains(snap.fileNames(), e.Name()) && !durable.IsTemp(e.Name()) {
			c.add(filepath.Join(objectsDir, filepath.Base(snap.dir), e.Name()), "not a part of the snapshot")
		}
	}
	return err
}
