package apitest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
)

// bounds are those of an operator who has opened no private network.
func bounds() egress.Bounds { return egress.Bounds{} }

// LimitsOf are limits that are asked for, and else made up.
func (b *Backend) LimitsOf(asked vmm.Limits, shape vmm.Machine) vmm.Limits {
	return vmm.Limits{
		MemoryMiB: cmp.Or(asked.MemoryMiB, shape.MemoryMiB+99), CPUMillis: cmp.Or(asked.CPUMillis, 1000*shape.VCPUs+500),
		PIDs: cmp.Or(asked.PIDs, 128), IOBytes: asked.IOBytes,
	}
}

// Limit notes limits.
func (b *Backend) Limit(_ context.Context, id string, asked vmm.Limits) (sandbox.Info, error) {
	if err := b.failure("limit"); err != nil {
		return sandbox.Info{}, err
	}
	x, err := b.find(id)
	if err != nil {
		return sandbox.Info{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	x.info.MemoryLimitMiB, x.info.Limits = asked.MemoryMiB, b.LimitsOf(asked, x.info.Machine)
	return x.info, nil
}

// Usage makes numbers up.
func (b *Backend) Usage(id string) (vmm.Usage, error) {
	if err := b.failure("usage"); err != nil {
		return vmm.Usage{}, err
	}
	_, err := b.find(id)
	return vmm.Usage{
		MemoryBytes: 30 << 20, PrivateBytes: 20 << 20, SharedBytes: 10 << 20, PeakBytes: 40 << 20,
		CPU: 1500 * time.Millisecond, Throttled: 250 * time.Millisecond, PIDs: 3, ReadBytes: 1 << 20, WriteBytes: 2 << 20,
	}, err
}

// checkNet sees that what is to be reached can be.
func checkNet(reach *sandbox.Net, shape vmm.Machine) error {
	if reach == nil {
		return nil
	}
	if !shape.Net {
		return errdef.WithHint(fmt.Errorf("%w: a snapshot without a network card", errdef.ErrInvalid), "tine snapshot create --net")
	}
	policy, err := egress.Compile(reach.Rules, bounds())
	if err != nil {
		return err
	}
	return egress.Config{
		Policy: policy, Secrets: reach.Secrets, UpBytesPerSecond: reach.UpBytes, DownBytesPerSecond: reach.DownBytes,
	}.Validate()
}

// NetState is what a sandbox may reach. What it has tried is what Deny said.
func (b *Backend) NetState(id string) (sandbox.NetState, error) {
	x, err := b.find(id)
	if err = errors.Join(err, b.failure("net")); err != nil {
		return sandbox.NetState{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if !x.info.Machine.Net {
		return sandbox.NetState{}, errdef.WithHint(fmt.Errorf("%w: sandbox %s has no network card", errdef.ErrUnsupported, id),
			"its snapshot has none: tine snapshot create --net")
	}
	return x.net, nil
}

// EditNet changes what a sandbox may reach.
func (b *Backend) EditNet(_ context.Context, id string, edit func(egress.Rules) (egress.Rules, error)) (sandbox.NetState, error) {
	state, err := b.NetState(id)
	if err != nil {
		return state, err
	}
	x, err := b.find(id)
	if err != nil {
		return state, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	reach := x.net.Net
	if reach.Rules, err = edit(reach.Rules); err != nil {
		return state, err
	}
	if err = checkNet(&reach, x.info.Machine); err != nil {
		return state, err
	}
	x.net.Net = reach
	return x.net, nil
}

// Deny notes that a sandbox has tried to reach something.
func (b *Backend) Deny(id, protocol, to string, reason egress.Reason) {
	x, err := b.find(id)
	if err != nil {
		b.tb.Error(err)
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	x.net.Stats.Denied++
	x.net.Stats.BytesUp += 3 << 20
	x.net.Denials = append(x.net.Denials, egress.Denial{
		Protocol: protocol, To: to, Reason: reason, Count: 1, First: time.Now(), Last: time.Now(),
	})
}

// Warmup is what the warm-up of the last template could reach.
func (b *Backend) Warmup() *sandbox.Net {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.warmup
}
