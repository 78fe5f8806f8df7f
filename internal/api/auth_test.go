package api_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

// guarded is the interface with tokens: read, fork and admin have that scope,
// few may have two sandboxes, small 250 MiB and four cores, and signs signs.
type guarded struct {
	url    string
	tokens map[string]string
	log    *strings.Builder
}

func newGuarded(t *testing.T, cfg auth.Config) guarded {
	t.Helper()
	g := guarded{tokens: map[string]string{}, log: &strings.Builder{}}
	cfg.Store = auth.StorePath(t.TempDir())
	for name, r := range map[string]auth.Record{
		"read": {Scope: auth.Read}, "fork": {Scope: auth.Fork}, "admin": {Scope: auth.Admin},
		"few": {Scope: auth.Fork, MaxSandboxes: 2}, "small": {Scope: auth.Fork, MaxMemoryMiB: 250, MaxCPUs: 4}, "signs": {Scope: auth.Fork, Sign: true},
	} {
		r.Name = name
		_, secret, err := auth.Create(t.Context(), cfg.Store, r)
		if err != nil {
			t.Fatal(err)
		}
		g.tokens[name] = secret
	}
	guard, err := auth.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	b := apitest.New(t)
	face := b.Config()
	face.Sandboxes, face.Auth = api.Own(face.Sandboxes, guard, face.Snapshots, face.ShareSandboxes), guard
	workspaces, err := workspace.Open(t.Context(), t.TempDir(), face.Sandboxes, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = workspaces.Close() }) // its directory goes with the test
	face.Workspaces = workspaces
	face.Logger = slog.New(slog.NewTextHandler(&lockedWriter{w: g.log}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	srv := httptest.NewUnstartedServer(apitest.Checked(t, spec, api.New(face)))
	srv.Config.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return auth.Connected(ctx, c) }
	srv.Start()
	t.Cleanup(srv.Close)
	g.url = srv.URL
	return g
}

type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(b)
}

// do makes a request with the token of that name, or without one.
func (g guarded) do(t *testing.T, who, method, path, body string, edit ...func(*http.Request)) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, g.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if who != "" {
		req.Header.Set("Authorization", "Bearer "+g.tokens[who])
	}
	for _, f := range edit {
		f(req)
	}
	resp, err := http.DefaultClient.Do(req)
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

func (g guarded) expect(t *testing.T, a answer, status int, message string) {
	t.Helper()
	var got wire.Error
	if a.status >= 400 {
		got = decode[wire.Error](t, a.body)
	}
	if a.status != status || (message != "" && got.Error != message) {
		t.Errorf("status %d, body %s; want %d %s", a.status, a.body, status, message)
	}
}

// TestUnauthenticated: nothing but /healthz is open, and answers are forkd's.
func TestUnauthenticated(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	g.expect(t, g.do(t, "", "GET", "/healthz", ""), 200, "")
	g.expect(t, g.do(t, "", "GET", "/healthz/", ""), 404, "")
	for _, path := range []string{
		"/version", "/metrics", "/v1/sandboxes", "/v1/snapshots", "/nope", "/", "/v1/sandboxes/sb-1/exec/stream",
		"/%68ealthz", "/healthz%2f", "/healthz/x", "/healthz/../version", "//healthz", "/HEALTHZ",
	} {
		g.expect(t, g.do(t, "", "GET", path, ""), 401, "missing bearer token")
	}
	a := g.do(t, "", "POST", "/v1/sandboxes", strings.Repeat("x", 3<<20))
	g.expect(t, a, 401, "missing bearer token")
	if got := decode[wire.Error](t, a.body); got.Code != "denied" || got.Hint == "" {
		t.Errorf("body %s", a.body)
	}
	g.expect(t, g.do(t, "no such token", "GET", "/version", ""), 401, "missing bearer token")
	wrong := func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+g.tokens["admin"]+"x") }
	g.expect(t, g.do(t, "", "GET", "/version", "", wrong), 401, "invalid bearer token")
	g.expect(t, g.do(t, "signs", "GET", "/version", ""), 401, "invalid bearer token")
	if strings.Contains(g.log.String(), "tine_") || strings.Contains(g.log.String(), "tinesign_") {
		t.Errorf("the log has a token: %s", g.log)
	}
}

