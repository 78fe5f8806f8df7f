package guestmem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// Private finds the pages that were written to, and no others.
func TestPrivate(t *testing.T) {
	t.Parallel()
	const pages = 300
	c := startMachine(t, roleMachine, pages)
	want := make([]bool, pages)
	rapid.Check(t, func(rt *rapid.T) {
		if rt.Failed() {
			return
		}
		var fields []string
		for _, p := range rapid.SliceOfN(rapid.IntRange(0, pages-1), 0, 5).Draw(rt, "pages") {
			want[p] = true
			fields = append(fields, fmt.Sprint(p))
		}
		c.tell("dirty %s", strings.Join(fields, " "))
		got := make([]bool, pages)
		var last uint64
		err := c.space.Private(func(first, count uint64) bool {
			if first <= last && last != 0 || count == 0 {
				t.Errorf("run of %d at %d after %d", count, first, last)
			}
			last = first + count
			for i := range count {
				got[first+i] = true
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			rt.Fatalf("private pages (-want +got):\n%s", diff)
		}
	})
}

// A machine that maps its image in pieces, and not all of it, in any order.
func TestSpaceInPieces(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "memory")
	content := baseContent(12)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	area, err := unix.Mmap(-1, 0, 16*PageSize, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(area) }()
	base := uintptr(unsafe.Pointer(&area[0]))
	for _, m := range []struct{ at, page, count int }{{0, 4, 4}, {4, 8, 2}, {10, 0, 4}} {
		_, _, errno := unix.Syscall6(unix.SYS_MMAP, base+uintptr(m.at*PageSize), uintptr(m.count*PageSize),
			unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED, f.Fd(), uintptr(m.page*PageSize))
		if errno != 0 {
			t.Fatal(errno)
		}
	}
	s, err := FindSpace(os.Getpid(), path)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Ranges) != 2 {
		t.Fatalf("ranges %x", s.Ranges)
	}
	got := make([]byte, 10*PageSize-100)
	if _, err = s.ReadAt(got, 50); err != nil || !bytes.Equal(got, content[50:][:len(got)]) {
		t.Errorf("read: %v", err)
	}
	for _, page := range []int{3, 4, 9} { // 3 and 4 touch, though far apart in addresses
		if _, err = s.WriteAt([]byte("mine"), int64(page*PageSize)); err != nil {
			t.Fatal(err)
		}
		copy(content[page*PageSize:], "mine")
	}
	runs, err := privateRuns(s)
	if diff := cmp.Diff([]pageRun{{3, 2}, {9, 1}}, runs, cmp.AllowUnexported(pageRun{})); err != nil || diff != "" {
		t.Errorf("private (-want +got): %v\n%s", err, diff)
	}
	if _, err := s.ReadAt(got[:10*PageSize-100], 50); err != nil || !bytes.Equal(got, content[50:][:len(got)]) {
		t.Errorf("second read: %v", err)
	}
	for _, off := range []int64{10 * PageSize, 10*PageSize - 1, -1, -PageSize} {
		if _, err := s.ReadAt(make([]byte, 2), off); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	stopped := 0
	if err := s.Private(func(uint64, uint64) bool { stopped++; return false }); err != nil || stopped != 1 {
		t.Errorf("stopped %d times, %v", stopped, err)
	}
}

func TestFindSpaceErrors(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, baseContent(1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := FindSpace(os.Getpid(), path); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("not mapped: %v", err)
	}
	if _, err := FindSpace(1<<30, path); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no process: %v", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for range 2 {
		mem, mapErr := unix.Mmap(int(f.Fd()), 0, PageSize, unix.PROT_READ, unix.MAP_PRIVATE)
		if mapErr != nil {
			t.Fatal(mapErr)
		}
		defer func() { _ = unix.Munmap(mem) }()
	}
	if _, err = FindSpace(os.Getpid(), path); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("mapped twice: %v", err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, PageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	if _, err := FindSpace(os.Getpid(), path); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("shared: %v", err)
	}
}

