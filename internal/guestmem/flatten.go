package guestmem

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// Flatten writes the whole memory to f, which must be empty, as a file whose
// pages of zeros are holes. It shares the blocks of the base where the
// filesystem can, and copies its data where it cannot. It does not sync f, and
// leaves it in no particular state when it fails.
func (m *Image) Flatten(ctx context.Context, f *os.File) error {
	if err := m.flatten(ctx, f); err != nil {
		return fmt.Errorf("flatten memory image to %s: %w", f.Name(), diskError(err))
	}
	return nil
}

func (m *Image) flatten(ctx context.Context, f *os.File) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := wantEmpty(f); err != nil {
		return err
	}
	x := flattener{ctx: ctx, image: m, f: f, buf: make([]byte, writeSize)}
	err := linux.CopySparse(ctx, f, m.base)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = cutOff(err)
	}
	if err == nil {
		err = x.layers()
	}
	if err == nil {
		err = errors.Join(wantSize(m.base, m.size), wantSize(f, m.size))
	}
	return err
}

// wantSize sees that nobody has cut off f.
func wantSize(f *os.File, size int64) error {
	st, err := f.Stat()
	if err == nil && st.Size() != size {
		err = damaged("%s has %d bytes, want %d", f.Name(), st.Size(), size)
	}
	return err
}

// flattener is one call of Flatten.
type flattener struct {
	ctx   context.Context // of that call
	image *Image
	f     *os.File
	buf   []byte
}

// layers writes what the layers hold over what is there.
func (x *flattener) layers() error {
	spans := x.image.spans
	for i := 0; i < len(spans); {
		first, end, zero := spans[i].first, spans[i].end, x.image.zero(spans[i])
		for i++; i < len(spans) && spans[i].first == end && x.image.zero(spans[i]) == zero; i++ {
			end = spans[i].end
		}
		write := x.write
		if zero {
			write = x.punch
		}
		if err := write(int64(first)*PageSize, int64(end)*PageSize); err != nil {
			return err
		}
	}
	return nil
}

// zero reports whether a span is of zeros.
func (m *Image) zero(s span) bool { return m.layers[s.layer].extents[s.extent].kind == kindZero }

func (x *flattener) write(start, end int64) error {
	for start < end {
		if x.ctx.Err() != nil {
			return context.Cause(x.ctx)
		}
		buf := x.buf[:min(int64(len(x.buf)), end-start)]
		if _, err := x.image.read(buf, start); err != nil {
			return err
		}
		if _, err := x.f.WriteAt(buf, start); err != nil {
			return err
		}
		start += int64(len(buf))
	}
	return nil
}

// punch makes a hole, or writes zeros where the filesystem has no holes.
func (x *flattener) punch(start, end int64) error {
	if x.ctx.Err() != nil {
		return context.Cause(x.ctx)
	}
	err := linux.PunchHole(x.f, start, end-start)
	if errors.Is(err, errdef.ErrUnsupported) {
		return x.write(start, end)
	}
	return err
}
