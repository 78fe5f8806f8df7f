package egress

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// The certificate of httptest is for example.com and its subdomains.
const api, apiAddr = "api.example.com", "93.184.216.40"

func bearer(tune ...func(*Secret)) Secret {
	s := Secret{Name: "key", Header: "authorization", Value: "Bearer hidden", Hosts: []string{api}}
	for _, f := range tune {
		f(&s)
	}
	return s
}

// seen are requests that a host got.
type seen struct {
	mu  sync.Mutex
	all []*http.Request
}

func (s *seen) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	_, _ = io.Copy(io.Discard, r.Body)
	s.mu.Lock()
	s.all = append(s.all, r)
	s.mu.Unlock()
	if r.URL.Path == "/moved" {
		http.Redirect(w, r, "https://elsewhere.example/", http.StatusFound)
		return
	}
	_, _ = io.WriteString(w, "from "+r.Host)
}

func (s *seen) take() *http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.all) == 0 {
		return nil
	}
	r := s.all[0]
	s.all = s.all[1:]
	return r
}

// shop is a world with hosts on ports 80 and 443 of apiAddr, and other.example on
// port 80 of another address.
func shop(tb testing.TB, secrets []Secret, rules ...string) (w *world, secure, clear *seen) {
	tb.Helper()
	secure, clear = &seen{}, &seen{}
	tls, plain := webServer(tb, secure, true), webServer(tb, clear, false)
	roots := x509.NewCertPool()
	roots.AddCert(tls.Certificate())
	up := newNameServer(tb, api+" 60 A "+apiAddr, "other.example 60 A 93.184.216.41", "wrong.test 60 A "+apiAddr,
		"inside.example.com 60 A 10.0.0.1")
	w = start(tb, Config{
		Upstream: []string{up.addr}, Policy: compile(tb, false, rules...), Secrets: secrets, RootCAs: roots,
	})
	w.net.put("tcp", apiAddr+":443", tls.Listener.Addr().String())
	w.net.put("tcp", apiAddr+":80", plain.Listener.Addr().String())
	w.net.put("tcp", "93.184.216.41:80", plain.Listener.Addr().String())
	for _, name := range []string{api, "other.example", "wrong.test", "inside.example.com"} {
		w.resolve(tb, name, 1)
	}
	return w, secure, clear
}

func TestSecret(t *testing.T) {
	t.Parallel()
	w, secure, clear := shop(t, []Secret{bearer(), bearer(func(s *Secret) { s.Name, s.Header, s.Value = "two", "X-Key", "k" })}, api+":80", "other.example:80")
	guest := w.link.connect(t, apiAddr+":80")
	status, body := request(t, guest, "POST /v1?q=1 HTTP/1.1\r\nHost: "+api+"\r\nAuthorization: Bearer mine\r\nauthorization: Bearer mine too\r\n"+
		"Connection: Authorization\r\nTransfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n2\r\nhi\r\n0\r\nAuthorization: Bearer late\r\n\r\n")
	if status != 200 || body != "from "+api {
		t.Fatalf("status %d, %q", status, body)
	}
	r := secure.take()
	if r == nil || clear.take() != nil {
		t.Fatal("it did not go to the TLS server alone")
	}
	if got := r.Header.Values("Authorization"); len(got) != 1 || got[0] != "Bearer hidden" || r.Header.Get("X-Key") != "k" {
		t.Errorf("headers: %v", r.Header)
	}
	if r.Host != api || r.RequestURI != "/v1?q=1" || r.TLS.ServerName != api || len(r.Trailer) > 0 {
		t.Errorf("request: %s %s, trailer %v", r.Host, r.RequestURI, r.Trailer)
	}
	// On the same connection: again, a redirect, and a host without a secret.
	if status, _ = request(t, guest, get(api)); status != 200 || secure.take().Header.Get("Authorization") != "Bearer hidden" {
		t.Errorf("again: %d", status)
	}
	if status, body = request(t, guest, "GET /moved HTTP/1.1\r\nHost: "+api+"\r\n\r\n"); status != http.StatusFound || secure.take() == nil {
		t.Errorf("redirect: %d, %q", status, body)
	}
	if status, body = request(t, guest, get("other.example")); status != 200 || body != "from other.example" {
		t.Errorf("other: %d, %q", status, body)
	}
	if r = clear.take(); r.Header.Get("Authorization") != "" || r.Header.Get("X-Key") != "" || secure.take() != nil {
		t.Errorf("the other host got %v", r.Header)
	}
	if status, _ = request(t, guest, get("evil.example")); status != http.StatusForbidden {
		t.Errorf("evil: %d", status)
	}
	want := []string{apiAddr + ":443", apiAddr + ":80"}
	if got := w.net.dials(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("dialed %v, want %v", got, want)
	}
}

// A connection to a host without a secret is relayed as it is, and its guest
// gets no secret by asking for a host that has one.
func TestSecretIsForItsHost(t *testing.T) {
	t.Parallel()
	w, secure, clear := shop(t, []Secret{bearer()}, api+":80", "other.example:80")
	status, _ := request(t, w.link.connect(t, "93.184.216.41:80"), get(api))
	if r := clear.take(); status != 200 || r == nil || r.Header.Get("Authorization") != "" || secure.take() != nil {
		t.Errorf("status %d, %+v", status, r)
	}
}

