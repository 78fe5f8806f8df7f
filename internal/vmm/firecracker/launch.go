package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
	"github.com/tinevm/tine/internal/vmm/process"
)

// answerTime is how long a Firecracker may take for what takes it milliseconds: to
// start, and to answer a request that moves no memory. Callers' contexts can be
// shorter.
const answerTime = 20 * time.Second

// fillFunc is RestoreSpec.Fill.
type fillFunc func(context.Context, guestmem.Space) error

// launcher gathers what a Firecracker is started with.
type launcher struct {
	engine *Engine
	spec   vmm.Common
	names  names
	cell   *jail.Cell // nil without a jail
	handle vmm.Handle // as far as it is known before there is a process
	files  []*os.File // handed down, the caller's and the cell's
	before map[string]func(context.Context) error
	fresh  int64 // how long a file it may make, beside its state
	there  atomic.Pointer[loading]
}

// loading is a machine that was told to load a snapshot.
type loading struct {
	m     *machine
	bound *time.Timer // ends it
}

func (e *Engine) newLauncher(spec vmm.Common) *launcher {
	return &launcher{
		engine: e, spec: spec, handle: vmm.Handle{Dir: spec.Dir},
		names:  names{jailed: e.keeper.Jail != nil, dir: spec.Dir, files: map[string]*os.File{}, copies: map[string]*os.File{}},
		before: map[string]func(context.Context) error{},
	}
}

// Start boots a machine.
func (e *Engine) Start(ctx context.Context, spec vmm.StartSpec) (vmm.VM, error) {
	m, err := e.start(ctx, spec)
	if err != nil {
		return nil, fmt.Errorf("start machine %s: %w", spec.ID, err)
	}
	return m, nil
}

func (e *Engine) start(ctx context.Context, spec vmm.StartSpec) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if err = e.check(spec.Common); err != nil {
		return nil, err
	}
	l := e.newLauncher(spec.Common)
	u.Add(l.names.close)
	if spec.Memory != "" {
		if err = l.makeMemory(spec.Memory); err != nil {
			return nil, err
		}
		u.Add(func() error { return os.Remove(spec.Memory) })
	}
	if err = l.disk(spec.Disk); err != nil {
		return nil, err
	}
	err = errors.Join(l.names.add(kernelFile, spec.Boot.Kernel, os.O_RDONLY), l.names.add(initrdFile, spec.Boot.Initrd, os.O_RDONLY))
	if err != nil {
		return nil, err
	}
	m, err := l.launch(ctx)
	if err != nil {
		return nil, err
	}
	defer close(m.ready)
	u.Add(func() error { return m.Kill(context.WithoutCancel(ctx)) })
	m.template = spec.Memory != ""
	if err = m.boot(ctx, spec); err != nil {
		return nil, m.gone(err)
	}
	if !m.template { // there is nothing that it has yet to open
		if err = m.settle(); err != nil {
			return nil, m.gone(err)
		}
	}
	u.Release()
	return m, nil
}

// makeMemory makes the file that a template's memory will be written to.
func (l *launcher) makeMemory(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return err
	}
	l.fresh = int64(l.spec.Machine.MemoryMiB) << 20
	if err = l.names.add(memoryFile, path, os.O_WRONLY); err != nil {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// Restore brings up a machine that shares a frozen one's memory.
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
	if err = e.check(spec.Common); err != nil {
		return nil, err
	}
	if spec.Memory == "" || spec.Device == "" {
		return nil, fmt.Errorf("%w: memory image and device state are both needed", errdef.ErrInvalid)
	}
	if err = checkState(spec.Device); err != nil {
		return nil, err
	}
	l := e.newLauncher(spec.Common)
	u.Add(l.names.close)
	device, err := os.Open(spec.Device)
	if err != nil {
		return nil, err
	}
	defer func() { _ = device.Close() }() // only read
	if err = l.memory(ctx, spec.Memory, spec.Fill); err != nil {
		return nil, err
	}
	if err = l.names.copy(deviceFile, spec.Device, device); err != nil {
		return nil, err
	}
	if err = l.frozenDisk(ctx, spec.Disk); err != nil {
		return nil, err
	}
	m, err := l.launch(ctx)
	if err != nil {
		return nil, err
	}
	defer close(m.ready)
	u.Add(func() error { return m.Kill(context.WithoutCancel(ctx)) })
	err = l.load(ctx, m, !spec.Paused)
	if err = errors.Join(err, m.settle()); err != nil {
		return nil, m.gone(fmt.Errorf("load snapshot: %w", err))
	}
	u.Release()
	return m, nil
}

// load has Firecracker load the snapshot, for which it has no longer than for
// anything else, but for what fill takes.
func (l *launcher) load(ctx context.Context, m *machine, resume bool) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	bound := time.AfterFunc(l.engine.answer, func() { cancel(l.engine.late()) })
	defer bound.Stop()
	l.there.Store(&loading{m, bound})
	err := m.client.LoadSnapshot(ctx, api.Load{State: deviceFile, Mem: memoryFile, Resume: resume})
	if err == nil && l.names.jailed {
		err = m.place.Remove(deviceFile) // it is memory
	}
	return err
}

