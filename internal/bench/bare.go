package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
)

// monitor brings up machines of one snapshot by hand: a program started as Tine
// starts it but without a jail, and spoken to without Tine's engine. It is safe
// for concurrent use.
type monitor interface {
	// name is the program's.
	name() string
	// boot starts the image. A template is a machine that can be frozen.
	boot(ctx context.Context, template bool) (*process, error)
	// restore starts a fork, which runs.
	restore(ctx context.Context) (*process, error)
}

// grip is what a hand has of one machine. One goroutine uses it at a time.
type grip interface {
	// dial connects to the agent, and waits for it if the monitor can tell that
	// it is not there yet.
	dial(ctx context.Context) (io.ReadWriteCloser, error)
	// park pauses the machine so that resume is as quick as it can be.
	park(ctx context.Context) error
	resume(ctx context.Context) error
	// freeze pauses a template and has in files of its directory what is not
	// there yet.
	freeze(ctx context.Context) error
	// release lets go of a machine that has ended or is about to.
	release()
}

// errStrange: a machine was started in a way that no hand knows to repeat.
var errStrange = errors.New("cannot repeat how Tine has started it")

// learn starts machines through Tine to see how that is done by hand. It says
// why it cannot be done, if that is so.
func learn(ctx context.Context, t *tine) (m monitor, reason string, err error) {
	switch engine := t.d.Sandboxes.Engine.Name(); {
	case strings.HasPrefix(engine, "qemu-"):
		m, err = learnQEMU(ctx, t)
	case engine == "firecracker":
		m, err = learnFirecracker(ctx, t)
	default:
		return nil, "there is no harness for " + engine, nil
	}
	if errors.Is(err, errStrange) {
		return nil, err.Error(), nil
	}
	return m, "", err
}

// bare is the floor: a monitor driven by hand. There are no records, pins, locks
// or limits.
type bare struct {
	*subject
	monitor
	parked *process // what raise(poolFork) takes
}

// asks is how often a parked machine was asked everything.
const asks = 3

// prepare parks one machine as a pool does: restored, warmed and paused.
func (b *bare) prepare(ctx context.Context, how start) (err error) {
	if how != poolFork || b.parked != nil {
		return nil
	}
	p, err := b.raised(ctx, b.restore)
	if err != nil {
		return err
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return p.end(ctx) })
	for range asks {
		for _, point := range points(b.subject) {
			if err = point.ask(ctx, p.client); err != nil {
				return err
			}
		}
		if err = p.client.SetClock(ctx); err != nil {
			return err
		}
	}
	if err = p.park(ctx); err != nil {
		return err
	}
	b.parked = p
	return nil
}

func (b *bare) raise(ctx context.Context, how start) (machine, error) {
	var p *process
	var err error
	switch how {
	case coldBoot:
		p, err = b.raised(ctx, b.bootPlain)
	case coldFork:
		p, err = b.raised(ctx, b.restore)
	case poolFork:
		p, err = b.wake(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("bare %s: %w", b.name(), err)
	}
	return p, nil
}

func (b *bare) bootPlain(ctx context.Context) (*process, error)    { return b.boot(ctx, false) }
func (b *bare) bootTemplate(ctx context.Context) (*process, error) { return b.boot(ctx, true) }

// raised brings up a machine and waits for its agent.
func (b *bare) raised(ctx context.Context, how func(context.Context) (*process, error)) (*process, error) {
	p, err := how(ctx)
	if err != nil {
		return nil, err
	}
	return p, p.meet(ctx)
}

// wake runs the parked machine.
func (b *bare) wake(ctx context.Context) (*process, error) {
	p := b.parked
	if p == nil {
		return nil, fmt.Errorf("%w: nothing is parked", errdef.ErrUnavailable)
	}
	b.parked = nil
	err := p.resume(ctx)
	if err == nil {
		err = p.client.SetClock(ctx) // it stood still while it was parked
	}
	if err != nil {
		return nil, errors.Join(err, p.end(ctx))
	}
	return p, nil
}

// fork starts as many at a time as Tine does: more would be slower, so it would
// not be the floor.
func (b *bare) fork(ctx context.Context, n int, each func(machine, error)) error {
	starts := make(chan struct{}, b.d.Sandboxes.Limits.Starts)
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			starts <- struct{}{}
			m, err := b.raise(ctx, coldFork)
			<-starts
			each(m, err)
		})
	}
	wg.Wait()
	return nil
}

