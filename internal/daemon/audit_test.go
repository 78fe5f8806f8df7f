package daemon

import (
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/vmm/fake"
)

func auditLines(t *testing.T, dir string) []audit.Record {
	t.Helper()
	if report, err := audit.Verify(t.Context(), dir, audit.VerifyOptions{}); err != nil || !report.OK {
		t.Errorf("verify: %v %+v", err, report.Problems)
	}
	var all []audit.Record
	if _, err := audit.Read(t.Context(), dir, 0, func(l audit.Line) error { all = append(all, l.Record); return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

// find returns the lines of an action.
func find(all []audit.Record, phase, action string) []audit.Record {
	var found []audit.Record
	for _, r := range all {
		if r.Phase == phase && r.Action == action {
			found = append(found, r)
		}
	}
	return found
}

func TestDaemonRemembers(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	_, r, stop := start(t, fake.New(), Config{StateDir: dir, Version: "1.2.3"})
	putImage(t, filepath.Join(dir, "images"))
	if status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/snapshots", `{"tag":"ml","image":"py"}`); status/100 != 2 {
		t.Fatalf("snapshot: %d %s", status, body)
	}
	if status, _, body := r.ask(t, "tcp", http.MethodPost, "/v1/sandboxes", `{"snapshot_tag":"ml"}`); status != http.StatusCreated {
		t.Fatalf("fork: %d %s", status, body)
	}
	stop()
	shut := filepath.Join(dir, "audit")
	all := auditLines(t, shut)
	if starts := find(all, audit.Event, "daemon.start"); len(starts) != 1 || starts[0].Note != "version 1.2.3" || starts[0].Actor != audit.Daemon {
		t.Errorf("starts: %+v", starts)
	}
	created := find(all, audit.Outcome, "sandbox.create")
	events := find(all, audit.Event, "sandbox.created")
	if len(created) != 1 || len(events) != 1 || len(created[0].Made) != 1 || created[0].Made[0] != events[0].Object || created[0].Remote != "loopback" {
		t.Errorf("the sandbox: %+v, %+v", created, events)
	}
	made := find(all, audit.Outcome, "snapshot.create")
	if want := audit.User(strconv.Itoa(os.Geteuid())); len(made) != 1 || made[0].Actor != want || made[0].Remote != "unix" || len(made[0].Made) != 1 || made[0].Made[0] != "ml" {
		t.Errorf("the snapshot: %+v, by %s", made, want)
	}
	if told := find(all, audit.Event, "snapshot.created"); len(told) != 1 || told[0].Object != "ml" {
		t.Errorf("told of the snapshot: %+v", told)
	}
	if last := all[len(all)-1]; last.Action != "daemon.stop" {
		t.Errorf("the last line: %+v", last)
	}
	_, _, stop = start(t, fake.New(), Config{StateDir: dir})
	stop()
	if starts := find(auditLines(t, shut), audit.Event, "daemon.start"); len(starts) != 2 {
		t.Errorf("%d starts", len(starts))
	}
}

func TestDaemonRemembersTokens(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	_, secret, err := auth.Create(t.Context(), auth.StorePath(dir), auth.Record{Name: "ci", Scope: auth.Read})
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "log")
	_, r, stop := start(t, fake.New(), Config{StateDir: dir, Audit: AuditConfig{Dir: log, Sync: audit.SyncAlways}})
	for token, want := range map[string]int{"": http.StatusUnauthorized, "guess-0123456789abcdef": http.StatusUnauthorized, secret: http.StatusForbidden} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodDelete, "http://"+r.addr+"/v1/sandboxes/sb-1", nil)
		req.RequestURI = ""
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		if status := answerTo(t, req); status != want {
			t.Errorf("status %d, want %d", status, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	stop()
	actors := map[string]int{}
	for _, l := range find(auditLines(t, log), audit.Outcome, "auth.failure") {
		actors[l.Actor+" "+strconv.Itoa(l.Status)]++
	}
	if actors["anonymous 401"] != 2 || actors["token:ci 403"] != 1 {
		t.Errorf("who was not let in: %v", actors)
	}
	files, err := filepath.Glob(filepath.Join(log, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil || strings.Contains(string(data), secret) || strings.Contains(string(data), "guess-") {
			t.Errorf("%s holds a token: %v", name, err)
		}
	}
}

func answerTo(t *testing.T, req *http.Request) int {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestDaemonRemembersNothing(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]Config{"off": {Audit: AuditConfig{Off: true}}, "ephemeral": {Ephemeral: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg.StateDir = stateDir(t)
			open(t, cfg)
			if _, err := os.Stat(filepath.Join(cfg.StateDir, "audit")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a log: %v", err)
			}
		})
	}
}
