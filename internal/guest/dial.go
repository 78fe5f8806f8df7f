package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"syscall"

	"github.com/tinevm/tine/internal/deadline"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// PortAddr is an address of a connection to a guest: a TCP port of its
// loopback, or the host's side, which has no port.
type PortAddr struct {
	Port int
}

// Network returns "tine".
func (PortAddr) Network() string { return "tine" }

// String returns the port, as in "guest:8080", or "host".
func (a PortAddr) String() string {
	if a.Port == 0 {
		return "host"
	}
	return net.JoinHostPort("guest", strconv.Itoa(a.Port))
}

// DialPort connects to a TCP port of the guest's loopback, where any program of
// the guest may listen. ctx bounds the call only. The connection has CloseWrite,
// as *net.TCPConn does, and ends with the client. Where nothing listens the
// error is in the category errdef.ErrUnavailable, and in errdef.ErrUnsupported
// where the guest's agent is older than ports.
func (c *Client) DialPort(ctx context.Context, port int) (net.Conn, error) {
	if port < 1 || port > guestproto.MaxPort {
		return nil, fmt.Errorf("%w: port %d is none of 1 to %d", errdef.ErrInvalid, port, guestproto.MaxPort)
	}
	st, err := c.session.Open(ctx, guestproto.VerbDial, &guestproto.DialRequest{Port: port}, false)
	if err != nil {
		return nil, c.explain(err)
	}
	chunk, err := c.recv(ctx, st)
	if errors.Is(err, errdef.ErrUnsupported) {
		return nil, errdef.WithHint(fmt.Errorf("connect to port %d: %w", port, err), "its snapshot was made by an older Tine: make it anew")
	}
	if err != nil {
		return nil, err
	}
	if chunk.Final {
		return nil, c.broke(st, "connection that ends before it begins")
	}
	if err = c.decode(st, chunk, &guestproto.Empty{}); err != nil {
		return nil, err
	}
	return &portConn{client: c, stream: st, addr: PortAddr{Port: port}, Pair: deadline.NewPair()}, nil
}

// portConn is a connection to a port. It has no goroutine of its own.
type portConn struct {
	deadline.Pair

	client *Client
	stream *guestproto.Stream
	addr   PortAddr

	reading sync.Mutex // held by Read
	rest    []byte     // of the last chunk
	over    bool       // the program has said that it sends no more

	writing sync.Mutex // held by Write
	ending  sync.Once
}

// Read returns what the program has sent.
func (p *portConn) Read(b []byte) (int, error) {
	p.reading.Lock()
	defer p.reading.Unlock()
	ctx := p.Reads.Context()
	if ctx.Err() != nil {
		return 0, p.failed("read", context.Cause(ctx))
	}
	if len(b) == 0 {
		return 0, nil
	}
	if len(p.rest) == 0 {
		if err := p.fill(ctx); err != nil {
			return 0, err
		}
	}
	n := copy(b, p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

// fill waits for the next chunk that has bytes.
func (p *portConn) fill(ctx context.Context) error {
	if p.over {
		return io.EOF
	}
	chunk, err := p.stream.Recv(ctx)
	switch {
	case errors.Is(err, io.EOF):
		return p.client.broke(p.stream, "connection without an end")
	case err != nil:
		return p.failed("read", p.client.explain(err))
	case chunk.Final, chunk.Channel == guestproto.ChanStdout && len(chunk.Data) == 0:
		p.over = true
		return io.EOF
	case chunk.Channel != guestproto.ChanStdout:
		return p.client.broke(p.stream, "what is no connection's")
	}
	p.rest = chunk.Data
	return nil
}

// Write sends b to the program. It waits while that does not read.
func (p *portConn) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	ctx := p.Writes.Context()
	if ctx.Err() != nil {
		return 0, p.failed("write", context.Cause(ctx))
	}
	if len(b) == 0 {
		return 0, nil // an empty frame is for the other direction
	}
	n, err := p.stream.Send(ctx, guestproto.ChanStdin, b)
	if err != nil {
		return n, p.failed("write", p.client.explain(err))
	}
	return n, nil
}

// CloseWrite says that nothing more is sent. Writes that wait fail.
func (p *portConn) CloseWrite() error {
	p.Writes.Close(syscall.EPIPE)
	p.writing.Lock() // data after the end would break the protocol
	defer p.writing.Unlock()
	var err error
	p.ending.Do(func() { err = p.stream.End(context.Background(), nil) })
	if err == nil || errors.Is(err, guestproto.ErrStreamOver) {
		return nil // the program was faster
	}
	return p.failed("close", p.client.explain(err))
}

// Close ends the connection. What was written still goes to the program.
func (p *portConn) Close() error {
	first := p.Reads.Close(net.ErrClosed)
	p.Writes.Close(net.ErrClosed)
	if !first {
		return p.failed("close", net.ErrClosed)
	}
	p.stream.Reset(guestproto.CodeCanceled, "closed")
	return nil
}

// LocalAddr is the host's side.
func (p *portConn) LocalAddr() net.Addr { return PortAddr{} }

// RemoteAddr is the port in the guest.
func (p *portConn) RemoteAddr() net.Addr { return p.addr }

func (p *portConn) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: p.addr.Network(), Addr: p.addr, Err: err}
}
