package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// Fork makes req.N sandboxes. The error is for requests that could not be
// begun; what became of each child is in its result. A caller who cancels ctx
// while there are children to come gets none: those that there are end.
func (m *Manager) Fork(ctx context.Context, req ForkRequest) ([]ForkResult, error) {
	if err := m.check(req); err != nil {
		return nil, err
	}
	inner, done, err := m.begin(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	o, err := m.origin(inner, req.Snapshot)
	if err != nil {
		return nil, err
	}
	defer o.close()
	parked, err := m.reserve(req, o.snap.Digest)
	if err != nil {
		return nil, err
	}
	results, failed := m.forkAll(inner, req, o, parked)
	abandoned := failed && errors.Is(ctx.Err(), context.Canceled)
	if failed && (req.AllOrNothing || abandoned) {
		m.killSiblings(ctx, results)
	}
	if abandoned {
		return nil, fmt.Errorf("fork %s: %w", req.Snapshot, context.Cause(ctx))
	}
	return results, nil
}

// maxLabels bounds the labels of a sandbox, all together.
const maxLabels = 64 << 10

func (m *Manager) check(req ForkRequest) error {
	size := 0
	for k, v := range req.Labels {
		size += len(k) + len(v)
	}
	switch {
	case req.N < 1 || req.N > m.Limits.Fork:
		return fmt.Errorf("%w: n = %d: it must be 1 to %d", errdef.ErrInvalid, req.N, m.Limits.Fork)
	case req.IdleTTL < 0 || req.Lifetime < 0:
		return fmt.Errorf("%w: negative time to live", errdef.ErrInvalid)
	case req.MemoryLimitMiB < 0:
		return fmt.Errorf("%w: negative memory limit", errdef.ErrInvalid)
	case size > maxLabels:
		return fmt.Errorf("%w: %d bytes of labels, %d allowed", errdef.ErrInvalid, size, maxLabels)
	}
	return nil
}

// reserve takes a place for each child: that of a parked fork where there is
// one, which it takes out of its pool, and a free one where there is not.
func (m *Manager) reserve(req ForkRequest, digest string) (parked []*box, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[digest]
	ready := 0
	if p != nil && !req.NoPool {
		ready = min(req.N, len(p.idle))
	}
	if err = m.holdLocked(req.N - ready); err != nil || ready == 0 {
		return nil, err
	}
	parked, p.idle = p.idle[:ready:ready], p.idle[ready:]
	p.wake()
	return parked, nil
}

// errSibling is the cause of forks that end because another failed.
var errSibling = fmt.Errorf("%w: a sibling failed", errdef.ErrConflict)

// forkAll makes the children side by side, and says whether one failed.
func (m *Manager) forkAll(ctx context.Context, req ForkRequest, o *origin, parked []*box) (results []ForkResult, failed bool) {
	start := time.Now()
	results = make([]ForkResult, req.N)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for i := range results {
		var b *box
		if i < len(parked) {
			b = parked[i]
		}
		wg.Go(func() {
			r := &results[i]
			r.Index = i
			child, err := m.forkOne(ctx, req, o, b, start)
			if err != nil {
				r.Err = fmt.Errorf("fork %s: %w", req.Snapshot, err)
				if req.AllOrNothing {
					cancel(errSibling)
				}
			} else {
				r.Sandbox = child.info()
			}
			if req.Each != nil {
				req.Each(*r)
			}
		})
	}
	wg.Wait()
	for _, r := range results {
		failed = failed || r.Err != nil
	}
	return results, failed
}

// killSiblings removes the children that there are, when others failed.
func (m *Manager) killSiblings(ctx context.Context, results []ForkResult) {
	ctx = context.WithoutCancel(ctx)
	var wg sync.WaitGroup
	for i := range results {
		r := &results[i]
		if r.Err != nil {
			continue
		}
		wg.Go(func() {
			err := m.Kill(ctx, r.Sandbox.ID)
			if errors.Is(err, errdef.ErrNotFound) {
				err = nil // it was removed already
			}
			r.Sandbox, r.Err = Info{}, errors.Join(errSibling, err)
		})
	}
	wg.Wait()
}

// forkOne makes the parked fork, if there is one and it works, or else a new
// one, the caller's. It owns the place that reserve took: the sandbox gives it
// back, or the error path does.
func (m *Manager) forkOne(ctx context.Context, req ForkRequest, o *origin, parked *box, start time.Time) (_ *box, err error) {
	b := parked
	if b != nil && !m.wake(ctx, b) { // and its place went with it
		b = nil
		if err = m.hold(1); err != nil {
			return nil, err
		}
	}
	if b == nil {
		leave, err := m.enter(ctx)
		if err != nil {
			m.drop()
			return nil, err
		}
		defer leave()
		if b, err = m.bring(ctx, o); err != nil {
			return nil, err
		}
	}
	if err := b.handOut(req, start); err != nil {
		return nil, errors.Join(err, b.order(context.WithoutCancel(ctx), end))
	}
	return b, nil
}

// handOut makes the sandbox the caller's: from now on it outlives a daemon
// that is killed.
func (b *box) handOut(req ForkRequest, start time.Time) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	now := time.Now()
	r := b.record
	r.State = Running
	r.SnapshotTag = req.Snapshot
	r.CreatedAt, r.LastActive = now, now
	r.IdleTTL, r.Labels, r.MemoryLimitMiB = req.IdleTTL, maps.Clone(req.Labels), req.MemoryLimitMiB
	if req.Lifetime > 0 {
		r.ExpiresAt = now.Add(req.Lifetime)
	}
	r.ForkMS = float64(now.Sub(start).Microseconds()) / 1000
	if err := r.save(b.m.Dir); err != nil {
		return err
	}
	b.record = r
	b.recount()
	return nil
}

