package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/progress"
)

// step is what this package's progress events are about.
const step = "snapshot"

// Stage is a snapshot being written: a directory that belongs to its writer
// until Commit or Abort, and a claim on its tag. It is not safe for concurrent
// use.
type Stage struct {
	store   *Store
	root    root
	replace bool
	dir     string
	claim   *os.File // the directory, locked; nil when the stage is over
}

// Stage begins a snapshot under a new tag. It returns errdef.ErrConflict while
// another writes that tag and errdef.ErrExists when there is such a tag.
// Always Abort the stage in the end.
func (s *Store) Stage(ctx context.Context, tag string) (*Stage, error) {
	r, err := s.tagRoot(tag)
	if err != nil {
		return nil, err
	}
	return s.stage(ctx, r, false)
}

// StageReplace is Stage for a tag that may exist: it points at the old
// snapshot until Commit, which removes that one if nothing else names it.
func (s *Store) StageReplace(ctx context.Context, tag string) (*Stage, error) {
	r, err := s.tagRoot(tag)
	if err != nil {
		return nil, err
	}
	return s.stage(ctx, r, true)
}

func (s *Store) stage(ctx context.Context, r root, replace bool) (*Stage, error) {
	st := &Stage{store: s, root: r, replace: replace, dir: s.path(stagingDir, r.staging())}
	if err := s.locked(ctx, st.claimLocked); err != nil {
		return nil, err
	}
	return st, nil
}

// claimLocked makes the stage's directory, over what a dead writer left.
func (st *Stage) claimLocked() error {
	s := st.store
	if err := st.checkRoot(); err != nil {
		return err
	}
	old, err := lockDir(st.dir, false)
	switch {
	case errors.Is(err, errdef.ErrConflict):
		return st.beingWritten()
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("stage snapshot %s: %w", st.root.name, err)
	default:
		if err = errors.Join(s.files.removeAll(st.dir), durable.Unlock(old)); err != nil {
			return fmt.Errorf("stage snapshot %s: %w", st.root.name, err)
		}
	}
	if err = s.files.mkdir(st.dir); err != nil {
		return fmt.Errorf("stage snapshot %s: %w", st.root.name, err)
	}
	if st.claim, err = lockDir(st.dir, false); err != nil {
		return errors.Join(fmt.Errorf("stage snapshot %s: %w", st.root.name, err), s.files.removeAll(st.dir))
	}
	return nil
}

func (st *Stage) beingWritten() error {
	return errdef.WithHint(fmt.Errorf("%w: snapshot %s is being written", errdef.ErrConflict, st.root.name),
		"wait until it is ready, or choose another tag")
}

// checkRoot fails when the tag is there and is not to be replaced.
func (st *Stage) checkRoot() error {
	if st.replace {
		return nil
	}
	_, err := os.Lstat(st.root.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stage snapshot %s: %w", st.root.name, err)
	}
	return errdef.WithHint(fmt.Errorf("snapshot %s: %w", st.root.name, errdef.ErrExists),
		"remove it with tine snapshot rm "+st.root.name+", or choose another tag")
}

// Dir is the stage's directory. At Commit it may hold the memory or a layer,
// the device state and the files of a disk, and nothing else.
func (st *Stage) Dir() string { return st.dir }

// MemoryPath is where the machine's memory is to be written.
func (st *Stage) MemoryPath() string { return filepath.Join(st.dir, memoryFile) }

// LayerPath is where, instead of the memory, the pages are to be written in
// which it differs from that of the manifest's parent.
func (st *Stage) LayerPath() string { return filepath.Join(st.dir, layerFile) }

// DevicePath is where the device state is to be written.
func (st *Stage) DevicePath() string { return filepath.Join(st.dir, deviceFile) }

// Commit makes the stage a snapshot: it fills in m's version and files, writes
// all to disk, and points the tag at it. Nobody may write to the files any
// more. When Commit fails the store is as it was, but at the worst for an
// object without a tag, which is left to GC.
func (st *Stage) Commit(ctx context.Context, m Manifest, facts Facts) (Snapshot, error) {
	if st.claim == nil {
		return Snapshot{}, fmt.Errorf("%w: commit snapshot %s: the stage is over", errdef.ErrInvalid, st.root.name)
	}
	snap, err := st.commit(ctx, m, facts)
	if err != nil {
		return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", st.root.name, err)
	}
	return snap, nil
}

