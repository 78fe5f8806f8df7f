// Package guest is the host's side of guestproto: a Client on the byte stream
// to a guest's agent.
//
// Whatever comes from the guest is hostile: all of it is bounded and checked,
// and a guest that breaks the protocol loses its own session and nothing else.
// Errors that the agent reports are in the category that it names, so callers
// test them with errors.Is.
package guest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// What the guest says, as guestproto has it.
type (
	// Identity is what makes one fork unlike another; see NewIdentity.
	Identity = guestproto.Identity
	// Pong is the agent's answer to a ping.
	Pong = guestproto.Pong
	// Exit is how a process ended.
	Exit = guestproto.Exit
	// ProcessInfo describes a process that the agent started.
	ProcessInfo = guestproto.ProcessInfo
	// Entry describes a file.
	Entry = guestproto.Entry
	// Event is a change to a watched file.
	Event = guestproto.Event
	// Secret is a value that a guest is trusted with; see CheckSecrets.
	Secret = guestproto.Secret
	// Change is a path at which the guest's files are not those of its image.
	Change = guestproto.Change
)

// maxNoise is how much of earlier sessions may come before our own begins.
const maxNoise = 16 << 20

// Client is one session with an agent. It is safe for concurrent use. The ctx
// of each call bounds that call; when it ends, the agent is told to stop.
type Client struct {
	rw      io.ReadWriteCloser
	out     *sendQueue
	session *guestproto.Session
	nonce   []byte
	acked   chan struct{} // closed when the session is confirmed
	agent   string        // the agent's version, once acked
	evals   atomic.Int64  // ids given to evaluations

	work sync.WaitGroup
	done chan struct{}
	once sync.Once
	err  error // why done is closed
}

// errClosed is the error of a client after Close.
var errClosed = fmt.Errorf("%w: guest connection is closed", errdef.ErrUnavailable)

