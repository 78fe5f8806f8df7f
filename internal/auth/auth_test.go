package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const fileToken = "a-token-of-enough-bytes"

// clock is a clock that only moves when it is told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Unix(1795300000, 0)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, cfg Config) *Guard {
	t.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	g, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// create makes a token in the store and returns it.
func create(t *testing.T, store string, r Record) string {
	t.Helper()
	_, secret, err := Create(t.Context(), store, r)
	if err != nil {
		t.Fatal(err)
	}
	return secret
}

func request(origin origin, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/v1/sandboxes", nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r.WithContext(context.WithValue(r.Context(), originKey{}, origin))
}

func TestReadTokenFile(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ content, want string }{
		"plain":          {fileToken, fileToken},
		"trimmed":        {"\n  " + fileToken + " \r\n", fileToken},
		"sixteen":        {"0123456789abcdef", "0123456789abcdef"},
		"empty":          {"", ""},
		"blank":          {" \n", ""},
		"fifteen":        {"0123456789abcde", ""},
		"replace_me":     {"REPLACE_ME_WITH_32_BYTES_BASE64", ""},
		"change_me":      {"CHANGE_ME_NOW_PLEASE_DO", ""},
		"two_lines":      {fileToken + "\n" + fileToken, ""},
		"not_a_header":   {"0123456789abcdef\x00", ""},
		"not_ascii":      {"grün-grün-grün-grün", ""},
		"large":          {strings.Repeat("x", maxToken+1), ""},
		"as_large_as_is": {strings.Repeat("x", maxToken), strings.Repeat("x", maxToken)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "token")
			write(t, path, tt.content)
			got, err := ReadTokenFile(path)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v", got, err)
			}
			if err != nil && (!errors.Is(err, errdef.ErrInvalid) || (tt.content != "" && strings.Contains(err.Error(), tt.content))) {
				t.Errorf("error %v", err)
			}
			if _, err = Open(Config{TokenFile: path}); (err == nil) != (tt.want != "") {
				t.Errorf("a daemon with it: %v", err)
			}
		})
	}
	if _, err := Open(Config{TokenFile: filepath.Join(t.TempDir(), "none")}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Open(Config{TokenFile: t.TempDir()}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a directory: %v", err)
	}
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	for _, cfg := range []Config{
		{Window: -1}, {Window: 25 * time.Hour}, {Rate: -1}, {Burst: -1}, {CertificateScope: "root"},
	} {
		if _, err := Open(cfg); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

func TestScopes(t *testing.T) {
	t.Parallel()
	all := []Scope{"", Read, Fork, Admin}
	for i, have := range all {
		for j, need := range all {
			if got, want := have.Includes(need), j > 0 && i >= j; got != want {
				t.Errorf("%q includes %q: %v", have, need, got)
			}
		}
	}
	if _, err := ParseScope("Admin"); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("Admin: %v", err)
	}
}

// TestAdmit is who may come in from where, with what.
func TestAdmit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, file := StorePath(dir), filepath.Join(dir, "token")
	write(t, file, fileToken+"\n")
	ci := create(t, store, Record{Name: "ci", Scope: Fork, MaxSandboxes: 3})
	signs := create(t, store, Record{Name: "deploy", Scope: Admin, Sign: true})
	g := open(t, Config{TokenFile: file, Store: store})
	none := open(t, Config{Store: StorePath(t.TempDir())})
	me := uint32(os.Geteuid())
	var (
		loopback = origin{}
		far      = origin{exposed: true}
		mine     = origin{unix: true, uid: me}
		root     = origin{unix: true}
		other    = origin{unix: true, uid: me + 12345, exposed: true}
	)
	const missing, invalid = "missing bearer token", "invalid bearer token"
	for name, tt := range map[string]struct {
		guard  *Guard
		origin origin
		auth   []string
		want   string // the identity, or else
		err    string
	}{
		"nobody_is_asked":      {none, loopback, nil, "local", ""},
		"nobody_is_asked_unix": {none, mine, nil, fmt.Sprintf("uid:%d", me), ""},
		"ignored_as_by_forkd":  {none, loopback, []string{"Bearer whatever"}, "local", ""},
		"far":                  {none, far, nil, "", missing},
		"far_bad":              {none, far, []string{"Bearer whatever"}, "", invalid},
		"another_user":         {none, other, nil, "", missing},

		"loopback":         {g, loopback, nil, "", missing},
		"inside":           {g, origin{inside: true}, nil, "local", ""},
		"owner":            {g, mine, nil, fmt.Sprintf("uid:%d", me), ""},
		"root":             {g, root, nil, "uid:0", ""},
		"other":            {g, other, nil, "", missing},
		"other_with_token": {g, other, []string{"Bearer " + ci}, "ci", ""},
		"owner_bad_token":  {g, mine, []string{"Bearer no"}, "", invalid},
		"owner_with_token": {g, mine, []string{"Bearer " + ci}, "ci", ""},

		"file":          {g, loopback, []string{"Bearer " + fileToken}, "token-file", ""},
		"named":         {g, far, []string{"Bearer " + ci}, "ci", ""},
		"blanks":        {g, far, []string{"Bearer   " + ci + "  "}, "ci", ""},
		"lower_case":    {g, far, []string{"bearer " + ci}, "ci", ""},
		"empty":         {g, far, []string{"Bearer "}, "", missing},
		"basic":         {g, far, []string{"Basic " + ci}, "", missing},
		"bare":          {g, far, []string{ci}, "", missing},
		"nothing":       {g, far, []string{""}, "", missing},
		"two":           {g, far, []string{"Bearer " + ci, "Bearer " + ci}, "", invalid},
		"prefix":        {g, far, []string{"Bearer " + ci[:len(ci)-1]}, "", invalid},
		"longer":        {g, far, []string{"Bearer " + ci + "a"}, "", invalid},
		"padded":        {g, far, []string{"Bearer " + fileToken + "\x00\x00"}, "", invalid},
		"huge":          {g, far, []string{"Bearer " + strings.Repeat("a", 1<<16)}, "", invalid},
		"must_not_send": {g, far, []string{"Bearer " + signs}, "", invalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := request(tt.origin)
			for _, a := range tt.auth {
				r.Header.Add("Authorization", a)
			}
			id, err := tt.guard.Admit(r)
			if id.Name != tt.want || (tt.err != "") != (err != nil) || (err != nil && err.Error() != tt.err) {
				t.Fatalf("got %+v, %v", id, err)
			}
			if err != nil {
				if _, ok := errors.AsType[*Unauthenticated](err); !ok || !errors.Is(err, errdef.ErrDenied) || errdef.Hint(err) == "" {
					t.Errorf("error %#v", err)
				}
			}
			if tt.want == "ci" && cmp.Diff(Identity{Name: "ci", Scope: Fork, Max: Share{Sandboxes: 3}}, id) != "" {
				t.Errorf("identity %+v", id)
			}
		})
	}
}