func (st *Stage) commit(ctx context.Context, m Manifest, facts Facts) (Snapshot, error) {
	if err := st.checkNames(); err != nil {
		return Snapshot{}, err
	}
	digest, err := st.seal(ctx, &m)
	if err != nil {
		return Snapshot{}, err
	}
	if facts.CreatedAt.IsZero() {
		facts.CreatedAt = now()
	}
	snap := Snapshot{
		Tag: st.root.tag(), Digest: digest, Status: StatusReady, Manifest: m, Facts: facts,
		dir: st.store.objectPath(digest),
	}
	if err = st.store.locked(ctx, func() error { return st.publishLocked(&snap) }); err != nil {
		return Snapshot{}, err
	}
	return snap, nil
}

// checkNames fails when there is a file that the manifest will not name.
func (st *Stage) checkNames() error {
	entries, err := os.ReadDir(st.dir)
	if err != nil {
		return err
	}
	disk, err := st.diskNames()
	if err != nil {
		return err
	}
	names := append([]string{memoryFile, layerFile, deviceFile, manifestFile, memoFile}, disk...)
	for _, e := range entries {
		known := slices.Contains(names, e.Name())
		if !known || !e.Type().IsRegular() {
			return fmt.Errorf("%w: unexpected file %s", errdef.ErrInvalid, filepath.Join(st.dir, e.Name()))
		}
	}
	return nil
}

// seal completes the manifest and brings the whole stage to the disk, so that
// little is left to do under the store's lock.
func (st *Stage) seal(ctx context.Context, m *Manifest) (digest string, err error) {
	content, err := st.finish(ctx, m)
	if err != nil {
		return "", err
	}
	m.Version = Version
	disk, err := st.diskNames()
	if err != nil {
		return "", err
	}
	progress.Report(ctx, step, "writing to disk")
	var synced errgroup.Group // the disk works while the processor does
	synced.Go(func() error { return st.syncAll(append([]string{content, deviceFile}, disk...)) })
	sums, stamps, err := st.hashStage(ctx, content, disk)
	if err = errors.Join(err, synced.Wait()); err != nil {
		return "", err
	}
	m.Memory, m.Layer, m.Device, m.Disk = sums[memoryFile], sums[layerFile], sums[deviceFile], nil
	for _, name := range disk {
		m.Disk = append(m.Disk, sums[name])
	}
	data, digest, err := m.encode()
	if err != nil {
		return "", err
	}
	if err = st.store.files.write(filepath.Join(st.dir, memoFile), stamps.encode()); err != nil {
		return "", err
	}
	st.store.hashed.note(m, stamps)
	return digest, st.store.files.write(filepath.Join(st.dir, manifestFile), data)
}

