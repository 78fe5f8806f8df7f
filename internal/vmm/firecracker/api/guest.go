package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// maxGreeting bounds the line by which a connection to a guest begins:
// "OK 1073741824\n" and then some.
const maxGreeting = 32

// DialGuest connects to a port in a guest by the socket of its vsock device
// (Vsock.Path), which may have a path of any length. ctx bounds the call, and
// not the connection, which is the caller's to close.
//
// ErrUnavailable: there is no Firecracker at path, nobody in the guest listens on
// that port, or the guest has as many connections as Firecracker allows (1023).
// While the machine is paused nobody answers; ctx ends that.
//
// Facts: src/vmm/src/devices/virtio/vsock/unix/muxer.rs of Firecracker.
func DialGuest(ctx context.Context, path string, port uint32) (net.Conn, error) {
	conn, err := dialUnix(ctx, path)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, fmt.Errorf("dial port %d of the guest at %s: %w", port, path, context.Cause(ctx))
	default:
		return nil, fmt.Errorf("dial port %d of the guest at %s: %w: %w", port, path, errdef.ErrUnavailable, err)
	}
	if err = Greet(ctx, conn, port); err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("dial port %d of the guest at %s: %w", port, path, err)
	}
	return conn, nil
}

// Greet asks for a port of the guest on a new connection to the socket of its vsock
// device, and leaves the connection where the guest's words begin. Errors are as of
// DialGuest. After one the connection is of no use; it is the caller's.
func Greet(ctx context.Context, conn net.Conn, port uint32) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	// In one piece: Firecracker does not wait for the rest of a line.
	_, err := fmt.Fprintf(conn, "CONNECT %d\n", port)
	if err == nil {
		err = readGreeting(conn)
	}
	if !stop() { // then its deadline is there to stay
		return context.Cause(ctx)
	}
	if network := (*net.OpError)(nil); errors.As(err, &network) {
		return fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	}
	return err
}

// readGreeting reads "OK PORT\n", and no byte of what follows it. Which port of
// the host that is means nothing to anybody.
func readGreeting(r io.Reader) error {
	line := make([]byte, 0, maxGreeting)
	for len(line) < maxGreeting {
		n, err := r.Read(line[len(line) : len(line)+1])
		line = line[:len(line)+n]
		switch {
		case n > 0 && line[len(line)-1] == '\n':
			return checkGreeting(string(line[:len(line)-1]))
		case errors.Is(err, io.EOF):
			return fmt.Errorf("%w: nobody in the guest listens there", errdef.ErrUnavailable)
		case err != nil:
			return err
		}
	}
	return fmt.Errorf("the greeting is longer than %d bytes: %q", maxGreeting, clean(string(line), maxGreeting))
}

func checkGreeting(line string) error {
	port, ok := strings.CutPrefix(line, "OK ")
	if _, err := strconv.ParseUint(port, 10, 32); !ok || err != nil {
		return fmt.Errorf("the greeting is %q, and not a port", clean(line, maxGreeting))
	}
	return nil
}
