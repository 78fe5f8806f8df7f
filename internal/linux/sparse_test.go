package linux

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

// sparseFile has data at 64-128 KiB and 256-320 KiB of 1 MiB.
func sparseFile(t *testing.T) *os.File {
	t.Helper()
	f := openNew(t)
	if err := f.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{64 << 10, 256 << 10} {
		if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 64<<10), at); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

func openNew(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(t.TempDir(), "file"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func dataRanges(t *testing.T, f *os.File) [][2]int64 {
	t.Helper()
	var got [][2]int64
	err := DataRanges(f, func(start, end int64) bool {
		got = append(got, [2]int64{start, end})
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestDataRanges(t *testing.T) {
	t.Parallel()
	f := sparseFile(t)
	want := [][2]int64{{64 << 10, 128 << 10}, {256 << 10, 320 << 10}}
	if diff := cmp.Diff(want, dataRanges(t, f)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	n := 0
	err := DataRanges(f, func(int64, int64) bool { n++; return false })
	if err != nil || n != 1 {
		t.Errorf("stopped after %d, %v", n, err)
	}
	if got := dataRanges(t, openNew(t)); got != nil {
		t.Errorf("an empty file has data: %v", got)
	}
}

func TestPunchHole(t *testing.T) {
	t.Parallel()
	f := sparseFile(t)
	if err := PunchHole(f, 64<<10, 96<<10); err != nil {
		t.Fatal(err)
	}
	if err := PunchHole(f, 1<<20-4096, 1<<20); err != nil { // past the end
		t.Fatal(err)
	}
	if diff := cmp.Diff([][2]int64{{256 << 10, 320 << 10}}, dataRanges(t, f)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if st, err := f.Stat(); err != nil || st.Size() != 1<<20 {
		t.Errorf("size %v, %v", st.Size(), err)
	}
}

func TestCopyRange(t *testing.T) {
	t.Parallel()
	src, dst := sparseFile(t), openNew(t)
	n, err := CopyRange(dst, src, 64<<10, 64<<10)
	if err != nil || n != 64<<10 {
		t.Fatalf("copied %d, %v", n, err)
	}
	want, err := os.ReadFile(src.Name())
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dst.Name())
	if err != nil || !bytes.Equal(got, want[:128<<10]) {
		t.Errorf("got %d other bytes, %v", len(got), err)
	}
	if n, err = CopyRange(dst, src, 1<<20, 1); n != 0 || err != nil {
		t.Errorf("past the end: %d, %v", n, err)
	}
	if _, err = CopyRange(src, src, 0, 4096); !errors.Is(err, errdef.ErrUnsupported) { // onto itself
		t.Errorf("got %v", err)
	}
}
