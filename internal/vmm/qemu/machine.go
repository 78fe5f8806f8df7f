package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// process is what a machine needs of its QEMU, whoever started it.
type process interface {
	// wait returns when the process has ended; only one goroutine calls it.
	wait() error
	kill() error
}

// started is a process that this process has started.
type started interface {
	process
	pid() int
	group() *cgroup.Group // nil if it has none
	// settled says that the process has opened all that it opens by name.
	settled() error
	// jailed: somebody opens its files for it until then.
	jailed() bool
}

// child is a QEMU without a jail.
type child struct{ cmd *exec.Cmd }

func (c *child) wait() error          { return c.cmd.Wait() }
func (c *child) kill() error          { return c.cmd.Process.Kill() }
func (c *child) pid() int             { return c.cmd.Process.Pid }
func (c *child) group() *cgroup.Group { return nil }
func (c *child) settled() error       { return nil }
func (c *child) jailed() bool         { return false }

// adopted is a QEMU that an earlier process started.
type adopted struct {
	p       *linux.Process
	release func() // called when it has ended

	mu   sync.Mutex // no signal is sent through a descriptor that is closed
	over bool
}

// errUnwatched stands in for the exit status, which only a parent is told.
var errUnwatched = errors.New("it was started by an earlier daemon, so its exit status is not known")

func (a *adopted) wait() error {
	err := a.p.Wait(context.Background())
	a.release()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over = true
	return errors.Join(errUnwatched, err, a.p.Close())
}

func (a *adopted) kill() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return os.ErrProcessDone
	}
	return a.p.Signal(unix.SIGKILL)
}

// machine is one running QEMU.
type machine struct {
	handle  vmm.Handle
	process process
	log     *slog.Logger
	gate    *gate         // of a deterministic machine
	group   *cgroup.Group // nil if it has none
	shared  string        // the file that is its memory, unless handle.Memory is
	done    chan struct{}
	err     error // set before done is closed

	mu     sync.Mutex
	killed bool

	diskMu sync.Mutex // held while the files of the disk change

	controlMu sync.Mutex // held while it is dialled
	control   *monitor   // dialled on first use
}

func newVM(h vmm.Handle, p process, g *gate, group *cgroup.Group, log *slog.Logger) *machine {
	m := &machine{handle: h, process: p, gate: g, group: group, log: log, done: make(chan struct{})}
	go m.watch()
	return m
}

// watch waits for QEMU's end; it lives exactly as long as QEMU does.
func (m *machine) watch() {
	err := m.process.wait()
	m.gate.close()
	oom := m.release()
	m.mu.Lock()
	if err != nil && !m.killed {
		m.err = m.explain(err)
		if oom {
			m.err = fmt.Errorf("%w: %w", errdef.ErrExhausted, vmm.ErrOutOfMemory)
		}
	}
	m.mu.Unlock()
	close(m.done)
	_ = m.hangUp() // nobody is at the other end
}

// explain adds the last line that QEMU wrote to the way it ended.
func (m *machine) explain(err error) error {
	err = fmt.Errorf("%w: QEMU ended: %w", errdef.ErrUnavailable, err)
	f, openErr := os.Open(filepath.Join(m.handle.Dir, logFile))
	if openErr != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	text, _ := io.ReadAll(io.LimitReader(f, 64<<10))
	lines := strings.Split(string(bytes.TrimSpace(text)), "\n")
	if last := lines[len(lines)-1]; last != "" {
		err = fmt.Errorf("%w: %s", err, last)
	}
	return err
}

// PID is QEMU's process.
func (m *machine) PID() int { return m.handle.PID }

// Handle is what Adopt needs.
func (m *machine) Handle() vmm.Handle { return m.handle }

// Done is closed when QEMU has ended.
func (m *machine) Done() <-chan struct{} { return m.done }

// Err says why QEMU ended, once Done is closed.
func (m *machine) Err() error {
	select {
	case <-m.done:
		return m.err
	default:
		return nil
	}
}

