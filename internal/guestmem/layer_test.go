package guestmem

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// filled is pages that are written to a layer: each is filled with one byte.
type filled struct {
	Page  uint64 `json:"page"`
	Count int    `json:"count"`
	Fill  byte   `json:"fill"`
}

func (p filled) bytes() []byte { return bytes.Repeat([]byte{p.Fill}, p.Count*PageSize) }

func newLayerFile(tb testing.TB) *os.File {
	tb.Helper()
	f, err := os.CreateTemp(tb.TempDir(), "layer")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = f.Close() })
	return f
}

// writePieces makes a layer file.
func writePieces(tb testing.TB, memory int64, pieces ...filled) (string, Stats) {
	tb.Helper()
	f := newLayerFile(tb)
	w, err := NewWriter(f, memory)
	if err != nil {
		tb.Fatal(err)
	}
	for _, p := range pieces {
		if err = w.Write(p.Page, p.bytes()); err != nil {
			tb.Fatal(err)
		}
	}
	stats, err := w.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return f.Name(), stats
}

func openLayer(tb testing.TB, path string) *Layer {
	tb.Helper()
	l, err := OpenLayer(path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = l.Close() })
	return l
}

// pageRange is what a Ranges yields.
type pageRange struct{ First, Count uint64 }

func collect(ranges func(func(first, count uint64) bool)) []pageRange {
	var all []pageRange
	ranges(func(first, count uint64) bool {
		all = append(all, pageRange{first, count})
		return true
	})
	return all
}

func TestLayer(t *testing.T) {
	t.Parallel()
	const memory = 1 << 30
	path, stats := writePieces(t, memory,
		filled{0, 2, 1}, filled{2, 1, 0}, filled{3, 1, 0}, filled{4, 1, 2}, filled{5, 1, 3},
		filled{100, 600, 4}, filled{1000, 1000, 0}, filled{memory/PageSize - 1, 1, 5})
	l := openLayer(t, path)
	want := []extent{
		{first: 0, count: 2, offset: 4096, kind: kindData},
		{first: 2, count: 2, kind: kindZero},
		{first: 4, count: 2, offset: 3 * 4096, kind: kindData},
		{first: 100, count: 256, offset: 5 * 4096, kind: kindData},
		{first: 356, count: 256, offset: 261 * 4096, kind: kindData},
		{first: 612, count: 88, offset: 517 * 4096, kind: kindData},
		{first: 1000, count: 1000, kind: kindZero},
		{first: memory/PageSize - 1, count: 1, offset: 605 * 4096, kind: kindData},
	}
	got := append([]extent(nil), l.extents...)
	for i := range got {
		got[i].sum = 0
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(extent{})); diff != "" {
		t.Errorf("extents (-want +got):\n%s", diff)
	}
	wantStats := Stats{Pages: 605, Zero: 1002, Bytes: 606*4096 + 8*32}
	if stats != wantStats || l.Stats() != wantStats || l.Memory() != memory {
		t.Errorf("stats %+v and %+v, want %+v; memory %d", stats, l.Stats(), wantStats, l.Memory())
	}
	wantRanges := []pageRange{{0, 6}, {100, 600}, {1000, 1000}, {memory/PageSize - 1, 1}}
	if diff := cmp.Diff(wantRanges, collect(l.Ranges)); diff != "" {
		t.Errorf("ranges (-want +got):\n%s", diff)
	}
	if err := l.Verify(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestRangesStop(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 1<<20, filled{1, 1, 1}, filled{3, 1, 1}, filled{5, 1, 1})
	l := openLayer(t, path)
	m := openImage(t, sparseBase(t, 1<<20), path)
	for name, ranges := range map[string]func(func(_, _ uint64) bool){"layer": l.Ranges, "image": m.Ranges} {
		n := 0
		ranges(func(uint64, uint64) bool { n++; return n < 2 })
		if n != 2 {
			t.Errorf("%s: yielded %d times, want 2", name, n)
		}
	}
}

func TestEmptyLayer(t *testing.T) {
	t.Parallel()
	path, stats := writePieces(t, PageSize)
	l := openLayer(t, path)
	if err := l.Verify(t.Context()); err != nil || collect(l.Ranges) != nil || stats != (Stats{Bytes: headerSize}) {
		t.Errorf("got %v, %v, %+v", err, collect(l.Ranges), stats)
	}
}

func TestVerifyStops(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 1<<20, filled{1, 1, 1})
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("enough")
	cancel(cause)
	if err := openLayer(t, path).Verify(ctx); !errors.Is(err, cause) {
		t.Errorf("got %v", err)
	}
}

