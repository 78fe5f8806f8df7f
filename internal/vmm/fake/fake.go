// Package fake is an engine without machines: a guest is the real agent in
// this process, and its state is the directory it works in. Tests of what lies
// above the engines run on it, without privileges and in milliseconds.
//
// A machine has memory all the same, so that branches can be tested on it:
// MemorySize bytes, whatever its shape says. Freeze and SaveDevice write an
// archive of the directory into the first half; the second half is the test's
// own, by Dirty. A fork maps its image privately in this process, and begins
// with the files that are in it.
//
// A machine with a scratch disk has the files of one, and FreezeDisk adds to
// them, but nothing is in them. One with a network card has none: it needs no
// tap, and does nothing with one.
//
// A fork inherits the files of the machine it was frozen from, and nothing
// else: processes and interpreters do not survive a freeze.
package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// Engine makes fake machines. It is safe for concurrent use.
type Engine struct {
	mu       sync.Mutex
	running  map[string]*machine // by directory
	detached map[string]*machine // those that Adopt may take
	failures map[string]error    // by the operation that is to fail next
	host     *vmm.Host           // what Caps says
}

var _ vmm.Engine = (*Engine)(nil)

// New returns an engine.
func New() *Engine {
	return &Engine{running: map[string]*machine{}, detached: map[string]*machine{}, failures: map[string]error{}}
}

// Name is "fake".
func (e *Engine) Name() string { return "fake" }

// Version is always "1".
func (e *Engine) Version() string { return "1" }

// Caps says that it takes what it is given.
func (e *Engine) Caps() vmm.Caps {
	e.mu.Lock()
	defer e.mu.Unlock()
	limits := vmm.LimitSupport{Memory: true, CPU: true, PIDs: true, IO: true}
	return vmm.Caps{MaxVCPUs: 16, Jail: true, Net: true, Limits: limits, Host: e.host}
}

// SetHost makes the engine one whose device state depends on its host, which is
// h from now on; nil, as at first: one whose does not.
func (e *Engine) SetHost(h *vmm.Host) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.host = h
}

// deviceState is what Freeze and SaveDevice write and Restore expects.
const deviceState = "fake device state 1\n"

// Fail makes the next op of any machine fail with err. Operations are named
// like the methods: Start, Restore, Freeze, SaveDevice, PrepareDisk, FreezeDisk,
// Pause, Resume, Link.
func (e *Engine) Fail(op string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failures[op] = err
}

// fails returns the error that op is to fail with, once.
func (e *Engine) fails(op string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	err := e.failures[op]
	delete(e.failures, op)
	return err
}

// Start runs an agent in an empty directory.
func (e *Engine) Start(ctx context.Context, spec vmm.StartSpec) (vmm.VM, error) {
	m, err := e.start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	return m, nil
}

func (e *Engine) start(ctx context.Context, spec vmm.StartSpec) (*machine, error) {
	if err := e.fails("Start"); err != nil {
		return nil, err
	}
	if spec.Machine.Deterministic {
		return nil, errNotDeterministic()
	}
	var files []string
	if spec.Disk != "" {
		files = []string{spec.Disk}
	}
	disk, err := newDisk(spec.Common, files...)
	if err != nil {
		return nil, err
	}
	if spec.Memory != "" {
		if err = createImage(spec.Memory); err != nil {
			return nil, err
		}
	}
	m, err := e.run(ctx, spec.Common, nil, disk)
	if err != nil {
		return nil, err
	}
	m.image = spec.Memory
	return m, nil
}

// Restore runs an agent in a copy of the frozen machine's directory.
func (e *Engine) Restore(ctx context.Context, spec vmm.RestoreSpec) (vmm.VM, error) {
	m, err := e.restore(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("restore machine %s: %w", spec.ID, err)
	}
	return m, nil
}

func (e *Engine) restore(ctx context.Context, spec vmm.RestoreSpec) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if err = e.fails("Restore"); err != nil {
		return nil, err
	}
	if spec.Machine.Deterministic {
		return nil, errNotDeterministic()
	}
	device, err := os.ReadFile(spec.Device)
	if err != nil {
		return nil, err
	}
	if string(device) != deviceState {
		return nil, fmt.Errorf("%w: device state %q", errdef.ErrInvalid, device)
	}
	disk, err := newDisk(spec.Common, spec.Disk...)
	if err != nil {
		return nil, err
	}
	mem, err := mapImage(spec.Memory)
	if err != nil {
		return nil, err
	}
	u.Add(mem.unmap)
	if spec.Fill != nil {
		if err = spec.Fill(ctx, mem.space()); err != nil {
			return nil, fmt.Errorf("fill memory: %w", err)
		}
	}
	m, err := e.run(ctx, spec.Common, mem, disk)
	if err != nil {
		return nil, err
	}
	if spec.Paused {
		m.stop()
	}
	return m, nil
}

