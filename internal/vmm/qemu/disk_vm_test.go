//go:build vm

package qemu_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
	"github.com/tinevm/tine/internal/vmtest"
)

func TestDisk(t *testing.T) {
	engine := vmtest.Engine(t)
	img := vmtest.Image(t)
	vmmtest.RunDisk(t, vmmtest.Setup{Engine: engine, Boot: vmtest.Boot(img), Root: img.RootPath(), FormatDisk: image.FormatDisk})
}

func TestDiskInGuest(t *testing.T) {
	r := newRig(t, vmm.Machine{MemoryMiB: 256, VCPUs: 1, DiskMiB: 256})
	t.Run("much-is-written", r.muchIsWritten)
	t.Run("full", r.full)
	t.Run("leftovers", r.leftovers)
	t.Run("joined-under-writes", r.joinedUnderWrites)
	t.Run("joined-to-the-bottom", r.joinedToTheBottom)
}

func (r *rig) newFork(t *testing.T, id string) (vmm.VM, *guest.Client) {
	vm := r.restore(t, id, r.device, nil, r.disk...)
	return vm, client(t, vm)
}

// frozen takes all of a machine at one instant: disk, device state and memory.
func (r *rig) frozen(t *testing.T, vm vmm.VM, name string) (disk []string, device string, memory *guestmem.Copy) {
	t.Helper()
	try(t, vm.PrepareDisk(bound(t)))
	try(t, vm.Pause(bound(t)))
	start := time.Now()
	disk, err := vm.FreezeDisk(bound(t))
	try(t, err)
	t.Logf("FreezeDisk: %s, %d files", time.Since(start), len(disk))
	device = filepath.Join(r.work, name+".device")
	try(t, vm.SaveDevice(bound(t), device))
	space, err := vm.Memory()
	try(t, err)
	memory, err = space.Copy(bound(t))
	try(t, err)
	t.Cleanup(func() { try(t, memory.Close()) })
	try(t, vm.Resume(bound(t)))
	return disk, device, memory
}

// muchIsWritten: of a file that is in part on the disk and in part in memory
// still, a branch has all; and its disk has what the source's had.
func (r *rig) muchIsWritten(t *testing.T) {
	src, c := r.newFork(t, "much")
	start := time.Now()
	shell(t, c, `python3 -c "$0"`, `
import os, zlib
part, sum = os.urandom(1<<20), 0
with open("/big", "wb") as f:
    for i in range(64):
        data = bytes([i]) + part
        f.write(data)
        sum = zlib.crc32(data, sum)
open("/sum", "w").write(str(sum))`)
	t.Logf("64 MiB written in %s", time.Since(start))
	disk, device, memory := r.frozen(t, src, "much")
	top := disk[len(disk)-1]
	use, err := linux.DiskUse(top)
	try(t, err)
	t.Logf("%s takes %d KiB at the branch", filepath.Base(top), use>>10)
	shell(t, c, "head -c 67108864 /dev/zero > /big; rm /sum")
	for _, id := range []string{"much1", "much2"} {
		fork := r.restore(t, id, device, func(_ context.Context, to guestmem.Space) error { return copyPages(to, memory) }, disk...)
		cf := client(t, fork)
		got := shell(t, cf, `sync; echo 3 > /proc/sys/vm/drop_caches; python3 -c "$0"`, `
import zlib
sum = 0
with open("/big", "rb") as f:
    while data := f.read(1<<20):
        sum = zlib.crc32(data, sum)
print(str(sum) == open("/sum").read())`)
		if got != "True\n" {
			t.Errorf("in the branch: %q", got)
		}
		shell(t, cf, "rm /big; head -c 10485760 /dev/urandom > /other; sync")
		try(t, fork.Kill(bound(t)))
	}
}

// full: a disk that is full is the writer's error, and no more.
func (r *rig) full(t *testing.T) {
	src, c := r.newFork(t, "full")
	got := shell(t, c, "dd if=/dev/zero of=/big bs=1M 2>&1 | head -1; stat -c %s /big; df -k / | tail -1; rm /big; echo after > /after; sync; cat /after")
	t.Logf("full: %q", got)
	if !strings.Contains(got, "No space left on device") || !strings.HasSuffix(got, "after\n") {
		t.Errorf("on a full disk: %q", got)
	}
	disk, device, memory := r.frozen(t, src, "full")
	fork := r.restore(t, "full1", device, func(_ context.Context, to guestmem.Space) error { return copyPages(to, memory) }, disk...)
	if got := shell(t, client(t, fork), "echo 3 > /proc/sys/vm/drop_caches; cat /after; dmesg | grep -i 'ext4.*error' | head"); got != "after\n" {
		t.Errorf("in the branch: %q", got)
	}
}

