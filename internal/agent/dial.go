package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	// dialTime bounds how long a port may take to accept.
	dialTime = 10 * time.Second
	// flushTime is how long what the host sent before it let go of a connection
	// may take to reach the program.
	flushTime = 5 * time.Second
)

// dial answers VerbDial: it connects to a port of the machine's own loopback,
// and passes bytes both ways until the connection ends.
func (a *Agent) dial(ctx context.Context, st *guestproto.Stream, request []byte) (guestproto.Message, error) {
	var req guestproto.DialRequest
	if err := decode(request, &req); err != nil {
		return nil, err
	}
	if req.Port < 1 || req.Port > guestproto.MaxPort {
		return nil, failf(errdef.ErrInvalid, "port %d is none of 1 to %d", req.Port, guestproto.MaxPort)
	}
	select {
	case a.dials <- struct{}{}:
		defer func() { <-a.dials }()
	default:
		return nil, failf(errdef.ErrExhausted, "%d connections to ports are open already", cap(a.dials))
	}
	// Nobody else ends a connection that stands still when the agent closes.
	stop := context.AfterFunc(a.ctx, func() { st.Reset(errdef.Code(errClosed), errClosed.Error()) })
	defer stop()
	conn, err := connectLoopback(ctx, req.Port)
	if err != nil {
		return nil, err
	}
	defer conn.Close() //nolint:errcheck // both directions have ended
	if err = st.SendMessage(ctx, &guestproto.Empty{}); err != nil {
		return nil, err
	}
	if err = relay(ctx, st, conn); err != nil {
		return nil, err
	}
	return &guestproto.Empty{}, nil
}

// relay passes bytes until both directions have ended, or the connection or the
// stream has.
func relay(ctx context.Context, st *guestproto.Stream, conn *os.File) error {
	// A host that lets go of the connection has written first what it wanted to:
	// that still goes to the program, and nothing comes from there any more.
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0)) // a socket has deadlines
		_ = conn.SetWriteDeadline(time.Now().Add(flushTime))
	})
	defer stop()
	takes, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	var work sync.WaitGroup
	work.Go(func() { take(takes, st, conn) })
	err := give(ctx, st, conn)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	} else if err != nil {
		cancel() // the connection is broken: nobody reads what the host sends
	}
	work.Wait()
	return err
}

// give sends the host what comes from the program, and where that ends.
func give(ctx context.Context, st *guestproto.Stream, conn *os.File) error {
	buf := make([]byte, guestproto.MaxData)
	for {
		n, err := conn.Read(buf)
		if n > 0 {
			if _, serr := st.Send(ctx, guestproto.ChanStdout, buf[:n]); serr != nil {
				return serr
			}
		}
		if errors.Is(err, io.EOF) {
			_, err = st.Send(ctx, guestproto.ChanStdout, nil)
			return err
		}
		if err != nil {
			return failf(errdef.ErrUnavailable, "connection to the port: %w", bare(err))
		}
	}
}

// take writes what the host sends to the program. One that does not read any
// more is noticed by give.
func take(ctx context.Context, st *guestproto.Stream, conn *os.File) {
	for {
		c, err := st.Recv(ctx)
		if errors.Is(err, io.EOF) {
			_, _ = control(conn, func(fd int) (int, error) { return 0, unix.Shutdown(fd, unix.SHUT_WR) }) // it may be broken
			return
		}
		if err != nil {
			return
		}
		if c.Channel != guestproto.ChanStdin {
			st.Reset(errdef.Code(errdef.ErrInvalid), fmt.Sprintf("bytes on channel %d of a connection", c.Channel))
			return
		}
		if _, err = conn.Write(c.Data); err != nil {
			return
		}
	}
}

// connectLoopback connects to a port of this machine: by 127.0.0.1, or by ::1
// where a program listens on that alone. It is done by hand: the net package
// would have every fork pay for its beginnings.
func connectLoopback(ctx context.Context, port int) (*os.File, error) {
	six := &unix.SockaddrInet6{Port: port}
	six.Addr[15] = 1
	conn, err := connectTo(ctx, unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}})
	if errors.Is(err, unix.ECONNREFUSED) {
		var sixErr error
		if conn, sixErr = connectTo(ctx, unix.AF_INET6, six); sixErr == nil {
			return conn, nil
		}
	}
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, failf(errdef.ErrTimeout, "port %d did not accept within %v", port, dialTime)
	case isOneOf(err, unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.ENOBUFS):
		return nil, failf(errdef.ErrExhausted, "connect to port %d: %w", port, bare(err))
	}
	return nil, failf(errdef.ErrUnavailable, "connect to port %d: %w", port, bare(err))
}

func connectTo(ctx context.Context, family int, addr unix.Sockaddr) (*os.File, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	conn := os.NewFile(uintptr(fd), "tcp")
	if err = unix.Connect(fd, addr); err == nil || errors.Is(err, unix.EINPROGRESS) {
		err = connected(ctx, conn)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
	if err != nil {
		_ = conn.Close() // err says more
		return nil, err
	}
	return conn, nil
}

// connected waits until a socket is connected, or cannot be.
func connected(ctx context.Context, conn *os.File) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	if err = conn.SetWriteDeadline(time.Now().Add(dialTime)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Unix(1, 0)) }) // it was set before
	defer stop()
	var failed error
	err = raw.Write(func(fd uintptr) bool {
		var code int
		if code, failed = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); failed == nil && code != 0 {
			failed = syscall.Errno(code)
		}
		if failed != nil {
			return true
		}
		_, perr := unix.Getpeername(int(fd))
		return perr == nil
	})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	return conn.SetWriteDeadline(time.Time{})
}

// bare drops the words that package os puts around an error of the kernel: the
// name of a socket's file says nothing.
func bare(err error) error {
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		return errno
	}
	return err
}
