// Package qemu runs machines in QEMU: with KVM where the host has it, else in
// QEMU's own emulator (TCG).
//
// Freezing costs no copy of memory: guest RAM is a shared file while the
// template runs, and migration with x-ignore-shared writes only device state.
// A fork maps that file privately, so that the kernel copies pages on write,
// and loads the device state through a descriptor that it inherits.
//
// Everything a machine needs later (control socket, agent socket) is a
// listening socket in its directory that this package creates and hands over
// as a descriptor, so that connecting never has to be retried, and a later
// process can adopt the machine.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/process"
)

// Accel is how QEMU runs guest code.
type Accel string

// The accelerators.
const (
	TCG Accel = "tcg" // software emulation: works everywhere
	KVM Accel = "kvm" // hardware virtualisation
)

// Config says which QEMU to use and how.
type Config struct {
	// Binary is QEMU's path or name in $PATH; empty means qemu-system-x86_64.
	Binary string
	// Accel is TCG unless it says KVM.
	Accel Accel
	// Jail is where QEMU runs, nil for no jail. Its Program and Others are filled
	// in here.
	Jail *jail.Config
	// Logger may be nil.
	Logger *slog.Logger
}

// Engine is QEMU with one accelerator. It is safe for concurrent use.
type Engine struct {
	binary  string
	accel   Accel
	version string
	host    *vmm.Host // with KVM
	keeper  process.Keeper
}

var _ vmm.Engine = (*Engine)(nil)

