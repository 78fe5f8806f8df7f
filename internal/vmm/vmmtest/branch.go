package vmmtest

import (
	"context"
	"encoding/json"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/vmm"
)

// branch is what a branch of a machine leaves: enough to make more of it.
type branch struct {
	device string
	base   string   // the image under layers
	layers []string // oldest first; the last is the branch's own
	disk   []string // the files of the disk, if there is one
	sums   []uint32 // of the pages of memory, at the instant of the branch
}

// branch takes one of vm, whose memory is origin but for its own pages, relative to
// base and layers.
func (h *harness) branch(t *testing.T, vm vmm.VM, origin []string, base string, layers ...string) branch {
	t.Helper()
	h.count++
	name := filepath.Join(h.work, "branch"+strconv.Itoa(h.count))
	b := branch{device: name + ".device", base: base, layers: append(slices.Clip(layers), name+".layer")}

	ctx := within(t, time.Minute)
	try(t, vm.PrepareDisk(ctx))
	try(t, vm.Pause(ctx))
	disk, err := vm.FreezeDisk(ctx)
	try(t, err)
	if (len(disk) > 0) != (h.diskMiB > 0) {
		t.Errorf("files %q of a disk of %d MiB", disk, h.diskMiB)
	}
	b.disk = h.keep(t, name, disk)
	try(t, vm.SaveDevice(ctx, b.device))
	space, err := vm.Memory()
	try(t, err)
	b.sums = sums(t, space, origin[0])
	frozen, err := space.Copy(ctx)
	try(t, err)
	try(t, vm.Resume(ctx))

	defer func() { try(t, frozen.Close()) }()
	from, parent := image(t, origin[0], origin[1:]...), image(t, base, layers...)
	f := create(t, name+".layer")
	w, err := guestmem.NewWriter(f, from.Size())
	try(t, err)
	try(t, guestmem.Save(ctx, frozen, from, parent, w))
	stats, err := w.Close()
	try(t, err)
	try(t, f.Close())
	t.Logf("%s: %d pages, %d of zeros", filepath.Base(name), stats.Pages, stats.Zero)
	return b
}

// filled is a machine of b: its layers are written over the base.
func (h *harness) filled(t *testing.T, b branch) vmm.RestoreSpec {
	t.Helper()
	return vmm.RestoreSpec{
		Common: h.common(t), Memory: b.base, Device: b.device, Disk: b.disk,
		Fill: func(ctx context.Context, space guestmem.Space) error {
			return space.Fill(ctx, image(t, b.base, b.layers...))
		},
	}
}

// flat is a machine of b too: it maps an image of its own.
func (h *harness) flat(t *testing.T, b branch) vmm.RestoreSpec {
	t.Helper()
	spec := vmm.RestoreSpec{Common: h.common(t), Device: b.device, Disk: b.disk}
	spec.Memory = filepath.Join(h.work, spec.ID+".flat")
	f := create(t, spec.Memory)
	try(t, image(t, b.base, b.layers...).Flatten(within(t, time.Minute), f))
	try(t, f.Close())
	return spec
}

// branchIsOfOneInstant: what a machine of a branch finds is what the source had
// then, and not what it wrote later; and the source does not notice.
func (h *harness) branchIsOfOneInstant(t *testing.T) {
	src := h.restore(t, h.restoreSpec(t))
	c := identified(t, src)
	write(t, c, "first")
	first := h.branch(t, src, []string{h.memory}, h.memory)
	write(t, c, "second")
	second := h.branch(t, src, []string{h.memory}, first.base, first.layers...)
	write(t, c, "third")
	third := h.branch(t, src, []string{h.memory}, h.memory)
	write(t, c, "later")

	for want, b := range map[string]branch{"first": first, "second": second, "third": third} {
		h.has(t, h.filled(t, b), b, want)
		h.has(t, h.flat(t, b), b, want)
	}
	if got := read(t, c); got != "later" {
		t.Errorf("the source's file holds %q, want what it wrote last", got)
	}
}

// hostPages is how many pages of a paused machine's memory the host may have
// written: KVM keeps the guest's clock in one that the guest has named, and sets
// it when the machine is restored. It keeps stolen time in another.
func (h *harness) hostPages() int {
	if h.Engine.Caps().Hardware {
		return 2
	}
	return 0
}

