// Package process is a machine's monitor as its host sees it: one process, of
// which a daemon is the parent or that an earlier daemon has left behind, in a
// jail or not, with a control group or not. It knows when and how the process has
// ended, and what it takes, and nothing of what it is told or asked.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/network"
	"github.com/tinevm/tine/internal/vmm"
)

// Hooks are what an engine has to do and say when its process ends. Each may be
// nil. They are called in this order, once, by the goroutine that waits for the
// end.
type Hooks struct {
	// Ended is called before anybody is told.
	Ended func()
	// Explain adds what the monitor had to say to the way it ended.
	Explain func(err error) error
	// Gone is called after Done is closed.
	Gone func()
}

// Process is one monitor. Its methods are safe for concurrent use. Embedded in a
// machine it is the part of vmm.VM that does not depend on the monitor.
type Process struct {
	handle vmm.Handle
	keeper *Keeper
	life   life
	group  *cgroup.Group // nil if it has none
	hooks  Hooks
	done   chan struct{}
	err    error // set before done is closed

	mu     sync.Mutex
	killed bool
}

// life is what is done to a process, whoever started it.
type life interface {
	// wait returns when the process has ended; only one goroutine calls it.
	wait() error
	kill() error
}

func (k *Keeper) watch(handle vmm.Handle, l life, group *cgroup.Group, hooks Hooks) *Process {
	p := &Process{handle: handle, keeper: k, life: l, group: group, hooks: hooks, done: make(chan struct{})}
	go p.watch()
	return p
}

// watch waits for the end; it lives exactly as long as the process does.
func (p *Process) watch() {
	err := p.life.wait()
	if p.hooks.Ended != nil {
		p.hooks.Ended()
	}
	oom := p.release()
	p.mu.Lock()
	if err != nil && !p.killed {
		p.err = fmt.Errorf("%w: %s ended: %w", errdef.ErrUnavailable, p.keeper.Monitor, err)
		if p.hooks.Explain != nil {
			p.err = p.hooks.Explain(p.err)
		}
		if oom {
			p.err = fmt.Errorf("%w: %w", errdef.ErrExhausted, vmm.ErrOutOfMemory)
		}
	}
	p.mu.Unlock()
	close(p.done)
	if p.hooks.Gone != nil {
		p.hooks.Gone()
	}
}

// release gives back what the host kept for a process that has ended, and reports
// whether it ended for want of memory.
func (p *Process) release() (oom bool) {
	kills, err := jail.Release(context.Background(), p.group)
	if err != nil {
		p.keeper.Logger.Warn("control group not removed", "group", p.handle.Group, "error", err)
	}
	return kills > 0
}

// PID is the process's.
func (p *Process) PID() int { return p.handle.PID }

// Handle is what Adopt needs.
func (p *Process) Handle() vmm.Handle { return p.handle }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Err says why the process ended, once Done is closed.
func (p *Process) Err() error {
	select {
	case <-p.done:
		return p.err
	default:
		return nil
	}
}

// Ended prefers the reason why the process is gone to what came of it, such as a
// connection that broke. While the process lives it is err.
func (p *Process) Ended(err error) error {
	select {
	case <-p.done:
		if p.err != nil {
			return p.err
		}
		return fmt.Errorf("%w: the machine is gone", errdef.ErrUnavailable)
	default:
		return err
	}
}

// Kill ends the process and waits for its end.
func (p *Process) Kill(ctx context.Context) error {
	p.mu.Lock()
	p.killed = true
	p.mu.Unlock()
	select {
	case <-p.done:
		return nil
	default:
	}
	err := p.life.kill()
	if err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, errdef.ErrNotFound) {
		return fmt.Errorf("kill machine in %s: %w", p.handle.Dir, err)
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill machine in %s: %w", p.handle.Dir, context.Cause(ctx))
	}
}

// Memory finds the mapping of Handle.Memory among the process's.
func (p *Process) Memory() (guestmem.Space, error) {
	select {
	case <-p.done: // its PID may be another process's
		return guestmem.Space{}, p.Ended(nil)
	default:
	}
	if p.handle.Memory == "" {
		return guestmem.Space{}, fmt.Errorf("%w: memory of machine in %s is not a private mapping of an image", errdef.ErrUnsupported, p.handle.Dir)
	}
	space, err := guestmem.FindSpace(p.handle.PID, p.handle.Memory)
	if err != nil {
		return guestmem.Space{}, p.Ended(fmt.Errorf("find memory of machine in %s: %w", p.handle.Dir, err))
	}
	return space, nil
}

// Link opens the sockets that hear the guest. They are taken from the process,
// which has them for as long as it lives, so that any later daemon finds them
// there.
func (p *Process) Link() (vmm.Link, error) {
	if len(p.handle.Link) == 0 {
		return nil, fmt.Errorf("%w: machine in %s has no network card", errdef.ErrUnsupported, p.handle.Dir)
	}
	select {
	case <-p.done: // its PID may be another process's
		return nil, p.Ended(nil)
	default:
	}
	link, err := network.Recover(p.handle.PID, p.handle.Link)
	if err != nil {
		return nil, p.Ended(err)
	}
	return link, nil
}

// SetLimits changes the limits of the process's control group.
func (p *Process) SetLimits(l vmm.Limits) error {
	if p.group == nil {
		if l == (vmm.Limits{}) {
			return nil
		}
		return fmt.Errorf("%w: limits on a machine without a control group", errdef.ErrUnsupported)
	}
	if err := p.group.Set(groupLimits(l)); err != nil {
		return p.Ended(fmt.Errorf("set limits: %w", err))
	}
	return nil
}

// Usage is what the process's control group counts.
func (p *Process) Usage() (vmm.Usage, error) {
	if p.group == nil {
		return vmm.Usage{}, fmt.Errorf("%w: usage of a machine without a control group", errdef.ErrUnsupported)
	}
	u, err := p.group.Usage()
	if err != nil {
		return vmm.Usage{}, p.Ended(fmt.Errorf("ask for usage: %w", err))
	}
	return vmm.Usage{
		MemoryBytes: u.MemoryBytes, PrivateBytes: u.PrivateBytes, SharedBytes: u.SharedBytes, PeakBytes: u.PeakBytes,
		CPU: u.CPU, Throttled: u.Throttled, PIDs: u.PIDs, ReadBytes: u.ReadBytes, WriteBytes: u.WriteBytes,
	}, nil
}

func groupLimits(l vmm.Limits) cgroup.Limits {
	return cgroup.Limits{MemoryBytes: int64(l.MemoryMiB) << 20, CPUMillis: l.CPUMillis, PIDs: l.PIDs, IOBytes: l.IOBytes}
}
