package api_test

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// sse is one server-sent event.
type sse struct{ id, name, data string }

// openStream begins a stream that ends with the test.
func openStream(t *testing.T, method, url string, header http.Header, body string) (*bufio.Reader, func()) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("status %d", resp.StatusCode)
	}
	return bufio.NewReader(resp.Body), cancel
}

// nextEvent reads up to the next event; comments do not count.
func nextEvent(t *testing.T, r *bufio.Reader) sse {
	t.Helper()
	var e sse
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("after %+v: %v", e, err)
		}
		line = strings.TrimSuffix(line, "\n")
		key, value, _ := strings.Cut(line, ": ")
		switch {
		case key == "id":
			e.id = value
		case key == "event":
			e.name = value
		case key == "data":
			e.data = value
		case line == "" && e.name != "":
			return e
		}
	}
}

func TestEvents(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	r, leave := openStream(t, "GET", url+"/v1/events", http.Header{"Accept": {"text/event-stream"}}, "")
	do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`)
	do(t, "DELETE", url+"/v1/sandboxes/sb-2", "")
	do(t, "POST", url+"/v1/snapshots", `{"tag":"x","image":"py"}`)
	do(t, "DELETE", url+"/v1/snapshots/x", "")
	created := nextEvent(t, r)
	e := decode[wire.Event](t, created.data)
	if e.Type != wire.EventTypeCreated || e.Sandbox != "sb-2" || e.ID != created.id || e.Data == nil || e.Data.Snapshot != "py" {
		t.Errorf("first event %+v", created)
	}
	if got := parseTime(t, e.At).UnixMilli(); got != e.AtUnixMS {
		t.Errorf("at %s and %d", e.At, e.AtUnixMS)
	}
	for _, want := range []string{"removed", "snapshot.removed"} {
		if got := nextEvent(t, r); got.name != want {
			t.Errorf("event %+v, want %s", got, want)
		}
	}
	leave()

	r, leave = openStream(t, "GET", url+"/v1/events", http.Header{"Last-Event-Id": {created.id}}, "")
	if got := nextEvent(t, r); got.name != "removed" || decode[wire.Event](t, got.data).Seq != e.Seq+1 {
		t.Errorf("resumed with %+v", got)
	}
	leave()

	r, leave = openStream(t, "GET", url+"/v1/events?after="+created.id, http.Header{"Accept": {"application/x-ndjson"}}, "")
	defer leave()
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		if line == "\n" {
			continue
		}
		if got := decode[wire.Event](t, line); got.Type != wire.EventTypeRemoved {
			t.Errorf("line %s", line)
		}
		break
	}
}

func TestEventGap(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	for range 100 { // more than are kept
		b.Events.Add(sandbox.Resumed, "sb-1", sandbox.EventData{})
	}
	for name, after := range map[string]string{"too_old": b.Events.Epoch() + "-1", "another_daemon": "elsewhere-7"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, leave := openStream(t, "GET", url+"/v1/events?after="+after, http.Header{}, "")
			defer leave()
			gap, next := nextEvent(t, r), nextEvent(t, r)
			g, n := decode[wire.Event](t, gap.data), decode[wire.Event](t, next.data)
			if g.Type != wire.EventTypeGap || n.Seq != g.Seq+1 || n.Type != wire.EventTypeResumed {
				t.Errorf("%+v, then %+v", gap, next)
			}
		})
	}
	if a := send(t, "HEAD", url+"/v1/events", "", ""); a.status != http.StatusMethodNotAllowed {
		t.Errorf("HEAD: %d", a.status)
	}
	for _, bad := range []string{"x", "x-y", "-1", "a-18446744073709551615", b.Events.Epoch() + "-9999"} {
		if status, body := do(t, "GET", url+"/v1/events?after="+bad, ""); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
}

// TestEventStreams sees that only so many may follow, and that the daemon's end
// is theirs.
func TestEventStreams(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	var last *bufio.Reader
	for range 64 {
		last, _ = openStream(t, "GET", url+"/v1/events", http.Header{}, "")
	}
	if status, body := do(t, "GET", url+"/v1/events", ""); status != http.StatusServiceUnavailable {
		t.Errorf("one too many: %d %s", status, body)
	}
	b.Events.Close()
	for {
		if _, err := last.ReadString('\n'); err != nil {
			return // within the bound that openStream has set
		}
	}
}

func TestExecEvents(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	accept := http.Header{"Accept": {"text/event-stream"}}
	run := func(t *testing.T, body string) (stdout, stderr string, end wire.ExecEnd) {
		t.Helper()
		r, leave := openStream(t, "POST", url+"/v1/sandboxes/sb-1/exec", accept, body)
		defer leave()
		for {
			e := nextEvent(t, r)
			switch e.name {
			case "stdout", "stderr":
				chunk := decode[wire.ExecChunk](t, e.data)
				bytes, err := base64.StdEncoding.DecodeString(chunk.Base64)
				if err != nil {
					t.Fatal(err)
				}
				text := chunk.Text + string(bytes)
				if e.name == "stdout" {
					stdout += text
				} else {
					stderr += text
				}
			case "exit":
				return stdout, stderr, decode[wire.ExecEnd](t, e.data)
			case "started":
			default:
				t.Fatalf("event %+v", e)
			}
		}
	}
	for _, tt := range []struct {
		name, body, stdout, stderr string
		want                       wire.ExecEnd
	}{
		{"output", `{"args":["sh","-c","cat; echo e >&2; exit 3"],"stdin":"in"}`, "in", "e\n", wire.ExecEnd{ExitCode: 3}},
		{"bytes", `{"args":["printf","\\377\\376"]}`, "\xff\xfe", "", wire.ExecEnd{}},
		{"missing", `{"args":["/nope"]}`, "", "", wire.ExecEnd{ExitCode: 127, Code: "not_found"}},
		{"timeout", `{"args":["sleep","60"],"timeout_secs":0.1}`, "", "", wire.ExecEnd{ExitCode: 124, TimedOut: true, Code: "timeout"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			stdout, stderr, end := run(t, tt.body)
			if (end.Error != "") != (end.Code != "") {
				t.Errorf("error %q with code %q", end.Error, end.Code)
			}
			end.Error, end.DurationMS, end.Signal = "", 0, ""
			if diff := cmp.Diff(tt.want, end); diff != "" || stdout != tt.stdout || stderr != tt.stderr {
				t.Errorf("stdout %q, stderr %q, end (-want +got):\n%s", stdout, stderr, diff)
			}
		})
	}
	for body, want := range map[string]int{`{"args":[]}`: http.StatusBadRequest, `{"args":["true"],"timeout_secs":-1}`: http.StatusBadRequest} {
		if a := sendWith(t, "POST", url+"/v1/sandboxes/sb-1/exec", accept, body); a.status != want {
			t.Errorf("%s: %d %s", body, a.status, a.body)
		}
	}
	if a := sendWith(t, "POST", url+"/v1/sandboxes/none/exec", accept, `{"args":["true"]}`); a.status != http.StatusNotFound {
		t.Errorf("no sandbox: %d %s", a.status, a.body)
	}
}

// TestExecEventsClientLeaves sees that a command ends with its client.
func TestExecEventsClientLeaves(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	ended := filepath.Join(t.TempDir(), "ended")
	body, err := json.Marshal(map[string]any{"args": []string{"sh", "-c", "echo on; sleep 2; touch " + ended}})
	if err != nil {
		t.Fatal(err)
	}
	r, leave := openStream(t, "POST", url+"/v1/sandboxes/sb-1/exec", http.Header{"Accept": {"text/event-stream"}}, string(body))
	for nextEvent(t, r).name != "stdout" {
	}
	leave()
	time.Sleep(2500 * time.Millisecond)
	if _, err := os.Stat(ended); err == nil {
		t.Error("the command went on without its client")
	}
}
