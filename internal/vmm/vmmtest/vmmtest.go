// Package vmmtest is the suite that every engine must pass: what the contract
// in package vmm promises, tried on real machines of that engine with the real
// agent in them.
package vmmtest

import (
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm"
)

// Setup is an engine and what its machines start from.
type Setup struct {
	Engine vmm.Engine
	Boot   vmm.Boot
	Root   string
	// Stamps is how many pages of memory the monitor writes to before a restored
	// machine runs, such as that of a generation id (VMGenID).
	Stamps int
	// FormatDisk makes the file of an empty scratch disk; only for RunDisk.
	FormatDisk func(ctx context.Context, path string, size int64) error
}

// Run runs the suite. Its machines are small, and at most a handful run at
// the same time.
func Run(t *testing.T, s Setup) {
	h := &harness{Setup: s, work: shortTempDir(t)}
	t.Run("says-what-host-it-needs", h.saysHost)
	t.Run("refuses-bad-shapes", h.refusesBadShapes)
	t.Run("refuses-what-is-not-deterministic", h.refusesDeterministic)
	t.Run("refuses-a-canceled-context", h.refusesCanceled)
	t.Run("ends-when-killed", h.endsWhenKilled)
	h.template(t)
	t.Run("restore-needs-its-files", h.restoreNeedsFiles)
	t.Run("network", h.network)
	t.Run("forks-are-independent", h.forksAreIndependent)
	t.Run("pause-stops-the-guest", h.pauseStops)
	t.Run("restored-paused", h.restoredPaused)
	t.Run("second-session", h.secondSession)
	t.Run("leases-last-as-long-as-the-machine", h.leases)
	t.Run("adopted-after-detach", h.adopted)
	t.Run("branch-is-of-one-instant", h.branchIsOfOneInstant)
	t.Run("branch-of-a-branch", h.branchOfABranch)
	t.Run("branch-of-an-adopted-machine", h.branchOfAnAdopted)
	t.Run("save-device-refuses", h.saveDeviceRefuses)
	t.Run("dead-machine", h.deadMachine)
	t.Run("fill-fails", h.fillFails)
	t.Run("restore-refuses-what-is-no-device-state", h.restoreRefusesDevice)
	t.Run("image-is-never-written", h.imageUnchanged)
}

// saysHost: what hardware does with a machine's state is hardware's own.
func (h *harness) saysHost(t *testing.T) {
	caps := h.Engine.Caps()
	switch {
	case caps.Host != nil:
		if err := errors.Join(caps.Host.Validate(), caps.Host.Accepts(*caps.Host)); err != nil {
			t.Error(err)
		}
	case caps.Hardware:
		t.Error("it runs guests on the CPU, and does not say on which")
	}
}

type harness struct {
	Setup
	work           string
	memory, device string
	diskMiB        int
	disk           []string          // the template's, if it has one
	digest         [sha256.Size]byte // of memory and disk, when they were frozen
	count          int
}

// shortTempDir is a directory whose path leaves room for a socket's name,
// which t.TempDir's does not always.
func shortTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmm") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// bootTime bounds a boot. It is for a machine within an emulated one, where that
// takes several times as long as under emulation, on a host that is busy too.
const bootTime = 3 * time.Minute

func (h *harness) common(t *testing.T) vmm.Common {
	t.Helper()
	h.count++
	id := "m" + strings.Repeat("i", h.count)
	dir := filepath.Join(h.work, id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return vmm.Common{
		ID: id, Dir: dir, Root: h.Root, DieWithParent: true,
		Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1, DiskMiB: h.diskMiB},
	}
}

func (h *harness) restoreSpec(t *testing.T) vmm.RestoreSpec {
	return vmm.RestoreSpec{Common: h.common(t), Memory: h.memory, Device: h.device, Disk: h.disk}
}

func (h *harness) restore(t *testing.T, spec vmm.RestoreSpec) vmm.VM {
	t.Helper()
	vm, err := h.Engine.Restore(within(t, time.Minute), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(t, vm) })
	return vm
}

// template boots a machine, leaves a file in it and freezes it.
func (h *harness) template(t *testing.T) {
	t.Helper()
	h.memory, h.device = filepath.Join(h.work, "memory"), filepath.Join(h.work, "device")
	ctx := within(t, 2*bootTime)
	spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot, Memory: h.memory}
	if h.diskMiB > 0 {
		spec.Disk = filepath.Join(h.work, "disk")
		h.disk = []string{spec.Disk}
		try(t, h.FormatDisk(ctx, spec.Disk, int64(h.diskMiB)<<20))
	}
	vm, err := h.Engine.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer kill(t, vm)
	c := session(t, vm)
	write(t, c, "template")
	if err := c.Quiesce(ctx); err != nil {
		t.Fatal(err)
	}
	closeSession(t, c)
	if space, err := vm.Memory(); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("Memory of a template: %v, error %v, want ErrUnsupported", space, err)
	}
	if err := vm.Freeze(ctx, h.device); err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	h.digest = h.hash(t)
}

