package guestmem

import (
	"bytes"
	"fmt"
	"os"

	"github.com/tinevm/tine/internal/errdef"
)

// writeSize is how much a Writer gathers before it writes.
const writeSize = 1 << 20

// Stats says what a layer holds.
type Stats struct {
	// Pages are stored; Zero are only marked, as pages of zeros.
	Pages, Zero uint64
	// Bytes is the size of the file.
	Bytes int64
}

// Writer writes a layer file, from the first byte to the last and the header
// at the end: until then the file is not a layer. A Writer that is given up
// needs no Close. It is not safe for concurrent use.
type Writer struct {
	f       *os.File
	memory  int64
	next    uint64 // the lowest page that may still be written
	buf     []byte // what belongs at off
	off     int64
	extents []extent
	pages   uint64
	zero    uint64
	err     error // what has befallen it; it does no more then
}

// NewWriter returns a Writer to f, which must be empty, for a machine with
// memory bytes, a multiple of PageSize. The file stays the caller's.
func NewWriter(f *os.File, memory int64) (*Writer, error) {
	if err := checkMemory(memory); err != nil {
		return nil, fmt.Errorf("write layer %s: %w: %w", f.Name(), errdef.ErrInvalid, err)
	}
	if err := wantEmpty(f); err != nil {
		return nil, fmt.Errorf("write layer %s: %w", f.Name(), err)
	}
	return &Writer{f: f, memory: memory, buf: make([]byte, 0, writeSize), off: headerSize}, nil
}

// wantEmpty sees that f has no content that would stay.
func wantEmpty(f *os.File) error {
	st, err := f.Stat()
	if err == nil && st.Size() != 0 {
		err = fmt.Errorf("%w: file of %d bytes, want an empty one", errdef.ErrInvalid, st.Size())
	}
	return err
}

// Write adds whole pages, the first of which has the number page. Pages come
// in ascending order and none comes twice. Pages of zeros are marked and take
// no space. After an error, which is in the category errdef.ErrExhausted when
// the disk is full, all later calls fail.
func (w *Writer) Write(page uint64, data []byte) error {
	if w.err == nil {
		w.err = w.write(page, data)
	}
	return w.err
}

func (w *Writer) write(page uint64, data []byte) error {
	count, all := uint64(len(data)/PageSize), uint64(w.memory/PageSize)
	if len(data)%PageSize != 0 || page < w.next || page > all || count > all-page {
		return fmt.Errorf("write layer %s: %w: %d bytes at page %d of %d, after page %d",
			w.f.Name(), errdef.ErrInvalid, len(data), page, all, w.next)
	}
	for len(data) > 0 {
		n, zero := run(data)
		if zero {
			w.mark(page, uint64(n))
		} else if err := w.store(page, data[:n*PageSize]); err != nil {
			return fmt.Errorf("write layer: %w", diskError(err))
		}
		page, data = page+uint64(n), data[n*PageSize:]
	}
	w.next = page
	return nil
}

// run returns how many pages at the start of data are of one kind, and which.
func run(data []byte) (pages int, zero bool) {
	var none [PageSize]byte
	zero = bytes.Equal(data[:PageSize], none[:])
	for pages = 1; pages*PageSize < len(data); pages++ {
		if bytes.Equal(data[pages*PageSize:][:PageSize], none[:]) != zero {
			break
		}
	}
	return pages, zero
}

// mark adds pages of zeros.
func (w *Writer) mark(page, count uint64) {
	w.zero += count
	if last := w.last(); last != nil && last.kind == kindZero && last.end() == page {
		last.count += count
		return
	}
	w.extents = append(w.extents, extent{first: page, count: count, kind: kindZero})
}

// store adds pages that are not zeros, cut into extents.
func (w *Writer) store(page uint64, data []byte) error {
	w.pages += uint64(len(data) / PageSize)
	for len(data) > 0 {
		last := w.last()
		if last == nil || last.kind != kindData || last.end() != page || last.count == maxExtent {
			w.extents = append(w.extents, extent{first: page, offset: w.off + int64(len(w.buf)), kind: kindData})
			last = w.last()
		}
		n := min(len(data), int(maxExtent-last.count)*PageSize)
		last.sum = checksum(last.sum, data[:n])
		last.count += uint64(n / PageSize)
		if err := w.append(data[:n]); err != nil {
			return err
		}
		page, data = last.end(), data[n:]
	}
	return nil
}

func (w *Writer) last() *extent {
	if len(w.extents) == 0 {
		return nil
	}
	return &w.extents[len(w.extents)-1]
}

// append adds bytes to the file. A whole buffer's worth is not copied first.
func (w *Writer) append(data []byte) error {
	for len(data) > 0 {
		if len(w.buf) == 0 && len(data) >= writeSize {
			if _, err := w.f.WriteAt(data, w.off); err != nil {
				return err
			}
			w.off += int64(len(data))
			return nil
		}
		n := min(len(data), writeSize-len(w.buf))
		w.buf = append(w.buf, data[:n]...)
		data = data[n:]
		if len(w.buf) == writeSize {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *Writer) flush() error {
	_, err := w.f.WriteAt(w.buf, w.off)
	w.off += int64(len(w.buf))
	w.buf = w.buf[:0]
	return err
}

// Close writes the index and the header. It neither syncs nor closes the file.
// The Writer is of no use afterwards.
func (w *Writer) Close() (Stats, error) {
	if w.err != nil {
		return Stats{}, w.err
	}
	stats, err := w.finish()
	if w.err = os.ErrClosed; err != nil {
		w.err = fmt.Errorf("write layer: %w", diskError(err))
		return Stats{}, w.err
	}
	return stats, nil
}

func (w *Writer) finish() (Stats, error) {
	h := header{memory: w.memory, extents: uint64(len(w.extents)), index: w.off + int64(len(w.buf))}
	var entry [extentSize]byte
	for i := range w.extents {
		w.extents[i].encode(&entry)
		h.sum = checksum(h.sum, entry[:])
		if err := w.append(entry[:]); err != nil {
			return Stats{}, err
		}
	}
	if err := w.flush(); err != nil {
		return Stats{}, err
	}
	_, err := w.f.WriteAt(h.encode(), 0)
	return Stats{Pages: w.pages, Zero: w.zero, Bytes: w.off}, err
}
