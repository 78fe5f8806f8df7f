package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// tine is the side that is measured: forks through the daemon's manager, boots
// through its engine.
type tine struct {
	*subject
	dirs   *dirs
	pooled bool
}

// poolPoll is how often a pool is looked at that is not full yet.
const poolPoll = 5 * time.Millisecond

// prepare waits until the pool has a fork. It has one place: its filler, which
// starts with every fork that is taken, is done before the next measurement.
func (t *tine) prepare(ctx context.Context, how start) error {
	if how != poolFork {
		return nil
	}
	t.pooled = true
	return fillPool(ctx, t.d.Sandboxes, t.ref)
}

// fillPool gives the snapshot a pool with one place, if it has none, and waits
// until there is a fork in it.
func fillPool(ctx context.Context, m *sandbox.Manager, ref string) error {
	if err := m.SetPool(ctx, ref, 1); err != nil {
		return err
	}
	tick := time.NewTicker(poolPoll)
	defer tick.Stop()
	for {
		if ready, want := m.Pool(ref); ready > 0 && ready >= want {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the pool: %w", context.Cause(ctx))
		}
	}
}

func (t *tine) raise(ctx context.Context, how start) (machine, error) {
	if how == coldBoot {
		m, err := t.boot(ctx, "")
		if err != nil {
			return nil, err
		}
		return m, nil
	}
	results, err := t.d.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: t.ref, N: 1, NoPool: how == coldFork})
	if err == nil {
		err = results[0].Err
	}
	if err != nil {
		return nil, err
	}
	m := &forked{t.d.Sandboxes, results[0].Sandbox.ID}
	if how == poolFork && !results[0].Sandbox.FromPool {
		return nil, errors.Join(errNotWoken(), m.end(ctx))
	}
	return m, nil
}

func errNotWoken() error {
	return fmt.Errorf("%w: the parked fork did not wake", errdef.ErrUnavailable)
}

func (t *tine) fork(ctx context.Context, n int, each func(machine, error)) error {
	_, err := t.d.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: t.ref, N: n, NoPool: true, Each: func(r sandbox.ForkResult) {
		if r.Err != nil {
			each(nil, r.Err)
			return
		}
		each(&forked{t.d.Sandboxes, r.Sandbox.ID}, nil)
	}})
	return err
}

// freeze makes a snapshot as sandbox does, under a tag that goes again.
func (t *tine) freeze(ctx context.Context) (f frozen, err error) {
	tag := "bench-" + rand.Text()
	stage, err := t.d.Snapshots.Stage(ctx, tag)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, stage.Abort()) }()
	m, err := t.boot(ctx, stage.MemoryPath())
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, m.end(ctx)) }()
	if err = t.warm(ctx, m.client); err != nil {
		return f, err
	}
	begin := time.Now()
	if err = m.vm.Freeze(ctx, stage.DevicePath()); err != nil {
		return f, err
	}
	f.freeze = time.Since(begin)
	if err = m.end(ctx); err != nil { // nobody may write to what is committed
		return f, err
	}
	f.commit, err = t.commit(ctx, stage, tag)
	return f, err
}

func (t *tine) commit(ctx context.Context, stage *snapshot.Stage, tag string) (time.Duration, error) {
	begin := time.Now()
	if _, err := stage.Commit(ctx, t.snap.Manifest, snapshot.Facts{}); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	end, cancel := late(ctx)
	defer cancel()
	return took, t.d.Snapshots.Remove(end, tag)
}

// close ends the pool.
func (t *tine) close(ctx context.Context) error {
	if !t.pooled {
		return nil
	}
	end, cancel := late(ctx)
	defer cancel()
	return t.d.Sandboxes.SetPool(end, t.ref, 0)
}

// forked is a sandbox.
type forked struct {
	m  *sandbox.Manager
	id string
}

func (f *forked) with(ctx context.Context, ask func(context.Context, *guest.Client) error) error {
	return f.m.With(ctx, f.id, ask)
}

func (f *forked) memory() (private, shared int64, err error) { return f.m.Memory(f.id) }

func (f *forked) end(ctx context.Context) error {
	ctx, cancel := late(ctx)
	defer cancel()
	if err := f.m.Kill(ctx, f.id); err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	return nil
}

// booted is a machine that the engine started.
type booted struct {
	vm     vmm.VM
	client *guest.Client
	dir    string
}

// boot starts the snapshot's image and waits for its agent. RAM is anonymous
// when memory is empty.
func (t *tine) boot(ctx context.Context, memory string) (_ *booted, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	m, err := t.startVM(ctx, memory)
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return m.end(ctx) })
	stream, err := m.vm.Dial(ctx)
	if err != nil {
		return nil, err
	}
	m.client, err = guest.DialIdentity(ctx, stream, guest.NewIdentity("tine", "tine"))
	return m, err
}

// startVM starts the snapshot's image and waits for nothing.
func (t *tine) startVM(ctx context.Context, memory string) (_ *booted, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	dir, err := t.dirs.make()
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return os.RemoveAll(dir) })
	vm, err := t.d.Sandboxes.Engine.Start(ctx, vmm.StartSpec{
		Common: vmm.Common{ID: "bench", Dir: dir, Machine: t.snap.Manifest.Machine, Root: t.img.RootPath(), DieWithParent: true},
		Boot:   vmm.Boot{Kernel: t.img.KernelPath(), Initrd: t.img.InitrdPath()},
		Memory: memory,
	})
	if err != nil {
		return nil, err
	}
	return &booted{vm: vm, dir: dir}, nil
}

func (b *booted) with(ctx context.Context, ask func(context.Context, *guest.Client) error) error {
	return ask(ctx, b.client)
}

func (b *booted) memory() (private, shared int64, err error) { return memoryOf(b.vm.PID()) }

func (b *booted) end(ctx context.Context) error {
	ctx, cancel := late(ctx)
	defer cancel()
	if b.client != nil {
		_ = b.client.Close() // never fails
	}
	return errors.Join(b.vm.Kill(ctx), os.RemoveAll(b.dir))
}