// Nothing of a machine that has died looks like a machine that wrote nothing.
func TestDeadMachine(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	c.tell("dirty 3")
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	check := func(state string) {
		img := openChain(t, c.path)
		buf := make([]byte, PageSize)
		_, readErr := c.space.ReadAt(buf, 0)
		_, writeErr := c.space.WriteAt(buf, 0)
		_, copyErr := c.space.Copy(t.Context())
		_, findErr := FindSpace(c.pid, c.path)
		for what, err := range map[string]error{
			"private": c.space.Private(func(uint64, uint64) bool { return true }),
			"read":    readErr, "write": writeErr, "copy": copyErr, "find": findErr,
			"fill": c.space.Fill(t.Context(), layerOver(t, img, map[uint64][]byte{1: buf})),
			"save": Save(t.Context(), c.space, img, img, newWriter(t, img.Size())),
		} {
			if !errors.Is(err, errdef.ErrNotFound) || !strings.Contains(err.Error(), fmt.Sprint(c.pid)) {
				t.Errorf("%s, %s: %v", state, what, err)
			}
		}
	}
	waitFor(t, func() bool { return !running(c.pid) })
	check("zombie")
	_ = c.cmd.Wait()
	check("gone")
}

// Copy is one instant, for all that the machine does afterwards.
func TestCopy(t *testing.T) {
	t.Parallel()
	const threads = 3
	c := startMachine(t, roleMachine, 3000) // more than one batch
	c.tell("dirty 1 5 2999")
	empty, err := startMachine(t, roleMachine, 4).space.Copy(t.Context())
	if err != nil || empty.Pages() != 0 {
		t.Errorf("copy of nothing: %d pages, %v", empty.Pages(), err)
	}
	if err = empty.Close(); err != nil {
		t.Error(err)
	}
	held, err := c.space.Copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := c.memory()
	if held.Pages() != 3 || !bytes.Equal(want, c.read(held)) {
		t.Errorf("copy of %d pages differs", held.Pages())
	}
	for _, off := range []int64{-1, 0, 2 * PageSize, 6*PageSize - 1} {
		if _, err = held.ReadAt(make([]byte, 2), off); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("read at %d: %v", off, err)
		}
	}
	c.tell("spin %d", threads)
	waitFor(t, func() bool { return countPrivate(t, c.space) == 3000 })
	c.pause()
	second, err := c.space.Copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.resume()
	checkSpin(t, c.read(second), threads)
	if !bytes.Equal(want, c.read(held)) {
		t.Error("the copy has changed")
	}
	if err := errors.Join(held.Close(), held.Close(), second.Close()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.space.Copy(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A reservation that turns out too small is none the worse for it, and is used
// once.
func TestReserve(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 3000)
	c.tell("dirty 7")
	room, err := c.space.Reserve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.tell("dirtyall")
	held, err := room.Copy(t.Context())
	if err != nil || held.Pages() != 3000 || !bytes.Equal(c.memory(), c.read(held)) {
		t.Fatalf("copy differs: %v", err)
	}
	if _, err = room.Copy(t.Context()); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("used twice: %v", err)
	}
	if err = errors.Join(room.Close(), held.Close()); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = c.space.Reserve(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// What one machine has saved, another one is filled with.
func TestSaveAndFill(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 700)
	base := openChain(t, c.path)
	c.tell("dirtyall")
	c.tell("dirty 0 5 6 699")
	w := newWriter(t, base.Size())
	if err := Save(t.Context(), c.space, base, base, w); err != nil {
		t.Fatal(err)
	}
	if stats, err := w.Close(); err != nil || stats.Pages != 700 {
		t.Fatalf("layer %+v, %v", stats, err)
	}
	img := openChain(t, c.path, w.f.Name())

	other := &child{t: t, path: c.path}
	other.start(roleMachine)
	other.pause()
	if err := other.space.Fill(t.Context(), img); err != nil {
		t.Fatal(err)
	}
	other.resume()
	if !bytes.Equal(c.memory(), other.memory()) {
		t.Error("the machines differ")
	}
	if a, b := c.ask("sum"), other.ask("sum"); a != b {
		t.Errorf("one machine sees %s, the other %s", a, b)
	}
	if content, err := os.ReadFile(c.path); err != nil || !bytes.Equal(content, baseContent(700)) {
		t.Errorf("the image has changed: %v", err)
	}
	checkUnharmed(t, other)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := other.space.Fill(ctx, img); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// fakeSource is a machine whose private pages a test chooses.
type fakeSource struct {
	private map[uint64][]byte
	pages   uint64
	fail    error
}

func (s *fakeSource) Private(yield func(first, count uint64) bool) error {
	j := runJoiner{yield: yield}
	for p := range s.pages {
		if _, ok := s.private[p]; ok {
			j.add(p, 1)
		}
	}
	j.flush()
	return s.fail
}

func (s *fakeSource) ReadAt(p []byte, off int64) (int, error) {
	for i := 0; i < len(p); i += PageSize {
		page, ok := s.private[uint64(off)/PageSize+uint64(i/PageSize)]
		if !ok {
			return i, errors.New("that page is not private")
		}
		copy(p[i:], page)
	}
	return len(p), s.fail
}

// Whatever a machine was forked from, has written, and is compared to: the
// parent with the layer on top is the machine, and so is the whole memory; and
// the layer holds only what differs.
func TestSaveLaw(t *testing.T) {
	t.Parallel()
	const pages = 40
	zero := make([]byte, PageSize)
	drawPages := func(t *rapid.T, name string) map[uint64][]byte {
		m := map[uint64][]byte{}
		for range rapid.IntRange(0, 12).Draw(t, name) {
			first := rapid.Uint64Range(0, pages-1).Draw(t, "first")
			fill := rapid.ByteRange(0, 3).Draw(t, "fill") // few values, so that pages are often as they were
			for p := first; p < min(pages, first+rapid.Uint64Range(1, 6).Draw(t, "count")); p++ {
				m[p] = bytes.Repeat([]byte{fill}, PageSize)
			}
		}
		return m
	}
	parentDir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		dir := tempDir(rt, parentDir)
		model := make([]byte, pages*PageSize)
		for p, data := range drawPages(rt, "base") {
			copy(model[p*PageSize:], data)
		}
		base := filepath.Join(dir, "base")
		if err := os.WriteFile(base, model, 0o600); err != nil {
			rt.Fatal(err)
		}
		drawChain := func(name string, img *Image) *Image {
			for range rapid.IntRange(0, 3).Draw(rt, name) {
				img = layerOver(rt, img, drawPages(rt, name))
			}
			return img
		}
		origin := drawChain("origin", openChain(rt, base))
		parent := origin
		if rapid.Bool().Draw(rt, "other parent") {
			parent = drawChain("parent", openChain(rt, base))
		}
		src := &fakeSource{pages: pages, private: drawPages(rt, "private")}
		want := readAll(rt, origin)
		for p, data := range src.private {
			copy(want[p*PageSize:], data)
		}
		was := readAll(rt, parent)
		var differ uint64
		for at := 0; at < len(was); at += PageSize {
			if !bytes.Equal(was[at:at+PageSize], want[at:at+PageSize]) {
				differ++
			}
		}

		w := newWriter(rt, parent.Size())
		if err := Save(t.Context(), src, origin, parent, w); err != nil {
			rt.Fatal(err)
		}
		stats, err := w.Close()
		if err != nil || stats.Pages+stats.Zero != differ {
			rt.Fatalf("%d pages and %d zero ones for %d that differ, %v", stats.Pages, stats.Zero, differ, err)
		}
		if got := readAll(rt, onTop(rt, parent, w.f.Name())); !bytes.Equal(got, want) {
			rt.Fatal("the layer does not make the machine")
		}

		whole, err := os.OpenFile(filepath.Join(dir, "whole"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			rt.Fatal(err)
		}
		defer whole.Close()
		if err = SaveWhole(t.Context(), src, origin, whole); err != nil {
			rt.Fatal(err)
		}
		got, err := os.ReadFile(whole.Name())
		if err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("the whole memory is not the machine's: %v", err)
		}
		checkHoles(rt, whole, src.private, zero)
	})
}

