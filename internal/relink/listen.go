package relink

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// helloTime is how long a connection may take to say hello.
	helloTime = 5 * time.Second
	// maxStrangers is how many may be about to.
	maxStrangers = 8
)

// Acceptor is where a guest's connections come from.
type Acceptor interface {
	Accept() (io.ReadWriteCloser, error)
	// Close ends Accept.
	Close() error
}

// Listener is a guest's end: of all streams that hosts open, the last one lives.
// A connection that says nothing that makes sense disturbs nobody.
type Listener struct {
	from  Acceptor
	grace time.Duration
	fresh chan *Stream  // the stream that lives, until Accept has it
	done  chan struct{} // closed when no more connections come
	err   error         // why done is closed
	work  sync.WaitGroup

	mu        sync.Mutex
	stream    *Stream                     // the one that lives, or lived last
	turn      int                         // of the connection that spoke last
	strangers map[io.ReadWriteCloser]bool // that have said nothing yet
	closed    bool
}

// Listen takes connections of an Acceptor, which belongs to the Listener from
// then on. Its streams end when they have been without a connection for grace.
func Listen(from Acceptor, grace time.Duration) *Listener {
	l := &Listener{
		from: from, grace: grace, fresh: make(chan *Stream, 1), done: make(chan struct{}),
		strangers: map[io.ReadWriteCloser]bool{},
	}
	l.work.Go(l.listen)
	return l
}

// Accept waits for a new stream. By then the one before is over; its user still
// has to close it. One that is over before it was accepted may never show.
func (l *Listener) Accept() (*Stream, error) {
	select {
	case s := <-l.fresh:
		return s, nil
	case <-l.done:
		return nil, l.err
	}
}

// Close ends the listener and waits for it. The stream that lives goes on if it
// was accepted, but gets no other connection.
func (l *Listener) Close() error {
	err := l.from.Close()
	l.work.Wait()
	select {
	case s := <-l.fresh:
		err = errors.Join(err, s.Close())
	default:
	}
	return err
}

func (l *Listener) listen() {
	var err error
	for turn := 1; err == nil; turn++ {
		var conn io.ReadWriteCloser
		if conn, err = l.from.Accept(); err == nil {
			l.meet(conn, turn)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for conn := range l.strangers {
		_ = conn.Close() // it has said nothing
	}
	l.err = fmt.Errorf("accept connection of host: %w", err)
	close(l.done)
}

// meet waits for a connection's hello, in another goroutine.
func (l *Listener) meet(conn io.ReadWriteCloser, turn int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.strangers) == maxStrangers {
		_ = conn.Close() // the others have their time
		return
	}
	l.strangers[conn] = true
	l.work.Go(func() { l.serve(conn, turn) })
}

// serve gives a connection to the stream that it is for. One that is for none
// is told so, and closed.
func (l *Listener) serve(conn io.ReadWriteCloser, turn int) {
	late := time.AfterFunc(helloTime, func() { _ = conn.Close() })
	defer late.Stop()
	b := make([]byte, helloSize)
	var said byte
	_, err := io.ReadFull(conn, b)
	if err == nil {
		said = l.take(conn, b, turn, late)
	}
	if said == saidUnknown || said == saidVersion {
		late.Reset(helloTime)
		_, _ = conn.Write(answer{said: said}.encode()) // it may have gone
	}
	l.mu.Lock()
	delete(l.strangers, conn)
	l.mu.Unlock()
	if said != saidYes {
		_ = conn.Close() // it has come to nothing
	}
}

// take is the answer to a hello, 0 for none. With saidYes the connection is its
// stream's, which sends it. late closes the connection.
func (l *Listener) take(conn io.ReadWriteCloser, b []byte, turn int, late *time.Timer) byte {
	h, err := parseHello(b)
	switch {
	case errors.Is(err, errdef.ErrUnsupported):
		return saidVersion
	case err != nil:
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	// One that came before the connection that lives was given up by its host.
	if l.closed || turn < l.turn || !late.Stop() {
		return 0
	}
	if h.want == wantNew {
		l.begin(conn, h)
	} else if l.stream == nil || !l.stream.resume(conn, h) {
		return saidUnknown
	}
	l.turn = turn
	return saidYes
}

// begin begins a new stream. l.mu is held.
func (l *Listener) begin(conn io.ReadWriteCloser, h hello) {
	if l.stream != nil {
		l.stream.replace()
	}
	s := newStream(h.id, l.grace)
	s.mu.Lock()
	s.attach(conn, place{}, place{}, answer{said: saidYes}.encode())
	s.mu.Unlock()
	l.stream = s
	select {
	case old := <-l.fresh: // it is over, and nobody has seen it
		l.work.Go(func() { _ = old.Close() })
	default:
	}
	l.fresh <- s
}

// resume gives a guest's stream a connection that is for it, and says whether
// it is.
func (s *Stream) resume(conn io.ReadWriteCloser, h hello) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil || s.id != h.id || s.check(h.place) != nil {
		return false
	}
	ours := s.place()
	s.attach(conn, h.place, ours, answer{said: saidYes, place: ours}.encode())
	return true
}
