package linux

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// DataRanges calls yield with each range of bytes of f that is not a hole, in
// order; yield returns false to stop. It moves the offset of f.
func DataRanges(f *os.File, yield func(start, end int64) bool) error {
	for pos := int64(0); ; {
		start, end, err := nextData(f, pos)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data of %s: %w", f.Name(), err)
		}
		if !yield(start, end) {
			return nil
		}
		pos = end
	}
}

// PunchHole makes a hole of a range of f, which then reads as zeros. The size
// of f does not change. It returns errdef.ErrUnsupported where the filesystem
// has no holes.
func PunchHole(f *os.File, start, size int64) error {
	_, err := retry(func() (int, error) {
		return 0, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start, size)
	})
	if err != nil {
		return fmt.Errorf("punch hole in %s: %w", f.Name(), unsupported(err))
	}
	return nil
}

// CopyRange copies a range of src to the same place in dst, in the kernel, and
// returns how many bytes it copied, which may be fewer. It returns
// errdef.ErrUnsupported where the two files' filesystems cannot do that.
func CopyRange(dst, src *os.File, start, size int64) (int64, error) {
	n, err := retry(func() (int, error) {
		in, out := start, start
		return unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(size), 0)
	})
	if err != nil {
		return 0, fmt.Errorf("copy %s to %s: %w", src.Name(), dst.Name(), unsupported(err))
	}
	return int64(n), nil
}
