package relink

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// linger bounds how long an end waits for a connection that it has no more use
// for: in Close, for what was written to leave.
const linger = 250 * time.Millisecond

// Stream is one end of a byte stream. Its methods are safe for concurrent use.
type Stream struct {
	id     [IDSize]byte
	grace  time.Duration
	caller *caller // nil in a guest

	writing sync.Mutex // held by Write, so that no two mix

	mu       sync.Mutex
	readable sync.Cond // for Read: there are bytes, or an end
	writable sync.Cond // for Write: there is room, or an end
	sendable sync.Cond // for the carrier: there is something to send, or no more
	carrier  *carrier  // nil while there is no connection
	losses   int       // counts connections that were lost
	timer    *time.Timer
	err      error // why the stream is over

	// What is written: out begins at byte number acked.
	out   fifo
	acked uint64 // the other end has read all before it
	sent  uint64 // the next to send
	most  uint64 // no byte from here on was ever sent

	// What is received and not yet read: in ends at byte number received.
	in       fifo
	received uint64
	told     uint64 // the other end knows that all before it was read
	ack      bool   // say how much was read, however little
	bye      bool   // say bye when all is sent

	work sync.WaitGroup // all goroutines of the stream
}

func newStream(id [IDSize]byte, grace time.Duration) *Stream {
	s := &Stream{id: id, grace: grace}
	s.readable.L, s.writable.L, s.sendable.L = &s.mu, &s.mu, &s.mu
	return s
}

// Read reads what the other end wrote. It waits while there is nothing, with or
// without a connection. After all that was written before a Close comes io.EOF;
// any other end of the stream shows at once, and is an error, in the category
// errdef.ErrUnavailable or with ErrProtocol. In a guest, io.EOF is also the end of
// a stream whose place a newer one took.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.in.len() == 0 && s.err == nil {
		s.readable.Wait()
	}
	if s.in.len() == 0 || s.err != nil && !errors.Is(s.err, io.EOF) {
		return 0, s.err
	}
	n := copy(p, s.in.bytes())
	s.in.drop(n)
	if s.place().read-s.told >= ackEvery {
		s.sendable.Signal()
	}
	return n, nil
}

// Write takes all of p to send it. It waits while the window is full, with or
// without a connection. That it took p does not say that the other end will
// read it: the stream may end before.
func (s *Stream) Write(p []byte) (int, error) {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := 0
	for taken < len(p) {
		for s.out.len() == Window && s.err == nil {
			s.writable.Wait()
		}
		if errors.Is(s.err, io.EOF) {
			return taken, io.ErrClosedPipe
		} else if s.err != nil {
			return taken, s.err
		}
		n := min(Window-s.out.len(), len(p)-taken)
		s.out.push(p[taken : taken+n])
		taken += n
		s.sendable.Signal()
	}
	return taken, nil
}

// Close ends the stream, and waits until all that it started has ended. If there
// is a connection that takes it, what was written is sent first, and the other
// end is told; that is given up after a short time. Otherwise the other end
// finds out by its grace.
func (s *Stream) Close() error {
	s.mu.Lock()
	s.bye = s.carrier != nil
	s.over(os.ErrClosed)
	if c := s.carrier; c != nil {
		patience := time.AfterFunc(linger, func() { s.lose(c) })
		defer patience.Stop()
	}
	s.mu.Unlock()
	s.work.Wait()
	return nil
}

// over ends the stream for whoever uses it, for the first reason given. A
// connection is still there. s.mu is held.
func (s *Stream) over(err error) {
	if s.err != nil {
		return
	}
	s.err = err
	if s.timer != nil {
		s.timer.Stop()
	}
	if s.caller != nil {
		s.caller.cancel(err)
	}
	s.readable.Broadcast()
	s.writable.Broadcast()
	s.sendable.Broadcast()
}

// fail ends the stream and its connection. Without a connection it is the same
// as over. s.mu is held.
func (s *Stream) fail(err error) {
	s.over(err)
	s.drop()
}

// replace ends a guest's stream as if its host had hung up. What that said last
// is for nobody.
func (s *Stream) replace() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil || errors.Is(s.err, io.EOF) {
		s.in.reset()
	}
	s.fail(io.EOF)
}

// place is how far this end has come. s.mu is held.
func (s *Stream) place() place {
	return place{received: s.received, read: s.received - uint64(s.in.len())}
}

// check says what is wrong with where the other end says it is. s.mu is held.
func (s *Stream) check(p place) error {
	if p.read < s.acked || p.received < p.read || p.received > s.most {
		return violation("other end has received %d and read %d bytes, of %d to %d", p.received, p.read, s.acked, s.most)
	}
	return nil
}

