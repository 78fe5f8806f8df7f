package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

const spec = "../../api/openapi.yaml"

// server is the interface with a backend behind it, and one sandbox, sb-1.
func server(t *testing.T) (string, *apitest.Backend) {
	t.Helper()
	b := apitest.New(t)
	url := b.Serve(spec).URL
	if status, body := do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	return url, b
}

// do makes a request the way forkd's Python client does.
func do(t *testing.T, method, url, body string) (status int, text string) {
	t.Helper()
	a := send(t, method, url, "application/json", body)
	return a.status, a.body
}

// answer is what a server answered.
type answer struct {
	status int
	header http.Header
	body   string
}

func send(t *testing.T, method, url, contentType, body string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	return receive(t, req)
}

func receive(t *testing.T, req *http.Request) answer {
	t.Helper()
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

func decode[T any](t *testing.T, body string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatalf("%q: %v", body, err)
	}
	return v
}

// TestErrors is every way in which a request can be refused before it does
// anything. That the answers are JSON is for the server under test to see.
func TestErrors(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	long := strings.Repeat("a", 65)
	for _, tt := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/nope", "", 404, "not_found"},
		{"GET", "/v1/sandboxes/", "", 404, "not_found"},
		{"GET", "/v1//sandboxes", "", 404, "not_found"},
		{"GET", "/v1/snapshots/../sandboxes", "", 404, "not_found"},
		{"GET", "/v1/sandboxes/none", "", 404, "not_found"},
		{"GET", "/v1/sandboxes/sb%201", "", 404, "not_found"},
		{"DELETE", "/v1/sandboxes/none", "", 404, "not_found"},
		{"POST", "/v1/sandboxes/none/exec", `{"args":["true"]}`, 404, "not_found"},
		{"POST", "/v1/sandboxes/none/eval", `{"code":"1"}`, 404, "not_found"},
		{"POST", "/v1/sandboxes/none/ping", "", 404, "not_found"},
		{"GET", "/v1/sandboxes/none/processes", "", 404, "not_found"},
		{"GET", "/v1/sandboxes/none/files?path=/x", "", 404, "not_found"},
		{"GET", "/v1/snapshots/none/info", "", 404, "not_found"},
		{"GET", "/v1/snapshots/none/pool", "", 404, "not_found"},
		{"DELETE", "/v1/snapshots/none", "", 404, "not_found"},
		{"GET", "/v1/images/none", "", 404, "not_found"},
		{"DELETE", "/v1/images/none", "", 404, "not_found"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"none"}`, 404, "not_found"},

		{"DELETE", "/v1/sandboxes", "", 405, "method_not_allowed"},
		{"PATCH", "/v1/snapshots/py", "", 405, "method_not_allowed"},
		{"GET", "/v1/sandboxes/sb-1/exec", "", 405, "method_not_allowed"},

		{"POST", "/v1/sandboxes", "", 400, "invalid"},
		{"POST", "/v1/sandboxes", "{", 400, "invalid"},
		{"POST", "/v1/sandboxes", "[]", 400, "invalid"},
		{"POST", "/v1/sandboxes", "null", 400, "invalid"},
		{"POST", "/v1/sandboxes", `{} {}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"n":1}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":7}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":"two"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":0}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":-1}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":100000}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":1e99}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"../x"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","per_child_netns":true}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":-1}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","idle_ttl_secs":-1}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","lifetime_secs":1e300}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":[]}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":"ls"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":["ls"],"timeout_secs":-1}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":["a\u0000b"]}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":["env"],"env":{"A=B":"c"}}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/exec", `{"args":["env"],"env":{"":"c"}}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/eval", `{}`, 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/exec/stream", "", 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/processes/x/signal", `{"signal":"TERM"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/processes/1/signal", `{"signal":"NOPE"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/processes/1/signal", `{"signal":"65"}`, 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files", "", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files?path=relative", "", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files?path=/a%00b", "", 400, "invalid"},
		{"PUT", "/v1/sandboxes/sb-1/files?path=/x&mode=rwx", "", 400, "invalid"},
		{"DELETE", "/v1/sandboxes/sb-1/files?path=/x&recursive=yes", "", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files/list?path=/&depth=0x", "", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files/list?path=/&depth=65", "", 400, "invalid"},
		{"GET", "/v1/sandboxes/sb-1/files/stat?path=", "", 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/files/mkdir", `{"path":"/x","mode":"999"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/files/move", `{"from":"/x"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"../x","image":"py"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"` + long + `","image":"py"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","image":"py","vcpus":-1}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","kernel":"/k","rootfs":"/r","rw":false,"boot_wait_secs":10}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","kernel":"/k"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","image":"py","rootfs":"/r"}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","image":"py","boot_wait_secs":61}`, 400, "invalid"},
		{"POST", "/v1/snapshots", `{"tag":"x","image":"none"}`, 404, "not_found"},
		{"POST", "/v1/snapshots", `{"tag":"py","image":"py"}`, 400, "exists"},
		{"DELETE", "/v1/snapshots/..%2Fx", "", 400, "invalid"},
		{"DELETE", "/v1/snapshots/py?cascade=yes", "", 400, "invalid"},
		{"DELETE", "/v1/snapshots/py?cascade=true&force=true", "", 400, "invalid"},
		{"PUT", "/v1/snapshots/py/pool", `{}`, 400, "invalid"},
		{"PUT", "/v1/snapshots/py/pool", `{"size":-1}`, 400, "invalid"},
		{"PUT", "/v1/snapshots/py/pool", `{"size":1001}`, 400, "invalid"},
		{"PUT", "/v1/snapshots/none/pool", `{"size":1}`, 404, "not_found"},
		{"POST", "/v1/images", `{}`, 400, "invalid"},
		{"POST", "/v1/images", `{"name":"../x","source":"debian:bookworm"}`, 400, "invalid"},
	} {
		t.Run(strings.ReplaceAll(tt.method+tt.path+tt.body, " ", "_"), func(t *testing.T) {
			t.Parallel()
			a := send(t, tt.method, url+tt.path, "application/json", tt.body)
			if got := decode[wire.Error](t, a.body); a.status != tt.status || got.Code != tt.code {
				t.Errorf("status %d, body %s; want %d, %s", a.status, a.body, tt.status, tt.code)
			}
			if allow := a.header.Get("Allow"); (allow != "") != (tt.status == 405) {
				t.Errorf("status %d with Allow %q", a.status, allow)
			}
		})
	}
}

