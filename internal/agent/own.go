package agent

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// ownFiles are the machine's files that the agent writes: /etc/hostname and
// the like. A fresh fork under emulation pays for every kernel path that it
// takes for the first time, so files that every fork rewrites are kept open,
// and directories that every fork reads are looked at before they are read.
type ownFiles struct {
	root string // where the machine's root is: "" on a machine

	mu   sync.Mutex
	open map[string]*ownFile
	dirs map[string]*ownDir
}

type ownFile struct {
	file *os.File
	id   fileID
}

// ownDir is a directory as it was when it was read.
type ownDir struct {
	id    fileID
	names []string
}

// fileID tells whether a path still leads to the same thing, unchanged.
type fileID struct {
	dev, ino uint64
	changed  int64 // of a directory: ctime in nanoseconds
}

func newOwnFiles(root string) *ownFiles {
	return &ownFiles{root: root, open: map[string]*ownFile{}, dirs: map[string]*ownDir{}}
}

func (o *ownFiles) path(p string) string { return filepath.Join(o.root, p) }

// put makes text the content of a file, in place.
func (o *ownFiles) put(path, text string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	f, size, err := o.openLocked(path)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt([]byte(text), 0); err != nil {
		return err
	}
	if size > int64(len(text)) {
		return f.Truncate(int64(len(text)))
	}
	return nil
}

// openLocked returns the open file that path leads to, and its size.
func (o *ownFiles) openLocked(path string) (*os.File, int64, error) {
	full := o.path(path)
	var st unix.Stat_t
	err := unix.Stat(full, &st)
	if own := o.open[path]; own != nil {
		if err == nil && own.id == (fileID{dev: st.Dev, ino: st.Ino}) {
			return own.file, st.Size, nil
		}
		_ = own.file.Close() // somebody put another file there
		delete(o.open, path)
	}
	f, err := create(full)
	if err != nil {
		return nil, 0, err
	}
	if err = unix.Stat(full, &st); err != nil {
		_ = f.Close()
		return nil, 0, &os.PathError{Op: "stat", Path: full, Err: err}
	}
	o.open[path] = &ownFile{file: f, id: fileID{dev: st.Dev, ino: st.Ino}}
	return f, st.Size, nil
}

func create(full string) (*os.File, error) {
	f, err := os.OpenFile(full, os.O_WRONLY|os.O_CREATE, 0o644)
	if errors.Is(err, os.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			return nil, err
		}
		f, err = os.OpenFile(full, os.O_WRONLY|os.O_CREATE, 0o644)
	}
	return f, err
}

// names lists a directory in order, without dot files. One that does not exist
// is empty.
func (o *ownFiles) names(path string, most int) ([]string, error) {
	full := o.path(path)
	var st unix.Stat_t
	err := unix.Stat(full, &st)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, &os.PathError{Op: "stat", Path: full, Err: err}
	}
	id := fileID{dev: st.Dev, ino: st.Ino, changed: st.Ctim.Nano()}
	o.mu.Lock()
	defer o.mu.Unlock()
	if known := o.dirs[path]; known != nil && known.id == id {
		return known.names, nil
	}
	names, err := readNames(full, most)
	if err != nil {
		return nil, err
	}
	delete(o.dirs, path)
	// A change within the same tick of the file system's clock would not show.
	const tick = time.Second
	if time.Since(time.Unix(0, id.changed)) > tick {
		o.dirs[path] = &ownDir{id: id, names: names}
	}
	return names, nil
}

func readNames(full string, most int) ([]string, error) {
	entries, err := os.ReadDir(full)
	if err != nil {
		return nil, err
	}
	entries = slices.DeleteFunc(entries, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), ".") })
	if len(entries) > most {
		return nil, failf(errdef.ErrExhausted, "%s holds more than %d files", full, most)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (o *ownFiles) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, own := range o.open {
		_ = own.file.Close() // all that was written is in the file system
	}
	o.open = map[string]*ownFile{}
}

// readSmall reads a file that must not be longer than most.
func readSmall(path string, most int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // only read from
	buf := make([]byte, most+1)
	n := 0
	for n < len(buf) {
		m, err := f.Read(buf[n:])
		if m == 0 || err != nil {
			break
		}
		n += m
	}
	if n > most {
		return nil, failf(errdef.ErrInvalid, "%s is longer than %d bytes", path, most)
	}
	return buf[:n], nil
}
