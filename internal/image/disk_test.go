package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

func TestFormatDisk(t *testing.T) {
	t.Parallel()
	const size = 32 << 20
	path := filepath.Join(t.TempDir(), "disk")
	if err := FormatDisk(t.Context(), path, size); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) != size {
		t.Errorf("%d bytes, want %d", len(data), size)
	}
	const magicAt = 1024 + 56 // in the superblock
	if got := data[magicAt : magicAt+2]; !bytes.Equal(got, []byte{0x53, 0xef}) {
		t.Errorf("magic number % x", got)
	}
	if err = FormatDisk(t.Context(), path, size); !errors.Is(err, os.ErrExist) {
		t.Errorf("over a file that is there: %v, want os.ErrExist", err)
	}
	if again, readErr := os.ReadFile(path); readErr != nil || !bytes.Equal(again, data) {
		t.Errorf("the file that was there has changed (error %v)", readErr)
	}
}

func TestFormatDiskFails(t *testing.T) {
	t.Parallel()
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, tc := range map[string]struct {
		ctx  context.Context
		size int64
		want error
	}{
		"too small": {t.Context(), 4096, errdef.ErrUnavailable},
		"canceled":  {canceled, 32 << 20, context.Canceled},
	} {
		path := filepath.Join(t.TempDir(), "disk")
		if err := FormatDisk(tc.ctx, path, tc.size); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: it left a file: %v", name, err)
		}
	}
}
