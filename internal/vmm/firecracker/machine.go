package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/relink"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
	"github.com/tinevm/tine/internal/vmm/process"
)

// machine is one running Firecracker.
type machine struct {
	*process.Process
	engine   *Engine
	handle   vmm.Handle
	template bool     // it was booted, and can be frozen
	console  *console // nil if it could not be had
	place    place
	client   *api.Client
	// ready is closed when the machine is made, or could not be. The end of a
	// Firecracker that could not load waits for it, so that its answer is heard.
	ready chan struct{}

	detaching sync.Once
	settling  sync.Once // guards the two below
	started   *process.Started
	names     names

	// turn is held while the machine is paused, resumed or saved.
	turn sync.Mutex
	// reset: the guest has been, or will be when it runs, told to drop the
	// connections of its vsock.
	reset bool

	streamMu sync.Mutex
	stream   *relink.Stream // the last that was dialled, or nil
	work     sync.WaitGroup // on streams
}

// bounded is ctx for what Firecracker does in milliseconds.
func (e *Engine) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, e.answer, e.late())
}

func (e *Engine) late() error {
	return fmt.Errorf("%w: Firecracker has not answered in %v", errdef.ErrTimeout, e.answer)
}

// hooks are what comes with the end of Firecracker.
func (m *machine) hooks() process.Hooks {
	return process.Hooks{
		Explain: func(err error) error {
			if last := m.console.lastLine(); last != "" {
				err = fmt.Errorf("%w: %s", err, last)
			}
			return err
		},
		Gone: func() {
			<-m.ready
			_ = m.Detach() // nobody is at the other end
		},
	}
}

// connect waits until Firecracker answers, and sees that it is the one that the
// engine knows.
func (m *machine) connect(ctx context.Context) (err error) {
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	if m.client, err = m.dial(ctx); err != nil {
		return err
	}
	if v := m.client.Version(); v != m.engine.version {
		return fmt.Errorf("%w: Firecracker %v answers, and not %v", errdef.ErrConflict, v, m.engine.version)
	}
	return nil
}

func (m *machine) dial(ctx context.Context) (*api.Client, error) {
	if !m.handle.Jailed {
		return api.Dial(ctx, filepath.Join(m.handle.Dir, apiSocket), m.Done())
	}
	if m.started != nil {
		if err := m.started.Listens(ctx, apiSocket); err != nil {
			return nil, err
		}
	}
	dial := func(ctx context.Context) (net.Conn, error) { return m.place.Dial(ctx, apiSocket) }
	return api.New(ctx, dial, m.Done())
}

// settle says that Firecracker has opened all that it is to open by name.
func (m *machine) settle() (err error) {
	m.settling.Do(func() {
		if m.started != nil {
			err = errors.Join(m.started.Settled(), m.names.close())
		}
	})
	return err
}

// Detach lets go of Firecracker and leaves it running. What it has let go of
// already it leaves alone.
func (m *machine) Detach() (err error) {
	m.detaching.Do(func() { err = m.detach() })
	return err
}

func (m *machine) detach() error {
	err := m.settle()
	m.streamMu.Lock()
	stream := m.stream
	m.stream = nil
	m.streamMu.Unlock()
	if stream != nil {
		err = errors.Join(err, stream.Close())
	}
	m.work.Wait()
	if m.client != nil {
		err = errors.Join(err, m.client.Close())
	}
	if m.place != nil {
		err = errors.Join(err, m.place.Close())
	}
	return errors.Join(err, m.console.close())
}

// gone says why Firecracker does not answer: its files close a little before it
// ends. What it has refused it has refused, but for a load that failed, which it
// does not live on after.
func (m *machine) gone(err error) error {
	if errors.Is(err, errdef.ErrUnavailable) {
		select {
		case <-m.Done():
		case <-time.After(time.Second):
		}
	}
	if _, refused := errors.AsType[*api.Error](err); refused {
		return err
	}
	return m.Ended(err)
}

// Dial connects to the agent, and waits for as long as nobody listens there yet.
// It ends the stream before.
func (m *machine) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	stream, err := relink.Open(ctx, m.dialGuest)
	if err != nil {
		return nil, m.Ended(fmt.Errorf("dial agent: %w", err))
	}
	m.streamMu.Lock()
	defer m.streamMu.Unlock()
	m.stream = stream
	return stream, nil
}

// agentPort is where the agent listens.
const agentPort = 10789

func (m *machine) dialGuest(ctx context.Context) (io.ReadWriteCloser, error) {
	conn, err := m.place.Dial(ctx, agentSocket)
	if err != nil {
		return nil, m.ifGone(err)
	}
	if err = api.Greet(ctx, conn, agentPort); err != nil {
		_ = conn.Close()
		return nil, m.ifGone(err)
	}
	return conn, nil
}

// ifGone tells those who would try again that it is of no use.
func (m *machine) ifGone(err error) error {
	select {
	case <-m.Done():
		return fmt.Errorf("%w: %w", relink.ErrGone, err)
	default:
		return err
	}
}

// relink has the stream to the agent, if there is one, take another connection. It
// does not wait: the machine runs already.
func (m *machine) relink() {
	m.streamMu.Lock()
	defer m.streamMu.Unlock()
	if stream := m.stream; stream != nil {
		// It ends with the stream. Whoever uses that is told if it fails.
		m.work.Go(func() { _ = stream.Reconnect(context.Background()) })
	}
}