func TestCertificate(t *testing.T) {
	t.Parallel()
	g := open(t, Config{Certificates: true, CertificateScope: Fork})
	for cn, want := range map[string]string{"alice": "cert:alice", "": "", "a\nb": "", strings.Repeat("x", 65): ""} {
		r := request(origin{exposed: true})
		cert := &x509.Certificate{Subject: pkix.Name{CommonName: cn}}
		r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
		if _, err := g.Admit(r); err == nil {
			t.Errorf("%q was let in without being verified", cn)
		}
		r.TLS.VerifiedChains = [][]*x509.Certificate{{cert}}
		id, err := g.Admit(r)
		if id.Name != want || (err == nil) != (want != "") || (err == nil && id.Scope != Fork) {
			t.Errorf("%q: %+v, %v", cn, id, err)
		}
	}
}

// TestReload changes the files under a guard.
func TestReload(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	store, file, c := StorePath(dir), filepath.Join(dir, "token"), newClock()
	write(t, file, fileToken)
	g := open(t, Config{TokenFile: file, Store: store, Now: c.Now})
	admits := func(secret string, want bool) {
		t.Helper()
		if _, err := g.Admit(request(origin{exposed: true}, "Authorization", "Bearer "+secret)); (err == nil) != want {
			t.Errorf("%.8s…: %v, want it let in: %v", secret, err, want)
		}
	}
	admits(fileToken, true)
	ci := create(t, store, Record{Name: "ci", Scope: Read})
	admits(ci, false) // it was looked at a moment ago
	c.add(recheck)
	admits(ci, true)

	write(t, file, "CHANGE_ME_CHANGE_ME")
	c.add(recheck)
	admits(fileToken, true) // what cannot be used changes nothing
	write(t, file, "another-token-of-16-bytes")
	g.Reload() // as SIGHUP does, at once
	admits(fileToken, false)
	admits("another-token-of-16-bytes", true)

	write(t, store, "{")
	c.add(recheck)
	admits(ci, true)
	write(t, file, "yet-another-of-16-bytes") // one that cannot be read does not stop the other
	c.add(recheck)
	admits("another-token-of-16-bytes", false)
	write(t, file, "another-token-of-16-bytes")
	c.add(recheck)
	if err := os.Remove(store); err != nil {
		t.Fatal(err)
	}
	c.add(recheck)
	admits(ci, false)
	admits("another-token-of-16-bytes", true)

	c.add(-time.Hour) // the clock is set back: it looks again
	write(t, file, "a-third-token-of-16-bytes")
	admits("a-third-token-of-16-bytes", true)
}

