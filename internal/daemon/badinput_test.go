package daemon

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/fake"
)

// quick are limits that tests can wait for.
var quick = HTTPLimits{HeaderTime: 300 * time.Millisecond, BodyTime: 300 * time.Millisecond, IdleTime: 300 * time.Millisecond}

// bad is a daemon with one sandbox, and its address.
func bad(t *testing.T, limits HTTPLimits) (*Daemon, *reached, string) {
	t.Helper()
	d, r, _ := start(t, fake.New(), Config{StateDir: stateDir(t), HTTP: limits, OnStop: Remove})
	template(t, d)
	return d, r, fork(t, d, 1)[0]
}

func reach(t *testing.T, addr string) net.Conn {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // it may be closed
	if err = conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func write(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
}

// closed sees that the server closes the connection, and returns what it said.
func closed(t *testing.T, conn net.Conn) string {
	t.Helper()
	text, err := io.ReadAll(conn)
	if nerr, ok := err.(net.Error); ok && nerr.Timeout() { //nolint:errorlint // of the connection itself
		t.Errorf("the connection is still open; it said %q", text)
	}
	return string(text)
}

// refusal reads an answer that must be an error in JSON.
func refusal(t *testing.T, what string, status int, header http.Header, body string) refused {
	t.Helper()
	var e refused
	if err := json.Unmarshal([]byte(body), &e); err != nil || e.Error == "" || e.Code == "" || header.Get("Content-Type") != "application/json" {
		t.Errorf("%s: %d %q is no error in JSON: %v", what, status, body, err)
	}
	return e
}

func readRefusal(t *testing.T, what, text string) (int, refused) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(text)), nil)
	if err != nil {
		t.Fatalf("%s: %q: %v", what, text, err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, refusal(t, what, resp.StatusCode, resp.Header, string(body))
}

// TestSlowClients: who takes too long over a head, a body or the next request
// loses the connection, and nobody else notices.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	_, r, id := bad(t, quick)
	const head = "Host: localhost\r\nContent-Type: application/json\r\n"
	t.Run("nothing", func(t *testing.T) {
		t.Parallel()
		closed(t, reach(t, r.addr))
	})
	t.Run("head", func(t *testing.T) {
		t.Parallel()
		conn := reach(t, r.addr)
		write(t, conn, "GET /healthz HTTP/1.1\r\nHost: loc")
		dribble(conn, "x")
		closed(t, conn)
	})
	t.Run("body", func(t *testing.T) {
		t.Parallel()
		conn := reach(t, r.addr)
		write(t, conn, "POST /v1/sandboxes HTTP/1.1\r\n"+head+"Content-Length: 1000\r\n\r\n{")
		dribble(conn, " ")
		if status, e := readRefusal(t, "slow body", closed(t, conn)); status != http.StatusRequestTimeout || e.Code != "timeout" {
			t.Errorf("%d %+v, want 408", status, e)
		}
	})
	t.Run("file", func(t *testing.T) {
		t.Parallel()
		conn := reach(t, r.addr)
		write(t, conn, "PUT /v1/sandboxes/"+id+"/files?path="+url.QueryEscape(filepath.Join(t.TempDir(), "slow"))+" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nabc")
		if status, e := readRefusal(t, "slow file", closed(t, conn)); status != http.StatusRequestTimeout || e.Code != "timeout" {
			t.Errorf("%d %+v, want 408", status, e)
		}
	})
	t.Run("body-of-nothing", func(t *testing.T) { // the server itself waits for it
		t.Parallel()
		conn := reach(t, r.addr)
		write(t, conn, "POST /nope HTTP/1.1\r\n"+head+"Content-Length: 1000\r\n\r\n{")
		if status, e := readRefusal(t, "slow body", closed(t, conn)); status != http.StatusNotFound {
			t.Errorf("%d %+v, want 404", status, e)
		}
	})
	t.Run("idle", func(t *testing.T) {
		t.Parallel()
		conn := reach(t, r.addr)
		write(t, conn, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if text := closed(t, conn); !strings.HasPrefix(text, "HTTP/1.1 200 ") {
			t.Errorf("first answer: %q", text)
		}
	})
}

// dribble writes a byte now and then, until that fails.
func dribble(conn net.Conn, what string) {
	for range 100 {
		if _, err := io.WriteString(conn, what); err != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestManyConnections: ten thousand that say nothing keep nobody out; under the
// race detector, which cannot watch so many, three thousand.
func TestManyConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("it opens many connections")
	}
	n := manyConnections
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if most := (int(min(limit.Max, 1<<20)) - 500) / 2; most < n { // both ends are in this process
		t.Logf("RLIMIT_NOFILE allows %d connections, not %d", most, n)
		n = most
	}
	wide := unix.Rlimit{Cur: min(limit.Max, uint64(2*n+500)), Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &wide); err != nil {
		t.Skip(err)
	}
	_, r, _ := bad(t, HTTPLimits{HeaderTime: 5 * time.Second})
	conns := make([]net.Conn, n)
	var group sync.WaitGroup
	for part := range 8 {
		group.Go(func() {
			var d net.Dialer
			for i := part; i < n; i += 8 {
				c, err := d.DialContext(t.Context(), "tcp", r.addr)
				if err != nil {
					t.Errorf("connection %d: %v", i, err)
					return
				}
				conns[i] = c
			}
		})
	}
	group.Wait()
	defer func() {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
	}()
	begun := time.Now()
	if status, _, body := r.ask(t, "tcp", "GET", "/v1/sandboxes", ""); status != http.StatusOK {
		t.Errorf("with %d connections open: %d %s", n, status, body)
	}
	t.Logf("with %d idle connections a request took %v", n, time.Since(begun))
	for _, c := range []net.Conn{conns[0], conns[n-1]} {
		if c == nil {
			continue
		}
		if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		closed(t, c)
	}
}

// zeros counts what is taken of it.
type zeros struct{ n int64 }

func (z *zeros) Read(p []byte) (int, error) {
	clear(p)
	z.n += int64(len(p))
	return len(p), nil
}

// TestHugeBody: a body of 1 GiB is refused before much of it is read, whether
// or not it says its size, and one that asks first is not sent at all.
func TestHugeBody(t *testing.T) {
	t.Parallel()
	_, r, _ := bad(t, HTTPLimits{})
	for name, head := range map[string]string{
		"with-a-length": "Content-Length: 1073741824\r\n\r\n",
		"that-asks":     "Expect: 100-continue\r\nContent-Length: 1073741824\r\n\r\n",
		"chunked":       "Transfer-Encoding: chunked\r\n\r\n40000000\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := reach(t, r.addr)
			write(t, conn, "POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+head)
			sent := &zeros{}
			answered := make(chan string, 1)
			go func() {
				text := closed(t, conn)
				answered <- text
			}()
			if name != "that-asks" {
				_, _ = io.Copy(conn, io.LimitReader(sent, 1<<30)) // until the server hangs up
			}
			text := <-answered
			status, e := readRefusal(t, name, text)
			if status != http.StatusRequestEntityTooLarge || e.Code != "too_large" {
				t.Errorf("%d %+v, want 413", status, e)
			}
			if sent.n > 64<<20 {
				t.Errorf("it took %d MiB", sent.n>>20)
			}
		})
	}
}