func TestContentType(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		name, path, contentType, body string
		status                        int
	}{
		{"json", "/v1/sandboxes", "application/json; charset=utf-8", `{"snapshot_tag":"py"}`, 201},
		{"none", "/v1/sandboxes", "", `{"snapshot_tag":"py"}`, 415},
		{"form", "/v1/sandboxes", "application/x-www-form-urlencoded", `{"snapshot_tag":"py"}`, 415},
		{"bad", "/v1/sandboxes", ";;", `{"snapshot_tag":"py"}`, 415},
		{"empty_with", "/v1/sandboxes/sb-1/ping", "application/json", "", 200},
		{"empty_without", "/v1/sandboxes/sb-1/ping", "", "", 200},
		{"too_large", "/v1/sandboxes", "application/json", `{"snapshot_tag":"` + strings.Repeat("x", 2<<20) + `"}`, 413},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if a := send(t, "POST", url+tt.path, tt.contentType, tt.body); a.status != tt.status {
				t.Errorf("status %d, body %s; want %d", a.status, a.body, tt.status)
			}
		})
	}
}

// TestCategories has each category of error come out of the domain.
func TestCategories(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		err    error
		status int
		code   string
	}{
		{errdef.ErrNotFound, 404, "not_found"},
		{errdef.ErrExists, 409, "exists"},
		{errdef.ErrInvalid, 400, "invalid"},
		{errdef.ErrConflict, 409, "conflict"},
		{errdef.ErrDenied, 403, "denied"},
		{errdef.ErrExhausted, 429, "exhausted"},
		{errdef.ErrUnavailable, 503, "unavailable"},
		{errdef.ErrUnsupported, 501, "unsupported"},
		{errdef.ErrTimeout, 504, "timeout"},
		{errors.New("disk on fire"), 500, "internal"},
	} {
		t.Run(tt.code, func(t *testing.T) {
			t.Parallel()
			b := apitest.New(t)
			b.Fail = func(op string) error {
				if op == "fork" {
					return errdef.WithHint(fmt.Errorf("fork py: %w", tt.err), "try less")
				}
				return nil
			}
			a := send(t, "POST", b.Serve(spec).URL+"/v1/sandboxes", "application/json", `{"snapshot_tag":"py"}`)
			want := wire.Error{Error: "fork py: " + tt.err.Error(), Code: tt.code, Hint: "try less"}
			want.RequestID = a.header.Get("X-Request-Id")
			if diff := cmp.Diff(want, decode[wire.Error](t, a.body)); diff != "" || a.status != tt.status {
				t.Errorf("status %d, want %d; body (-want +got):\n%s", a.status, tt.status, diff)
			}
			if after := a.header.Get("Retry-After"); (after != "") != (tt.status == 429) {
				t.Errorf("status %d with Retry-After %q", a.status, after)
			}
		})
	}
}