// TestLastTokenRemoved: that must not open the door.
func TestLastTokenRemoved(t *testing.T) {
	t.Parallel()
	store, c := StorePath(t.TempDir()), newClock()
	g := open(t, Config{Store: store, Now: c.Now})
	if g.Required() {
		t.Error("a token is required, and there is none")
	}
	if _, err := g.Admit(request(origin{})); err != nil {
		t.Error(err)
	}
	secret := create(t, store, Record{Name: "ci", Scope: Admin})
	c.add(recheck)
	if _, err := g.Admit(request(origin{})); err == nil {
		t.Error("there is a token, and none is required")
	}
	if err := Remove(t.Context(), store, "ci"); err != nil {
		t.Fatal(err)
	}
	c.add(recheck)
	for _, r := range []*http.Request{request(origin{}), request(origin{}, "Authorization", "Bearer "+secret)} {
		if _, err := g.Admit(r); err == nil {
			t.Error("the last token is gone, and everybody may come in")
		}
	}
}

// TestDamagedStore: a guard that opens with one lets nobody in by it.
func TestDamagedStore(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(path string) error{
		"garbage":   func(p string) error { return os.WriteFile(p, []byte("{"), 0o600) },
		"open":      func(p string) error { return os.Chmod(p, 0o644) },
		"directory": func(p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			store := StorePath(t.TempDir())
			secret := create(t, store, Record{Name: "ci", Scope: Admin})
			if err := damage(store); err != nil {
				t.Fatal(err)
			}
			g := open(t, Config{Store: store})
			for _, r := range []*http.Request{request(origin{}), request(origin{}, "Authorization", "Bearer "+secret)} {
				if id, err := g.Admit(r); err == nil {
					t.Errorf("%+v was let in", id)
				}
			}
		})
	}
}

