package api_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// inGuest serves h on a port of this host's loopback, which is the guest's too.
func inGuest(t *testing.T, h http.HandlerFunc) (port int) {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().(*net.TCPAddr).Port
}

// freePort is one on which nobody listens.
func freePort(t *testing.T) int {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().(*net.TCPAddr).Port
}

// ofPort is where the proxy answers for a port of sb-1.
func ofPort(base string, port int) string {
	return fmt.Sprintf("%s/v1/sandboxes/sb-1/ports/%d", base, port)
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// ask makes a request that edit may change, and follows no redirect.
func ask(t *testing.T, method, target, body string, edit ...func(*http.Request)) answer {
	t.Helper()
	var in io.Reader
	if body != "" {
		in = strings.NewReader(body)
	}
	req, err := http.NewRequestWithContext(within(t), method, target, in)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range edit {
		f(req)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(text)}
}

// TestProxyRequest: what the guest is sent.
func TestProxyRequest(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Method", r.Method)
		w.WriteHeader(http.StatusTeapot)
		_, _ = fmt.Fprintf(w, "%s %s %s|%s", r.Method, r.RequestURI, r.Host, body)
	})
	host := fmt.Sprintf("localhost:%d", port)
	for _, tt := range []struct{ method, path, body, want string }{
		{"GET", "/", "", "GET / " + host + "|"},
		{"GET", "/a/b?x=1;y=%20&z", "", "GET /a/b?x=1;y=%20&z " + host + "|"},
		{"GET", "/a//b/../c%2Fd/", "", "GET /a//b/../c%2Fd/ " + host + "|"},
		{"POST", "/", "any text at all", "POST / " + host + "|any text at all"},
		{"PUT", "/x", "y", "PUT /x " + host + "|y"},
		{"PATCH", "/x", "y", "PATCH /x " + host + "|y"},
		{"DELETE", "/x", "", "DELETE /x " + host + "|"},
		{"OPTIONS", "/x", "", "OPTIONS /x " + host + "|"},
		{"PROPFIND", "/x", "", "PROPFIND /x " + host + "|"},
		{"HEAD", "/x", "", ""},
	} {
		a := ask(t, tt.method, ofPort(base, port)+tt.path, tt.body)
		if a.status != http.StatusTeapot || a.body != tt.want || a.header.Get("X-Method") != tt.method {
			t.Errorf("%s %s: %d %q, want %q", tt.method, tt.path, a.status, a.body, tt.want)
		}
		if len(a.header["X-Request-Id"]) != 1 {
			t.Errorf("%s %s: X-Request-Id %q", tt.method, tt.path, a.header["X-Request-Id"])
		}
	}
}

