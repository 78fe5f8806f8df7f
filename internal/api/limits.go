package api

import (
	"context"
	"fmt"
	"math"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

const (
	// maxMemoryLimit, in MiB, maxCPULimit, in cores, and maxIOLimit, in bytes a
	// second, are more than any host has.
	maxMemoryLimit = 1 << 30
	maxCPULimit    = 1 << 16
	maxIOLimit     = 1 << 50
	maxPIDsLimit   = 1 << 22
	// minCPULimit is the least that the kernel can give.
	minCPULimit = 0.01
)

// limitFields are limits as clients ask for them; 0 asks for nothing.
type limitFields struct {
	memoryMiB int64
	cpu       float64 // cores
	pids      int
	io        int64 // bytes a second
}

// limits checks them.
func (f limitFields) limits() (vmm.Limits, error) {
	invalid := func(field, hint string, value any) error {
		return errdef.WithHint(fmt.Errorf("%w: %s %v is out of range", errdef.ErrInvalid, field, value), hint)
	}
	switch {
	case f.memoryMiB < 0 || f.memoryMiB > maxMemoryLimit:
		return vmm.Limits{}, invalid("memory_limit_mib", "a number of MiB, or 0 for the usual", f.memoryMiB)
	case f.cpu != 0 && (f.cpu < minCPULimit || f.cpu > maxCPULimit):
		return vmm.Limits{}, invalid("cpu_limit", "a number of cores from 0.01 on, as 0.5, or 0 for the usual", f.cpu)
	case f.pids < 0 || f.pids > maxPIDsLimit:
		return vmm.Limits{}, invalid("pids_limit", "a number of threads from 16 on, or 0 for the usual", f.pids)
	case f.io < 0 || f.io > maxIOLimit:
		return vmm.Limits{}, invalid("io_limit_bytes", "a number of bytes a second, or 0 for no limit", f.io)
	}
	return vmm.Limits{MemoryMiB: int(f.memoryMiB), CPUMillis: int(math.Round(1000 * f.cpu)), PIDs: f.pids, IOBytes: f.io}, nil
}

func limitsOf(l vmm.Limits) *wire.Limits {
	if l == (vmm.Limits{}) {
		return nil
	}
	return &wire.Limits{MemoryMiB: l.MemoryMiB, CPUMillis: l.CPUMillis, PIDs: l.PIDs, IOBytes: l.IOBytes}
}

// LimitSandbox answers PATCH /v1/sandboxes/{id}/limits.
func (s *server) LimitSandbox(ctx context.Context, r wire.LimitSandboxRequestObject) (wire.LimitSandboxResponseObject, error) {
	b := *r.Body
	asked, err := limitFields{or(b.MemoryLimitMiB, 0), or(b.CPULimit, 0), or(b.PIDsLimit, 0), or(b.IOLimitBytes, 0)}.limits()
	if err != nil {
		return nil, err
	}
	if b == (wire.LimitRequest{}) {
		return nil, errdef.WithHint(fmt.Errorf("%w: there is no limit to change", errdef.ErrInvalid),
			"send one of memory_limit_mib, cpu_limit, pids_limit and io_limit_bytes")
	}
	info, err := s.Sandboxes.Get(r.ID)
	if err != nil {
		return nil, err
	}
	has := askedOf(info)
	for _, keep := range []struct {
		missing bool
		now, is *int
	}{
		{b.MemoryLimitMiB == nil, &asked.MemoryMiB, &has.MemoryMiB},
		{b.CPULimit == nil, &asked.CPUMillis, &has.CPUMillis},
		{b.PIDsLimit == nil, &asked.PIDs, &has.PIDs},
	} {
		if keep.missing {
			*keep.now = *keep.is
		}
	}
	if b.IOLimitBytes == nil {
		asked.IOBytes = has.IOBytes
	}
	if info, err = s.Sandboxes.Limit(ctx, r.ID, asked); err != nil {
		return nil, err
	}
	return wire.LimitSandbox200JSONResponse(s.sandboxOf(info)), nil
}

// askedOf are limits that give another sandbox those of this one.
func askedOf(i sandbox.Info) vmm.Limits {
	l := i.Limits
	l.MemoryMiB = i.MemoryLimitMiB
	return l
}

// GetUsage answers GET /v1/sandboxes/{id}/usage.
func (s *server) GetUsage(_ context.Context, r wire.GetUsageRequestObject) (wire.GetUsageResponseObject, error) {
	u, err := s.Sandboxes.Usage(r.ID)
	if err != nil {
		return nil, err
	}
	return wire.GetUsage200JSONResponse{
		MemoryBytes: u.MemoryBytes, PrivateBytes: u.PrivateBytes, SharedBytes: u.SharedBytes, PeakBytes: u.PeakBytes,
		CPUSecs: u.CPU.Seconds(), ThrottledSecs: u.Throttled.Seconds(), PIDs: u.PIDs, ReadBytes: u.ReadBytes, WriteBytes: u.WriteBytes,
	}, nil
}

// ownNetns refuses to promise forks of a snapshot without a network card a
// network of their own. Those of one with a card have that anyway. A snapshot
// that cannot be looked at is for others to refuse.
func (s *server) ownNetns(ctx context.Context, ref string) error {
	if err := mayUse(ctx, s.Snapshots, ref, s.ShareSandboxes); err != nil {
		return err
	}
	snap, err := s.Snapshots.Resolve(ref)
	if err != nil || snap.Manifest.Machine.Net {
		return nil //nolint:nilerr // see above
	}
	return errdef.WithHint(fmt.Errorf("%w: sandboxes of snapshot %s have no network", errdef.ErrInvalid, strings.ToValidUTF8(ref, "?")),
		"leave per_child_netns out, or send false; or make a snapshot with a network card: tine snapshot create --net")
}
