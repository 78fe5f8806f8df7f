package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestSetAside(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 21, 22, 15, 0, 7, time.UTC)
	path := filepath.Join(t.TempDir(), "record.json")
	for i := range 2 { // the second time is another instant
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		aside, err := SetAside(path, at.Add(time.Duration(i)))
		if err != nil {
			t.Fatal(err)
		}
		if data, readErr := os.ReadFile(aside); readErr != nil || string(data) != "{" {
			t.Errorf("%s holds %q, %v", aside, data, readErr)
		}
		if !IsAside(filepath.Base(aside)) || IsAside(filepath.Base(path)) {
			t.Errorf("IsAside does not tell %s from %s", aside, path)
		}
		if want := path + ".corrupt-20261121T221500.00000000" + string(rune('7'+i)) + "Z"; aside != want {
			t.Errorf("set aside as %s, want %s", aside, want)
		}
		if _, err = os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("it is still there: %v", err)
		}
	}
	if _, err := SetAside(path, at); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of nothing: %v, want fs.ErrNotExist", err)
	}
}
