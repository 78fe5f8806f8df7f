package fake

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// link is the network of a machine with a card, at which tests are the guest.
type link struct {
	calls  chan call
	closed chan struct{}
	once   sync.Once
}

// call is a connection of the guest.
type call struct {
	conn net.Conn
	dst  netip.AddrPort
}

// Link gives what Engine.Connect calls.
func (m *machine) Link() (vmm.Link, error) {
	if !m.spec.Machine.Net {
		return nil, fmt.Errorf("%w: machine without a network card", errdef.ErrUnsupported)
	}
	if err := m.engine.fails("Link"); err != nil {
		return nil, err
	}
	return &link{calls: m.calls, closed: make(chan struct{})}, nil
}

// Connect is a connection that the guest of the machine in dir makes to dst. It
// waits until somebody accepts it.
func (e *Engine) Connect(ctx context.Context, dir string, dst netip.AddrPort) (net.Conn, error) {
	m, err := e.find(dir)
	if err != nil {
		return nil, err
	}
	guest, host := net.Pipe()
	select {
	case m.calls <- call{host, dst}:
		return guest, nil
	case <-m.done:
		return nil, errGone
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Accept waits for Connect.
func (l *link) Accept() (net.Conn, netip.AddrPort, error) {
	select {
	case c := <-l.calls:
		return c.conn, c.dst, nil
	case <-l.closed:
		return nil, netip.AddrPort{}, net.ErrClosed
	}
}

// ReadPacket waits for Close: nobody sends packets.
func (l *link) ReadPacket([]byte) (n int, src, dst netip.AddrPort, err error) {
	<-l.closed
	return 0, src, dst, net.ErrClosed
}

// WritePacket drops the packet.
func (l *link) WritePacket([]byte, netip.AddrPort, netip.AddrPort) error { return nil }

// Close ends the link.
func (l *link) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}