// checkHoles sees that private pages of zeros take no disk.
func checkHoles(t *rapid.T, f *os.File, private map[uint64][]byte, zero []byte) {
	err := linux.DataRanges(f, func(start, end int64) bool {
		for p := uint64(start / PageSize); p < uint64(end/PageSize); p++ {
			if data, ok := private[p]; ok && bytes.Equal(data, zero) {
				t.Fatalf("page %d is of zeros and no hole", p)
			}
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An error of the source is the error of the save.
func TestSaveErrors(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(path, baseContent(8), 0o600); err != nil {
		t.Fatal(err)
	}
	img := openChain(t, path)
	src := &fakeSource{pages: 8, private: map[uint64][]byte{3: make([]byte, PageSize)}, fail: errors.New("cause")}
	f, err := os.CreateTemp(t.TempDir(), "whole")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Save(t.Context(), src, img, img, newWriter(t, img.Size())); !errors.Is(err, src.fail) {
		t.Errorf("save: %v", err)
	}
	if err := SaveWhole(t.Context(), src, img, f); !errors.Is(err, src.fail) {
		t.Errorf("save whole: %v", err)
	}
	src.fail = nil
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Save(ctx, src, img, img, newWriter(t, img.Size())); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// The sets of pages that Save works with are sets.
func TestRunSets(t *testing.T) {
	t.Parallel()
	draw := rapid.Custom(func(t *rapid.T) []pageRun {
		var runs []pageRun
		var at uint64
		for range rapid.IntRange(0, 8).Draw(t, "runs") {
			at += rapid.Uint64Range(1, 4).Draw(t, "gap")
			count := rapid.Uint64Range(1, 5).Draw(t, "count")
			runs = append(runs, pageRun{at, count})
			at += count
		}
		return runs
	})
	set := func(runs []pageRun) map[uint64]bool {
		m := map[uint64]bool{}
		for _, r := range runs {
			for p := r.first; p < r.end(); p++ {
				m[p] = true
			}
		}
		return m
	}
	rapid.Check(t, func(t *rapid.T) {
		a, b := draw.Draw(t, "a"), draw.Draw(t, "b")
		both, rest := set(a), set(a)
		for p := range set(b) {
			both[p] = true
			delete(rest, p)
		}
		if diff := cmp.Diff(both, set(union(a, b))); diff != "" {
			t.Errorf("union: %s", diff)
		}
		if diff := cmp.Diff(rest, set(subtract(a, b))); diff != "" {
			t.Errorf("difference: %s", diff)
		}
		var joined []pageRun
		var at uint64
		for _, batch := range split(a, 3) {
			var pages uint64
			for _, r := range batch.runs {
				pages += r.count
				joined = append(joined, r)
			}
			if batch.at != at || batch.pages != pages || pages > 3 || pages == 0 {
				t.Errorf("batch %+v at %d of %d pages", batch, at, pages)
			}
			at += pages
		}
		if diff := cmp.Diff(set(a), set(joined)); diff != "" {
			t.Errorf("split: %s", diff)
		}
	})
}

// tester is a test, or one round of rapid.
type tester interface {
	Helper()
	Fatal(args ...any)
	Cleanup(fn func())
}

// tempDir makes a directory that goes with the round.
func tempDir(t tester, parent string) string {
	t.Helper()
	dir, err := os.MkdirTemp(parent, "round")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// chains remembers what files an image of a test is of.
var chains sync.Map // *Image to []string

func openChain(t tester, base string, layers ...string) *Image {
	t.Helper()
	img, err := OpenImage(base, layers...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		chains.Delete(img)
		_ = img.Close()
	})
	chains.Store(img, append([]string{base}, layers...))
	return img
}

func onTop(t tester, img *Image, layer string) *Image {
	t.Helper()
	files, _ := chains.Load(img)
	chain := files.([]string)
	return openChain(t, chain[0], append(chain[1:len(chain):len(chain)], layer)...)
}

// layerOver puts a layer of those pages on an image.
func layerOver(t tester, img *Image, pages map[uint64][]byte) *Image {
	t.Helper()
	w := newWriter(t, img.Size())
	for p := range uint64(img.Size() / PageSize) {
		if data, ok := pages[p]; ok {
			if err := w.Write(p, data); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return onTop(t, img, w.f.Name())
}

func newWriter(t tester, memory int64) *Writer {
	t.Helper()
	f, err := os.CreateTemp("", "tine-layer")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(f.Close(), os.Remove(f.Name())) })
	w, err := NewWriter(f, memory)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func readAll(t tester, img *Image) []byte {
	t.Helper()
	p := make([]byte, img.Size())
	if _, err := img.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}