// Dial starts a session on rw, which belongs to the client from then on, even
// on error. Bytes of earlier sessions that still come are dropped. Processes in
// the guest are not disturbed.
func Dial(ctx context.Context, rw io.ReadWriteCloser) (*Client, error) {
	c := newClient(rw)
	c.start()
	if err := c.await(ctx); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// DialIdentity is Dial and Identify in one round trip. When the guest does not
// confirm its new identity, there is no client: such a fork must not be used.
func DialIdentity(ctx context.Context, rw io.ReadWriteCloser, id Identity) (*Client, error) {
	c := newClient(rw)
	err := c.dialIdentity(ctx, &id)
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) dialIdentity(ctx context.Context, id *Identity) error {
	prepare(ctx, id)
	if err := CheckSecrets(id.Secrets); err != nil {
		return err
	}
	long := len(id.Secrets) > 0
	if long {
		c.start() // the request may have to wait for credit
	}
	st, err := c.session.Open(ctx, guestproto.VerbIdentity, id, true)
	if !long {
		c.start() // now both leave in one write
	}
	if err != nil {
		return c.explain(err)
	}
	if err = c.await(ctx); err != nil {
		return err
	}
	return c.identified(ctx, st, id)
}

func newClient(rw io.ReadWriteCloser) *Client {
	c := &Client{rw: rw, nonce: make([]byte, guestproto.NonceSize), acked: make(chan struct{}), done: make(chan struct{})}
	_, _ = rand.Read(c.nonce) // crypto/rand never fails
	c.out = newSendQueue(c.fail)
	c.session = guestproto.NewHost(c.out)
	hello := guestproto.Hello{Version: guestproto.Version, Nonce: c.nonce}
	c.out.push(guestproto.AppendFrame([]byte{0, 0}, guestproto.TypeHello, 0, guestproto.Encode(&hello)))
	return c
}

func (c *Client) start() {
	c.work.Go(func() { c.out.run(c.rw, c.done) })
	c.work.Go(c.read)
}

// await waits until the agent has confirmed the session.
func (c *Client) await(ctx context.Context) error {
	select {
	case <-c.acked:
		return nil
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return fmt.Errorf("guest does not answer: %w", context.Cause(ctx))
	}
}

// read takes what the guest sends until the session is over.
func (c *Client) read() {
	frames := guestproto.NewReader(&limitUntil{r: c.rw, left: maxNoise, acked: c.acked})
	for {
		f, err := frames.Next()
		if !c.confirmed() {
			err = c.preamble(f, err)
		} else if err == nil {
			err = c.session.Deliver(f)
		}
		if err != nil {
			c.fail(readError(err))
			return
		}
	}
}

func (c *Client) confirmed() bool {
	select {
	case <-c.acked:
		return true
	default:
		return false
	}
}

// preamble drops all frames but the one that confirms our own session.
func (c *Client) preamble(f guestproto.Frame, err error) error {
	if errors.Is(err, guestproto.ErrBadFrame) || err == nil && f.Type != guestproto.TypeHelloAck {
		return nil
	}
	var ack guestproto.HelloAck
	if err == nil {
		err = guestproto.Decode(f.Payload, &ack)
	}
	if err != nil {
		return err
	}
	if string(ack.Nonce) != string(c.nonce) {
		return nil
	}
	if ack.Version != guestproto.Version {
		return fmt.Errorf("%w: agent speaks protocol version %d, this host %d", errdef.ErrUnsupported, ack.Version, guestproto.Version)
	}
	c.agent = ack.Agent
	close(c.acked)
	return nil
}

// limitUntil fails a guest that sends for ever without confirming the session.
type limitUntil struct {
	r     io.Reader
	left  int
	acked <-chan struct{}
}

func (l *limitUntil) Read(p []byte) (int, error) {
	n, err := l.r.Read(p)
	if l.left -= n; l.left < 0 {
		select {
		case <-l.acked:
			l.left = 0
		default:
			return 0, fmt.Errorf("%w: %d bytes and no greeting", guestproto.ErrProtocol, maxNoise)
		}
	}
	return n, err
}

// readError says what the end of reading means for the session.
func readError(err error) error {
	switch {
	case errors.Is(err, guestproto.ErrProtocol):
		return fmt.Errorf("%w: guest broke the protocol: %w", errdef.ErrUnavailable, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.ErrClosedPipe):
		return fmt.Errorf("%w: guest closed the connection", errdef.ErrUnavailable)
	case errdef.Code(err) != "internal":
		return err
	default:
		return fmt.Errorf("%w: read from guest: %w", errdef.ErrUnavailable, err)
	}
}

// fail ends the session; only the first reason counts.
func (c *Client) fail(err error) {
	c.once.Do(func() {
		c.err = err
		close(c.done)
		c.session.Fail(err)
		_ = c.rw.Close() // the reason is err
	})
}

// Close ends the session and waits until the connection is let go of. The
// guest and its processes go on.
func (c *Client) Close() error {
	c.fail(errClosed)
	c.work.Wait()
	return nil
}

// Done is closed when the session has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is why the session has ended, or nil while it goes on.
func (c *Client) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// AgentVersion is the version of the agent in the guest.
func (c *Client) AgentVersion() string { return c.agent }

// call opens a stream that has one answer.
func (c *Client) call(ctx context.Context, verb guestproto.Verb, request, answer guestproto.Message) error {
	st, err := c.session.Open(ctx, verb, request, true)
	if err != nil {
		return c.explain(err)
	}
	return c.last(ctx, st, answer)
}

// last reads a stream's last message.
func (c *Client) last(ctx context.Context, st *guestproto.Stream, answer guestproto.Message) error {
	chunk, err := c.recv(ctx, st)
	if err != nil {
		return err
	}
	if !chunk.Final {
		return c.broke(st, "more than one answer")
	}
	return c.decode(st, chunk, answer)
}

// recv reads a stream's next chunk. An end without a last message is an error,
// and so is the end of ctx, which also cancels the stream.
func (c *Client) recv(ctx context.Context, st *guestproto.Stream) (guestproto.Chunk, error) {
	chunk, err := st.Recv(ctx)
	switch {
	case err == nil:
		return chunk, nil
	case errors.Is(err, io.EOF):
		return chunk, c.broke(st, "stream without an answer")
	case ctx.Err() != nil && st.Context().Err() == nil:
		st.Reset(guestproto.CodeCanceled, "canceled")
	}
	return chunk, c.explain(err)
}

// decode reads a chunk that must be a message.
func (c *Client) decode(st *guestproto.Stream, chunk guestproto.Chunk, m guestproto.Message) error {
	if chunk.Channel != guestproto.ChanMessage {
		return c.broke(st, "bytes where a message belongs")
	}
	if err := guestproto.Decode(chunk.Data, m); err != nil {
		return c.broke(st, err.Error())
	}
	return nil
}

// broke ends the session of a guest that does not keep to the protocol.
func (c *Client) broke(st *guestproto.Stream, how string) error {
	err := fmt.Errorf("%w: guest broke the protocol: verb %d: %s", errdef.ErrUnavailable, st.Verb(), how)
	c.fail(err)
	return err
}

// explain puts an error of a stream into its category.
func (c *Client) explain(err error) error {
	var reset *guestproto.ResetError
	switch {
	case errors.As(err, &reset):
		return errdef.Remote(reset.Code, reset.Message)
	case errors.Is(err, guestproto.ErrTooManyStreams):
		return fmt.Errorf("%w: guest connection: %w", errdef.ErrExhausted, err)
	case errors.Is(err, guestproto.ErrSessionOver), errors.Is(err, guestproto.ErrStreamOver):
		return fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	default:
		return err
	}
}

// Ping asks the agent whether it is there.
func (c *Client) Ping(ctx context.Context) (Pong, error) {
	var p Pong
	err := c.call(ctx, guestproto.VerbPing, &guestproto.Empty{}, &p)
	return p, err
}

// NewIdentity returns a fresh identity: its own entropy, machine id and boot
// id. The clock is set when it is sent.
func NewIdentity(hostname, generation string) Identity {
	random := make([]byte, 96)
	_, _ = rand.Read(random) // crypto/rand never fails
	boot := random[80:96]
	boot[6] = boot[6]&0x0f | 0x40
	boot[8] = boot[8]&0x3f | 0x80
	uuid := fmt.Sprintf("%x-%x-%x-%x-%x", boot[:4], boot[4:6], boot[6:8], boot[8:10], boot[10:])
	return Identity{
		Entropy: random[:64], MachineID: hex.EncodeToString(random[64:80]), BootID: uuid,
		Hostname: hostname, Generation: generation,
	}
}

// Identify gives the guest a new identity. On error it has none that can be
// trusted: the fork must be destroyed.
func (c *Client) Identify(ctx context.Context, id Identity) error {
	prepare(ctx, &id)
	if err := CheckSecrets(id.Secrets); err != nil {
		return err
	}
	st, err := c.session.Open(ctx, guestproto.VerbIdentity, &id, true)
	if err != nil {
		return c.explain(err)
	}
	return c.identified(ctx, st, &id)
}

// SetClock steps the guest's clock to the host's, as after a pause.
func (c *Client) SetClock(ctx context.Context) error {
	return c.Identify(ctx, Identity{ClockOnly: true})
}

func (c *Client) identified(ctx context.Context, st *guestproto.Stream, id *Identity) error {
	var done guestproto.IdentityDone
	if err := c.last(ctx, st, &done); err != nil {
		return err
	}
	if done.Generation != id.Generation {
		return c.broke(st, "identity of another generation confirmed")
	}
	if done.Secrets != len(id.Secrets) {
		return fmt.Errorf("%w: agent %s put %d of %d secrets in place", errdef.ErrUnsupported, c.agent, done.Secrets, len(id.Secrets))
	}
	return nil
}

// CheckSecrets says what is wrong with a list of secrets, before a guest has to.
func CheckSecrets(secrets []Secret) error {
	if err := guestproto.CheckSecrets(secrets); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	return nil
}

// prepare fills in what is only known when the identity is sent.
func prepare(ctx context.Context, id *Identity) {
	if id.Clock == 0 {
		id.Clock = time.Now().UnixNano()
	}
	if end, ok := ctx.Deadline(); ok && id.Deadline == 0 {
		id.Deadline = time.Until(end)
	}
}

// Quiesce makes the guest ready to be frozen.
func (c *Client) Quiesce(ctx context.Context) error {
	return c.call(ctx, guestproto.VerbQuiesce, &guestproto.Empty{}, &guestproto.Empty{})
}

// Resume undoes Quiesce.
func (c *Client) Resume(ctx context.Context) error {
	return c.call(ctx, guestproto.VerbResume, &guestproto.Empty{}, &guestproto.Empty{})
}

// PowerOff asks the guest to end. It returns when the guest has said that it
// will.
func (c *Client) PowerOff(ctx context.Context) error {
	return c.call(ctx, guestproto.VerbPowerOff, &guestproto.Empty{}, &guestproto.Empty{})
}
