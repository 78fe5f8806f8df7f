package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
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
	tag     string
	replace bool
	dir     string
	claim   *os.File // the directory, locked; nil when the stage is over
}

// Stage begins a snapshot under a new tag. It returns errdef.ErrConflict while
// another writes that tag and errdef.ErrExists when there is such a tag.
// Always Abort the stage in the end.
func (s *Store) Stage(ctx context.Context, tag string) (*Stage, error) {
	return s.stage(ctx, tag, false)
}

// StageReplace is Stage for a tag that may exist: it points at the old
// snapshot until Commit, which removes that one if nothing else names it.
func (s *Store) StageReplace(ctx context.Context, tag string) (*Stage, error) {
	return s.stage(ctx, tag, true)
}

func (s *Store) stage(ctx context.Context, tag string, replace bool) (*Stage, error) {
	if err := CheckTag(tag); err != nil {
		return nil, err
	}
	st := &Stage{store: s, tag: tag, replace: replace, dir: s.path(stagingDir, tag)}
	if err := s.locked(ctx, st.claimLocked); err != nil {
		return nil, err
	}
	return st, nil
}

// claimLocked makes the stage's directory, over what a dead writer left.
func (st *Stage) claimLocked() error {
	s := st.store
	if err := st.checkTag(); err != nil {
		return err
	}
	old, err := lockDir(st.dir, false)
	switch {
	case errors.Is(err, errdef.ErrConflict):
		return errdef.WithHint(fmt.Errorf("%w: snapshot %s is being written", errdef.ErrConflict, st.tag),
			"wait until it is ready, or choose another tag")
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("stage snapshot %s: %w", st.tag, err)
	default:
		if err = errors.Join(s.files.removeAll(st.dir), durable.Unlock(old)); err != nil {
			return fmt.Errorf("stage snapshot %s: %w", st.tag, err)
		}
	}
	if err = s.files.mkdir(st.dir); err != nil {
		return fmt.Errorf("stage snapshot %s: %w", st.tag, err)
	}
	if st.claim, err = lockDir(st.dir, false); err != nil {
		return errors.Join(fmt.Errorf("stage snapshot %s: %w", st.tag, err), s.files.removeAll(st.dir))
	}
	return nil
}

// checkTag fails when the tag is there and is not to be replaced.
func (st *Stage) checkTag() error {
	path, err := st.store.tagPath(st.tag)
	if err != nil || st.replace {
		return err
	}
	_, err = os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("stage snapshot %s: %w", st.tag, err)
	}
	return errdef.WithHint(fmt.Errorf("snapshot %s: %w", st.tag, errdef.ErrExists),
		"remove it with tine snapshot rm "+st.tag+", or choose another tag")
}

// Dir is the stage's directory. At Commit it may hold the memory and the
// device state, and nothing else.
func (st *Stage) Dir() string { return st.dir }

// MemoryPath is where the machine's memory is to be written.
func (st *Stage) MemoryPath() string { return filepath.Join(st.dir, memoryFile) }

// DevicePath is where the device state is to be written.
func (st *Stage) DevicePath() string { return filepath.Join(st.dir, deviceFile) }

// Commit makes the stage a snapshot: it fills in m's version and files, writes
// all to disk, and points the tag at it. Nobody may write to the files any
// more. When Commit fails the store is as it was, but perhaps for an object
// without a tag, and the stage is there for another try or for Abort.
func (st *Stage) Commit(ctx context.Context, m Manifest, facts Facts) (Snapshot, error) {
	if st.claim == nil {
		return Snapshot{}, fmt.Errorf("%w: commit snapshot %s: the stage is over", errdef.ErrInvalid, st.tag)
	}
	snap, err := st.commit(ctx, m, facts)
	if err != nil {
		return Snapshot{}, fmt.Errorf("commit snapshot %s: %w", st.tag, err)
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
		facts.CreatedAt = time.Now().UTC().Truncate(time.Millisecond)
	}
	tag := tagFile{Version: Version, Digest: digest, Facts: facts}
	if err = st.store.locked(ctx, func() error { return st.publishLocked(&m, &tag) }); err != nil {
		return Snapshot{}, err
	}
	return Snapshot{
		Tag: st.tag, Digest: digest, Status: StatusReady, Manifest: m, Facts: facts,
		dir: st.store.objectPath(digest),
	}, nil
}

// checkNames fails when there is a file that the manifest will not name.
func (st *Stage) checkNames() error {
	entries, err := os.ReadDir(st.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		known := slices.Contains([]string{memoryFile, deviceFile, manifestFile, memoFile}, e.Name())
		if !known || !e.Type().IsRegular() {
			return fmt.Errorf("%w: unexpected file %s", errdef.ErrInvalid, filepath.Join(st.dir, e.Name()))
		}
	}
	return nil
}

// seal completes the manifest and brings the whole stage to the disk, so that
// little is left to do under the store's lock.
func (st *Stage) seal(ctx context.Context, m *Manifest) (digest string, err error) {
	if err = st.punch(ctx); err != nil {
		return "", err
	}
	m.Version = Version
	sums, stamps, err := hashAll(ctx, st.dir)
	if err != nil {
		return "", err
	}
	m.Memory, m.Device = sums[memoryFile], sums[deviceFile]
	data, digest, err := m.encode()
	if err != nil {
		return "", err
	}
	progress.Report(ctx, step, "writing to disk")
	for _, path := range []string{st.MemoryPath(), st.DevicePath()} {
		if err = durable.SyncFile(path); err != nil {
			return "", durable.Describe("sync", path, err)
		}
	}
	if err = st.store.files.write(filepath.Join(st.dir, memoFile), stamps.encode()); err != nil {
		return "", err
	}
	return digest, st.store.files.write(filepath.Join(st.dir, manifestFile), data)
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
func (st *Stage) publishLocked(m *Manifest, tag *tagFile) error {
	s := st.store
	if err := st.checkTag(); err != nil {
		return err
	}
	if m.Parent != "" {
		if _, err := s.readObject(m.Parent); err != nil {
			return fmt.Errorf("parent: %w", err)
		}
	}
	path, err := s.tagPath(st.tag)
	if err != nil {
		return err
	}
	data, err := tag.encode()
	if err != nil {
		return err
	}
	old, oldErr := s.readTag(st.tag)
	if err = st.publishObject(tag.Digest); err != nil {
		return err
	}
	if err = s.files.write(path, data); err != nil {
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
		return fmt.Errorf("abort snapshot %s: %w", st.tag, err)
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
		if dropErr := s.dropUnusedLocked(replaced); !errors.Is(dropErr, errdef.ErrConflict) {
			err = errors.Join(err, dropErr)
		}
	}
	if err != nil {
		s.logger.Warn("left for garbage collection", "snapshot", st.tag, "error", err)
	}
}
