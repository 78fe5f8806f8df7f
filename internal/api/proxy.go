package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

const (
	// proxyRoute is what a web server in a sandbox is asked by, and proxyPattern
	// that with all methods. No ServeMux knows it: it would clean the path, which
	// is the guest's.
	proxyRoute   = "/v1/sandboxes/{id}/ports/{port}/{path...}"
	proxyPattern = "ANY " + proxyRoute
	// maxGuestHeader bounds the head of a guest's answer.
	maxGuestHeader = 256 << 10
	// guestPolicy puts a page of a guest into an origin of its own: it may run
	// scripts and have forms, but to the browser it is nobody whom this daemon
	// knows. See target.clean.
	guestPolicy = "sandbox allow-scripts allow-forms"
)

// target is what a proxied request is for.
type target struct {
	id     string
	port   int
	prefix string // of the path, without the slash that follows, as the client has it
	path   string // the rest, which is the guest's; it begins with a slash
}

// isProxied reports whether a path, as it is written in a request, is for a web
// server in a sandbox.
func isProxied(escaped string) bool {
	rest, ok := strings.CutPrefix(escaped, "/v1/sandboxes/")
	if !ok {
		return false
	}
	parts := strings.SplitN(rest, "/", 4) // id, "ports", port, path
	return len(parts) == 4 && parts[0] != "" && parts[1] == "ports" && parts[2] != ""
}

// parseTarget reads a path that isProxied.
func parseTarget(escaped string) (target, error) {
	parts := strings.SplitN(strings.TrimPrefix(escaped, "/v1/sandboxes/"), "/", 4)
	t := target{
		id:     objectIn(proxyPattern, escaped), // as those who have let the request in have read it
		prefix: "/v1/sandboxes/" + parts[0] + "/ports/" + parts[2],
		path:   "/" + parts[3],
	}
	var err error
	t.port, err = parsePort(parts[2])
	return t, err
}

// proxy answers all requests for proxyRoute.
func (s *server) proxy(w http.ResponseWriter, r *http.Request) {
	noteStream(w)
	if err := s.forward(w, r); err != nil {
		s.fail(w, r, err)
	}
}

// forward has a web server in a sandbox answer a request.
func (s *server) forward(w http.ResponseWriter, r *http.Request) error {
	if r.Method == http.MethodConnect {
		w.Header().Set("Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE")
		return refuse("method_not_allowed", "CONNECT is not allowed on "+r.URL.Path)
	}
	if r.Header.Get("Upgrade") != "" {
		if err := checkOrigin(r); err != nil {
			return err
		}
	}
	t, err := parseTarget(r.URL.EscapedPath())
	if err != nil {
		return err
	}
	if r.ContentLength == 0 { // the proxy would not look at it, and a signature covers that, too
		if _, err = io.Copy(io.Discard, r.Body); err != nil {
			return bodyError(err)
		}
	}
	body := &withheld{ReadCloser: r.Body}
	r.Body = body
	leave, err := s.enterStream()
	if err != nil {
		return err
	}
	defer leave()
	err = s.Sandboxes.With(r.Context(), t.id, func(ctx context.Context, g *guest.Client) error {
		conn, derr := dialGuest(ctx, g, t.port)
		if derr != nil {
			return derr
		}
		defer func() { _ = conn.Close() }() // the transport may have closed it
		return t.ask(ctx, w, r.WithContext(ctx), conn)
	})
	if err != nil && r.Context().Err() != nil {
		// A body that does not come ends the request's context before it fails.
		if failed := body.failure(); ofBody(failed) {
			return failed
		}
	}
	return err
}