func (h *harness) hash(t *testing.T) (sum [sha256.Size]byte) {
	t.Helper()
	s := sha256.New()
	for _, path := range append([]string{h.memory}, h.disk...) {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = io.Copy(s, f); err != nil {
			t.Fatal(err)
		}
		try(t, f.Close())
	}
	return [sha256.Size]byte(s.Sum(nil))
}

func (h *harness) refusesBadShapes(t *testing.T) {
	for _, shape := range []vmm.Machine{{}, {MemoryMiB: 192}, {MemoryMiB: 192, VCPUs: 10000}, {MemoryMiB: -1, VCPUs: 1}} {
		spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
		spec.Machine = shape
		if vm, err := h.Engine.Start(within(t, time.Minute), spec); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("Start with %+v: vm %v, error %v, want ErrInvalid", shape, vm, err)
		}
	}
}

// refusesDeterministic: a shape that no deterministic machine has is invalid,
// and any is unsupported where there are none.
func (h *harness) refusesDeterministic(t *testing.T) {
	good := vmm.Machine{MemoryMiB: 192, VCPUs: 1, Deterministic: true, ClockShift: 1}
	unlike := func(change func(*vmm.Machine)) vmm.Machine {
		m := good
		change(&m)
		return m
	}
	for _, tt := range []struct {
		shape vmm.Machine
		want  error
	}{
		{unlike(func(m *vmm.Machine) { m.VCPUs = 2 }), errdef.ErrInvalid},
		{unlike(func(m *vmm.Machine) { m.ClockShift = vmm.MaxClockShift + 1 }), errdef.ErrInvalid},
		{unlike(func(m *vmm.Machine) { m.ClockShift = -1 }), errdef.ErrInvalid},
		{unlike(func(m *vmm.Machine) { m.DiskMiB = 64 }), errdef.ErrInvalid},
		{unlike(func(m *vmm.Machine) { m.Net = true }), errdef.ErrInvalid},
		{unlike(func(m *vmm.Machine) { m.MemoryMiB = 4 << 10 }), errdef.ErrInvalid},
		{good, nil},
	} {
		switch {
		case !h.Engine.Caps().Deterministic:
			tt.want = errdef.ErrUnsupported
		case tt.want == nil:
			continue
		}
		spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
		spec.Machine = tt.shape
		if vm, err := h.Engine.Start(within(t, time.Minute), spec); !errors.Is(err, tt.want) {
			t.Errorf("Start with %+v: vm %v, error %v, want %v", tt.shape, vm, err, tt.want)
		}
	}
	spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
	spec.Machine.ClockShift = 1
	if vm, err := h.Engine.Start(within(t, time.Minute), spec); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("Start of an ordinary machine with a clock shift: vm %v, error %v, want ErrInvalid", vm, err)
	}
}

func (h *harness) refusesCanceled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	spec := vmm.StartSpec{Common: h.common(t), Boot: h.Boot}
	if _, err := h.Engine.Start(ctx, spec); !errors.Is(err, context.Canceled) {
		t.Errorf("Start: %v, want context.Canceled", err)
	}
}

func (h *harness) endsWhenKilled(t *testing.T) {
	ctx := within(t, time.Minute)
	vm, err := h.Engine.Start(ctx, vmm.StartSpec{Common: h.common(t), Boot: h.Boot})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-vm.Done():
		t.Fatalf("ended by itself: %v", vm.Err())
	default:
	}
	for range 2 {
		if err := vm.Kill(ctx); err != nil {
			t.Fatal(err)
		}
	}
	<-vm.Done()
	if err := vm.Err(); err != nil {
		t.Errorf("Err after Kill: %v", err)
	}
}

func (h *harness) restoreNeedsFiles(t *testing.T) {
	for _, name := range []string{"memory", "device"} {
		spec := h.restoreSpec(t)
		if name == "memory" {
			spec.Memory += ".missing"
		} else {
			spec.Device += ".missing"
		}
		if vm, err := h.Engine.Restore(within(t, time.Minute), spec); err == nil {
			kill(t, vm)
			t.Errorf("Restore without %s succeeded", name)
		}
	}
}

// forksAreIndependent: each fork has what the template had, and what one
// writes no other sees.
func (h *harness) forksAreIndependent(t *testing.T) {
	clients := make([]*guest.Client, 3)
	for i := range clients {
		clients[i] = identified(t, h.restore(t, h.restoreSpec(t)))
	}
	for i, c := range clients {
		if got := read(t, c); got != "template" {
			t.Errorf("fork %d: file holds %q, want the template's", i, got)
		}
		write(t, c, strings.Repeat("x", i))
	}
	for i, c := range clients {
		if got := read(t, c); got != strings.Repeat("x", i) {
			t.Errorf("fork %d: file holds %q", i, got)
		}
	}
}