// TestProxyHeaders: the guest learns nothing of who the caller is to the daemon,
// and is told what a proxy says.
func TestProxyHeaders(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) { _ = r.Header.Write(w) })
	edit := func(r *http.Request) {
		r.Header.Set("Cookie", "a=b; c=d")
		r.Header.Set("X-Forwarded-For", "6.6.6.6")
		r.Header.Set("X-Forwarded-Prefix", "/evil")
		r.Header.Set("Forwarded", "for=6.6.6.6")
		r.Header.Set("Connection", "X-Hop")
		r.Header.Set("X-Hop", "one")
		r.Header.Set("Proxy-Authorization", "Basic x")
		r.Header.Set("X-Own", "kept")
	}
	for who, extra := range map[string]func(*http.Request){"fork": edit, "": func(r *http.Request) { edit(r); g.sign("nonce-nonce-0001", "")(r) }} {
		path := fmt.Sprintf("/v1/sandboxes/%s/ports/%d", id, port)
		if who == "" { // who signs has another's sandboxes: its own one is asked
			theirs := g.do(t, "", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`, g.sign("nonce-nonce-0002", `{"snapshot_tag":"py"}`))
			g.expect(t, theirs, 201, "")
			path = fmt.Sprintf("/v1/sandboxes/%s/ports/%d", decode[[]wire.Sandbox](t, theirs.body)[0].ID, port)
		}
		a := g.do(t, who, "GET", path+"/", "", extra)
		for _, secret := range []string{"Authorization", "Tine-", "tine_", "6.6.6.6", "/evil", "X-Hop", "Proxy-"} {
			if strings.Contains(a.body, secret) {
				t.Errorf("%q: the guest has been sent %s:\n%s", who, secret, a.body)
			}
		}
		got, err := textproto.NewReader(bufio.NewReader(strings.NewReader(a.body + "\r\n"))).ReadMIMEHeader()
		if err != nil {
			t.Fatal(err, a.body)
		}
		u, err := url.Parse(g.url)
		if err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]string{
			"Cookie": "a=b; c=d", "X-Own": "kept", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Host": u.Host,
			"X-Forwarded-Proto": "http", "X-Forwarded-Prefix": path,
		} {
			if got.Get(name) != want {
				t.Errorf("%q: %s is %q, want %q", who, name, got.Get(name), want)
			}
		}
	}
}

// TestProxyWithoutAuth: a daemon that asks nobody passes no token on either.
func TestProxyWithoutAuth(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Header.Get("Authorization")) })
	a := ask(t, "GET", ofPort(base, port)+"/", "", func(r *http.Request) { r.Header.Set("Authorization", "Bearer secret") })
	if a.status != http.StatusOK || a.body != "" {
		t.Errorf("%d, the guest was sent %q", a.status, a.body)
	}
}

// TestProxySlowBody: a client that stops in the middle of a body is not waited
// for.
func TestProxySlowBody(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	cfg := b.Config()
	cfg.BodyTime = 50 * time.Millisecond
	srv := httptest.NewServer(api.New(cfg)) // the checker would read the body itself
	t.Cleanup(srv.Close)
	if status, body := do(t, "POST", srv.URL+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	left := make(chan error, 1)
	port := inGuest(t, func(_ http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		left <- err
	})
	var d net.Dialer
	conn, err := d.DialContext(within(t), "tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	_, _ = fmt.Fprintf(conn, "PUT /v1/sandboxes/sb-1/ports/%d/ HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nthe beginning", port)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusRequestTimeout {
		text, _ := io.ReadAll(resp.Body)
		t.Errorf("status %d: %s", resp.StatusCode, text)
	}
	if err = <-left; err == nil {
		t.Error("the guest takes a part of the body for the whole")
	}
}

// TestProxySigned: a guest never has all of a body that is not what was signed.
func TestProxySigned(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`, g.sign("nonce-nonce-0000", `{"snapshot_tag":"py"}`))
	g.expect(t, a, 201, "")
	whole := make(chan string, 10)
	path := fmt.Sprintf("/v1/sandboxes/%s/ports/%d/", decode[[]wire.Sandbox](t, a.body)[0].ID, inGuest(t, func(_ http.ResponseWriter, r *http.Request) {
		if body, err := io.ReadAll(r.Body); err == nil {
			whole <- string(body)
		}
	}))
	long := strings.Repeat("a long body", 10_000)
	for i, try := range []struct {
		signed, sent string
		status       int
	}{
		{"", "", 200},
		{"what was meant", "what was meant", 200},
		{long, long, 200},
		{"x", "x", 200},
		{"what was meant", "what is sent", 401},
		{"what was meant", "", 401},
		{"", "x", 401},
		{long, long + "x", 401},
	} {
		a := g.do(t, "", "POST", path, try.sent, g.sign(fmt.Sprintf("nonce-nonce-%04d", i+1), try.signed))
		if a.status != try.status {
			t.Errorf("%d: %d %s, want %d", i, a.status, a.body, try.status)
		}
		if a.status == http.StatusOK {
			if got := <-whole; got != try.sent {
				t.Errorf("%d: the guest has %d bytes", i, len(got))
			}
		}
	}
	select {
	case body := <-whole:
		t.Errorf("the guest has been sent %.20q", body)
	default:
	}
}

// TestWithheld: what is withheld comes in the end, unless the body fails.
func TestWithheld(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "x", "xy", "a longer text than those before"} {
		for name, r := range map[string]io.Reader{
			"plain": strings.NewReader(text), "bytes": iotest.OneByteReader(strings.NewReader(text)),
			"with the end": iotest.DataErrReader(strings.NewReader(text)), "halves": iotest.HalfReader(strings.NewReader(text)),
		} {
			if err := iotest.TestReader(api.Withheld(r), []byte(text)); err != nil {
				t.Errorf("%s of %q: %v", name, text, err)
			}
		}
		fails := errors.New("fails")
		got, err := io.ReadAll(api.Withheld(io.MultiReader(strings.NewReader(text), iotest.ErrReader(fails))))
		if !errors.Is(err, fails) || string(got) != text[:max(len(text)-1, 0)] {
			t.Errorf("of %q, which fails: %q, %v", text, got, err)
		}
	}
}