// ask sends r over conn, which is for this request alone: the sandbox is in use
// for as long as there is a connection, and no longer.
func (t target) ask(ctx context.Context, w http.ResponseWriter, r *http.Request, conn net.Conn) (err error) {
	transport := &http.Transport{
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxGuestHeader,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	proxy := &httputil.ReverseProxy{
		Rewrite:        t.rewrite,
		Transport:      plainly{ctx, transport},
		ModifyResponse: func(resp *http.Response) error { return t.clean(w, r, resp) },
		FlushInterval:  -1,
		ErrorLog:       log.New(io.Discard, "", 0), // what fails is the guest's affair, and the client sees it
		ErrorHandler:   func(_ http.ResponseWriter, _ *http.Request, failed error) { err = t.failed(ctx, failed) },
	}
	defer func() {
		// The proxy panics so when an answer that has begun does not come to its
		// end. The error has the client's connection cut.
		if p := recover(); p != nil {
			if failed, ok := p.(error); !ok || !errors.Is(failed, http.ErrAbortHandler) {
				panic(p) //nolint:forbidigo // a bug, which outermost logs
			}
			err = t.failed(ctx, io.ErrUnexpectedEOF)
		}
	}()
	proxy.ServeHTTP(w, r)
	return err
}

// plainly makes requests without the proxy's trace, by which guests' 1xx
// answers would come to the client with headers that nobody has cleaned.
type plainly struct {
	ctx context.Context
	*http.Transport
}

// RoundTrip makes the request.
func (p plainly) RoundTrip(r *http.Request) (*http.Response, error) {
	return p.Transport.RoundTrip(r.WithContext(p.ctx))
}

// failed says why there is no answer, or no whole one.
func (t target) failed(ctx context.Context, err error) error {
	if ofBody(err) {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = fmt.Errorf("%w: answer of port %d in the sandbox: %w", errdef.ErrUnavailable, t.port, err)
	return withStatus(errdef.WithHint(err, "what listens there has to speak HTTP/1.1; tine port forwards anything"), http.StatusBadGateway)
}

// ofBody reports whether an error is of reading the request's body: it is too
// large, too slow, or not what was signed.
func ofBody(err error) bool {
	_, large := errors.AsType[*http.MaxBytesError](err)
	_, slow := errors.AsType[*refusal](err)
	_, unsigned := errors.AsType[*auth.Unauthenticated](err)
	return large || slow || unsigned
}

// withheld is a body whose last byte is not there before its end was read. So a
// guest never has all of a body that turns out, at its end, not to be the one
// that was signed.
type withheld struct {
	io.ReadCloser

	mu   sync.Mutex // held by Read
	last byte
	has  bool // last is one
	over bool // and nothing comes after it
	err  error
}

// failure is why the body could not be read, or nil. It waits for a Read that is
// under way.
func (b *withheld) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

// Read returns all but the last byte, and that with the end.
func (b *withheld) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for !b.over {
		n, err := b.ReadCloser.Read(p)
		n = b.swap(p[:n])
		if err != nil && !errors.Is(err, io.EOF) {
			b.err = err
		}
		if b.over = errors.Is(err, io.EOF); !b.over && (n > 0 || err != nil) {
			return n, err
		}
		if b.over && n > 0 {
			return n, nil
		}
	}
	if !b.has {
		return 0, io.EOF
	}
	p[0], b.has = b.last, false
	return 1, io.EOF
}

// swap puts the byte that was withheld before those that were read, withholds
// the last of these, and returns how many there are then.
func (b *withheld) swap(p []byte) int {
	if len(p) == 0 {
		return 0
	}
	last := p[len(p)-1]
	copy(p[1:], p[:len(p)-1])
	p[0], b.last = b.last, last
	if b.has {
		return len(p)
	}
	b.has = true
	return copy(p, p[1:])
}

// rewrite makes the request that the guest sees. The proxy has dropped headers
// of one hop, and what the client said of hops before it.
func (t target) rewrite(r *httputil.ProxyRequest) {
	host := net.JoinHostPort("localhost", strconv.Itoa(t.port))
	r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = "http", host, host
	path, err := url.PathUnescape(t.path)
	if err != nil { // it was parsed before
		path = t.path
	}
	r.Out.URL.Path, r.Out.URL.RawPath = path, t.path
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	r.SetXForwarded()
	h := r.Out.Header
	h.Set("X-Forwarded-Prefix", t.prefix)
	// Who the caller is to this daemon is nothing that a guest may know. A daemon
	// that asks nobody is shown tokens too, by clients that have one.
	h.Del("Authorization")
	for name := range h {
		if strings.HasPrefix(name, "Tine-") { // a signature's
			delete(h, name)
		}
	}
}

// isDropped reports whether a header of an answer acts on its whole origin, which
// is the daemon's: on what the browser keeps for it, on where and how it
// connects, on whom it tells of other requests, on the passwords that it asks
// the user for, on who may read answers, and on which pages a service worker
// stands before. X-Request-Id is ours.
func isDropped(name string) bool {
	switch name {
	case "Accept-Ch", "Alt-Svc", "Clear-Site-Data", "Content-Security-Policy-Report-Only", "Nel", "Report-To",
		"Reporting-Endpoints", "Service-Worker-Allowed", "Strict-Transport-Security", "Www-Authenticate", requestIDHeader:
		return true
	}
	return strings.HasPrefix(name, "Access-Control-")
}

// clean makes a guest's answer harmless to a browser, to which it comes from the
// daemon's origin.
//
// The policy has the browser treat every page as one of an origin that is like
// no other. So its scripts cannot read what the daemon answers; whatever they
// send says Origin: null, or Sec-Fetch-Site: cross-site, and is refused by
// sameOrigin; and there are no service workers, no storage. Without nosniff what
// claims to be a picture could be taken for a page. Nothing allows an origin to
// read another's answers: a page of one guest could read those of another.
func (t target) clean(w http.ResponseWriter, r *http.Request, resp *http.Response) error {
	h := resp.Header
	for name := range h {
		if isDropped(name) {
			delete(h, name)
		}
	}
	h.Set("Content-Security-Policy", guestPolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	if lines := h["Set-Cookie"]; lines != nil {
		delete(h, "Set-Cookie")
		for _, line := range t.cookies(lines) {
			h.Add("Set-Cookie", line)
		}
	}
	if place := h.Get("Location"); place != "" {
		h.Set("Location", t.place(place))
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil
	}
	if asked := r.Header.Get("Upgrade"); asked == "" || !strings.EqualFold(asked, h.Get("Upgrade")) {
		return fmt.Errorf("it switches to protocol %q, and was asked for %q", h.Get("Upgrade"), asked)
	}
	if rec := recorderOf(w); rec != nil {
		rec.status = http.StatusSwitchingProtocols // the proxy writes it to the connection itself
	}
	return nil
}

// cookies keeps a guest's cookies to the guest: they are sent to no other host,
// and to no path but that of its port. What cannot be read is dropped.
func (t target) cookies(lines []string) []string {
	var kept []string
	for _, line := range lines {
		c, err := http.ParseSetCookie(line)
		if err != nil {
			continue
		}
		c.Domain = ""
		if !t.has(c.Path) {
			c.Path = t.prefix + "/"
		}
		if text := c.String(); text != "" {
			kept = append(kept, text)
		}
	}
	return kept
}

// has reports whether a path is of this port.
func (t target) has(path string) bool {
	return strings.HasPrefix(path, t.prefix+"/") && !strings.Contains(path, "..") && !strings.Contains(path, "%")
}

// place is where a redirect leads: a path of the guest's is below the prefix,
// which a program need not know.
func (t target) place(location string) string {
	own := "http://" + net.JoinHostPort("localhost", strconv.Itoa(t.port))
	if rest, ok := strings.CutPrefix(location, own); ok && (rest == "" || rest[0] == '/') {
		location = "/" + strings.TrimPrefix(rest, "/")
	}
	if !strings.HasPrefix(location, "/") || strings.HasPrefix(location, "//") || t.has(location) {
		return location
	}
	return t.prefix + location
}
