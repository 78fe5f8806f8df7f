package guestmem

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// sparseBase is a base that is all holes.
func sparseBase(tb testing.TB, memory int64) string {
	tb.Helper()
	f := newLayerFile(tb)
	if err := f.Truncate(memory); err != nil {
		tb.Fatal(err)
	}
	return f.Name()
}

func openImage(tb testing.TB, base string, layers ...string) *Image {
	tb.Helper()
	m, err := OpenImage(base, layers...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = m.Close() })
	return m
}

func TestOpenImageRefuses(t *testing.T) {
	t.Parallel()
	const memory = 16 * PageSize
	base := sparseBase(t, memory)
	good, _ := writePieces(t, memory, filled{1, 1, 1})
	other, _ := writePieces(t, 2*memory, filled{1, 1, 1})
	none := filepath.Join(t.TempDir(), "none")
	tests := map[string]struct {
		base   string
		layers []string
		want   error
	}{
		"no-base":      {none, nil, fs.ErrNotExist},
		"no-layer":     {base, []string{good, none}, fs.ErrNotExist},
		"other-memory": {base, []string{good, other}, errdef.ErrInvalid},
		"not-a-layer":  {base, []string{good, base}, errdef.ErrUnavailable},
		"empty-base":   {sparseBase(t, 0), nil, errdef.ErrUnavailable},
		"odd-base":     {sparseBase(t, PageSize+1), nil, errdef.ErrUnavailable},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if m, err := OpenImage(tt.base, tt.layers...); !errors.Is(err, tt.want) || m != nil {
				t.Errorf("got %v, %v; want %v", m, err, tt.want)
			}
		})
	}
}

func TestReadAtEdges(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 16*PageSize, filled{15, 1, 1})
	m := openImage(t, sparseBase(t, 16*PageSize), path)
	tests := map[string]struct {
		off  int64
		size int
		n    int
		err  error
	}{
		"nothing":       {0, 0, 0, nil},
		"up-to-the-end": {m.Size() - 10, 10, 10, nil},
		"over-the-end":  {m.Size() - 10, 11, 10, io.EOF},
		"at-the-end":    {m.Size(), 1, 0, io.EOF},
		"behind":        {m.Size() + 1, 1, 0, io.EOF},
		"before":        {-1, 1, 0, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, err := m.ReadAt(make([]byte, tt.size), tt.off)
			if n != tt.n || !errors.Is(err, tt.err) {
				t.Errorf("got %d, %v", n, err)
			}
		})
	}
}

// Damage in an extent that newer layers cover whole does not matter, and damage
// in the rest of one that is read in part does.
func TestReadAtDamage(t *testing.T) {
	t.Parallel()
	const memory = 16 * PageSize
	old, _ := writePieces(t, memory, filled{2, 2, 1}, filled{8, 4, 2})
	newer, _ := writePieces(t, memory, filled{2, 2, 3}, filled{9, 1, 4})
	damage(t, old, headerSize)            // page 2, which is covered
	damage(t, old, headerSize+5*PageSize) // page 11
	m := openImage(t, sparseBase(t, memory), old, newer)
	buf := make([]byte, 8*PageSize)
	if n, err := m.ReadAt(buf, 0); n != len(buf) || err != nil {
		t.Errorf("read pages 0-7: %d, %v", n, err)
	}
	n, err := m.ReadAt(buf[:3*PageSize], 6*PageSize)
	if n != 2*PageSize || !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("read page 8, of one extent with page 11: %d, %v", n, err)
	}
	if n, err = m.ReadAt(buf[:PageSize], 9*PageSize); n != PageSize || err != nil || buf[0] != 4 {
		t.Errorf("read page 9: %d, %v", n, err)
	}
}

func damage(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = f.WriteAt([]byte{0x77}, at); err != nil {
		t.Fatal(err)
	}
	if err = f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestConcurrentReads(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 1<<24, filled{3, 2000, 7})
	m := openImage(t, sparseBase(t, 1<<24), path)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			buf := make([]byte, 3000)
			for off := int64(i) * 1000; off+3000 < m.Size(); off += 50000 {
				if _, err := m.ReadAt(buf, off); err != nil {
					t.Error(err)
				}
				page := (off + 2999) / PageSize
				if got, want := buf[2999] == 7, page >= 3 && page < 2003; got != want {
					t.Errorf("at %d: got %d", off, buf[2999])
				}
			}
		})
	}
	wg.Wait()
}

// modelPages is what a chain must read as: for each page its content, and
// whether a layer holds it.
type modelPages struct {
	data []byte
	held []bool
}

func (m *modelPages) ranges() []pageRange {
	var all []pageRange
	for i, held := range m.held {
		switch {
		case !held:
		case i > 0 && m.held[i-1]:
			all[len(all)-1].Count++
		default:
			all = append(all, pageRange{uint64(i), 1})
		}
	}
	return all
}

