package relink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// How a host tries to get a connection: each try may take longer than the one
// before, and begins longer after it.
const (
	firstPatience = 500 * time.Millisecond
	maxPatience   = 8 * time.Second
	firstPause    = 5 * time.Millisecond
	maxPause      = time.Second
)

// A host learns that a guest has dropped a connection only when it sends
// something. After each new connection it therefore sends something a few times:
// a guest that is to drop its connections, as it was frozen or restored, may do
// so after it has taken the new one.
const (
	firstProbe = 50 * time.Millisecond
	lastProbe  = 4 * time.Second
	probeEvery = 4 // times as long after the last
)

// Dial makes a connection to the guest. The context bounds the call only. An
// error with ErrGone ends the stream; after any other there is another try.
type Dial func(ctx context.Context) (io.ReadWriteCloser, error)

// caller is what only a host's stream has: it gets connections.
type caller struct {
	dial   Dial
	ctx    context.Context // ends with the stream
	cancel context.CancelCauseFunc
	wake   chan struct{} // holds a token when a connection was lost

	// Of the stream's mutex:
	up    chan struct{}      // closed while there is a connection
	tries int                // without a connection that lasted
	abort context.CancelFunc // ends the try under way
}

// Open opens a host's stream to the guest that dial reaches. In the guest it
// takes the place of any other. It tries until ctx ends, or dial says ErrGone, or
// the guest is one that it cannot speak with. ctx bounds the call only. The
// stream dials whenever it has lost its connection, from a goroutine of its own
// that Close waits for, so dial must heed its context.
func Open(ctx context.Context, dial func(context.Context) (io.ReadWriteCloser, error)) (*Stream, error) {
	var last error
	for tries := 0; ; tries++ {
		s, err := open(ctx, dial, tries)
		switch {
		case err == nil:
			return s, nil
		case final(err):
			return nil, fmt.Errorf("open stream to guest: %w", err)
		case ctx.Err() == nil:
			last = err
		case last == nil:
			return nil, fmt.Errorf("open stream to guest: %w", err)
		default:
			return nil, fmt.Errorf("open stream to guest: %w, and before that: %w", context.Cause(ctx), last)
		}
	}
}

// open is one try. Each has a stream of its own: nobody knows how far the guest
// has come with that of a try that failed.
func open(ctx context.Context, dial Dial, tries int) (*Stream, error) {
	var id [IDSize]byte
	if _, err := unix.Getrandom(id[:], 0); err != nil {
		return nil, os.NewSyscallError("getrandom", err)
	}
	s := newStream(id, Grace)
	c := &caller{dial: dial, wake: make(chan struct{}, 1), up: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	s.caller = c
	pause, patience := effort(tries)
	try, cancel := context.WithTimeout(ctx, pause+patience)
	defer cancel()
	c.abort = cancel
	if err := s.try(try, pause, wantNew); err != nil {
		c.cancel(err)
		return nil, err
	}
	s.work.Go(s.keep)
	return s, nil
}

// Reconnect gives the stream another connection, in the place of the one that it
// has: whoever knows that this one is dead, which the host cannot see, calls it. It
// waits for that, or for the stream's end. When ctx ends it returns, and the
// stream tries on. It is for hosts; in a guest it is errdef.ErrUnsupported.
func (s *Stream) Reconnect(ctx context.Context) error {
	c := s.caller
	if c == nil {
		return fmt.Errorf("%w: a guest cannot dial its host", errdef.ErrUnsupported)
	}
	s.mu.Lock()
	if s.err != nil {
		defer s.mu.Unlock()
		return s.err
	}
	s.drop()
	c.tries = 0
	c.abort()
	up := c.up
	s.mu.Unlock()
	select {
	case <-up:
		return nil
	case <-c.ctx.Done():
		return s.failure()
	case <-ctx.Done():
		return fmt.Errorf("reconnect to guest: %w", context.Cause(ctx))
	}
}

// failure is why the stream is over, or nil.
func (s *Stream) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// lost says that there is no connection any more. One that has lasted is worth
// another at once; a guest that ends each would keep the host busy otherwise. The
// stream's mutex is held.
func (c *caller) lost(lasted time.Duration) {
	if lasted >= maxPause {
		c.tries = 0
	}
	c.up = make(chan struct{})
	select {
	case c.wake <- struct{}{}:
	default: // there is a token
	}
}

// keep gets a connection whenever there is none, until the stream is over.
func (s *Stream) keep() {
	for s.watch() {
		if err := s.redial(); final(err) {
			s.mu.Lock()
			s.fail(err)
			s.mu.Unlock()
		}
	}
}

// watch waits until there is no connection, and says whether one is wanted.
func (s *Stream) watch() bool {
	c := s.caller
	wait := firstProbe
	timer := time.NewTimer(wait)
	defer timer.Stop()
	for s.connected() {
		select {
		case <-c.ctx.Done():
		case <-c.wake:
		case <-timer.C:
			if wait <= lastProbe {
				s.probe()
				wait *= probeEvery
				timer.Reset(wait)
			}
		}
		if c.ctx.Err() != nil {
			return false
		}
	}
	return c.ctx.Err() == nil
}

func (s *Stream) connected() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.carrier != nil
}

