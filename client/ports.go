package client

import (
	"context"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"

	"github.com/coder/websocket"

	"github.com/tinevm/tine/internal/deadline"
	"github.com/tinevm/tine/internal/wire"
)

// tunnelChunk is how much of what is written goes into one message.
const tunnelChunk = 32 << 10

// PublishedPort is a port of a sandbox that the daemon listens for, on loopback
// of its own host.
type PublishedPort = wire.PublishedPort

// PublishPort has the daemon listen for a port of a sandbox, on 127.0.0.1 and
// hostPort, or a free port if that is 0. Whoever is on the daemon's host can
// connect. It ends with the sandbox, and with the daemon.
func (c *Client) PublishPort(ctx context.Context, id string, guestPort, hostPort int) (PublishedPort, error) {
	return post[PublishedPort](ctx, c, box(id, "ports"), wire.PublishPortRequest{GuestPort: guestPort, HostPort: hostPort})
}

// PublishedPorts lists what the daemon listens for, by the sandbox's port.
func (c *Client) PublishedPorts(ctx context.Context, id string) ([]PublishedPort, error) {
	return get[[]PublishedPort](ctx, c, box(id, "ports"), nil)
}

// UnpublishPort has the daemon listen no more for a port of a sandbox.
func (c *Client) UnpublishPort(ctx context.Context, id string, guestPort int) error {
	return c.call(ctx, http.MethodDelete, box(id, "ports", itoa(guestPort)), nil, nil, nil)
}

// DialPort connects to a port of a sandbox, through the daemon. ctx bounds the
// call only. It may be what an http.Transport dials with:
//
//	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
//		return c.DialPort(ctx, id, 8080)
//	}}
//
// The connection has CloseWrite, as *net.TCPConn does. A Write whose deadline
// passes ends it. Where nothing listens, the error is an *Error of status 502.
func (c *Client) DialPort(ctx context.Context, id string, port int) (net.Conn, error) {
	target := c.base + box(id, "ports", itoa(port))
	conn, err := c.dialStream(ctx, target)
	if err != nil {
		return nil, err
	}
	p := &portConn{
		conn: conn, addr: portAddr(id + ":" + itoa(port)), Pair: deadline.NewPair(),
		closed: make(chan struct{}), pieces: make(chan []byte), over: make(chan struct{}),
	}
	p.work.Go(func() { p.receive(context.WithoutCancel(ctx)) })
	return p, nil
}

// portAddr is an address of a connection to a sandbox.
type portAddr string

// Network returns "tine".
func (portAddr) Network() string { return "tine" }

// String returns the address, as in "sb-1:8080".
func (a portAddr) String() string { return string(a) }

// portConn is a connection to a port of a sandbox, on a WebSocket: binary
// messages are bytes, and one without any says that there are no more.
type portConn struct {
	deadline.Pair // a Write that its deadline ends, ends the connection

	conn   *websocket.Conn
	addr   portAddr
	closed chan struct{} // closed by Close
	work   sync.WaitGroup

	pieces chan []byte   // from receive to Read; one without bytes is the end
	over   chan struct{} // closed when nothing more comes
	err    error         // why; set before over is closed

	reading sync.Mutex // held by Read
	rest    []byte     // of the last piece
	ended   bool       // the sandbox has said all

	writing sync.Mutex // held by Write
	ending  sync.Once
}

// receive takes what comes until the connection is over. Read has it from here,
// since a WebSocket does not outlive a wait for a message that is given up.
func (p *portConn) receive(ctx context.Context) {
	defer close(p.over)
	for {
		kind, data, err := p.conn.Read(ctx)
		if err == nil && kind == websocket.MessageText {
			if _, err = decodeEvent(kind, data); err == nil {
				continue // it only shows that the connection lives
			}
		}
		if err != nil {
			p.err = err
			return
		}
		select {
		case p.pieces <- data:
		case <-p.closed:
			p.err = net.ErrClosed
			return
		}
	}
}

// Read returns what the sandbox has sent.
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

// fill waits for the next piece.
func (p *portConn) fill(ctx context.Context) error {
	if p.ended {
		return io.EOF
	}
	select {
	case p.rest = <-p.pieces:
		p.ended = len(p.rest) == 0
	case <-p.over:
		return p.failed("read", p.err)
	case <-ctx.Done():
		return p.failed("read", context.Cause(ctx))
	}
	if p.ended {
		return io.EOF
	}
	return nil
}

// Write sends b to the sandbox. It waits while nobody reads there.
func (p *portConn) Write(b []byte) (int, error) {
	p.writing.Lock()
	defer p.writing.Unlock()
	ctx := p.Writes.Context()
	sent := 0
	for sent < len(b) {
		piece := b[sent:min(len(b), sent+tunnelChunk)]
		err := context.Cause(ctx)
		if err == nil {
			err = p.conn.Write(ctx, websocket.MessageBinary, piece)
		}
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return sent, p.failed("write", err)
		}
		sent += len(piece)
	}
	return sent, nil
}

// CloseWrite says that nothing more is sent.
func (p *portConn) CloseWrite() error {
	p.writing.Lock()
	defer p.writing.Unlock()
	var err error
	p.ending.Do(func() {
		if err = p.conn.Write(p.Writes.Context(), websocket.MessageBinary, nil); err != nil {
			err = p.failed("close", err)
		}
	})
	p.Writes.Close(syscall.EPIPE)
	return err
}

// Close ends the connection. What was written still goes to the sandbox.
func (p *portConn) Close() error {
	first := p.Reads.Close(net.ErrClosed)
	p.Writes.Close(net.ErrClosed)
	if !first {
		return p.failed("close", net.ErrClosed)
	}
	close(p.closed)
	_ = p.conn.Close(websocket.StatusNormalClosure, "") // it is over either way
	p.work.Wait()
	return nil
}

// LocalAddr is this side, which has no port.
func (p *portConn) LocalAddr() net.Addr { return portAddr("client") }

// RemoteAddr is the port in the sandbox.
func (p *portConn) RemoteAddr() net.Addr { return p.addr }

func (p *portConn) failed(op string, err error) error {
	return &net.OpError{Op: op, Net: p.addr.Network(), Addr: p.addr, Err: err}
}
