// Package deadline is the part of a net.Conn that is the same for every
// connection which is none of the kernel's: deadlines that can be moved while
// somebody waits for them.
package deadline

import (
	"context"
	"os"
	"sync"
	"time"
)

// Deadline bounds one direction of a connection. It is made by New, and safe
// for concurrent use.
type Deadline struct {
	mu     sync.Mutex
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer // nil without a deadline
	turn   int         // counts deadlines: a timer that fires late is none
	closed bool
}

// New returns a Deadline that is not set.
func New() *Deadline {
	d := &Deadline{}
	d.ctx, d.cancel = context.WithCancelCause(context.Background())
	return d
}

// Context ends when the deadline passes, also one that is set later; its cause
// is os.ErrDeadlineExceeded. After Close its cause is what Close was given. An
// operation takes one Context and uses it to its end.
func (d *Deadline) Context() context.Context {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ctx
}

// Set moves the deadline; zero is none. Operations that wait wait for the new
// one.
func (d *Deadline) Set(t time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	if d.timer != nil {
		d.timer.Stop()
		d.timer = nil
	}
	d.turn++
	if d.ctx.Err() != nil {
		d.ctx, d.cancel = context.WithCancelCause(context.Background())
	}
	if t.IsZero() {
		return
	}
	left := time.Until(t)
	if left <= 0 {
		d.cancel(os.ErrDeadlineExceeded)
		return
	}
	turn := d.turn
	d.timer = time.AfterFunc(left, func() { d.pass(turn) })
}

func (d *Deadline) pass(turn int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if turn == d.turn {
		d.cancel(os.ErrDeadlineExceeded)
	}
}

// Close ends the Context for good, and says why. Only the first call has an
// effect; it reports whether it was that.
func (d *Deadline) Close(cause error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.closed = true
	d.turn++
	if d.timer != nil {
		d.timer.Stop()
	}
	if d.ctx.Err() != nil { // a deadline has passed, and is not why it ends
		d.ctx, d.cancel = context.WithCancelCause(context.Background())
	}
	d.cancel(cause)
	return true
}

// Pair are the deadlines of a connection's two directions. A connection that
// embeds one has the methods of a net.Conn that set them.
type Pair struct{ Reads, Writes *Deadline }

// NewPair returns a Pair of which neither is set.
func NewPair() Pair { return Pair{Reads: New(), Writes: New()} }

// SetDeadline sets both deadlines. It never fails.
func (p Pair) SetDeadline(t time.Time) error {
	p.Reads.Set(t)
	p.Writes.Set(t)
	return nil
}

// SetReadDeadline bounds reading. It never fails.
func (p Pair) SetReadDeadline(t time.Time) error {
	p.Reads.Set(t)
	return nil
}

// SetWriteDeadline bounds writing. It never fails.
func (p Pair) SetWriteDeadline(t time.Time) error {
	p.Writes.Set(t)
	return nil
}