func TestReserve(t *testing.T) {
	t.Parallel()
	g := open(t, Config{})
	if _, err := g.Reserve(Identity{Name: "free"}, Share{Sandboxes: 1 << 30}, nil); err != nil {
		t.Error(err)
	}
	id := Identity{Name: "ci", Max: Share{Sandboxes: 3}}
	if _, err := g.Reserve(id, Share{Sandboxes: 4}, func() Share { return Share{} }); !errors.Is(err, errdef.ErrExhausted) || errdef.Hint(err) == "" {
		t.Errorf("4 of 3: %v", err)
	}
	var mu sync.Mutex
	var have, most int
	var work sync.WaitGroup
	for range 50 {
		work.Go(func() {
			release, err := g.Reserve(id, Share{Sandboxes: 1}, func() Share { mu.Lock(); defer mu.Unlock(); return Share{Sandboxes: have} })
			if err != nil {
				return
			}
			defer release()
			mu.Lock()
			defer mu.Unlock()
			have++
			most = max(most, have)
		})
	}
	work.Wait()
	if most != 3 || len(g.pending) != 0 {
		t.Errorf("%d at once, pending %v", most, g.pending)
	}
}

// TestRate: in no time do more come than the bucket held and has taken in.
func TestRate(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.Float64Range(0.1, 100).Draw(t, "rate")
		burst := rapid.IntRange(0, 20).Draw(t, "burst")
		l := newLimiter(rate, burst)
		now, start := time.Unix(1e9, 0), time.Unix(1e9, 0)
		forward := time.Duration(0)
		came := 0.0
		for range rapid.IntRange(1, 100).Draw(t, "requests") {
			step := time.Duration(rapid.Int64Range(-int64(time.Second), int64(time.Second)).Draw(t, "step"))
			now, forward = now.Add(step), forward+max(step, 0)
			if wait := l.take("ci", now); wait == 0 {
				came++
			} else if again := l.take("ci", now.Add(wait+time.Millisecond)); again != 0 {
				t.Fatalf("told to wait %v, and then %v more", wait, again)
			} else {
				came, now, forward = came+1, now.Add(wait+time.Millisecond), forward+wait+time.Millisecond
			}
		}
		if most := l.burst + forward.Seconds()*rate + 1e-6; came > most {
			t.Fatalf("%v came since %v, at most %v may", came, start, most)
		}
	})
}

func TestRateOfEach(t *testing.T) {
	t.Parallel()
	dir, c := t.TempDir(), newClock()
	store := StorePath(dir)
	a, b := create(t, store, Record{Name: "a", Scope: Read}), create(t, store, Record{Name: "b", Scope: Read})
	g := open(t, Config{Store: store, Rate: 0.5, Burst: 2, Now: c.Now})
	admit := func(secret string) error {
		_, err := g.Admit(request(origin{}, "Authorization", "Bearer "+secret))
		return err
	}
	if err := errors.Join(admit(a), admit(a), admit(b)); err != nil {
		t.Fatal(err)
	}
	limited, ok := errors.AsType[*LimitedError](admit(a))
	if !ok || limited.After != 2*time.Second || !errors.Is(limited, errdef.ErrExhausted) {
		t.Errorf("the third: %v", limited)
	}
	c.add(2 * time.Second)
	if err := errors.Join(admit(a), admit(b)); err != nil {
		t.Error(err)
	}
	if _, err := g.Admit(request(origin{unix: true, uid: uint32(os.Geteuid())})); err != nil {
		t.Errorf("the owner: %v", err)
	}
}

func TestRateForgets(t *testing.T) {
	t.Parallel()
	l, now := newLimiter(1, 1), time.Unix(1e9, 0)
	for i := range 3 * maxBuckets {
		l.take(fmt.Sprint(i), now.Add(time.Duration(i)*time.Millisecond))
	}
	if len(l.buckets) > maxBuckets {
		t.Errorf("%d buckets", len(l.buckets))
	}
}

