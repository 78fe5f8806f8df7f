package linux

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// Whatever pages a file has, punching leaves what it reads as, and gives back
// the pages of zeros.
func TestPunchZeros(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), t.Context()
	rapid.Check(t, func(t *rapid.T) {
		var content []byte
		var zeros int64
		for _, full := range rapid.SliceOfN(rapid.Bool(), 0, 40).Draw(t, "pages") {
			page := make([]byte, PageSize)
			if full {
				page[rapid.IntRange(0, PageSize-1).Draw(t, "at")] = 1
			} else {
				zeros += PageSize
			}
			content = append(content, page...)
		}
		content = append(content, make([]byte, rapid.IntRange(0, PageSize-1).Draw(t, "tail"))...)
		f, err := os.OpenFile(filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		if _, err = f.Write(content); err != nil {
			t.Fatal(err)
		}
		freed, err := PunchZeros(ctx, f)
		if err != nil || freed != zeros {
			t.Fatalf("freed %d, %v; want %d", freed, err, zeros)
		}
		got, err := os.ReadFile(f.Name())
		if err != nil || !bytes.Equal(got, content) {
			t.Fatalf("the content changed: %v", err)
		}
	})
}

func TestPunchZerosFreesDisk(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	content := make([]byte, 3<<20) // more than one read
	content[2<<20] = 1
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err = f.Sync(); err != nil {
		t.Fatal(err)
	}
	if freed, punchErr := PunchZeros(t.Context(), f); punchErr != nil || freed != 3<<20-PageSize {
		t.Fatalf("freed %d, %v", freed, punchErr)
	}
	if use, useErr := DiskUse(path); useErr != nil || use > 16<<10 {
		t.Errorf("disk use %d, %v", use, useErr)
	}
	if freed, punchErr := PunchZeros(t.Context(), f); punchErr != nil || freed != 0 {
		t.Errorf("second time: freed %d, %v", freed, punchErr)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = PunchZeros(ctx, f); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestReflink(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	src, err := os.OpenFile(filepath.Join(dir, "src"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = src.Close() }()
	if _, err = src.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	dst, err := os.OpenFile(filepath.Join(dir, "dst"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dst.Close() }()
	err = Reflink(dst, src)
	if errors.Is(err, errdef.ErrUnsupported) {
		return // said so, as it should
	}
	got, readErr := os.ReadFile(dst.Name())
	if err != nil || readErr != nil || string(got) != "content" {
		t.Errorf("got %q, %v, %v", got, err, readErr)
	}
}

func TestFreeSpace(t *testing.T) {
	t.Parallel()
	if free, err := FreeSpace(t.TempDir()); err != nil || free <= 0 {
		t.Errorf("got %d, %v", free, err)
	}
	if _, err := FreeSpace("/no/such/place"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing path: %v", err)
	}
}
