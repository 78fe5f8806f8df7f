package fake

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// maxDisks is how many layers of a disk a machine has of its own.
const maxDisks = 8

// diskMark is what a layer of a disk holds, and its number.
const diskMark = "fake disk layer %d\n"

// disk is the scratch disk of a machine: only its files, since no guest writes
// to it. The guest's files are in memory all the same.
type disk struct {
	dir string

	mu   sync.Mutex
	base []string // what the machine was restored from, or booted with
	own  []string // frozen since
	next int
}

// newDisk checks what Engine promises of the files of a disk.
func newDisk(spec vmm.Common, files ...string) (*disk, error) {
	mib := spec.Machine.DiskMiB
	if mib < 0 || mib > 1<<20 || (mib > 0) != (len(files) > 0) {
		return nil, fmt.Errorf("%w: %d files for a disk of %d MiB", errdef.ErrInvalid, len(files), mib)
	}
	for i, path := range files {
		if err := checkDisk(path, i, int64(mib)<<20); err != nil {
			return nil, fmt.Errorf("disk %s: %w", path, err)
		}
	}
	return &disk{dir: spec.Dir, base: files}, nil
}

func checkDisk(path string, i int, size int64) error {
	if i == 0 {
		info, err := os.Stat(path)
		if err == nil && info.Size() != size {
			err = fmt.Errorf("%w: not the raw file of a disk of %d bytes", errdef.ErrInvalid, size)
		}
		return err
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	var n int
	if _, err = fmt.Fscanf(f, diskMark, &n); err != nil {
		return fmt.Errorf("%w: not a layer of a disk: %w", errdef.ErrInvalid, err)
	}
	return nil
}

// PrepareDisk removes the frozen layers when there are many.
func (m *machine) PrepareDisk(context.Context) error {
	if err := m.engine.fails("PrepareDisk"); err != nil {
		return err
	}
	d := m.disk
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.own) < maxDisks {
		return nil
	}
	var errs []error
	for _, path := range d.own {
		errs = append(errs, os.Remove(path))
	}
	d.own = nil
	return errors.Join(errs...)
}

// FreezeDisk makes a new layer, every time.
func (m *machine) FreezeDisk(ctx context.Context) ([]string, error) {
	if err := m.engine.fails("FreezeDisk"); err != nil {
		return nil, err
	}
	paused, err := m.Paused(ctx)
	switch {
	case err != nil:
		return nil, err
	case !paused:
		return nil, fmt.Errorf("%w: freeze the disk of a machine that is not paused", errdef.ErrConflict)
	case len(m.disk.base) == 0:
		return nil, nil
	case m.memory == nil:
		return nil, fmt.Errorf("%w: freeze the disk of a machine that was not restored", errdef.ErrUnsupported)
	}
	return m.disk.freeze()
}

func (d *disk) freeze() ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	path := filepath.Join(d.dir, fmt.Sprintf("disk.%d", d.next))
	if err := os.WriteFile(path, fmt.Appendf(nil, diskMark, d.next), 0o600); err != nil {
		return nil, err
	}
	d.next++
	d.own = append(d.own, path)
	return slices.Concat(d.base, d.own), nil
}
