package egress

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	maxHead     = 64 << 10
	headTimeout = 10 * time.Second
	idleTimeout = 2 * time.Minute
	// answerTimeout is how long a host may think before its answer begins.
	answerTimeout = 10 * time.Minute
	// maxTries is how many addresses of a host are tried.
	maxTries = 4
)

// serveHTTP reads the requests of a connection, one after the other, and sends
// on those whose Host is allowed: every one is checked, not just the first, and
// each is written anew, so that what it says to us it says to the host.
func (r *relay) serveHTTP(guest net.Conn, v verdict) {
	p := &proxy{r: r, conns: map[*proxyConn]struct{}{}}
	p.plain = p.transport(func() (net.Conn, error) { return r.connect(r.ctx) })
	defer p.close()
	l := &oneConn{conn: &metered{
		Conn: guest, ctx: r.ctx, up: r.g.up, down: r.g.down,
		countUp: &r.g.count.bytesUp, countDown: &r.g.count.bytesDown, stalled: r.g.lim.stalled,
	}, done: make(chan struct{})}
	srv := &http.Server{
		Handler:           http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) { l.during(func() { p.serve(w, req) }) }),
		BaseContext:       func(net.Listener) context.Context { return r.ctx },
		ConnState:         l.state,
		ReadHeaderTimeout: headTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHead,
		ErrorLog:                     quiet(),
		DisableGeneralOptionsHandler: true,
	}
	_ = srv.Serve(l) // returns when the connection has ended
	if v.inspect && !p.named.Load() && r.ctx.Err() == nil {
		r.g.denials.note(TCP, r.dst.String(), NoServerName)
	}
}

// quiet is where net/http complains of guests and of hosts.
func quiet() *log.Logger { return log.New(io.Discard, "", 0) }

// proxy sends on the requests of one connection.
type proxy struct {
	r     *relay
	plain *http.Transport // to where the guest has connected to
	named atomic.Bool     // some request has shown a name

	// hidden is to where the last request with secrets went. Requests come one
	// after the other, so nothing guards it.
	hidden target

	dials sync.WaitGroup

	mu     sync.Mutex
	closed bool
	conns  map[*proxyConn]struct{} // those to hosts that are open
}

func (p *proxy) serve(w http.ResponseWriter, req *http.Request) {
	p.named.Store(true)
	name, err := p.host(req)
	byName := err == nil && p.r.show(name)
	if !byName && !p.r.g.current().allowsAddr(TCP, p.r.dst) {
		p.r.g.denials.note(TCP, shown(strconv.QuoteToASCII(req.Host), p.r.dst.String()), WrongServerName)
		refuse(w, http.StatusForbidden, "no rule allows this host")
		return
	}
	if req.Method == http.MethodConnect || req.Method == http.MethodTrace { // TRACE would show secrets
		refuse(w, http.StatusMethodNotAllowed, "this method goes nowhere")
		return
	}
	onlyWebSocket(req.Header)
	to := target{scheme: "http", host: cmp.Or(req.Host, p.r.dst.String()), transport: p.plain}
	if byName && p.r.dst.Port() == portHTTP {
		if secrets := p.r.g.secretsOf(name); len(secrets) > 0 {
			to = p.withSecrets(name, secrets)
		}
	}
	to.send(w, req)
}

// host is the name that a request is for, in normal form. A port that it names
// must be the connection's.
func (p *proxy) host(req *http.Request) (string, error) {
	host, port, found := strings.Cut(req.Host, ":")
	if found && port != strconv.Itoa(int(p.r.dst.Port())) {
		return "", fmt.Errorf("%w: host %.80q has another port", errdef.ErrInvalid, req.Host)
	}
	return parseName(host)
}

// onlyWebSocket takes out offers to go on in another protocol, as in HTTP/2 in
// clear (h2c), in which requests that nobody looks at would name other hosts.
func onlyWebSocket(h http.Header) {
	if up := h.Values("Upgrade"); len(up) != 1 || !strings.EqualFold(up[0], "websocket") {
		h.Del("Upgrade")
		h.Del("Http2-Settings")
	}
}

func refuse(w http.ResponseWriter, status int, why string) {
	w.Header().Set("Connection", "close")
	http.Error(w, "tine egress: "+why, status)
}

// target is where and how a request is sent on.
type target struct {
	scheme, host string
	transport    *http.Transport
	secrets      []preparedSecret
}

// withSecrets is the target of requests to a host that has secrets: over TLS,
// unless all of them may go in clear. The address is one that we look up: the
// one that the guest has connected to may be another host's of the same rules.
func (p *proxy) withSecrets(name string, secrets []preparedSecret) target {
	to := target{scheme: "http", host: name, secrets: secrets}
	port := uint16(portHTTP)
	for _, s := range secrets {
		if !s.clear {
			to.scheme, port = "https", portTLS
		}
	}
	if last := p.hidden; last.host == to.host && last.scheme == to.scheme {
		to.transport = last.transport
		return to
	}
	if p.hidden.transport != nil {
		p.hidden.transport.CloseIdleConnections()
	}
	defer func() { p.hidden = to }()
	to.transport = p.transport(func() (net.Conn, error) { return p.r.dialHost(p.r.ctx, name, port) })
	return to
}

func (t target) send(w http.ResponseWriter, req *http.Request) {
	rp := &httputil.ReverseProxy{
		Transport:     t.transport,
		FlushInterval: -1, // what the host sends the guest gets at once
		ErrorLog:      quiet(),
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL.Scheme, pr.Out.URL.Host, pr.Out.Host = t.scheme, t.host, t.host
			pr.Out.URL.RawQuery = pr.In.URL.RawQuery // as it was, also where Go cannot read it
			for _, s := range t.secrets {
				pr.Out.Trailer = nil
				pr.Out.Header.Set(s.header, s.value)
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			refuse(w, http.StatusBadGateway, "the host cannot be reached, or does not answer")
		},
	}
	rp.ServeHTTP(w, req)
}
