package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// write is a guest's write to its disk.
func write(t *testing.T, dir, text string) {
	t.Helper()
	f, err := os.OpenFile(diskFile(dir), os.O_WRONLY, 0)
	try(t, err)
	_, err = f.WriteAt([]byte(text), 4096)
	try(t, errors.Join(err, f.Close()))
}

// freezeDisk is the disk of a machine that is paused for it. It has text.
func freezeDisk(t *testing.T, vm vmm.VM, text string) string {
	t.Helper()
	try(t, vm.Pause(t.Context()))
	files, err := vm.FreezeDisk(t.Context())
	try(t, err)
	try(t, vm.Resume(t.Context()))
	if len(files) != 1 {
		t.Fatalf("files %q", files)
	}
	f, err := os.Open(files[0])
	try(t, err)
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	try(t, err)
	got := make([]byte, len(text))
	if _, err = f.ReadAt(got, 4096); err != nil || info.Size() != vmm.MinDiskMiB*mib || string(got) != text {
		t.Errorf("%s has %d bytes, and %q, %v", files[0], info.Size(), got, err)
	}
	return files[0]
}

// disk: each frozen copy is as the disk was then, and there is one if anything was
// written. They are there for as long as they are needed.
func disk(t *testing.T, e *Engine) {
	ctx := t.Context()
	spec := withDisk(t, toBoot(t, "t"))
	template := frozen(t, e, spec)
	r := again(t, template, "f")
	vm := restore(t, e, r)
	if _, err := vm.FreezeDisk(ctx); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("freeze the disk of a machine that runs: %v", err)
	}
	copies := func() (names []string) {
		for _, name := range entries(t, r.Dir) {
			if _, ok := copyNumber(name); ok {
				names = append(names, name)
			}
		}
		return names
	}
	wantCopies := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, copies()); diff != "" {
			t.Errorf("copies (-want +got):\n%s", diff)
		}
	}
	if got := freezeDisk(t, vm, "\x00"); got != spec.Disk {
		t.Errorf("nothing was written: %s", got)
	}
	try(t, vm.PrepareDisk(ctx))
	write(t, r.Dir, "first")
	first := freezeDisk(t, vm, "first")
	if same := freezeDisk(t, vm, "first"); same != first {
		t.Errorf("nothing was written: %s, and then %s", first, same)
	}
	try(t, vm.PrepareDisk(ctx))
	wantCopies("disk.own.1") // the disk is as it
	write(t, r.Dir, "second")
	second := freezeDisk(t, vm, "second")
	wantCopies("disk.own.1", "disk.own.2")
	try(t, vm.PrepareDisk(ctx))
	wantCopies("disk.own.2")
	kept := filepath.Join(t.TempDir(), "kept")
	try(t, os.Link(second, kept)) // as a snapshot does
	fork := restore(t, e, vmm.RestoreSpec{
		Common: again(t, r, "g").Common, Memory: r.Memory, Device: r.Device, Disk: []string{kept},
	})
	freezeDisk(t, fork, "second")

	handle := vm.Handle()
	try(t, vm.Detach())
	later, err := like(e).Adopt(ctx, handle)
	try(t, err)
	if got := freezeDisk(t, later, "second"); got != second {
		t.Errorf("nothing was written: %s, and then %s", second, got)
	}
	for i := range 9 { // so that the order is one of numbers
		write(t, r.Dir, "more"+string(rune('0'+i)))
		freezeDisk(t, later, "more"+string(rune('0'+i)))
	}
	try(t, later.PrepareDisk(ctx))
	wantCopies("disk.own.11")
	write(t, r.Dir, "third")
	try(t, later.PrepareDisk(ctx))
	wantCopies()
	freezeDisk(t, later, "third")
	freezeDisk(t, fork, "second") // it has a disk of its own
	if data, err := os.ReadFile(spec.Disk); err != nil || string(data[4096:4097]) != "\x00" {
		t.Errorf("the template's disk was written to: %v", err)
	}
	none := restore(t, e, again(t, frozen(t, e, toBoot(t, "t")), "n"))
	try(t, errors.Join(none.PrepareDisk(ctx), none.Pause(ctx)))
	if files, err := none.FreezeDisk(ctx); err != nil || files != nil {
		t.Errorf("a machine without a disk: %q, %v", files, err)
	}
	booted := start(t, e, withDisk(t, toBoot(t, "b")))
	try(t, booted.Pause(ctx))
	if _, err := booted.FreezeDisk(ctx); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("a machine that was booted: %v", err)
	}
}

func TestCopyNumber(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]int{
		"disk.own.1": 1, filepath.Join("dir", "disk.own.12"): 12, "disk.own": 0, "disk.own.": 0, "disk.own.0": 0, "disk.own.-1": 0,
		"disk.own.x": 0, "other.own.1": 0, "disk.own.1.1": 0,
	} {
		if got, ok := copyNumber(name); ok != (want > 0) || ok && got != want {
			t.Errorf("%s: %d, %v", name, got, ok)
		}
	}
}
