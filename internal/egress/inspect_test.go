package egress

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

// helloOf is what crypto/tls sends first.
func helloOf(tb testing.TB, cfg *tls.Config) []byte {
	tb.Helper()
	a, b := net.Pipe()
	go func() {
		_ = tls.Client(a, cfg).HandshakeContext(tb.Context())
		_ = a.Close()
	}()
	raw, _, err := readHello(b)
	_ = b.Close()
	if err != nil {
		tb.Fatal(err)
	}
	return raw
}

func TestReadHello(t *testing.T) {
	t.Parallel()
	named := helloOf(t, &tls.Config{ServerName: "a.example", NextProtos: []string{"h2", "http/1.1"}})
	none := helloOf(t, &tls.Config{InsecureSkipVerify: true})
	old := helloOf(t, &tls.Config{ServerName: "a.example", MaxVersion: tls.VersionTLS12})
	// The same message in records of 7 bytes.
	var split []byte
	for part := range slices.Chunk(named[recordHeader:], 7) {
		split = append(append(split, recordHandshake, 3, 1, 0, byte(len(part))), part...)
	}
	at := bytes.Index(named, []byte("\x00\x00\x00\x0e\x00\x0c\x00\x00\x09a.example"))
	if at < 0 {
		t.Fatal("no server name in the hello")
	}
	change := func(offset int, to string) []byte {
		raw := slices.Clone(named)
		copy(raw[at+offset:], to)
		return raw
	}
	tests := map[string]struct {
		raw  []byte
		name string
		bad  bool
	}{
		"named":          {named, "a.example", false},
		"none":           {none, "", false},
		"tls-1.2":        {old, "a.example", false},
		"split":          {split, "a.example", false},
		"and-more":       {append(slices.Clone(named), "more"...), "a.example", false},
		"other-type":     {change(6, "\x01"), "", true},
		"long-name":      {change(7, "\xff"), "", true},
		"long-list":      {change(4, "\xff"), "", true},
		"short-list":     {change(4, "\x00\x0b"), "", true},
		"long-extension": {change(2, "\xff"), "", true},
		"cut":            {named[:len(named)-1], "", true},
		"http":           {[]byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"), "", true},
		"empty":          {nil, "", true},
		"empty-record":   {[]byte{22, 3, 1, 0, 0, 22, 3, 1, 0, 0}, "", true},
		"server-hello":   {[]byte{22, 3, 1, 0, 4, 2, 0, 0, 0}, "", true},
		"empty-hello":    {[]byte{22, 3, 1, 0, 4, 1, 0, 0, 0}, "", true},
		"huge-hello":     {[]byte{22, 3, 1, 0, 4, 1, 1, 0, 0}, "", true},
		"huge-record":    {append([]byte{22, 3, 1, 0x40, 1}, make([]byte, 1<<15)...), "", true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			raw, got, err := readHello(bytes.NewReader(tt.raw))
			if got != tt.name || (err != nil) != tt.bad {
				t.Errorf("name %q, error %v", got, err)
			}
			if err == nil && !bytes.HasPrefix(tt.raw, raw) || len(raw) > maxHello {
				t.Errorf("read %d bytes of %d", len(raw), len(tt.raw))
			}
		})
	}
}

func TestTwoServerNames(t *testing.T) {
	t.Parallel()
	sni := "0000000e000c000009612e6578616d706c65"
	hello := func(extensions string) []byte {
		body := strings.Repeat("00", 34) + "00" + "00021301" + "0100" + hex.EncodeToString([]byte{byte(len(extensions) / 512), byte(len(extensions) / 2)}) + extensions
		raw, err := hex.DecodeString(body)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	if name, err := serverName(hello(sni)); name != "a.example" || err != nil {
		t.Errorf("one: %q, %v", name, err)
	}
	if name, err := serverName(hello(sni + sni)); err == nil {
		t.Errorf("two extensions: %q", name)
	}
	two := "0000001a0018000009612e6578616d706c65000009622e6578616d706c65"
	if name, err := serverName(hello(two)); err == nil {
		t.Errorf("two names: %q", name)
	}
	if name, err := serverName(hello("")); name != "" || err != nil {
		t.Errorf("none: %q, %v", name, err)
	}
}

// What crypto/tls takes for a ClientHello, and we too, has the same name for both.
func FuzzHello(f *testing.F) {
	f.Add(helloOf(f, &tls.Config{ServerName: "a.example"}))
	f.Add(helloOf(f, &tls.Config{InsecureSkipVerify: true}))
	f.Add([]byte{22, 3, 1, 0, 4, 1, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		raw, name, err := readHello(bytes.NewReader(data))
		if len(raw) > maxHello || len(name) > len(raw) {
			t.Fatalf("%d bytes, name of %d", len(raw), len(name))
		}
		if err != nil {
			return
		}
		server := tls.Server(&helloConn{r: bytes.NewReader(raw)}, &tls.Config{
			GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				if !strings.EqualFold(strings.TrimSuffix(h.ServerName, "."), strings.TrimSuffix(name, ".")) {
					t.Errorf("we say %q, crypto/tls %q", name, h.ServerName)
				}
				return nil, errors.New("enough")
			},
		})
		_ = server.Handshake()
	})
}