// leftovers: what a daemon left that died while it froze a disk is no hindrance:
// one overlay that is not in use is used next, others are removed.
func (r *rig) leftovers(t *testing.T) {
	vm, c := r.newFork(t, "left")
	dir := vm.Handle().Dir
	shell(t, c, "echo 1 > /one; sync")
	r.frozen(t, vm, "left")
	empty, err := os.ReadFile(filepath.Join(dir, "disk.1"))
	try(t, err)
	for _, n := range []string{"7", "8"} {
		path := filepath.Join(dir, "disk."+n)
		try(t, os.WriteFile(path, empty, 0o600))
		var name string
		name, err = qemu.AddDisk(bound(t), vm, "top-"+n, path)
		try(t, err)
		_, err = qemu.Execute(bound(t), vm, "blockdev-add", map[string]any{
			"node-name": "top-" + n, "driver": "qcow2", "backing": nil,
			"file": map[string]any{"driver": "file", "filename": name, "locking": "off"},
		})
		try(t, err)
	}
	for _, text := range []string{"2", "3", "4"} {
		shell(t, c, "echo "+text+" > /two; sync")
		r.frozen(t, vm, "left"+text)
	}
	var changed []string
	_, err = c.Changes(bound(t), func(change guest.Change) error {
		changed = append(changed, change.Path)
		return nil
	})
	if err != nil || !slices.Contains(changed, "/one") {
		t.Errorf("changed %q, %v: want /one among them", changed, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "disk.*"))
	try(t, err)
	for i := range files {
		files[i] = filepath.Base(files[i])
	}
	if want := []string{"disk.0", "disk.1", "disk.10", "disk.8", "disk.9"}; !slices.Equal(files, want) {
		t.Errorf("files %q, want %q", files, want)
	}
}

// writer writes past the page cache, at places and in lengths that are none of
// an overlay's clusters, until it is told to stop. Then it reads all again.
const writer = `
import mmap, os, random
size = 32 << 20
shadow = bytearray(size)
f = os.open("/w", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
os.ftruncate(f, size)
buf = mmap.mmap(-1, 64 << 10)
n = 0
while not os.path.exists("/stop"):
    n += 1
    length, at = random.randrange(1, 128) * 512, random.randrange(0, size // 512 - 128) * 512
    data = random.randbytes(512) * (length // 512)
    buf[:length] = data
    os.pwrite(f, memoryview(buf)[:length], at)
    shadow[at:at + length] = data
for at in range(0, size, 64 << 10):
    os.preadv(f, [buf], at)
    if buf[:] != shadow[at:at + len(buf)]:
        print("differs at", at)
print(n > 100)
`

// joinedUnderWrites: overlays are joined while the guest writes.
func (r *rig) joinedUnderWrites(t *testing.T) {
	vm, c := r.newFork(t, "join")
	p, err := c.Exec(bound(t), guest.ExecSpec{Argv: []string{"python3", "-c", writer}})
	try(t, err)
	joins, before := 0, 0
	for joins < 1 {
		shell(t, c, "sleep 0.1")
		start := time.Now()
		try(t, vm.PrepareDisk(bound(t)))
		took := time.Since(start)
		try(t, vm.Pause(bound(t)))
		disk, freezeErr := vm.FreezeDisk(bound(t))
		try(t, freezeErr)
		try(t, vm.Resume(bound(t)))
		if len(disk) < before {
			joins++
			t.Logf("%d files joined in %s", before, took)
		}
		before = len(disk)
	}
	shell(t, c, "touch /stop")
	var said strings.Builder
	for over := false; !over; {
		out, nextErr := p.Next(bound(t))
		try(t, nextErr)
		said.Write(out.Data)
		over = out.Exit != nil
	}
	if said.String() != "True\n" {
		t.Errorf("the writer said %q", said.String())
	}
}

// joinedToTheBottom: where the frozen files of a fork are many already, they
// are joined too.
func (r *rig) joinedToTheBottom(t *testing.T) {
	const many, enough = 30, 60
	src, c := r.newFork(t, "bottom")
	put := func(c *guest.Client, n int) { shell(t, c, `echo $0 > /f$0; sync`, strconv.Itoa(n)) }
	for i := range many {
		put(c, i)
		try(t, src.Pause(bound(t)))
		_, err := src.FreezeDisk(bound(t)) // and never PrepareDisk
		try(t, err)
		try(t, src.Resume(bound(t)))
	}
	try(t, src.Pause(bound(t)))
	disk, err := src.FreezeDisk(bound(t))
	try(t, err)
	device := filepath.Join(r.work, "bottom.device")
	try(t, src.SaveDevice(bound(t), device))
	space, err := src.Memory()
	try(t, err)
	fork := r.restore(t, "bottom1", device, func(_ context.Context, to guestmem.Space) error { return copyPages(to, space) }, disk...)
	cf := client(t, fork)
	for n, before := many, many; ; n++ {
		put(cf, n)
		files, _, _ := r.frozen(t, fork, "bottom"+strconv.Itoa(n))
		if len(files) < before {
			t.Logf("%d files, then %d", before, len(files))
			break
		}
		if before = len(files); n > enough {
			t.Fatalf("%d files, and none are joined", before)
		}
	}
	if got := shell(t, cf, "echo 3 > /proc/sys/vm/drop_caches; for f in /f*; do [ /f$(cat $f) = $f ] || echo $f; done; ls /f* | wc -l"); strings.Contains(got, "/") {
		t.Errorf("after all was joined: %q", got)
	}
}

func shell(t *testing.T, c *guest.Client, script string, args ...string) string {
	t.Helper()
	argv := append([]string{"/bin/sh", "-c", script}, args...)
	res, err := c.Run(bound(t), guest.ExecSpec{Argv: argv}, nil, 1<<16)
	try(t, err)
	if res.Exit.Code != 0 {
		t.Fatalf("%q: exit status %d: %s", script, res.Exit.Code, res.Stderr)
	}
	return string(res.Stdout)
}
