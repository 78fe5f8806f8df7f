package jail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
)

// Dir is the RunDir of a program, from outside. The program is hostile: what it
// has put there never leads anywhere else, but what a file says is its own
// business, and may change at any time. A name is that of an entry, not a path.
// Dir keeps the directory, and nothing of the program's, also when that has ended.
// Its methods are safe for concurrent use; after Close they return os.ErrClosed.
type Dir struct{ dir *os.File }

// OpenDir opens the RunDir of the process pid that started at start, which any
// process of the user that started it can, or root. It returns
// errdef.ErrNotFound when that process has ended, and errdef.ErrInvalid when it
// is no program with files of its own.
func OpenDir(pid int, start uint64) (_ *Dir, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	process, err := linux.OpenProcess(pid, start)
	if err != nil {
		return nil, err
	}
	defer func() { _ = process.Close() }() // it goes on
	// A program in the jail can neither mount nor change its root: what is there is
	// what its launcher has put there.
	root, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root of process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(root) }()
	fd, err := unix.Openat2(root, filepath.Base(RunDir), &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open %s of process %d: %w", RunDir, pid, err)
	}
	d := &Dir{dir: os.NewFile(uintptr(fd), RunDir)}
	u.Add(d.Close)
	if err = checkRun(fd); err != nil {
		return nil, fmt.Errorf("%s of process %d: %w", RunDir, pid, err)
	}
	// It is there still, so pid was its number all the time.
	if err = process.Signal(0); err != nil {
		return nil, err
	}
	return d, nil
}

// checkRun finds out whether fd is a directory as mountRun makes them, and not one
// of the host's.
func checkRun(fd int) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return err
	}
	const flags = unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	if fs.Type != unix.TMPFS_MAGIC || fs.Flags&flags != flags || fs.Blocks*uint64(fs.Bsize) != runBytes || fs.Files != runInodes {
		return fmt.Errorf("%w: not made by a launcher", errdef.ErrInvalid)
	}
	return nil
}

// in does something with the directory, which is not closed meanwhile.
func (d *Dir) in(do func(fd int) error) error {
	conn, err := d.dir.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	err = conn.Control(func(fd uintptr) { doErr = do(int(fd)) })
	return errors.Join(err, doErr)
}

// Close closes the directory. What was opened in it stays open.
func (d *Dir) Close() error { return d.dir.Close() }

// open opens the entry name, if it is of that kind (S_IFREG, S_IFSOCK). What it
// returns may be the program's at the same time.
func (d *Dir) open(name string, flags uint64, kind uint32) (*os.File, error) {
	if name != filepath.Base(name) || name == "." || name == ".." {
		return nil, fmt.Errorf("%w: file name %q", errdef.ErrInvalid, name)
	}
	var fd int
	err := d.in(func(dir int) (err error) {
		fd, err = unix.Openat2(dir, name, &unix.OpenHow{
			Flags:   flags | unix.O_NOFOLLOW | unix.O_CLOEXEC,
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
		})
		return err
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: filepath.Join(RunDir, name), Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != kind {
		err = fmt.Errorf("%w: %s is of kind %o", errdef.ErrInvalid, name, st.Mode&unix.S_IFMT)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Open opens the regular file name for reading. It is the caller's, who bounds
// what he reads of it.
func (d *Dir) Open(name string) (*os.File, error) {
	// Without O_NONBLOCK a program with a lease on its file holds up who opens it.
	return d.open(name, unix.O_RDONLY|unix.O_NONBLOCK, unix.S_IFREG)
}

// Read reads the regular file name, which is errdef.ErrInvalid if it has more than
// most bytes.
func (d *Dir) Read(name string, most int64) ([]byte, error) {
	f, err := d.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%w: %s has more than %d bytes", errdef.ErrInvalid, name, most)
	}
	if err != nil {
		return nil, err
	}
	return data, nil
}

// Remove removes the entry name, which is no directory.
func (d *Dir) Remove(name string) error {
	if name != filepath.Base(name) {
		return fmt.Errorf("%w: file name %q", errdef.ErrInvalid, name)
	}
	if err := d.in(func(dir int) error { return unix.Unlinkat(dir, name, 0) }); err != nil {
		return &os.PathError{Op: "remove", Path: filepath.Join(RunDir, name), Err: err}
	}
	return nil
}

// Dial connects to the socket name. It never waits: the error is os.ErrNotExist
// when there is none yet, unix.ECONNREFUSED when nobody listens there yet (see
// Process.Listens), and unix.EAGAIN when too many wait to be accepted. The
// connection is the caller's.
func (d *Dir) Dial(ctx context.Context, name string) (net.Conn, error) {
	f, err := d.open(name, unix.O_PATH, unix.S_IFSOCK)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // it was only a name
	var dialer net.Dialer
	// What is open leads to the socket that it is, whatever has that name now.
	return dialer.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(int(f.Fd())))
}
