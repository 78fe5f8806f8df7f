package cli_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/cli"
)

const someEvents = `{"id":"e-1","seq":1,"type":"created","at":"2026-11-22T00:00:00Z","at_unix_ms":1795305600000,"sandbox":"sb-1","data":{"snapshot":"py"}}

{"id":"e-2","seq":2,"type":"branched","at":"2026-11-22T00:00:00Z","at_unix_ms":1795305600000,"sandbox":"sb-1","data":{"snapshot":"cp","mode":"live","pause_ms":2.25}}
{"id":"e-3","seq":3,"type":"removed","at":"2026-11-22T00:00:00Z","at_unix_ms":1795305600000,"sandbox":"sb-2"}
{"id":"e-3","seq":3,"type":"gap","at":"2026-11-22T00:00:00Z","at_unix_ms":1795305600000}
`

// TestEvents follows a daemon that lets go of who is too slow, once.
func TestEvents(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		args []string
		want []string // a word of each line
	}{
		"all":      {nil, []string{"created sb-1 py", "branched sb-1 cp live pause=2.2ms", "removed sb-2", "gap"}},
		"type":     {[]string{"--type", "created,removed"}, []string{"created", "removed", "gap"}},
		"sandbox":  {[]string{"--sandbox", "sb-2"}, []string{"removed", "gap"}},
		"snapshot": {[]string{"--snapshot", "cp", "--sandbox", "sb-1"}, []string{"branched", "gap"}},
		"json":     {[]string{"--json", "--type", "branched"}, []string{`"mode":"live"`, `"type":"gap"`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked []string
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked = append(asked, r.URL.Query().Get("after"))
				w.Header().Set("Content-Type", "application/x-ndjson")
				if len(asked) == 1 {
					_, _ = io.WriteString(w, someEvents)
				}
			}))
			t.Cleanup(srv.Close)
			args := append([]string{"--url", srv.URL, "events", "--after", "e-0"}, tt.args...)
			code, out, errs := command(t, cli.Deps{}, nil, args...)
			if code != 0 || errs != "" {
				t.Fatalf("%d %q", code, errs)
			}
			lines := strings.Split(strings.TrimSpace(out), "\n")
			if len(lines) != len(tt.want) {
				t.Fatalf("got\n%s", out)
			}
			for i, want := range tt.want {
				if !strings.Contains(lines[i], want) {
					t.Errorf("line %q, want %q", lines[i], want)
				}
			}
			if diff := cmp.Diff([]string{"e-0", "e-3"}, asked); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestAuditRotate(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method+r.URL.Path != "POST/v1/audit/rotate" {
			w.WriteHeader(http.StatusNotFound)
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"file":"audit-1-2.jsonl","first":1,"last":2}`)
	}))
	t.Cleanup(srv.Close)
	if code, out, errs := command(t, cli.Deps{}, nil, "--url", srv.URL, "audit", "rotate"); code != 0 || out != "audit-1-2.jsonl\n" {
		t.Errorf("%d %q %q", code, out, errs)
	}
	if code, out, _ := command(t, cli.Deps{}, nil, "--url", srv.URL, "audit", "rotate", "--json"); code != 0 || !strings.Contains(out, `"last": 2`) {
		t.Errorf("%d %q", code, out)
	}
}
