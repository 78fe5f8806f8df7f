// Package fake is an engine without machines: a guest is the real agent in
// this process, and its memory is the directory it works in. Tests of what
// lies above the engines run on it, without privileges and in milliseconds.
//
// A fork inherits the files of the machine it was frozen from, and nothing
// else: processes and interpreters do not survive a freeze.
package fake

import (
	"archive/tar"
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
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// Engine makes fake machines. It is safe for concurrent use.
type Engine struct {
	mu       sync.Mutex
	running  map[string]*machine // by directory
	detached map[string]*machine // those that Adopt may take
}

var _ vmm.Engine = (*Engine)(nil)

// New returns an engine.
func New() *Engine {
	return &Engine{running: map[string]*machine{}, detached: map[string]*machine{}}
}

// Name is "fake".
func (e *Engine) Name() string { return "fake" }

// Version is always "1".
func (e *Engine) Version() string { return "1" }

// Caps says that there is nothing special about it.
func (e *Engine) Caps() vmm.Caps { return vmm.Caps{MaxVCPUs: 16} }

// deviceState is what Freeze writes and Restore expects.
const deviceState = "fake device state 1\n"

// Start runs an agent in an empty directory.
func (e *Engine) Start(ctx context.Context, spec vmm.StartSpec) (vmm.VM, error) {
	if spec.Memory != "" {
		f, err := os.OpenFile(spec.Memory, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
		}
	}
	m, err := e.run(ctx, spec.Common)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	m.memory = spec.Memory
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
	device, err := os.ReadFile(spec.Device)
	if err != nil {
		return nil, err
	}
	if string(device) != deviceState {
		return nil, fmt.Errorf("%w: device state %q", errdef.ErrInvalid, device)
	}
	memory, err := os.Open(spec.Memory)
	if err != nil {
		return nil, err
	}
	defer func() { _ = memory.Close() }() // only read
	m, err := e.run(ctx, spec.Common)
	if err != nil {
		return nil, err
	}
	if spec.Paused {
		err = m.Pause(ctx)
	}
	if err = errors.Join(err, thaw(memory, m.files)); err != nil {
		return nil, errors.Join(err, m.Kill(ctx))
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

func (e *Engine) run(ctx context.Context, spec vmm.Common) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if spec.Machine.MemoryMiB < 64 || spec.Machine.VCPUs < 1 || spec.Machine.VCPUs > e.Caps().MaxVCPUs {
		return nil, fmt.Errorf("%w: machine %+v", errdef.ErrInvalid, spec.Machine)
	}
	m := &machine{engine: e, spec: spec, files: filepath.Join(spec.Dir, "guest"), done: make(chan struct{}), line: make(chan struct{}, 1)}
	if err := os.Mkdir(m.files, 0o700); err != nil {
		return nil, err
	}
	u.Add(func() error { return os.RemoveAll(m.files) })
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
	files  string // the guest's directory
	memory string
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
	over    bool // no stream begins any more, and nothing pauses
}

func (m *machine) PID() int { return 0 }

func (m *machine) Handle() vmm.Handle { return vmm.Handle{Engine: "fake", Dir: m.spec.Dir} }

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
		return nil, fmt.Errorf("%w: the machine is gone", errdef.ErrUnavailable)
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.over {
		<-m.line
		return nil, fmt.Errorf("%w: the machine is gone", errdef.ErrUnavailable)
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
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.paused && !m.over {
		m.running.Lock()
		m.paused = true
	}
	return nil
}

func (m *machine) Resume(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.paused {
		m.running.Unlock()
		m.paused = false
	}
	return nil
}

// Freeze writes the guest's directory as an archive.
func (m *machine) Freeze(ctx context.Context, device string) (err error) {
	if err = m.Pause(ctx); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("freeze: %w", err), m.Resume(ctx))
		}
	}()
	if m.memory == "" {
		return fmt.Errorf("%w: the machine's memory is not in a file", errdef.ErrInvalid)
	}
	f, err := os.OpenFile(device, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(deviceState)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return freeze(m.files, m.memory)
}

func freeze(dir, memory string) error {
	f, err := os.OpenFile(memory, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close())
}

// thaw unpacks an archive that freeze wrote.
func thaw(archive io.Reader, dir string) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	r := tar.NewReader(archive)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unpack(root, h, r); err != nil {
			return err
		}
	}
}

func unpack(root *os.Root, h *tar.Header, r io.Reader) error {
	mode := h.FileInfo().Mode().Perm()
	if h.Typeflag == tar.TypeDir {
		return root.MkdirAll(filepath.Clean(h.Name), mode)
	}
	if err := root.MkdirAll(filepath.Dir(h.Name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(h.Name, os.O_CREATE|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
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
