package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"

	"github.com/tinevm/tine/client"
)

// Local serves the daemon to this process only, through memory, and returns a
// client of it. The function it returns ends both.
func (d *Daemon) Local(ctx context.Context) (*client.Client, func(context.Context) error, error) {
	ln := &memoryListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	c, err := client.New(client.Config{URL: "http://tine", HTTPClient: &http.Client{
		Transport: &http.Transport{DialContext: ln.dial},
	}})
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, ln) }()
	end := func(ctx context.Context) error {
		c.Close()
		cancel()
		return errors.Join(<-served, d.Close(ctx))
	}
	return c, end, nil
}

// memoryListener hands the server's ends of pipes to Accept.
type memoryListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *memoryListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	ours, theirs := net.Pipe()
	select {
	case l.conns <- theirs:
		return ours, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (l *memoryListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close is called once, by the server.
func (l *memoryListener) Close() error {
	close(l.closed)
	return nil
}

func (l *memoryListener) Addr() net.Addr { return memoryAddr{} }

type memoryAddr struct{}

func (memoryAddr) Network() string { return "memory" }
func (memoryAddr) String() string  { return "memory" }
