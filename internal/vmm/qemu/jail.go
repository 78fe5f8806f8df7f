package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
)

// openJail opens the jail that this engine's machines run in.
func (e *Engine) openJail(ctx context.Context, cfg jail.Config) (err error) {
	cfg.Program = e.binary
	if cfg.Others, err = dataFiles(ctx, e.binary); err != nil {
		return fmt.Errorf("find QEMU's files: %w", err)
	}
	if e.accel == KVM {
		if _, err = os.Stat(kvmDevice); err != nil {
			return err
		}
	}
	e.jail, err = jail.Open(ctx, cfg)
	return err
}

const kvmDevice = "/dev/kvm"

// firmware is what machines of Tine's kind load by name, if QEMU has it: the
// BIOS, and what starts a kernel that is given as a file.
func firmware() []string {
	return []string{"bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "linuxboot.bin", "multiboot_dma.bin", "pvh.bin"}
}

// dataFiles finds the firmware and the modules of a QEMU.
func dataFiles(ctx context.Context, binary string) ([]string, error) {
	out, err := exec.CommandContext(ctx, binary, "-L", "help").Output()
	if err != nil {
		return nil, fmt.Errorf("%w: ask %s where its firmware is: %w", errdef.ErrUnavailable, binary, err)
	}
	var files []string
	for dir := range strings.Lines(string(out)) {
		for _, name := range firmware() {
			path := filepath.Join(strings.TrimSpace(dir), name)
			if _, err := os.Stat(path); err == nil {
				files = append(files, path)
			}
		}
	}
	// The accelerators may be modules. Where those are, only QEMU's build knows.
	prefix := filepath.Dir(filepath.Dir(binary))
	for _, dir := range []string{"lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"} {
		found, err := filepath.Glob(filepath.Join(prefix, dir, "accel-*-x86_64.so"))
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	return files, nil
}

// firstFD is the first descriptor that QEMU is handed after its standard streams.
func (e *Engine) firstFD() int {
	if e.jail != nil {
		return jail.FirstFile
	}
	return 3
}

// group finds the control group of a machine that an earlier process started.
func (e *Engine) group(pid int, name string) *cgroup.Group {
	if e.jail == nil || name == "" {
		return nil
	}
	group, err := e.jail.Group(pid, name)
	if err != nil {
		e.log.Warn("control group of a machine is not there", "group", name, "error", err)
		return nil
	}
	return group
}

// Sweep removes the control groups of machines that are no more.
func (e *Engine) Sweep(ctx context.Context) error {
	if e.jail == nil {
		return nil
	}
	return e.jail.Sweep(ctx)
}

// Close ends the launchers that wait for machines.
func (e *Engine) Close() error {
	if e.jail == nil {
		return nil
	}
	return e.jail.Close()
}

// prisoner is a QEMU in the jail.
type prisoner struct{ p *jail.Process }

func (p *prisoner) wait() error          { return p.p.Wait() }
func (p *prisoner) kill() error          { return p.p.Kill() }
func (p *prisoner) pid() int             { return p.p.PID() }
func (p *prisoner) group() *cgroup.Group { return p.p.Group }
func (p *prisoner) settled() error       { return p.p.Started() }
func (p *prisoner) jailed() bool         { return true }

// startJailed starts QEMU in a cell of the jail.
func (l *launcher) startJailed(ctx context.Context, out *os.File) (started, error) {
	if l.engine.accel == KVM {
		if err := l.open(kvmDevice, os.O_RDWR); err != nil {
			return nil, errors.Join(err, l.leaveCell())
		}
	}
	p, err := l.cell.Start(ctx, jail.Job{
		Args: l.args, Env: environment(), Output: out, Files: l.files, Opens: l.names,
		Limits: groupLimits(l.spec.Limits), FileBytes: l.largestFile(), DieWithParent: l.spec.DieWithParent,
	})
	if err != nil {
		return nil, err
	}
	return &prisoner{p: p}, nil
}

// leaveCell gives up a cell in which nothing was started.
func (l *launcher) leaveCell() error {
	if l.cell == nil {
		return nil
	}
	return l.cell.Close()
}

func groupLimits(l vmm.Limits) cgroup.Limits {
	return cgroup.Limits{MemoryBytes: int64(l.MemoryMiB) << 20, CPUMillis: l.CPUMillis, PIDs: l.PIDs, IOBytes: l.IOBytes}
}

// fileSlack is for QEMU's log, and for what an overlay has beside its data.
const fileSlack = 64 << 20

// largestFile is how long QEMU may make a file: its disk's overlay, or while a
// template boots its memory.
func (l *launcher) largestFile() int64 {
	largest := int64(l.spec.Machine.DiskMiB) << 20
	largest += largest / 64 // of metadata
	if l.image == "" {
		largest = max(largest, int64(l.spec.Machine.MemoryMiB)<<20)
	}
	return largest + fileSlack
}

// settle waits until a jailed QEMU has opened its files.
func (m *machine) settle(ctx context.Context, p started) error {
	if !p.jailed() {
		return nil
	}
	_, err := m.monitor(ctx) // it answers when the machine is made
	if err = errors.Join(err, p.settled()); err != nil {
		return m.gone(err)
	}
	return nil
}

// release gives back what the host kept for a QEMU that has ended, and reports
// whether it ended for want of memory.
func (m *machine) release() (oom bool) {
	kills, err := jail.Release(context.Background(), m.group)
	if err != nil {
		m.log.Warn("control group not removed", "group", m.handle.Group, "error", err)
	}
	return kills > 0
}

func release(group *cgroup.Group) error {
	_, err := jail.Release(context.Background(), group)
	return err
}

// SetLimits changes the limits of the machine's control group.
func (m *machine) SetLimits(l vmm.Limits) error {
	if m.group == nil {
		if l == (vmm.Limits{}) {
			return nil
		}
		return fmt.Errorf("%w: limits on a machine without a control group", errdef.ErrUnsupported)
	}
	if err := m.group.Set(groupLimits(l)); err != nil {
		return m.ended(fmt.Errorf("set limits: %w", err))
	}
	return nil
}

// Usage is what the machine's control group counts.
func (m *machine) Usage() (vmm.Usage, error) {
	if m.group == nil {
		return vmm.Usage{}, fmt.Errorf("%w: usage of a machine without a control group", errdef.ErrUnsupported)
	}
	u, err := m.group.Usage()
	if err != nil {
		return vmm.Usage{}, m.ended(fmt.Errorf("ask for usage: %w", err))
	}
	return vmm.Usage{
		MemoryBytes: u.MemoryBytes, PrivateBytes: u.PrivateBytes, SharedBytes: u.SharedBytes, PeakBytes: u.PeakBytes,
		CPU: u.CPU, Throttled: u.Throttled, PIDs: u.PIDs, ReadBytes: u.ReadBytes, WriteBytes: u.WriteBytes,
	}, nil
}
