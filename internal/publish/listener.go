package publish

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// host is the one address that there are listeners on: whoever is on this
	// host can connect to it, and nobody else.
	host    = "127.0.0.1"
	maxPort = 1<<16 - 1
	// pause is how long a listener waits after it could not accept.
	pause = 100 * time.Millisecond
	// chunk is how much is copied at a time.
	chunk = 32 << 10
)

// Connect connects to a guest's port and calls use with the connection, which it
// closes after use has returned. For as long the guest is in use. When ctx ends
// the connection must break.
type Connect func(ctx context.Context, use func(context.Context, net.Conn) error) error

// Listener passes every connection that comes to one address of this host's
// loopback on to a port of a guest. It is safe for concurrent use.
type Listener struct {
	ln      net.Listener
	connect Connect
	logger  *slog.Logger
	ctx     context.Context // ends with the Listener
	cancel  context.CancelFunc
	slots   chan struct{} // a token for each connection
	work    sync.WaitGroup
}

// Listen begins to listen on a port, or on a free one if hostPort is 0. Whoever
// comes when most connections are open is sent away. The caller must Close it.
func Listen(ctx context.Context, hostPort, most int, connect Connect, logger *slog.Logger) (*Listener, error) {
	if hostPort < 0 || hostPort > maxPort {
		return nil, fmt.Errorf("%w: host port %d is none of 0 to %d", errdef.ErrInvalid, hostPort, maxPort)
	}
	var config net.ListenConfig
	ln, err := config.Listen(ctx, "tcp4", net.JoinHostPort(host, strconv.Itoa(hostPort)))
	if err != nil {
		return nil, listenError(hostPort, err)
	}
	l := &Listener{ln: ln, connect: connect, logger: logger, slots: make(chan struct{}, most)}
	if l.logger == nil {
		l.logger = slog.New(slog.DiscardHandler)
	}
	l.ctx, l.cancel = context.WithCancel(context.WithoutCancel(ctx)) // it outlives who asked for it
	l.work.Go(l.accept)
	return l, nil
}

func listenError(port int, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return errdef.WithHint(fmt.Errorf("%w: port %d of this host is in use", errdef.ErrConflict, port), "choose another, or 0 for a free one")
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("%w: listen on port %d of this host: %w", errdef.ErrDenied, port, err)
	}
	return fmt.Errorf("listen on port %d of this host: %w", port, err)
}

// Port is the port that the Listener listens on, and Address is that with its
// host.
func (l *Listener) Port() int {
	addr, _ := l.ln.Addr().(*net.TCPAddr) // it is one
	return addr.Port
}

// Address is where the Listener listens, as in "127.0.0.1:43121".
func (l *Listener) Address() string { return l.ln.Addr().String() }

// End ends the Listener and its connections, and does not wait.
func (l *Listener) End() {
	l.cancel()
	_ = l.ln.Close() // it may be closed already
}

// Close is End, and waits until all is over.
func (l *Listener) Close() error {
	l.End()
	l.work.Wait()
	return nil
}

func (l *Listener) accept() {
	for l.ctx.Err() == nil {
		conn, err := l.ln.Accept()
		if err != nil {
			l.rest(err)
			continue
		}
		select {
		case l.slots <- struct{}{}:
			l.work.Go(func() {
				defer func() { <-l.slots }()
				l.serve(conn)
			})
		default:
			_ = conn.Close() // too many
		}
	}
}

// rest waits after a failure: the process may have run out of descriptors.
func (l *Listener) rest(err error) {
	if l.ctx.Err() == nil {
		l.logger.WarnContext(l.ctx, "published port cannot accept", slog.String("address", l.Address()), slog.Any("error", err))
	}
	select {
	case <-l.ctx.Done():
	case <-time.After(pause):
	}
}

// serve passes one connection on. Where nothing answers in the guest it is
// closed: there is no other way to say so.
func (l *Listener) serve(conn net.Conn) {
	defer func() { _ = conn.Close() }() // Join may have closed it
	err := l.connect(l.ctx, func(ctx context.Context, far net.Conn) error {
		Join(ctx, conn, far)
		return nil
	})
	if err != nil && l.ctx.Err() == nil {
		l.logger.DebugContext(l.ctx, "connection to a published port", slog.String("address", l.Address()), slog.Any("error", err))
	}
}

// Join passes bytes between two connections, half closes too, until both
// directions have ended, one of the connections breaks or ctx ends. It closes
// both.
func Join(ctx context.Context, a, b net.Conn) {
	end := func() { _, _ = a.Close(), b.Close() } // what is broken cannot be closed
	defer end()
	stop := context.AfterFunc(ctx, end)
	defer stop()
	var work sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		work.Go(func() {
			if err := pass(way[0], way[1]); err != nil {
				end()
			}
		})
	}
	work.Wait()
}

// pass copies from one connection to another until the first has said all. Its
// error is that of reading: a connection that cannot be written to may still
// have something to say, and what it says ends too.
func pass(from, to net.Conn) error {
	buf := make([]byte, chunk)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return nil //nolint:nilerr // see above
			}
		}
		if errors.Is(err, io.EOF) {
			if half, ok := to.(interface{ CloseWrite() error }); ok {
				_ = half.CloseWrite() // it may be broken
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}