// memory gives the machine the image at path, copied on write, and completed by
// fill, which may be nil.
func (l *launcher) memory(ctx context.Context, path string, fill fillFunc) (err error) {
	// The kernel names mappings by absolute paths without links, and
	// Memory looks for this one by its name.
	if path, err = filepath.Abs(path); err != nil {
		return err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return err
	}
	if fill != nil && !l.names.jailed {
		if path, err = l.whole(ctx, path, fill); err != nil {
			return err
		}
	}
	if fill != nil && l.names.jailed {
		l.before[kvmDevice] = l.fillThere(fill)
	}
	l.handle.Memory = path
	return l.names.add(memoryFile, path, os.O_RDONLY)
}

// fillThere completes the memory of a Firecracker that is stopped as it opens
// KVM's device: by then it has mapped its memory, and has yet to make the first
// device, some of which read what the guest has left for them there
// (restore_from_snapshot in src/vmm/src/persist.rs, from v1.10 to v1.16).
func (l *launcher) fillThere(fill fillFunc) func(context.Context) error {
	return func(ctx context.Context) error {
		there := l.there.Load()
		if there == nil {
			return fmt.Errorf("%w: Firecracker opens KVM before it was asked to", errdef.ErrUnsupported)
		}
		there.bound.Stop()
		defer there.bound.Reset(l.engine.answer)
		space, err := there.m.Memory()
		if err == nil {
			err = fill(ctx, space)
		}
		if err != nil {
			return fmt.Errorf("fill memory: %w", err)
		}
		return nil
	}
}

// launch starts Firecracker, and returns when it answers. The caller closes
// machine.ready.
func (l *launcher) launch(ctx context.Context) (_ *machine, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if l.cell, err = l.engine.keeper.TakeCell(ctx, l.spec.Machine.Net); err != nil {
		return nil, err
	}
	console, err := newConsole()
	if err == nil {
		u.Add(console.close)
		err = l.complete()
	}
	if err != nil {
		return nil, errors.Join(err, process.LeaveCell(l.cell))
	}
	p, err := l.engine.keeper.Start(ctx, process.Launch{
		Handle: l.handle, Binary: l.engine.binary, Args: l.args(), Cell: l.cell, WorkDir: l.spec.Dir,
		Output: console.file, Files: l.files, Opens: l.names.files, Copies: l.names.copies, Before: l.before,
		FileBytes: l.fresh + fileSlack, Limits: l.spec.Limits, DieWithParent: l.spec.DieWithParent,
	})
	if err != nil {
		return nil, err
	}
	u.Release() // what comes now is the machine's
	m := &machine{engine: l.engine, handle: p.Handle(), started: p, names: l.names, console: console, ready: make(chan struct{})}
	m.Process = p.Watch(m.hooks())          //nolint:contextcheck // for as long as it lives
	l.names = names{jailed: l.names.jailed} // the rest is the machine's
	if m.place, err = openPlace(m.handle); err == nil {
		err = m.connect(ctx)
	}
	if err != nil {
		close(m.ready)
		return nil, errors.Join(m.gone(err), m.Kill(context.WithoutCancel(ctx)))
	}
	return m, nil
}

// fileSlack is for device state, and a scratch disk that grows by nothing.
const fileSlack = 64 << 20

// complete adds what every machine has, and what depends on the cell.
func (l *launcher) complete() error {
	root, err := os.Stat(l.spec.Root)
	if err != nil {
		return err
	}
	if !root.Mode().IsRegular() || root.Size() == 0 || root.Size()%pmemAlign != 0 {
		return fmt.Errorf("%w: root image %s: not a file of a multiple of %d bytes", errdef.ErrInvalid, l.spec.Root, pmemAlign)
	}
	if err = l.names.device(kvmDevice, l.engine.kvm); err != nil {
		return explainKVM(err)
	}
	if err = l.names.add(rootFile, l.spec.Root, os.O_RDONLY); err != nil {
		return err
	}
	l.files = append(l.files, l.spec.Leases...)
	if !l.spec.Machine.Net {
		return nil
	}
	for _, f := range l.cell.Link()[1:] { // the jail sees to the tap
		l.handle.Link = append(l.handle.Link, l.engine.keeper.FirstFile()+len(l.files))
		l.files = append(l.files, f)
	}
	return nil
}

// explainKVM says what to do about a device that cannot be opened.
func explainKVM(err error) error {
	err = fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	return errdef.WithHint(err, "this user must be allowed to read and write "+kvmDevice+"; on many hosts the group kvm is")
}

// pmemAlign is what virtio-pmem wants the size of its image to be a multiple of.
const pmemAlign = 2 << 20

// args is the command line. Errors only are logged: the rest would push what a
// guest has to say out of the console.
func (l *launcher) args() []string {
	id := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, l.spec.ID)
	return []string{"--id", "tine-" + id[:min(len(id), 50)], "--api-sock", apiSocket, "--level", "Error"}
}