func TestPanic(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	b.Fail = func(op string) error {
		if op == "kill" {
			panic("boom")
		}
		return nil
	}
	status, body := do(t, "DELETE", b.Serve(spec).URL+"/v1/sandboxes/sb-1", "")
	if got := decode[wire.Error](t, body); status != 500 || got.Code != "internal" || strings.Contains(body, "goroutine") {
		t.Errorf("status %d, body %s", status, body)
	}
}

func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	req, err := http.NewRequestWithContext(t.Context(), "POST", url+"/v1/sandboxes/sb-1/ping", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Origin", "http://evil.example")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("status %d", resp.StatusCode)
	}
}

// TestForkdFields sees that forkd's clients find what they look for.
func TestForkdFields(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	status, body := do(t, "POST", url+"/v1/sandboxes",
		`{"snapshot_tag": "py", "n": 2, "per_child_netns": false, "memory_limit_mib": 256, "prewarm": true, "live_fork": true, "hugepages": true, "unknown": 1}`)
	if status != http.StatusCreated {
		t.Fatalf("status %d, body %s", status, body)
	}
	boxes := decode[[]map[string]any](t, body)
	if len(boxes) != 2 {
		t.Fatalf("%d sandboxes", len(boxes))
	}
	want := map[string]any{
		"netns": nil, "guest_addr": "10.42.0.2:8888", "memory_limit_mib": 256.0, "has_branched": false,
		"last_branch_memory_path": nil, "branch_count": 0.0, "snapshot_tag": "py",
	}
	for field, value := range want {
		if got, ok := boxes[0][field]; !ok || got != value {
			t.Errorf("%s is %v (there: %v), want %v", field, got, ok, value)
		}
	}
	for _, path := range []string{"/healthz", "/version", "/v1/doctor", "/v1/snapshots", "/v1/snapshots/py/info", "/v1/sandboxes", "/v1/sandboxes/sb-2", "/v1/images", "/v1/images/py", "/v1/snapshots/py/pool", "/v1/sandboxes/sb-2/processes"} {
		if status, body := do(t, "GET", url+path, ""); status != 200 {
			t.Errorf("GET %s: %d %s", path, status, body)
		}
	}
	if status, body := do(t, "DELETE", url+"/v1/sandboxes/sb-2", ""); status != 204 || body != "" {
		t.Errorf("delete: %d %q", status, body)
	}
}

func TestPartialFork(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	b.Fail = func(op string) error {
		if op == "fork 1" {
			return fmt.Errorf("%w: no room", errdef.ErrExhausted)
		}
		return nil
	}
	url := b.Serve(spec).URL
	if status, body := do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py","n":3}`); status != 429 {
		t.Errorf("all or nothing: %d %s", status, body)
	}
	status, body := do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py","n":3,"all_or_nothing":false}`)
	boxes := decode[[]wire.Sandbox](t, body)
	if status != 201 || len(boxes) != 3 || boxes[1].ID != "" || boxes[1].Code != "exhausted" || boxes[2].Error != "" {
		t.Errorf("partial: %d %s", status, body)
	}
}

