package guestproto

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
)

// Session is one side's view of the streams between one host and one agent,
// from a Hello until the next. It is safe for concurrent use, but Deliver must
// be called from one goroutine.
type Session struct {
	out    FrameWriter
	accept func(*Stream, []byte) // nil on the host

	mu      sync.Mutex
	streams map[uint32]*Stream
	next    uint32 // host: the id of the next stream
	err     error  // why the session is over
}

// NewHost returns the host's side of a session.
func NewHost(out FrameWriter) *Session {
	return &Session{out: out, streams: map[uint32]*Stream{}, next: 1}
}

// NewAgent returns the agent's side of a session. It calls accept for each new
// stream, from Deliver, with the request's first part, which is good only
// during the call; accept must not block on the stream.
func NewAgent(out FrameWriter, accept func(s *Stream, request []byte)) *Session {
	return &Session{out: out, accept: accept, streams: map[uint32]*Stream{}}
}

// Open opens a stream with a request of any length up to MaxRequest. With end,
// the host has nothing more to send. ctx bounds the call only.
func (s *Session) Open(ctx context.Context, verb Verb, request Message, end bool) (*Stream, error) {
	body := Encode(request)
	if len(body) > MaxRequest {
		return nil, fmt.Errorf("request of %d bytes is over the limit of %d", len(body), MaxRequest)
	}
	st, err := s.newStream(verb)
	if err != nil {
		return nil, err
	}
	if err = st.open(ctx, body, end); err != nil {
		st.Reset(CodeCanceled, "request not sent")
		return nil, err
	}
	return st, nil
}

func (s *Session) newStream(verb Verb) (*Stream, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return nil, s.err
	case len(s.streams) >= MaxStreams:
		return nil, ErrTooManyStreams
	case s.next == math.MaxUint32:
		return nil, fmt.Errorf("%w: stream ids used up", ErrSessionOver)
	}
	st := newStream(s, s.next, verb)
	s.next++
	s.streams[st.id] = st
	return st, nil
}

// Fail ends the session and all its streams; err is the cause of their
// contexts. Only the first call has an effect.
func (s *Session) Fail(err error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	s.err = err
	streams := s.streams
	s.streams = nil
	s.mu.Unlock()
	for _, st := range streams {
		st.cancel(err)
	}
}

// Deliver takes a frame from the peer. It never waits for a stream's reader,
// and keeps no reference to the frame. An error says that the peer broke the
// protocol; the agent resets the stream and goes on, the host should give up.
func (s *Session) Deliver(f Frame) error {
	if f.Type == TypeOpen {
		return s.deliverOpen(f)
	}
	st, known := s.find(f.Stream)
	if st == nil {
		if known || s.accept != nil {
			return nil // it ended here while the frame was on its way
		}
		return fmt.Errorf("%w: frame for stream %d, which was never opened", ErrProtocol, f.Stream)
	}
	err := st.deliver(f)
	if err != nil && s.accept != nil {
		st.Reset("invalid", err.Error())
	}
	return err
}

// find returns the stream, if it is open, and whether it ever was.
func (s *Session) find(id uint32) (st *Stream, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.streams[id], id > 0 && id < s.next || s.err != nil
}

func (s *Session) deliverOpen(f Frame) error {
	if s.accept == nil || len(f.Payload) < 2 || f.Stream == 0 {
		return fmt.Errorf("%w: unexpected open", ErrProtocol)
	}
	st := newStream(s, f.Stream, Verb(f.Payload[0]))
	st.more = f.Payload[1]&FlagMore != 0
	st.ended = f.Payload[1]&FlagEnd != 0 && !st.more
	err := s.insert(st)
	if errors.Is(err, ErrTooManyStreams) {
		st.Reset("exhausted", fmt.Sprintf("%d streams are open already", MaxStreams))
		return nil
	}
	if err == nil {
		s.accept(st, f.Payload[2:])
	}
	return err
}

func (s *Session) insert(st *Stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case s.streams[st.id] != nil:
		return fmt.Errorf("%w: stream %d is open already", ErrProtocol, st.id)
	case len(s.streams) >= MaxStreams:
		return ErrTooManyStreams
	}
	s.streams[st.id] = st
	return nil
}

// remove forgets a stream and reports whether it was there.
func (s *Session) remove(st *Stream) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.streams[st.id] != st {
		return false
	}
	delete(s.streams, st.id)
	return true
}

// write sends a frame of a stream.
func (s *Session) write(ctx context.Context, t FrameType, st *Stream, parts ...[]byte) error {
	return s.out.WriteFrame(ctx, t, st.id, parts...)
}

func appendCredit(dst []byte, n int) []byte { return binary.AppendUvarint(dst, uint64(n)) }

func parseCredit(b []byte) (int, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || v > Window {
		return 0, fmt.Errorf("%w: bad credit", ErrProtocol)
	}
	return int(v), nil
}