// TestGuestPage: a page of a guest comes to the browser from the daemon's
// origin, and can do nothing there.
func TestGuestPage(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	hostile := http.Header{
		"Content-Type":                        {"text/html"},
		"Content-Security-Policy":             {"sandbox allow-same-origin allow-scripts", "default-src *"},
		"Content-Security-Policy-Report-Only": {"default-src 'none'; report-uri https://evil.example/"},
		"X-Content-Type-Options":              {"sniff"},
		"Access-Control-Allow-Origin":         {"*"},
		"Access-Control-Allow-Credentials":    {"true"},
		"Access-Control-Expose-Headers":       {"*"},
		"Service-Worker-Allowed":              {"/"},
		"Clear-Site-Data":                     {`"*"`},
		"Strict-Transport-Security":           {"max-age=31536000; includeSubDomains"},
		"Alt-Svc":                             {`h2="evil.example:443"`},
		"Nel":                                 {`{"report_to":"x"}`},
		"Report-To":                           {`{"group":"x"}`},
		"Www-Authenticate":                    {`Basic realm="the daemon"`},
		"X-Request-Id":                        {"made-up"},
		"X-Own":                               {"kept"},
	}
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), hostile)
		w.Header().Set("Link", "</early>")
		w.WriteHeader(http.StatusEarlyHints) // with all of it
		if r.URL.Path == "/unauthorized" {
			w.WriteHeader(http.StatusUnauthorized)
		}
		_, _ = io.WriteString(w, "<script>fetch('/v1/sandboxes')</script>")
	})
	for _, path := range []string{"/", "/unauthorized"} {
		a := ask(t, "GET", ofPort(base, port)+path, "")
		want := map[string][]string{
			"Content-Security-Policy": {"sandbox allow-scripts allow-forms"}, "X-Content-Type-Options": {"nosniff"}, "X-Own": {"kept"},
		}
		for name := range hostile {
			got := a.header.Values(name)
			if name == "Content-Type" || name == "X-Request-Id" && len(got) == 1 && got[0] != "made-up" {
				continue
			}
			if diff := cmp.Diff(want[name], got); diff != "" {
				t.Errorf("%s: %s %s", path, name, diff)
			}
		}
		if a.header.Get("X-Request-Id") == "" {
			t.Errorf("%s: no X-Request-Id", path)
		}
	}
	// What such a page's scripts and forms would send, the browser marks so.
	for _, edit := range []func(*http.Request){
		func(r *http.Request) { r.Header.Set("Origin", "null") },
		func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") },
	} {
		for _, target := range []string{base + "/v1/sandboxes", ofPort(base, port) + "/"} {
			if a := ask(t, "POST", target, `{"snapshot_tag":"py"}`, edit); a.status != http.StatusForbidden {
				t.Errorf("POST %s: %d %s", target, a.status, a.body)
			}
		}
	}
	for _, path := range []string{"/v1/sandboxes/sb-1/exec/stream", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d", port), fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", port)} {
		a := ask(t, "GET", base+path, "", func(r *http.Request) {
			for name, value := range map[string]string{
				"Origin": "null", "Connection": "Upgrade", "Upgrade": "websocket", "Sec-Websocket-Version": "13", "Sec-Websocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
			} {
				r.Header.Set(name, value)
			}
		})
		if a.status != http.StatusForbidden {
			t.Errorf("WebSocket %s: %d %s", path, a.status, a.body)
		}
	}
}

