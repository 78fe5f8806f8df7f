package api_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/wire"
)

func TestMetrics(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	do(t, "PUT", url+"/v1/snapshots/py/pool", `{"size":2}`)
	do(t, "POST", url+"/v1/sandboxes/sb-1/exec", `{"args":["true"]}`)
	do(t, "GET", url+"/v1/sandboxes/none", "")
	do(t, "GET", url+"/no/such/"+strings.Repeat("x", 100), "")
	a := send(t, "GET", url+"/metrics", "", "")
	if got := a.header.Get("Content-Type"); a.status != http.StatusOK || !strings.HasPrefix(got, "text/plain; version=0.0.4") {
		t.Fatalf("status %d, type %q", a.status, got)
	}
	for _, want := range []string{
		"forkd_snapshots_total 1", "forkd_sandboxes_active 1", "forkd_branches_in_flight 0", "forkd_branch_concurrency_cap 4",
		`forkd_build_info{version="0.0.0-test"} 1`, "tine_snapshots_total 1", `tine_sandboxes{state="running"} 1`,
		`tine_pool_ready{snapshot="py"} 2`, "tine_sandbox_memory_measured 1", "tine_sandbox_memory_private_bytes 2.097152e+07",
		`tine_fork_seconds_count{source="restore"} 1`, `tine_exec_seconds_count{verb="exec"} 1`,
		`tine_http_request_seconds_count{method="POST",route="/v1/sandboxes/{id}/exec",status="2xx"} 1`,
		`tine_http_request_seconds_count{method="GET",route="/v1/sandboxes/{id}",status="4xx"} 1`,
		`tine_http_request_seconds_count{method="GET",route="none",status="4xx"} 1`,
		`tine_failures_total{cause="not_found"} 2`, `tine_events_total{type="created"} 1`,
	} {
		if !strings.Contains(a.body, want+"\n") {
			t.Errorf("no %q", want)
		}
	}
	if strings.Contains(a.body, "xxxx") {
		t.Error("a caller's path became a label")
	}
}

func TestMetricsAreCached(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	do(t, "GET", url+"/metrics", "")
	do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
	if _, body := do(t, "GET", url+"/metrics", ""); !strings.Contains(body, "tine_sandboxes_active 1\n") {
		t.Error("the sample was taken anew at once")
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		name, id string
		kept     bool
	}{
		{"good", "Job-7_a.b", true},
		{"longest", strings.Repeat("a", 64), true},
		{"too_long", strings.Repeat("a", 65), false},
		{"empty", "", false},
		{"space", "a b", false},
		{"quote", `a"b`, false},
		{"foreign", "ä", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			a := sendWith(t, "GET", url+"/v1/sandboxes/none", http.Header{"X-Request-Id": {tt.id}}, "")
			got := a.header.Get("X-Request-Id")
			if (got == tt.id) != tt.kept || got == "" {
				t.Errorf("%q became %q", tt.id, got)
			}
			if body := decode[wire.Error](t, a.body); body.RequestID != got {
				t.Errorf("the body says %q, the header %q", body.RequestID, got)
			}
		})
	}
}

// TestLog sees that what is logged names the request and the sandbox.
func TestLog(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	var log bytes.Buffer
	cfg := b.Config()
	cfg.Logger = slog.New(api.WithRequestIDs(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	r := httptest.NewRequestWithContext(t.Context(), "GET", "http://localhost/v1/sandboxes/sb-9", nil)
	r.Header.Set("X-Request-Id", "job-1")
	api.New(cfg).ServeHTTP(httptest.NewRecorder(), r)
	var line struct {
		Msg       string `json:"msg"`
		RequestID string `json:"request_id"`
		Sandbox   string `json:"sandbox"`
		Status    int    `json:"status"`
	}
	if err := json.Unmarshal(log.Bytes(), &line); err != nil {
		t.Fatalf("%q: %v", log.String(), err)
	}
	if line.Msg != "request" || line.RequestID != "job-1" || line.Sandbox != "sb-9" || line.Status != http.StatusNotFound {
		t.Errorf("log line %s", log.String())
	}
	if n := strings.Count(log.String(), "request_id"); n != 1 {
		t.Errorf("the request is named %d times: %s", n, log.String())
	}
}

// sendWith is send with headers.
func sendWith(t *testing.T, method, url string, header http.Header, body string) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	return receive(t, req)
}