// TestEveryPathParameter: whatever stands where a name should be, the answer is
// an error in JSON, and nothing outside the stores is touched.
func TestEveryPathParameter(t *testing.T) {
	t.Parallel()
	d, r, id := bad(t, HTTPLimits{})
	doc, err := openapi3.NewLoader().LoadFromFile("../../api/openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	param := regexp.MustCompile(`\{[^}]*\}`)
	evil := []string{
		"..%2f..%2fetc%2fpasswd", "%2e%2e", "%2e%2e%2f%2e%2e", "..", ".", "a%2fb", "%2fetc%2fpasswd", "%00", "py%00", "py%0a", "%ff%fe",
		"..%5c..", "%252e%252e%252f", strings.Repeat("a", 5000), "%F0%9F%92%A9", "-", "~", "py%2e%2e", ".json", "py.json%2f..",
	}
	tried := 0
	for path, item := range doc.Paths.Map() {
		if !param.MatchString(path) {
			continue
		}
		for method := range item.Operations() {
			for _, name := range evil {
				tried++
				target := param.ReplaceAllString(path, name)
				body := "{}"
				if method == http.MethodGet || method == http.MethodDelete || method == http.MethodPut {
					body = ""
				}
				conn := reach(t, r.addr)
				request := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", method, target, len(body), body)
				write(t, conn, request)
				text := closed(t, conn)
				_ = conn.Close()
				what := method + " " + target
				status, e := readRefusal(t, what[:min(len(what), 100)], text)
				if status < 400 || status >= 500 {
					t.Errorf("%.100s: %d %+v", what, status, e)
				}
				if strings.Contains(text, d.cfg.StateDir) {
					t.Errorf("%.100s tells a path of this host: %s", what, text)
				}
			}
		}
	}
	t.Logf("%d requests", tried)
	if _, err := d.Sandboxes.Get(id); err != nil {
		t.Error(err)
	}
	if _, err := d.Snapshots.Resolve("py"); err != nil {
		t.Error(err)
	}
}

// TestMalformed is the rest of what a client can get wrong.
func TestMalformed(t *testing.T) {
	t.Parallel()
	_, r, id := bad(t, HTTPLimits{})
	const jsonType = "application/json"
	exec := "/v1/sandboxes/" + id + "/exec"
	for name, tt := range map[string]struct {
		method, path, kind, body string
		status                   int
		code                     string
	}{
		"unknown-route":     {"GET", "/v2/sandboxes", "", "", 404, "not_found"},
		"root":              {"GET", "/", "", "", 404, "not_found"},
		"dots":              {"GET", "/v1/../v1/sandboxes", "", "", 404, "not_found"},
		"made-up-method":    {"BREW", "/v1/sandboxes", "", "", 405, "method_not_allowed"},
		"trace":             {"TRACE", "/v1/sandboxes", "", "", 405, "method_not_allowed"},
		"options":           {"OPTIONS", "/v1/sandboxes", "", "", 405, "method_not_allowed"},
		"put-of-a-list":     {"PUT", "/v1/sandboxes", jsonType, "{}", 405, "method_not_allowed"},
		"form":              {"POST", "/v1/sandboxes", "application/x-www-form-urlencoded", "snapshot_tag=py", 415, "unsupported_media_type"},
		"text":              {"POST", "/v1/sandboxes", "text/plain", `{"snapshot_tag":"py"}`, 415, "unsupported_media_type"},
		"no-type":           {"POST", "/v1/sandboxes", "", `{"snapshot_tag":"py"}`, 415, "unsupported_media_type"},
		"half-a-type":       {"POST", "/v1/sandboxes", "application/json; charset=\"", `{"snapshot_tag":"py"}`, 415, "unsupported_media_type"},
		"empty":             {"POST", "/v1/sandboxes", jsonType, "", 400, "invalid"},
		"not-utf-8":         {"POST", "/v1/sandboxes", jsonType, "{\"snapshot_tag\":\"p\xff\"}", 400, "invalid"},
		"utf-16":            {"POST", "/v1/sandboxes", jsonType, "\xff\xfe{\x00}\x00", 400, "invalid"},
		"deep":              {"POST", "/v1/sandboxes", jsonType, strings.Repeat("[", 500_000) + strings.Repeat("]", 500_000), 400, "invalid"},
		"deep-in-a-field":   {"POST", "/v1/sandboxes", jsonType, `{"labels":` + strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000) + "}", 400, "invalid"},
		"huge-number":       {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","n":9223372036854775808}`, 400, "invalid"},
		"huge-exponent":     {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","n":1e999999999}`, 400, "invalid"},
		"most-of-an-int":    {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","n":9223372036854775807}`, 400, "invalid"},
		"least-of-an-int":   {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","n":-9223372036854775808}`, 400, "invalid"},
		"not-a-number":      {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","n":NaN}`, 400, "invalid"},
		"timeout":           {"POST", exec, jsonType, `{"args":["true"],"timeout_secs":1e300}`, 400, "invalid"},
		"negative-timeout":  {"POST", exec, jsonType, `{"args":["true"],"timeout_secs":-0.1}`, 400, "invalid"},
		"lifetime":          {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py","lifetime_secs":1e18}`, 400, "invalid"},
		"long-query":        {"GET", "/v1/nothing?" + strings.Repeat("a", 30_000), "", "", 404, "not_found"},
		"long-path":         {"GET", "/v1/" + strings.Repeat("a/", 15_000), "", "", 404, "not_found"},
		"another-s-host":    {"GET", "/v1/sandboxes", "", "", 403, "denied"},
		"two-values":        {"POST", "/v1/sandboxes", jsonType, `{"snapshot_tag":"py"}{"n":2}`, 400, "invalid"},
		"zero-in-arguments": {"POST", exec, jsonType, `{"args":["a\u0000b"]}`, 400, "invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := map[bool]string{true: "evil.example", false: "localhost"}[name == "another-s-host"]
			head := ""
			if tt.kind != "" {
				head = "Content-Type: " + tt.kind + "\r\n"
			}
			conn := reach(t, r.addr)
			write(t, conn, fmt.Sprintf("%s %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n%s", tt.method, tt.path, host, head, len(tt.body), tt.body))
			text := closed(t, conn)
			status, e := readRefusal(t, name, text)
			if status != tt.status || e.Code != tt.code {
				t.Errorf("%d %+v, want %d %s", status, e, tt.status, tt.code)
			}
			if status == http.StatusMethodNotAllowed && !strings.Contains(text, "\r\nAllow: ") {
				t.Errorf("no Allow: %q", text)
			}
		})
	}
}

// TestOldAndBroken: HTTP/1.0 is served; what is no HTTP gets a short answer and
// the end of its connection, and so does a head that is too long.
func TestOldAndBroken(t *testing.T) {
	t.Parallel()
	_, r, _ := bad(t, quick)
	for name, tt := range map[string]struct{ request, want string }{
		"http-1.0":       {"GET /healthz HTTP/1.0\r\n\r\n", "HTTP/1.0 200 "},
		"http-1.0-error": {"GET /nope HTTP/1.0\r\n\r\n", "HTTP/1.0 404 "},
		"http-9":         {"GET /healthz HTTP/9.9\r\n\r\n", "HTTP/1.1 505 "},
		"not-http":       {"hello\r\n\r\n", "HTTP/1.1 400 "},
		"tls":            {"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 "},
		"no-host":        {"GET /healthz HTTP/1.1\r\n\r\n", "HTTP/1.1 400 "},
		"long-head":      {"GET /" + strings.Repeat("a", 100_000) + " HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP/1.1 431 "},
		"smuggled": {
			"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}", "HTTP/1.1 400 ",
		},
		"coded": {
			"POST /v1/sandboxes HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n{}", "HTTP/1.1 501 ",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := reach(t, r.addr)
			_, _ = io.WriteString(conn, tt.request) // it may hang up before the end
			if text := closed(t, conn); !strings.HasPrefix(text, tt.want) {
				t.Errorf("%.200q, want %q", text, tt.want)
			}
		})
	}
}

// TestNoHostPaths: what goes wrong is told over the network without paths of
// this host, and with them to who can open the socket.
func TestNoHostPaths(t *testing.T) {
	t.Parallel()
	d, r, id := bad(t, HTTPLimits{})
	snap, err := d.Snapshots.Resolve("py")
	if err != nil {
		t.Fatal(err)
	}
	if err = os.Truncate(snap.MemoryPath(), 1); err != nil {
		t.Fatal(err)
	}
	for what, request := range map[string][3]string{
		"fork":  {"POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`},
		"some":  {"POST", "/v1/sandboxes", `{"snapshot_tag":"py","all_or_nothing":false}`},
		"check": {"POST", "/v1/snapshots/check", ""},
	} {
		_, _, near := r.ask(t, "unix", request[0], request[1], request[2])
		if !strings.Contains(near, d.cfg.StateDir) {
			t.Errorf("%s, over the socket, does not say where: %s", what, near)
		}
		_, _, far := r.ask(t, "tcp", request[0], request[1], request[2])
		if strings.Contains(far, d.cfg.StateDir) || !strings.Contains(far, "<state>") && !strings.Contains(far, `\u003cstate\u003e`) {
			t.Errorf("%s, over TCP: %s", what, far)
		}
	}
	if _, err := d.Sandboxes.Get(id); err != nil {
		t.Error(err)
	}
}

// TestClockSetBack: records from what is now the future are taken over, and an
// adopted sandbox has been active just now, not then.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	dir, engine := stateDir(t), fake.New()
	first, _, stop := start(t, engine, Config{StateDir: dir})
	template(t, first)
	id := fork(t, first, 1)[0]
	stop()
	path := filepath.Join(dir, "sandboxes", id, "sandbox.json")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err = json.Unmarshal(data, &record); err != nil {
		t.Fatal(err)
	}
	future := time.Now().AddDate(10, 0, 0)
	maps.Copy(record, map[string]any{"created_at": future, "last_active": future, "idle_ttl": int64(500 * time.Millisecond)})
	if data, err = json.Marshal(record); err != nil {
		t.Fatal(err)
	}
	if err = os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	second, _, _ := start(t, engine, Config{StateDir: dir, OnStop: Remove})
	if info, err := second.Sandboxes.Get(id); err == nil && info.LastActive.After(time.Now()) {
		t.Errorf("it is active in the future: %+v", info)
	}
	fork(t, second, 1)
	for deadline := time.Now().Add(20 * time.Second); isThere(second, id); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it idles for ever")
		}
	}
}

func isThere(d *Daemon, id string) bool {
	_, err := d.Sandboxes.Get(id)
	return err == nil
}
