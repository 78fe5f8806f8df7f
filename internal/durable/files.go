package durable

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// files are the operations that this package is made of. Tests put a model of
// a disk that loses power under it.
type files interface {
	// createTemp makes a new file with a temporary name in dir.
	createTemp(dir string, perm fs.FileMode) (temp, error)
	// rename replaces newName; renameNew fails with EEXIST when it is there.
	rename(oldName, newName string) error
	renameNew(oldName, newName string) error
	remove(name string) error
	// removeStale removes a temporary file that has no live writer.
	removeStale(name string) error
	// sync waits for a file's content or a directory's names.
	sync(name string) error
	list(dir string) ([]fs.DirEntry, error)
}

// temp is a temporary file that belongs to a writer until it is released.
type temp interface {
	Name() string
	Write(p []byte) (int, error)
	Sync() error
	release() error
}

const tempPrefix = ".tine-tmp-"

// IsTemp reports whether a file of that name belongs to a write that is under
// way, or to one that crashed.
func IsTemp(name string) bool { return strings.HasPrefix(name, tempPrefix) }

type osFiles struct{}

// createTemp locks the file that it makes, so that removeStale can tell it
// from a leftover. A file that removeStale took between creation and lock has
// no name any more, and is made again.
func (f osFiles) createTemp(dir string, perm fs.FileMode) (temp, error) {
	for {
		file, err := os.OpenFile(filepath.Join(dir, tempPrefix+rand.Text()), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return nil, err
		}
		named, err := claim(file, perm)
		if err == nil && named {
			return osTemp{file}, nil
		}
		_ = file.Close() // nothing was written
		if err != nil {
			return nil, errors.Join(err, f.remove(file.Name()))
		}
	}
}

// claim locks a fresh temporary file and says whether it still has a name.
func claim(file *os.File, perm fs.FileMode) (named bool, err error) {
	if err = flock(file, unix.LOCK_EX); err != nil {
		return false, err
	}
	if err = file.Chmod(perm); err != nil {
		return false, err
	}
	return linked(file)
}

func linked(file *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return false, fmt.Errorf("stat %s: %w", file.Name(), err)
	}
	return st.Nlink > 0, nil
}

func (osFiles) rename(oldName, newName string) error { return os.Rename(oldName, newName) }

// renameNew falls back to rename where the filesystem cannot exclude: renaming
// a directory onto one that is not empty fails everywhere.
func (osFiles) renameNew(oldName, newName string) error {
	err := unix.Renameat2(unix.AT_FDCWD, oldName, unix.AT_FDCWD, newName, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		err = unix.Rename(oldName, newName)
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: oldName, New: newName, Err: err}
	}
	return nil
}

func (osFiles) remove(name string) error { return os.Remove(name) }

func (f osFiles) removeStale(name string) error {
	file, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }() // only read
	err = TryLockFile(file, false)
	if errors.Is(err, errdef.ErrConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	if err = f.remove(name); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (osFiles) sync(name string) error {
	file, err := os.Open(name)
	if err != nil {
		return err
	}
	err = file.Sync()
	if errors.Is(err, unix.EINVAL) { // a filesystem that has nothing to sync here
		err = nil
	}
	return errors.Join(err, file.Close())
}

func (osFiles) list(dir string) ([]fs.DirEntry, error) { return os.ReadDir(dir) }

type osTemp struct{ *os.File }

// release unlocks before it closes: a process forked in this instant has a
// copy of the descriptor, and would keep the lock until its exec.
func (t osTemp) release() error { return Unlock(t.File) }
