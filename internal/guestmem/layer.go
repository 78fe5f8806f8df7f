package guestmem

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Layer files, docs/formats/layer.md.
const (
	layerVersion = 1
	layerMagic   = "TINELAYR"

	headerSize  = PageSize // data begins behind it
	headerUsed  = 56       // the rest is zeros
	extentSize  = 32
	kindData    = 1
	kindZero    = 2
	maxExtent   = 256     // pages; bounds what must be read to see one checksum
	maxMemory   = 1 << 42 // bytes; so 31 bits count the extents
	indexBuffer = 256 << 10
)

// header is the first page of a layer file.
type header struct {
	memory  int64
	extents uint64
	index   int64 // where the index begins; it ends with the file
	sum     uint32
}

// size is the size of the file.
func (h header) size() int64 { return h.index + int64(h.extents)*extentSize }

func (h header) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, layerMagic...)
	b = binary.LittleEndian.AppendUint32(b, layerVersion)
	b = binary.LittleEndian.AppendUint32(b, PageSize)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.memory))
	b = binary.LittleEndian.AppendUint64(b, h.extents)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.index))
	b = binary.LittleEndian.AppendUint64(b, h.extents*extentSize)
	b = binary.LittleEndian.AppendUint32(b, h.sum)
	b = binary.LittleEndian.AppendUint32(b, checksum(0, b))
	return b[:headerSize]
}

// decodeHeader is strict: what it returns encodes to the same bytes. size is
// that of the file.
func decodeHeader(b *[headerSize]byte, size int64) (header, error) {
	if string(b[:8]) != layerMagic {
		return header{}, damaged("not a layer")
	}
	if version := binary.LittleEndian.Uint32(b[8:]); version != layerVersion {
		return header{}, fmt.Errorf("%w: layer of version %d, want %d", errdef.ErrUnsupported, version, layerVersion)
	}
	want := checksum(0, b[:headerUsed-4])
	if sum := binary.LittleEndian.Uint32(b[headerUsed-4:]); sum != want {
		return header{}, damaged("header has checksum %08x, want %08x", sum, want)
	}
	h := header{
		memory:  int64(binary.LittleEndian.Uint64(b[16:])),
		extents: binary.LittleEndian.Uint64(b[24:]),
		index:   int64(binary.LittleEndian.Uint64(b[32:])),
		sum:     binary.LittleEndian.Uint32(b[48:]),
	}
	if err := checkMemory(h.memory); err != nil {
		return header{}, damaged("%w", err)
	}
	if h.extents > uint64(h.memory/PageSize) {
		return header{}, damaged("%d extents in a memory of %d bytes", h.extents, h.memory)
	}
	if h.index < headerSize || h.index > size || h.size() != size {
		return header{}, damaged("index at %d with %d extents in a file of %d bytes", h.index, h.extents, size)
	}
	if !bytes.Equal(h.encode(), b[:]) {
		return header{}, damaged("header has fields of another version")
	}
	return h, nil
}

func checkMemory(memory int64) error {
	if memory <= 0 || memory > maxMemory || memory%PageSize != 0 {
		return fmt.Errorf("memory of %d bytes", memory)
	}
	return nil
}

// damaged says what is wrong with a file that cannot be used.
func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errdef.ErrUnavailable, fmt.Errorf(format, args...))
}

// extent is a run of pages in a layer.
type extent struct {
	first, count uint64
	offset       int64  // in the file; 0 when zero
	sum          uint32 // CRC-32C of the data; 0 when zero
	kind         uint32
}

func (e extent) end() uint64 { return e.first + e.count }

// bytes is how much data of it the file holds.
func (e extent) bytes() int64 {
	if e.kind == kindZero {
		return 0
	}
	return int64(e.count) * PageSize
}

