// Package durable changes files so that a reader, at any instant and after any
// crash, finds either the old content or the complete new one.
//
// WriteFile and CommitDir survive a power cut; Replace survives a killed
// process only. Locks are flock(2) locks: the kernel drops them when the last
// process that holds the file dies, so a crash never leaves one behind. The
// package knows nothing of what the files mean.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// WriteFile replaces the content of path. When it returns nil the new content
// survives a power cut; when it fails or the machine dies, path has its old
// content or the new one, and never anything between.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	return write(osFiles{}, path, data, perm, true)
}

// Replace is WriteFile without the waiting for the disk: it survives a killed
// process but not a power cut. It is for state that means nothing after a
// reboot.
func Replace(path string, data []byte, perm fs.FileMode) error {
	return write(osFiles{}, path, data, perm, false)
}

// CommitDir publishes the directory stage under the name final, with all that
// is in it on disk first. It returns errdef.ErrExists when final is there
// already, and leaves both as they were. Both names must be on one filesystem.
func CommitDir(stage, final string) error {
	return commitDir(osFiles{}, stage, final)
}

// SyncFile waits until the content of the file is on disk.
func SyncFile(path string) error { return osFiles{}.sync(path) }

// SyncDir waits until the names in dir are on disk: those created, renamed and
// removed before the call.
func SyncDir(dir string) error { return osFiles{}.sync(dir) }

// RemoveTemp removes the temporary files that crashed writers left in dir. It
// touches nothing else, and no file that a live writer still writes.
func RemoveTemp(dir string) error { return removeTemp(osFiles{}, dir) }

func write(f files, path string, data []byte, perm fs.FileMode, sync bool) (err error) {
	defer func() { err = Describe("write", path, err) }()
	dir := filepath.Dir(path)
	tmp, err := f.createTemp(dir, perm)
	if err != nil {
		return err
	}
	if err = fill(tmp, data, sync); err == nil {
		err = f.rename(tmp.Name(), path)
	}
	if err != nil {
		_ = f.remove(tmp.Name()) // the first error is the one to report; RemoveTemp gets the rest
		return errors.Join(err, tmp.release())
	}
	if err = tmp.release(); err != nil || !sync {
		return err
	}
	return f.sync(dir)
}

func fill(tmp temp, data []byte, sync bool) error {
	if _, err := tmp.Write(data); err != nil || !sync {
		return err
	}
	return tmp.Sync()
}

func commitDir(f files, stage, final string) (err error) {
	defer func() { err = Describe("commit", final, err) }()
	if err = syncTree(f, stage); err != nil {
		return err
	}
	if err = f.renameNew(stage, final); err != nil {
		return err
	}
	if err = f.sync(filepath.Dir(final)); err != nil {
		return err
	}
	if filepath.Dir(stage) == filepath.Dir(final) {
		return nil
	}
	return f.sync(filepath.Dir(stage))
}

// syncTree syncs everything under dir, and dir last.
func syncTree(f files, dir string) error {
	entries, err := f.list(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case e.IsDir():
			err = syncTree(f, path)
		case e.Type().IsRegular():
			err = f.sync(path)
		}
		if err != nil {
			return err
		}
	}
	return f.sync(dir)
}

func removeTemp(f files, dir string) error {
	entries, err := f.list(dir)
	if err != nil {
		return fmt.Errorf("remove temporary files of %s: %w", dir, err)
	}
	for _, e := range entries {
		if !IsTemp(e.Name()) || !e.Type().IsRegular() {
			continue
		}
		if rmErr := f.removeStale(filepath.Join(dir, e.Name())); rmErr != nil {
			err = errors.Join(err, rmErr)
		}
	}
	return err
}

// Describe adds to a file operation's error what was tried, and the category
// where the cause has one: errdef.ErrExhausted for a full disk, errdef.ErrExists
// for a name that is taken. It keeps nil.
func Describe(verb, path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: %s %s: %w", errdef.ErrExhausted, verb, path, err)
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOTEMPTY):
		return fmt.Errorf("%w: %s %s: %w", errdef.ErrExists, verb, path, err)
	default:
		return fmt.Errorf("%s %s: %w", verb, path, err)
	}
}