// drawPages changes random runs of the model, and says which pages it changed.
func (m *modelPages) drawPages(t *rapid.T, name string) []bool {
	changed := make([]bool, len(m.held))
	for range rapid.IntRange(0, 12).Draw(t, name+" runs") {
		first := rapid.IntRange(0, len(changed)-1).Draw(t, name+" first")
		count := rapid.OneOf(rapid.IntRange(1, 4), rapid.IntRange(1, 4), rapid.IntRange(1, 400)).Draw(t, name+" count")
		fill := rapid.SampledFrom([]byte{0, 1, 2, 3}).Draw(t, name+" fill")
		for i := first; i < min(first+count, len(changed)); i++ {
			changed[i] = true
			page := m.data[i*PageSize:][:PageSize]
			clear(page)
			if fill != 0 && (fill != 3 || i%3 != 0) { // 3: pages of zeros in between
				page[(i*577)%PageSize], page[PageSize-1] = fill, byte(i)
			}
		}
	}
	return changed
}

// drawChain makes a base and layers on it in dir, and what they must read as.
func drawChain(t *rapid.T, dir string) (model *modelPages, base string, layers []string) {
	pages := rapid.OneOf(rapid.IntRange(1, 30), rapid.IntRange(1, 30), rapid.IntRange(257, 400)).Draw(t, "pages")
	model = &modelPages{data: make([]byte, pages*PageSize), held: make([]bool, pages)}
	base = filepath.Join(dir, "base")
	writeChanged(t, base, model, model.drawPages(t, "base"))
	for i := range rapid.IntRange(0, 8).Draw(t, "depth") {
		path := filepath.Join(dir, "layer"+string(rune('0'+i)))
		changed := model.drawPages(t, "layer")
		writeDrawn(t, path, model, changed)
		for page, c := range changed {
			model.held[page] = model.held[page] || c
		}
		layers = append(layers, path)
	}
	return model, base, layers
}

// writeChanged makes a sparse base: what did not change is a hole.
func writeChanged(t *rapid.T, path string, m *modelPages, changed []bool) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err = f.Truncate(int64(len(m.data))); err != nil {
		t.Fatal(err)
	}
	for i, c := range changed {
		if !c {
			continue
		}
		if _, err = f.WriteAt(m.data[i*PageSize:][:PageSize], int64(i)*PageSize); err != nil {
			t.Fatal(err)
		}
	}
}

// writeDrawn makes a layer of what changed, in writes of random length.
func writeDrawn(t *rapid.T, path string, m *modelPages, changed []bool) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	w, err := NewWriter(f, int64(len(m.data)))
	if err != nil {
		t.Fatal(err)
	}
	most := rapid.SampledFrom([]int{1, 2, 100, 1000}).Draw(t, "pages in a write")
	for i := 0; i < len(changed); {
		end := i
		for end < len(changed) && changed[end] && end-i < most {
			end++
		}
		if end == i {
			i++
			continue
		}
		if err = w.Write(uint64(i), m.data[i*PageSize:end*PageSize]); err != nil {
			t.Fatal(err)
		}
		i = end
	}
	stats, err := w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if st, statErr := f.Stat(); statErr != nil || st.Size() != stats.Bytes {
		t.Fatalf("file of %d bytes, %v; stats %+v", st.Size(), statErr, stats)
	}
}

// Any chain of layers equals the full image, byte for byte, however it is read.
func TestAnyChainEqualsTheWhole(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "chain")
	rapid.Check(t, func(t *rapid.T) {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(dir) }()
		model, base, layers := drawChain(t, dir)
		m, err := OpenImage(base, layers...)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = m.Close() }()
		if m.Size() != int64(len(model.data)) {
			t.Fatalf("size %d, want %d", m.Size(), len(model.data))
		}
		for range 5 {
			from := rapid.IntRange(0, len(model.data)-1).Draw(t, "from")
			to := min(from+rapid.OneOf(rapid.IntRange(0, 3*PageSize), rapid.IntRange(0, len(model.data))).Draw(t, "size"), len(model.data))
			readsAs(t, m, int64(from), model.data[from:to])
		}
		readsAs(t, m, 0, model.data)
		if diff := cmp.Diff(model.ranges(), collect(m.Ranges)); diff != "" {
			t.Fatalf("ranges (-want +got):\n%s", diff)
		}
		flattensTo(t, m, filepath.Join(dir, "flat"), model.data)
	})
}

func readsAs(t *rapid.T, m *Image, off int64, want []byte) {
	got := bytes.Repeat([]byte{0xee}, len(want))
	if n, err := m.ReadAt(got, off); n != len(want) || err != nil {
		t.Fatalf("read %d at %d: %d, %v", len(want), off, n, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("read %d at %d: other bytes", len(want), off)
	}
}

func flattensTo(t *rapid.T, m *Image, path string, want []byte) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err = m.Flatten(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("flattened to %d other bytes, want %d; %v", len(got), len(want), err)
	}
}
