package egress

import (
	"net"
	"net/http"
	"sync"
	"sync/atomic"
)

// oneConn is a listener of one connection. Its second Accept waits until the
// server has done with that, whoever owns it by then.
type oneConn struct {
	conn     net.Conn
	done     chan struct{}
	once     sync.Once
	taken    atomic.Bool
	hijacked atomic.Bool
}

// Accept is net.Listener's. Only the server calls it.
func (l *oneConn) Accept() (net.Conn, error) {
	if !l.taken.Swap(true) {
		return l.conn, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

// Close is net.Listener's.
func (l *oneConn) Close() error { return nil }

// Addr is net.Listener's.
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

func (l *oneConn) state(_ net.Conn, s http.ConnState) {
	switch s {
	case http.StateClosed:
		l.once.Do(func() { close(l.done) })
	case http.StateHijacked: // the handler, who took it, closes it
		l.hijacked.Store(true)
	}
}

// during runs a handler.
func (l *oneConn) during(handle func()) {
	defer func() {
		if l.hijacked.Load() {
			l.once.Do(func() { close(l.done) })
		}
	}()
	handle()
}
