package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
)

// The ports of the servers that guests reach, by what they do.
const (
	portEcho  = 7  // sends back what comes
	portSink  = 9  // reads to the end, and says how many bytes there were
	portGreet = 13 // says hello
)

// welcome is what portGreet says.
const welcome = "hello"

func serverPorts() []int { return []int{portEcho, portSink, portGreet} }

// there is where guests find the servers through Tine: an address for
// documentation (RFC 5737), which is nobody's.
func there() netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, 10}) }

// world is the servers that guests reach. They are in this process.
type world struct {
	listeners map[int]net.Listener // by port
	work      sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]struct{}
	closed bool
}

// newWorld serves on what listen returns for each port. It must be closed.
func newWorld(listen func(port int) (net.Listener, error)) (*world, error) {
	w := &world{listeners: map[int]net.Listener{}, conns: map[net.Conn]struct{}{}}
	for _, port := range serverPorts() {
		ln, err := listen(port)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("serve guests: %w", err), w.close())
		}
		w.listeners[port] = ln
		w.work.Go(func() { w.accept(ln, port) })
	}
	return w, nil
}

// onLoopback listens on the loopback interface, whatever the port.
func onLoopback(ctx context.Context) func(int) (net.Listener, error) {
	return func(int) (net.Listener, error) {
		var cfg net.ListenConfig
		return cfg.Listen(ctx, "tcp4", "127.0.0.1:0")
	}
}

func (w *world) accept(ln net.Listener, port int) {
	for {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		if !w.keep(conn) {
			continue
		}
		w.work.Go(func() {
			defer w.drop(conn)
			serveGuest(conn, port)
		})
	}
}

// keep remembers a connection, for close to end it.
func (w *world) keep(conn net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		_ = conn.Close() // nobody waits for it
		return false
	}
	w.conns[conn] = struct{}{}
	return true
}

func (w *world) drop(conn net.Conn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = conn.Close() // close may have been first
	delete(w.conns, conn)
}

// serveGuest is one connection. What fails shows in the guest.
func serveGuest(conn net.Conn, port int) {
	switch port {
	case portEcho:
		_, _ = io.Copy(conn, conn)
	case portSink:
		n, _ := io.Copy(io.Discard, conn)
		_, _ = fmt.Fprint(conn, n)
	case portGreet:
		_, _ = io.WriteString(conn, welcome)
	}
}

// close ends the servers and all connections.
func (w *world) close() error {
	var errs []error
	for _, ln := range w.listeners {
		errs = append(errs, ln.Close())
	}
	w.mu.Lock()
	w.closed = true
	for conn := range w.conns {
		_ = conn.Close() // its server may be doing the same
	}
	w.mu.Unlock()
	w.work.Wait()
	return errors.Join(errs...)
}

// dial connects to the servers in place of there(), and to nothing else.
func (w *world) dial(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	ln := w.listeners[int(dst.Port())]
	if dst.Addr() != there() || ln == nil {
		return nil, fmt.Errorf("%w: %s is not in the bench's world", errdef.ErrDenied, dst)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, ln.Addr().String())
}