func (e extent) encode(b *[extentSize]byte) {
	binary.LittleEndian.PutUint64(b[0:], e.first)
	binary.LittleEndian.PutUint64(b[8:], e.count)
	binary.LittleEndian.PutUint64(b[16:], uint64(e.offset))
	binary.LittleEndian.PutUint32(b[24:], e.sum)
	binary.LittleEndian.PutUint32(b[28:], e.kind)
}

func decodeExtent(b *[extentSize]byte) extent {
	return extent{
		first:  binary.LittleEndian.Uint64(b[0:]),
		count:  binary.LittleEndian.Uint64(b[8:]),
		offset: int64(binary.LittleEndian.Uint64(b[16:])),
		sum:    binary.LittleEndian.Uint32(b[24:]),
		kind:   binary.LittleEndian.Uint32(b[28:]),
	}
}

// indexReader decodes an index, extent by extent, so that a wrong one costs no
// more memory than was right of it.
type indexReader struct {
	header
	next    uint64 // the first page that an extent may hold
	offset  int64  // where the next data must be
	extents []extent
	stats   Stats
}

// readIndex reads what the header promises. The bytes are the only ones that
// could say what they say.
func readIndex(h header, r io.Reader) (*indexReader, error) {
	x := &indexReader{header: h, offset: headerSize, stats: Stats{Bytes: h.size()}}
	var entry [extentSize]byte
	var sum uint32
	for range h.extents {
		if _, err := io.ReadFull(r, entry[:]); err != nil {
			return nil, cutOff(err)
		}
		sum = checksum(sum, entry[:])
		if err := x.add(decodeExtent(&entry)); err != nil {
			return nil, err
		}
	}
	if sum != h.sum {
		return nil, damaged("index has checksum %08x, want %08x", sum, h.sum)
	}
	if x.offset != h.index {
		return nil, damaged("data ends at %d, want %d", x.offset, h.index)
	}
	return x, nil
}

func (x *indexReader) add(e extent) error {
	pages := uint64(x.memory / PageSize)
	if e.first < x.next || e.first >= pages || e.count == 0 || e.count > pages-e.first || x.splits(e) {
		return damaged("extent of %d pages at page %d of %d, after page %d", e.count, e.first, pages, x.next)
	}
	switch {
	case e.kind == kindZero && e.offset == 0 && e.sum == 0:
		x.stats.Zero += e.count
	case e.kind == kindData && e.offset == x.offset && e.count <= maxExtent && e.bytes() <= x.index-x.offset:
		x.stats.Pages += e.count
	default:
		return damaged("extent of kind %d with %d pages at %d, want %d", e.kind, e.count, e.offset, x.offset)
	}
	x.next = e.end()
	x.offset += e.bytes()
	x.extents = append(x.extents, e)
	return nil
}

// splits reports whether e should have been a part of the extent before.
func (x *indexReader) splits(e extent) bool {
	if len(x.extents) == 0 {
		return false
	}
	last := x.extents[len(x.extents)-1]
	return last.end() == e.first && last.kind == e.kind && (e.kind == kindZero || last.count != maxExtent)
}

// Layer is an open layer file. It is safe for concurrent use.
type Layer struct {
	f       *os.File
	memory  int64
	extents []extent // ascending
	stats   Stats
	seen    []atomic.Bool // of each extent: its checksum was right
	bufs    sync.Pool     // of *[]byte
}

// OpenLayer opens a layer file and checks all of it but the data, which is
// checked when it is read. The error is in the category errdef.ErrUnavailable
// when the file is damaged or no layer, and errdef.ErrUnsupported when it is of
// another version.
func OpenLayer(path string) (l *Layer, err error) {
	f, size, err := openRegular(path)
	if err != nil {
		return nil, fmt.Errorf("open layer: %w", err)
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(f.Close)
	x, err := load(f, size)
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", path, err)
	}
	return &Layer{
		f: f, memory: x.memory, extents: x.extents, stats: x.stats,
		seen: make([]atomic.Bool, len(x.extents)),
	}, nil
}

