package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
)

// Names in a bare machine's directory.
const (
	qmpSocket   = "qmp.sock"
	agentSocket = "agent.sock"
	logFile     = "log"
	ramFile     = "ram"
	deviceFile  = "device"
)

// bare is the floor: QEMU started with the command lines that Tine uses, and
// spoken to by hand. There are no records, pins, locks or limits.
type bare struct {
	*subject
	dirs   *dirs
	lines  lines
	tap    *os.File // what network cards are at; nil: nothing has one
	parked *process // what raise(poolFork) takes
}

// asks is how often a parked machine was asked everything.
const asks = 3

// prepare parks one machine as a pool does: restored, warmed and paused.
func (b *bare) prepare(ctx context.Context, how start) (err error) {
	if how != poolFork || b.parked != nil {
		return nil
	}
	p, err := b.restore(ctx)
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
	if err = p.qmp.do(ctx, "stop", nil, nil); err != nil {
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
		p, err = b.boot(ctx, b.lines.boot)
	case coldFork:
		p, err = b.restore(ctx)
	case poolFork:
		p, err = b.wake(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("bare QEMU: %w", err)
	}
	return p, nil
}

// wake runs the parked machine.
func (b *bare) wake(ctx context.Context) (*process, error) {
	p := b.parked
	if p == nil {
		return nil, fmt.Errorf("%w: nothing is parked", errdef.ErrUnavailable)
	}
	b.parked = nil
	err := p.qmp.do(ctx, "cont", nil, nil)
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
	p, err := b.boot(ctx, b.lines.template)
	if err != nil {
		return f, fmt.Errorf("bare QEMU: %w", err)
	}
	defer func() { err = errors.Join(err, p.end(ctx)) }()
	if err = b.warm(ctx, p.client); err != nil {
		return f, err
	}
	begin := time.Now() // Tine, too, has not spoken to this QEMU yet
	if p.qmp, err = dialQMP(ctx, filepath.Join(p.dir, qmpSocket)); err != nil {
		return f, err
	}
	if err = p.save(ctx); err != nil {
		return f, fmt.Errorf("bare QEMU: %w", err)
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

// boot starts a machine and waits for its agent.
func (b *bare) boot(ctx context.Context, l line) (_ *process, err error) {
	p, err := b.launch(ctx, l, "")
	if err != nil {
		return nil, err
	}
	return p, p.meet(ctx)
}

// restore starts a fork, loads its device state and waits for its agent.
func (b *bare) restore(ctx context.Context) (_ *process, err error) {
	p, err := b.launch(ctx, b.lines.fork, b.snap.DevicePath())
	if err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return p.end(ctx) })
	if p.qmp, err = dialQMP(ctx, filepath.Join(p.dir, qmpSocket)); err != nil {
		return nil, p.explain(err)
	}
	if err = p.qmp.migrate(ctx, "migrate-incoming", fmt.Sprintf("fd:%d", b.lines.fork.device)); err != nil {
		return nil, p.explain(err)
	}
	if err = p.qmp.do(ctx, "cont", nil, nil); err != nil {
		return nil, p.explain(err)
	}
	u.Release() // meet has its own
	return p, p.meet(ctx)
}

// process is one bare QEMU.
type process struct {
	dir    string
	cmd    *exec.Cmd
	qmp    *qmp
	client *guest.Client
	once   sync.Once
}

// launch starts QEMU with the descriptors that its command line names.
func (b *bare) launch(ctx context.Context, l line, device string) (_ *process, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	dir, err := b.dirs.make()
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return os.RemoveAll(dir) })
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			_ = f.Close() // the child has its own copy
		}
	}()
	open := func(f *os.File, openErr error) *os.File {
		if openErr == nil {
			opened = append(opened, f)
		}
		err = errors.Join(err, openErr)
		return f
	}
	qmp := open(listen(filepath.Join(dir, qmpSocket)))
	agent := open(listen(filepath.Join(dir, agentSocket)))
	out := open(os.OpenFile(filepath.Join(dir, logFile), os.O_CREATE|os.O_WRONLY, 0o600))
	var state *os.File
	if device != "" {
		state = open(os.Open(device))
	}
	if err != nil {
		return nil, err
	}
	memory := ""
	if l.memory != "" && device == "" {
		memory = filepath.Join(dir, ramFile)
	}
	argv := l.named("tine-bench-floor", memory)
	// Its end is process.end's business, not that of ctx.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = l.files(agent, qmp, state, b.tap)
	cmd.Env = []string{"PATH=" + os.DevNull, "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err = cmd.Start(); err != nil {
		return nil, err
	}
	return &process{dir: dir, cmd: cmd}, nil
}

// listen makes a listening socket to hand down.
func listen(path string) (*os.File, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	f, err := ln.File()
	return f, errors.Join(err, ln.Close())
}

// meet waits for the agent and gives the guest an identity. When it fails the
// machine is gone.
func (p *process) meet(ctx context.Context) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return p.end(ctx) })
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(p.dir, agentSocket))
	if err != nil {
		return p.explain(err)
	}
	p.client, err = guest.DialIdentity(ctx, conn, guest.NewIdentity("floor", "floor"))
	return p.explain(err)
}

// save pauses the machine and writes its device state.
func (p *process) save(ctx context.Context) (err error) {
	if err = p.qmp.do(ctx, "stop", nil, nil); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(p.dir, deviceFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err = p.qmp.give(ctx, f); err != nil {
		return err
	}
	return p.qmp.migrate(ctx, "migrate", "fd:device")
}

// explain adds the last line that QEMU wrote.
func (p *process) explain(err error) error {
	if err == nil {
		return nil
	}
	f, openErr := os.Open(filepath.Join(p.dir, logFile))
	if openErr != nil {
		return err
	}
	defer func() { _ = f.Close() }()
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

// end kills QEMU and waits for its end, which nothing but a disk that hangs can
// put off.
func (p *process) end(context.Context) (err error) {
	p.once.Do(func() {
		if p.client != nil {
			_ = p.client.Close() // never fails
		}
		if p.qmp != nil {
			_ = p.qmp.conn.Close() // QEMU is about to vanish anyway
		}
		_ = p.cmd.Process.Kill() // it fails only when QEMU has ended
		_ = p.cmd.Wait()         // and how does not matter
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