// has checks that a machine of b has b's memory, byte for byte but for what is
// the host's, and want in its file.
func (h *harness) has(t *testing.T, spec vmm.RestoreSpec, b branch, want string) {
	t.Helper()
	spec.Paused = true
	vm := h.restore(t, spec)
	space, err := vm.Memory()
	try(t, err)
	if pages := differ(sums(t, space, spec.Memory), b.sums); len(pages) > h.hostPages()+h.Stamps {
		t.Errorf("%s: memory differs from the source's at the branch in %d pages, at first at %#x", want, len(pages), pages[:min(len(pages), 8)])
	}
	try(t, vm.Resume(within(t, time.Minute)))
	if got := read(t, identified(t, vm)); got != want {
		t.Errorf("file holds %q, want %q", got, want)
	}
	kill(t, vm)
}

// branchOfABranch: machines of a branch are branched like any others, whether
// their memory was filled or is an image of its own.
func (h *harness) branchOfABranch(t *testing.T) {
	src := h.restore(t, h.restoreSpec(t))
	write(t, identified(t, src), "child")
	b := h.branch(t, src, []string{h.memory}, h.memory)
	for name, spec := range map[string]vmm.RestoreSpec{"filled": h.filled(t, b), "flat": h.flat(t, b)} {
		origin := []string{spec.Memory}
		if name == "filled" {
			origin = append([]string{b.base}, b.layers...)
		}
		child := h.restore(t, spec)
		write(t, identified(t, child), "grandchild")
		next := h.branch(t, child, origin, b.base, b.layers...)
		h.has(t, h.filled(t, next), next, "grandchild")
		h.has(t, h.flat(t, next), next, "grandchild")
		kill(t, child)
	}
}

// branchOfAnAdopted: a later process can branch a machine, knowing no more of
// it than the handle.
func (h *harness) branchOfAnAdopted(t *testing.T) {
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	write(t, c, "adopted")
	closeSession(t, c)
	kept, err := json.Marshal(vm.Handle())
	try(t, err)
	try(t, vm.Detach())
	var handle vmm.Handle
	try(t, json.Unmarshal(kept, &handle))
	again, err := h.Engine.Adopt(within(t, time.Minute), handle)
	try(t, err)
	defer kill(t, again)
	b := h.branch(t, again, []string{h.memory}, h.memory)
	h.has(t, h.filled(t, b), b, "adopted")
	if got := read(t, session(t, again)); got != "adopted" {
		t.Errorf("the source's file holds %q", got)
	}
}

