package forge_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

const spec = "../../../api/openapi.yaml"

// answer is what a server answered.
type answer struct {
	status int
	header http.Header
	body   string
}

// send makes a request as Forge's client does: with a Content-Type only where
// there is a body.
func send(t *testing.T, method, url, body string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
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

// want is send for an answer that must have that status.
func want(t *testing.T, status int, method, url, body string) string {
	t.Helper()
	a := send(t, method, url, body)
	if a.status != status {
		t.Fatalf("%s %s %s: %d %s, want %d", method, url, body, a.status, a.body, status)
	}
	return a.body
}

// create makes a sandbox and returns its URL.
func create(t *testing.T, server string) string {
	t.Helper()
	var made wire.ForgeSandbox
	if err := json.Unmarshal([]byte(want(t, 201, "POST", server+"/v1/sandbox", "")), &made); err != nil {
		t.Fatal(err)
	}
	return server + "/v1/sandbox/" + made.ID
}

// run posts to a route that runs something.
func run(t *testing.T, url string, body any) wire.ForgeResult {
	t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	var result wire.ForgeResult
	if err = json.Unmarshal([]byte(want(t, 200, "POST", url, string(data))), &result); err != nil {
		t.Fatal(err)
	}
	if result.ExitCode != result.ExitCodeCamel || result.ExecutionTimeMS != result.ExecutionTimeCamel {
		t.Errorf("%+v: the two spellings differ", result)
	}
	result.ExecutionTimeMS, result.ExecutionTimeCamel, result.ExitCodeCamel = 0, 0, 0
	return result
}

// TestClient goes the way of Forge's own client.
func TestClient(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	server := b.Serve(spec).URL
	if got := want(t, 200, "GET", server+"/health", ""); got != `{"status":"ok"}` {
		t.Errorf("health: %s", got)
	}
	box := create(t, server)
	for _, tt := range []struct {
		route string
		body  any
		want  wire.ForgeResult
	}{
		{"shell", wire.ForgeShell{Command: "echo out; echo err >&2"}, wire.ForgeResult{Success: true, Stdout: "out\n", Stderr: "err\n"}},
		{"shell", wire.ForgeShell{Command: "exit 3"}, wire.ForgeResult{ExitCode: 3}},
		{"shell", wire.ForgeShell{Command: "kill -9 $$"}, wire.ForgeResult{ExitCode: -1}},
		{"shell", wire.ForgeShell{Command: `printf 'a\377b'`}, wire.ForgeResult{Success: true, Stdout: "a\uFFFDb"}},
		{"shell", wire.ForgeShell{Command: "head -c 70000 /dev/zero | tr '\\0' x; sleep 60"}, wire.ForgeResult{
			ExitCode: -1, Stdout: strings.Repeat("x", 64<<10), Error: "the command wrote more than 65536 bytes and was ended",
		}},
		{"execute", wire.ForgeExecute{Runtime: "shell", Code: "echo $((6*7))"}, wire.ForgeResult{Success: true, Stdout: "42\n"}},
		{"execute", wire.ForgeExecute{Runtime: "python", Code: "print(6*7)"}, wire.ForgeResult{Success: true, Stdout: "42\n"}},
	} {
		if diff := cmp.Diff(tt.want, run(t, box+"/"+tt.route, tt.body)); diff != "" {
			t.Errorf("%s %v: (-want +got)\n%s", tt.route, tt.body, diff)
		}
	}
	want(t, 204, "DELETE", box, "")
	if boxes := b.List(); len(boxes) != 0 {
		t.Errorf("left behind: %v", boxes)
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	box := create(t, apitest.New(t).Serve(spec).URL)
	content := "a\x00b\xff"
	path := filepath.Join(t.TempDir(), "a dir", "file")
	upload, err := json.Marshal(map[string]string{"path": path, "data": base64.StdEncoding.EncodeToString([]byte(content))})
	if err != nil {
		t.Fatal(err)
	}
	want(t, 204, "POST", box+"/upload", string(upload))
	got := send(t, "GET", box+"/download?path="+url.QueryEscape(path), "")
	if got.status != 200 || got.body != content || got.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("download: %+v", got)
	}
	for _, tt := range []struct {
		path   string
		status int
	}{
		{"", 400}, {"/nope", 404}, {filepath.Dir(path), 400}, {"/" + strings.Repeat("a", 4096), 400}, {"/a\x00", 400},
	} {
		want(t, tt.status, "GET", box+"/download?path="+url.QueryEscape(tt.path), "")
	}
}

// TestErrors is every way in which the gateway refuses. That the answers are
// JSON is for the server under test to see.
func TestErrors(t *testing.T) {
	t.Parallel()
	server := apitest.New(t).Serve(spec).URL
	box := create(t, server)
	none := server + "/v1/sandbox/none"
	for _, tt := range []struct {
		method, url, body string
		status            int
		message           string
	}{
		{"POST", server + "/v1/sandbox", `{"runtime":"ruby"}`, 400, "invalid request: unsupported runtime 'ruby'; expected 'node', 'python' or 'shell'"},
		{"POST", server + "/v1/sandbox", `{"runtime":7}`, 400, ""},
		{"POST", server + "/v1/sandbox", `{`, 400, ""},
		{"GET", server + "/v1/sandbox", "", 405, ""},
		{"POST", none + "/shell", `{"command":"true"}`, 404, "sandbox not found: none"},
		{"POST", none + "/execute", `{"code":"1","runtime":"python"}`, 404, "sandbox not found: none"},
		{"POST", none + "/upload", `{"data":"","path":"/x"}`, 404, "sandbox not found: none"},
		{"GET", none + "/download?path=/x", "", 404, "sandbox not found: none"},
		{"DELETE", none, "", 404, "sandbox not found: none"},
		{"POST", box + "/shell", "", 400, "invalid request: command is missing"},
		{"POST", box + "/shell", `{"command":7}`, 400, ""},
		{"POST", box + "/shell", `{"command":"a\u0000b"}`, 400, ""},
		{"GET", box + "/shell", "", 405, ""},
		{"POST", box + "/execute", `{"code":"1"}`, 400, "invalid request: unsupported runtime ''; expected 'node', 'python' or 'shell'"},
		{"POST", box + "/upload", `{"data":"*","path":"/x"}`, 400, ""},
		{"POST", box + "/upload", `{"data":""}`, 400, ""},
		{"POST", box + "/upload", `{`, 400, ""},
		{"POST", box + "/shell", `{"command":"` + strings.Repeat("a", 2<<20) + `"}`, 413, ""},
		{"POST", box + "/nope", "{}", 404, ""},
	} {
		got := send(t, tt.method, tt.url, tt.body)
		var body wire.Error
		if err := json.Unmarshal([]byte(got.body), &body); err != nil {
			t.Errorf("%s %s: %q: %v", tt.method, tt.url, got.body, err)
		}
		if got.status != tt.status || (tt.message != "" && body.Error != tt.message) {
			t.Errorf("%s %s %.80s: %d %s, want %d %s", tt.method, tt.url, tt.body, got.status, got.body, tt.status, tt.message)
		}
	}
}

// TestSnapshot is what a sandbox is forked from.
func TestSnapshot(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, flag string
		tags       []string
		want       string
	}{
		{"py", "", []string{"other", "py"}, "py"},
		{"only", "", []string{"other"}, "other"},
		{"flag", "other", []string{"other", "py"}, "other"},
		{"missing", "gone", []string{"py"}, ""},
		{"none", "", nil, ""},
		{"many", "", []string{"a", "b"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := apitest.New(t)
			cfg := b.Config()
			cfg.ForgeSnapshot = tt.flag
			srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
			t.Cleanup(srv.Close)
			server := srv.URL
			for _, tag := range tt.tags {
				if tag != "py" {
					snapshotOf(t, b, tag)
				}
			}
			if !strings.Contains(strings.Join(tt.tags, " "), "py") {
				want(t, 204, "DELETE", server+"/v1/snapshots/py", "")
			}
			got := send(t, "POST", server+"/v1/sandbox", "{}")
			if tt.want == "" {
				if got.status != 503 || !strings.Contains(got.body, "--forge-snapshot") {
					t.Errorf("got %d %s", got.status, got.body)
				}
				return
			}
			boxes := b.List()
			if got.status != 201 || len(boxes) != 1 || boxes[0].SnapshotTag != tt.want || boxes[0].IdleTTL != 15*time.Minute {
				t.Errorf("got %d %s, sandboxes %+v", got.status, got.body, boxes)
			}
		})
	}
}