// CanFork reports why the snapshot cannot be forked here, or nil if it can.
func (m *Manager) CanFork(ctx context.Context, ref string) error {
	o, err := m.origin(ctx, ref)
	if err == nil {
		o.close()
	}
	return err
}

// origin is what forks of one snapshot have in common. Until it is closed the
// snapshot cannot be removed; each machine inherits that.
type origin struct {
	snap snapshot.Snapshot
	root string // path of the root image
	pin  *os.File
}

func (o *origin) close() { _ = o.pin.Close() } // only read

// origin finds and pins a snapshot and checks that this engine can restore it.
func (m *Manager) origin(ctx context.Context, ref string) (_ *origin, err error) {
	o := &origin{}
	if o.snap, o.pin, err = m.pin(ref); err != nil {
		return nil, err
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(o.pin.Close)
	man := o.snap.Manifest
	if man.Engine != m.Engine.Name() || man.EngineVersion != m.Engine.Version() {
		err = fmt.Errorf("%w: snapshot %s was made by %s %s, this is %s %s", errdef.ErrConflict, ref,
			man.Engine, man.EngineVersion, m.Engine.Name(), m.Engine.Version())
		return nil, errdef.WithHint(err, "make it again: tine snapshot create --replace "+ref)
	}
	img, err := m.Images.Get(man.Image)
	if err == nil {
		o.root = img.RootPath()
		_, err = os.Stat(o.root)
	}
	if err != nil {
		// Not its category: what is missing is not what the caller asked for.
		return nil, fmt.Errorf("%w: snapshot %s: its image: %s", errdef.ErrConflict, ref, err.Error())
	}
	if err = m.Snapshots.Verify(ctx, o.snap); err != nil {
		return nil, err
	}
	return o, nil
}

// pin finds a snapshot and keeps it from being removed. When it goes between
// the two, its tag may have been given to another.
func (m *Manager) pin(ref string) (snapshot.Snapshot, *os.File, error) {
	const tries = 3
	for try := 1; ; try++ {
		snap, err := m.Snapshots.Resolve(ref)
		if err != nil {
			return snap, nil, err
		}
		pin, err := m.Snapshots.Pin(snap)
		if err == nil || !errors.Is(err, errdef.ErrNotFound) || try == tries {
			return snap, pin, err
		}
	}
}

// bring restores a machine and waits until its guest has confirmed that it is
// unique. The caller holds a place and has entered; on error the place is
// given back. The record on disk says Creating until somebody has been given
// the sandbox.
func (m *Manager) bring(ctx context.Context, o *origin) (_ *box, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.Limits.Identity, fmt.Errorf("%w: the guest did not confirm its identity in time", errdef.ErrTimeout))
	defer cancel()
	b, err := m.restore(ctx, o)
	if err != nil {
		m.drop()
		return nil, err
	}
	if err = m.admit(b); err != nil {
		return nil, errors.Join(err, b.destroy())
	}
	if err = b.identify(ctx); err != nil {
		return nil, errors.Join(err, b.order(context.WithoutCancel(ctx), end))
	}
	return b, nil
}

// restore makes the directory and the machine of a fork.
func (m *Manager) restore(ctx context.Context, o *origin) (_ *box, err error) {
	r := m.newRecord(newID())
	r.SnapshotTag, r.SnapshotDigest, r.Machine = o.snap.Tag, o.snap.Digest, o.snap.Manifest.Machine
	if err = r.create(m.Dir, m.self); err != nil {
		return nil, err
	}
	vm, err := m.Engine.Restore(ctx, vmm.RestoreSpec{
		Common: m.common(r.ID, r.Machine, o.root, o.pin),
		Memory: o.snap.MemoryPath(),
		Device: o.snap.DevicePath(),
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(m.dir(r.ID)))
	}
	r.PID, r.Handle = vm.PID(), vm.Handle()
	return newBox(m, vm, r), nil
}

// identify opens the first session, in which the guest becomes unlike all
// others.
func (b *box) identify(ctx context.Context) error {
	ctx, cancel := join(ctx, b.ctx)
	defer cancel()
	id := guest.NewIdentity(b.id, b.id)
	c, err := dial(ctx, b.vm, &id)
	if err != nil {
		return err
	}
	return b.adoptSession(c)
}

// kill ends a machine, whatever has happened to the call that started it.
func (m *Manager) kill(vm vmm.VM) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(m.ctx), killTimeout)
	defer cancel()
	return vm.Kill(ctx)
}

// newRecord is the first record of a machine that this process starts.
func (m *Manager) newRecord(id string) record {
	now := time.Now()
	r := record{Version: recordVersion, Info: Info{
		ID:         id,
		State:      Creating,
		Engine:     m.Engine.Name(),
		CreatedAt:  now,
		LastActive: now,
	}}
	if m.Ephemeral {
		r.Owner = m.self
	}
	return r
}

func (m *Manager) common(id string, shape vmm.Machine, root string, leases ...*os.File) vmm.Common {
	return vmm.Common{
		ID: id, Dir: m.dir(id), Machine: shape, Root: root,
		Leases: leases, DieWithParent: m.Ephemeral,
	}
}

// A sandbox's id is idPrefix and idDigits letters and digits, 60 random bits:
// a host name may have them.
const (
	idPrefix = "sb-"
	idDigits = 12
)

func newID() string {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	return idPrefix + strings.ToLower(base32.StdEncoding.EncodeToString(b[:])[:idDigits])
}

// isID reports whether newID could have made the name.
func isID(name string) bool {
	digits, ok := strings.CutPrefix(name, idPrefix)
	return ok && len(digits) == idDigits && strings.Trim(digits, "abcdefghijklmnopqrstuvwxyz234567") == ""
}
