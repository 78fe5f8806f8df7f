//go:build vm

package qemu_test

import (
	"bytes"
	"context"
	"fmt"
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
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmtest"
)

// rig is a frozen machine, and what it takes to make others of it.
type rig struct {
	engine               vmm.Engine
	work, memory, device string
	root                 string
	shape                vmm.Machine
	disk                 []string // its files, if it has one
}

func newRig(t *testing.T, shape vmm.Machine) *rig {
	t.Helper()
	engine := vmtest.Engine(t)
	work, err := os.MkdirTemp("", "rig") //nolint:usetesting // t.TempDir's path is too long for sockets
	try(t, err)
	t.Cleanup(func() { try(t, os.RemoveAll(work)) })
	img := vmtest.Image(t)
	r := &rig{engine: engine, work: work, root: img.RootPath(), shape: shape}
	r.memory, r.device = filepath.Join(work, "memory"), filepath.Join(work, "device")

	spec := vmm.StartSpec{Common: r.common(t, "template"), Boot: vmtest.Boot(img), Memory: r.memory}
	if shape.DiskMiB > 0 {
		spec.Disk = filepath.Join(work, "disk")
		r.disk = []string{spec.Disk}
		try(t, image.FormatDisk(bound(t), spec.Disk, int64(shape.DiskMiB)<<20))
	}
	vm, err := engine.Start(bound(t), spec)
	try(t, err)
	t.Cleanup(func() { try(t, vm.Kill(context.WithoutCancel(t.Context()))) })
	c := client(t, vm)
	if shape.Net {
		answer(t, vm, "template")
		r.speak(t, c, "template")
	}
	try(t, c.Quiesce(bound(t)))
	try(t, c.Close())
	try(t, vm.Freeze(bound(t), r.device))
	try(t, vm.Kill(bound(t)))
	return r
}

func (r *rig) common(t *testing.T, id string) vmm.Common {
	t.Helper()
	dir := filepath.Join(r.work, id)
	try(t, os.Mkdir(dir, 0o700))
	return vmm.Common{ID: id, Dir: dir, Root: r.root, DieWithParent: true, Machine: r.shape}
}

// restore restores a machine, and checks in the end that QEMU had nothing to
// say about it.
func (r *rig) restore(t *testing.T, id, device string, fill func(context.Context, guestmem.Space) error, disk ...string) vmm.VM {
	t.Helper()
	spec := vmm.RestoreSpec{Common: r.common(t, id), Memory: r.memory, Device: device, Fill: fill, Disk: disk}
	vm, err := r.engine.Restore(bound(t), spec)
	try(t, err)
	t.Cleanup(func() {
		try(t, vm.Kill(context.WithoutCancel(t.Context())))
		if said, err := os.ReadFile(filepath.Join(spec.Dir, "vmm.log")); err != nil || len(said) > 0 {
			t.Errorf("QEMU of machine %s said %q, error %v", id, said, err)
		}
	})
	if r.shape.Net {
		answer(t, vm, id)
	}
	return vm
}

func TestBranch(t *testing.T) {
	r := newRig(t, vmm.Machine{MemoryMiB: 192, VCPUs: 1})
	t.Run("under-connection", r.underConnection)
	t.Run("save-repeatedly", r.saveRepeatedly)
	t.Run("control-after-cancel", r.controlAfterCancel)
	t.Run("fill-before-load", r.fillBeforeLoad)
}

// underConnection: a machine is branched while its agent is
// connected and sends. Its stream goes on; the agent of the branch sees that
// nobody is at the other end, answers the next who is, and has the processes.
func (r *rig) underConnection(t *testing.T) {
	src := r.restore(t, "source", r.device, nil)
	c := client(t, src)
	sleep, err := c.Exec(bound(t), guest.ExecSpec{Argv: []string{"sleep", "1000"}, Background: true})
	try(t, err)
	count := &counter{t: t}
	count.p, err = c.Exec(bound(t), guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); done"}})
	try(t, err)
	count.read(1000)

	for i := range 3 {
		id := strconv.Itoa(i)
		try(t, src.Pause(bound(t)))
		device := filepath.Join(r.work, id+".device")
		try(t, src.SaveDevice(bound(t), device))
		space, err := src.Memory()
		try(t, err)
		frozen, err := space.Copy(bound(t))
		try(t, err)
		try(t, src.Resume(bound(t)))
		fork := r.restore(t, "fork"+id, device, func(_ context.Context, to guestmem.Space) error {
			return copyPages(to, frozen)
		})
		try(t, frozen.Close())

		cf := client(t, fork)
		all, err := cf.Processes(bound(t))
		try(t, err)
		at := slices.IndexFunc(all, func(p guest.ProcessInfo) bool { return p.PID == sleep.PID() })
		if at < 0 {
			t.Errorf("no process %d in the branch: %+v", sleep.PID(), all)
		}
		res, err := cf.Run(bound(t), guest.ExecSpec{Argv: []string{"cat", fmt.Sprintf("/proc/%d/cmdline", sleep.PID())}}, nil, 1000)
		try(t, err)
		if got := string(res.Stdout); got != "sleep\x001000\x00" {
			t.Errorf("process %d in the branch is %q", sleep.PID(), got)
		}
		count.read(5000)
		try(t, fork.Kill(bound(t)))
	}
}

// counter checks a stream of numbers, one a line.
type counter struct {
	t    *testing.T
	p    *guest.Process
	rest []byte
	next int
}