type helloConn struct {
	net.Conn
	r io.Reader
}

func (c *helloConn) Read(p []byte) (int, error)  { return c.r.Read(p) }
func (c *helloConn) Write(p []byte) (int, error) { return len(p), nil }
func (c *helloConn) Close() error                { return nil }

// webServer serves on loopback until the test ends.
func webServer(tb testing.TB, h http.Handler, tls bool) *httptest.Server {
	tb.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = quiet()
	if tls {
		s.StartTLS()
	} else {
		s.Start()
	}
	tb.Cleanup(s.Close)
	return s
}

// web is a world with a host a.example, which has a web server, and whose rules
// are inspected.
func web(tb testing.TB, cfg Config, rules ...string) *world {
	tb.Helper()
	if cfg.Policy == nil {
		cfg.Policy = compile(tb, true, rules...)
	}
	w := start(tb, cfg, func(l *limits) { l.inspect = 5 * time.Second })
	w.names.open(netip.MustParseAddr("93.184.216.34"), "a.example", time.Now().Add(time.Hour))
	return w
}

func TestInspectTLS(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example:443", "*.b.example:443", "c.example:80", "93.184.217.1")
	up := webServer(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(rw, "hello "+r.Host)
	}), true)
	w.net.put("tcp", server, up.Listener.Addr().String())
	w.net.put("tcp", "93.184.217.1:443", up.Listener.Addr().String())
	shake := func(dst, name string) error {
		c := tls.Client(w.link.connect(t, dst), &tls.Config{ServerName: name, InsecureSkipVerify: true})
		return c.HandshakeContext(t.Context())
	}
	for _, name := range []string{"a.example", "A.example", "x.y.b.example"} {
		if err := shake(server, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"evil.example", "b.example", "c.example", "x.a.example"} {
		if err := shake(server, name); err == nil {
			t.Errorf("%s is let through", name)
		}
		w.wantDenial(t, TCP, name+" ("+server+")", WrongServerName)
	}
	if err := shake(server, ""); err == nil {
		t.Error("no name is let through")
	}
	w.wantDenial(t, TCP, server, NoServerName)
	if err := shake("93.184.217.1:443", "evil.example"); err != nil { // a rule by address allows it
		t.Error(err)
	}
	if got := len(w.net.dials()); got != 4 {
		t.Errorf("dialed %v", w.net.dials())
	}
}

func TestInspectNothingShown(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, true, "a.example")}, func(l *limits) { l.inspect = 20 * time.Millisecond })
	w.names.open(netip.MustParseAddr("93.184.216.34"), "a.example", time.Now().Add(time.Hour))
	wantReset(t, w.link.connect(t, server)) // says nothing
	w.wantDenial(t, TCP, server, NoServerName)
	guest := w.link.connect(t, "93.184.216.34:80")
	_ = guest.CloseWrite()
	w.wantDenial(t, TCP, "93.184.216.34:80", NoServerName)
	guest = w.link.connect(t, server)
	_, _ = guest.Write([]byte{22, 3, 1, 1}) // and no more
	wantReset(t, guest)
	if dialed := w.net.dials(); len(dialed) > 0 {
		t.Errorf("dialed %v", dialed)
	}
}

// The policy that is set while a connection has shown a name asks for that name.
func TestSetPolicyAfterInspection(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example", "b.example")
	w.net.serve(server, func(c *net.TCPConn) {
		if _, _, err := readHello(c); err == nil {
			echo(c)
		}
	})
	open := func(name string) *net.TCPConn {
		guest := w.link.connect(t, server)
		_, _ = guest.Write(helloOf(t, &tls.Config{ServerName: name}))
		wantEcho(t, guest)
		return guest
	}
	a, b := open("a.example"), open("b.example")
	w.SetPolicy(compile(t, true, "b.example"))
	wantReset(t, a)
	wantEcho(t, b)
}

// request sends one request and returns the answer's status and body.
func request(tb testing.TB, c net.Conn, text string) (int, string) {
	tb.Helper()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, text); err != nil {
		tb.Fatal(err)
	}
	return response(tb, bufio.NewReader(c))
}

func response(tb testing.TB, r *bufio.Reader) (int, string) {
	tb.Helper()
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		tb.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		tb.Fatal(err)
	}
	return res.StatusCode, string(body)
}

