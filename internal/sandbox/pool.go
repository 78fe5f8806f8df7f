package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm"
)

// pool keeps forks of one snapshot parked: restored, made unique, run once and
// paused, so that handing one out costs a resume and a step of its clock. The
// Manager's mutex guards its fields; its goroutine, fill, makes its forks.
type pool struct {
	origin *origin
	want   int
	idle   []*box        // parked and paused
	kick   chan struct{} // tells fill that something has changed
	ctx    context.Context
	stop   context.CancelFunc
	over   chan struct{} // closed when fill has returned
}

// maxPool bounds a pool's size.
const maxPool = 256

// SetPool keeps n forks of the snapshot parked. While n is not 0 the snapshot
// cannot be removed; 0 ends the pool, and waits for the end of its forks.
func (m *Manager) SetPool(ctx context.Context, ref string, n int) error {
	if n < 0 || n > maxPool {
		return fmt.Errorf("%w: pool of %d: it must be 0 to %d", errdef.ErrInvalid, n, maxPool)
	}
	ctx, done, err := m.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	if n == 0 {
		snap, resolveErr := m.Snapshots.Resolve(ref)
		if resolveErr != nil {
			return resolveErr
		}
		return m.endPool(ctx, snap.Digest)
	}
	if err = m.flatten(ctx, ref); err != nil {
		return err
	}
	o, err := m.origin(ctx, ref)
	if err != nil {
		return err
	}
	surplus, err := m.resize(o, n)
	return errors.Join(err, endBoxes(ctx, surplus))
}

// resize makes a pool of n, of the pool that there is or of a new one, and
// returns the forks that are too many. It owns o.
func (m *Manager) resize(o *origin, n int) (surplus []*box, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[o.snap.Digest]
	if p == nil {
		p = &pool{origin: o, kick: make(chan struct{}, 1), over: make(chan struct{})}
		p.ctx, p.stop = context.WithCancel(m.ctx)
		m.pools[o.snap.Digest] = p
		m.calls.Go(func() { m.fill(p) })
	} else {
		err = o.close()
	}
	p.want = n
	if len(p.idle) > n {
		surplus = slices.Clone(p.idle[n:])
		p.idle = slices.Delete(p.idle, n, len(p.idle))
	}
	p.wake()
	return surplus, err
}

// endPool ends the pool of a snapshot, if there is one.
func (m *Manager) endPool(ctx context.Context, digest string) error {
	m.mu.Lock()
	p := m.pools[digest]
	if p == nil {
		m.mu.Unlock()
		return nil
	}
	delete(m.pools, digest)
	idle := p.idle
	p.want, p.idle = 0, nil
	m.mu.Unlock()
	p.stop()
	err := endBoxes(ctx, idle)
	select {
	case <-p.over:
		return err
	case <-ctx.Done():
		return errors.Join(err, context.Cause(ctx))
	}
}

func endBoxes(ctx context.Context, boxes []*box) error {
	var errs []error
	for _, b := range boxes {
		errs = append(errs, b.order(ctx, end))
	}
	return errors.Join(errs...)
}

// movePool gives the pool of the snapshot that a tag pointed at to the one
// that it points at now.
func (m *Manager) movePool(ctx context.Context, digest, tag string) error {
	m.mu.Lock()
	p, want := m.pools[digest], 0
	if p != nil {
		want = p.want
	}
	m.mu.Unlock()
	if want == 0 {
		return nil
	}
	return errors.Join(m.endPool(ctx, digest), m.SetPool(ctx, tag, want))
}

// Pool says how many forks of the snapshot are parked, and how many should be.
func (m *Manager) Pool(ref string) (ready, want int) {
	snap, err := m.Snapshots.Resolve(ref)
	if err != nil {
		return 0, 0
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[snap.Digest]
	if p == nil {
		return 0, 0
	}
	return len(p.idle), p.want
}

func (p *pool) wake() {
	select {
	case p.kick <- struct{}{}:
	default:
	}
}

// retryFill is how long the filler waits after a fork that failed.
const retryFill = 5 * time.Second

// fill parks forks one after the other, for as long as the pool lives.
func (m *Manager) fill(p *pool) {
	defer close(p.over)
	defer p.stop()
	defer func() {
		if err := p.origin.close(); err != nil {
			m.Logger.Warn("snapshot not let go", "snapshot", p.origin.snap.Digest, "error", err)
		}
	}()
	said := "" // so that a lasting trouble is told of once
	for p.ctx.Err() == nil {
		wait := never
		if m.short(p) {
			p.pause()
			err := m.park(p)
			if err == nil {
				said = ""
				continue
			}
			if text := err.Error(); p.ctx.Err() == nil && text != said {
				said = text
				m.Logger.Warn("pool fork failed", "snapshot", p.origin.snap.Digest, "error", err)
			}
			wait = retryFill
		}
		p.sleep(wait)
	}
}

// yieldTime is how long a pool that has just given a fork away waits before
// it makes another: whoever got that one is about to use it, and a restore
// would take a processor from it. On two cores that doubled the time to the
// first answer.
const yieldTime = 100 * time.Millisecond

// pause waits until nobody has taken a fork for yieldTime.
func (p *pool) pause() {
	for {
		timer := time.NewTimer(yieldTime)
		select {
		case <-p.kick: // another one went, or the pool has changed
			timer.Stop()
		case <-timer.C:
			return
		case <-p.ctx.Done():
			timer.Stop()
			return
		}
	}
}

// sleep waits until there may be something to do.
func (p *pool) sleep(most time.Duration) {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-p.kick:
	case <-timer.C:
	case <-p.ctx.Done():
	}
}

