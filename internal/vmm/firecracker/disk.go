package firecracker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// disk gives a machine that boots the raw file of its scratch disk.
func (l *launcher) disk(path string) error {
	if path == "" && l.spec.Machine.DiskMiB == 0 {
		return nil
	}
	if err := l.checkDisk(path); err != nil {
		return err
	}
	l.fresh = max(l.fresh, int64(l.spec.Machine.DiskMiB)<<20)
	return l.names.add(diskName, path, os.O_RDWR)
}

// frozenDisk gives a machine that is restored a disk of its own. Firecracker has
// raw files only, so it is a copy: one that shares its blocks where the filesystem
// can do that.
func (l *launcher) frozenDisk(ctx context.Context, files []string) error {
	if len(files) == 0 && l.spec.Machine.DiskMiB == 0 {
		return nil
	}
	if len(files) != 1 {
		return fmt.Errorf("%w: %d files for a disk of %d MiB: Firecracker's have one", errdef.ErrInvalid, len(files), l.spec.Machine.DiskMiB)
	}
	frozen, err := filepath.Abs(files[0])
	if err != nil {
		return err
	}
	if err = l.checkDisk(frozen); err != nil {
		return err
	}
	own := diskFile(l.spec.Dir)
	if err = copySparse(ctx, own, frozen); err != nil {
		return fmt.Errorf("copy disk: %w", err)
	}
	if err = markClean(own); err != nil {
		return err
	}
	l.handle.Disk = []string{frozen}
	l.fresh = max(l.fresh, int64(l.spec.Machine.DiskMiB)<<20)
	return l.names.add(diskName, own, os.O_RDWR)
}

func (l *launcher) checkDisk(path string) error {
	mib := l.spec.Machine.DiskMiB
	if path == "" || mib == 0 {
		return fmt.Errorf("%w: file %q for a disk of %d MiB", errdef.ErrInvalid, path, mib)
	}
	info, err := os.Stat(path)
	if err == nil && (!info.Mode().IsRegular() || info.Size() != int64(mib)<<20) {
		err = fmt.Errorf("%w: disk %s: not the raw file of a disk of %d MiB", errdef.ErrInvalid, path, mib)
	}
	return err
}

// diskFile is the disk of a machine that was restored. Its frozen copies have
// numbers behind that.
func diskFile(dir string) string { return filepath.Join(dir, "disk.own") }

// clean is the time of change of a disk that is as its last frozen copy: no
// guest's write leaves it so.
var clean = time.Unix(1, 0)

func markClean(path string) error { return os.Chtimes(path, clean, clean) }

// PrepareDisk removes the frozen copies that were made before.
func (m *machine) PrepareDisk(context.Context) error {
	if len(m.handle.Disk) == 0 {
		return nil
	}
	m.turn.Lock()
	defer m.turn.Unlock()
	copies, err := m.diskCopies()
	if err != nil {
		return fmt.Errorf("prepare disk: %w", err)
	}
	current, err := m.current(copies)
	if err != nil {
		return fmt.Errorf("prepare disk: %w", err)
	}
	for _, path := range copies {
		if path != current {
			err = errors.Join(err, os.Remove(path))
		}
	}
	return err
}

// FreezeDisk copies the disk of a paused machine, unless nothing has changed since
// it was copied last.
func (m *machine) FreezeDisk(ctx context.Context) ([]string, error) {
	m.turn.Lock()
	defer m.turn.Unlock()
	file, err := m.freezeDisk(ctx)
	if err != nil {
		return nil, fmt.Errorf("freeze disk: %w", err)
	}
	if file == "" {
		return nil, nil
	}
	return []string{file}, nil
}

func (m *machine) freezeDisk(ctx context.Context) (string, error) {
	paused, err := m.Paused(ctx)
	switch {
	case err != nil:
		return "", err
	case !paused:
		return "", fmt.Errorf("%w: the machine is not paused", errdef.ErrConflict)
	case m.template:
		return "", fmt.Errorf("%w: the machine was not restored", errdef.ErrUnsupported)
	case len(m.handle.Disk) == 0:
		return "", nil
	}
	copies, err := m.diskCopies()
	if err != nil {
		return "", err
	}
	current, err := m.current(copies)
	if err != nil || current != "" {
		return current, err
	}
	own := diskFile(m.handle.Dir)
	last := 0
	if len(copies) > 0 {
		last, _ = copyNumber(copies[len(copies)-1])
	}
	next := own + "." + strconv.Itoa(last+1)
	if err = copySparse(ctx, next, own); err != nil {
		return "", err
	}
	return next, markClean(own) // nothing writes to it now
}

// current is the file that the disk is still as, or "".
func (m *machine) current(copies []string) (string, error) {
	info, err := os.Stat(diskFile(m.handle.Dir))
	if err != nil || !info.ModTime().Equal(clean) {
		return "", err
	}
	if len(copies) == 0 {
		return m.handle.Disk[0], nil
	}
	return copies[len(copies)-1], nil
}

// diskCopies are the frozen copies that are there, in the order they were made.
func (m *machine) diskCopies() ([]string, error) {
	entries, err := os.ReadDir(m.handle.Dir)
	if err != nil {
		return nil, err
	}
	var copies []string
	for _, e := range entries {
		if _, ok := copyNumber(e.Name()); ok {
			copies = append(copies, filepath.Join(m.handle.Dir, e.Name()))
		}
	}
	slices.SortFunc(copies, func(a, b string) int {
		first, _ := copyNumber(a)
		second, _ := copyNumber(b)
		return cmp.Compare(first, second)
	})
	return copies, nil
}

// copyNumber is the number of a frozen copy by its name.
func copyNumber(path string) (n int, ok bool) {
	digits, ok := strings.CutPrefix(filepath.Base(path), filepath.Base(diskFile(""))+".")
	n, err := strconv.Atoi(digits)
	return n, ok && err == nil && n > 0
}

// copySparse makes to a copy of from, and leaves its holes out. On error there is
// none.
func copySparse(ctx context.Context, to, from string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // only read
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, dst.Close()); err != nil {
			err = errors.Join(diskError(err), os.Remove(to))
		}
	}()
	return linux.CopySparse(ctx, dst, src)
}

// diskError puts a full disk into its category.
func diskError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", errdef.ErrExhausted, err)
	}
	return err
}