// Adopt finds a machine that this Engine made and that was detached.
func (e *Engine) Adopt(_ context.Context, h vmm.Handle) (vmm.VM, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	m := e.detached[h.Dir]
	delete(e.detached, h.Dir)
	if m == nil || m.gone() {
		return nil, fmt.Errorf("%w: machine in %s", errdef.ErrNotFound, h.Dir)
	}
	return m, nil
}

// Crash ends the machine whose directory is dir as if by itself, with err as
// the reason, and reports whether there was one.
func (e *Engine) Crash(dir string, err error) bool {
	e.mu.Lock()
	m := e.running[dir]
	e.mu.Unlock()
	if m == nil {
		return false
	}
	m.end(err)
	return true
}

// Dirty writes data at the beginning of a page of the memory of the machine
// whose directory is dir, as its guest would. The page is one of the second
// half of memory, and the machine one that was restored.
func (e *Engine) Dirty(dir string, page uint64, data []byte) error {
	m, err := e.find(dir)
	if err != nil {
		return err
	}
	mem, err := m.mapped()
	if err != nil {
		return err
	}
	return mem.dirty(page, data)
}

// run starts an agent; mem, if not nil, has the files it begins with, and
// becomes the machine's.
func (e *Engine) run(ctx context.Context, spec vmm.Common, mem *memory, disk *disk) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if spec.Machine.MemoryMiB < 64 || spec.Machine.VCPUs < 1 || spec.Machine.ClockShift != 0 || spec.Machine.VCPUs > e.Caps().MaxVCPUs {
		return nil, fmt.Errorf("%w: machine %+v", errdef.ErrInvalid, spec.Machine)
	}
	m := &machine{engine: e, spec: spec, memory: mem, disk: disk, files: filepath.Join(spec.Dir, "guest"), calls: make(chan call), limits: spec.Limits, done: make(chan struct{}), line: make(chan struct{}, 1)}
	if err := os.Mkdir(m.files, 0o700); err != nil {
		return nil, err
	}
	u.Add(func() error { return os.RemoveAll(m.files) })
	if mem != nil {
		if err := mem.load(m.files); err != nil {
			return nil, err
		}
	}
	for _, lease := range spec.Leases {
		fd, err := unix.FcntlInt(lease.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("keep %s: %w", lease.Name(), err)
		}
		held := os.NewFile(uintptr(fd), lease.Name())
		m.leases = append(m.leases, held)
		u.Add(held.Close)
	}
	m.agent = agent.New(agent.Config{Fake: agent.NewFake(m.files)})
	m.ctx, m.cancel = context.WithCancel(context.WithoutCancel(ctx))
	e.mu.Lock()
	defer e.mu.Unlock()
	e.running[spec.Dir] = m
	return m, nil
}

// machine is one fake machine.
type machine struct {
	engine *Engine
	spec   vmm.Common
	files  string  // the guest's directory
	image  string  // where Freeze writes memory, if it can be frozen
	memory *memory // nil if it was not restored
	disk   *disk
	agent  *agent.Agent
	leases []*os.File
	done   chan struct{}
	line   chan struct{} // a token held by the one stream
	ctx    context.Context
	cancel context.CancelFunc
	serve  sync.WaitGroup
	once   sync.Once

	err     error        // set before done is closed
	running sync.RWMutex // held by writers while the machine is paused
	mu      sync.Mutex
	paused  bool
	over    bool      // no stream begins any more, and nothing pauses
	calls   chan call // of a guest with a network card
	limits  vmm.Limits
	usage   vmm.Usage
}

func (m *machine) PID() int { return 0 }

func (m *machine) Handle() vmm.Handle {
	return vmm.Handle{Engine: "fake", Dir: m.spec.Dir, Disk: m.disk.base}
}

func (m *machine) Done() <-chan struct{} { return m.done }

func (m *machine) Err() error {
	if !m.gone() {
		return nil
	}
	return m.err
}

func (m *machine) gone() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// Dial waits until the stream before this one is closed.
func (m *machine) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case m.line <- struct{}{}:
	case <-m.done:
		return nil, errGone
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		<-m.line
		return nil, errGone
	}
	host, guest := net.Pipe()
	m.serve.Go(func() {
		stop := context.AfterFunc(m.ctx, func() { _ = guest.Close() })
		defer stop()
		_ = m.agent.Serve(m.ctx, &gated{guest, &m.running}) // ends with the stream
		_ = guest.Close()
		<-m.line
	})
	return host, nil
}