// TestGuestCookies: a guest's cookies come back to it alone.
func TestGuestCookies(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header()["Set-Cookie"] = strings.Split(r.URL.Query().Get("c"), "|")
		w.Header().Set("Location", r.URL.Query().Get("l"))
	})
	prefix := fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d", port)
	for cookies, want := range map[string][]string{
		"a=b":                                 {"a=b; Path=" + prefix + "/"},
		"a=b; Path=/; HttpOnly; SameSite=Lax": {"a=b; Path=" + prefix + "/; HttpOnly; SameSite=Lax"},
		"a=b; Domain=localhost; Max-Age=5":    {"a=b; Path=" + prefix + "/; Max-Age=5"},
		"a=b; Path=/v1":                       {"a=b; Path=" + prefix + "/"},
		"a=b; Path=" + prefix + "/in/":        {"a=b; Path=" + prefix + "/in/"},
		"a=b; Path=" + prefix + "0/":          {"a=b; Path=" + prefix + "/"},
		"a=b; Path=" + prefix + "/../":        {"a=b; Path=" + prefix + "/"},
		"a=b; Path=" + prefix + "/%2e%2e/":    {"a=b; Path=" + prefix + "/"},
		"a=b; Path=/x; Path=/":                {"a=b; Path=" + prefix + "/"},
		"no cookie|c=d":                       {"c=d; Path=" + prefix + "/"},
	} {
		a := ask(t, "GET", base+prefix+"/?c="+url.QueryEscape(cookies), "")
		if diff := cmp.Diff(want, a.header.Values("Set-Cookie")); diff != "" {
			t.Errorf("%s: %s", cookies, diff)
		}
	}
	for place, want := range map[string]string{
		"/login":               prefix + "/login",
		"/":                    prefix + "/",
		prefix + "/login":      prefix + "/login",
		"login?x":              "login?x",
		"//example.org/":       "//example.org/",
		"https://example.org/": "https://example.org/",
		"http://localhost:" + strconv.Itoa(port) + "/in?x": prefix + "/in?x",
		"http://localhost:" + strconv.Itoa(port):           prefix + "/",
		"http://localhost:" + strconv.Itoa(port) + "0/":    "http://localhost:" + strconv.Itoa(port) + "0/",
	} {
		if a := ask(t, "GET", base+prefix+"/?l="+url.QueryEscape(place), ""); a.header.Get("Location") != want {
			t.Errorf("%s: %q, want %q", place, a.header.Get("Location"), want)
		}
	}
}