// attach gives the stream a connection, in the place of the one that it may
// have. The other end is at theirs, which has been checked, and knows what it
// was told of ours. first is sent before anything else. s.mu is held, and the
// stream is not over.
func (s *Stream) attach(conn io.ReadWriteCloser, theirs, ours place, first []byte) {
	s.drop()
	if s.timer != nil {
		s.timer.Stop()
	}
	s.acknowledge(theirs.read)
	s.sent, s.told = theirs.received, ours.read
	c := &carrier{stream: s, conn: conn, since: time.Now()}
	s.carrier = c
	s.work.Go(c.receive)
	s.work.Go(func() { c.send(first) })
}

// lose ends a connection, if it is still the stream's.
func (s *Stream) lose(c *carrier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.carrier == c {
		s.drop()
	}
}

// drop lets go of the connection, if there is one. From then on it can do
// nothing to the stream, which has its grace to get another. s.mu is held.
func (s *Stream) drop() {
	c := s.carrier
	if c == nil {
		return
	}
	s.carrier = nil
	_ = c.conn.Close() // there is nothing to be done with it
	s.sendable.Broadcast()
	if s.err != nil {
		return
	}
	s.losses++
	loss := s.losses
	s.timer = time.AfterFunc(s.grace, func() { s.tooLate(loss) })
	if s.caller != nil {
		s.caller.lost(time.Since(c.since))
	}
}

func (s *Stream) tooLate(loss int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.carrier == nil && s.losses == loss {
		s.fail(fmt.Errorf("%w: %w for %s", errdef.ErrUnavailable, ErrNoConnection, s.grace))
	}
}

// acknowledge forgets what the other end has read. s.mu is held, and read is
// within bounds.
func (s *Stream) acknowledge(read uint64) {
	s.out.drop(int(read - s.acked))
	s.acked = read
	s.writable.Signal()
}

// carrier is one connection of a stream. Two goroutines run it until it is lost.
type carrier struct {
	stream *Stream
	conn   io.ReadWriteCloser
	since  time.Time
}

// receive takes what comes until the connection ends.
func (c *carrier) receive() {
	var d decoder
	buf := make([]byte, MaxData)
	for {
		n, err := c.conn.Read(buf)
		more := c.stream.take(c, &d, buf[:n])
		clear(buf[:n]) // as in fifo
		if err != nil {
			c.stream.lose(c)
		}
		if err != nil || !more {
			return
		}
	}
}

// take takes what came on a connection, if it is still the stream's.
func (s *Stream) take(c *carrier, d *decoder, b []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(b) > 0 && s.carrier == c {
		f, n, err := d.next(b)
		if err == nil {
			err = s.takeFrame(f)
		}
		if err != nil {
			s.fail(err)
		}
		b = b[n:]
	}
	return s.carrier == c
}

// takeFrame takes a frame. s.mu is held.
func (s *Stream) takeFrame(f frame) error {
	switch f.kind {
	case kindData:
		return s.deliver(f.data)
	case kindAck:
		if f.read < s.acked || f.read > s.sent {
			return violation("%d bytes read, of %d to %d", f.read, s.acked, s.sent)
		}
		s.acknowledge(f.read)
	case kindBye:
		s.fail(io.EOF)
	}
	return nil
}

// deliver keeps what came for Read. s.mu is held.
func (s *Stream) deliver(data []byte) error {
	if s.err != nil {
		return nil // it is closed here, and says its last
	}
	if len(data) > Window-s.in.len() {
		return violation("more than the window of %d bytes", Window)
	}
	s.in.push(data)
	s.received += uint64(len(data))
	s.readable.Broadcast()
	return nil
}

// send sends what there is to send until the connection ends.
func (c *carrier) send(first []byte) {
	s, buf := c.stream, first
	s.mu.Lock()
	defer s.mu.Unlock()
	for last := false; s.carrier == c && !last; {
		buf, last = s.frames(buf)
		if len(buf) == 0 {
			s.sendable.Wait()
			continue
		}
		s.mu.Unlock()
		_, err := c.conn.Write(buf)
		buf = buf[:0]
		s.mu.Lock()
		if err != nil {
			// What has come may not be read yet, the other end's bye for one: it
			// is receive that finds the end, if there is one to be found.
			time.AfterFunc(linger, func() { s.lose(c) })
			return
		}
	}
	if s.carrier == c {
		s.drop()
	}
}

// frames appends what is to be sent now, and says whether it is the last there
// will be. s.mu is held.
func (s *Stream) frames(b []byte) (frames []byte, last bool) {
	if read := s.place().read; s.ack || read-s.told >= ackEvery {
		b = appendAck(b, read)
		s.told, s.ack = read, false
	}
	rest := s.out.bytes()[s.sent-s.acked:]
	if len(rest) > 0 {
		data := rest[:min(len(rest), MaxData)]
		b = appendData(b, data)
		s.sent += uint64(len(data))
		s.most = max(s.most, s.sent)
		rest = rest[len(data):]
	}
	if last = s.bye && len(rest) == 0; last {
		b = appendBye(b)
	}
	return b, last
}
