package jail

import (
	"context"
	"errors"
	"os/exec"
	"time"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
)

// Process is a program in its jail. Its methods are safe for concurrent use, but
// for Started.
type Process struct {
	// Group is its control group, or nil.
	Group *cgroup.Group
	// Name is the group's.
	Name   string
	jail   *Jail
	linked bool
	cmd    *exec.Cmd
	opener *opener
}

func (c *Cell) process(o *opener) *Process {
	p := &Process{Group: c.group, jail: c.jail, linked: c.linked, cmd: c.cmd, opener: o}
	_ = c.socket.Close() // the other end is closed
	if c.uid != nil {
		_ = c.uid.Close() // the program has the lock now
	}
	closeFiles(c.link)
	return p
}

// PID is the program's, as this process sees it.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Started says that the program has opened all that it is to open by name.
func (p *Process) Started() error {
	if p.opener == nil {
		return nil
	}
	o := p.opener
	p.opener = nil
	return o.close()
}

// Wait waits for the program's end. Only one goroutine calls it.
func (p *Process) Wait() error {
	err := p.cmd.Wait()
	if p.linked {
		p.jail.dropLink()
	}
	return err
}

// Kill ends the program, and all that there is in its namespaces.
func (p *Process) Kill() error { return p.cmd.Process.Kill() }

// releaseTime bounds the wait for a control group to be empty.
const releaseTime = 10 * time.Second

// Release gives back what the host kept for a program that has ended, and says
// how often the kernel killed in its group for want of memory.
func Release(ctx context.Context, group *cgroup.Group) (oomKills int64, err error) {
	if group == nil {
		return 0, nil
	}
	usage, err := group.Usage()
	if errors.Is(err, errdef.ErrNotFound) {
		return 0, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTime)
	defer cancel()
	return usage.OOMKills, errors.Join(err, group.Remove(ctx))
}