// TestProxyRefuses: what is no guest's answer is one of ours.
func TestProxyRefuses(t *testing.T) {
	t.Parallel()
	base, b := server(t)
	raw := func(text string) int { return rawGuest(t, text) }
	for _, tt := range []struct {
		method, path string
		status       int
		code         string
	}{
		{"GET", "/v1/sandboxes/none/ports/80/", 404, "not_found"},
		{"GET", "/v1/sandboxes/none/ports/80/x?y", 404, "not_found"},
		{"GET", "/v1/sandboxes/../ports/80/x", 404, "not_found"},
		{"GET", "/v1/sandboxes//ports/80/x", 404, "not_found"},
		{"GET", "/v1/sandboxes/sb-1/ports//x", 404, "not_found"},
		{"GET", "/v1/sandboxes/sb-1/ports/0/", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/ports/65536/", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/ports/-1/", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/ports/080/", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/ports/http/", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/ports/80", 400, "invalid"},
		{"CONNECT", "/v1/sandboxes/sb-1/ports/80/", 405, "method_not_allowed"},
		{"POST", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", freePort(t)), 502, "unavailable"},
		{"GET", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", raw("220 mail.example ESMTP\r\n")), 502, "unavailable"},
		{"GET", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", raw("")), 502, "unavailable"},
		{"GET", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", raw("HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", 1<<20)+"\r\n\r\n")), 502, "unavailable"},
		{"GET", fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d/", raw("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")), 502, "unavailable"},
		{"POST", "/v1/sandboxes/none/ports", 404, "not_found"},
		{"GET", "/v1/sandboxes/none/ports", 404, "not_found"},
		{"DELETE", "/v1/sandboxes/none/ports/80", 404, "not_found"},
		{"DELETE", "/v1/sandboxes/sb-1/ports/80", 404, "not_found"},
		{"DELETE", "/v1/sandboxes/sb-1/ports/http", 400, "invalid"},
	} {
		body := ""
		if tt.method == "POST" {
			body = `{"guest_port":80}`
		}
		a := ask(t, tt.method, base+tt.path, body, func(r *http.Request) {
			r.Header.Set("Content-Type", "application/json")
			r.URL.Opaque = "" // the path goes as it is
		})
		got := decode[wire.Error](t, a.body)
		if a.status != tt.status || got.Code != tt.code {
			t.Errorf("%s %s: %d %+v, want %d %s", tt.method, tt.path, a.status, got, tt.status, tt.code)
		}
		if tt.status == http.StatusBadGateway && got.Hint == "" {
			t.Errorf("%s %s: no hint", tt.method, tt.path)
		}
	}
	b.Fail = func(op string) error {
		if op == "with" {
			return errdef.ErrConflict
		}
		return nil
	}
	if a := ask(t, "GET", ofPort(base, 80)+"/", ""); a.status != http.StatusConflict {
		t.Errorf("a sandbox that cannot be used: %d %s", a.status, a.body)
	}
}

// FuzzTarget: whatever the path, the sandbox that is asked is the one whose owner
// was looked at, and the guest has what follows the port, to the letter.
func FuzzTarget(f *testing.F) {
	for _, path := range []string{
		"/v1/sandboxes/sb-1/ports/80/", "/v1/sandboxes/sb%2D1/ports/80/a%2Fb//c/../d", "/v1/sandboxes/../ports/80/x",
		"/v1/sandboxes//ports/80/x", "/v1/sandboxes/sb-1/ports/80", "/v1/sandboxes/a%2Fports%2F1/ports/2/", "/v1/sandboxes/%zz/ports/2/",
	} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		id, prefix, rest, owned, port, ok := api.ParseTarget(path)
		if !ok {
			return
		}
		if id != owned || id == "" || port < 1 || port > 65535 || prefix+rest != path || rest[0] != '/' {
			t.Errorf("%q: sandbox %q, of which %q is asked for, port %d, prefix %q, path %q", path, id, owned, port, prefix, rest)
		}
		if want := fmt.Sprintf("/ports/%d", port); !strings.HasSuffix(prefix, want) {
			t.Errorf("%q: prefix %q, port %d", path, prefix, port)
		}
	})
}

// rawGuest answers each connection with a text, and ends it.
func rawGuest(t *testing.T, text string) (port int) {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			_, _ = http.ReadRequest(bufio.NewReader(conn))
			_, _ = io.WriteString(conn, text)
			_ = conn.Close()
		}
	}()
	return ln.Addr().(*net.TCPAddr).Port
}

// TestProxyCutOff: half an answer does not pass for the whole.
func TestProxyCutOff(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	port := rawGuest(t, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
	req, err := http.NewRequestWithContext(within(t), "GET", ofPort(base, port)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if text, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("the answer is %q, and whole", text)
	}
}

// TestProxyMuch: 64 MiB come as they were sent; a body beyond the bound of files
// is refused, one below it is not held up by that of JSON.
func TestProxyMuch(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	const size = 16 << 20
	numbers := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{1}), size) }
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		n, err := io.Copy(io.Discard, r.Body)
		if r.Method == http.MethodPut {
			_, _ = fmt.Fprint(w, n, err)
			return
		}
		_, _ = io.Copy(w, numbers())
	})
	req, err := http.NewRequestWithContext(within(t), "GET", ofPort(base, port)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	got, want := sha256.New(), sha256.New()
	n, err := io.Copy(got, resp.Body)
	_, _ = io.Copy(want, numbers())
	if n != size || err != nil || string(got.Sum(nil)) != string(want.Sum(nil)) {
		t.Errorf("%d bytes, %v, or others than were sent", n, err)
	}
	if a := ask(t, "PUT", ofPort(base, port)+"/", strings.Repeat("x", 1<<20)); a.status != 200 || a.body != "1048576 <nil>" {
		t.Errorf("a body of 1 MiB, which is the bound of files here: %d %s", a.status, a.body)
	}
	if a := ask(t, "PUT", ofPort(base, port)+"/", strings.Repeat("x", 1<<20+1)); a.status != http.StatusRequestEntityTooLarge {
		t.Errorf("a larger one: %d %s", a.status, a.body)
	}
}

// TestProxyStreams: what a guest has said is there before it says the next.
func TestProxyStreams(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	next := make(chan struct{})
	port := inGuest(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 3 {
			_, _ = fmt.Fprintf(w, "data: %d\n\n", i)
			_ = http.NewResponseController(w).Flush()
			<-next
		}
	})
	req, err := http.NewRequestWithContext(within(t), "GET", ofPort(base, port)+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	for i := range 3 {
		for lines.Scan() && lines.Text() == "" {
		}
		if want := fmt.Sprintf("data: %d", i); lines.Text() != want {
			t.Errorf("%q, want %q", lines.Text(), want)
		}
		next <- struct{}{}
	}
}

// echoSocket is a WebSocket that says what it hears, once it has been looked at.
func echoSocket(w http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = conn.CloseNow() }()
	for {
		kind, data, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err = conn.Write(r.Context(), kind, append([]byte("heard "), data...)); err != nil {
			return
		}
	}
}