func TestExec(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		name, body string
		want       wire.ExecResult
	}{
		{"streams", `{"args":["sh","-c","cat; echo err >&2; exit 3"],"stdin":"in"}`, wire.ExecResult{Stdout: "in", Stderr: "err\n", ExitCode: 3}},
		{"env", `{"args":["sh","-c","echo $A"],"env":{"A":"b"}}`, wire.ExecResult{Stdout: "b\n"}},
		{"signal", `{"args":["sh","-c","kill -TERM $$"]}`, wire.ExecResult{ExitCode: -15, Signal: "SIGTERM"}},
		{"timeout", `{"args":["sleep","60"],"timeout_secs":0.1}`, wire.ExecResult{ExitCode: 124, TimedOut: true, Code: "timeout"}},
		{"missing", `{"args":["/nope"]}`, wire.ExecResult{ExitCode: 127, Code: "not_found"}},
		{"no_user", `{"args":["true"],"user":"nobody at all"}`, wire.ExecResult{ExitCode: 127, Code: "not_found"}},
		{"no_directory", `{"args":["true"],"cwd":"/no/such/one"}`, wire.ExecResult{ExitCode: 127, Code: "not_found"}},
		{"not_executable", `{"args":["/dev/null"]}`, wire.ExecResult{ExitCode: 126, Code: "denied"}},
		{"flood", `{"args":["sh","-c","yes"]}`, wire.ExecResult{ExitCode: -9, Signal: "SIGKILL", Truncated: true, Code: "exhausted"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/exec", tt.body)
			got := decode[wire.ExecResult](t, body)
			if (got.Error != "") != (tt.want.Code != "") {
				t.Errorf("error is %q", got.Error)
			}
			got.Error, got.DurationMS = "", 0
			if got.TimedOut {
				got.Signal = ""
			}
			if got.Truncated {
				got.Stdout = ""
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || status != 200 {
				t.Errorf("status %d (-want +got):\n%s", status, diff)
			}
		})
	}
}

func TestEval(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/eval", `{"code":"print('out')\n6*7"}`)
	got := decode[wire.EvalResult](t, body)
	if status != 200 || got.Result == nil || *got.Result != "42" || got.Stdout != "out\n" || got.Error != nil || got.ExitCode != 0 {
		t.Errorf("status %d, body %s", status, body)
	}
	status, body = do(t, "POST", url+"/v1/sandboxes/sb-1/eval", `{"code":"1/0"}`)
	got = decode[wire.EvalResult](t, body)
	if status != 200 || got.Result != nil || got.Error == nil || !strings.HasPrefix(*got.Error, "ZeroDivisionError") || got.ExitCode != 1 || got.Traceback == "" {
		t.Errorf("status %d, body %s", status, body)
	}
}

