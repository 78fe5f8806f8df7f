package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/process"
)

// machine is one running QEMU.
type machine struct {
	*process.Process
	handle vmm.Handle
	gate   *gate  // of a deterministic machine
	shared string // the file that is its memory, unless handle.Memory is

	diskMu sync.Mutex // held while the files of the disk change

	controlMu sync.Mutex // held while it is dialled
	control   *monitor   // dialled on first use
}

// hooks are what comes with the end of QEMU.
func (m *machine) hooks() process.Hooks {
	return process.Hooks{
		Ended:   m.gate.close,
		Explain: m.explain,
		Gone:    func() { _ = m.hangUp() }, // nobody is at the other end
	}
}

// explain adds the last line that QEMU wrote to the way it ended.
func (m *machine) explain(err error) error {
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
		return false, m.Ended(fmt.Errorf("ask whether it is paused: %w", err))
	}
	return !state.Running, nil
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
		return m.Ended(fmt.Errorf("save device state: %w", err))
	}
	if err := vmm.WriteDevice(device, state); err != nil {
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
			return m.Ended(fmt.Errorf("fill memory: %w", err))
		}
	}
	start := command{Execute: "migrate-incoming", Arguments: map[string]any{"uri": fmt.Sprintf("fd:%d", fd)}}
	if err := control.executeAll(ctx, ignoreShared, start); err != nil {
		return m.Ended(fmt.Errorf("load device state: %w", err))
	}
	if err := m.waitMigration(ctx, control, "load device state"); err != nil || !run {
		return err
	}
	if m.gate != nil {
		// The guest may be at its gate before QEMU's main thread has answered, and
		// the answer would wait until it is let through.
		if err := control.send(ctx, command{Execute: "cont"}); err != nil {
			return m.Ended(fmt.Errorf("resume: %w", err))
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
			return m.Ended(fmt.Errorf("%s: %w", what, err))
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
		return m.Ended(fmt.Errorf("%s: %w", verb, err))
	}
	return nil
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
		return nil, m.Ended(fmt.Errorf("%w: dial QEMU: %w", errdef.ErrUnavailable, err))
	}
	m.control = control
	return control, nil
}

func removeIfExists(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
