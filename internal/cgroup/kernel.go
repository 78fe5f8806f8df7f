package cgroup

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// maxFile bounds what is read of a kernel's file. The longest are the mounts of
// a host of many containers, and the processes of a fork bomb.
const maxFile = 4 << 20

// kernel is what changes control groups. Tests have another one, which works
// on ordinary directories.
type kernel interface {
	mkdir(dir string) error
	rmdir(dir string) error
	// write replaces what is in a file that exists.
	write(file, text string) error
}

type linuxKernel struct{}

func (linuxKernel) mkdir(dir string) error { return os.Mkdir(dir, 0o750) }

// rmdir is not os.Remove, which would try to unlink it first.
func (linuxKernel) rmdir(dir string) error {
	if err := unix.Rmdir(dir); err != nil {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// write makes one call of write, for the kernel takes each as a command.
func (linuxKernel) write(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// readFile is os.ReadFile with a bound: a longer file is an error.
func readFile(file string) ([]byte, error) {
	data, err := readSome(file)
	if err == nil && len(data) > maxFile {
		return nil, fmt.Errorf("%w: %s has more than %d bytes", errdef.ErrExhausted, file, maxFile)
	}
	return data, err
}

// readSome returns the beginning of a file, and one byte more than maxFile when
// there is more.
func readSome(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	_ = f.Close() // only read
	return data, err
}
