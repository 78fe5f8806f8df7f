package snapshot

import (
	"os"

	"github.com/tinevm/tine/internal/durable"
)

// files are the steps in which the store changes. Tests cut after each.
type files interface {
	mkdir(path string) error
	// create makes a file to write to, which must not be there.
	create(path string) (*os.File, error)
	// write replaces a file for good; replace only until a power cut.
	write(path string, data []byte) error
	replace(path string, data []byte) error
	commitDir(stage, final string) error
	rename(oldPath, newPath string) error
	link(oldPath, newPath string) error
	remove(path string) error
	removeAll(path string) error
	syncFile(path string) error
	syncDir(path string) error
}

type osFiles struct{}

func (osFiles) mkdir(path string) error { return durable.Describe("make", path, os.Mkdir(path, 0o700)) }

func (osFiles) create(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	return f, durable.Describe("make", path, err)
}

func (osFiles) write(path string, data []byte) error { return durable.WriteFile(path, data, 0o600) }

func (osFiles) replace(path string, data []byte) error { return durable.Replace(path, data, 0o600) }

func (osFiles) commitDir(stage, final string) error { return durable.CommitDir(stage, final) }

func (osFiles) rename(oldPath, newPath string) error { return os.Rename(oldPath, newPath) }

func (osFiles) link(oldPath, newPath string) error { return os.Link(oldPath, newPath) }

func (osFiles) remove(path string) error { return os.Remove(path) }

func (osFiles) removeAll(path string) error { return os.RemoveAll(path) }

func (osFiles) syncFile(path string) error {
	return durable.Describe("sync", path, durable.SyncFile(path))
}

func (osFiles) syncDir(path string) error { return durable.SyncDir(path) }
