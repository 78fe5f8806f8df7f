package guest

import (
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	queueSoft = 256 << 10 // senders of data wait above this
	queueHard = 4 << 20   // above this, with what never waits, the guest is lost
)

// sendQueue holds frames on their way to the guest, in order. A guest that
// does not read makes senders of data wait, each for as long as its ctx lets
// it; what must never wait is bounded instead.
type sendQueue struct {
	fail func(error)

	mu      sync.Mutex
	pending []byte
	spare   []byte
	over    bool

	wake chan struct{} // holds a token when there is something to write
	room chan struct{} // holds a token when there may be room
}

func newSendQueue(fail func(error)) *sendQueue {
	return &sendQueue{fail: fail, wake: make(chan struct{}, 1), room: make(chan struct{}, 1)}
}

// push adds raw bytes, whatever the length of the queue.
func (q *sendQueue) push(b []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.pending = append(q.pending, b...)
}

// WriteFrame puts a frame in the queue.
func (q *sendQueue) WriteFrame(ctx context.Context, t guestproto.FrameType, stream uint32, parts ...[]byte) error {
	waits := t == guestproto.TypeData || t == guestproto.TypeOpen
	for {
		ok, err := q.try(waits, t, stream, parts)
		if err != nil || ok {
			return err
		}
		select {
		case <-q.room:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (q *sendQueue) try(waits bool, t guestproto.FrameType, stream uint32, parts [][]byte) (bool, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch {
	case q.over:
		token(q.room) // for whoever waits behind us
		return false, guestproto.ErrSessionOver
	case waits && len(q.pending) > queueSoft:
		return false, nil
	case len(q.pending) > queueHard:
		err := fmt.Errorf("%w: guest does not read", errdef.ErrUnavailable)
		go q.fail(err) // it takes locks that our caller may hold
		return false, err
	}
	q.pending = guestproto.AppendFrame(q.pending, t, stream, parts...)
	token(q.wake)
	if len(q.pending) <= queueSoft {
		token(q.room)
	}
	return true, nil
}

// run writes what is queued to w until done is closed.
func (q *sendQueue) run(w io.Writer, done <-chan struct{}) {
	for {
		batch := q.take()
		if len(batch) > 0 {
			if _, err := w.Write(batch); err != nil {
				q.fail(fmt.Errorf("%w: write to guest: %w", errdef.ErrUnavailable, err))
			}
		}
		select {
		case <-q.wake:
		case <-done:
			q.stop()
			return
		}
	}
}

// take empties the queue. The bytes are good until the next take.
func (q *sendQueue) take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	batch := q.pending
	q.pending, q.spare = q.spare[:0], batch
	token(q.room)
	return batch
}

func (q *sendQueue) stop() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.over = true
	q.pending, q.spare = nil, nil
	token(q.room)
}

// token puts a token in c, unless it holds one.
func token(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
