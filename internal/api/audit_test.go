package api_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/audit"
)

// audited is a server that remembers, and a function that ends its log and
// reads it.
func audited(t *testing.T, reads bool) (string, func() []audit.Record) {
	t.Helper()
	dir := t.TempDir()
	log, err := audit.Open(audit.Config{Dir: dir, Sync: audit.SyncNever})
	if err != nil {
		t.Fatal(err)
	}
	b := apitest.New(t)
	cfg := b.Config()
	cfg.Audit, cfg.AuditReads = log, reads
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	end := func() []audit.Record {
		t.Helper()
		srv.Close()
		if err := log.Close(); err != nil {
			t.Fatal(err)
		}
		var all []audit.Record
		_, err := audit.Read(t.Context(), dir, 0, func(l audit.Line) error {
			for _, secret := range []string{"s3cret", "open sesame"} {
				if strings.Contains(string(l.Text), secret) {
					t.Errorf("the log holds what was sent: %s", l.Text)
				}
			}
			all = append(all, l.Record)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if report, err := audit.Verify(t.Context(), dir, audit.VerifyOptions{}); err != nil || !report.OK {
			t.Errorf("verify: %v %+v", err, report.Problems)
		}
		return all
	}
	t.Cleanup(func() { srv.Close(); _ = log.Close() })
	return srv.URL, end
}

// brief is what matters of a line.
func brief(r audit.Record) string {
	return strings.TrimSpace(fmt.Sprintln(r.Phase, r.Action, r.Object, r.Actor, r.Status, r.Result, r.Code, strings.Join(r.Made, ",")))
}

func briefs(rs []audit.Record) []string {
	var out []string
	for _, r := range rs {
		out = append(out, strings.Join(strings.Fields(brief(r)), " "))
	}
	return out
}

func TestAuditOfActs(t *testing.T) {
	t.Parallel()
	url, end := audited(t, false)
	body := `{"args":["echo","s3cret"]}`
	for _, call := range []struct{ method, path, body string }{
		{"GET", "/healthz", ""},
		{"GET", "/v1/sandboxes", ""},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":2}`},
		{"POST", "/v1/sandboxes/sb-1/exec", body},
		{"POST", "/v1/sandboxes/sb-1/ping", ""},
		{"PUT", "/v1/sandboxes/sb-1/files?path=/tmp/s3cret", "open sesame"},
		{"GET", "/v1/sandboxes/sb-1/files?path=/tmp/s3cret", ""},
		{"POST", "/v1/sandboxes/sb-9/exec", body},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":`}, // refused before it is an act
		{"DELETE", "/v1/sandboxes/sb-1", ""},
	} {
		contentType := "application/json"
		if call.method == "PUT" {
			contentType = "application/octet-stream"
		}
		send(t, call.method, url+call.path, contentType, call.body)
	}
	all := end()
	want := []string{
		"intent sandbox.create local 0", "outcome sandbox.create local 201 ok sb-1,sb-2",
		"intent sandbox.exec sb-1 local 0", "outcome sandbox.exec sb-1 local 200 ok",
		"intent sandbox.file.write sb-1 local 0", "outcome sandbox.file.write sb-1 local 204 ok",
		"intent sandbox.file.read sb-1 local 0", "outcome sandbox.file.read sb-1 local 200 ok",
		"intent sandbox.exec sb-9 local 0", "outcome sandbox.exec sb-9 local 404 error not_found",
		"intent sandbox.delete sb-1 local 0", "outcome sandbox.delete sb-1 local 204 ok",
	}
	if diff := cmp.Diff(want, briefs(all)); diff != "" {
		t.Fatal(diff)
	}
	for i := 0; i < len(all); i += 2 {
		intent, outcome := all[i], all[i+1]
		if outcome.Intent != intent.Seq || intent.RequestID == "" || intent.RequestID != outcome.RequestID || intent.Remote != "loopback" {
			t.Errorf("they do not belong together: %+v, %+v", intent, outcome)
		}
		if outcome.Method == "" || outcome.LatencyUS < 1 || !strings.HasPrefix(outcome.Path, "/v1/") || strings.Contains(outcome.Path, "?") || outcome.UA == "" || outcome.TS == "" {
			t.Errorf("fields that consumers of forkd's log need: %+v", outcome)
		}
		if intent.Route == "" || intent.Path != "" {
			t.Errorf("intent: %+v", intent)
		}
	}
	if got := all[2].Digest; got != audit.Digest([]byte(body)) {
		t.Errorf("digest of the command: %s", got)
	}
	if got := all[5].Digest; got != audit.Digest([]byte("open sesame")) {
		t.Errorf("digest of the file: %s", got)
	}
}

func TestAuditReads(t *testing.T) {
	t.Parallel()
	url, end := audited(t, true)
	for _, path := range []string{"/healthz", "/version", "/v1/sandboxes/sb-7", "/nowhere"} {
		do(t, "GET", url+path, "")
	}
	want := []string{
		"outcome healthz.get local 200 ok", "outcome version.get local 200 ok",
		"outcome sandbox.get sb-7 local 404 error not_found", "outcome get local 404 error not_found",
	}
	if diff := cmp.Diff(want, briefs(end())); diff != "" {
		t.Error(diff)
	}
}

func TestAuditOfWhoIsNotLetIn(t *testing.T) {
	t.Parallel()
	url, end := audited(t, false)
	const requests = 60
	for range requests {
		req, err := http.NewRequestWithContext(t.Context(), "DELETE", url+"/v1/sandboxes/sb-1", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = "evil.example"
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	all := end()
	if len(all) == 0 || len(all) > requests/2+20 {
		t.Errorf("%d lines for %d requests", len(all), requests)
	}
	for _, r := range all {
		if got := strings.Join(strings.Fields(brief(r)), " "); got != "outcome auth.failure local 403 error denied" {
			t.Errorf("line: %s", got)
		}
	}
}

func TestAuditOfStreams(t *testing.T) {
	t.Parallel()
	url, end := audited(t, false)
	do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
	conn, _, err := websocket.Dial(t.Context(), url+"/v1/sandboxes/sb-1/exec/stream", nil) //nolint:bodyclose // it is the connection
	if err != nil {
		t.Fatal(err)
	}
	message := []byte(`{"args":["echo","s3cret"]}`)
	if err = conn.Write(t.Context(), websocket.MessageText, message); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, _, err = conn.Read(t.Context())
	}
	do(t, "DELETE", url+"/v1/sandboxes/sb-1", "")
	all := end()
	if len(all) < 5 {
		t.Fatalf("lines: %q", briefs(all))
	}
	connection, command := all[2], all[3]
	if connection.Action != "sandbox.exec" || command.Phase != audit.Intent || command.Intent != connection.Seq || command.Digest != audit.Digest(message) {
		t.Errorf("lines: %+v\n%+v", connection, command)
	}
}

// An act that cannot be remembered does not happen.
func TestAuditRefuses(t *testing.T) {
	t.Parallel()
	log, err := audit.Open(audit.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if err = log.Close(); err != nil { // it takes no line from now on
		t.Fatal(err)
	}
	b := apitest.New(t)
	cfg := b.Config()
	cfg.Audit = log
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	t.Cleanup(srv.Close)
	status, body := do(t, "POST", srv.URL+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
	if status != http.StatusServiceUnavailable || !strings.Contains(body, `"unavailable"`) {
		t.Errorf("%d %s", status, body)
	}
	if boxes := cfg.Sandboxes.List(); len(boxes) != 0 {
		t.Errorf("it was made all the same: %v", boxes)
	}
	if status, _ = do(t, "GET", srv.URL+"/v1/sandboxes", ""); status != http.StatusOK {
		t.Errorf("a list: %d", status)
	}
}

func TestAuditActorOfContext(t *testing.T) {
	t.Parallel()
	if got := audit.Actor(t.Context()); got != audit.Anonymous {
		t.Errorf("nobody is %q", got)
	}
	if got := audit.Actor(audit.WithActor(t.Context(), audit.Token("ci"))); got != "token:ci" {
		t.Errorf("a token is %q", got)
	}
	if err := errors.Join(audit.Begin(t.Context(), "a", "b", "c", "d"), audit.Command(t.Context(), nil)); err != nil {
		t.Errorf("without a log: %v", err)
	}
}