// Whatever byte changes, it is found: by opening in the header and the index,
// and in the data by Verify and by each way to read.
func TestEveryFlippedByteIsFound(t *testing.T) {
	t.Parallel()
	const memory = 64 * PageSize
	path, _ := writePieces(t, memory, filled{1, 1, 1}, filled{2, 1, 0}, filled{9, 1, 7}, filled{60, 4, 0})
	base := sparseBase(t, memory)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for i := range good {
		if _, err = f.WriteAt([]byte{good[i] ^ 1<<(i%8)}, int64(i)); err != nil {
			t.Fatal(err)
		}
		m, openErr := OpenImage(base, path)
		switch {
		case i >= 8 && i < 12:
			if !errors.Is(openErr, errdef.ErrUnsupported) {
				t.Fatalf("byte %d, of the version: %v", i, openErr)
			}
		case i < headerSize || i >= headerSize+2*PageSize:
			if !errors.Is(openErr, errdef.ErrUnavailable) {
				t.Fatalf("byte %d: opened: %v", i, openErr)
			}
		default:
			if openErr != nil {
				t.Fatalf("byte %d: %v", i, openErr)
			}
			flippedData(t, m, i)
		}
		if _, err = f.WriteAt(good[i:i+1], int64(i)); err != nil {
			t.Fatal(err)
		}
	}
	if err = openLayer(t, path).Verify(t.Context()); err != nil {
		t.Errorf("after all: %v", err)
	}
}

// flippedData sees that a flipped byte in one of the two pages is found, no
// matter how little of the page is asked for, and again when asked again.
func flippedData(t *testing.T, m *Image, at int) {
	t.Helper()
	defer func() { _ = m.Close() }()
	page := int64(1)
	if at >= headerSize+PageSize {
		page = 9
	}
	for _, size := range []int{1, PageSize, PageSize} {
		if _, err := m.ReadAt(make([]byte, size), page*PageSize); !errors.Is(err, errdef.ErrUnavailable) {
			t.Fatalf("byte %d: read %d of page %d: %v", at, size, page, err)
		}
	}
	if err := m.layers[0].Verify(t.Context()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Fatalf("byte %d: verified: %v", at, err)
	}
}

func TestOpenLayerRefuses(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 1<<22, filled{1, 1, 1}, filled{2, 1, 0}, filled{9, 300, 7})
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, n := range []int{0, 1, headerUsed, headerSize - 1, headerSize, headerSize + 1, len(good) - extentSize, len(good) - 1} {
		refused(t, filepath.Join(dir, "cut"), good[:n], errdef.ErrUnavailable)
	}
	for _, n := range []int{1, extentSize, PageSize} {
		refused(t, filepath.Join(dir, "longer"), append(bytes.Clone(good), make([]byte, n)...), errdef.ErrUnavailable)
	}
	refused(t, filepath.Join(dir, "no-header"), append(make([]byte, headerSize), good[headerSize:]...), errdef.ErrUnavailable)
	if _, err = OpenLayer(dir); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a directory: %v", err)
	}
	if _, err = OpenLayer(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	link, pipe := filepath.Join(dir, "link"), filepath.Join(dir, "pipe")
	if err = errors.Join(os.Symlink(path, link), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err = OpenLayer(link); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link: %v", err)
	}
	if _, err = OpenLayer(pipe); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a pipe: %v", err)
	}
}

func refused(t *testing.T, path string, data []byte, want error) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if l, err := OpenLayer(path); !errors.Is(err, want) {
		t.Errorf("%s of %d bytes: %v, %v", filepath.Base(path), len(data), l, err)
	}
}