// TestTokenInQuery is refused whoever asks, and not logged.
func TestTokenInQuery(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	for _, name := range []string{"token", "access_token", "TOKEN", "api_key", "Bearer"} {
		for _, path := range []string{"/healthz", "/version"} {
			a := g.do(t, "admin", "GET", path+"?"+name+"="+g.tokens["admin"], "")
			if got := decode[wire.Error](t, a.body); a.status != 400 || got.Hint == "" || strings.Contains(a.body, g.tokens["admin"]) {
				t.Errorf("%s?%s: %d %s", path, name, a.status, a.body)
			}
		}
	}
	if strings.Contains(g.log.String(), g.tokens["admin"]) {
		t.Errorf("the log has it: %s", g.log)
	}
}

// TestScopesOfRoutes goes through all routes of the document with each scope.
func TestScopesOfRoutes(t *testing.T) {
	t.Parallel()
	doc, err := openapi3.NewLoader().LoadFromFile(spec)
	if err != nil {
		t.Fatal(err)
	}
	// What needs less than admin. A route that is new needs it until it is here.
	need := map[string]string{
		"GET /healthz": "read", "GET /health": "read", "GET /version": "read", "GET /metrics": "read", "GET /v1/doctor": "read",
		"GET /v1/images": "read", "GET /v1/images/{name}": "read", "GET /v1/snapshots": "read", "GET /v1/snapshots/{tag}/info": "read",
		"GET /v1/snapshots/{tag}/pool": "read", "GET /v1/tree": "read", "GET /v1/sandboxes": "read", "GET /v1/sandboxes/{id}": "read",
		"GET /v1/sandboxes/{id}/usage": "read", "GET /v1/sandboxes/{id}/net": "read", "GET /v1/net": "read",
		"GET /v1/workspaces": "read", "GET /v1/workspaces/{name}": "read", "GET /v1/events": "read",
		"GET /v1/diff":   "fork",
		"GET /v1/blocks": "read", "GET /v1/blocks/{ref}": "read", "GET /v1/blocks/{ref}/trust": "read",
		"POST /v1/blocks/run": "fork", "POST /v1/blocks/{ref}/run": "fork",
		"POST /v1/runs": "fork", "POST /v1/verify": "fork", "GET /v1/records": "read", "GET /v1/records/{id}": "read",
		"GET /v1/records/key": "read", "GET /v1/records/check": "read", "GET /v1/records/{id}/bundle": "fork",
	}
	scopes := []string{"read", "fork", "admin"}
	for path, item := range doc.Paths.Map() {
		for method := range item.Operations() {
			want := need[method+" "+path]
			for _, root := range []string{"/v1/sandboxes", "/v1/workspaces", "/v1/sandbox"} {
				if want == "" && (path == root || strings.HasPrefix(path, root+"/")) {
					want = "fork"
				}
			}
			if want == "" {
				want = "admin"
			}
			enough := false
			for _, scope := range scopes {
				enough = enough || scope == want
				if got := api.ScopeIncludes(method+" "+path, auth.Scope(scope)); got != enough {
					t.Errorf("%s %s with scope %s: %v", method, path, scope, got)
				}
			}
		}
	}
}

