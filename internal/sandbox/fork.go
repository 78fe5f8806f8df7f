package sandbox

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm"
)

// Fork makes req.N sandboxes. The error is for requests that could not be
// begun; what became of each child is in its result. A caller who cancels ctx
// while there are children to come gets none: those that there are end.
func (m *Manager) Fork(ctx context.Context, req ForkRequest) (results []ForkResult, err error) {
	if err = m.check(req); err != nil {
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
	defer func() { err = errors.Join(err, o.close()) }()
	if req.Net, err = m.compiled(req.Net, o.snap.Manifest.Machine); err != nil {
		return nil, fmt.Errorf("fork %s: %w", req.Snapshot, err)
	}
	parked, err := m.reserve(req, o.snap.Digest)
	if err != nil {
		return nil, err
	}
	if err = m.heat(inner, o, req.N); err != nil {
		m.Logger.WarnContext(inner, "forks not counted", "snapshot", o.snap.Digest, "error", err)
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
	case size > maxLabels:
		return fmt.Errorf("%w: %d bytes of labels, %d allowed", errdef.ErrInvalid, size, maxLabels)
	}
	return errors.Join(checkLimits(req.Limits), guest.CheckSecrets(req.secrets().values))
}

// reserve takes a place for each child: that of a parked fork where there is
// one, which it takes out of its pool, and a free one where there is not.
func (m *Manager) reserve(req ForkRequest, digest string) (parked []*box, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[digest]
	ready := 0
	if p != nil && !req.NoPool && !req.KeepSecrets && len(req.Secrets) == 0 {
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
		var leave func()
		if leave, err = m.enter(ctx); err != nil {
			m.drop()
			return nil, err
		}
		defer leave()
		if b, err = m.bring(ctx, o, req.secrets(), req.Limits); err != nil {
			return nil, err
		}
	}
	if err = b.equip(req); err == nil {
		err = b.handOut(req, start)
	}
	if err != nil {
		return nil, errors.Join(err, b.order(context.WithoutCancel(ctx), end))
	}
	return b, nil
}

// equip gives the sandbox what its caller allows it to take and to reach.
func (b *box) equip(req ForkRequest) error {
	b.mu.Lock()
	vm, shape, has := b.vm, b.record.Machine, b.record.Limits
	limits := b.m.LimitsOf(req.Limits, shape)
	b.record.MemoryLimitMiB, b.record.Limits, b.record.Net = req.Limits.MemoryMiB, limits, req.Net
	b.mu.Unlock()
	if limits != has { // it was parked
		if err := vm.SetLimits(limits); err != nil {
			return fmt.Errorf("limit sandbox: %w", err)
		}
	}
	if req.Net != nil {
		if err := b.m.keepSecrets(b.id, req.Net.Secrets); err != nil {
			return fmt.Errorf("keep secrets: %w", err)
		}
	}
	return b.connect(vm)
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
	r.IdleTTL, r.IdleSuspend, r.Labels = req.IdleTTL, req.IdleSuspend, maps.Clone(req.Labels)
	if req.Lifetime > 0 {
		r.ExpiresAt = now.Add(req.Lifetime)
	}
	r.ForkMS = float64(now.Sub(start).Microseconds()) / 1000
	if err := r.save(b.m.Dir); err != nil {
		return err
	}
	b.record = r
	b.m.Events.handedOut(r.Info)
	b.glance()
	return nil
}

// CanFork reports why the snapshot cannot be forked here, or nil if it can.
func (m *Manager) CanFork(ctx context.Context, ref string) error {
	o, err := m.origin(ctx, ref)
	if err != nil {
		return err
	}
	return o.close()
}

// bring restores a machine and waits until its guest has confirmed that it is
// unique. The caller holds a place and has entered; on error the place is
// given back. The record on disk says Creating until somebody has been given
// the sandbox.
func (m *Manager) bring(ctx context.Context, o *origin, s secrets, limits vmm.Limits) (_ *box, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.Limits.Identity, fmt.Errorf("%w: the guest did not confirm its identity in time", errdef.ErrTimeout))
	defer cancel()
	b, err := m.restore(ctx, o, limits)
	if err != nil {
		m.drop()
		return nil, err
	}
	if err = m.admit(b); err != nil {
		return nil, errors.Join(err, b.destroy())
	}
	if err = b.identify(ctx, s); err != nil {
		return nil, errors.Join(err, b.order(context.WithoutCancel(ctx), end))
	}
	return b, nil
}

// restore makes the directory and the machine of a fork.
func (m *Manager) restore(ctx context.Context, o *origin, asked vmm.Limits) (_ *box, err error) {
	r := m.newRecord(newID())
	r.SnapshotTag, r.SnapshotDigest, r.Machine = o.snap.Tag, o.snap.Digest, o.snap.Manifest.Machine
	r.Origin, r.Head = o.snap.Digest, o.snap.Digest
	r.Limits = m.LimitsOf(asked, r.Machine)
	if err = r.create(m.Dir, m.self); err != nil {
		return nil, err
	}
	vm, err := m.raise(ctx, o, r.ID, firstSeat, r.Limits)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(m.dir(r.ID)))
	}
	r.PID, r.Handle = vm.PID(), vm.Handle()
	return newBox(m, vm, r), nil
}

// raise brings a machine up from a snapshot, at a seat of the sandbox id.
func (m *Manager) raise(ctx context.Context, o *origin, id, seat string, limits vmm.Limits) (vmm.VM, error) {
	common, err := m.common(id, seat, o.snap.Manifest.Machine, o.root)
	if err != nil {
		return nil, err
	}
	common.Leases, common.Limits = o.pins, limits
	vm, err := m.Engine.Restore(ctx, vmm.RestoreSpec{
		Common: common, Memory: o.base.Path, Device: o.snap.DevicePath(), Fill: o.fill, Disk: o.snap.DiskPaths(),
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(common.Dir))
	}
	return vm, nil
}

// identify opens the first session, in which the guest becomes unlike all
// others.
func (b *box) identify(ctx context.Context, s secrets) error {
	ctx, cancel := join(ctx, b.ctx)
	defer cancel()
	c, err := introduce(ctx, b.machine(), s.identity(b.id))
	if err != nil {
		return err
	}
	return b.adoptSession(c)
}

// secrets are what a machine is trusted with from its first session on.
type secrets struct {
	values []guest.Secret
	keep   bool // those of its parent too
}

func (req *ForkRequest) secrets() secrets {
	s := secrets{keep: req.KeepSecrets}
	for _, name := range slices.Sorted(maps.Keys(req.Secrets)) {
		s.values = append(s.values, guest.Secret{Name: name, Value: []byte(req.Secrets[name])})
	}
	return s
}

// identity is who a fork is, with what it is trusted with.
func (s secrets) identity(id string) guest.Identity {
	who := guest.NewIdentity(id, id)
	who.Secrets, who.KeepSecrets = s.values, s.keep
	return who
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

// A sandbox has two seats for machines, directories in its own, so that the
// next one can come up while the last one is still there.
const (
	firstSeat  = "0"
	secondSeat = "1"
)

// common makes the seat and says what a machine needs that takes it.
func (m *Manager) common(id, seat string, shape vmm.Machine, root string) (vmm.Common, error) {
	dir := filepath.Join(m.dir(id), seat)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return vmm.Common{}, fmt.Errorf("make room for a machine: %w", err)
	}
	return vmm.Common{ID: id, Dir: dir, Machine: shape, Root: root, DieWithParent: m.Ephemeral}, nil
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