// Paused reports whether the vCPUs stand still.
func (m *machine) Paused(ctx context.Context) (bool, error) {
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	i, err := m.client.Instance(ctx)
	if err != nil {
		return false, m.gone(fmt.Errorf("ask whether it is paused: %w", err))
	}
	return i.State == api.Paused, nil
}

// Pause stops the vCPUs.
func (m *machine) Pause(ctx context.Context) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	return m.pause(ctx)
}

func (m *machine) pause(ctx context.Context) error {
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	if err := m.client.Pause(ctx); err != nil {
		return m.gone(fmt.Errorf("pause: %w", err))
	}
	return nil
}

// Resume lets the vCPUs run.
func (m *machine) Resume(ctx context.Context) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	return m.resume(ctx)
}

// resume also sees to the stream, when the guest is told to drop its connections:
// Firecracker would only say so when something is sent.
func (m *machine) resume(ctx context.Context) error {
	paused, err := m.Paused(ctx)
	if err != nil || !paused {
		return err
	}
	if !m.reset && resumeStalls(m.engine.version) {
		if _, err = m.save(ctx); err != nil {
			return fmt.Errorf("resume: %w", err)
		}
	}
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	if err = m.client.Resume(ctx); err != nil {
		return m.gone(fmt.Errorf("resume: %w", err))
	}
	if m.reset {
		m.reset = false
		m.relink() //nolint:contextcheck // for as long as the stream lives
	}
	return nil
}

// resumeStalls reports whether a machine that is paused and resumed can hear no
// more of its vsock: these versions wait for the guest to acknowledge a reset
// that they have only sent if device state was saved meanwhile (kick and
// process_rx in src/vmm/src/devices/virtio/vsock/device.rs; mended in what is to
// be 1.17).
func resumeStalls(v api.Version) bool { return v.Major == 1 && v.Minor == 16 && v.Patch <= 1 }

// Freeze pauses the machine and writes its memory and its device state.
func (m *machine) Freeze(ctx context.Context, device string) (err error) {
	if !m.template {
		return fmt.Errorf("%w: freeze a machine that was restored, or has no file for its memory", errdef.ErrInvalid)
	}
	m.turn.Lock()
	defer m.turn.Unlock()
	if err = m.pause(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			late, cancel := m.engine.bounded(context.WithoutCancel(ctx))
			defer cancel()
			err = errors.Join(err, m.resume(late))
		}
	}()
	m.reset = true
	// No bound of ours: it writes all of the memory.
	if err = m.client.CreateSnapshot(ctx, api.Snapshot{Type: api.Full, State: stateFile, Mem: memoryFile}); err != nil {
		m.dropState()
		return m.gone(fmt.Errorf("freeze: %w", err))
	}
	state, err := m.takeState()
	if err == nil {
		err = vmm.WriteDevice(device, state)
	}
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	return m.settle()
}

// SaveDevice writes the device state of a paused machine.
func (m *machine) SaveDevice(ctx context.Context, device string) error {
	m.turn.Lock()
	defer m.turn.Unlock()
	paused, err := m.Paused(ctx)
	if err != nil {
		return err
	}
	if !paused {
		return fmt.Errorf("%w: save device state of a machine that is not paused", errdef.ErrConflict)
	}
	state, err := m.save(ctx)
	if err == nil {
		err = vmm.WriteDevice(device, state)
	}
	if err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	return nil
}

// save has Firecracker write device state, and not memory: it writes the state
// first, and is then told to write memory where no file can be made
// (create_snapshot in src/vmm/src/persist.rs, from v1.10 to v1.16). What it says
// of that shows how far it got, and the state has a checksum. The machine is none
// the worse: an error in that place undoes nothing and changes nothing.
func (m *machine) save(ctx context.Context) ([]byte, error) {
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	m.reset = true
	err := m.client.CreateSnapshot(ctx, api.Snapshot{Type: api.Full, State: stateFile, Mem: nowhere})
	var refused *api.Error
	switch {
	case err == nil:
		m.dropState()
		return nil, fmt.Errorf("%w: Firecracker has found %s", errdef.ErrConflict, nowhere)
	case !errors.As(err, &refused) || !strings.Contains(refused.Message, "open on the memory backing file"):
		m.dropState()
		return nil, m.gone(err)
	}
	return m.takeState()
}

// takeState reads device state that Firecracker has just written, and removes it.
func (m *machine) takeState() ([]byte, error) {
	data, err := m.place.Read(stateFile, maxState)
	if err == nil {
		err = verifyState(data)
	}
	if err != nil {
		m.dropState()
		return nil, fmt.Errorf("read device state: %w", err)
	}
	return data, m.place.Remove(stateFile)
}

// dropState removes device state that is of no use, if there is any: Firecracker
// leaves it when it can write no memory. The next would take its place.
func (m *machine) dropState() { _ = m.place.Remove(stateFile) }

// Console returns the first 64 KiB of what the guest wrote to its serial console.
func (m *machine) Console(context.Context) (string, error) { return m.console.text() }

// Halted, Answer and Mailbox are for deterministic machines.
func (m *machine) Halted(context.Context) error { return errNotDeterministic() }

// Answer is for deterministic machines.
func (m *machine) Answer() error { return errNotDeterministic() }

// Mailbox is for deterministic machines.
func (m *machine) Mailbox() (vmm.Mailbox, error) { return nil, errNotDeterministic() }

func errNotDeterministic() error {
	return fmt.Errorf("%w: Firecracker has no deterministic machines", errdef.ErrUnsupported)
}
