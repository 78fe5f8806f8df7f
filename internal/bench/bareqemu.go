package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/tinevm/tine/internal/undo"
)

// Names in the directory of a bare QEMU.
const (
	qmpSocket   = "qmp.sock"
	agentSocket = "agent.sock"
	ramFile     = "ram"
	deviceFile  = "device"
)

// bareQEMU is QEMU by hand: with the command lines that Tine uses, and plain QMP.
type bareQEMU struct {
	dirs   *dirs
	device string // path of the device state of forks
	lines  lines
	tap    *os.File // what network cards are at; nil: nothing has one
}

func (*bareQEMU) name() string { return "QEMU" }

// boot starts a machine. It is not spoken to: nor does Tine, before it freezes one.
func (b *bareQEMU) boot(ctx context.Context, template bool) (*process, error) {
	if template {
		return b.launch(ctx, b.lines.template, "")
	}
	return b.launch(ctx, b.lines.boot, "")
}

// restore starts a fork and loads its device state.
func (b *bareQEMU) restore(ctx context.Context) (_ *process, err error) {
	p, err := b.launch(ctx, b.lines.fork, b.device)
	if err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(func() error { return p.end(ctx) })
	q, err := p.grip.(*qemuGrip).speak(ctx)
	if err != nil {
		return nil, p.explain(err)
	}
	if err = q.migrate(ctx, "migrate-incoming", fmt.Sprintf("fd:%d", b.lines.fork.device)); err != nil {
		return nil, p.explain(err)
	}
	return p, p.explain(q.do(ctx, "cont", nil, nil))
}

// launch starts QEMU with the descriptors that its command line names.
func (b *bareQEMU) launch(ctx context.Context, l line, device string) (_ *process, err error) {
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
	cmd.ExtraFiles = l.files(agent, qmp, state, b.tap)
	p, err := spawn(dir, cmd)
	if err != nil {
		return nil, err
	}
	p.grip = &qemuGrip{dir: dir}
	return p, nil
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

// qemuGrip holds one QEMU.
type qemuGrip struct {
	dir string
	qmp *qmp // nil until it was spoken to
}

func (g *qemuGrip) speak(ctx context.Context) (*qmp, error) {
	var err error
	if g.qmp == nil {
		g.qmp, err = dialQMP(ctx, filepath.Join(g.dir, qmpSocket))
	}
	return g.qmp, err
}

func (g *qemuGrip) do(ctx context.Context, command string) error {
	q, err := g.speak(ctx)
	if err != nil {
		return err
	}
	return q.do(ctx, command, nil, nil)
}

func (g *qemuGrip) dial(ctx context.Context) (io.ReadWriteCloser, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(g.dir, agentSocket))
	if err != nil {
		return nil, err
	}
	return conn, nil
}

func (g *qemuGrip) park(ctx context.Context) error   { return g.do(ctx, "stop") }
func (g *qemuGrip) resume(ctx context.Context) error { return g.do(ctx, "cont") }

// freeze pauses the machine and writes its device state. Its memory is in a file.
func (g *qemuGrip) freeze(ctx context.Context) (err error) {
	if err = g.do(ctx, "stop"); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(g.dir, deviceFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err = g.qmp.give(ctx, f); err != nil {
		return err
	}
	return g.qmp.migrate(ctx, "migrate", "fd:device")
}

func (g *qemuGrip) release() {
	if g.qmp != nil {
		_ = g.qmp.conn.Close() // QEMU has ended
	}
}
