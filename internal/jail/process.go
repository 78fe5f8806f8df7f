package jail

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
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
	tun    *os.File // that the opener may yet hand over, or nil
}

func (c *Cell) process(o *opener) *Process {
	p := &Process{Group: c.group, jail: c.jail, linked: c.linked, cmd: c.cmd, opener: o}
	_ = c.socket.Close() // the other end is closed
	if c.uid != nil {
		_ = c.uid.Close() // the program has the lock now
	}
	rest := c.link
	if c.jail.cfg.OwnFiles && len(rest) > 0 {
		p.tun, rest = rest[0], rest[1:]
	}
	closeFiles(rest)
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
	err := o.close()
	if p.tun != nil {
		err = errors.Join(err, p.tun.Close())
	}
	return err
}

// Listens waits until a program with files of its own listens on its socket of
// that name in RunDir. It returns errdef.ErrUnavailable when the program has ended
// or Started was called, and then nobody will.
func (p *Process) Listens(ctx context.Context, name string) error {
	if p.opener == nil {
		return fmt.Errorf("%w: the program has started", errdef.ErrUnavailable)
	}
	return p.opener.listens(ctx, name)
}

// OpenDir opens the directory of a program with files of its own.
func (p *Process) OpenDir() (*Dir, error) {
	start, err := linux.StartTime(p.PID())
	if err != nil {
		return nil, err
	}
	return OpenDir(p.PID(), start)
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
