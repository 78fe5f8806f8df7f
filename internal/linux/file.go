package linux

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// PunchZeros makes holes of the pages of f that hold only zeros, and returns
// how many bytes of disk that gave back. What f reads as does not change. It
// returns errdef.ErrUnsupported where the filesystem has no holes.
func PunchZeros(ctx context.Context, f *os.File) (freed int64, err error) {
	p := puncher{f: f, buf: make([]byte, 1<<20)}
	for pos := int64(0); err == nil; {
		var start, end int64
		start, end, err = nextData(f, pos)
		if errors.Is(err, io.EOF) {
			return p.freed, nil
		}
		if err == nil {
			err = p.extent(ctx, start, end)
		}
		pos = end
	}
	return p.freed, fmt.Errorf("punch zeros of %s: %w", f.Name(), err)
}

// puncher gathers pages of zeros into runs and punches the runs.
type puncher struct {
	f          *os.File
	buf        []byte
	start, end int64 // the run so far
	freed      int64
}

// extent looks at the whole pages between start and end.
func (p *puncher) extent(ctx context.Context, start, end int64) error {
	start = start &^ (PageSize - 1)
	for start+PageSize <= end {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		buf := p.buf[:min(int64(len(p.buf)), (end-start)&^(PageSize-1))]
		if _, err := p.f.ReadAt(buf, start); err != nil {
			return err
		}
		if err := p.pages(buf, start); err != nil {
			return err
		}
		start += int64(len(buf))
	}
	return p.flush()
}

func (p *puncher) pages(buf []byte, at int64) error {
	var zero [PageSize]byte
	for ; len(buf) > 0; buf, at = buf[PageSize:], at+PageSize {
		if !bytes.Equal(buf[:PageSize], zero[:]) {
			continue
		}
		if at != p.end {
			if err := p.flush(); err != nil {
				return err
			}
			p.start = at
		}
		p.end = at + PageSize
	}
	return nil
}

func (p *puncher) flush() error {
	start, size := p.start, p.end-p.start
	p.start, p.end = 0, 0
	if size == 0 {
		return nil
	}
	_, err := retry(func() (int, error) {
		return 0, unix.Fallocate(int(p.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start, size)
	})
	if err != nil {
		return unsupported(err)
	}
	p.freed += size
	return nil
}

// nextData finds the next range of f, from pos, that is not a hole, and
// returns io.EOF when there is none.
func nextData(f *os.File, pos int64) (start, end int64, err error) {
	start, err = seek(f, pos, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, io.EOF
	}
	if err != nil {
		return 0, 0, err
	}
	end, err = seek(f, start, unix.SEEK_HOLE)
	return start, end, err
}

func seek(f *os.File, pos int64, whence int) (at int64, err error) {
	_, err = retry(func() (int, error) {
		at, err = unix.Seek(int(f.Fd()), pos, whence)
		return 0, err
	})
	return at, err
}

// DiskUse returns how many bytes of disk a file takes, holes left out.
func DiskUse(path string) (int64, error) {
	var st unix.Stat_t
	if _, err := retry(func() (int, error) { return 0, unix.Stat(path, &st) }); err != nil {
		return 0, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return st.Blocks * 512, nil
}

// FreeSpace returns how many bytes an unprivileged user may still write to the
// filesystem that path is on.
func FreeSpace(path string) (int64, error) {
	var st unix.Statfs_t
	if _, err := retry(func() (int, error) { return 0, unix.Statfs(path, &st) }); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// Reflink makes dst share all the blocks of src, copy-on-write. It returns
// errdef.ErrUnsupported where the filesystem cannot do that.
func Reflink(dst, src *os.File) error {
	_, err := retry(func() (int, error) { return 0, unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) })
	if err != nil {
		return fmt.Errorf("reflink %s to %s: %w", src.Name(), dst.Name(), unsupported(err))
	}
	return nil
}

// unsupported puts err in that category when it says that the filesystem
// cannot do a thing.
func unsupported(err error) error {
	for _, errno := range []syscall.Errno{unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOTTY, unix.EXDEV, unix.EINVAL} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w: %w", errdef.ErrUnsupported, err)
		}
	}
	return err
}