// probe has something sent.
func (s *Stream) probe() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ack = true
	s.sendable.Signal()
}

// redial tries once to get a connection.
func (s *Stream) redial() error {
	c := s.caller
	s.mu.Lock()
	pause, patience := effort(c.tries)
	c.tries++
	ctx, cancel := context.WithTimeout(c.ctx, pause+patience)
	defer cancel()
	c.abort = cancel
	s.mu.Unlock()
	return s.try(ctx, pause, wantResume)
}

func effort(tries int) (pause, patience time.Duration) {
	n := min(tries, 10)
	if n > 0 {
		pause = min(firstPause<<n, maxPause)
	}
	return pause, min(firstPatience<<n, maxPatience)
}

// final says whether to try again is of no use.
func final(err error) bool {
	for _, reason := range []error{ErrGone, ErrUnknown, ErrProtocol, errdef.ErrUnsupported} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// try gets the stream a connection. It gives up when ctx ends.
func (s *Stream) try(ctx context.Context, pause time.Duration, want byte) error {
	if err := sleep(ctx, pause); err != nil {
		return err
	}
	conn, err := s.caller.dial(ctx)
	if errors.Is(err, ErrGone) {
		return fmt.Errorf("%w: dial: %w", errdef.ErrUnavailable, err)
	}
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	ours, theirs, err := s.greet(conn, want)
	stop()
	if err == nil {
		err = s.connect(ctx, conn, theirs, ours)
	}
	if err != nil {
		_ = conn.Close() // the reason is err
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-ctx.Done():
		case <-timer.C:
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// greet says hello, and returns where this end is, and the other.
func (s *Stream) greet(conn io.ReadWriter, want byte) (ours, theirs place, err error) {
	s.mu.Lock()
	ours = s.place()
	s.mu.Unlock()
	h := hello{want: want, id: s.id, place: ours}
	if _, err = conn.Write(h.encode()); err != nil {
		return place{}, place{}, fmt.Errorf("greet guest: %w", err)
	}
	b := make([]byte, answerSize)
	if _, err = io.ReadFull(conn, b); err != nil {
		return place{}, place{}, fmt.Errorf("wait for guest's answer: %w", err)
	}
	theirs, err = parseAnswer(b)
	return ours, theirs, err
}

// connect makes a connection that was greeted the stream's, unless ctx has
// ended: Reconnect, which ends it, wants one that is newer.
func (s *Stream) connect(ctx context.Context, conn io.ReadWriteCloser, theirs, ours place) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	if err := s.check(theirs); err != nil {
		return err
	}
	s.attach(conn, theirs, ours, nil)
	close(s.caller.up)
	return nil
}