// New finds QEMU and asks for its version. It returns errdef.ErrUnavailable,
// with a hint, when there is none, and errdef.ErrUnsupported when a jail is asked
// for that this host cannot have. The caller closes the engine.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	name := cfg.Binary
	if name == "" {
		name = "qemu-system-x86_64"
	}
	binary, err := exec.LookPath(name)
	if err != nil {
		err = fmt.Errorf("%w: find QEMU: %w", errdef.ErrUnavailable, err)
		return nil, errdef.WithHint(err, "apt-get install qemu-system-x86")
	}
	ask, cancel := context.WithTimeout(ctx, versionTime)
	defer cancel()
	cmd := exec.CommandContext(ask, binary, "--version")
	cmd.WaitDelay = versionTime // for what it may have left behind, with our pipe
	out, err := process.Output(cmd, 64<<10)
	if err != nil {
		return nil, fmt.Errorf("%w: ask %s for its version: %w", errdef.ErrUnavailable, binary, err)
	}
	e := &Engine{binary: binary, accel: cfg.Accel, version: parseVersion(string(out))}
	if e.accel == "" {
		e.accel = TCG
	}
	e.keeper = process.Keeper{Engine: e.Name(), Monitor: "QEMU", Logger: cfg.Logger}
	if e.keeper.Logger == nil {
		e.keeper.Logger = slog.New(slog.DiscardHandler)
	}
	if e.accel == KVM { // guests see the host's CPU, and KVM keeps part of their state
		host, hostErr := vmm.ThisHost()
		if hostErr != nil {
			return nil, hostErr
		}
		e.host = &host
	}
	if cfg.Jail != nil {
		if err = e.openJail(ctx, *cfg.Jail); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// versionTime is how long QEMU may take to say its version.
const versionTime = time.Minute

// parseVersion takes "7.2.22 (Debian ...)" out of "QEMU emulator version
// 7.2.22 (Debian ...)\nCopyright ...": a distribution's build is part of it,
// as it may carry patches that change device state.
func parseVersion(out string) string {
	line, _, _ := strings.Cut(out, "\n")
	return strings.TrimSpace(strings.TrimPrefix(line, "QEMU emulator version "))
}

// Name is "qemu-tcg" or "qemu-kvm".
func (e *Engine) Name() string { return "qemu-" + string(e.accel) }

// Version is QEMU's, with the distribution's build.
func (e *Engine) Version() string { return e.version }

// Caps says what QEMU can do with this accelerator.
func (e *Engine) Caps() vmm.Caps {
	caps := vmm.Caps{
		Hardware: e.accel == KVM, Host: e.host, MaxVCPUs: 16,
		Deterministic: e.accel == TCG, Model: vmm.Model{Machine: "pc", CPU: deterministicModel},
	}
	return e.keeper.Caps(caps)
}

// Sweep removes the control groups of machines that are no more.
func (e *Engine) Sweep(ctx context.Context) error { return e.keeper.Sweep(ctx) }

// Close ends the launchers that wait for machines.
func (e *Engine) Close() error { return e.keeper.Close() }

// Start boots a machine.
func (e *Engine) Start(ctx context.Context, spec vmm.StartSpec) (vmm.VM, error) {
	if err := errors.Join(e.check(spec.Common), checkPath(spec.Memory)); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	l := newLauncher(e, spec.Common)
	defer l.close()
	if err := l.memory(spec.Memory); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	var disks []string
	cmdline := e.cmdline()
	if spec.Machine.Deterministic {
		var err error
		if cmdline, err = e.deterministicCmdline(spec.Root); err != nil {
			return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
		}
	}
	if spec.Disk != "" {
		disks = []string{spec.Disk}
		cmdline += " " + diskOption
	}
	if spec.Machine.Net {
		cmdline += " " + vmm.GuestNet().Option()
	}
	if err := l.disk(disks, false); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	if err := errors.Join(l.open(spec.Boot.Kernel, os.O_RDONLY), l.open(spec.Boot.Initrd, os.O_RDONLY)); err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	l.args = append(l.args,
		"-kernel", spec.Boot.Kernel, "-initrd", spec.Boot.Initrd,
		"-append", strings.TrimSpace(cmdline+" "+spec.Boot.Cmdline))
	vm, err := l.launch(ctx)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	vm.shared = spec.Memory
	if err := vm.arm(ctx); err != nil {
		err = errors.Join(err, vm.Kill(context.WithoutCancel(ctx)))
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	return vm, nil
}

// Restore brings up a machine that shares a frozen one's memory.
func (e *Engine) Restore(ctx context.Context, spec vmm.RestoreSpec) (vmm.VM, error) {
	vm, err := e.restore(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("restore machine %s: %w", spec.ID, err)
	}
	return vm, nil
}

func (e *Engine) restore(ctx context.Context, spec vmm.RestoreSpec) (vmm.VM, error) {
	if err := e.check(spec.Common); err != nil {
		return nil, err
	}
	if spec.Memory == "" || spec.Device == "" {
		return nil, fmt.Errorf("%w: memory image and device state are both needed", errdef.ErrInvalid)
	}
	l := newLauncher(e, spec.Common)
	defer l.close()
	if err := l.mapImage(spec.Memory); err != nil {
		return nil, err
	}
	if err := l.disk(spec.Disk, true); err != nil {
		return nil, err
	}
	device, err := l.incoming(spec.Device)
	if err != nil {
		return nil, err
	}
	vm, err := l.launch(ctx)
	if err != nil {
		return nil, err
	}
	if err := vm.arm(ctx); err != nil {
		return nil, errors.Join(err, vm.Kill(context.WithoutCancel(ctx)))
	}
	if err := vm.load(ctx, device, spec.Fill, !spec.Paused); err != nil {
		return nil, errors.Join(err, vm.Kill(context.WithoutCancel(ctx)))
	}
	return vm, nil
}

// Adopt takes over a machine whose process is still the one in h.
func (e *Engine) Adopt(_ context.Context, h vmm.Handle) (vmm.VM, error) {
	m := &machine{handle: h}
	var err error
	if m.Process, err = e.keeper.Adopt(h, m.hooks()); err != nil {
		return nil, err
	}
	return m, nil
}

// cmdline is what QEMU's machine needs of a guest kernel. The machine's clocks
// are what they are under emulation, so nothing is calibrated at boot; and
// since an emulator does not speculate, it needs no mitigations. No device
// needs a bounce buffer, which would take 64 MiB of the guest's memory.
func (e *Engine) cmdline() string {
	line := "console=ttyS0 quiet swiotlb=noforce panic=-1 reboot=t random.trust_cpu=on no_timer_check 8250.nr_uarts=1 cryptomgr.notests tine.link=virtio-serial"
	if e.accel == TCG {
		line += " mitigations=off tsc=reliable"
	}
	return line
}

// diskOption tells the guest of its disk, so that it does not look for one when
// there is none.
const diskOption = "tine.disk=/dev/vda"

func (e *Engine) check(c vmm.Common) error {
	if err := e.checkDeterministic(c.Machine); err != nil {
		return err
	}
	switch {
	case c.Machine.MemoryMiB < 64 || c.Machine.MemoryMiB > 1<<20:
		return fmt.Errorf("%w: memory of %d MiB", errdef.ErrInvalid, c.Machine.MemoryMiB)
	case c.Machine.VCPUs < 1 || c.Machine.VCPUs > 16:
		return fmt.Errorf("%w: %d vCPUs", errdef.ErrInvalid, c.Machine.VCPUs)
	case c.Machine.DiskMiB != 0 && (c.Machine.DiskMiB < vmm.MinDiskMiB || c.Machine.DiskMiB > vmm.MaxDiskMiB):
		return fmt.Errorf("%w: a disk of %d MiB: %d to %d are possible", errdef.ErrInvalid, c.Machine.DiskMiB, vmm.MinDiskMiB, vmm.MaxDiskMiB)
	case len(filepath.Join(c.Dir, agentSocket)) > vmm.MaxSocketPath:
		return fmt.Errorf("%w: socket path in %s is longer than %d bytes", errdef.ErrInvalid, c.Dir, vmm.MaxSocketPath)
	}
	return errors.Join(checkPath(c.Dir), checkPath(c.Root))
}

func checkPath(path string) error {
	if strings.ContainsAny(path, ",\n") {
		return fmt.Errorf("%w: path %q holds a character that QEMU's options cannot", errdef.ErrInvalid, path)
	}
	return nil
}
