package api_test

import (
	"bufio"
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/wire"
)

// idsIn are the ids, or names, of what a list has.
func idsIn(t *testing.T, a answer) []string {
	t.Helper()
	if a.status != http.StatusOK {
		t.Fatalf("%d %s", a.status, a.body)
	}
	ids := []string{}
	for _, one := range decode[[]struct{ ID, Name string }](t, a.body) {
		if one.Name != "" {
			one.ID = one.Name
		}
		ids = append(ids, one.ID)
	}
	return ids
}

// TestOwnSandboxes: what a token of scope fork has made is there for it and for
// admins, to be looked at for scope read, and not there for others.
func TestOwnSandboxes(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	make := func(who string) string {
		t.Helper()
		a := g.do(t, who, "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
		if a.status != http.StatusCreated {
			t.Fatalf("%d %s", a.status, a.body)
		}
		return decode[[]wire.Sandbox](t, a.body)[0].ID
	}
	mine, other, admins := make("fork"), make("few"), make("admin")
	g.expect(t, g.do(t, "few", "POST", "/v1/workspaces", `{"name":"theirs","snapshot_tag":"py"}`), 201, "")

	for who, want := range map[string][]string{"fork": {mine}, "admin": {mine, other, admins}, "read": {mine, other, admins}} {
		got := idsIn(t, g.do(t, who, "GET", "/v1/sandboxes", ""))
		for _, id := range want {
			if !strings.Contains(strings.Join(got, " "), id) {
				t.Errorf("%s does not see %s: %v", who, id, got)
			}
		}
		if who == "fork" && len(got) != 1 {
			t.Errorf("fork sees %v", got)
		}
	}
	if got := idsIn(t, g.do(t, "fork", "GET", "/v1/workspaces", "")); len(got) != 0 {
		t.Errorf("fork sees workspaces %v", got)
	}
	if got := idsIn(t, g.do(t, "few", "GET", "/v1/workspaces", "")); len(got) != 1 {
		t.Errorf("few sees workspaces %v", got)
	}
	// Each answer is the one of what is not there.
	for _, try := range [][3]string{
		{"GET", "", ""},
		{"DELETE", "", ""},
		{"POST", "/exec", `{"args":["true"]}`},
		{"POST", "/eval", `{"code":"1"}`},
		{"POST", "/ping", ""},
		{"POST", "/branch", "{}"},
		{"POST", "/suspend", ""},
		{"GET", "/files?path=/etc/passwd", ""},
		{"PUT", "/files?path=/tmp/x", ""},
		{"GET", "/processes", ""},
		{"GET", "/exec/stream", ""},
		{"GET", "/usage", ""},
		{"PATCH", "/limits", `{"cpu_limit":1}`},
		{"GET", "/net", ""},
		{"PUT", "/net", `{"allow":[]}`},
		{"PATCH", "/net", `{"allow":["a.example"]}`},
	} {
		for _, id := range []string{other, admins} {
			theirs := g.do(t, "fork", try[0], "/v1/sandboxes/"+id+try[1], try[2])
			none := g.do(t, "fork", try[0], "/v1/sandboxes/sb-none"+try[1], try[2])
			if theirs.status != http.StatusNotFound {
				t.Errorf("%v of another's: %d %s", try, theirs.status, theirs.body)
			}
			was, is := decode[wire.Error](t, none.body), decode[wire.Error](t, theirs.body)
			if diff := cmp.Diff(strings.ReplaceAll(was.Error, "sb-none", id), is.Error); diff != "" || was.Code != is.Code {
				t.Errorf("%v: another's can be told from one that is not there:\n%s", try, diff)
			}
		}
	}
	for _, path := range []string{"/v1/workspaces/theirs", "/v1/diff?a=" + mine + "&b=" + other} {
		g.expect(t, g.do(t, "fork", "GET", path, ""), 404, "")
	}
	g.expect(t, g.do(t, "fork", "POST", "/v1/workspaces/theirs/suspend", "{}"), 404, "")
	g.expect(t, g.do(t, "fork", "DELETE", "/v1/workspaces/theirs", ""), 404, "")
	g.expect(t, g.do(t, "fork", "POST", "/v1/sandbox/"+other+"/shell", `{"command":"true"}`), 404, "")
	g.expect(t, g.do(t, "fork", "DELETE", "/v1/sandbox/"+other, ""), 404, "")
	for _, path := range []string{"/v1/tree", "/v1/snapshots/py/info"} {
		a := g.do(t, "fork", "GET", path, "")
		if a.status != http.StatusOK || !strings.Contains(a.body, mine) || strings.Contains(a.body, other) {
			t.Errorf("%s: %d %s", path, a.status, a.body)
		}
	}
	g.expect(t, g.do(t, "fork", "POST", "/v1/sandboxes/"+mine+"/ping", ""), 200, "")
	g.expect(t, g.do(t, "admin", "POST", "/v1/sandboxes/"+other+"/ping", ""), 200, "")
}

// TestOwnEvents follows what happens to one's own sandboxes.
func TestOwnEvents(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, g.url+"/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+g.tokens["fork"])
	req.Header.Set("Accept", "application/x-ndjson")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`), 201, "")
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	mine := decode[[]wire.Sandbox](t, a.body)[0].ID
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == "" {
			continue
		}
		if e := decode[wire.Event](t, lines.Text()); e.Sandbox != mine {
			t.Errorf("told of %+v", e)
		}
		return
	}
	t.Error("told of nothing")
}

// TestOwnBranches: a branch holds all that its sandbox had in memory, so it is
// for whom the sandbox is for.
func TestOwnBranches(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	g.expect(t, g.do(t, "fork", "POST", "/v1/sandboxes/"+id+"/branch", `{"tag":"mine"}`), 201, "")
	digest := decode[wire.Snapshot](t, g.do(t, "fork", "GET", "/v1/snapshots/mine/info", "").body).Digest
	theirs := g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, theirs, 201, "")
	other := decode[[]wire.Sandbox](t, theirs.body)[0].ID

	for who, want := range map[string]bool{"fork": true, "admin": true, "read": true, "few": false} {
		if got := strings.Contains(g.do(t, who, "GET", "/v1/snapshots", "").body, `"mine"`); got != want {
			t.Errorf("%s sees it in the list: %v", who, got)
		}
		if got := strings.Contains(g.do(t, who, "GET", "/v1/tree", "").body, `"mine"`); got != want {
			t.Errorf("%s sees it in the tree: %v", who, got)
		}
	}
	g.expect(t, g.do(t, "few", "GET", "/v1/snapshots/mine/info", ""), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"mine"}`), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"`+digest+`"}`), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes/"+other+"/rollback", `{"to":"mine"}`), 404, "")
	g.expect(t, g.do(t, "few", "GET", "/v1/diff?a=mine&b=py", ""), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/workspaces", `{"name":"w","snapshot_tag":"mine"}`), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/runs", `{"mode":"normal","snapshot":"mine","args":["true"]}`), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/runs", `{"mode":"normal","snapshot":"`+digest+`","args":["true"]}`), 404, "")
	g.expect(t, g.do(t, "few", "POST", "/v1/runs", `{"snapshot":"mine","args":["true"]}`), 404, "")
	g.expect(t, g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"mine"}`), 201, "")
	g.expect(t, g.do(t, "admin", "POST", "/v1/sandboxes", `{"snapshot_tag":"mine"}`), 201, "")
}
