package api_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// grow makes a tree: py, a and b after it, and sb-1 at b. Both are layers.
func grow(t *testing.T, url string) {
	t.Helper()
	for _, tag := range []string{"a", "b"} {
		if status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/branch", `{"mode":"diff","tag":"`+tag+`"}`); status != 201 {
			t.Fatalf("branch %s: %d %s", tag, status, body)
		}
	}
}

// TestBranchErrors is every way in which what has to do with branches can be
// refused.
func TestBranchErrors(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	grow(t, url)
	const branch = "/v1/sandboxes/sb-1/branch"
	for _, tt := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"POST", branch, `[]`, 400, "invalid"},
		{"POST", branch, `{"tag":"../x"}`, 400, "invalid"},
		{"POST", branch, `{"tag":"` + strings.Repeat("x", 65) + `"}`, 400, "invalid"},
		{"POST", branch, `{"mode":"fast"}`, 400, "invalid"},
		{"POST", branch, `{"mode":"diff","diff":true}`, 400, "invalid"},
		{"POST", branch, `{"mode":"live","live":true}`, 400, "invalid"},
		{"POST", branch, `{"mode":"full","live":true}`, 400, "invalid"},
		{"POST", branch, `{"diff":true,"live":true}`, 400, "invalid"},
		{"POST", branch, `{"diff":true,"measure_diff":true}`, 400, "invalid"},
		{"POST", branch, `{"mode":"live","measure_diff":true}`, 400, "invalid"},
		{"POST", branch, `{"wait":false}`, 400, "invalid"},
		{"POST", branch, `{"mode":"full","wait":false}`, 400, "invalid"},
		{"POST", branch, `{"mode":"live","wait":false,"n":1}`, 400, "invalid"},
		{"POST", branch, `{"n":-1}`, 400, "invalid"},
		{"POST", branch, `{"n":1001}`, 400, "invalid"},
		{"POST", branch, `{"parent_tag":"a","diff":true}`, 400, "invalid"},
		{"POST", branch, `{"parent_tag":"py"}`, 400, "invalid"},
		{"POST", branch, `{"tag":"a"}`, 409, "exists"},
		{"POST", "/v1/sandboxes/none/branch", `{"tag":"a"}`, 409, "exists"}, // forkd looks at the tag first
		{"POST", "/v1/sandboxes/none/branch", `{"mode":"live","wait":false}`, 404, "not_found"},
		{"POST", "/v1/sandboxes/none/branch", "", 404, "not_found"},
		{"GET", branch, "", 405, "method_not_allowed"},
		{"POST", "/v1/sandboxes/sb-1/rollback", "", 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/rollback", `{}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/rollback", `{"to":"../x"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes/sb-1/rollback", `{"to":"none"}`, 404, "not_found"},
		{"POST", "/v1/sandboxes/none/rollback", `{"to":"py"}`, 404, "not_found"},
		{"POST", "/v1/sandboxes/none/suspend", "", 404, "not_found"},
		{"POST", "/v1/sandboxes/none/resume", "", 404, "not_found"},
		{"POST", "/v1/snapshots/a/compact", "", 400, "invalid"},
		{"POST", "/v1/snapshots/a/compact", `{}`, 400, "invalid"},
		{"POST", "/v1/snapshots/a/compact", `{"to":"../x"}`, 400, "invalid"},
		{"POST", "/v1/snapshots/a/compact", `{"to":"a"}`, 400, "invalid"},
		{"POST", "/v1/snapshots/..%2Fa/compact", `{"to":"x"}`, 400, "invalid"},
		{"POST", "/v1/snapshots/a/compact", `{"to":"py"}`, 409, "exists"},
		{"POST", "/v1/snapshots/none/compact", `{"to":"x"}`, 404, "not_found"},
		{"POST", "/v1/snapshots/none/flatten", "", 404, "not_found"},
		{"POST", "/v1/snapshots/x/promote", "", 400, "invalid"},
		{"POST", "/v1/snapshots/x/promote", `{"from":""}`, 400, "invalid"},
		{"POST", "/v1/snapshots/..%2Fx/promote", `{"from":"a"}`, 400, "invalid"},
		{"POST", "/v1/snapshots/x/promote", `{"from":"none"}`, 404, "not_found"},
		{"POST", "/v1/snapshots/prune", "", 400, "invalid"},
		{"POST", "/v1/snapshots/prune", `{}`, 400, "invalid"},
		{"POST", "/v1/snapshots/prune", `{"keep_last":-1}`, 400, "invalid"},
		{"GET", "/v1/diff", "", 400, "invalid"},
		{"GET", "/v1/diff?a=py", "", 400, "invalid"},
		{"GET", "/v1/diff?a=py&b=", "", 400, "invalid"},
		{"GET", "/v1/diff?a=py&b=none", "", 404, "not_found"},
		{"DELETE", "/v1/snapshots/py", "", 409, "conflict"},
		{"DELETE", "/v1/snapshots/a?force=true&cascade=true", "", 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","idle_action":"hide"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","idle_action":"suspend"}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","secrets":{"../x":"1"}}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","secrets":{"":"1"}}`, 400, "invalid"},
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"py","secrets":["x"]}`, 400, "invalid"},
	} {
		t.Run(strings.ReplaceAll(tt.method+tt.path+tt.body, " ", "_"), func(t *testing.T) {
			t.Parallel()
			a := send(t, tt.method, url+tt.path, "application/json", tt.body)
			if got := decode[wire.Error](t, a.body); a.status != tt.status || got.Code != tt.code {
				t.Errorf("status %d, body %s; want %d, %s", a.status, a.body, tt.status, tt.code)
			}
		})
	}
}

// TestBranchCategories has each refusal of the domain come through.
func TestBranchCategories(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		op, method, path, body string
		err                    error
		status                 int
	}{
		{"branch", "POST", "/v1/sandboxes/sb-1/branch", "", errdef.ErrUnavailable, 503},
		{"branch", "POST", "/v1/sandboxes/sb-1/branch", `{"mode":"live","wait":false}`, errdef.ErrConflict, 409},
		{"branch", "POST", "/v1/sandboxes/sb-1/branch", "", errors.New("disk on fire"), 500},
		{"rollback", "POST", "/v1/sandboxes/sb-1/rollback", `{"to":"py"}`, errdef.ErrConflict, 409},
		{"suspend", "POST", "/v1/sandboxes/sb-1/suspend", "{}", errdef.ErrExhausted, 429},
		{"resume", "POST", "/v1/sandboxes/sb-1/resume", "", errdef.ErrConflict, 409},
		{"diff", "GET", "/v1/diff?a=py&b=py", "", errdef.ErrUnsupported, 501},
		{"branch", "POST", "/v1/snapshots/x/promote", `{"from":"sb-1"}`, errdef.ErrTimeout, 504},
	} {
		t.Run(tt.op, func(t *testing.T) {
			t.Parallel()
			b := apitest.New(t)
			b.Fail = func(op string) error {
				if op == tt.op {
					return fmt.Errorf("%s: %w", op, tt.err)
				}
				return nil
			}
			url := b.Serve(spec).URL
			if status, body := do(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py"}`); status != 201 {
				t.Fatalf("fork: %d %s", status, body)
			}
			if status, body := do(t, tt.method, url+tt.path, tt.body); status != tt.status {
				t.Errorf("status %d, body %s; want %d", status, body, tt.status)
			}
		})
	}
}

