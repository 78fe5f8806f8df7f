package ext4

import (
	"context"
	"fmt"
	"io"
)

const (
	extentMagic  = 0xF30A
	extentSize   = 12 // of an entry, and of the header
	maxDepth     = 5
	maxExtent    = 32768 // blocks; an extent that is longer by n is n, and reads as zeros
	directBlocks = 12
)

// run is a row of blocks of a file: those from first on are those from at on.
type run struct{ first, at, n uint64 }

// runs calls each with what a file's first blocks are, in order. What is
// between them reads as zeros.
func (f *FS) runs(in *Inode, blocks uint64, each func(run) error) error {
	w := &walk{f: f, blocks: blocks, each: each}
	if in.flags&flagExtents != 0 {
		return w.extents(in.body[:], -1)
	}
	for i := range uint64(directBlocks) {
		if err := w.take(i, uint64(u32(in.body[:], int(4*i))), 1); err != nil {
			return err
		}
	}
	first := uint64(directBlocks)
	for level := range 3 {
		if err := w.indirect(first, uint64(u32(in.body[:], 4*(directBlocks+level))), level); err != nil {
			return err
		}
		first += w.span(level)
	}
	return nil
}

// walk goes through the map of a file's blocks.
type walk struct {
	f      *FS
	blocks uint64 // how many are of interest
	next   uint64 // no run may begin before it
	each   func(run) error
}

// take hands out n blocks. A block 0 is a hole.
func (w *walk) take(first, at, n uint64) error {
	if at == 0 || first >= w.blocks {
		return nil
	}
	if at >= w.f.blocks || n > w.f.blocks-at {
		return invalid("block %d is outside of the filesystem", at)
	}
	if first < w.next {
		return invalid("two contents for one part of a file")
	}
	n = min(n, w.blocks-first)
	w.next = first + n
	return w.each(run{first, at, n})
}

// extents goes through a node of a tree of extents, which must be depth levels
// above the leaves; the root may be as high as it says.
func (w *walk) extents(node []byte, depth int) error {
	count, level := int(u16(node, 2)), int(u16(node, 6))
	switch {
	case u16(node, 0) != extentMagic || count*extentSize+extentSize > len(node):
		return invalid("the map of a file's blocks is damaged")
	case level > maxDepth || (depth >= 0 && (level != depth || count == 0)):
		return invalid("the map of a file's blocks is not a tree")
	}
	var buf []byte
	if level > 0 {
		buf = make([]byte, w.f.blockSize)
	}
	for i := range count {
		e := node[extentSize*(i+1):]
		first := uint64(u32(e, 0))
		if first >= w.blocks {
			return nil
		}
		if level == 0 {
			n, at := uint64(u16(e, 4)), uint64(u16(e, 6))<<32|uint64(u32(e, 8))
			if n == 0 || at == 0 {
				return invalid("the map of a file's blocks is damaged")
			}
			if n > maxExtent { // set aside and never written
				continue
			}
			if err := w.take(first, at, n); err != nil {
				return err
			}
			continue
		}
		if err := w.f.block(uint64(u16(e, 8))<<32|uint64(u32(e, 4)), buf); err != nil {
			return err
		}
		if err := w.extents(buf, level-1); err != nil {
			return err
		}
	}
	return nil
}

// span is how many blocks an indirect block of that level stands for.
func (w *walk) span(level int) uint64 {
	span := w.f.blockSize / 4
	for range level {
		span *= w.f.blockSize / 4
	}
	return span
}

// indirect goes through a block of block numbers, of level 0, or one of such.
func (w *walk) indirect(first, at uint64, level int) error {
	if at == 0 || first >= w.blocks {
		return nil
	}
	buf := make([]byte, w.f.blockSize)
	if err := w.f.block(at, buf); err != nil {
		return err
	}
	for i := range w.f.blockSize / 4 {
		n := uint64(u32(buf, int(4*i)))
		var err error
		if level == 0 {
			err = w.take(first+i, n, 1)
		} else {
			err = w.indirect(first+i*w.span(level-1), n, level-1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// chunk is how much is copied at once.
const chunk = 256 << 10

// Copy writes the content of a regular file, all of it, holes as zeros.
func (f *FS) Copy(ctx context.Context, out io.Writer, in *Inode) error {
	c := &copier{ctx: ctx, out: out, buf: make([]byte, chunk), size: uint64(in.Size)}
	err := f.runs(in, (c.size+f.blockSize-1)/f.blockSize, func(r run) error {
		if err := c.zeros(r.first * f.blockSize); err != nil {
			return err
		}
		end := min((r.first+r.n)*f.blockSize, c.size)
		return c.from(io.NewSectionReader(f.r, int64(r.at*f.blockSize), int64(r.n*f.blockSize)), end)
	})
	if err == nil {
		err = c.zeros(c.size)
	}
	if err != nil {
		return fmt.Errorf("inode %d: %w", in.Number, err)
	}
	return nil
}

// copier writes a file from its beginning to its end.
type copier struct {
	ctx  context.Context // the copy is one call
	out  io.Writer
	buf  []byte
	size uint64
	done uint64
}

// zeros writes zeros up to end.
func (c *copier) zeros(end uint64) error {
	if c.done >= end {
		return nil
	}
	clear(c.buf)
	for c.done < end {
		if err := c.write(c.buf[:min(uint64(len(c.buf)), end-c.done)]); err != nil {
			return err
		}
	}
	return nil
}

// from writes what r has up to end.
func (c *copier) from(r *io.SectionReader, end uint64) error {
	for at := int64(0); c.done < end; {
		part := c.buf[:min(uint64(len(c.buf)), end-c.done)]
		if err := readAt(r, part, at); err != nil {
			return err
		}
		at += int64(len(part))
		if err := c.write(part); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) write(part []byte) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	n, err := c.out.Write(part)
	c.done += uint64(n)
	return err
}