// A file that is cut off while it is open is damaged, not at its end.
func TestLayerCutOffLater(t *testing.T) {
	t.Parallel()
	path, _ := writePieces(t, 1<<20, filled{1, 4, 1})
	l := openLayer(t, path)
	m := openImage(t, sparseBase(t, 1<<20), path)
	if err := os.Truncate(path, headerSize+PageSize); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ReadAt(make([]byte, m.Size()), 0); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("read: %v", err)
	}
	if err := l.Verify(t.Context()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("verify: %v", err)
	}
}

// indexed is a file of the right checksums with whatever extents, whose data,
// pages in all, is a hole.
func indexed(tb testing.TB, memory int64, pages int64, extents ...extent) []byte {
	tb.Helper()
	h := header{memory: memory, extents: uint64(len(extents)), index: headerSize + pages*PageSize}
	var index []byte
	for _, e := range extents {
		var b [extentSize]byte
		e.encode(&b)
		index = append(index, b[:]...)
	}
	h.sum = checksum(0, index)
	return append(append(h.encode(), make([]byte, pages*PageSize)...), index...)
}

func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	const pages = 1000
	data := func(first, count uint64, at int64) extent {
		return extent{first: first, count: count, offset: at * PageSize, kind: kindData}
	}
	zero := func(first, count uint64) extent { return extent{first: first, count: count, kind: kindZero} }
	tests := map[string]struct {
		stored  int64
		extents []extent
		good    bool
	}{
		"good":                  {3, []extent{data(0, 1, 1), zero(1, 999-2), data(998, 2, 2)}, true},
		"good-long":             {300, []extent{data(0, 256, 1), data(256, 44, 257)}, true},
		"good-all-zero":         {0, []extent{zero(0, pages)}, true},
		"no-pages":              {0, []extent{zero(1, 0)}, false},
		"outside":               {0, []extent{zero(pages, 1)}, false},
		"reaches-outside":       {0, []extent{zero(1, pages)}, false},
		"wraps":                 {0, []extent{zero(5, 1<<64-3)}, false},
		"first-wraps":           {0, []extent{zero(1<<64-1, 2)}, false},
		"overlap":               {2, []extent{data(5, 1, 1), data(5, 1, 2)}, false},
		"descends":              {2, []extent{data(5, 1, 1), data(4, 1, 2)}, false},
		"split-data":            {2, []extent{data(5, 1, 1), data(6, 1, 2)}, false},
		"split-zero":            {0, []extent{zero(5, 1), zero(6, 1)}, false},
		"too-long":              {257, []extent{data(0, 257, 1)}, false},
		"kind-0":                {1, []extent{{first: 1, count: 1, offset: PageSize}}, false},
		"kind-3":                {1, []extent{{first: 1, count: 1, offset: PageSize, kind: 3}}, false},
		"offset-gap":            {2, []extent{data(0, 1, 2)}, false},
		"offset-header":         {1, []extent{data(0, 1, 0)}, false},
		"offset-same":           {2, []extent{data(0, 1, 1), data(2, 1, 1)}, false},
		"data-in-index":         {1, []extent{data(0, 2, 1)}, false},
		"data-left":             {2, []extent{data(0, 1, 1)}, false},
		"zero-with-offset":      {0, []extent{{first: 1, count: 1, offset: PageSize, kind: kindZero}}, false},
		"zero-with-sum":         {0, []extent{{first: 1, count: 1, sum: 1, kind: kindZero}}, false},
		"more-extents-than-fit": {0, make([]extent, pages+1), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := indexed(t, pages*PageSize, tt.stored, tt.extents...)
			x, err := load(bytes.NewReader(file), int64(len(file)))
			if tt.good != (err == nil) || (!tt.good && !errors.Is(err, errdef.ErrUnavailable)) {
				t.Errorf("got %+v, %v", x, err)
			}
		})
	}
}