func (h *harness) pauseStops(t *testing.T) {
	ctx := within(t, time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	for range 2 {
		if err := vm.Pause(ctx); err != nil {
			t.Fatal(err)
		}
	}
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	if _, err := c.Ping(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Ping of a paused machine: %v, want no answer", err)
	}
	for range 2 {
		if err := vm.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Ping(ctx); err != nil {
		t.Errorf("Ping after Resume: %v", err)
	}
}

func (h *harness) restoredPaused(t *testing.T) {
	spec := h.restoreSpec(t)
	spec.Paused = true
	vm := h.restore(t, spec)
	if err := vm.Resume(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	identified(t, vm)
}

// secondSession: a new stream works after one that ended in mid-frame.
func (h *harness) secondSession(t *testing.T) {
	vm := h.restore(t, h.restoreSpec(t))
	closeSession(t, identified(t, vm))
	stream, err := vm.Dial(within(t, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Write([]byte("\x05garb")); err != nil {
		t.Fatal(err)
	}
	if err := stream.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := session(t, vm).Ping(within(t, time.Minute)); err != nil {
		t.Error(err)
	}
}

func (h *harness) leases(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lease")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	lease := open(t, path)
	if err := unix.Flock(int(lease.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	spec := h.restoreSpec(t)
	spec.Leases = []*os.File{lease}
	vm := h.restore(t, spec)
	if err := lease.Close(); err != nil {
		t.Fatal(err)
	}
	other := open(t, path)
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("lock while the machine runs: %v, want EWOULDBLOCK", err)
	}
	kill(t, vm)
	if err := unix.Flock(int(other.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("lock after the machine's end: %v", err)
	}
}

func (h *harness) adopted(t *testing.T) {
	ctx := within(t, time.Minute)
	vm := h.restore(t, h.restoreSpec(t))
	c := identified(t, vm)
	write(t, c, "before")
	closeSession(t, c)
	handle := vm.Handle()
	if err := vm.Detach(); err != nil {
		t.Fatal(err)
	}
	again, err := h.Engine.Adopt(ctx, handle)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, session(t, again)); got != "before" {
		t.Errorf("file holds %q after adoption", got)
	}
	kill(t, again)
	if _, err := h.Engine.Adopt(ctx, handle); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("Adopt of a dead machine: %v, want ErrNotFound", err)
	}
}

func (h *harness) imageUnchanged(t *testing.T) {
	if h.hash(t) != h.digest {
		t.Error("the memory image or the disk has changed since it was frozen")
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func kill(t *testing.T, vm vmm.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
	defer cancel()
	if err := vm.Kill(ctx); err != nil {
		t.Errorf("Kill: %v", err)
	}
}

func session(t *testing.T, vm vmm.VM) *guest.Client {
	t.Helper()
	return dial(t, vm, guest.Dial)
}

// identified is the first session with a fork.
func identified(t *testing.T, vm vmm.VM) *guest.Client {
	t.Helper()
	return dial(t, vm, func(ctx context.Context, rw io.ReadWriteCloser) (*guest.Client, error) {
		return guest.DialIdentity(ctx, rw, guest.NewIdentity("fork", "fork-1"))
	})
}

func dial(t *testing.T, vm vmm.VM, hello func(context.Context, io.ReadWriteCloser) (*guest.Client, error)) *guest.Client {
	t.Helper()
	ctx := within(t, bootTime)
	stream, err := vm.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := hello(ctx, stream)
	if err != nil {
		t.Fatalf("%v\n%s", err, console(t, vm))
	}
	t.Cleanup(func() { _ = c.Close() }) // its machine may be gone before it
	return c
}

// console is the end of what the machine's kernel has said, for a test that
// fails.
func console(t *testing.T, vm vmm.VM) string {
	talker, ok := vm.(interface {
		Console(ctx context.Context) (string, error)
	})
	if !ok {
		return ""
	}
	text, err := talker.Console(within(t, time.Minute))
	if err != nil {
		return "no console: " + err.Error()
	}
	return "console: " + text
}

func closeSession(t *testing.T, c *guest.Client) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, c *guest.Client, text string) {
	t.Helper()
	run(t, c, `printf %s "$0" > state`, text)
}

func read(t *testing.T, c *guest.Client) string {
	t.Helper()
	return run(t, c, "cat state")
}

func run(t *testing.T, c *guest.Client, script string, args ...string) string {
	t.Helper()
	argv := append([]string{"/bin/sh", "-c", script}, args...)
	res, err := c.Run(within(t, time.Minute), guest.ExecSpec{Argv: argv}, nil, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	if res.Exit.Code != 0 {
		t.Fatalf("%q: exit status %d: %s", script, res.Exit.Code, res.Stderr)
	}
	return string(res.Stdout)
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // closed early by some
	return f
}