// Dial connects to the agent's port. QEMU serves one connection at a time and
// lets the next one wait.
func (m *machine) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	if m.gate != nil {
		return nil, fmt.Errorf("%w: a deterministic machine has no stream to its agent", errdef.ErrUnsupported)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(m.handle.Dir, agentSocket))
	if err != nil {
		return nil, fmt.Errorf("%w: dial agent: %w", errdef.ErrUnavailable, err)
	}
	return conn, nil
}

// Pause stops the vCPUs.
func (m *machine) Pause(ctx context.Context) error {
	return m.run(ctx, "pause", command{Execute: "stop"})
}

// Resume lets the vCPUs run.
func (m *machine) Resume(ctx context.Context) error {
	return m.run(ctx, "resume", command{Execute: "cont"})
}

// Freeze pauses the machine and writes its device state.
func (m *machine) Freeze(ctx context.Context, device string) (err error) {
	if m.handle.Memory != "" {
		// QEMU would write all of the private memory among the device state.
		return fmt.Errorf("%w: freeze a machine that was restored", errdef.ErrInvalid)
	}
	if m.gate != nil {
		err = m.haltExactly(ctx)
	} else {
		err = m.Pause(ctx)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		err = errors.Join(err, m.Resume(late), removeIfExists(device))
	}()
	f, err := os.OpenFile(device, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	control, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	if err = control.sendFile(ctx, "device", f); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	start := command{Execute: "migrate", Arguments: map[string]any{"uri": "fd:device"}}
	if err = control.executeAll(ctx, ignoreShared, start); err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	if err = m.waitMigration(ctx, control, "freeze"); err == nil && m.gate != nil {
		err = forgetHostClocks(f)
	}
	return err
}

// Paused reports whether the vCPUs stand still.
func (m *machine) Paused(ctx context.Context) (bool, error) {
	control, err := m.monitor(ctx)
	if err != nil {
		return false, err
	}
	var state struct {
		Running bool `json:"running"`
	}
	if err := control.query(ctx, "query-status", &state); err != nil {
		return false, m.ended(fmt.Errorf("ask whether it is paused: %w", err))
	}
	return !state.Running, nil
}

// Memory finds the mapping of the image among QEMU's.
func (m *machine) Memory() (guestmem.Space, error) {
	select {
	case <-m.done: // its PID may be another process's
		return guestmem.Space{}, m.ended(nil)
	default:
	}
	if m.handle.Memory == "" {
		return guestmem.Space{}, fmt.Errorf("%w: memory of machine in %s is not a private mapping of an image", errdef.ErrUnsupported, m.handle.Dir)
	}
	space, err := guestmem.FindSpace(m.handle.PID, m.handle.Memory)
	if err != nil {
		return guestmem.Space{}, m.ended(fmt.Errorf("find memory of machine in %s: %w", m.handle.Dir, err))
	}
	return space, nil
}

// SaveDevice writes the device state of a paused machine.
func (m *machine) SaveDevice(ctx context.Context, device string) error {
	paused, err := m.Paused(ctx)
	if err != nil {
		return err
	}
	if !paused {
		return fmt.Errorf("%w: save device state of a machine that is not paused", errdef.ErrConflict)
	}
	control, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	state, err := control.saveState(ctx)
	if err != nil {
		return m.ended(fmt.Errorf("save device state: %w", err))
	}
	if err := writeNew(device, state); err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	return nil
}

// ignoreShared leaves memory that lives in a shared file out of device state.
var ignoreShared = command{Execute: "migrate-set-capabilities", Arguments: map[string]any{
	"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}},
}}

// load makes a QEMU that waits for its device state read it from descriptor
// fd, once fill has completed the memory, and lets it run.
func (m *machine) load(ctx context.Context, fd int, fill func(context.Context, guestmem.Space) error, run bool) error {
	control, err := m.monitor(ctx) // it greets when memory is mapped, and answers when the machine is made
	if err != nil {
		return err
	}
	if fill != nil {
		space, err := m.Memory()
		if err != nil {
			return err
		}
		if err := fill(ctx, space); err != nil {
			return m.ended(fmt.Errorf("fill memory: %w", err))
		}
	}
	start := command{Execute: "migrate-incoming", Arguments: map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}}
	if err := control.executeAll(ctx, ignoreShared, start); err != nil {
		return m.ended(fmt.Errorf("load device state: %w", err))
	}
	if err := m.waitMigration(ctx, control, "load device state"); err != nil || !run {
		return err
	}
	if m.gate != nil {
		// The guest may be at its gate before QEMU's main thread has answered, and
		// the answer would wait until it is let through.
		if err := control.send(ctx, command{Execute: "cont"}); err != nil {
			return m.ended(fmt.Errorf("resume: %w", err))
		}
		return nil
	}
	return m.Resume(ctx)
}

