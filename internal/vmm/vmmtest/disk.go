package vmmtest

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// settle brings what a guest has in memory of its files to its disk, so that it
// is read from there. An engine whose guests are no machines does not.
const settle = "if grep -qs tine.disk= /proc/cmdline; then sync; echo 3 > /proc/sys/vm/drop_caches; fi"

// RunDisk runs the suite of machines with a scratch disk.
func RunDisk(t *testing.T, s Setup) {
	h := &harness{Setup: s, work: shortTempDir(t), diskMiB: 64}
	t.Run("refuses-other-disks", h.refusesDisks)
	h.template(t)
	t.Run("restore-refuses-other-disks", h.restoreRefusesDisks)
	t.Run("forks-are-independent", h.forksAreIndependent)
	t.Run("branch-is-of-one-instant", h.branchIsOfOneInstant)
	t.Run("branch-of-a-branch", h.branchOfABranch)
	t.Run("branch-of-an-adopted-machine", h.branchOfAnAdopted)
	t.Run("disk-is-of-one-instant", h.diskIsOfOneInstant)
	t.Run("freeze-disk-refuses", h.freezeDiskRefuses)
	t.Run("nothing-written", h.nothingWritten)
	t.Run("many-branches", h.manyBranches)
	t.Run("image-is-never-written", h.imageUnchanged)
}

// keep links to the files of a disk, as a snapshot does: those in a machine's
// directory are not there for ever.
func (h *harness) keep(t *testing.T, name string, disk []string) (kept []string) {
	t.Helper()
	for i, path := range disk {
		link := name + ".disk" + strconv.Itoa(i)
		try(t, os.Link(path, link))
		kept = append(kept, link)
	}
	return kept
}

// refusesDisks: a disk is given if the shape says so, and has that size.
func (h *harness) refusesDisks(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk")
	try(t, os.WriteFile(disk, make([]byte, 1<<20), 0o600))
	for name, tc := range map[string]struct {
		mib  int
		disk string
	}{
		"no file": {64, ""}, "no size": {0, disk}, "another size": {64, disk},
		"negative": {-1, disk}, "huge": {1 << 40, disk},
	} {
		spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot, Disk: tc.disk}
		spec.Machine.DiskMiB = tc.mib
		if vm, err := h.Engine.Start(within(t, time.Minute), spec); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: vm %v, error %v, want ErrInvalid", name, vm, err)
		}
	}
}

func (h *harness) restoreRefusesDisks(t *testing.T) {
	junk := filepath.Join(t.TempDir(), "junk")
	try(t, os.WriteFile(junk, []byte("QFI\xfb, but no more than that"), 0o600))
	for name, disk := range map[string][]string{
		"none": nil, "junk": {junk}, "junk on top": {h.disk[0], junk}, "raw on raw": {h.disk[0], h.disk[0]},
	} {
		spec := h.restoreSpec(t)
		spec.Disk = disk
		if vm, err := h.Engine.Restore(within(t, time.Minute), spec); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: vm %v, error %v, want ErrInvalid", name, vm, err)
		}
	}
	spec := h.restoreSpec(t)
	spec.Disk = []string{h.disk[0] + ".missing"}
	if vm, err := h.Engine.Restore(within(t, time.Minute), spec); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: vm %v, error %v, want os.ErrNotExist", vm, err)
	}
}

// diskIsOfOneInstant: what was written to the disk before a branch is there in
// machines of it, what was written later is not, and what they write is theirs.
func (h *harness) diskIsOfOneInstant(t *testing.T) {
	src := h.restore(t, h.restoreSpec(t))
	c := identified(t, src)
	put := func(text string) { write(t, c, text); run(t, c, settle) }
	put("first")
	first := h.branch(t, src, []string{h.memory}, h.memory)
	put("second")
	second := h.branch(t, src, []string{h.memory}, first.base, first.layers...)
	put("later")

	for want, b := range map[string]branch{"first": first, "second": second} {
		one, other := h.restore(t, h.filled(t, b)), h.restore(t, h.flat(t, b))
		for _, vm := range []vmm.VM{one, other} {
			cf := identified(t, vm)
			run(t, cf, settle)
			if got := read(t, cf); got != want {
				t.Errorf("file holds %q, want %q", got, want)
			}
			write(t, cf, "mine")
			run(t, cf, settle)
		}
		kill(t, one)
		kill(t, other)
	}
	run(t, c, settle)
	if got := read(t, c); got != "later" {
		t.Errorf("the source's file holds %q, want what it wrote last", got)
	}
}

// freezeDiskRefuses: a machine that runs, one that is gone. One without a disk
// has no files.
func (h *harness) freezeDiskRefuses(t *testing.T) {
	ctx := within(t, time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	if _, err := vm.FreezeDisk(ctx); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("of a running machine: %v, want ErrConflict", err)
	}
	kill(t, vm)
	if _, err := vm.FreezeDisk(ctx); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("of a dead machine: %v, want ErrUnavailable", err)
	}
}

// nothingWritten: freezing twice without a write between adds nothing.
func (h *harness) nothingWritten(t *testing.T) {
	ctx := within(t, time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	write(t, c, "something")
	run(t, c, settle)
	try(t, vm.Pause(ctx))
	first, err := vm.FreezeDisk(ctx)
	try(t, err)
	second, err := vm.FreezeDisk(ctx)
	try(t, err)
	if len(second) > len(first)+1 || h.Engine.Name() != "fake" && len(second) > len(first) {
		t.Errorf("files %q, and then %q", first, second)
	}
	try(t, vm.Resume(ctx))
}

// manyBranches: the files of a disk do not pile up, and each branch has what
// its source had, before and after the source's files were joined.
func (h *harness) manyBranches(t *testing.T) {
	const many, most = 24, 18
	ctx := within(t, 5*time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	var early branch
	for i := range many {
		write(t, c, strconv.Itoa(i))
		run(t, c, `head -c 8192 /dev/urandom > part$0; cat part* | cksum > sum; `+settle, strconv.Itoa(i))
		if i == 5 {
			early = h.branch(t, vm, []string{h.memory}, h.memory)
			continue
		}
		try(t, vm.PrepareDisk(ctx))
		try(t, vm.Pause(ctx))
		files, err := vm.FreezeDisk(ctx)
		try(t, err)
		try(t, vm.Resume(ctx))
		if len(files) > most {
			t.Fatalf("%d files after %d branches", len(files), i+1)
		}
	}
	late := h.branch(t, vm, []string{h.memory}, h.memory)
	kill(t, vm)
	for want, b := range map[string]branch{"5": early, strconv.Itoa(many - 1): late} {
		child := h.restore(t, h.filled(t, b))
		cf := identified(t, child)
		run(t, cf, settle+"; cat part* | cksum | cmp - sum")
		if got := read(t, cf); got != want {
			t.Errorf("file holds %q, want %q", got, want)
		}
		kill(t, child)
	}
}