func snapshotOf(t *testing.T, b *apitest.Backend, tag string) {
	t.Helper()
	if _, err := b.CreateSnapshot(t.Context(), sandbox.SnapshotRequest{Tag: tag, Image: "py"}); err != nil {
		t.Fatal(err)
	}
}

// TestFull is the daemon's limit.
func TestFull(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	b.Most = 1
	server := b.Serve(spec).URL
	create(t, server)
	if got := send(t, "POST", server+"/v1/sandbox", ""); got.status != 429 || got.header.Get("Retry-After") == "" {
		t.Errorf("got %+v", got)
	}
}

// TestClientGoesAway sees that the guest's command ends with its client.
func TestClientGoesAway(t *testing.T) {
	t.Parallel()
	box := create(t, apitest.New(t).Serve(spec).URL)
	file := filepath.Join(t.TempDir(), "pid")
	ctx, cancel := context.WithCancel(t.Context())
	gone := make(chan error, 1)
	go func() {
		body := strings.NewReader(`{"command":"echo $$ >` + file + `.new; mv ` + file + `.new ` + file + `; exec sleep 600"}`)
		req, err := http.NewRequestWithContext(ctx, "POST", box+"/shell", body)
		if err == nil {
			req.Header.Set("Content-Type", "application/json")
			_, err = http.DefaultClient.Do(req) //nolint:bodyclose // it must fail
		}
		gone <- err
	}()
	var pid int
	eventually(t, "the command runs", func() bool {
		data, err := os.ReadFile(file)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
		return err == nil && pid > 0
	})
	cancel()
	if err := <-gone; err == nil {
		t.Error("the request was answered")
	}
	eventually(t, "the command is gone", func() bool { return syscall.Kill(pid, 0) != nil })
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); !is(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestForkFails passes the daemon's failure on.
func TestForkFails(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	b.Fail = func(op string) error {
		if op == "fork 0" {
			return errdef.ErrTimeout
		}
		return nil
	}
	want(t, 504, "POST", b.Serve(spec).URL+"/v1/sandbox", "")
}
