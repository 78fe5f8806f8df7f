package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm"
)

// box is one sandbox and the machine that it has just now. From admit on its
// goroutine, live, is the only one that ends it.
type box struct {
	m  *Manager
	id string

	// ctx ends when the sandbox can be used no more; its cause says why.
	ctx  context.Context
	stop context.CancelCauseFunc

	orders  chan order
	over    chan struct{} // closed when live has returned
	overErr error         // what later orders get; set before over is closed
	retry   time.Time     // after a failure to end it: when to try again; only for live

	mu      sync.Mutex
	vm      vmm.VM // nil when suspended, or gone before this process came
	record  record
	outlet  *outlet       // of its machine's network; nil if there is none
	removed bool          // its directory is, or is about to be
	client  *guest.Client // the present session, or nil
	inUse   int           // Withs under way
	doomed  bool          // it is to end, and live tries until it has

	retiring bool // it is idle, and being suspended

	// turn has a token that is held by whoever opens a session, needs the
	// machine at rest or gives the sandbox another, and by live in the end.
	turn chan struct{}
	look chan struct{} // tells live that its time or its machine has changed
}

// order tells live to let go of the sandbox.
type order struct {
	what action
	done chan error // has room for the answer
}

type action bool

const (
	end   action = true  // the machine ends, and all of it is removed
	leave action = false // the machine goes on without this process
)

// Why a sandbox can be used no more, beside errClosed and its own death.
var (
	errRemoved = fmt.Errorf("%w: it was removed", errdef.ErrNotFound)
	errExpired = fmt.Errorf("%w: its time was up", errdef.ErrNotFound)
)

func newBox(m *Manager, vm vmm.VM, r record) *box {
	b := &box{
		m: m, id: r.ID, vm: vm, record: r,
		orders: make(chan order),
		over:   make(chan struct{}),
		turn:   make(chan struct{}, 1),
		look:   make(chan struct{}, 1),
	}
	b.ctx, b.stop = context.WithCancelCause(context.WithoutCancel(m.ctx))
	if r.State == Dead {
		b.stop(deadError(r.Reason))
	}
	return b
}

func deadError(reason string) error {
	return fmt.Errorf("%w: it is dead: %s", errdef.ErrConflict, reason)
}

func (b *box) info() Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.record.Info
}

// listed reports whether the sandbox was handed out.
func (b *box) listed() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.record.State != Creating
}

// live waits for the sandbox's end, whichever way it comes, and ends it.
func (b *box) live() {
	defer close(b.over)
	defer b.stop(errRemoved) // has been called by then; this frees the context
	var noted vmm.VM         // the machine whose end we know of
	for over := false; !over; {
		vm := b.machine()
		var gone <-chan struct{}
		if vm != nil && vm != noted {
			gone = vm.Done()
		}
		timer := time.NewTimer(b.untilExpiry())
		select {
		case o := <-b.orders:
			err := b.obey(o.what)
			over = err == nil || o.what == leave
			o.done <- err
		case <-gone:
			noted = vm
			over = b.died(vm)
		case <-b.look:
		case <-timer.C:
			over = b.expire()
		}
		timer.Stop()
	}
}

// machine is the sandbox's machine just now, or nil.
func (b *box) machine() vmm.VM {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.vm
}