// The header's numbers are refused before anything is made of them.
func TestDecodeHeaderRefuses(t *testing.T) {
	t.Parallel()
	tests := map[string]header{
		"no-memory":       {memory: 0, index: headerSize},
		"negative-memory": {memory: -PageSize, index: headerSize},
		"odd-memory":      {memory: PageSize + 1, index: headerSize},
		"vast-memory":     {memory: maxMemory + PageSize, index: headerSize},
		"index-in-header": {memory: PageSize, index: headerSize - extentSize, extents: 1},
		"index-behind":    {memory: PageSize, index: headerSize + PageSize},
		"index-negative":  {memory: maxMemory, index: -extentSize, extents: 129},
		"vast-index":      {memory: maxMemory, index: headerSize, extents: maxMemory / PageSize},
		"index-wraps":     {memory: maxMemory, index: headerSize, extents: 1 << 59},
	}
	for name, h := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := [headerSize]byte(h.encode())
			if got, err := decodeHeader(&b, headerSize); !errors.Is(err, errdef.ErrUnavailable) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	b := [headerSize]byte(header{memory: PageSize, index: headerSize}.encode())
	if _, err := decodeHeader(&b, headerSize); err != nil {
		t.Error(err)
	}
	for _, at := range []int{12, 40, headerUsed, headerSize - 1} { // page size, index length, padding
		bad := b
		bad[at]++
		sign(bad[:])
		if got, err := decodeHeader(&bad, headerSize); !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("byte %d: %+v, %v", at, got, err)
		}
	}
}

// sign makes the checksum of a header right.
func sign(b []byte) {
	binary.LittleEndian.PutUint32(b[headerUsed-4:], checksum(0, b[:headerUsed-4]))
}

// FuzzLayer decodes a file of a header, so many pages of zeros and an index, as
// it is and after making its checksums right, for else no mutation gets far.
// What is accepted has one encoding, and is safe to use. The parts are small,
// lest fuzzing spend its time on making zeros fewer.
func FuzzLayer(f *testing.F) {
	for _, file := range [][]byte{
		indexed(f, 64*PageSize, 0),
		indexed(f, 64*PageSize, 0, extent{first: 1, count: 63, kind: kindZero}),
		indexed(f, 1<<40, 0, extent{first: 1, count: 1 << 27, kind: kindZero}),
	} {
		f.Add(file[:headerUsed], uint8(0), file[headerSize:])
	}
	file := indexed(f, 64*PageSize, 3, extent{first: 1, count: 1, offset: PageSize, kind: kindData},
		extent{first: 2, count: 3, kind: kindZero}, extent{first: 62, count: 2, offset: 2 * PageSize, kind: kindData})
	f.Add(file[:headerUsed], uint8(3), file[4*PageSize:])
	f.Add([]byte(layerMagic), uint8(1), []byte(nil))
	f.Fuzz(func(t *testing.T, head []byte, pages uint8, index []byte) {
		if len(head) > headerSize {
			return
		}
		file := make([]byte, headerSize+int(pages)*PageSize)
		copy(file, head)
		file = append(file, index...)
		if x, err := load(bytes.NewReader(file), int64(len(file))); err == nil {
			accepted(t, file, x)
		}
		binary.LittleEndian.PutUint32(file[48:], checksum(0, index))
		sign(file)
		if x, err := load(bytes.NewReader(file), int64(len(file))); err == nil {
			accepted(t, file, x)
		}
	})
}

func accepted(t *testing.T, file []byte, x *indexReader) {
	t.Helper()
	again := indexed(t, x.memory, int64(x.stats.Pages), x.extents...)
	copy(again[headerSize:x.index], file[headerSize:])
	if !bytes.Equal(file, again) {
		t.Fatalf("another encoding of %+v", x)
	}
	var next uint64
	for _, e := range x.extents {
		if e.first < next || e.end() <= e.first || e.end() > uint64(x.memory/PageSize) || e.offset+e.bytes() > x.index {
			t.Fatalf("extent %+v of %+v", e, x)
		}
		next = e.end()
	}
}

// layerVector is one line of testdata/layers.json, for implementations in any
// language. A file is the header, zeros up to 4096 bytes, the pages in data,
// the index. Error says why it must be refused: "damaged" or "unsupported".
type layerVector struct {
	Name   string   `json:"name"`
	Error  string   `json:"error,omitempty"`
	Memory int64    `json:"memory,omitempty"`
	Pages  []filled `json:"pages,omitempty"` // what it holds
	Header string   `json:"header"`
	Data   []filled `json:"data,omitempty"` // page: where in the file
	Index  string   `json:"index"`
}