func (c *counter) read(lines int) {
	c.t.Helper()
	for end := c.next + lines; c.next < end; {
		out, err := c.p.Next(bound(c.t))
		try(c.t, err)
		if out.Exit != nil {
			c.t.Fatalf("the stream has ended: %+v", out.Exit)
		}
		c.rest = append(c.rest, out.Data...)
		for {
			line, rest, whole := bytes.Cut(c.rest, []byte("\n"))
			if !whole {
				break
			}
			if string(line) != strconv.Itoa(c.next) {
				c.t.Fatalf("line %d of the stream is %q", c.next, line)
			}
			c.rest = rest
			c.next++
		}
	}
}

func copyPages(to guestmem.Space, from guestmem.Source) error {
	var failed error
	err := from.Private(func(first, count uint64) bool {
		p := make([]byte, count*guestmem.PageSize)
		if _, failed = from.ReadAt(p, int64(first*guestmem.PageSize)); failed == nil {
			_, failed = to.WriteAt(p, int64(first*guestmem.PageSize))
		}
		return failed == nil
	})
	if failed != nil {
		return failed
	}
	return err
}

// saveRepeatedly: failures in between leave the machine paused and
// able to run, and nothing piles up in QEMU.
func (r *rig) saveRepeatedly(t *testing.T) {
	vm := r.restore(t, "saved", r.device, nil)
	c := client(t, vm)
	var before int
	for i := range 10 {
		try(t, vm.Pause(bound(t)))
		for j := range 2 {
			try(t, vm.SaveDevice(bound(t), filepath.Join(r.work, fmt.Sprintf("%d-%d.device", i, j))))
		}
		bad := []string{"/nowhere/device", "/dev/fdset/99"}
		if i == 0 {
			bad = append(bad, "/dev/full") // QEMU 7.2 never closes what it could not write to
		}
		for _, path := range bad {
			_, err := qemu.Execute(bound(t), vm, "xen-save-devices-state", map[string]any{"filename": path, "live": false})
			if err == nil {
				t.Errorf("device state was written to %s", path)
			}
		}
		if i == 0 {
			before = descriptors(t, vm.PID())
		}
		if paused, err := vm.Paused(bound(t)); err != nil || !paused {
			t.Errorf("Paused after failures: %v, error %v", paused, err)
		}
		if after := descriptors(t, vm.PID()); after != before {
			t.Errorf("QEMU has %d descriptors open after %d rounds, and had %d", after, i+1, before)
		}
		try(t, vm.Resume(bound(t)))
		_, err := c.Ping(bound(t))
		try(t, err)
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", vm.PID()))
	try(t, err)
	for _, fd := range fds {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", vm.PID(), fd.Name())); strings.HasSuffix(to, ".device") {
			t.Errorf("QEMU holds %s", to)
		}
	}
}

// descriptors counts what a process has open, but for eventfds: QEMU takes
// those of its devices when the guest runs.
func descriptors(t *testing.T, pid int) (n int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	fds, err := os.ReadDir(dir)
	try(t, err)
	for _, fd := range fds {
		if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && !strings.Contains(to, "eventfd") {
			n++
		}
	}
	return n
}

// controlAfterCancel: a command whose caller has gone breaks the control
// connection, and the next command makes another.
func (r *rig) controlAfterCancel(t *testing.T) {
	vm := r.restore(t, "canceled", r.device, nil)
	try(t, vm.Pause(bound(t)))
	for i := range 10 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*200*time.Microsecond)
		device := filepath.Join(r.work, fmt.Sprintf("canceled%d.device", i))
		err := vm.SaveDevice(ctx, device)
		cancel()
		if _, statErr := os.Stat(device); (err == nil) != (statErr == nil) {
			t.Errorf("SaveDevice: error %v, but of its file: %v", err, statErr)
		}
		start := time.Now()
		if paused, err := vm.Paused(bound(t)); err != nil || !paused {
			t.Errorf("Paused after that: %v, error %v", paused, err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("it took %v to ask", took)
		}
	}
	try(t, vm.Resume(bound(t)))
	client(t, vm)
}

// fillBeforeLoad: memory is whole when Fill is called, and the machine
// loads what Fill has left there.
func (r *rig) fillBeforeLoad(t *testing.T) {
	link := filepath.Join(r.work, "link")
	try(t, os.Symlink(r.work, link))
	linked := *r
	linked.memory = filepath.Join(link, "memory")
	calls := 0
	vm := linked.restore(t, "filled", r.device, func(_ context.Context, space guestmem.Space) error {
		calls++
		var mapped uint64
		for _, m := range space.Ranges {
			mapped += m.End - m.Start
		}
		if mapped != 192<<20 {
			t.Errorf("%d bytes are mapped: %+v", mapped, space)
		}
		return space.Private(func(first, count uint64) bool {
			t.Errorf("QEMU has written to %d pages from %d on", count, first)
			return true
		})
	})
	if calls != 1 {
		t.Errorf("Fill was called %d times", calls)
	}
	if got, want := vm.Handle().Memory, r.memory; got != want {
		t.Errorf("the handle has memory %s, want %s", got, want)
	}
}

func client(t *testing.T, vm vmm.VM) *guest.Client {
	t.Helper()
	stream, err := vm.Dial(bound(t))
	try(t, err)
	c, err := guest.Dial(bound(t), stream)
	try(t, err)
	t.Cleanup(func() { _ = c.Close() }) // its machine may be gone before it
	return c
}

func bound(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