// take waits for the sandbox's turn. Sessions that are open go on meanwhile.
func (b *box) take(ctx context.Context) (release func(), err error) {
	select {
	case b.turn <- struct{}{}:
		return func() { <-b.turn }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (b *box) obey(what action) error {
	if what == end {
		b.mu.Lock()
		b.doomed = true
		b.stop(errRemoved)
		b.mu.Unlock()
		return b.destroy()
	}
	b.stop(errClosed)
	b.overErr = fmt.Errorf("sandbox %s: %w", b.id, errClosed)
	b.turn <- struct{}{} // whoever has it gives up now
	b.hangUp()
	b.disconnect()
	b.m.remove(b)
	if vm := b.machine(); vm != nil {
		return vm.Detach()
	}
	return nil
}

// order gives live an order and waits until it is carried out, or ctx ends. An
// order that has been taken is carried out even then.
func (b *box) order(ctx context.Context, what action) error {
	o := order{what: what, done: make(chan error, 1)}
	select {
	case b.orders <- o:
	case <-b.over:
		if what == leave {
			return nil // it is gone, or left
		}
		return b.overErr
	case <-ctx.Done():
		return fmt.Errorf("end sandbox %s: %w", b.id, context.Cause(ctx))
	}
	select {
	case err := <-o.done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("end sandbox %s: %w", b.id, context.Cause(ctx))
	}
}

// never is a wait that no sandbox outlives.
const never = 1000 * time.Hour

// untilExpiry is how long the sandbox may go on if nothing happens.
func (b *box) untilExpiry() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return max(b.restLocked(), time.Until(b.retry))
}

// restLocked is how much is left of the sandbox's time.
func (b *box) restLocked() time.Duration {
	rest := never
	r := &b.record
	if b.doomed {
		rest = 0
	}
	if !r.ExpiresAt.IsZero() {
		rest = min(rest, time.Until(r.ExpiresAt))
	}
	if r.IdleTTL > 0 && b.inUse == 0 && r.State != Suspended && !b.retiring {
		rest = min(rest, time.Until(r.LastActive.Add(r.IdleTTL)))
	}
	return rest
}

// expire ends the sandbox if its time is still up, or has it suspended if it
// is only idle and wants that.
func (b *box) expire() (over bool) {
	b.mu.Lock()
	up := b.restLocked() <= 0
	if up && b.idleLocked() {
		b.retiring = true
		b.mu.Unlock()
		b.m.suspendIdle(b)
		return false
	}
	first := up && !b.doomed
	if up {
		b.doomed = true
		b.stop(errExpired) // under the lock, so that no use begins now
	}
	b.mu.Unlock()
	if !up {
		return false
	}
	if first {
		b.m.Logger.Info("sandbox expired", "sandbox", b.id)
		b.m.Events.Add(Expired, b.id, EventData{})
	}
	return b.tryDestroy()
}

// idleLocked reports whether idleness is all that is up, and suspends.
func (b *box) idleLocked() bool {
	r := &b.record
	old := !r.ExpiresAt.IsZero() && !time.Now().Before(r.ExpiresAt)
	return r.IdleSuspend && r.State == Running && !b.doomed && !old
}

// died notes that the machine ended without being asked to.
func (b *box) died(vm vmm.VM) (over bool) {
	reason := "the guest powered off or restarted"
	if err := vm.Err(); err != nil {
		reason = err.Error()
	}
	b.mu.Lock()
	if b.vm != vm { // the sandbox has another, or none, and had this one ended
		b.mu.Unlock()
		return false
	}
	if b.record.State == Creating {
		b.doomed = true // nobody will ever ask how it died
	} else {
		b.record.State, b.record.Reason = Dead, reason
		b.record.OutOfMemory = errors.Is(vm.Err(), vmm.ErrOutOfMemory)
	}
	oom := b.record.OutOfMemory
	doomed := b.doomed
	err := b.saveLocked()
	b.stop(deadError(reason))
	b.mu.Unlock()
	b.m.Logger.Warn("sandbox died", "sandbox", b.id, "reason", reason)
	if oom {
		b.m.Events.Add(OutOfMemory, b.id, EventData{Reason: reason})
	}
	if !doomed {
		b.m.Events.Add(Died, b.id, EventData{Reason: reason})
	}
	if err != nil {
		b.m.Logger.Error("death not recorded", "sandbox", b.id, "error", err)
	}
	b.hangUp()
	b.disconnect()
	if !doomed {
		return false
	}
	b.m.unpark(b)
	return b.tryDestroy()
}

// tryDestroy is destroy when nobody is there to be told of an error.
func (b *box) tryDestroy() (over bool) {
	err := b.destroy()
	if err != nil {
		b.m.Logger.Error("sandbox could not be removed", "sandbox", b.id, "error", err)
	}
	return err == nil
}

// killTimeout bounds the wait for a killed machine's process to be gone. A
// process in uninterruptible sleep is the only reason for a long one.
const killTimeout = 30 * time.Second

// destroy ends the machine and gives everything back: the directory after the
// machine, so that one that could not be ended is found again, and the place
// last, for only then is there room for another.
func (b *box) destroy() error {
	b.turn <- struct{}{} // stop has been called: whoever has it gives up now
	defer func() { <-b.turn }()
	b.hangUp()
	b.disconnect()
	b.disown()
	err := b.killMachine()
	if err == nil {
		err = b.m.dropHeld(b.id)
	}
	if err == nil {
		b.mu.Lock()
		b.removed = true
		b.mu.Unlock()
		err = os.RemoveAll(b.m.dir(b.id))
	}
	if err != nil {
		b.retry = time.Now().Add(killTimeout)
		return fmt.Errorf("end sandbox %s: %w", b.id, err)
	}
	b.m.remove(b)
	b.m.Events.gone(b)
	return nil
}

func (b *box) killMachine() error {
	if vm := b.machine(); vm != nil {
		return b.m.kill(vm)
	}
	strays, err := findMachines()
	if err != nil {
		return err
	}
	return endAll(strays[b.id])
}

// hangUp ends the session; stop has seen to it that there will be no other.
func (b *box) hangUp() {
	b.mu.Lock()
	c := b.client
	b.client = nil
	b.mu.Unlock()
	if c != nil {
		_ = c.Close() // it only waits
	}
}

// saveLocked writes the record, unless the sandbox is being removed.
func (b *box) saveLocked() error {
	if b.removed {
		return nil
	}
	return b.record.save(b.m.Dir)
}

// use counts as activity from now until the function it returns is called.
func (b *box) use() (done func(), err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		return nil, context.Cause(b.ctx)
	}
	b.inUse++
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.inUse--
		b.record.LastActive = time.Now()
		b.glance()
	}, nil
}

