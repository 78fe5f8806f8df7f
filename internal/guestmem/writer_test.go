package guestmem

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestNewWriterRefuses(t *testing.T) {
	t.Parallel()
	for _, memory := range []int64{0, -PageSize, PageSize - 1, PageSize + 1, maxMemory + PageSize} {
		if _, err := NewWriter(newLayerFile(t), memory); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("memory of %d: %v", memory, err)
		}
	}
	path, _ := writePieces(t, PageSize)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if _, err = NewWriter(f, PageSize); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a file with content: %v", err)
	}
}

func TestWriterRefuses(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		page uint64
		size int
	}{
		"half-a-page":     {9, 100},
		"again":           {4, PageSize},
		"descends":        {0, PageSize},
		"outside":         {16, PageSize},
		"reaches-outside": {15, 2 * PageSize},
		"far-outside":     {1<<64 - 1, 2 * PageSize},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, err := NewWriter(newLayerFile(t), 16*PageSize)
			if err != nil {
				t.Fatal(err)
			}
			if err = w.Write(4, filled{4, 1, 1}.bytes()); err != nil {
				t.Fatal(err)
			}
			if err = w.Write(tt.page, make([]byte, tt.size)); !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("wrote: %v", err)
			}
			if _, err = w.Close(); !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("closed: %v", err)
			}
		})
	}
}

// Nothing that a writer left half done is a layer.
func TestHalfWrittenIsNoLayer(t *testing.T) {
	t.Parallel()
	f := newLayerFile(t)
	w, err := NewWriter(f, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	if err = w.Write(0, filled{0, 1000, 1}.bytes()); err != nil {
		t.Fatal(err)
	}
	if _, err = OpenLayer(f.Name()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("before Close: %v", err)
	}
	if _, err = w.Close(); err != nil {
		t.Fatal(err)
	}
	if err = w.Write(2000, filled{0, 1, 1}.bytes()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("written after Close: %v", err)
	}
	if _, err = w.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if err = openLayer(t, f.Name()).Verify(t.Context()); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

func TestWriterDiskFull(t *testing.T) {
	t.Parallel()
	f, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no device that is always full: %v", err)
	}
	defer func() { _ = f.Close() }()
	w, err := NewWriter(f, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	big := filled{0, 2000, 1}.bytes()
	if err = w.Write(0, big); !errors.Is(err, errdef.ErrExhausted) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("wrote: %v", err)
	}
	if again := w.Write(5000, big); !errors.Is(again, unix.ENOSPC) {
		t.Errorf("wrote again: %v", again)
	}
	if _, err = w.Close(); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("closed: %v", err)
	}
}

// The size of the pieces in which pages come does not show in the file.
func TestWriterJoins(t *testing.T) {
	t.Parallel()
	const pages = 1000
	data := make([]byte, pages*PageSize)
	for i := range pages {
		if i%100 != 7 {
			data[i*PageSize+i] = byte(i | 1)
		}
	}
	var want []byte
	for _, step := range []int{pages, 1, 3, 255, 257} {
		f := newLayerFile(t)
		w, err := NewWriter(f, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < pages; i += step {
			end := min(i+step, pages)
			if err = w.Write(uint64(i)+50, data[i*PageSize:end*PageSize]); err != nil {
				t.Fatal(err)
			}
		}
		if _, err = w.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		if want == nil {
			want = got
		}
		if string(got) != string(want) {
			t.Errorf("in steps of %d: another file", step)
		}
	}
}
