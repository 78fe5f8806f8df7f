package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
)

// What Firecracker opens and makes, by the names that it is told. All are seen
// from its working directory, so that they mean something else to each machine,
// and can be part of a snapshot.
const (
	kernelFile = "kernel"
	initrdFile = "initrd"
	rootFile   = "root"
	diskName   = "disk"
	memoryFile = "memory" // what is mapped, or what a template's memory is written to
	deviceFile = "device" // the state to load
	// Made by Firecracker.
	apiSocket   = "api.sock"
	agentSocket = "agent.sock"
	stateFile   = "state"
	// nowhere is a place where no file can be made.
	nowhere = "nowhere/memory"
)

// kvmDevice is the host's.
const kvmDevice = "/dev/kvm"

// names are the files of one machine. In the jail they are open here, and handed
// over when they are asked for; otherwise they are links.
type names struct {
	jailed bool
	dir    string // where links go
	files  map[string]*os.File
	copies map[string]*os.File // somebody else's to close
}

// add makes path what Firecracker knows by name. In the jail it can do with the
// file no more than flags say.
func (n *names) add(name, path string, flags int) error {
	if !n.jailed {
		target, err := filepath.Abs(path)
		if err == nil {
			err = os.Symlink(target, filepath.Join(n.dir, name))
		}
		return err
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	n.files[name] = f
	return nil
}

// copy is add for a small file, f, of which a jailed Firecracker gets a copy in its
// own directory: versions before 1.14 look for device state by its name (stat(2))
// before they open it, which nobody does for them.
func (n *names) copy(name, path string, f *os.File) error {
	if !n.jailed {
		return n.add(name, path, os.O_RDONLY)
	}
	n.copies[name] = f
	return nil
}

// device is for what has the same name for everyone. It is at path.
func (n *names) device(name, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	if !n.jailed { // Firecracker will open it by itself; now it is known that it can
		return f.Close()
	}
	n.files[name] = f
	return nil
}

// close closes all that is open here: what was handed over is Firecracker's own.
func (n *names) close() error {
	var errs []error
	for _, f := range n.files {
		errs = append(errs, f.Close())
	}
	n.files = nil
	return errors.Join(errs...)
}

// whole gives a process without a jail the memory that fill completes: a copy of
// the image in the machine's directory. In the jail Firecracker is stopped at the
// right moment instead; see fillThere.
func (l *launcher) whole(ctx context.Context, image string, fill fillFunc) (_ string, err error) {
	dir, err := filepath.EvalSymlinks(l.spec.Dir)
	if err == nil {
		dir, err = filepath.Abs(dir)
	}
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "memory.whole")
	if err = copySparse(ctx, path, image); err != nil {
		return "", fmt.Errorf("copy memory: %w", err)
	}
	return path, fillFile(ctx, path, fill)
}

// fillFile completes a file of memory, which this process maps meanwhile. Its path
// is as the kernel prints it.
func fillFile(ctx context.Context, path string, fill fillFunc) (err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map memory: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(mem)) }()
	ranges, err := linux.FindMapping(os.Getpid(), path)
	if err != nil {
		return err
	}
	if err = fill(ctx, guestmem.Space{PID: os.Getpid(), Ranges: ranges}); err != nil {
		return fmt.Errorf("fill memory: %w", err)
	}
	return nil
}
