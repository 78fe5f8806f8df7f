package egress

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// transport makes connections by dial alone, whatever a request says. It is the
// relay that bounds them, not the request.
func (p *proxy) transport(dial func() (net.Conn, error)) *http.Transport {
	return &http.Transport{
		DialContext:            func(context.Context, string, string) (net.Conn, error) { return p.dial(dial) },
		TLSClientConfig:        &tls.Config{RootCAs: p.r.g.cfg.RootCAs, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    p.r.g.lim.dial,
		ResponseHeaderTimeout:  answerTimeout,
		MaxResponseHeaderBytes: maxHead,
		IdleConnTimeout:        idleTimeout,
		MaxIdleConns:           1,
		DisableCompression:     true,
		ExpectContinueTimeout:  time.Second,
	}
}

// dial makes a connection that ends with the proxy. A transport calls it from
// goroutines of its own, which may come when the request has long gone.
func (p *proxy) dial(dial func() (net.Conn, error)) (net.Conn, error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, net.ErrClosed
	}
	p.dials.Add(1)
	p.mu.Unlock()
	defer p.dials.Done()
	conn, err := dial()
	if err != nil {
		return nil, err
	}
	c := &proxyConn{Conn: conn, p: p}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = struct{}{}
	return c, nil
}

// close ends all that the proxy has open, and waits for what is about to be.
func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.r.end()
	p.dials.Wait()
	p.mu.Lock()
	conns := p.conns
	p.conns = nil
	p.mu.Unlock()
	for c := range conns {
		_ = c.Conn.Close()
	}
	p.plain.CloseIdleConnections()
	if p.hidden.transport != nil {
		p.hidden.transport.CloseIdleConnections()
	}
}

// proxyConn is a connection to a host.
type proxyConn struct {
	net.Conn
	p *proxy
}

// Close is net.Conn's.
func (c *proxyConn) Close() error {
	c.p.mu.Lock()
	delete(c.p.conns, c)
	c.p.mu.Unlock()
	return c.Conn.Close()
}

// dialHost connects to a host by its name.
func (r *relay) dialHost(ctx context.Context, name string, port uint16) (net.Conn, error) {
	addrs := r.g.lookup(ctx, name).addrs
	err := fmt.Errorf("%w: %s has no address that may be reached", errdef.ErrUnavailable, name)
	for _, addr := range addrs[:min(len(addrs), maxTries)] {
		var conn net.Conn
		if conn, err = r.g.dial(ctx, TCP, netip.AddrPortFrom(addr, port)); err == nil {
			return conn, nil
		}
		r.g.count.dialFailed.Add(1)
	}
	return nil, err
}