// TestBranchBodies are the requests that forkd's clients make.
func TestBranchBodies(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, tt := range []struct {
		name, contentType, body string
		status                  int
		mode                    string
	}{
		{"none", "", "", 201, "full"},
		{"none_but_declared", "application/json", "", 201, "full"},
		{"empty", "application/json", `{}`, 201, "full"},
		{"measure", "application/json", `{"measure_diff": true}`, 201, "full"},
		{"diff", "application/json", `{"diff": true}`, 201, "diff"},
		{"parent", "application/json", `{"mode":"diff","parent_tag":"py"}`, 201, "diff"},
		{"live", "application/json", `{"live": true}`, 201, "live"},
		{"no_wait", "application/json", `{"tag": "cp", "mode": "live", "wait": false}`, 202, "live"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := send(t, "POST", url+"/v1/sandboxes/sb-1/branch", tt.contentType, tt.body)
			if a.status != tt.status {
				t.Fatalf("status %d, body %s", a.status, a.body)
			}
			got := decode[wire.Snapshot](t, a.body)
			want := wire.Snapshot{BranchedFrom: "sb-1", PauseMS: 2, Mode: tt.mode, Status: "ready", Bootable: true}
			if tt.status == 202 {
				want.Status, want.Bootable = "writing", false
			}
			if diff := cmp.Diff(want, wire.Snapshot{BranchedFrom: got.BranchedFrom, PauseMS: got.PauseMS, Mode: got.Mode, Status: got.Status, Bootable: got.Bootable}); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	_, body := do(t, "GET", url+"/v1/sandboxes/sb-1", "")
	box := decode[wire.Sandbox](t, body)
	if !box.HasBranched || box.BranchCount != 7 || box.LastBranchMemoryPath == nil || !strings.HasSuffix(*box.LastBranchMemoryPath, "/layer") {
		t.Errorf("sandbox: %s", body)
	}
}

// listed is what GET /v1/snapshots says of a tag. There may be one of it.
func listed(t *testing.T, url, tag string) *wire.Snapshot {
	t.Helper()
	_, body := do(t, "GET", url+"/v1/snapshots", "")
	var found *wire.Snapshot
	for _, s := range decode[[]wire.Snapshot](t, body) {
		if s.Tag != tag {
			continue
		}
		if found != nil {
			t.Errorf("%s is listed twice: %s", tag, body)
		}
		found = &s
	}
	return found
}

// TestBranchWriting: a branch that nobody waits for can be looked at, but not
// used, until it is ready; and if it fails that is said.
func TestBranchWriting(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	begin := func() {
		t.Helper()
		if status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/branch", `{"tag":"cp","mode":"live","wait":false}`); status != 202 {
			t.Fatalf("branch: %d %s", status, body)
		}
		if s := listed(t, url, "cp"); s == nil || s.Status != "writing" || s.Bootable || s.PauseMS != 2 || s.BranchedFrom != "sb-1" {
			t.Errorf("listed as %+v", s)
		}
	}
	refuse := func(method, path, body string, want int) {
		t.Helper()
		if status, text := do(t, method, url+path, body); status != want {
			t.Errorf("%s %s %s: %d %s, want %d", method, path, body, status, text, want)
		}
	}
	begin()
	for _, r := range [][3]string{
		{"POST", "/v1/sandboxes", `{"snapshot_tag":"cp"}`},
		{"POST", "/v1/sandboxes/sb-1/branch", `{"tag":"cp"}`},
		{"POST", "/v1/snapshots", `{"tag":"cp","image":"py"}`},
		{"POST", "/v1/snapshots/cp/compact", `{"to":"x"}`},
		{"POST", "/v1/snapshots/cp/flatten", ""},
		{"POST", "/v1/snapshots/cp/promote", `{"from":"py"}`},
		{"POST", "/v1/snapshots/x/promote", `{"from":"cp"}`},
		{"GET", "/v1/snapshots/cp/info", ""},
		{"DELETE", "/v1/snapshots/cp", ""},
		{"DELETE", "/v1/snapshots/cp?force=true", ""},
	} {
		refuse(r[0], r[1], r[2], http.StatusConflict)
	}

	b.Settle("cp", errors.New("disk full"))
	if s := listed(t, url, "cp"); s == nil || s.Status != "failed" || s.Bootable || !strings.Contains(s.Warning, "disk full") {
		t.Errorf("listed as %+v", s)
	}
	refuse("POST", "/v1/sandboxes", `{"snapshot_tag":"cp"}`, http.StatusConflict)
	refuse("DELETE", "/v1/snapshots/cp", "", http.StatusNoContent)
	refuse("DELETE", "/v1/snapshots/cp", "", http.StatusNotFound)
	if s := listed(t, url, "cp"); s != nil {
		t.Errorf("still listed as %+v", s)
	}

	begin()
	b.Settle("cp", errors.New("disk full"))
	begin() // over the one that failed
	b.Settle("cp", nil)
	if s := listed(t, url, "cp"); s == nil || s.Status != "ready" || !s.Bootable || s.PauseMS != 2 || s.ParentTag != "py" || s.ChainDepth != 1 {
		t.Errorf("listed as %+v", s)
	}
	refuse("POST", "/v1/sandboxes", `{"snapshot_tag":"cp"}`, http.StatusCreated)
}

// TestBranchFork: what is forked from a branch at once lives by the rules of
// the sandbox that was branched.
func TestBranchFork(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	_, body := do(t, "POST", url+"/v1/sandboxes",
		`{"snapshot_tag":"py","idle_ttl_secs":60,"idle_action":"suspend","lifetime_secs":3600,"memory_limit_mib":64,"labels":{"a":"b"},"secrets":{"k":"v"},"keep_secrets":true}`)
	source := decode[[]wire.Sandbox](t, body)[0]
	if source.IdleAction != "suspend" || strings.Contains(body, "secret") {
		t.Errorf("fork: %s", body)
	}
	status, body := do(t, "POST", url+"/v1/sandboxes/"+source.ID+"/branch", `{"tag":"x","live":true,"n":2}`)
	got := decode[wire.Snapshot](t, body)
	if status != 201 || len(got.Sandboxes) != 2 {
		t.Fatalf("%d %s", status, body)
	}
	for _, box := range got.Sandboxes {
		if box.SnapshotTag != "x" || box.IdleTTLSecs != 60 || box.IdleAction != "suspend" || *box.MemoryLimitMiB != 64 || box.Labels["a"] != "b" ||
			box.ExpiresAtUnix-box.CreatedAtUnix != 3600 {
			t.Errorf("%+v", box)
		}
	}
	b.Most = 4
	a := send(t, "POST", url+"/v1/sandboxes/"+source.ID+"/branch", "application/json", `{"tag":"y","n":2}`)
	if e := decode[wire.Error](t, a.body); a.status != 429 || !strings.Contains(e.Hint, "fork snapshot y") {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestTree(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	grow(t, url)
	do(t, "POST", url+"/v1/sandboxes/sb-1/rollback", `{"to":"a"}`)
	do(t, "POST", url+"/v1/sandboxes/sb-1/branch", `{"mode":"live"}`)
	do(t, "POST", url+"/v1/sandboxes/sb-1/branch", `{"mode":"full","tag":"whole"}`)
	if status, body := do(t, "DELETE", url+"/v1/snapshots/a?force=true", ""); status != 204 {
		t.Fatalf("force: %d %s", status, body)
	}
	if status, body := do(t, "POST", url+"/v1/snapshots/best/promote", `{"from":"b"}`); status != 200 || decode[wire.Snapshot](t, body).Tag != "best" {
		t.Fatalf("promote: %d %s", status, body)
	}
	_, body := do(t, "GET", url+"/v1/tree", "")
	nodes := map[string]wire.Node{}
	tags := map[string]string{}
	for _, n := range decode[wire.Tree](t, body).Nodes {
		nodes[n.Tag], tags[n.Digest] = n, n.Tag
		if n.DiskBytes <= 0 {
			t.Errorf("node takes no disk: %+v", n)
		}
	}
	type node struct {
		Parent    string
		Tags      []string
		Depth     int
		Auto      bool
		Sandboxes []string
	}
	want := map[string]node{
		"py":            {Tags: []string{"py"}, Sandboxes: []string{}},
		"":              {Parent: "py", Tags: []string{}, Depth: 1, Sandboxes: []string{}}, // was a
		"b":             {Parent: "", Tags: []string{"b", "best"}, Depth: 2, Sandboxes: []string{}},
		"branch-sb-1-3": {Parent: "", Tags: []string{"branch-sb-1-3"}, Depth: 2, Auto: true, Sandboxes: []string{}},
		"whole":         {Parent: "branch-sb-1-3", Tags: []string{"whole"}, Sandboxes: []string{"sb-1"}},
	}
	got := map[string]node{}
	for tag, n := range nodes {
		got[tag] = node{tags[n.Parent], n.Tags, n.ChainDepth, n.Auto, n.Sandboxes}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	_, body = do(t, "POST", url+"/v1/snapshots/prune", `{"keep_last":0,"dry_run":true}`)
	if r := decode[wire.PruneReport](t, body); !r.DryRun || !cmp.Equal(r.Removed, []string{"branch-sb-1-3"}) {
		t.Errorf("dry run: %s", body)
	}
	_, body = do(t, "POST", url+"/v1/snapshots/prune", `{"keep_last":0}`)
	if r := decode[wire.PruneReport](t, body); r.DryRun || len(r.Removed) != 1 || listed(t, url, "branch-sb-1-3") != nil {
		t.Errorf("prune: %s", body)
	}
}

func TestSnapshotFamily(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	grow(t, url)
	_, body := do(t, "GET", url+"/v1/snapshots/b/info", "")
	d := decode[wire.SnapshotDetail](t, body)
	if d.ChainDepth != 2 || d.ParentTag != "a" || !cmp.Equal(d.Ancestors, []string{"py", "a"}) || len(d.Dependents) != 0 || d.Flat || d.Mode != "diff" ||
		d.MemoryLogicalBytes != 1<<20 || d.MemoryPhysicalBytes <= 0 || d.BranchedFrom != "sb-1" || d.DiffPhysicalBytes == 0 {
		t.Errorf("info of b: %s", body)
	}
	_, body = do(t, "GET", url+"/v1/snapshots/py/info", "")
	if d := decode[wire.SnapshotDetail](t, body); d.ChainDepth != 0 || !cmp.Equal(d.Dependents, []string{"a", "b"}) || d.ParentTag != "" {
		t.Errorf("info of py: %s", body)
	}

	status, body := do(t, "POST", url+"/v1/snapshots/b/flatten", "")
	if status != 200 {
		t.Errorf("flatten: %d %s", status, body)
	}
	_, body = do(t, "GET", url+"/v1/snapshots/b/info", "")
	if d := decode[wire.SnapshotDetail](t, body); !d.Flat || d.FlatPhysicalBytes == 0 || d.ChainDepth != 2 {
		t.Errorf("info of a flat one: %s", body)
	}
	status, body = do(t, "POST", url+"/v1/snapshots/b/compact", `{"to":"c"}`)
	if c := decode[wire.Snapshot](t, body); status != 200 || c.BranchedFrom != "compact:b" || c.ChainDepth != 0 || c.ParentTag != "" {
		t.Errorf("compact: %d %s", status, body)
	}

	status, body = do(t, "DELETE", url+"/v1/snapshots/a", "")
	want := "snapshot `a` is the parent of 1 chained snapshot(s): [b]; rerun with `?cascade=true`"
	if e := decode[wire.Error](t, body); status != 409 || !strings.Contains(e.Error, want) {
		t.Errorf("delete a: %d %s", status, body)
	}
	do(t, "POST", url+"/v1/snapshots/other/promote", `{"from":"a"}`)
	if status, body = do(t, "DELETE", url+"/v1/snapshots/other", ""); status != 204 {
		t.Errorf("delete of a second tag: %d %s", status, body)
	}
	do(t, "DELETE", url+"/v1/sandboxes/sb-1", "")
	if status, body = do(t, "DELETE", url+"/v1/snapshots/py?cascade=true", ""); status != 204 {
		t.Errorf("cascade: %d %s", status, body)
	}
	for tag, there := range map[string]bool{"py": false, "a": false, "b": false, "c": true} {
		if got := listed(t, url, tag) != nil; got != there {
			t.Errorf("%s is there: %v", tag, got)
		}
	}
}

func TestDiff(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	grow(t, url)
	_, body := do(t, "GET", url+"/v1/diff?a=py&b=sb-1", "")
	if d := decode[wire.Diff](t, body); len(d.Files) != 3 || d.Files[0].Change != "added" || d.Pages != 1 || d.TotalPages != 256 {
		t.Errorf("diff: %s", body)
	}
	_, body = do(t, "GET", url+"/v1/diff?a=b&b=sb-1", "")
	if d := decode[wire.Diff](t, body); d.Files == nil || len(d.Files) != 0 || d.Pages != 0 {
		t.Errorf("no diff: %s", body)
	}
}

func TestSuspend(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, step := range []struct{ verb, state string }{{"suspend", "suspended"}, {"resume", "running"}, {"resume", "running"}, {"suspend", "suspended"}} {
		status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/"+step.verb, "")
		if box := decode[wire.Sandbox](t, body); status != 200 || string(box.State) != step.state {
			t.Errorf("%s: %d %s", step.verb, status, body)
		}
	}
	if status, body := do(t, "POST", url+"/v1/sandboxes/sb-1/ping", ""); status != 200 {
		t.Errorf("ping of a suspended one: %d %s", status, body)
	}
}

// TestBranchLines sees the news of long work come before its result.
func TestBranchLines(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	grow(t, url)
	for path, body := range map[string]string{
		"/v1/sandboxes/sb-1/branch":   `{"mode":"live"}`,
		"/v1/snapshots/b/compact":     `{"to":"x"}`,
		"/v1/snapshots/b/flatten":     ``,
		"/v1/snapshots/best/promote":  `{"from":"sb-1"}`,
		"/v1/snapshots/best2/promote": `{"from":"a"}`,
	} {
		req, err := http.NewRequestWithContext(t.Context(), "POST", url+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Accept", "application/x-ndjson")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		text := new(strings.Builder)
		if err = resp.Write(text); err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != 200 || !strings.Contains(text.String(), `{"result":{`) {
			t.Errorf("%s: %s", path, text)
		}
	}
}

func TestWorkspaces(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	call := func(method, path, body string, want int) string {
		t.Helper()
		status, text := do(t, method, url+"/v1/workspaces"+path, body)
		if status != want {
			t.Errorf("%s %s %s: %d %s, want %d", method, path, body, status, text, want)
		}
		return text
	}
	for _, bad := range []string{
		``, `{}`, `{"name":"w"}`, `{"name":"w.x","snapshot_tag":"py"}`, `{"name":"","snapshot_tag":"py"}`, `{"name":"../w","snapshot_tag":"py"}`,
		`{"name":"` + strings.Repeat("w", 65) + `","snapshot_tag":"py"}`, `{"name":"w","snapshot_tag":"../py"}`,
		`{"name":"w","snapshot_tag":"py","memory_limit_mib":-1}`, `{"name":"w","snapshot_tag":"py","per_child_netns":true}`,
	} {
		call("POST", "", bad, 400)
	}
	call("POST", "", `{"name":"w","snapshot_tag":"none"}`, 404)
	for _, r := range []string{"GET /w", "DELETE /w", "POST /w/suspend", "POST /w/resume"} {
		method, path, _ := strings.Cut(r, " ")
		call(method, path, "", 404)
	}
	call("GET", "/w.x", "", 400)
	if got := call("GET", "", "", 200); strings.TrimSpace(got) != "[]" {
		t.Errorf("no workspaces: %q", got)
	}

	long := strings.Repeat("w", 64)
	text := call("POST", "", `{"name":"`+long+`","snapshot_tag":"py","memory_limit_mib":64}`, 201)
	w := decode[wire.Workspace](t, text)
	if w.ID != "ws-"+w.LiveSandboxID || w.Status != "running" || w.SourceSnapshotTag != "py" || strings.Contains(text, "current_state_tag") || w.MemoryLimitMiB != 64 {
		t.Errorf("created: %s", text)
	}
	call("POST", "", `{"name":"`+long+`","snapshot_tag":"py"}`, 409)
	call("POST", "/"+long+"/resume", "", 400)
	for _, body := range []string{``, `{}`, `{"diff":true}`} {
		text = call("POST", "/"+long+"/suspend", body, 200)
		if w = decode[wire.Workspace](t, text); w.Status != "suspended" || w.CurrentStateTag == "" || w.LiveSandboxID != "" {
			t.Errorf("suspended: %s", text)
		}
		call("POST", "/"+long+"/suspend", "", 400)
		text = call("POST", "/"+long+"/resume", "", 200)
		if again := decode[wire.Workspace](t, text); again.LiveSandboxID != w.SandboxID || again.Status != "running" {
			t.Errorf("resumed: %s", text)
		}
	}

	call("POST", "", `{"name":"gone","snapshot_tag":"py"}`, 201)
	call("POST", "", `{"name":"dead","snapshot_tag":"py"}`, 201)
	_ = b.Kill(t.Context(), decode[wire.Workspace](t, call("GET", "/gone", "", 200)).SandboxID)
	b.Lose(decode[wire.Workspace](t, call("GET", "/dead", "", 200)).SandboxID)
	status := map[string]string{}
	for _, w := range decode[[]wire.Workspace](t, call("GET", "", "", 200)) {
		status[w.Name] = string(w.Status)
	}
	if diff := cmp.Diff(map[string]string{long: "running", "gone": "stale", "dead": "stale"}, status); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, name := range []string{"gone", "dead"} {
		call("POST", "/"+name+"/suspend", "{}", 404)
		call("POST", "/"+name+"/resume", "", 404)
		call("DELETE", "/"+name, "", 204)
	}
	call("DELETE", "/"+long, "", 204)
	if boxes := b.List(); len(boxes) != 1 || boxes[0].State != sandbox.Running {
		t.Errorf("sandboxes are left: %+v", boxes)
	}
	if listed(t, url, "py") == nil {
		t.Error("the source snapshot is gone")
	}
}

// TestNoWorkspaces: a daemon that ends with a command has none.
func TestNoWorkspaces(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	cfg := b.Config()
	cfg.Workspaces = nil
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	t.Cleanup(srv.Close)
	url := srv.URL
	for _, r := range []string{"GET ", "POST ", "GET /w", "DELETE /w", "POST /w/suspend", "POST /w/resume"} {
		method, path, _ := strings.Cut(r, " ")
		body := ""
		if r == "POST " {
			body = `{"name":"w","snapshot_tag":"py"}`
		}
		if status, text := do(t, method, url+"/v1/workspaces"+path, body); status != 501 {
			t.Errorf("%s: %d %s", r, status, text)
		}
	}
}
