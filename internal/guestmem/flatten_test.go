package guestmem

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// bigBase has 4 MiB of data, from 16 MiB on, in 64 MiB.
func bigBase(tb testing.TB) string {
	tb.Helper()
	base := sparseBase(tb, 64<<20)
	f, err := os.OpenFile(base, os.O_WRONLY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err = f.WriteAt(bytes.Repeat([]byte{9}, 4<<20), 16<<20); err != nil {
		tb.Fatal(err)
	}
	if err = f.Close(); err != nil {
		tb.Fatal(err)
	}
	return base
}

func TestFlattenIsSparse(t *testing.T) {
	t.Parallel()
	// Zeros over half of what the base has, and one page far away.
	path, _ := writePieces(t, 64<<20, filled{16 << 20 / PageSize, 512, 0}, filled{15000, 1, 1})
	m := openImage(t, bigBase(t), path)
	f := newLayerFile(t)
	if err := m.Flatten(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, m.Size())
	if _, err = m.ReadAt(want, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes, %v", err)
	}
	const most = 2<<20 + PageSize + 256<<10 // some for the filesystem's own use
	if used, useErr := linux.DiskUse(f.Name()); useErr != nil || used > most {
		t.Errorf("takes %d bytes of disk, %v; want at most %d", used, useErr, most)
	}
}

func TestFlattenRefuses(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 64<<20, filled{1, 1, 1})
	m := openImage(t, bigBase(t), path)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if err := m.Flatten(ctx, newLayerFile(t)); !errors.Is(err, cause) {
		t.Errorf("cancelled: %v", err)
	}
	f := newLayerFile(t)
	if _, err := f.WriteString("content"); err != nil {
		t.Fatal(err)
	}
	if err := m.Flatten(t.Context(), f); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("onto content: %v", err)
	}
	damage(t, path, headerSize)
	if err := m.Flatten(t.Context(), newLayerFile(t)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("of a damaged layer: %v", err)
	}
}

// A context that ends in the middle ends the work there.
func TestFlattenStops(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 64<<20, filled{1, 1, 1}, filled{3, 1, 0})
	m := openImage(t, bigBase(t), path)
	for after := range 4 {
		ctx := &lateContext{Context: t.Context(), left: after}
		if err := m.Flatten(ctx, newLayerFile(t)); !errors.Is(err, context.Canceled) {
			t.Errorf("after %d looks: %v", after, err)
		}
	}
}

// lateContext ends when it has been looked at a few times.
type lateContext struct {
	context.Context
	left int
}

func (c *lateContext) Err() error {
	if c.left--; c.left < 0 {
		return context.Canceled
	}
	return nil
}

// From one filesystem to another the kernel may refuse to copy.
func TestFlattenAcrossFilesystems(t *testing.T) {
	t.Parallel()
	fd, err := unix.MemfdCreate("flat", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "flat")
	defer func() { _ = f.Close() }()
	path, _ := writePieces(t, 64<<20, filled{4095, 2, 3}, filled{5000, 1, 0})
	m := openImage(t, bigBase(t), path)
	if err = m.Flatten(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	got, want := make([]byte, m.Size()), make([]byte, m.Size())
	if _, err = f.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if _, err = m.ReadAt(want, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("other bytes, %v", err)
	}
}

func TestFlattenOfACutBase(t *testing.T) {
	t.Parallel()
	base := bigBase(t)
	m := openImage(t, base)
	if err := os.Truncate(base, 18<<20); err != nil {
		t.Fatal(err)
	}
	if err := m.Flatten(t.Context(), newLayerFile(t)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}