// glance makes live look at the time and the machine again.
func (b *box) glance() {
	select {
	case b.look <- struct{}{}:
	default:
	}
}

// session returns the session with the agent, and makes one when there is
// none or when it broke. A sandbox that is suspended is resumed.
func (b *box) session(ctx context.Context) (*guest.Client, error) {
	release, err := b.take(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if b.info().State == Suspended {
		if err = b.resume(ctx); err != nil {
			return nil, fmt.Errorf("resume: %w", err)
		}
	}
	return b.talk(ctx)
}

// talk is session for one who has the turn, of a sandbox with a machine.
func (b *box) talk(ctx context.Context) (*guest.Client, error) {
	b.mu.Lock()
	c, vm := b.client, b.vm
	b.mu.Unlock()
	if c != nil {
		if c.Err() == nil {
			return c, nil
		}
		_ = c.Close() // it has ended; this waits until it has let go of the line
	}
	if vm == nil || b.ctx.Err() != nil {
		return nil, context.Cause(b.ctx)
	}
	c, err := dial(ctx, vm)
	if err != nil {
		return nil, err
	}
	return c, b.adoptSession(c)
}

// adoptSession makes c the session, unless the sandbox is over.
func (b *box) adoptSession(c *guest.Client) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ctx.Err() != nil {
		_ = c.Close() // it only waits
		return context.Cause(b.ctx)
	}
	b.client = c
	return nil
}

// deathNotice is how long after its last word a machine's end may show.
const deathNotice = 250 * time.Millisecond

// explain adds to the error of a session that broke what became of its sandbox.
func (b *box) explain(err error) error {
	late := time.NewTimer(deathNotice)
	defer late.Stop()
	select {
	case <-b.ctx.Done():
	case <-late.C:
		return err
	}
	why := context.Cause(b.ctx)
	if errors.Is(err, why) {
		return err
	}
	return fmt.Errorf("%w; sandbox %s: %s", err, b.id, why.Error()) // one category is enough
}

// sessionTimeout bounds how long an agent may take to answer a new session.
// What it has not answered after firstPatience is asked again on a new
// connection, and that is given twice as long.
const (
	sessionTimeout = 20 * time.Second
	firstPatience  = time.Second
)

var errNoAnswer = fmt.Errorf("%w: the guest's agent did not answer", errdef.ErrTimeout)

// dial opens a session with an agent that has had hosts before. One of them may
// have ended in the middle of what the guest told it, as a daemon does that is
// killed: QEMU 7.2 can then hold back all that the guest says from there on,
// until one more connection has come and gone (see docs/engines.md).
func dial(ctx context.Context, vm vmm.VM) (*guest.Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, sessionTimeout, errNoAnswer)
	defer cancel()
	for patience := firstPatience; ; patience *= 2 {
		c, err := dialOnce(ctx, vm, patience)
		if err == nil || ctx.Err() != nil || !errors.Is(err, errNoAnswer) {
			return c, cause(vm, err)
		}
	}
}

func dialOnce(ctx context.Context, vm vmm.VM, patience time.Duration) (*guest.Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errNoAnswer)
	defer cancel()
	stream, err := vm.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return guest.Dial(ctx, stream)
}

// introduce opens the first session that an agent has, and gives the guest its
// identity. The caller bounds the time.
func introduce(ctx context.Context, vm vmm.VM, id guest.Identity) (*guest.Client, error) {
	stream, err := vm.Dial(ctx)
	if err != nil {
		return nil, cause(vm, err)
	}
	c, err := guest.DialIdentity(ctx, stream, id)
	return c, cause(vm, err)
}

// cause adds to err the machine's end, if that is what it comes from.
func cause(vm vmm.VM, err error) error {
	select {
	case <-vm.Done():
		return errors.Join(err, vm.Err())
	default:
		return err
	}
}