// TestConnected asks real connections where they are from.
func TestConnected(t *testing.T) {
	t.Parallel()
	me := uint32(os.Geteuid())
	for network, want := range map[string]origin{"unix": {unix: true, uid: me}, "tcp": {}} {
		addr := "127.0.0.1:0"
		if network == "unix" {
			addr = filepath.Join(t.TempDir(), "s")
		}
		var lc net.ListenConfig
		ln, err := lc.Listen(t.Context(), network, addr)
		if err != nil {
			t.Fatal(err)
		}
		var d net.Dialer
		there, err := d.DialContext(t.Context(), network, ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		here, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := originOf(Connected(t.Context(), here)); got != want {
			t.Errorf("%s: %+v", network, got)
		}
		if got := originOf(Connected(Inside(t.Context()), here)); got != (origin{inside: true}) {
			t.Errorf("inside: %+v", got)
		}
		if err := errors.Join(there.Close(), here.Close(), ln.Close()); err != nil {
			t.Error(err)
		}
		if network == "unix" { // a connection that the kernel knows nothing of
			if got := originOf(Connected(t.Context(), here)); got.trusted() || !got.exposed {
				t.Errorf("closed: %+v", got)
			}
		}
	}
	far := &fakeConn{addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1)}}
	if got := originOf(Connected(t.Context(), far)); got != (origin{exposed: true}) {
		t.Errorf("far: %+v", got)
	}
}

type fakeConn struct {
	net.Conn
	addr net.Addr
}

func (c *fakeConn) LocalAddr() net.Addr { return c.addr }

func TestFrom(t *testing.T) {
	t.Parallel()
	if id := From(t.Context()); !id.Ambient || id.Scope != Admin {
		t.Errorf("nobody: %+v", id)
	}
	want := Identity{Name: "ci", Scope: Read}
	if id := From(With(t.Context(), want)); id != want {
		t.Errorf("got %+v", id)
	}
}

// TestReserveLimits: what the limits of sandboxes come to is bounded as their
// number is, each on its own.
func TestReserveLimits(t *testing.T) {
	t.Parallel()
	g := open(t, Config{})
	id := Identity{Name: "ci", Max: Share{MemoryMiB: 1000, CPUMillis: 2500}}
	has := func() Share { return Share{Sandboxes: 7, MemoryMiB: 400, CPUMillis: 1000} }
	for _, tt := range []struct {
		want Share
		err  string // part of it
	}{
		{Share{Sandboxes: 1000}, ""},
		{Share{MemoryMiB: 600, CPUMillis: 1500}, ""},
		{Share{MemoryMiB: 601}, "token ci may have sandboxes with 1000 MiB of memory, has 400 MiB and asks for 601 MiB"},
		{Share{CPUMillis: 1501}, "token ci may have sandboxes with 2.5 cores, has 1 and asks for 1.501"},
	} {
		release, err := g.Reserve(id, tt.want, has)
		if tt.err == "" {
			if err != nil {
				t.Errorf("%+v: %v", tt.want, err)
				continue
			}
			if _, err = g.Reserve(id, Share{MemoryMiB: 601 - tt.want.MemoryMiB}, has); !errors.Is(err, errdef.ErrExhausted) {
				t.Errorf("beside %+v: %v", tt.want, err)
			}
			release()
			continue
		}
		if !errors.Is(err, errdef.ErrExhausted) || !strings.Contains(err.Error(), tt.err) || errdef.Hint(err) == "" {
			t.Errorf("%+v: %v", tt.want, err)
		}
	}
	lowered := Identity{Name: "ci", Max: Share{Sandboxes: 1, MemoryMiB: 10}} // since it got what it has
	if _, err := g.Reserve(lowered, Share{CPUMillis: 1}, has); err != nil {
		t.Errorf("what is bounded and not asked for: %v", err)
	}
	if len(g.pending) != 0 && g.pending["ci"] != (Share{CPUMillis: 1}) {
		t.Errorf("left: %v", g.pending)
	}
}

// TestMax is what the store says of a token.
func TestMax(t *testing.T) {
	t.Parallel()
	store := StorePath(t.TempDir())
	create(t, store, Record{Name: "ci", Scope: Fork, MaxSandboxes: 3, MaxMemoryMiB: 512, MaxCPUs: 1.5})
	g := open(t, Config{Store: store})
	if got, ok := g.Max("ci"); !ok || got != (Share{3, 512, 1500}) {
		t.Errorf("%+v, %v", got, ok)
	}
	if _, ok := g.Max("other"); ok {
		t.Error("a token that is not there")
	}
}
