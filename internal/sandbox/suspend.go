package sandbox

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// Suspend brings a sandbox's memory to the disk and ends its machine. The
// sandbox stays, with its id; whoever uses it resumes it. Its connections end.
// When Suspend fails the sandbox runs on. It is idempotent.
func (m *Manager) Suspend(ctx context.Context, id string) (Info, error) {
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return Info{}, err
	}
	defer done()
	if err = b.suspend(ctx); err != nil {
		return Info{}, fmt.Errorf("suspend sandbox %s: %w", id, err)
	}
	return b.info(), nil
}

// Resume gives a suspended sandbox a machine again. It is idempotent.
func (m *Manager) Resume(ctx context.Context, id string) (Info, error) {
	b, done, err := m.turnOf(&ctx, id)
	if err != nil {
		return Info{}, err
	}
	defer done()
	if err = b.resume(ctx); err != nil {
		return Info{}, fmt.Errorf("resume sandbox %s: %w", id, err)
	}
	return b.info(), nil
}

// suspendIdle suspends a sandbox, unless somebody uses it by then. One that
// cannot be suspended counts as used just now, so that it is tried again.
func (m *Manager) suspendIdle(b *box) {
	ctx, done, err := m.begin(context.WithoutCancel(b.ctx))
	if err != nil {
		return // the Manager is closing
	}
	go func() {
		defer done()
		defer b.retired()
		if err := b.suspendUnused(ctx); err != nil && b.ctx.Err() == nil {
			m.Logger.WarnContext(ctx, "idle sandbox not suspended", "sandbox", b.id, "error", err)
		}
	}()
}

func (b *box) suspendUnused(ctx context.Context) error {
	ctx, cancel := join(ctx, b.ctx)
	defer cancel()
	release, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if b.used() {
		return nil
	}
	return b.suspend(ctx)
}

func (b *box) retired() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.retiring = false
	if b.record.State == Running {
		b.record.LastActive = time.Now()
	}
	b.glance()
}

func (b *box) used() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.inUse > 0
}

// suspend is for one who has the turn.
func (b *box) suspend(ctx context.Context) (err error) {
	b.mu.Lock()
	vm, r := b.vm, b.record
	b.mu.Unlock()
	if r.State == Suspended {
		return nil
	}
	stage, err := b.m.Snapshots.StageHeld(ctx, b.id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stage.Abort()) }()
	c := b.m.newCapture(vm, stage, Diff)
	c.facts.BranchedFrom = b.id
	defer func() { err = errors.Join(err, c.close()) }()
	if err = c.prepare(r.Origin, r.Head); err != nil {
		return err
	}
	if err = b.freeze(ctx, c); err != nil {
		return errors.Join(cause(vm, err), runOn(ctx, vm))
	}
	b.m.Logger.InfoContext(ctx, "sandbox suspended", "sandbox", b.id)
	b.disconnect()
	b.m.Events.Add(WasSuspended, b.id, EventData{})
	return b.m.discard(vm)
}

// freeze pauses the machine and leaves it so, with all of it on disk and on
// record.
func (b *box) freeze(ctx context.Context, c *capture) error {
	b.quiesce(ctx)
	if err := c.vm.Pause(ctx); err != nil {
		return err
	}
	if err := errors.Join(c.devices(ctx), c.keepDisk(ctx)); err != nil {
		return err
	}
	c.source = c.space // it does not run, and will not
	if err := c.write(ctx); err != nil {
		return err
	}
	if _, err := c.stage.Commit(ctx, c.manifest(), c.facts); err != nil {
		return err
	}
	return b.leave()
}

// leave takes the machine away from the sandbox, on record first.
func (b *box) leave() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	r := b.record
	r.State, r.PID, r.Handle = Suspended, 0, vmm.Handle{}
	if err := r.save(b.m.Dir); err != nil {
		return err
	}
	b.record, b.vm = r, nil
	if b.client != nil {
		_ = b.client.Close() // it only waits
		b.client = nil
	}
	return nil
}

// resume is for one who has the turn.
func (b *box) resume(ctx context.Context) (err error) {
	if b.info().State != Suspended {
		return nil
	}
	snap, err := b.m.Snapshots.Held(b.id)
	if err != nil {
		return err
	}
	if err = snap.RestorableBy(b.m.Engine); err != nil { // nobody can make this one anew
		return errdef.WithHint(err, "run the daemon where, and as, it was suspended, or give the sandbox up: tine rm "+b.id)
	}
	pin, err := b.m.Snapshots.Pin(snap)
	if err != nil {
		return err
	}
	o, err := b.m.originOf(ctx, snap, pin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.close()) }()
	if err = b.reseat(ctx, o, b.info().Head); err != nil {
		return err
	}
	b.m.Logger.InfoContext(ctx, "sandbox resumed", "sandbox", b.id)
	b.m.Events.Add(Resumed, b.id, EventData{})
	return b.m.dropHeld(b.id)
}

// dropHeld gives up what a sandbox was suspended in, if it was. A machine that
// was raised from it keeps it for as long as it lives.
func (m *Manager) dropHeld(id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), killTimeout)
	defer cancel()
	err := m.Snapshots.DropHeld(ctx, id)
	if errors.Is(err, errdef.ErrNotFound) {
		return nil
	}
	return err
}