// openRegular opens a file and returns its size. It is not led astray by a
// link, and does not wait for the other end of a pipe.
func openRegular(path string) (*os.File, int64, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is no regular file", errdef.ErrUnavailable, path)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

// load reads header and index.
func load(r io.ReaderAt, size int64) (*indexReader, error) {
	if size < headerSize {
		return nil, damaged("file of %d bytes", size)
	}
	var first [headerSize]byte
	if _, err := r.ReadAt(first[:], 0); err != nil {
		return nil, cutOff(err)
	}
	h, err := decodeHeader(&first, size)
	if err != nil {
		return nil, err
	}
	length := size - h.index
	index := io.NewSectionReader(r, h.index, length)
	return readIndex(h, bufio.NewReaderSize(index, int(min(length, indexBuffer))))
}

// Close closes the file. No read may be under way.
func (l *Layer) Close() error { return l.f.Close() }

// Memory returns the size of the memory that the layer is of, in bytes.
func (l *Layer) Memory() int64 { return l.memory }

// Stats returns what the layer holds.
func (l *Layer) Stats() Stats { return l.stats }

// Ranges calls yield with each range of pages that the layer holds, those of
// zeros too. Ranges ascend and never touch; yield returns false to stop.
func (l *Layer) Ranges(yield func(first, count uint64) bool) {
	var first, end uint64
	for _, e := range l.extents {
		if e.first != end {
			if end > first && !yield(first, end-first) {
				return
			}
			first = e.first
		}
		end = e.end()
	}
	if end > first {
		yield(first, end-first)
	}
}

// Verify reads all data and sees that it is what was written. The error is in
// the category errdef.ErrUnavailable when it is not.
func (l *Layer) Verify(ctx context.Context) error {
	size := int64(l.stats.Pages) * PageSize
	r := bufio.NewReaderSize(io.NewSectionReader(l.f, headerSize, size), int(min(size, writeSize)))
	buf := make([]byte, min(size, maxExtent*PageSize))
	for i, e := range l.extents {
		if ctx.Err() != nil {
			return fmt.Errorf("verify layer %s: %w", l.f.Name(), context.Cause(ctx))
		}
		data := buf[:e.bytes()]
		_, err := io.ReadFull(r, data)
		if err = cutOff(err); err == nil {
			err = l.check(i, data)
		}
		if err != nil {
			return fmt.Errorf("verify layer %s: %w", l.f.Name(), err)
		}
	}
	return nil
}

// cutOff says that a file ended which was whole when it was opened. It keeps
// other errors, and nil.
func cutOff(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("the file was cut off")
	}
	return err
}

// check compares the data of extent i with its checksum.
func (l *Layer) check(i int, data []byte) error {
	e := l.extents[i]
	if sum := checksum(0, data); sum != e.sum {
		return damaged("%d pages from %d have checksum %08x, want %08x", e.count, e.first, sum, e.sum)
	}
	l.seen[i].Store(true)
	return nil
}

// readExtent reads a part of extent i, from byte off of it. An extent that is
// read for the first time is read as a whole, for its checksum.
func (l *Layer) readExtent(i int, p []byte, off int64) error {
	e := l.extents[i]
	switch {
	case e.kind == kindZero:
		clear(p)
		return nil
	case l.seen[i].Load():
		return l.readFull(p, e.offset+off)
	case int64(len(p)) == e.bytes():
		if err := l.readFull(p, e.offset); err != nil {
			return err
		}
		return l.check(i, p)
	}
	buf, ok := l.bufs.Get().(*[]byte)
	if !ok || int64(len(*buf)) < e.bytes() {
		buf = new(make([]byte, e.bytes()))
	}
	defer l.bufs.Put(buf)
	data := (*buf)[:e.bytes()]
	if err := l.readFull(data, e.offset); err != nil {
		return err
	}
	if err := l.check(i, data); err != nil {
		return err
	}
	copy(p, data[off:])
	return nil
}

func (l *Layer) readFull(p []byte, off int64) error {
	_, err := l.f.ReadAt(p, off)
	return cutOff(err)
}
