package process

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// Launch is a process to be started.
type Launch struct {
	// Handle has what is known of the process before there is one: Dir, Memory,
	// Disk, Link.
	Handle vmm.Handle
	// Binary and Args are its command line. In a jail the binary is the jail's.
	Binary string
	Args   []string
	// Cell is where it is to run, nil without a jail. Start uses it up, whatever
	// it returns.
	Cell *jail.Cell
	// Output takes its standard streams. It and Files, which the process has from
	// Keeper.FirstFile on, are the caller's to close.
	Output *os.File
	Files  []*os.File
	// Opens are the files that a process in the jail opens by name, until Settled
	// or its end. They are the caller's to close, and open until then.
	Opens map[string]*os.File
	// Copies are given to a process in the jail as files of its own; see jail.Job.
	Copies map[string]*os.File
	// Before are called in the jail before the file of that name is handed over, once;
	// see jail.Job.
	Before map[string]func(context.Context) error
	// WorkDir is where a process without a jail begins; empty: where this one is.
	WorkDir string
	// FileBytes is how long a process in the jail may make any file.
	FileBytes     int64
	Limits        vmm.Limits
	DieWithParent bool
}

// Environment is all that a monitor is told of its surroundings.
func Environment() []string { return []string{"PATH=" + os.DevNull, "LC_ALL=C"} }

// Started is a process that this one has started. It is not safe for concurrent
// use.
type Started struct {
	keeper *Keeper
	handle vmm.Handle
	child  child
}

// child is a life that began here.
type child interface {
	life
	pid() int
	group() *cgroup.Group // nil if it has none
	// settled says that the process has opened all that it opens by name.
	settled() error
	jailed() bool
}

// Start starts a process. It has not yet opened the files that it opens by name.
// The caller calls Watch, or Abort, and Settled when the files are open.
func (k *Keeper) Start(ctx context.Context, l Launch) (_ *Started, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	c, err := k.start(ctx, l)
	if err != nil {
		return nil, err
	}
	s := &Started{keeper: k, handle: l.Handle, child: c}
	u.Add(func() error { return s.Abort(ctx) })
	s.handle.Engine, s.handle.PID, s.handle.Jailed = k.Engine, c.pid(), c.jailed()
	if s.handle.StartTime, err = linux.StartTime(c.pid()); err != nil {
		return nil, err
	}
	if s.handle.BootID, err = linux.BootID(); err != nil {
		return nil, err
	}
	if g := c.group(); g != nil {
		s.handle.Group = g.Name()
	}
	u.Release()
	return s, nil
}

// Abort ends a process that nobody watches, and what its host keeps for it.
func (s *Started) Abort(ctx context.Context) error {
	_ = s.child.kill()    // it may have ended
	_ = s.child.settled() // nobody is interested any more
	_ = s.child.wait()    // and says that it was killed
	_, err := jail.Release(context.WithoutCancel(ctx), s.child.group())
	return err
}

// Handle is what the process is known by.
func (s *Started) Handle() vmm.Handle { return s.handle }

// Jailed says that somebody opens files by name for the process until Settled.
func (s *Started) Jailed() bool { return s.child.jailed() }

// Settled says that the process has opened all that it opens by name. From then
// on it can open nothing more. It may be called after Watch, and is for one
// goroutine.
func (s *Started) Settled() error { return s.child.settled() }

// Listens waits until a process in a jail of programs with files of their own
// listens on the socket of that name.
func (s *Started) Listens(ctx context.Context, name string) error {
	p, ok := s.child.(prisoner)
	if !ok {
		return fmt.Errorf("%w: without a jail nobody sees to sockets", errdef.ErrUnsupported)
	}
	return p.p.Listens(ctx, name)
}

// Watch hands the process over to a goroutine that waits for its end.
func (s *Started) Watch(hooks Hooks) *Process {
	return s.keeper.watch(s.handle, s.child, s.child.group(), hooks)
}

func (k *Keeper) start(ctx context.Context, l Launch) (child, error) {
	if k.Jail != nil {
		p, err := l.Cell.Start(ctx, jail.Job{
			Args: l.Args, Env: Environment(), Output: l.Output, Files: l.Files, Opens: l.Opens, Before: l.Before, Copies: l.Copies,
			Limits: groupLimits(l.Limits), FileBytes: l.FileBytes, DieWithParent: l.DieWithParent,
		})
		if err != nil {
			return nil, err
		}
		return prisoner{p}, nil
	}
	if l.Limits != (vmm.Limits{}) {
		return nil, fmt.Errorf("%w: limits on a machine without a jail", errdef.ErrUnsupported)
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	// Not CommandContext: ctx bounds this call, not the machine's life.
	cmd := exec.Command(l.Binary, l.Args...) //nolint:noctx // the machine outlives the call
	cmd.Stdout, cmd.Stderr = l.Output, l.Output
	cmd.ExtraFiles = l.Files
	cmd.Env = Environment()
	cmd.Dir = l.WorkDir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if l.DieWithParent {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return free{cmd}, nil
}

// prisoner is a process in the jail.
type prisoner struct{ p *jail.Process }

func (c prisoner) wait() error          { return c.p.Wait() }
func (c prisoner) kill() error          { return c.p.Kill() }
func (c prisoner) pid() int             { return c.p.PID() }
func (c prisoner) group() *cgroup.Group { return c.p.Group }
func (c prisoner) settled() error       { return c.p.Started() }
func (c prisoner) jailed() bool         { return true }

// free is a process without a jail.
type free struct{ cmd *exec.Cmd }

func (c free) wait() error          { return c.cmd.Wait() }
func (c free) kill() error          { return c.cmd.Process.Kill() }
func (c free) pid() int             { return c.cmd.Process.Pid }
func (c free) group() *cgroup.Group { return nil }
func (c free) settled() error       { return nil }
func (c free) jailed() bool         { return false }

// LeaveCell gives up a cell in which nothing was started; nil is fine.
func LeaveCell(c *jail.Cell) error {
	if c == nil {
		return nil
	}
	return c.Close()
}

// Output runs a program to its end and returns what it has written to its standard
// output, of which more than limit bytes are an error.
func Output(cmd *exec.Cmd, limit int) ([]byte, error) {
	out := &bounded{limit: limit}
	cmd.Stdout = out
	err := cmd.Run()
	if out.over {
		err = fmt.Errorf("it says more than %d bytes", limit)
	}
	return out.text, err
}

// bounded keeps up to limit bytes, and fails on more.
type bounded struct {
	text  []byte
	limit int
	over  bool
}

// Write keeps p.
func (b *bounded) Write(p []byte) (int, error) {
	if len(b.text)+len(p) > b.limit {
		b.over = true
		return 0, io.ErrShortWrite
	}
	b.text = append(b.text, p...)
	return len(p), nil
}
