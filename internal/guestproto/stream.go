package guestproto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Stream is one exchange between host and agent. Send may be called from
// several goroutines, Recv from one.
type Stream struct {
	id      uint32
	verb    Verb
	session *Session
	ctx     context.Context
	cancel  context.CancelCauseFunc
	more    bool // agent: the request goes on in ChanRequest

	mu       sync.Mutex
	queue    []Chunk
	ended    bool // the peer sends nothing more
	window   int  // what the peer may still send
	consumed int  // what was read and not yet given back as credit
	credit   int  // what we may still send

	readable chan struct{} // holds a token when Recv has something to look at
	room     chan struct{} // holds a token when Send has
}

// Chunk is a piece of what a peer sent.
type Chunk struct {
	Channel Channel
	Data    []byte
	Final   bool // it came with the peer's End
}

func newStream(s *Session, id uint32, verb Verb) *Stream {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &Stream{
		id: id, verb: verb, session: s, ctx: ctx, cancel: cancel,
		window: Window, credit: Window,
		readable: make(chan struct{}, 1), room: make(chan struct{}, 1),
	}
}

// Verb is what the stream asks for.
func (st *Stream) Verb() Verb { return st.verb }

// Context ends with the stream. Its cause says why: a *ResetError, the error
// given to Session.Fail, or ErrStreamOver.
func (st *Stream) Context() context.Context { return st.ctx }

// open sends the Open frame and what of the request does not fit in it.
func (st *Stream) open(ctx context.Context, body []byte, end bool) error {
	head := []byte{byte(st.verb), 0}
	first := body[:min(len(body), MaxData)]
	rest := body[len(first):]
	if end {
		head[1] |= FlagEnd
	}
	if len(rest) > 0 {
		head[1] |= FlagMore
	}
	if err := st.session.write(ctx, TypeOpen, st, head, first); err != nil || len(rest) == 0 {
		return err
	}
	if _, err := st.Send(ctx, ChanRequest, rest); err != nil {
		return err
	}
	if _, err := st.Send(ctx, ChanRequest, nil); err != nil {
		return err
	}
	if end {
		return st.session.write(ctx, TypeEnd, st)
	}
	return nil
}

// Request completes the request whose first part accept was given.
func (st *Stream) Request(ctx context.Context, first []byte) ([]byte, error) {
	if !st.more {
		return append([]byte(nil), first...), nil
	}
	parts, size := [][]byte{first}, len(first)
	for st.more {
		c, err := st.Recv(ctx)
		if err != nil {
			return nil, err
		}
		if size += len(c.Data); c.Channel != ChanRequest || size > MaxRequest {
			return nil, fmt.Errorf("%w: bad request", ErrProtocol)
		}
		parts = append(parts, c.Data)
		st.more = len(c.Data) > 0
	}
	body := make([]byte, 0, size)
	for i, p := range parts {
		body = append(body, p...)
		if i > 0 {
			clear(p) // a request may hold secrets: its one copy is the caller's to clear
		}
	}
	return body, nil
}

// More reports whether the request is longer than what accept was given.
func (st *Stream) More() bool { return st.more }

// Send sends p on channel ch, in as many frames as it takes, waiting for
// credit. It returns how much of p was sent.
func (st *Stream) Send(ctx context.Context, ch Channel, p []byte) (int, error) {
	sent := 0
	for {
		n, err := st.take(ctx, min(len(p)-sent, MaxData), min(len(p)-sent, 1))
		if err != nil {
			return sent, err
		}
		err = st.session.write(ctx, TypeData, st, []byte{byte(ch)}, p[sent:sent+n])
		if err != nil {
			st.refund(n)
			return sent, err
		}
		if sent += n; sent == len(p) {
			return sent, nil
		}
	}
}

// SendMessage sends m in one frame on ChanMessage.
func (st *Stream) SendMessage(ctx context.Context, m Message) error {
	body := Encode(m)
	if len(body) > MaxData {
		return fmt.Errorf("message %T of %d bytes is over the limit", m, len(body))
	}
	if _, err := st.take(ctx, len(body), len(body)); err != nil {
		return err
	}
	return st.session.write(ctx, TypeData, st, []byte{byte(ChanMessage)}, body)
}