func TestProxyWebSocket(t *testing.T) {
	t.Parallel()
	base, b := server(t)
	left := make(chan struct{})
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		echoSocket(w, r)
		left <- struct{}{}
	})
	dial := func() *websocket.Conn {
		conn, resp, err := websocket.Dial(within(t), ofPort(base, port)+"/ws", nil) //nolint:bodyclose // Dial closes it
		if err != nil {
			t.Fatal(err)
		}
		if resp.Header.Get("X-Content-Type-Options") != "nosniff" || resp.Header.Get("X-Request-Id") == "" {
			t.Errorf("header %v", resp.Header)
		}
		for _, text := range []string{"one", "two"} {
			if err = conn.Write(within(t), websocket.MessageText, []byte(text)); err != nil {
				t.Fatal(err)
			}
			if _, got, err := conn.Read(within(t)); err != nil || string(got) != "heard "+text {
				t.Fatalf("%q, %v", got, err)
			}
		}
		return conn
	}
	conn := dial()
	if err := conn.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Error(err)
	}
	<-left
	// It ends with the sandbox, on both sides.
	conn = dial()
	if err := b.Kill(t.Context(), "sb-1"); err != nil {
		t.Fatal(err)
	}
	<-left
	if _, _, err := conn.Read(within(t)); err == nil {
		t.Error("the WebSocket outlives its sandbox")
	}
}

// TestProxyAbandoned: of a client that leaves nothing stays, although the guest
// has never answered. It is not parallel, to see what it has left itself.
func TestProxyAbandoned(t *testing.T) {
	b := apitest.New(t)
	srv := b.Serve(spec)
	if status, body := do(t, "POST", srv.URL+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	http.DefaultClient.CloseIdleConnections()
	ignore := goleak.IgnoreCurrent()
	asked, left := make(chan struct{}), make(chan struct{})
	guest := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
		close(left)
	}))
	ctx, cancel := context.WithCancel(within(t))
	go func() {
		<-asked
		cancel()
	}()
	req, err := http.NewRequestWithContext(ctx, "GET", ofPort(srv.URL, guest.Listener.Addr().(*net.TCPAddr).Port)+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{}}
	resp, err := client.Do(req)
	if err == nil {
		_ = resp.Body.Close()
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the client: %v", err)
	}
	<-left
	guest.Close()
	client.CloseIdleConnections()
	goleak.VerifyNone(t, ignore)
}

// TestProxyIsUse: a sandbox that is suspended is resumed.
func TestProxyIsUse(t *testing.T) {
	t.Parallel()
	base, b := server(t)
	port := inGuest(t, func(http.ResponseWriter, *http.Request) {})
	if _, err := b.Suspend(t.Context(), "sb-1"); err != nil {
		t.Fatal(err)
	}
	if a := ask(t, "GET", ofPort(base, port)+"/", ""); a.status != http.StatusOK {
		t.Errorf("%d %s", a.status, a.body)
	}
	if box, err := b.Get("sb-1"); err != nil || box.State != sandbox.Running {
		t.Errorf("%+v, %v", box, err)
	}
}

// tunnelTo opens a tunnel to a port of sb-1.
func tunnelTo(t *testing.T, base string, port int) *websocket.Conn {
	t.Helper()
	conn, _, err := websocket.Dial(within(t), ofPort(base, port), nil) //nolint:bodyclose // Dial closes it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.CloseNow() })
	return conn
}