// gated is the guest's end of a stream: nothing comes in while it is paused.
type gated struct {
	io.ReadWriter
	running *sync.RWMutex
}

func (g *gated) Read(p []byte) (int, error) {
	n, err := g.ReadWriter.Read(p)
	g.running.RLock()
	defer g.running.RUnlock()
	return n, err
}

func (m *machine) Pause(context.Context) error {
	if err := m.engine.fails("Pause"); err != nil {
		return err
	}
	m.stop()
	return nil
}

func (m *machine) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.paused && !m.over {
		m.running.Lock()
		m.paused = true
	}
}

func (m *machine) Resume(context.Context) error {
	if err := m.engine.fails("Resume"); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.paused {
		m.running.Unlock()
		m.paused = false
	}
	return nil
}

func (m *machine) Paused(context.Context) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		return false, errGone
	}
	return m.paused, nil
}

var errGone = fmt.Errorf("%w: the machine is gone", errdef.ErrUnavailable)

func (m *machine) Memory() (guestmem.Space, error) {
	mem, err := m.mapped()
	if err != nil {
		return guestmem.Space{}, err
	}
	return mem.space(), nil
}

// mapped is the memory of a restored machine that lives.
func (m *machine) mapped() (*memory, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.memory == nil:
		return nil, fmt.Errorf("%w: memory of machine in %s is not a private mapping of an image", errdef.ErrUnsupported, m.spec.Dir)
	case m.over:
		return nil, errGone
	}
	return m.memory, nil
}

// SaveDevice brings the guest's files into memory, and then says that it is so.
// Halted is for deterministic machines, of which this engine has none.
func (m *machine) Halted(context.Context) error { return errNotDeterministic() }

// Answer is for deterministic machines, of which this engine has none.
func (m *machine) Answer() error { return errNotDeterministic() }

// Mailbox is for deterministic machines, of which this engine has none.
func (m *machine) Mailbox() (vmm.Mailbox, error) { return nil, errNotDeterministic() }

func errNotDeterministic() error {
	return fmt.Errorf("%w: the fake engine has no deterministic machines", errdef.ErrUnsupported)
}

func (m *machine) SaveDevice(ctx context.Context, device string) error {
	paused, err := m.Paused(ctx)
	if err != nil {
		return err
	}
	if !paused {
		return fmt.Errorf("%w: save device state of a machine that is not paused", errdef.ErrConflict)
	}
	if m.memory != nil {
		if err := m.memory.save(m.files); err != nil {
			return fmt.Errorf("save device state: %w", err)
		}
	}
	// A failure comes when all is done that could have been left behind.
	if err := m.writeDevice(device, "SaveDevice"); err != nil {
		return fmt.Errorf("save device state: %w", err)
	}
	return nil
}

func (m *machine) writeDevice(device, op string) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	f, err := os.OpenFile(device, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	u.Add(func() error { return os.Remove(device) })
	_, err = f.WriteString(deviceState)
	return errors.Join(err, f.Close(), m.engine.fails(op))
}

// Freeze writes the guest's directory into the image.
func (m *machine) Freeze(ctx context.Context, device string) (err error) {
	if err = m.Pause(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("freeze: %w", err), m.Resume(ctx))
		}
	}()
	if m.image == "" {
		return fmt.Errorf("%w: the machine's memory is not in a file", errdef.ErrInvalid)
	}
	if err = m.writeDevice(device, "Freeze"); err != nil {
		return err
	}
	return freeze(m.files, m.image)
}

// Kill ends the agent and waits for all it started.
func (m *machine) Kill(ctx context.Context) error {
	go m.end(nil) // it always ends, and waiters may lose patience
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// end ends the agent, once.
func (m *machine) end(err error) {
	m.once.Do(func() {
		m.cancel()
		m.mu.Lock()
		m.over = true
		if m.paused {
			m.running.Unlock()
			m.paused = false
		}
		m.mu.Unlock()
		m.serve.Wait()
		m.agent.Close()
		for _, lease := range m.leases {
			_ = lease.Close()
		}
		m.engine.forget(m)
		m.err = err
		if m.memory != nil {
			m.err = errors.Join(err, m.memory.unmap())
		}
		close(m.done)
	})
}

func (e *Engine) forget(m *machine) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.running, m.spec.Dir)
}

// Detach leaves the agent running, for Adopt.
func (m *machine) Detach() error {
	m.engine.mu.Lock()
	defer m.engine.mu.Unlock()
	m.engine.detached[m.spec.Dir] = m
	return nil
}