// take waits until a frame of at least low bytes may be sent, and pays for one
// of at most high.
func (st *Stream) take(ctx context.Context, high, low int) (int, error) {
	for {
		if st.ctx.Err() != nil {
			return 0, context.Cause(st.ctx)
		}
		if n, ok := st.tryTake(high, low); ok {
			return n, nil
		}
		select {
		case <-st.room:
		case <-st.ctx.Done():
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

func (st *Stream) tryTake(high, low int) (int, bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	n := min(high, st.credit-FrameCost)
	if n < low {
		return 0, false
	}
	st.credit -= n + FrameCost
	if st.credit > FrameCost {
		signal(st.room) // another sender may have use for what is left
	}
	return n, true
}

// refund takes back what a frame of n bytes cost that was not sent: a caller
// whose ctx has ended may try again.
func (st *Stream) refund(n int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	st.credit += n + FrameCost
	signal(st.room)
}

// End says that nothing more comes from this side. From the agent it ends the
// stream, and m, if not nil, is the last message.
func (st *Stream) End(ctx context.Context, m Message) error {
	var last []byte
	if m != nil {
		last = Append([]byte{byte(ChanMessage)}, m)
	}
	if st.ctx.Err() != nil {
		return context.Cause(st.ctx)
	}
	if st.session.accept == nil {
		return st.session.write(ctx, TypeEnd, st, last)
	}
	if !st.session.remove(st) {
		return ErrStreamOver
	}
	err := st.session.write(ctx, TypeEnd, st, last)
	st.cancel(ErrStreamOver)
	return err
}

// Reset ends the stream at once and tells the peer why. A stream that is over
// stays as it is.
func (st *Stream) Reset(code, message string) {
	if !st.session.remove(st) && st.ctx.Err() != nil {
		return
	}
	if len(message) > MaxResetMessage {
		message = message[:MaxResetMessage]
	}
	st.cancel(&ResetError{Code: code, Message: message})
	// The peer learns of a failed link by itself.
	_ = st.session.write(context.Background(), TypeReset, st, Encode(&Reset{Code: code, Message: message}))
}

// Recv returns what the peer sent next; its data belongs to the caller. At the
// end it returns io.EOF, or the cause of the stream's end. ctx bounds the wait.
func (st *Stream) Recv(ctx context.Context) (Chunk, error) {
	for {
		c, owed, err := st.pop()
		if owed > 0 {
			var b [8]byte
			if werr := st.session.write(ctx, TypeCredit, st, appendCredit(b[:0], owed)); werr != nil {
				st.cancel(werr) // the link is gone; what is queued is still good
			}
		}
		if !errors.Is(err, errEmpty) {
			return c, err
		}
		select {
		case <-st.readable:
		case <-st.ctx.Done():
		case <-ctx.Done():
			return Chunk{}, context.Cause(ctx)
		}
	}
}

// errEmpty says that Recv has to wait. It never leaves the package.
var errEmpty = errors.New("nothing to read")

// pop takes a chunk off the queue and says how much credit is to be given back.
func (st *Stream) pop() (c Chunk, owed int, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if len(st.queue) == 0 {
		switch {
		case st.ended:
			return Chunk{}, 0, io.EOF
		case st.ctx.Err() != nil:
			return Chunk{}, 0, context.Cause(st.ctx)
		}
		return Chunk{}, 0, errEmpty
	}
	c = st.queue[0]
	st.queue[0] = Chunk{}
	if st.queue = st.queue[1:]; len(st.queue) == 0 {
		st.queue = nil
	}
	if !c.Final {
		st.consumed += len(c.Data) + FrameCost
	}
	if st.consumed >= Window/4 && !st.ended {
		owed, st.consumed = st.consumed, 0
		st.window += owed
	}
	return c, owed, nil
}

// deliver takes a frame of this stream.
func (st *Stream) deliver(f Frame) error {
	switch f.Type {
	case TypeData:
		if len(f.Payload) < 1 {
			return fmt.Errorf("%w: data without a channel", ErrProtocol)
		}
		return st.push(f.Payload, false)
	case TypeEnd:
		return st.deliverEnd(f.Payload)
	case TypeCredit:
		n, err := parseCredit(f.Payload)
		if err != nil {
			return err
		}
		return st.addCredit(n)
	case TypeReset:
		return st.deliverReset(f.Payload)
	default:
		return fmt.Errorf("%w: frame of type %d in a stream", ErrProtocol, f.Type)
	}
}

func (st *Stream) push(payload []byte, final bool) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended {
		return fmt.Errorf("%w: data after the end", ErrProtocol)
	}
	c := Chunk{Channel: Channel(payload[0]), Data: append([]byte(nil), payload[1:]...), Final: final}
	if cost := len(c.Data) + FrameCost; !final {
		if cost > st.window {
			return fmt.Errorf("%w: more data than the window allows", ErrProtocol)
		}
		st.window -= cost
	}
	st.queue = append(st.queue, c)
	st.ended = final
	signal(st.readable)
	return nil
}

func (st *Stream) deliverEnd(payload []byte) error {
	if len(payload) > 0 {
		if err := st.push(payload, true); err != nil {
			return err
		}
	}
	st.mu.Lock()
	st.ended = true
	st.mu.Unlock()
	signal(st.readable)
	if st.session.accept == nil {
		st.session.remove(st)
		st.cancel(ErrStreamOver)
	}
	return nil
}

func (st *Stream) addCredit(n int) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.credit+n > Window {
		return fmt.Errorf("%w: more credit than was used", ErrProtocol)
	}
	st.credit += n
	signal(st.room)
	return nil
}

func (st *Stream) deliverReset(payload []byte) error {
	var m Reset
	if err := Decode(payload, &m); err != nil {
		return err
	}
	if len(m.Message) > MaxResetMessage {
		return fmt.Errorf("%w: reset with a message of %d bytes", ErrProtocol, len(m.Message))
	}
	st.session.remove(st)
	st.cancel(&ResetError{Code: m.Code, Message: m.Message})
	return nil
}

// signal puts a token in c, unless it holds one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