// freeze makes a template by hand, up to where its state is in a file.
func (b *bare) freeze(ctx context.Context) (f frozen, err error) {
	p, err := b.raised(ctx, b.bootTemplate)
	if err != nil {
		return f, fmt.Errorf("bare %s: %w", b.name(), err)
	}
	defer func() { err = errors.Join(err, p.end(ctx)) }()
	if err = b.warm(ctx, p.client); err != nil {
		return f, err
	}
	begin := time.Now()
	if err = p.freeze(ctx); err != nil {
		return f, fmt.Errorf("bare %s: %w", b.name(), err)
	}
	return frozen{freeze: time.Since(begin)}, nil
}

// close ends the parked machine.
func (b *bare) close(ctx context.Context) error {
	if b.parked == nil {
		return nil
	}
	return b.parked.end(ctx)
}

// process is one machine that is held by hand.
type process struct {
	grip
	dir    string
	cmd    *exec.Cmd
	gone   chan struct{} // closed when the monitor has ended
	client *guest.Client
	once   sync.Once
}

// logFile is what a monitor says, in a machine's directory.
const logFile = "log"

// spawn starts a monitor with a directory of its own, which it has from then on.
// The grip is for the caller to add. Its output is dropped, which may be the
// guest's; its errors are kept.
func spawn(dir string, cmd *exec.Cmd) (_ *process, err error) {
	out, err := os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }() // the child has its own copy
	cmd.Stderr = out
	cmd.Env = []string{"PATH=" + os.DevNull, "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err = cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{dir: dir, cmd: cmd, gone: make(chan struct{})}
	go func() {
		defer close(p.gone)
		_ = cmd.Wait() // how it ends does not matter
	}()
	return p, nil
}

// meet waits for the agent and gives the guest an identity. When it fails the
// machine is gone.
func (p *process) meet(ctx context.Context) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return p.end(ctx) })
	stream, err := p.dial(ctx)
	if err != nil {
		return p.explain(err)
	}
	p.client, err = guest.DialIdentity(ctx, stream, guest.NewIdentity("floor", "floor"))
	return p.explain(err)
}

// explain adds the last line that the monitor wrote.
func (p *process) explain(err error) error {
	if err == nil {
		return nil
	}
	f, openErr := os.Open(filepath.Join(p.dir, logFile))
	if openErr != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	text, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	if text = bytes.TrimSpace(text); len(text) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, text[bytes.LastIndexByte(text, '\n')+1:])
}

func (p *process) with(ctx context.Context, ask func(context.Context, *guest.Client) error) error {
	return ask(ctx, p.client)
}

func (p *process) memory() (private, shared int64, err error) { return memoryOf(p.cmd.Process.Pid) }

// end kills the monitor and waits for its end, which nothing but a disk that hangs
// can put off.
func (p *process) end(context.Context) (err error) {
	p.once.Do(func() {
		_ = p.cmd.Process.Kill() // it fails only when it has ended
		<-p.gone
		if p.client != nil {
			_ = p.client.Close() // never fails
		}
		if p.grip != nil {
			p.release()
		}
		err = os.RemoveAll(p.dir)
	})
	return err
}

func memoryOf(pid int) (private, shared int64, err error) {
	use, err := linux.MemoryUse(pid)
	return use.Private, use.Shared, err
}

func removeIfExists(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
