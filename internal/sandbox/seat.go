package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm"
)

// freeSeat is the seat that the sandbox's machine, if it has one, is not at.
func (b *box) freeSeat() (string, error) {
	seat := firstSeat
	b.mu.Lock()
	if b.vm != nil && filepath.Base(b.record.Handle.Dir) == firstSeat {
		seat = secondSeat
	}
	b.mu.Unlock()
	// What a machine left there that ended, or one that a crash cut off.
	return seat, os.RemoveAll(filepath.Join(b.m.dir(b.id), seat))
}

// reseat gives the sandbox a machine raised from o in place of the one that it
// has, if any. Until the new one has confirmed its identity and is on record
// nothing has changed; from then on the old one is of no use to anybody, and the
// sandbox is after the node head of the tree.
func (b *box) reseat(ctx context.Context, o *origin, head string) error {
	ctx, cancel := b.bound(ctx)
	defer cancel()
	leave, err := b.m.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	seat, err := b.freeSeat()
	if err != nil {
		return err
	}
	vm, err := b.m.raise(ctx, o, b.id, seat, b.info().Limits)
	if err != nil {
		return err
	}
	c, err := introduce(ctx, vm, secrets{keep: o.snap.BranchedFrom == b.id}.identity(b.id))
	if err != nil {
		return errors.Join(err, b.m.discard(vm))
	}
	old, err := b.sit(vm, c, o, head)
	if err != nil {
		return errors.Join(err, c.Close(), b.m.discard(vm))
	}
	b.glance()
	// Its network comes last, so that what the old machine had open is cut only
	// when there is no way back. A sandbox without is of use all the same.
	if err = b.connect(vm); err != nil {
		b.m.Logger.WarnContext(ctx, "sandbox has no network", "sandbox", b.id, "error", err)
	}
	return b.m.discard(old)
}

// sit makes vm the sandbox's machine, on record first, and returns the one
// that was.
func (b *box) sit(vm vmm.VM, c *guest.Client, o *origin, head string) (old vmm.VM, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return nil, context.Cause(b.ctx)
	}
	r := b.record
	r.State, r.Reason, r.FromPool = Running, "", false
	r.Origin, r.Head, r.PID, r.Handle = o.snap.Digest, head, vm.PID(), vm.Handle()
	if err = r.save(b.m.Dir); err != nil {
		return nil, err
	}
	old, b.vm = b.vm, vm
	b.record = r
	if b.client != nil {
		_ = b.client.Close() // it only waits; its machine is the old one
	}
	b.client = c
	return old, nil
}

// discard ends a machine that is nobody's any more, and clears its seat.
func (m *Manager) discard(vm vmm.VM) error {
	if vm == nil {
		return nil
	}
	dir := vm.Handle().Dir
	if err := m.kill(vm); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// Rollback makes a sandbox what it, or another of the same tree, was at a node:
// the same id, with the memory, processes and files of then. Its connections
// end. When Rollback fails the sandbox is as it was.
func (m *Manager) Rollback(ctx context.Context, id, node string) (Info, error) {
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return Info{}, err
	}
	defer done()
	if err = b.rollback(ctx, node); err != nil {
		return Info{}, fmt.Errorf("roll sandbox %s back to %s: %w", id, node, err)
	}
	return b.info(), nil
}

func (b *box) rollback(ctx context.Context, node string) (err error) {
	o, err := b.m.origin(ctx, node)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	now, err := b.m.Snapshots.Resolve(b.info().SnapshotDigest)
	if err == nil && (now.Manifest.Image != o.snap.Manifest.Image || now.Manifest.Machine != o.snap.Manifest.Machine) {
		err = fmt.Errorf("%w: it has another image or shape than %s", errdef.ErrInvalid, b.info().SnapshotTag)
		return errdef.WithHint(err, "tine tree shows the nodes; tine fork makes a new sandbox of any snapshot")
	}
	suspended := b.info().State == Suspended
	if err = b.reseat(ctx, o, o.snap.Digest); err != nil {
		return err
	}
	b.m.Events.Add(RolledBack, b.id, EventData{Snapshot: o.snap.Tag, Digest: o.snap.Digest})
	if suspended {
		return b.m.dropHeld(b.id)
	}
	return nil
}

// turnOf lets a call in that needs the sandbox's turn; *ctx then ends with the
// sandbox and the Manager too. The caller must call done.
func (m *Manager) turnOf(ctx *context.Context, id string) (b *box, done func(), err error) {
	if b, err = m.find(id); err != nil {
		return nil, nil, err
	}
	inner, leave, err := m.begin(*ctx)
	if err != nil {
		return nil, nil, err
	}
	inner, cancel := join(inner, b.ctx)
	release, err := b.take(inner)
	if err == nil && b.ctx.Err() != nil {
		release()
		err = context.Cause(b.ctx)
	}
	if err != nil {
		cancel()
		leave()
		return nil, nil, fmt.Errorf("sandbox %s: %w", id, err)
	}
	*ctx = inner
	return b, func() { release(); cancel(); leave() }, nil
}
