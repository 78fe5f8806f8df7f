package linux

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
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

// copyStep is how much is copied between two looks at the context.
const copyStep = 16 << 20

// CopySparse makes dst, which is empty, a copy of src, with src's holes. It shares
// the blocks of src where the filesystem can, copies in the kernel where that can,
// and by hand elsewhere. A src that is cut off meanwhile is io.ErrUnexpectedEOF.
// It moves the offset of src.
func CopySparse(ctx context.Context, dst, src *os.File) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := Reflink(dst, src); !errors.Is(err, errdef.ErrUnsupported) {
		return err
	}
	info, err := src.Stat()
	if err == nil {
		err = dst.Truncate(info.Size())
	}
	if err != nil {
		return err
	}
	var copyErr error
	err = DataRanges(src, func(start, end int64) bool {
		copyErr = copyRange(ctx, dst, src, start, min(end, info.Size()))
		return copyErr == nil
	})
	return errors.Join(err, copyErr)
}

func copyRange(ctx context.Context, dst, src *os.File, start, end int64) error {
	for start < end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := CopyRange(dst, src, start, min(end-start, copyStep))
		if errors.Is(err, errdef.ErrUnsupported) {
			n, err = io.Copy(io.NewOffsetWriter(dst, start), io.NewSectionReader(src, start, min(end-start, copyStep)))
		}
		if err == nil && n == 0 {
			err = fmt.Errorf("copy %s to %s: %w", src.Name(), dst.Name(), io.ErrUnexpectedEOF)
		}
		if err != nil {
			return err
		}
		start += n
	}
	return nil
}
