package auth

import (
	"os"
	"syscall"
	"time"
)

// watched is a file that is read again when it has changed.
type watched struct {
	path string
	seen stamp
}

// stamp tells one state of a file from another.
type stamp struct {
	there bool
	inode uint64
	size  int64
	mtime time.Time
}

func stampOf(path string) stamp {
	info, err := os.Stat(path)
	if err != nil {
		return stamp{}
	}
	s := stamp{there: true, size: info.Size(), mtime: info.ModTime()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode = sys.Ino
	}
	return s
}

// note remembers the state of the file. It comes before reading: what changes
// later is then seen as a change.
func (w *watched) note() { w.seen = stampOf(w.path) }

// changed reports whether the file is another than note saw.
func (w *watched) changed() bool { return w.path != "" && stampOf(w.path) != w.seen }