func get(host string) string { return "GET /p?a=1;b HTTP/1.1\r\nHost: " + host + "\r\n\r\n" }

func TestInspectHTTP(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example:80", "b.example:443")
	up := webServer(t, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = io.WriteString(rw, r.Method+" "+r.Host+" "+r.RequestURI+" "+r.Header.Get("X-Forwarded-For")+r.Header.Get("Upgrade")+string(body))
	}), false)
	const dst = "93.184.216.34:80"
	w.net.put("tcp", dst, up.Listener.Addr().String())
	tests := map[string]struct {
		text   string
		status int
		body   string
	}{
		"allowed":      {get("a.example"), 200, "GET a.example /p?a=1;b "},
		"case-port":    {get("A.Example:80"), 200, "GET A.Example:80 /p?a=1;b "},
		"other-port":   {get("a.example:443"), 403, "tine egress: no rule allows this host\n"},
		"other":        {get("evil.example"), 403, "tine egress: no rule allows this host\n"},
		"other-rule":   {get("b.example"), 403, "tine egress: no rule allows this host\n"},
		"address":      {get("93.184.216.34"), 403, "tine egress: no rule allows this host\n"},
		"none":         {"GET / HTTP/1.0\r\n\r\n", 403, "tine egress: no rule allows this host\n"},
		"absolute":     {"GET http://evil.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", 403, "tine egress: no rule allows this host\n"},
		"connect":      {"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n", 405, "tine egress: this method goes nowhere\n"},
		"trace":        {"TRACE / HTTP/1.1\r\nHost: a.example\r\n\r\n", 405, "tine egress: this method goes nowhere\n"},
		"h2c":          {"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n", 200, "GET a.example / "},
		"two-hosts":    {"GET / HTTP/1.1\r\nHost: a.example\r\nHost: evil.example\r\n\r\n", 400, ""},
		"two-lengths":  {"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy", 400, ""},
		"body":         {"POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\n\r\nbody", 200, "POST a.example / body"},
		"options-star": {"OPTIONS * HTTP/1.1\r\nHost: a.example\r\n\r\n", 200, ""},
		"no-http":      {"SSH-2.0-OpenSSH\r\n\r\n", 400, ""},
		"huge-head":    {"GET / HTTP/1.1\r\nHost: a.example\r\nX: " + strings.Repeat("x", maxHead+8192), 431, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			status, body := request(t, w.link.connect(t, dst), tt.text)
			if status != tt.status || tt.body != "" && body != tt.body {
				t.Errorf("status %d, %q", status, body)
			}
		})
	}
	w.wantDenial(t, TCP, `"evil.example" (`+dst+")", WrongServerName)
	// The second request of a connection is looked at like the first.
	guest := w.link.connect(t, dst)
	if status, _ := request(t, guest, get("a.example")); status != 200 {
		t.Errorf("first: %d", status)
	}
	if status, _ := request(t, guest, get("evil.example")); status != 403 {
		t.Errorf("second: %d", status)
	}
	if s := w.Stats(); s.BytesUp == 0 || s.BytesDown == 0 {
		t.Errorf("stats: %+v", s)
	}
}

// A connection that becomes something else is carried to its end.
func TestInspectUpgrade(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example:80")
	up := webServer(t, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Connection", "Upgrade")
		rw.Header().Set("Upgrade", "websocket")
		rw.WriteHeader(http.StatusSwitchingProtocols)
		c, rest, err := rw.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		_, _ = io.Copy(c, rest)
	}), false)
	w.net.put("tcp", "93.184.216.34:80", up.Listener.Addr().String())
	guest := w.link.connect(t, "93.184.216.34:80")
	status, _ := request(t, guest, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	if status != http.StatusSwitchingProtocols {
		t.Fatalf("status %d", status)
	}
	wantEcho(t, guest)
	_ = guest.Close()
	eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
	guest = w.link.connect(t, "93.184.216.34:80") // and one that is cut
	request(t, guest, "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
	w.SetPolicy(nil)
	wantReset(t, guest)
}

// A connection stays on the ground of the request that it carries.
func TestSetPolicyDuringRequest(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example:80", "b.example:80")
	up := webServer(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}), false)
	w.net.put("tcp", "93.184.216.34:80", up.Listener.Addr().String())
	open := func(host string) (c *net.TCPConn) {
		c = w.link.connect(t, "93.184.216.34:80")
		if status, _ := request(t, c, get(host)); status != 200 {
			t.Fatalf("%s: status %d", host, status)
		}
		return c
	}
	a, b := open("a.example"), open("b.example")
	w.SetPolicy(compile(t, true, "b.example:80"))
	wantReset(t, a)
	if status, _ := request(t, b, get("a.example")); status != 403 {
		t.Errorf("status %d", status)
	}
}