// saveDeviceRefuses: a machine that runs, or is to be frozen again, a file that is there, a place where
// none can be. It changes neither the machine's state nor the file.
func (h *harness) saveDeviceRefuses(t *testing.T) {
	ctx := within(t, time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	path := filepath.Join(t.TempDir(), "device")
	if err := vm.SaveDevice(ctx, path); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("SaveDevice of a running machine: %v, want ErrConflict", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("SaveDevice of a running machine left a file: %v", err)
	}
	if err := vm.Freeze(ctx, path); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("Freeze of a restored machine: %v, want ErrInvalid", err)
	}
	h.paused(t, vm, false)
	try(t, vm.Pause(ctx))
	try(t, os.WriteFile(path, []byte("mine"), 0o600))
	if err := vm.SaveDevice(ctx, path); !errors.Is(err, os.ErrExist) {
		t.Errorf("SaveDevice to a file that exists: %v, want os.ErrExist", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "mine" {
		t.Errorf("the file that existed holds %q, error %v", got, err)
	}
	if err := vm.SaveDevice(ctx, filepath.Join(path, "device")); err == nil {
		t.Error("SaveDevice to a place where no file can be succeeded")
	}
	h.paused(t, vm, true)
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if err := vm.SaveDevice(canceled, path+".canceled"); err == nil {
		t.Log("SaveDevice with a canceled context succeeded") // as it may
	}
	h.paused(t, vm, true)
	try(t, vm.SaveDevice(ctx, path+".good"))
	try(t, vm.Resume(ctx))
	h.paused(t, vm, false)
	if _, err := c.Ping(ctx); err != nil {
		t.Errorf("Ping after all that: %v", err)
	}
}

func (h *harness) paused(t *testing.T, vm vmm.VM, want bool) {
	t.Helper()
	if got, err := vm.Paused(within(t, time.Minute)); err != nil || got != want {
		t.Errorf("Paused: %v, error %v, want %v", got, err, want)
	}
}

// deadMachine: nothing is asked of a machine that is gone.
func (h *harness) deadMachine(t *testing.T) {
	vm := h.restore(t, h.restoreSpec(t))
	kill(t, vm)
	_, pausedErr := vm.Paused(within(t, time.Minute))
	_, memoryErr := vm.Memory()
	path := filepath.Join(t.TempDir(), "device")
	for name, err := range map[string]error{
		"Paused": pausedErr, "Memory": memoryErr, "SaveDevice": vm.SaveDevice(within(t, time.Minute), path),
	} {
		if !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("%s: %v, want ErrUnavailable", name, err)
		}
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("SaveDevice left a file: %v", err)
	}
}

// fillFails: Restore fails with Fill's error, and no machine is left.
func (h *harness) fillFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	try(t, os.WriteFile(path, nil, 0o600))
	lease := open(t, path)
	try(t, unix.Flock(int(lease.Fd()), unix.LOCK_SH))

	spec := h.restoreSpec(t)
	spec.Leases = []*os.File{lease}
	errFill := errors.New("no layer")
	spec.Fill = func(_ context.Context, space guestmem.Space) error {
		if _, err := space.WriteAt(make([]byte, guestmem.PageSize), 0); err != nil {
			t.Errorf("write into the memory to be filled: %v", err)
		}
		return errFill
	}
	if vm, err := h.Engine.Restore(within(t, time.Minute), spec); !errors.Is(err, errFill) {
		t.Errorf("Restore: vm %v, error %v, want Fill's", vm, err)
	}
	try(t, lease.Close())
	if err := unix.Flock(int(open(t, path).Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("lock after the machine failed: %v", err)
	}
}

// restoreRefusesDevice: what is no device state is found out before anything
// is done with it.
func (h *harness) restoreRefusesDevice(t *testing.T) {
	for _, text := range []string{"", "garbage, and more than a header of it", "QEVM\x00\x00\x00\x02\x07", "QEVM\x00\x00\x00\x03\x01"} {
		spec := h.restoreSpec(t)
		spec.Device = filepath.Join(t.TempDir(), "device")
		try(t, os.WriteFile(spec.Device, []byte(text), 0o600))
		spec.Fill = func(context.Context, guestmem.Space) error {
			t.Errorf("device state %q: memory was filled", text)
			return nil
		}
		if vm, err := h.Engine.Restore(within(t, time.Minute), spec); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("device state %q: vm %v, error %v, want ErrInvalid", text, vm, err)
		}
	}
}

// sums are of the pages of the memory in space, as large as the file at path.
func sums(t *testing.T, space guestmem.Space, path string) (all []uint32) {
	t.Helper()
	info, err := os.Stat(path)
	try(t, err)
	table, buf := crc32.MakeTable(crc32.Castagnoli), make([]byte, 1<<20)
	for off := int64(0); off < info.Size(); off += int64(len(buf)) {
		if _, err := space.ReadAt(buf, off); err != nil {
			t.Fatal(err)
		}
		for page := range slices.Chunk(buf, guestmem.PageSize) {
			all = append(all, crc32.Checksum(page, table))
		}
	}
	return all
}

// differ are the addresses of the pages whose sums are not the same.
func differ(a, b []uint32) (pages []int64) {
	for i := range max(len(a), len(b)) {
		if i >= len(a) || i >= len(b) || a[i] != b[i] {
			pages = append(pages, int64(i)*guestmem.PageSize)
		}
	}
	return pages
}

func image(t *testing.T, base string, layers ...string) *guestmem.Image {
	t.Helper()
	m, err := guestmem.OpenImage(base, layers...)
	try(t, err)
	t.Cleanup(func() { try(t, m.Close()) })
	return m
}

func create(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	try(t, err)
	t.Cleanup(func() { _ = f.Close() }) // closed early
	return f
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
