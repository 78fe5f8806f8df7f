package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// MaxDisk is how many files the scratch disk of a snapshot may have.
const MaxDisk = 128

// diskFile is the name of one of them; 0 is the oldest.
func diskFile(i int) string { return "disk." + strconv.Itoa(i) }

// DiskPaths are the files of the snapshot's scratch disk, oldest first; none
// when its machine has no disk.
func (s Snapshot) DiskPaths() []string {
	var paths []string
	for i := range s.Manifest.Disk {
		paths = append(paths, filepath.Join(s.dir, diskFile(i)))
	}
	return paths
}

// DiskPath is where the file of the scratch disk is to be, that a machine which
// boots writes to. A disk that has been frozen is for LinkDisk.
func (st *Stage) DiskPath() string { return filepath.Join(st.dir, diskFile(0)) }

// LinkDisk makes the files of a frozen scratch disk, oldest first, those of the
// stage, and they must not change any more. It is quick where they are on the
// store's filesystem: the files are linked to, so that they are there only once
// however many snapshots have them. Elsewhere they are copied.
func (st *Stage) LinkDisk(ctx context.Context, files []string) error {
	if st.claim == nil {
		return fmt.Errorf("%w: link disk of snapshot %s: the stage is over", errdef.ErrInvalid, st.root.name)
	}
	if len(files) > MaxDisk {
		return fmt.Errorf("%w: link disk of snapshot %s: %d files, %d allowed", errdef.ErrExhausted, st.root.name, len(files), MaxDisk)
	}
	for i, file := range files {
		if err := st.linkDisk(ctx, file, filepath.Join(st.dir, diskFile(i))); err != nil {
			return fmt.Errorf("link disk of snapshot %s: %w", st.root.name, err)
		}
	}
	return nil
}

func (st *Stage) linkDisk(ctx context.Context, from, to string) error {
	err := st.store.files.link(from, to)
	for _, no := range []error{unix.EXDEV, unix.EMLINK, unix.EPERM, unix.EOPNOTSUPP} {
		if errors.Is(err, no) {
			return st.store.copyFile(ctx, from, to)
		}
	}
	return err
}

// copyFile copies a file, and leaves its holes out.
func (s *Store) copyFile(ctx context.Context, from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // only read
	dst, err := s.files.create(to)
	if err != nil {
		return err
	}
	if _, err = dst.ReadFrom(&reader{ctx: ctx, f: src}); err == nil {
		_, err = linux.PunchZeros(ctx, dst)
	}
	if errors.Is(err, errdef.ErrUnsupported) {
		err = nil
	}
	return errors.Join(err, dst.Close())
}

// diskNames are the files of a disk that are in the stage.
func (st *Stage) diskNames() (names []string, err error) {
	for i := range MaxDisk {
		_, err = os.Lstat(filepath.Join(st.dir, diskFile(i)))
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, err
		}
		names = append(names, diskFile(i))
	}
	return names, nil
}

// checkDisk sees that there is a disk if the machine has one.
func (m *Manifest) checkDisk() error {
	mib := m.Machine.DiskMiB
	switch {
	case mib < 0 || (mib > 0) != (len(m.Disk) > 0) || len(m.Disk) > MaxDisk:
		return fmt.Errorf("%w: manifest: %d files for a disk of %d MiB", errdef.ErrInvalid, len(m.Disk), mib)
	case mib > 0 && m.Disk[0].Size != int64(mib)<<20:
		return fmt.Errorf("%w: manifest: a file of %d bytes for a disk of %d MiB", errdef.ErrInvalid, m.Disk[0].Size, mib)
	}
	return nil
}

// hashed remembers the digests of files by their stamps, as memos do: many
// snapshots have the same files of a disk, under different names. It is only
// for the life of a process.
type hashed struct {
	mu sync.Mutex
	// of has at most maxHashed entries.
	of map[stamp]File
}

const maxHashed = 4096

func (h *hashed) find(s stamp) (File, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f, ok := h.of[s]
	return f, ok
}

// note takes down what is known of the files of a snapshot's disk: a memo holds
// for them, or they have just been read.
func (h *hashed) note(m *Manifest, stamps memo) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of == nil || len(h.of)+len(m.Disk) > maxHashed {
		h.of = map[stamp]File{}
	}
	for i, f := range m.Disk {
		if s, ok := stamps.Files[diskFile(i)]; ok && s.Size == f.Size {
			h.of[s] = f
		}
	}
}

// hashStage is hashAll that does not read again what it knows of the files of
// a disk.
func (st *Stage) hashStage(ctx context.Context, memory string, disk []string) (map[string]File, memo, error) {
	sums, stamps, err := hashAll(ctx, st.dir, memory, deviceFile)
	if err != nil {
		return nil, memo{}, err
	}
	for _, name := range disk {
		now, err := stampOf(filepath.Join(st.dir, name))
		if err != nil {
			return nil, memo{}, err
		}
		f, ok := st.store.hashed.find(now)
		if !ok {
			if f, err = hashFile(ctx, filepath.Join(st.dir, name)); err != nil {
				return nil, memo{}, err
			}
		}
		sums[name], stamps.Files[name] = f, now
	}
	return sums, stamps, nil
}
