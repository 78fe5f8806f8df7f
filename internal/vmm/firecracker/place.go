package firecracker

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
)

// place is the directory in which Firecracker makes its sockets and files: its own
// in the jail, or else the machine's.
type place interface {
	Dial(ctx context.Context, name string) (net.Conn, error)
	Read(name string, most int64) ([]byte, error)
	Remove(name string) error
	Close() error
}

func openPlace(h vmm.Handle) (place, error) {
	if !h.Jailed {
		root, err := os.OpenRoot(h.Dir)
		if err != nil {
			return nil, err
		}
		return folder{root}, nil
	}
	return jail.OpenDir(h.PID, h.StartTime)
}

// folder is a machine's directory. A Firecracker without a jail has the daemon's
// rights, and need not lead it astray.
type folder struct{ *os.Root }

// Dial connects to a socket in the directory.
func (f folder) Dial(ctx context.Context, name string) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", filepath.Join(f.Name(), name))
}

// Read reads a regular file of at most that many bytes.
func (f folder) Read(name string, most int64) ([]byte, error) {
	info, err := f.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: %s is no regular file", errdef.ErrInvalid, name)
	}
	file, err := f.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0) // no pipe holds us up
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // only read
	return readAll(file, most)
}