// short reports whether the pool lacks a fork.
func (m *Manager) short(p *pool) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(p.idle) < p.want
}

// park adds one fork to the pool.
func (m *Manager) park(p *pool) error {
	if err := m.hold(1); err != nil {
		return err
	}
	leave, err := m.enter(p.ctx)
	if err != nil {
		m.drop()
		return err
	}
	defer leave()
	b, err := m.bring(p.ctx, p.origin, secrets{}, vmm.Limits{})
	if err != nil {
		return err
	}
	late := context.WithoutCancel(p.ctx)
	if err = b.warm(p.ctx, p.origin.snap.Manifest.Languages); err != nil {
		return errors.Join(err, b.order(late, end))
	}
	kept, err := m.keep(p, b)
	if kept {
		return nil
	}
	return errors.Join(err, b.order(late, end))
}

// keep puts a warm fork into its pool, unless the pool has shrunk or the fork
// has died meanwhile.
func (m *Manager) keep(p *pool, b *box) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if b.ctx.Err() != nil {
		return false, context.Cause(b.ctx)
	}
	if len(p.idle) >= p.want {
		return false, nil
	}
	p.idle = append(p.idle, b)
	return true, nil
}

// warmCode is an expression in every language that has a warm interpreter. It
// has a value, so that the ways out are warm too.
const warmCode = "[6 * 7, 2.5, 'a']"

// warmEvals is how often it is evaluated: the first took 130 ms here, the
// second 14, the third 7, and from then on it is 4.
const warmEvals = 3

// warm runs what the first caller will run, so that the emulator has
// translated it and the pages it writes are there, and pauses the machine.
func (b *box) warm(ctx context.Context, languages []string) error {
	ctx, cancel := b.bound(ctx)
	defer cancel()
	c, err := b.session(ctx)
	if err != nil {
		return err
	}
	if _, err := c.Ping(ctx); err != nil {
		return err
	}
	for _, language := range languages {
		for range warmEvals {
			if _, err := c.Eval(ctx, guest.EvalRequest{Language: language, Code: warmCode}); err != nil {
				return err
			}
		}
	}
	if _, err := c.Run(ctx, guest.ExecSpec{Argv: []string{"/bin/true"}}, nil, 1<<10); err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	if err := c.SetClock(ctx); err != nil { // the step that wake will ask for
		return err
	}
	return b.machine().Pause(ctx)
}

// bound ends work on a sandbox that nobody has yet with the sandbox, and when
// its guest takes too long.
func (b *box) bound(ctx context.Context) (context.Context, func()) {
	ctx, leave := join(ctx, b.ctx)
	ctx, cancel := context.WithTimeoutCause(ctx, b.m.Limits.Identity, errNoAnswer)
	return ctx, func() { cancel(); leave() }
}

// wake lets a parked fork run again. One that does not is ended.
func (m *Manager) wake(ctx context.Context, b *box) bool {
	err := b.awake(ctx)
	if err == nil {
		return true
	}
	endErr := b.order(context.WithoutCancel(ctx), end)
	if ctx.Err() == nil {
		m.Logger.WarnContext(ctx, "parked fork did not wake", "sandbox", b.id, "error", errors.Join(err, endErr))
	}
	return false
}

func (b *box) awake(ctx context.Context) error {
	ctx, cancel := b.bound(ctx)
	defer cancel()
	c, err := b.session(ctx)
	if err != nil {
		return err
	}
	// The clock's new value waits at the guest's door when it wakes up.
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return c.SetClock(ctx) })
	group.Go(func() error { return b.machine().Resume(ctx) })
	if err = group.Wait(); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.record.FromPool = true
	return nil
}

// unpark takes a fork that died out of its pool.
func (m *Manager) unpark(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pools[b.info().SnapshotDigest]
	if p == nil {
		return
	}
	p.idle = slices.DeleteFunc(p.idle, func(other *box) bool { return other == b })
	p.wake()
}
