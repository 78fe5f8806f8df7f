package daemon

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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

// TestDaemonTellsOfTokens changes the store behind the daemon's back, while it
// runs and while it does not.
func TestDaemonTellsOfTokens(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	store := auth.StorePath(dir)
	create := func(r auth.Record) {
		if _, _, err := auth.Create(t.Context(), store, r); err != nil {
			t.Fatal(err)
		}
	}
	told := func() []string {
		var lines []string
		for _, r := range auditLines(t, filepath.Join(dir, "audit")) {
			if strings.HasPrefix(r.Action, "token.") {
				lines = append(lines, strings.TrimSpace(r.Action+" "+r.Object+" "+r.Note))
			}
		}
		return lines
	}
	create(auth.Record{Name: "before", Scope: auth.Read})
	_, _, stop := start(t, fake.New(), Config{StateDir: dir})
	create(auth.Record{Name: "while", Scope: auth.Fork, MaxSandboxes: 2, Sign: true})
	want := []string{"token.added before scope read", "token.added while scope fork, at most 2 sandboxes, signs"}
	for deadline := time.Now().Add(10 * time.Second); len(told()) < len(want) && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	if err := auth.Remove(t.Context(), store, "before"); err != nil {
		t.Fatal(err)
	}
	if err := auth.Remove(t.Context(), store, "while"); err != nil {
		t.Fatal(err)
	}
	create(auth.Record{Name: "while", Scope: auth.Admin})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("0123456789abcdef0123456789"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second start has nothing new to tell
		_, _, stop = start(t, fake.New(), Config{StateDir: dir, Auth: auth.Config{TokenFile: file}})
		stop()
	}
	want = append(want, "token.added token-file the token of the token file", "token.changed while scope admin", "token.removed before")
	if diff := cmp.Diff(want, told()); diff != "" {
		t.Error(diff)
	}
	// What it keeps tells nobody what a token is.
	kept, err := os.ReadFile(filepath.Join(dir, "tokens.told"))
	records, listErr := auth.List(store)
	if err != nil || listErr != nil || len(records) != 1 || strings.Contains(string(kept), records[0].SHA256) {
		t.Errorf("%s: %v, %v", kept, err, listErr)
	}
	// A damaged store says nothing of what there is.
	if err = os.WriteFile(store, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, _, stop = start(t, fake.New(), Config{StateDir: dir, Auth: auth.Config{TokenFile: file}})
	stop()
	if diff := cmp.Diff(want, told()); diff != "" {
		t.Error(diff)
	}
}

// TestDaemonMakesTokens makes and removes tokens through the interface, which
// remembers who did.
func TestDaemonMakesTokens(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	_, r, stop := start(t, fake.New(), Config{StateDir: dir})
	// Without a token anybody of this host comes in by TCP: not to stay.
	for _, try := range [][2]string{{http.MethodPost, "/v1/tokens"}, {http.MethodDelete, "/v1/tokens/ci"}} {
		if status, _, body := r.ask(t, "tcp", try[0], try[1], `{"name":"ci"}`); status != http.StatusForbidden {
			t.Errorf("%s over TCP: %d %s", try[0], status, body)
		}
	}
	if status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/tokens", `{"name":"ci","scope":"admin"}`); status != http.StatusCreated {
		t.Errorf("create: %d %s", status, body)
	}
	if status, _, _ := r.ask(t, "tcp", http.MethodGet, "/v1/sandboxes", ""); status != http.StatusUnauthorized {
		t.Errorf("without a token, once there is one: %d", status)
	}
	if status, _, body := r.ask(t, "unix", http.MethodDelete, "/v1/tokens/ci", ""); status != http.StatusNoContent {
		t.Errorf("remove: %d %s", status, body)
	}
	stop()
	all := auditLines(t, filepath.Join(dir, "audit"))
	user := audit.User(strconv.Itoa(os.Geteuid()))
	created, deleted := find(all, audit.Outcome, "token.create"), find(all, audit.Outcome, "token.delete")
	if len(created) != 2 || created[0].Result != audit.Error || created[1].Actor != user || len(created[1].Made) != 1 || created[1].Made[0] != "ci" {
		t.Errorf("created: %+v", created)
	}
	if len(deleted) != 2 || deleted[1].Actor != user || deleted[1].Object != "ci" || deleted[1].Intent == 0 {
		t.Errorf("deleted: %+v", deleted)
	}
}

// TestDaemonRotates seals the log on request.
func TestDaemonRotates(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	_, r, stop := start(t, fake.New(), Config{StateDir: dir})
	var sealed []string
	for range 2 {
		status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/audit/rotate", "")
		var file struct{ File string }
		if err := json.Unmarshal([]byte(body), &file); err != nil || status != http.StatusOK {
			t.Fatalf("%d %s: %v", status, body, err)
		}
		sealed = append(sealed, file.File)
	}
	for _, name := range sealed {
		info, err := os.Stat(filepath.Join(dir, "audit", name))
		if err != nil || info.Mode().Perm()&0o222 != 0 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	stop()
	all := auditLines(t, filepath.Join(dir, "audit")) // which verifies the chain through all files
	if asked := find(all, audit.Outcome, "audit.rotate"); len(asked) != 2 || asked[0].Result != audit.OK || asked[0].Intent == 0 {
		t.Errorf("the rotations: %+v", asked)
	}
	_, r, stop = start(t, fake.New(), Config{StateDir: dir, Audit: AuditConfig{Off: true}})
	if status, _, body := r.ask(t, "unix", http.MethodPost, "/v1/audit/rotate", ""); status != http.StatusNotImplemented {
		t.Errorf("without a log: %d %s", status, body)
	}
	stop()
}

func FuzzDecodeTold(f *testing.F) {
	f.Add([]byte(`{"version":1,"tokens":{"ci":"7c2"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		told, err := decodeTold(data)
		if err != nil {
			return
		}
		w := tokenWatch{told: told}
		if got := len(w.changes(nil)); got != len(told) { // all of them are gone
			t.Errorf("%d of %d", got, len(told))
		}
	})
}
