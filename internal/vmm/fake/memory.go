package fake

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
)

// MemorySize is the size of every machine's memory, in bytes.
const MemorySize = 8 << 20

// filesSize is the room that memory has for the guest's files.
const filesSize = MemorySize / 2

// memory is the memory of a machine that was restored: a private mapping of
// its image.
type memory struct {
	mu   sync.Mutex // held while it is changed or unmapped
	data []byte     // nil when it is unmapped
}

func createImage(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(MemorySize), f.Close())
}

func mapImage(path string) (*memory, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // the mapping stays
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() != MemorySize {
		return nil, fmt.Errorf("%w: memory image of %d bytes", errdef.ErrInvalid, info.Size())
	}
	data, err := unix.Mmap(int(f.Fd()), 0, MemorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return &memory{data: data}, nil
}

func (m *memory) unmap() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	data := m.data
	m.data = nil
	return unix.Munmap(data)
}

// space is made of the address: the image may be mapped more than once here.
func (m *memory) space() guestmem.Space {
	start := uint64(uintptr(unsafe.Pointer(&m.data[0]))) //nolint:gosec // G103: the address is all that is wanted
	return guestmem.Space{PID: os.Getpid(), Ranges: []linux.Mapping{{Start: start, End: start + MemorySize}}}
}

func (m *memory) dirty(page uint64, data []byte) error {
	if page < filesSize/linux.PageSize || page >= MemorySize/linux.PageSize || len(data) > linux.PageSize {
		return fmt.Errorf("%w: %d bytes in page %d of memory", errdef.ErrInvalid, len(data), page)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data == nil {
		return errGone
	}
	copy(m.data[page*linux.PageSize:], data)
	return nil
}

// save brings the files in dir into memory. It writes only to pages that
// change, as all others are to stay the image's.
func (m *memory) save(dir string) error {
	archive, err := pack(dir)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data == nil {
		return errGone
	}
	for off := 0; off < filesSize; off += linux.PageSize {
		page := archive[off : off+linux.PageSize]
		if !bytes.Equal(m.data[off:off+linux.PageSize], page) {
			copy(m.data[off:], page)
		}
	}
	return nil
}

// load makes the files in dir of what is in memory.
func (m *memory) load(dir string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return unpack(bytes.NewReader(m.data[:filesSize]), dir)
}

// freeze brings the files in dir into the image at path.
func freeze(dir, path string) error {
	archive, err := pack(dir)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(bytes.TrimRight(archive, "\x00")) // what it leaves out is a hole
	return errors.Join(err, f.Close())
}

// pack makes an archive of the files in dir, with zeros up to filesSize. The
// same files make the same archive.
func pack(dir string) ([]byte, error) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close()); err != nil {
		return nil, err
	}
	if archive.Len() > filesSize {
		return nil, fmt.Errorf("%w: the guest's files take %d bytes", errdef.ErrExhausted, archive.Len())
	}
	return append(archive.Bytes(), make([]byte, filesSize-archive.Len())...), nil
}

// unpack makes files in dir of an archive.
func unpack(archive io.Reader, dir string) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	r := tar.NewReader(archive)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unpackFile(root, h, r); err != nil {
			return err
		}
	}
}

func unpackFile(root *os.Root, h *tar.Header, r io.Reader) error {
	mode := h.FileInfo().Mode().Perm()
	if h.Typeflag == tar.TypeDir {
		return root.MkdirAll(filepath.Clean(h.Name), mode)
	}
	if err := root.MkdirAll(filepath.Dir(h.Name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(h.Name, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
