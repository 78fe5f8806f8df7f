package sandbox

import (
	"cmp"
	"context"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// What a machine may take when nobody has said otherwise. A hundred sandboxes so
// limited are no danger to a small host, and none of them notices in ordinary
// use.
const (
	// monitorMiB is for the monitor itself: under emulation 64 MiB of translated
	// code, some 25 MiB of its own, and page tables; and for the pages of images
	// that it was the first to touch, which the kernel can take back.
	monitorMiB = 192
	// monitorCPU is for the monitor's own thread, beside those of the vCPUs.
	monitorCPU = 500
	// monitorPIDs is for its threads: one for each vCPU, and up to 64 that serve
	// its disk.
	monitorPIDs = 128
)

// LimitsOf are what a machine may take: what was asked for, and for the rest what
// every machine of its shape may take, as far as this host can enforce that; 0 is
// no limit. What was asked for and cannot be enforced is the engine's error to
// make.
func (m *Manager) LimitsOf(asked vmm.Limits, shape vmm.Machine) vmm.Limits {
	var usual vmm.Limits
	can := m.Engine.Caps().Limits
	if can.Memory {
		usual.MemoryMiB = shape.MemoryMiB + monitorMiB
	}
	if can.CPU {
		usual.CPUMillis = 1000*shape.VCPUs + monitorCPU
	}
	if can.PIDs {
		usual.PIDs = monitorPIDs
	}
	return vmm.Limits{
		MemoryMiB: cmp.Or(asked.MemoryMiB, usual.MemoryMiB), CPUMillis: cmp.Or(asked.CPUMillis, usual.CPUMillis),
		PIDs: cmp.Or(asked.PIDs, usual.PIDs), IOBytes: asked.IOBytes,
	}
}

// minPIDs is what a monitor needs to come up.
const minPIDs = 16

func checkLimits(l vmm.Limits) error {
	switch {
	case l.MemoryMiB < 0 || l.CPUMillis < 0 || l.PIDs < 0 || l.IOBytes < 0:
		return fmt.Errorf("%w: negative limit", errdef.ErrInvalid)
	case l.PIDs > 0 && l.PIDs < minPIDs:
		return fmt.Errorf("%w: a limit of %d threads: a machine needs %d to start", errdef.ErrInvalid, l.PIDs, minPIDs)
	}
	return nil
}

// Limit changes what a sandbox may take of its host. Fields that are zero are
// what they would be for a fork that does not ask. The limits hold for machines
// that it has later, too.
func (m *Manager) Limit(ctx context.Context, id string, asked vmm.Limits) (Info, error) {
	if err := checkLimits(asked); err != nil {
		return Info{}, err
	}
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return Info{}, err
	}
	defer done()
	b.mu.Lock()
	defer b.mu.Unlock()
	r := b.record
	r.MemoryLimitMiB, r.Limits = asked.MemoryMiB, m.LimitsOf(asked, r.Machine)
	if b.vm != nil {
		if err = b.vm.SetLimits(r.Limits); err != nil {
			return Info{}, fmt.Errorf("limit sandbox %s: %w", id, err)
		}
	}
	if err = r.save(m.Dir); err != nil {
		return Info{}, err
	}
	b.record = r
	return r.Info, nil
}

// Usage says what a sandbox takes of its host: nothing while it is suspended. It
// is errdef.ErrUnsupported where the host does not count that.
func (m *Manager) Usage(id string) (vmm.Usage, error) {
	b, err := m.find(id)
	if err != nil {
		return vmm.Usage{}, err
	}
	vm := b.machine()
	if vm == nil {
		return vmm.Usage{}, nil
	}
	usage, err := vm.Usage()
	if err != nil {
		return vmm.Usage{}, fmt.Errorf("sandbox %s: %w", id, err)
	}
	return usage, nil
}
