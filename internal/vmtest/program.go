package vmtest

import (
	"os"
	"path/filepath"
	"testing"
)

// Program is the path of a program that make has built.
func Program(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(repository(t), "bin", name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v; run make build first", err)
	}
	return path
}