func TestScopesAreEnforced(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	for _, tt := range []struct {
		who, method, path, body string
		status                  int
	}{
		{"read", "GET", "/v1/sandboxes", "", 200},
		{"read", "GET", "/v1/sandboxes/" + id, "", 200},
		{"read", "GET", "/v1/sandboxes/" + id + "/files?path=/etc/hostname", "", 403},
		{"read", "GET", "/v1/sandboxes/" + id + "/processes", "", 403},
		{"read", "GET", "/v1/sandboxes/" + id + "/exec/stream", "", 403},
		{"read", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`, 403},
		{"read", "POST", "/v1/sandboxes/" + id + "/exec", `{"args":["true"]}`, 403},
		{"read", "DELETE", "/v1/sandboxes/" + id, "", 403},
		{"read", "GET", "/nope", "", 404},
		{"read", "PATCH", "/v1/sandboxes", "", 405},
		{"fork", "POST", "/v1/sandboxes/" + id + "/ping", "", 200},
		{"fork", "DELETE", "/v1/snapshots/py", "", 403},
		{"fork", "POST", "/v1/snapshots", `{"tag":"x","image":"py"}`, 403},
		{"fork", "POST", "/v1/snapshots/gc", "", 403},
		{"fork", "POST", "/v1/sandboxes/" + id + "/branch", `{"tag":"py","replace":true}`, 403},
		{"fork", "POST", "/v1/sandboxes/" + id + "/branch", `{"tag":"mine"}`, 201},
		{"admin", "DELETE", "/v1/snapshots/mine", "", 204},
		{"fork", "DELETE", "/v1/sandboxes/" + id, "", 204},
	} {
		a := g.do(t, tt.who, tt.method, tt.path, tt.body)
		if a.status != tt.status {
			t.Errorf("%s: %s %s: %d %s, want %d", tt.who, tt.method, tt.path, a.status, a.body, tt.status)
		}
	}
}

// TestSandboxCap counts what a token has, however it was made.
func TestSandboxCap(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	full := func(a answer) {
		t.Helper()
		if a.status != 429 || a.header.Get("Retry-After") == "" {
			t.Errorf("status %d, Retry-After %q, body %s", a.status, a.header.Get("Retry-After"), a.body)
		}
	}
	full(g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":3}`))
	a := g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","labels":{"a":"b"}}`)
	g.expect(t, a, 201, "")
	box := decode[[]wire.Sandbox](t, a.body)[0]
	if box.Labels["tine.token"] != "few" || box.Labels["a"] != "b" {
		t.Errorf("labels %v", box.Labels)
	}
	full(g.do(t, "few", "POST", "/v1/sandboxes/"+box.ID+"/branch", `{"tag":"b","n":2}`))
	g.expect(t, g.do(t, "few", "POST", "/v1/workspaces", `{"name":"w","snapshot_tag":"py"}`), 201, "")
	full(g.do(t, "few", "POST", "/v1/workspaces", `{"name":"v","snapshot_tag":"py"}`))
	full(g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`))
	g.expect(t, g.do(t, "few", "DELETE", "/v1/workspaces/w", ""), 204, "")
	a = g.do(t, "admin", "POST", "/v1/sandboxes/"+box.ID+"/branch", `{"tag":"c","n":1}`)
	g.expect(t, a, 201, "")
	if twin := decode[wire.Snapshot](t, a.body).Sandboxes; len(twin) != 1 || twin[0].Labels["tine.token"] != "admin" {
		t.Errorf("a branch's sandboxes: %+v", twin)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	statuses := map[int]int{}
	for range 8 {
		work.Go(func() {
			a := g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
			mu.Lock()
			defer mu.Unlock()
			statuses[a.status]++
		})
	}
	work.Wait()
	if statuses[201] != 1 || statuses[429] != 7 {
		t.Errorf("of eight at once: %v", statuses)
	}
	g.expect(t, g.do(t, "few", "DELETE", "/v1/sandboxes/"+box.ID, ""), 204, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","labels":{"tine.token":"admin"}}`), 400, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`), 201, "")
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{Rate: 0.01, Burst: 2})
	g.expect(t, g.do(t, "read", "GET", "/version", ""), 200, "")
	g.expect(t, g.do(t, "read", "GET", "/version", ""), 200, "")
	a := g.do(t, "read", "GET", "/version", "")
	if seconds, err := strconv.Atoi(a.header.Get("Retry-After")); a.status != 429 || err != nil || seconds < 90 || seconds > 100 {
		t.Errorf("status %d, Retry-After %q", a.status, a.header.Get("Retry-After"))
	}
	g.expect(t, g.do(t, "admin", "GET", "/version", ""), 200, "")
	g.expect(t, g.do(t, "", "GET", "/healthz", ""), 200, "")
}

// sign signs by hand, as docs/formats/signing.md says.
func (g guarded) sign(nonce, body string) func(*http.Request) {
	return func(r *http.Request) {
		digest, key := sha256.Sum256([]byte(body)), sha256.Sum256([]byte(g.tokens["signs"]))
		at := strconv.FormatInt(time.Now().Unix(), 10)
		mac := hmac.New(sha256.New, key[:])
		path, query, _ := strings.Cut(r.URL.RequestURI(), "?")
		_, _ = fmt.Fprintf(mac, "tine-sign-1\nsigns\n%s\n%s\n%s\n%x\n%s\n%s", r.Method, path, query, digest, at, nonce)
		for k, v := range map[string]string{
			"Tine-Token": "signs", "Tine-Timestamp": at, "Tine-Nonce": nonce,
			"Tine-Content-SHA256": hex.EncodeToString(digest[:]), "Tine-Signature": hex.EncodeToString(mac.Sum(nil)),
		} {
			r.Header.Set(k, v)
		}
	}
}

// TestSignedRequests: what is signed comes in once, and acts only if its body
// is what was signed.
func TestSignedRequests(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	const body = `{"snapshot_tag":"py"}`
	once := g.sign("nonce-nonce-0001", body)
	a := g.do(t, "", "POST", "/v1/sandboxes", body, once)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	g.expect(t, g.do(t, "", "POST", "/v1/sandboxes", body, once), 401, "invalid signature: the request has come in before")
	g.expect(t, g.do(t, "", "POST", "/v1/sandboxes", `{"snapshot_tag":"PY"}`, g.sign("nonce-nonce-0002", body)), 401,
		"invalid signature: the body is not what was signed")
	g.expect(t, g.do(t, "", "POST", "/v1/sandboxes", "", g.sign("nonce-nonce-0003", body)), 401,
		"invalid signature: the body is not what was signed")
	if boxes := decode[[]wire.Sandbox](t, g.do(t, "admin", "GET", "/v1/sandboxes", "").body); len(boxes) != 1 {
		t.Errorf("%d sandboxes", len(boxes))
	}

	target := filepath.Join(t.TempDir(), "file") // the guest's files are this host's
	if err := os.WriteFile(target, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	bytes := func(r *http.Request) { r.Header.Set("Content-Type", "application/octet-stream") }
	put := "/v1/sandboxes/" + id + "/files?path=" + target
	g.expect(t, g.do(t, "", "PUT", put, "tampered", g.sign("nonce-nonce-0004", "what was meant"), bytes), 401,
		"invalid signature: the body is not what was signed")
	if got, err := os.ReadFile(target); string(got) != "old" {
		t.Errorf("the file has %q, %v", got, err)
	}
	g.expect(t, g.do(t, "", "PUT", put, "what was meant", g.sign("nonce-nonce-0005", "what was meant"), bytes), 204, "")
	if got, err := os.ReadFile(target); string(got) != "what was meant" {
		t.Errorf("the file has %q, %v", got, err)
	}
}

// TestHosts: who has shown something may call the daemon by any name.
func TestHosts(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	evil := func(r *http.Request) { r.Host = "tine.example.com" }
	g.expect(t, g.do(t, "read", "GET", "/version", "", evil), 200, "")
	g.expect(t, g.do(t, "", "GET", "/healthz", "", evil), 200, "")
	g.expect(t, g.do(t, "", "GET", "/version", "", evil), 401, "missing bearer token")
	foreign := func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }
	g.expect(t, g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`, foreign), 403, "")
	url, _ := server(t)
	req, err := http.NewRequestWithContext(t.Context(), "GET", url+"/version", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = "rebound.example.com"
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != 403 {
		t.Errorf("who has shown nothing, by another name: %d", resp.StatusCode)
	}
}