func (v layerVector) file(t *testing.T) []byte {
	t.Helper()
	head, err := hex.DecodeString(v.Header)
	if err != nil {
		t.Fatal(err)
	}
	index, err := hex.DecodeString(v.Index)
	if err != nil {
		t.Fatal(err)
	}
	file := append(head, make([]byte, headerSize-len(head))...)
	for _, p := range v.Data {
		file = append(file, p.bytes()...)
	}
	return append(file, index...)
}

func vectorOf(name string, memory int64, file []byte, pages ...filled) layerVector {
	v := layerVector{Name: name, Memory: memory, Pages: pages, Header: hex.EncodeToString(file[:headerUsed])}
	index := binary.LittleEndian.Uint64(file[32:])
	for at := uint64(headerSize); at < index; at += PageSize {
		v.Data = append(v.Data, filled{at / PageSize, 1, file[at]})
	}
	v.Index = hex.EncodeToString(file[index:])
	return v
}

func makeVectors(t *testing.T) []layerVector {
	t.Helper()
	const memory = 16 * PageSize
	good := func(name string, pages ...filled) layerVector {
		path, _ := writePieces(t, memory, pages...)
		file, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return vectorOf(name, memory, file, pages...)
	}
	bad := func(name string, change func(file []byte), extents ...extent) layerVector {
		file := indexed(t, memory, 1, extents...)
		change(file)
		v := vectorOf(name, 0, file)
		v.Error = "damaged"
		return v
	}
	one := extent{first: 3, count: 1, offset: PageSize, kind: kindData, sum: checksum(0, make([]byte, PageSize))}
	none := func([]byte) {}
	version := bad("version-2", func(b []byte) { b[8] = 2; sign(b) }, one)
	version.Error = "unsupported"
	return []layerVector{
		good("empty"),
		good("one-page", filled{3, 1, 0xa5}),
		good("all-zeros", filled{0, 16, 0}),
		good("mixed", filled{0, 2, 1}, filled{2, 3, 0}, filled{5, 1, 2}, filled{15, 1, 3}),
		bad("magic", func(b []byte) { b[0]++; sign(b) }, one),
		version,
		bad("page-size", func(b []byte) { b[13]++; sign(b) }, one),
		bad("header-checksum", func(b []byte) { b[52]++ }, one),
		bad("index-checksum", func(b []byte) { b[48]++; sign(b) }, one),
		bad("outside-memory", none, extent{first: 16, count: 1, offset: PageSize, kind: kindData, sum: one.sum}),
		bad("unknown-kind", none, extent{first: 3, count: 1, offset: PageSize, kind: 3, sum: one.sum}),
		bad("overlapping", none, extent{first: 3, count: 2, kind: kindZero}, extent{first: 4, count: 1, offset: PageSize, kind: kindData, sum: one.sum}),
		bad("unmerged", none, extent{first: 1, count: 1, kind: kindZero}, extent{first: 2, count: 1, kind: kindZero}, one),
		bad("data-checksum", func(b []byte) { b[headerSize] = 1 }, one),
	}
}

func TestLayerVectors(t *testing.T) {
	t.Parallel()
	got := makeVectors(t)
	got[len(got)-1].Data = []filled{{1, 1, 1}} // a vector's page has one byte throughout
	const file = "testdata/layers.json"
	if os.Getenv("UPDATE_VECTORS") != "" {
		text, err := json.MarshalIndent(got, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err = os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var want []layerVector
	if err = json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("vectors differ; if the format is meant to change, set UPDATE_VECTORS=1:\n%s", diff)
	}
	categories := map[string]error{"damaged": errdef.ErrUnavailable, "unsupported": errdef.ErrUnsupported}
	for _, v := range want {
		path := filepath.Join(t.TempDir(), v.Name)
		if err = os.WriteFile(path, v.file(t), 0o600); err != nil {
			t.Fatal(err)
		}
		l, openErr := OpenLayer(path)
		if openErr == nil {
			openErr = errors.Join(l.Verify(t.Context()), l.Close())
		}
		if !errors.Is(openErr, categories[v.Error]) {
			t.Errorf("%s: %v, want it %s", v.Name, openErr, v.Error)
		}
	}
}
