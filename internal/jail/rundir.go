package jail

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// RunDir is the directory of a program with files of its own (Config.OwnFiles),
// as the program sees it. It is empty and the program's working directory when
// that starts, in memory that counts as the program's, and ends with it.
const RunDir = "/run"

// What a RunDir has room for: sockets, and the state of a machine's devices.
const (
	runBytes  = 16 << 20
	runInodes = 64
)

// runFlags are those of its mount.
const runFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// mountPoints are the directories of a root that something is mounted on.
func (c Config) mountPoints() []string {
	if !c.OwnFiles {
		return nil
	}
	return []string{RunDir}
}

// mountRun makes the directory of a program that will be user, and goes there.
func mountRun(user int) error {
	options := fmt.Sprintf("size=%d,nr_inodes=%d,mode=0700,uid=%d,gid=%d", runBytes, runInodes, user, user)
	if err := unix.Mount("tine", RunDir, "tmpfs", runFlags, options); err != nil {
		return fmt.Errorf("mount %s: %w", RunDir, err)
	}
	return unix.Chdir(RunDir)
}

// copyIntoRun makes a file in RunDir of what is in another, for the program to
// read. Whoever does so may be another user than the program will be.
func copyIntoRun(name string, from int) (err error) {
	if name != filepath.Base(name) || name == "." || name == ".." {
		return fmt.Errorf("%w: file name %q", errdef.ErrInvalid, name)
	}
	to, err := os.OpenFile(filepath.Join(RunDir, name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	fd, err := unix.FcntlInt(uintptr(from), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	src := os.NewFile(uintptr(fd), name)
	defer func() { _ = src.Close() }() // only read
	if _, err = io.Copy(to, io.LimitReader(src, runBytes)); err != nil {
		return err
	}
	return to.Chmod(0o444)
}