// TestLines sees progress come before the result, and errors end a stream.
func TestLines(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, path, body string
		fail             string
		status           int
		last             string // a field of the last line
	}{
		{"snapshot", "/v1/snapshots", `{"tag":"x","image":"py"}`, "", 200, `"result":{`},
		{"image", "/v1/images", `{"name":"x","source":"debian:bookworm"}`, "", 200, `"result":{`},
		{"check", "/v1/snapshots/check", "", "", 200, `"result":{`},
		{"fails_midway", "/v1/snapshots", `{"tag":"x","image":"py"}`, "boot", 200, `"error":"guest did not boot"`},
		{"fails_at_once", "/v1/snapshots", `{"tag":"x","image":"none"}`, "", 404, `"code":"not_found"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := apitest.New(t)
			b.Fail = func(op string) error {
				if op == tt.fail {
					return errors.New("guest did not boot")
				}
				return nil
			}
			req, err := http.NewRequestWithContext(t.Context(), "POST", b.Serve(spec).URL+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Accept", "application/x-ndjson")
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = resp.Body.Close() }()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			linesOf := strings.Split(strings.TrimSpace(string(body)), "\n")
			if last := linesOf[len(linesOf)-1]; resp.StatusCode != tt.status || !strings.Contains(last, tt.last) {
				t.Errorf("status %d, last line %s", resp.StatusCode, last)
			}
			for _, line := range linesOf[:len(linesOf)-1] {
				if decode[wire.ProgressLine](t, line).Progress == nil {
					t.Errorf("line without progress: %s", line)
				}
			}
		})
	}
}

// TestHostOfSnapshot: it is shown where there is one.
func TestHostOfSnapshot(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	_, body := do(t, "GET", url+"/v1/snapshots/py/info", "")
	if d := decode[wire.SnapshotDetail](t, body); d.Host != nil || strings.Contains(body, `"host"`) {
		t.Errorf("where it depends on none: %s", body)
	}
	flags := "sha256:" + strings.Repeat("a", 64)
	b.Host = &vmm.Host{
		CPU:      vmm.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC", Flags: flags},
		Template: "T2A", Kernel: "6.1.112",
	}
	if status, made := do(t, "POST", url+"/v1/snapshots", `{"tag":"hw","image":"py"}`); status != 201 {
		t.Fatalf("create: %d %s", status, made)
	}
	_, body = do(t, "GET", url+"/v1/snapshots/hw/info", "")
	want := &wire.SnapshotHost{
		CPU:      wire.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC", Flags: flags},
		Template: "T2A", Kernel: "6.1.112",
	}
	if diff := cmp.Diff(want, decode[wire.SnapshotDetail](t, body).Host); diff != "" {
		t.Error(diff)
	}
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	if status, body := do(t, "POST", url+"/v1/snapshots", `{"tag":"x","image":"py","warmup":["true"]}`); status != 201 {
		t.Fatalf("create: %d %s", status, body)
	}
	if status, body := do(t, "POST", url+"/v1/snapshots", `{"tag":"x","image":"py","replace":true}`); status != 201 {
		t.Fatalf("replace: %d %s", status, body)
	}
	_, body := do(t, "GET", url+"/v1/snapshots/py/info", "")
	if d := decode[wire.SnapshotDetail](t, body); d.Image != "py" || d.MemoryLogicalBytes != 1<<20 || !cmp.Equal(d.Sandboxes, []string{"sb-1"}) {
		t.Errorf("info: %s", body)
	}
	_, body = do(t, "PUT", url+"/v1/snapshots/x/pool", `{"size":3}`)
	if p := decode[wire.Pool](t, body); p.Size != 3 {
		t.Errorf("pool: %s", body)
	}
	_, body = do(t, "POST", url+"/v1/snapshots/check", "")
	if r := decode[wire.CheckReport](t, body); !r.OK || r.Checked != 2 {
		t.Errorf("check: %s", body)
	}
	if status, body := do(t, "DELETE", url+"/v1/snapshots/x", ""); status != 204 || body != "" {
		t.Errorf("delete: %d %q", status, body)
	}
	if status, body := do(t, "POST", url+"/v1/snapshots/gc", ""); status != 200 {
		t.Errorf("gc: %d %s", status, body)
	}
}

// TestForkLeft sees that sandboxes nobody could learn of are removed.
func TestForkLeft(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	b.Fail = func(op string) error {
		if op == "fork 2" {
			leave()
		}
		return nil
	}
	req := httptest.NewRequestWithContext(ctx, "POST", "/v1/sandboxes", strings.NewReader(`{"snapshot_tag":"py","n":4}`))
	req.Header.Set("Content-Type", "application/json")
	api.New(b.Config()).ServeHTTP(httptest.NewRecorder(), req)
	if boxes := b.List(); len(boxes) != 0 {
		t.Errorf("%d sandboxes are left", len(boxes))
	}
}

// TestUnusedImages: to remove an image's name, or to collect snapshots, gives
// the disk back that images took which nothing uses any more.
func TestUnusedImages(t *testing.T) {
	t.Parallel()
	for _, collect := range []string{"POST /v1/snapshots/gc", "DELETE /v1/images/py"} {
		b := apitest.New(t)
		url := b.Serve(spec).URL
		_, body := do(t, "GET", url+"/v1/images/py", "")
		used := decode[wire.Image](t, body).Digest
		method, path, _ := strings.Cut(collect, " ")
		if status, body := do(t, method, url+path, ""); status >= 300 {
			t.Fatalf("%s: status %d, %s", collect, status, body)
		}
		if b.KeepImage == nil {
			t.Fatalf("%s collects no images", collect)
		}
		if !b.KeepImage(used) {
			t.Errorf("%s would remove the image of a snapshot", collect)
		}
		if b.KeepImage("sha256:" + strings.Repeat("0", 64)) {
			t.Errorf("%s would keep any image", collect)
		}
	}
}

// TestForeignHost refuses a page whose name was made to mean this host.
func TestForeignHost(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for host, want := range map[string]int{
		"evil.example": http.StatusForbidden, "evil.example:8889": http.StatusForbidden,
		"localhost": http.StatusOK, "localhost:8889": http.StatusOK, "127.0.0.1:8889": http.StatusOK, "[::1]:8889": http.StatusOK, "tine": http.StatusOK,
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", url+"/v1/sandboxes", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("host %s: status %d, want %d", host, resp.StatusCode, want)
		}
	}
}
