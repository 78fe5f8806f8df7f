package durable

import (
	"os"
	"path/filepath"
	"strings"
	"time"
)

// asideMark is in the names of what was set aside.
const asideMark = ".corrupt-"

// SetAside renames a file or directory that cannot be understood, so that it is
// in nobody's way and nothing of it is lost, and returns its new path: the old
// one, ".corrupt-" and the time. The rename survives a power cut.
func SetAside(path string, at time.Time) (string, error) {
	aside := path + asideMark + at.UTC().Format("20060102T150405.000000000Z")
	if err := os.Rename(path, aside); err != nil {
		return "", Describe("set aside", path, err)
	}
	if err := SyncDir(filepath.Dir(path)); err != nil {
		return "", Describe("set aside", path, err)
	}
	return aside, nil
}

// IsAside reports whether name is of something that was set aside.
func IsAside(name string) bool { return strings.Contains(name, asideMark) }
