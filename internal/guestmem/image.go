package guestmem

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Image is a whole memory: a base, which is a file of that size, and layers on
// top of it, of which the newest that holds a page wins. It is safe for
// concurrent use.
type Image struct {
	base   *os.File
	size   int64
	layers []*Layer // oldest first
	spans  []span   // ascending; what the layers hold together
}

// span is a run of pages in one extent of one layer.
type span struct {
	first, end    uint64
	layer, extent int32
}

// OpenImage opens a base and its layers, oldest first, which must all be of
// one memory size. The files must not change while the Image is open.
func OpenImage(base string, layers ...string) (m *Image, err error) {
	m = &Image{}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(m.Close)
	if err = m.open(base, layers); err != nil {
		return nil, fmt.Errorf("open memory image: %w", err)
	}
	return m, nil
}

func (m *Image) open(base string, layers []string) (err error) {
	if m.base, m.size, err = openRegular(base); err != nil {
		return err
	}
	if err = checkMemory(m.size); err != nil {
		return fmt.Errorf("%w: %s: %w", errdef.ErrUnavailable, base, err)
	}
	for _, path := range layers {
		l, openErr := OpenLayer(path)
		if openErr != nil {
			return openErr
		}
		m.layers = append(m.layers, l)
		if l.memory != m.size {
			return fmt.Errorf("%w: layer %s is of %d bytes of memory, base %s has %d",
				errdef.ErrInvalid, path, l.memory, base, m.size)
		}
	}
	m.spans = m.overlay(0, len(m.layers))
	return nil
}

// Close closes the files. No read may be under way.
func (m *Image) Close() error {
	var errs []error
	if m.base != nil {
		errs = append(errs, m.base.Close())
	}
	for _, l := range m.layers {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// Size returns the size of the memory in bytes.
func (m *Image) Size() int64 { return m.size }

// overlay returns what the layers from one to another hold together. It
// halves, so that a long chain costs its extents times the logarithm of its
// depth.
func (m *Image) overlay(from, to int) []span {
	switch to - from {
	case 0:
		return nil
	case 1:
		spans := make([]span, len(m.layers[from].extents))
		for i, e := range m.layers[from].extents {
			spans[i] = span{e.first, e.end(), int32(from), int32(i)}
		}
		return spans
	}
	middle := (from + to) / 2
	return overlaySpans(m.overlay(from, middle), m.overlay(middle, to))
}

// overlaySpans adds to newer what of older it leaves uncovered.
func overlaySpans(older, newer []span) []span {
	merged := make([]span, 0, len(older)+len(newer))
	for _, s := range older {
		for len(newer) > 0 && newer[0].first < s.end {
			n := newer[0]
			if n.first > s.first { // what sticks out in front
				merged = append(merged, span{s.first, n.first, s.layer, s.extent})
			}
			s.first = max(s.first, n.end)
			if n.end > s.end { // it may cover the next one too
				break
			}
			merged, newer = append(merged, n), newer[1:]
		}
		if s.first < s.end {
			merged = append(merged, s)
		}
	}
	return append(merged, newer...)
}

// Ranges calls yield with each range of pages that some layer holds. Ranges
// ascend and never touch; yield returns false to stop.
func (m *Image) Ranges(yield func(first, count uint64) bool) {
	for i := 0; i < len(m.spans); {
		first, end := m.spans[i].first, m.spans[i].end
		for i++; i < len(m.spans) && m.spans[i].first == end; i++ {
			end = m.spans[i].end
		}
		if !yield(first, end-first) {
			return
		}
	}
}

// ReadAt reads any range, as io.ReaderAt says. Data of a layer is checked
// before it is returned for the first time; the error is in the category
// errdef.ErrUnavailable when it is damaged. The base is not checked.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read memory image: %w: offset %d", errdef.ErrInvalid, off)
	}
	if off >= m.size {
		return 0, io.EOF
	}
	whole := len(p)
	p = p[:min(int64(len(p)), m.size-off)]
	n, err := m.read(p, off)
	if err != nil {
		return n, fmt.Errorf("read memory image: %w", err)
	}
	if n < whole {
		return n, io.EOF
	}
	return n, nil
}

func (m *Image) read(p []byte, off int64) (done int, err error) {
	spans := m.spans[m.search(uint64(off/PageSize)):]
	for done < len(p) {
		var n int
		if n, err = m.readPiece(p[done:], off+int64(done), spans); err != nil {
			return done, err
		}
		done += n
		if len(spans) > 0 && off+int64(done) >= int64(spans[0].end)*PageSize {
			spans = spans[1:]
		}
	}
	return done, nil
}

// search returns the first span that ends after page.
func (m *Image) search(page uint64) int {
	i, _ := slices.BinarySearchFunc(m.spans, page, func(s span, page uint64) int { return cmp.Compare(s.end, page+1) })
	return i
}

// readPiece reads what comes first: of the first span, or of the base below.
func (m *Image) readPiece(p []byte, off int64, spans []span) (int, error) {
	end := m.size
	if len(spans) > 0 {
		if s := spans[0]; off >= int64(s.first)*PageSize {
			p = p[:min(int64(len(p)), int64(s.end)*PageSize-off)]
			return len(p), m.readSpan(s, p, off)
		}
		end = int64(spans[0].first) * PageSize
	}
	p = p[:min(int64(len(p)), end-off)]
	n, err := m.base.ReadAt(p, off)
	if err = cutOff(err); err != nil {
		err = fmt.Errorf("base %s: %w", m.base.Name(), err)
	}
	return n, err
}

func (m *Image) readSpan(s span, p []byte, off int64) error {
	l := m.layers[s.layer]
	first := int64(l.extents[s.extent].first) * PageSize
	if err := l.readExtent(int(s.extent), p, off-first); err != nil {
		return fmt.Errorf("layer %s: %w", l.f.Name(), err)
	}
	return nil
}