// waitMigration asks until QEMU's migration, either way, has ended. QEMU has
// events for it, but the whole takes about 6 ms, and asking takes 0.1 ms.
func (m *machine) waitMigration(ctx context.Context, control *monitor, what string) error {
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		var state struct {
			Status string `json:"status"`
			Desc   string `json:"error-desc"`
		}
		if err := control.query(ctx, "query-migrate", &state); err != nil {
			return m.ended(fmt.Errorf("%s: %w", what, err))
		}
		switch state.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("%s: QEMU: migration %s %s", what, state.Status, state.Desc)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		}
	}
}

// Console returns the last 64 KiB that the guest wrote to its serial console.
func (m *machine) Console(ctx context.Context) (string, error) {
	control, err := m.monitor(ctx)
	if err != nil {
		return "", err
	}
	read := command{Execute: "ringbuf-read", Arguments: map[string]any{"device": "console", "size": 65536}}
	raw, err := control.execute(ctx, read)
	if err != nil {
		return "", fmt.Errorf("read console: %w", err)
	}
	var text string
	err = decode(raw, &text)
	return text, err
}

// Kill ends QEMU and waits for its end.
func (m *machine) Kill(ctx context.Context) error {
	m.mu.Lock()
	m.killed = true
	m.mu.Unlock()
	select {
	case <-m.done:
		return nil
	default:
	}
	err := m.process.kill()
	if err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, errdef.ErrNotFound) {
		return fmt.Errorf("kill machine in %s: %w", m.handle.Dir, err)
	}
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("kill machine in %s: %w", m.handle.Dir, context.Cause(ctx))
	}
}

// Detach closes the control connection and leaves QEMU running.
func (m *machine) Detach() error { return m.hangUp() }

// hangUp closes the control connection, if there is one.
func (m *machine) hangUp() error {
	m.controlMu.Lock()
	defer m.controlMu.Unlock()
	if m.control == nil {
		return nil
	}
	err := m.control.close()
	m.control = nil
	return err
}

func (m *machine) run(ctx context.Context, verb string, c command) error {
	control, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	if _, err := control.execute(ctx, c); err != nil {
		return m.ended(fmt.Errorf("%s: %w", verb, err))
	}
	return nil
}

// ended prefers the reason why QEMU is gone to the broken connection it left.
func (m *machine) ended(err error) error {
	select {
	case <-m.done:
		if m.err != nil {
			return m.err
		}
		return fmt.Errorf("%w: the machine is gone", errdef.ErrUnavailable)
	default:
		return err
	}
}

// monitor returns the control connection, made on first use.
func (m *machine) monitor(ctx context.Context) (*monitor, error) {
	m.controlMu.Lock()
	defer m.controlMu.Unlock()
	if m.control != nil {
		if !m.control.broken() {
			return m.control, nil
		}
		// QEMU greets the next connection only when this one has ended.
		_ = m.control.close() // it is of no use any more
		m.control = nil
	}
	control, err := dialMonitor(ctx, filepath.Join(m.handle.Dir, controlSocket))
	if err != nil {
		return nil, m.ended(fmt.Errorf("%w: dial QEMU: %w", errdef.ErrUnavailable, err))
	}
	m.control = control
	return control, nil
}

// writeNew makes the file at path, which must not exist; on error there is none.
func writeNew(path string, data []byte) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	u.Add(func() error { return os.Remove(path) })
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

func removeIfExists(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