func TestSecretNeedsARule(t *testing.T) {
	t.Parallel()
	w, secure, _ := shop(t, []Secret{bearer()}, api+":443", apiAddr)
	status, _ := request(t, w.link.connect(t, apiAddr+":80"), get(api))
	if status != 200 || secure.take() != nil { // as the rule by address has it
		t.Errorf("status %d", status)
	}
}

func TestSecretInClear(t *testing.T) {
	t.Parallel()
	w, secure, clear := shop(t, []Secret{bearer(func(s *Secret) { s.Clear, s.Hosts = true, []string{"*.example.com"} })}, api+":80")
	status, _ := request(t, w.link.connect(t, apiAddr+":80"), get(api))
	if r := clear.take(); status != 200 || r.Header.Get("Authorization") != "Bearer hidden" || secure.take() != nil {
		t.Errorf("status %d, %v", status, r)
	}
}

// A host whose certificate is for another, or that is not to be reached, gets
// nothing.
func TestSecretOnlyForTheHost(t *testing.T) {
	t.Parallel()
	secret := bearer(func(s *Secret) { s.Hosts = []string{"wrong.test", "inside.example.com"} })
	w, secure, clear := shop(t, []Secret{secret}, "wrong.test:80", "inside.example.com:80")
	for _, host := range []string{"wrong.test", "inside.example.com"} {
		status, body := request(t, w.link.connect(t, apiAddr+":80"), get(host))
		if status != http.StatusBadGateway || strings.Contains(body, "hidden") || secure.take() != nil || clear.take() != nil {
			t.Errorf("%s: status %d, %q", host, status, body)
		}
	}
	w.wantDenial(t, "dns", "inside.example.com (10.0.0.1)", PrivateNetwork)
}

func TestSecretIsNotShown(t *testing.T) {
	t.Parallel()
	s := bearer()
	var logged strings.Builder
	slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "secret", s)
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	all := fmt.Sprintf("%v %+v %s %#v %v %s %s", s, s, s, s, []Secret{s}, data, logged.String())
	if strings.Contains(all, "hidden") || !strings.Contains(all, api) {
		t.Errorf("shown: %s", all)
	}
}

func TestSecretValidate(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Secret){
		"name":         func(s *Secret) { s.Name = "" },
		"no-header":    func(s *Secret) { s.Header = "" },
		"header":       func(s *Secret) { s.Header = "a b" },
		"framing":      func(s *Secret) { s.Header = "transfer-encoding" },
		"host-header":  func(s *Secret) { s.Header = "HOST" },
		"no-value":     func(s *Secret) { s.Value = "" },
		"lines":        func(s *Secret) { s.Value = "hidden\r\nX: y" },
		"blank":        func(s *Secret) { s.Value = "hidden " },
		"long":         func(s *Secret) { s.Value = strings.Repeat("hidden", 10000) },
		"no-host":      func(s *Secret) { s.Hosts = nil },
		"every-host":   func(s *Secret) { s.Hosts = []string{"*"} },
		"address":      func(s *Secret) { s.Hosts = []string{"1.2.3.4"} },
		"host-twice":   func(s *Secret) { s.Hosts = []string{"a.example", "A.example."} },
		"host-unicode": func(s *Secret) { s.Hosts = []string{"ä.example"} },
	} {
		s := bearer(change)
		err := Config{Secrets: []Secret{s}}.Validate()
		if !errors.Is(err, errdef.ErrInvalid) || strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := bearer().Validate(); err != nil {
		t.Error(err)
	}
}

// A host that takes connections and says nothing holds up nobody who leaves.
func TestLeavingASilentHost(t *testing.T) {
	t.Parallel()
	w, _, _ := shop(t, []Secret{bearer()}, api+":80")
	arrived := make(chan struct{}, 1)
	w.net.serve(apiAddr+":443", func(c *net.TCPConn) {
		arrived <- struct{}{}
		_, _ = io.Copy(io.Discard, c) // no handshake
	})
	guest := w.link.connect(t, apiAddr+":80")
	_, _ = io.WriteString(guest, get(api))
	<-arrived
	_ = guest.Close()
	eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
	guest = w.link.connect(t, apiAddr+":80")
	_, _ = io.WriteString(guest, get(api))
	<-arrived
	w.stop()
	_ = guest.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.ReadAll(guest); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the guest's connection is still open")
	}
}

// Hosts that end the connection after each request leave nothing behind.
func TestProxyForgetsConnections(t *testing.T) {
	t.Parallel()
	w := web(t, Config{}, "a.example:80")
	up := webServer(t, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("Connection", "close") }), false)
	w.net.put("tcp", "93.184.216.34:80", up.Listener.Addr().String())
	ours, theirs := w.link.pair(t)
	r := &relay{g: w.Gateway, dst: netip.MustParseAddrPort("93.184.216.34:80"), guest: theirs}
	r.ctx, r.end = context.WithCancel(t.Context())
	p := &proxy{r: r, conns: map[*proxyConn]struct{}{}}
	p.plain = p.transport(func() (net.Conn, error) { return r.connect(r.ctx) })
	for range 10 {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://a.example/", nil)
		rec := httptest.NewRecorder()
		p.serve(rec, req)
		if rec.Code != 200 {
			t.Fatalf("status %d", rec.Code)
		}
	}
	open := func() int {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.conns)
	}
	eventually(t, "their end", func() bool { return open() == 0 })
	p.close()
	if _, err := p.dial(func() (net.Conn, error) { return ours, nil }); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dial after close: %v", err)
	}
}