func (st *Stage) syncAll(names []string) error {
	for _, name := range names {
		if err := st.store.files.syncFile(filepath.Join(st.dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// finish makes the memory ready to be hashed, or sees that there is a whole
// layer that can stand on the parent, and returns the one's or other's name.
func (st *Stage) finish(ctx context.Context, m *Manifest) (name string, err error) {
	_, err = os.Lstat(st.LayerPath())
	if errors.Is(err, fs.ErrNotExist) {
		return memoryFile, st.punch(ctx)
	}
	if err != nil {
		return "", err
	}
	if _, err = os.Lstat(st.MemoryPath()); !errors.Is(err, fs.ErrNotExist) {
		return "", errors.Join(fmt.Errorf("%w: both memory and a layer", errdef.ErrInvalid), err)
	}
	chain, err := st.below(m)
	if err != nil {
		return "", err
	}
	return layerFile, checkLayer(st.LayerPath(), chain[0].Manifest.Memory.Size)
}

// below returns the chain that a layer is to stand on.
func (st *Stage) below(m *Manifest) ([]Snapshot, error) {
	if m.Parent == "" {
		return nil, fmt.Errorf("%w: a layer without a parent", errdef.ErrInvalid)
	}
	if err := checkDigest(m.Parent); err != nil {
		return nil, fmt.Errorf("parent: %w", err)
	}
	parent, err := st.store.load(m.Parent, nil)
	if err != nil {
		return nil, fmt.Errorf("parent: %w", err)
	}
	if err = m.fits(&parent.Manifest); err != nil {
		return nil, err
	}
	if parent.Depth >= MaxDepth {
		return nil, tooDeep()
	}
	return st.store.chain(parent, nil)
}

// checkLayer sees that a layer is whole, as far as that shows without reading
// its pages, and that it is one of a memory of that size.
func checkLayer(path string, memory int64) error {
	l, err := guestmem.OpenLayer(path)
	if err != nil {
		return err
	}
	if l.Memory() != memory {
		err = fmt.Errorf("%w: layer of a memory of %d bytes, its parent has %d", errdef.ErrInvalid, l.Memory(), memory)
	}
	return errors.Join(err, l.Close())
}

// punch makes holes of the memory's pages of zeros, where holes can be made.
func (st *Stage) punch(ctx context.Context) error {
	progress.Report(ctx, step, "dropping pages of zeros")
	f, err := os.OpenFile(st.MemoryPath(), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = linux.PunchZeros(ctx, f)
	if errors.Is(err, errdef.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

// publishLocked gives the object its name, then points the tag at it. Dying
// in between leaves an object without a tag, which GC removes.
func (st *Stage) publishLocked(snap *Snapshot) error {
	if err := st.checkRoot(); err != nil {
		return err
	}
	m := &snap.Manifest
	switch {
	case m.Layered(): // again: only now can nobody take it away
		chain, err := st.below(m)
		if err != nil {
			return err
		}
		snap.Depth = len(chain)
	case m.Parent != "":
		if _, err := st.store.readObject(m.Parent); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
	}
	tag := tagFile{Version: Version, Digest: snap.Digest, Facts: snap.Facts}
	if _, err := tag.encode(); err != nil {
		return err
	}
	err := st.publishObject(snap.Digest)
	if err == nil {
		err = st.pointLocked(&tag)
	}
	if err != nil { // for want of room, perhaps, which the object takes
		err = errors.Join(err, st.store.dropUnusedLocked(snap.Digest))
	}
	return err
}

// pointLocked points the tag at an object, and tidies up.
func (st *Stage) pointLocked(tag *tagFile) error {
	data, err := tag.encode()
	if err != nil {
		return err
	}
	old, oldErr := st.root.read()
	if err = st.store.files.write(st.root.path, data); err != nil {
		return err
	}
	if oldErr != nil || old.Digest == tag.Digest {
		old.Digest = ""
	}
	st.tidyLocked(old.Digest)
	return nil
}

// publishObject moves the stage to its name, or drops it for an equal one.
func (st *Stage) publishObject(digest string) error {
	s := st.store
	final := s.objectPath(digest)
	_, err := s.readObject(digest)
	if err == nil {
		return nil // and Abort removes the stage
	}
	if _, statErr := os.Lstat(final); statErr == nil { // damaged: the stage takes its place
		if err = s.trashObject(digest); err != nil {
			return err
		}
	}
	return s.files.commitDir(st.dir, final)
}

// Abort gives the tag up and removes the stage. It does nothing after a Commit
// that succeeded, nor when it is called again.
func (st *Stage) Abort() error {
	if st.claim == nil {
		return nil
	}
	var err error
	// After Commit the directory is an object, unless there was an equal one.
	if same, nameErr := durable.Names(st.dir, st.claim); same || nameErr != nil {
		err = errors.Join(nameErr, st.store.files.removeAll(st.dir))
	}
	err = errors.Join(err, durable.Unlock(st.claim))
	st.claim = nil
	if err != nil {
		return fmt.Errorf("abort snapshot %s: %w", st.root.name, err)
	}
	return nil
}

// tidyLocked removes what a commit has made superfluous: the stage, if there
// was an equal object, and the object that the tag pointed at before. The
// snapshot is committed by then: what fails is left to GC.
func (st *Stage) tidyLocked(replaced string) {
	s := st.store
	err := st.Abort()
	if replaced != "" {
		err = errors.Join(err, s.dropUnusedLocked(replaced))
	}
	if err != nil {
		s.logger.Warn("left for garbage collection", "snapshot", st.root.name, "error", err)
	}
}
