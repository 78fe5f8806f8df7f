package fake_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/fake"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
)

func TestEngine(t *testing.T) {
	t.Parallel()
	vmmtest.Run(t, vmmtest.Setup{Engine: fake.New()})
}

func TestDisk(t *testing.T) {
	t.Parallel()
	vmmtest.RunDisk(t, vmmtest.Setup{Engine: fake.New(), FormatDisk: func(_ context.Context, path string, size int64) error {
		return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
	}})
}

// world is a frozen machine of an engine's.
type world struct {
	engine         *fake.Engine
	memory, device string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{engine: fake.New(), memory: filepath.Join(t.TempDir(), "memory"), device: filepath.Join(t.TempDir(), "device")}
	vm, err := w.engine.Start(t.Context(), vmm.StartSpec{Common: common(t), Memory: w.memory})
	try(t, err)
	try(t, vm.Freeze(t.Context(), w.device))
	try(t, vm.Kill(t.Context()))
	return w
}

func (w *world) spec(t *testing.T) vmm.RestoreSpec {
	t.Helper()
	return vmm.RestoreSpec{Common: common(t), Memory: w.memory, Device: w.device}
}

func (w *world) restore(t *testing.T) (vm vmm.VM, dir string) {
	t.Helper()
	spec := w.spec(t)
	vm, err := w.engine.Restore(t.Context(), spec)
	try(t, err)
	t.Cleanup(func() { try(t, vm.Kill(context.WithoutCancel(t.Context()))) })
	return vm, spec.Dir
}

func common(t *testing.T) vmm.Common {
	t.Helper()
	return vmm.Common{ID: "x", Dir: t.TempDir(), Machine: vmm.Machine{MemoryMiB: 64, VCPUs: 1}}
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pages are the private pages of vm.
func pages(t *testing.T, vm vmm.VM) (all []uint64) {
	t.Helper()
	space, err := vm.Memory()
	try(t, err)
	try(t, space.Private(func(first, count uint64) bool {
		for p := first; p < first+count; p++ {
			all = append(all, p)
		}
		return true
	}))
	return all
}

func TestDirty(t *testing.T) {
	t.Parallel()
	const first, last = fake.MemorySize / 2 / guestmem.PageSize, fake.MemorySize/guestmem.PageSize - 1
	w := newWorld(t)
	vm, dir := w.restore(t)
	other, _ := w.restore(t)
	if got := pages(t, vm); len(got) > 0 {
		t.Errorf("a new machine has pages %v of its own", got)
	}
	text := []byte("dirty")
	try(t, w.engine.Dirty(dir, first, text))
	try(t, w.engine.Dirty(dir, last, text))
	if diff := cmp.Diff([]uint64{first, last}, pages(t, vm)); diff != "" {
		t.Errorf("its own pages (-want +got):\n%s", diff)
	}
	if got := pages(t, other); len(got) > 0 {
		t.Errorf("the other machine has pages %v of its own", got)
	}
	space, err := vm.Memory()
	try(t, err)
	got := make([]byte, len(text))
	_, err = space.ReadAt(got, last*guestmem.PageSize)
	if err != nil || !bytes.Equal(got, text) {
		t.Errorf("the page holds %q, error %v", got, err)
	}
	for _, page := range []uint64{0, first - 1, last + 1} {
		if err := w.engine.Dirty(dir, page, text); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("Dirty of page %d: %v, want ErrInvalid", page, err)
		}
	}
	try(t, vm.Kill(t.Context()))
	if err := w.engine.Dirty(dir, last, text); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("Dirty of a machine that is gone: %v, want ErrNotFound", err)
	}
}

// TestSaveWritesLittle: of files that have not changed no page is made private
// again, so that a branch of a branch is as small as it can be.
func TestSaveWritesLittle(t *testing.T) {
	t.Parallel()
	vm, dir := newWorld(t).restore(t)
	save := func(name string) int {
		try(t, vm.SaveDevice(t.Context(), filepath.Join(dir, name)))
		return len(pages(t, vm))
	}
	try(t, vm.Pause(t.Context()))
	none := save("none")
	try(t, os.WriteFile(filepath.Join(dir, "guest", "big"), bytes.Repeat([]byte("x"), 100<<10), 0o600))
	big := save("big")
	if again := save("again"); big < none+25 || big > none+30 || again != big {
		t.Errorf("private pages: %d with no file, %d with one of 25 pages, %d after another save", none, big, again)
	}
	try(t, os.WriteFile(filepath.Join(dir, "guest", "huge"), make([]byte, fake.MemorySize/2), 0o600))
	if err := vm.SaveDevice(t.Context(), filepath.Join(dir, "huge")); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("SaveDevice with files larger than memory: %v, want ErrExhausted", err)
	}
}

func TestFail(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	vm, dir := w.restore(t)
	device := filepath.Join(dir, "device")
	ops := map[string]func() error{
		"Pause":      func() error { return vm.Pause(t.Context()) },
		"SaveDevice": func() error { return vm.SaveDevice(t.Context(), device) },
		"Resume":     func() error { return vm.Resume(t.Context()) },
	}
	cause := errors.New("broken")
	for _, op := range []string{"Pause", "SaveDevice", "Resume"} {
		w.engine.Fail(op, cause)
		if err := ops[op](); !errors.Is(err, cause) {
			t.Errorf("%s: %v, want the failure", op, err)
		}
		if paused, err := vm.Paused(t.Context()); err != nil || paused != (op != "Pause") {
			t.Errorf("after %s failed: paused %v, error %v", op, paused, err)
		}
		if err := ops[op](); err != nil {
			t.Errorf("%s the second time: %v", op, err)
		}
	}
	for op, start := range map[string]func() (vmm.VM, error){
		"Restore": func() (vmm.VM, error) { return w.engine.Restore(t.Context(), w.spec(t)) },
		"Start":   func() (vmm.VM, error) { return w.engine.Start(t.Context(), vmm.StartSpec{Common: common(t)}) },
	} {
		w.engine.Fail(op, cause)
		if _, err := start(); !errors.Is(err, cause) {
			t.Errorf("%s: %v, want the failure", op, err)
		}
		again, err := start()
		try(t, err)
		try(t, again.Kill(t.Context()))
	}
}