// TestTunnel is the WebSocket of docs/api.md, by hand.
func TestTunnel(t *testing.T) {
	t.Parallel()
	base, b := server(t)
	ctx := within(t)
	port := tcpGuest(t, func(conn *net.TCPConn) {
		text, _ := io.ReadAll(conn) // up to the client's end
		_, _ = fmt.Fprintf(conn, "heard %s", text)
	})
	conn := tunnelTo(t, base, port)
	for _, piece := range []string{"one ", "two", ""} {
		if err := conn.Write(ctx, websocket.MessageBinary, []byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	var heard []byte
	for {
		kind, data, err := conn.Read(ctx)
		if err != nil || kind != websocket.MessageBinary {
			t.Fatalf("after %q: %v, %v", heard, kind, err)
		}
		if len(data) == 0 {
			break
		}
		heard = append(heard, data...)
	}
	if string(heard) != "heard one two" {
		t.Errorf("heard %q", heard)
	}
	if _, _, err := conn.Read(ctx); websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("the end: %v", err)
	}

	// A connection that breaks says so.
	conn = tunnelTo(t, base, tcpGuest(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.SetLinger(0)
	}))
	if err := conn.Write(ctx, websocket.MessageBinary, []byte("x")); err != nil {
		t.Fatal(err)
	}
	kind, data, err := conn.Read(ctx)
	if err != nil || kind != websocket.MessageText {
		t.Fatalf("%v, %v", kind, err)
	}
	if event := decode[wire.StreamEvent](t, string(data)); event.Error == nil || event.Error.Code != "unavailable" {
		t.Errorf("event %s", data)
	}

	// Text is for nobody.
	conn = tunnelTo(t, base, tcpGuest(t, func(conn *net.TCPConn) { _, _ = io.Copy(io.Discard, conn) }))
	if err = conn.Write(ctx, websocket.MessageText, []byte("{}")); err != nil {
		t.Fatal(err)
	}
	if _, data, err = conn.Read(ctx); err != nil || !strings.Contains(string(data), `"invalid"`) {
		t.Errorf("%s, %v", data, err)
	}

	// It ends with the sandbox.
	ended := make(chan struct{})
	conn = tunnelTo(t, base, tcpGuest(t, func(conn *net.TCPConn) {
		_, _ = io.Copy(io.Discard, conn)
		close(ended)
	}))
	if err = b.Kill(t.Context(), "sb-1"); err != nil {
		t.Fatal(err)
	}
	<-ended
	if _, data, err = conn.Read(ctx); err != nil || !strings.Contains(string(data), `"error"`) {
		t.Errorf("%s, %v", data, err)
	}
}

// tcpGuest serves each connection to a port of the guest's.
func tcpGuest(t *testing.T, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				serve(conn.(*net.TCPConn))
			}()
		}
	}()
	return ln.Addr().(*net.TCPAddr).Port
}

func TestTunnelRefuses(t *testing.T) {
	t.Parallel()
	base, _ := server(t)
	for path, status := range map[string]int{
		"/v1/sandboxes/none/ports/80": 404, "/v1/sandboxes/sb-1/ports/0": 400, "/v1/sandboxes/sb-1/ports/65536": 400,
		fmt.Sprintf("/v1/sandboxes/sb-1/ports/%d", freePort(t)): 502,
	} {
		conn, resp, err := websocket.Dial(within(t), base+path, nil) //nolint:bodyclose // Dial closes it
		if err == nil {
			_ = conn.CloseNow()
		}
		if resp == nil || resp.StatusCode != status {
			t.Errorf("%s: %v, want %d", path, err, status)
		}
	}
}

// TestPublishedPorts goes through the life of publications.
func TestPublishedPorts(t *testing.T) {
	t.Parallel()
	base, b := server(t)
	root := base + "/v1/sandboxes/sb-1/ports"
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) })
	if status, body := do(t, "GET", root, ""); status != 200 || strings.TrimSpace(body) != "[]" {
		t.Errorf("at first: %d %s", status, body)
	}
	status, body := do(t, "POST", root, fmt.Sprintf(`{"guest_port":%d}`, port))
	if status != http.StatusCreated {
		t.Fatalf("publish: %d %s", status, body)
	}
	p := decode[wire.PublishedPort](t, body)
	if p.GuestPort != port || p.HostPort == 0 || p.Address != fmt.Sprintf("127.0.0.1:%d", p.HostPort) {
		t.Errorf("published %+v", p)
	}
	if a := ask(t, "GET", "http://"+p.Address+"/", ""); a.body != p.Address { // all of it is the guest's
		t.Errorf("%d %s", a.status, a.body)
	}
	_, body = do(t, "GET", root, "")
	if diff := cmp.Diff([]wire.PublishedPort{p}, decode[[]wire.PublishedPort](t, body)); diff != "" {
		t.Error(diff)
	}
	for request, want := range map[string]int{
		fmt.Sprintf(`{"guest_port":%d}`, port): 409, fmt.Sprintf(`{"guest_port":1,"host_port":%d}`, p.HostPort): 409,
		`{"guest_port":0}`: 400, `{}`: 400, `{"guest_port":80,"host_port":22}`: 400, `{"guest_port":"80"}`: 400,
	} {
		if status, body = do(t, "POST", root, request); status != want {
			t.Errorf("%s: %d %s, want %d", request, status, body, want)
		}
	}
	if status, body = do(t, "DELETE", fmt.Sprintf("%s/%d", root, port), ""); status != http.StatusNoContent {
		t.Errorf("delete: %d %s", status, body)
	}
	refused(t, p.Address)

	// It ends with the sandbox.
	_, body = do(t, "POST", root, fmt.Sprintf(`{"guest_port":%d}`, port))
	p = decode[wire.PublishedPort](t, body)
	if err := b.Kill(t.Context(), "sb-1"); err != nil {
		t.Fatal(err)
	}
	refused(t, p.Address)
	if left := b.Ports.List("sb-1"); len(left) != 0 {
		t.Errorf("left: %+v", left)
	}
	if status, body = do(t, "POST", root, `{"guest_port":80}`); status != http.StatusNotFound {
		t.Errorf("of a sandbox that is gone: %d %s", status, body)
	}
}

// refused sees that nobody listens at an address.
func refused(t *testing.T, address string) {
	t.Helper()
	var d net.Dialer
	if conn, err := d.DialContext(within(t), "tcp", address); err == nil {
		_ = conn.Close()
		t.Errorf("somebody listens at %s", address)
	}
}

// TestNoPorts: a daemon may publish none.
func TestNoPorts(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	cfg := b.Config()
	cfg.Ports = nil
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	t.Cleanup(srv.Close)
	for _, try := range [][3]string{{"GET", "", ""}, {"POST", "", `{"guest_port":1}`}, {"DELETE", "/1", ""}} {
		if status, body := do(t, try[0], srv.URL+"/v1/sandboxes/sb-1/ports"+try[1], try[2]); status != http.StatusNotImplemented {
			t.Errorf("%s: %d %s", try[0], status, body)
		}
	}
}

// TestPortsOfOthers: reaching a port needs what running a command needs.
func TestPortsOfOthers(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Method) })
	ports := "/v1/sandboxes/" + id + "/ports"
	one := fmt.Sprintf("%s/%d", ports, port)
	spelled := strings.Replace(one, "sb-", "%73%62-", 1)
	for who, want := range map[string]int{"": 401, "read": 403, "few": 404, "fork": 200, "admin": 200} {
		for _, method := range []string{"GET", "POST", "PURGE"} {
			for _, path := range []string{one + "/", one + "/a/../../..", spelled + "/x"} {
				if a := g.do(t, who, method, path, ""); a.status != want || want == 200 && a.body != method {
					t.Errorf("%s: %s %s: %d %s, want %d", who, method, path, a.status, a.body, want)
				}
			}
		}
		if want == 200 {
			continue
		}
		for _, try := range [][3]string{{"GET", ports, ""}, {"POST", ports, `{"guest_port":80}`}, {"GET", one, ""}, {"DELETE", one, ""}} {
			if a := g.do(t, who, try[0], try[1], try[2]); a.status != want {
				t.Errorf("%s: %s %s: %d %s, want %d", who, try[0], try[1], a.status, a.body, want)
			}
		}
	}
	if a := g.do(t, "fork", "POST", ports, `{"guest_port":80}`); a.status != http.StatusCreated {
		t.Errorf("publish: %d %s", a.status, a.body)
	}
}

// TestPortsAreRemembered: each request to a guest is an act.
func TestPortsAreRemembered(t *testing.T) {
	t.Parallel()
	base, end := audited(t, false)
	if status, body := do(t, "POST", base+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	port := inGuest(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusTeapot)
	})
	ask(t, "GET", ofPort(base, port)+"/a/b", "")
	ask(t, "POST", ofPort(base, port)+"/", "s3cret")
	do(t, "POST", base+"/v1/sandboxes/sb-1/ports", `{"guest_port":80}`)
	do(t, "DELETE", base+"/v1/sandboxes/sb-1/ports/80", "")
	do(t, "GET", ofPort(base, 80), "")
	var got []string
	for _, r := range end() {
		if r.Phase == "outcome" && strings.HasPrefix(r.Action, "sandbox.port") {
			got = append(got, fmt.Sprintln(r.Action, r.Object, r.Status, r.Path))
		}
	}
	root := "/v1/sandboxes/sb-1/ports"
	want := []string{
		fmt.Sprintln("sandbox.port.ask sb-1 418", fmt.Sprintf("%s/%d/a/b", root, port)),
		fmt.Sprintln("sandbox.port.ask sb-1 418", fmt.Sprintf("%s/%d/", root, port)),
		fmt.Sprintln("sandbox.port.publish sb-1 201", root),
		fmt.Sprintln("sandbox.port.unpublish sb-1 204", root+"/80"),
		fmt.Sprintln("sandbox.port.connect sb-1 400", root+"/80"),
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
