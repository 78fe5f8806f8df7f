package api_test

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/wire"
)

// blockFile is the file of a block that runs a word of apitest's machines.
func blockFile(name, version, run string) string {
	return `format = 1
name = "` + name + `"
version = "` + version + `"
description = "For tests."
author = "me"
minimum_trust_level = "Zero"

[[provides]]
name = "` + name + `"
version = "` + version + `"

[run]
` + run
}

const catBlock = `image = "py"
warmup = ["true"]
command = ["cat"]
stdin = "hello"
`

// inJSON is a text as JSON has it.
func inJSON(t *testing.T, text string) string {
	t.Helper()
	data, err := json.Marshal(text)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func addBlock(t *testing.T, url, file string) wire.Block {
	t.Helper()
	status, body := do(t, "POST", url+"/v1/blocks", `{"file":`+inJSON(t, file)+`}`)
	if status != http.StatusCreated {
		t.Fatalf("%d %s", status, body)
	}
	return decode[wire.Block](t, body)
}

func TestBlocks(t *testing.T) {
	t.Parallel()
	srv, _ := server(t)
	one := addBlock(t, srv, blockFile("hello", "1.9.0", catBlock))
	addBlock(t, srv, blockFile("hello", "1.10.0", catBlock))
	again := addBlock(t, srv, blockFile("hello", "1.9.0", catBlock)) // changes nothing
	if diff := cmp.Diff(one, again); diff != "" || one.Digest != block.Digest([]byte(blockFile("hello", "1.9.0", catBlock))) {
		t.Errorf("%s\n%+v", diff, one)
	}
	if one.Status != "unproven" || one.Publisher != "local" || !one.Published || one.AddedAt == "" || one.Image != "py" {
		t.Errorf("%+v", one)
	}
	_, body := do(t, "GET", srv+"/v1/blocks", "")
	if list := decode[[]wire.Block](t, body); len(list) != 2 || list[0].Version != "1.9.0" || list[1].Version != "1.10.0" {
		t.Errorf("%s", body)
	}
	page := send(t, "GET", srv+"/v1/blocks?limit=1", "", "")
	next := page.header.Get("X-Next-After")
	_, body = do(t, "GET", srv+"/v1/blocks?limit=1&after="+url.QueryEscape(next), "")
	if list := decode[[]wire.Block](t, body); next == "" || len(list) != 1 || list[0].Version != "1.10.0" {
		t.Errorf("%q: %s", next, body)
	}
	for ref, version := range map[string]string{
		"hello": "1.10.0", "hello@1.9.0": "1.9.0", one.Digest: "1.9.0", "hello@1.9.0%23" + one.Digest: "1.9.0",
	} {
		status, text := do(t, "GET", srv+"/v1/blocks/"+ref, "")
		if got := decode[wire.BlockDetail](t, text); status != 200 || got.Version != version || !strings.Contains(got.File, `"`+version+`"`) {
			t.Errorf("%s: %d %s", ref, status, text)
		}
	}
	_, body = do(t, "GET", srv+"/v1/blocks/hello@1.9.0?format=forge", "")
	if b := decode[block.Block](t, body); b.ID.String() != one.ID || b.Manifest.Version != (block.SemVer{Major: 1, Minor: 9}) {
		t.Errorf("%s", body)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/blocks/none", "", 404},
		{"GET", "/v1/blocks/hello@1.0.0", "", 404},
		{"GET", "/v1/blocks/" + strings.Replace(one.Digest, one.Digest[10:14], "0000", 1), "", 404},
		{"GET", "/v1/blocks/..%2F..%2Fetc", "", 400},
		{"GET", "/v1/blocks/hello@1.9.0..%2F..%2Fx", "", 400},
		{"GET", "/v1/blocks/hello@latest", "", 400},
		{"GET", "/v1/blocks/sha256:zz", "", 404},
		{"GET", "/v1/blocks/hello?format=xml", "", 400},
		{"GET", "/v1/blocks?limit=0", "", 400},
		{"POST", "/v1/blocks", `{}`, 400},
		{"POST", "/v1/blocks", `{"file":"format = 2"}`, 501},
		{"POST", "/v1/blocks", `{"file":"format = 1\nname = \"x\"\noops = 1"}`, 400},
		{"POST", "/v1/blocks", `{"file":` + inJSON(t, blockFile("hello", "1.9.0", catBlock)+"# other\n") + `}`, 409},
		{"DELETE", "/v1/blocks/hello", "", 409}, // it has two versions
		{"DELETE", "/v1/blocks/hello@1.9.0", "", 204},
		{"DELETE", "/v1/blocks/hello@1.9.0", "", 404},
		{"DELETE", "/v1/blocks/hello", "", 204},
	} {
		if status, body := do(t, c.method, srv+c.path, c.body); status != c.status {
			t.Errorf("%s %s: %d %s, want %d", c.method, c.path, status, body, c.status)
		}
	}
}

func TestRunBlock(t *testing.T) {
	t.Parallel()
	srv, _ := server(t)
	added := addBlock(t, srv, blockFile("hello", "1.0.0", catBlock))
	run := func(body string) wire.BlockRun {
		t.Helper()
		status, text := do(t, "POST", srv+"/v1/blocks/hello/run", body)
		if status != 200 {
			t.Fatalf("%d %s", status, text)
		}
		return decode[wire.BlockRun](t, text)
	}
	own := run("")
	if string(own.Stdout) != "hello" || own.Status != "succeeded" || own.Block != "hello@1.0.0#"+added.Digest ||
		own.ForgeOutputHash != "sha256:"+block.ForgeHash([]byte("hello"), nil).String() || own.RecordID == "" {
		t.Errorf("%+v", own)
	}
	var forge block.ForgeRecord
	if err := json.Unmarshal(own.Forge, &forge); err != nil || "sha256:"+forge.OutputHash.String() != own.ForgeOutputHash || forge.UserID != "local" {
		t.Errorf("%v: %s", err, own.Forge)
	}
	if again := run("{}"); again.OutputHash != own.OutputHash || again.InputHash != own.InputHash || again.RecordID == own.RecordID {
		t.Errorf("%+v", again)
	}
	if empty := run(`{"stdin":""}`); len(empty.Stdout) != 0 || empty.InputHash == own.InputHash { // not the block's own
		t.Errorf("%+v", empty)
	}
	if odd := run(`{"stdin_base64":"` + base64.StdEncoding.EncodeToString([]byte("\xff\x00")) + `","seed":7,"start":"2030-01-01T00:00:00Z"}`); string(odd.Stdout) != "\xff\x00" {
		t.Errorf("%+v", odd)
	}
	if large := run(`{"stdin":"` + strings.Repeat("x", 3<<20) + `"}`); len(large.Stdout) != 3<<20 {
		t.Errorf("%d bytes", len(large.Stdout))
	}
	for _, body := range []string{
		`{"stdin":"a","stdin_base64":"YQ=="}`, `{"stdin_base64":"~"}`, `{"seed":-1}`, `{"seed":1e30}`, `{"start":"yesterday"}`,
		`{"start":"1900-01-01T00:00:00Z"}`, `{"start":"2190-01-01T00:00:00Z"}`,
	} {
		if status, text := do(t, "POST", srv+"/v1/blocks/hello/run", body); status != 400 {
			t.Errorf("%s: %d %s", body, status, text)
		}
	}
	_, body := do(t, "GET", srv+"/v1/snapshots", "") // what it runs on was made once
	made := 0
	for _, s := range decode[[]wire.Snapshot](t, body) {
		if strings.HasPrefix(s.Tag, "block-") && s.Deterministic && !s.Bootable {
			made++
		}
	}
	if made != 1 {
		t.Errorf("%d snapshots: %s", made, body)
	}
}

// TestRunBlockFails: that a command fails is a result.
func TestRunBlockFails(t *testing.T) {
	t.Parallel()
	srv, _ := server(t)
	for name, c := range map[string]struct {
		run, reason string
		exit        int
	}{
		"fails":   {`image = "py"` + "\n" + `command = ["fail", "3"]`, "exit code 3", 3},
		"dies":    {`image = "py"` + "\n" + `command = ["die"]`, "killed by SIGSEGV", -1},
		"loops":   {`image = "py"` + "\n" + `command = ["loop"]`, "timed out", -1},
		"missing": {`image = "py"` + "\n" + `command = ["nope"]`, "not found", -1},
	} {
		addBlock(t, srv, blockFile(name, "1.0.0", c.run))
		status, body := do(t, "POST", srv+"/v1/blocks/"+name+"/run", "")
		if got := decode[wire.BlockRun](t, body); status != 200 || got.Status != "failed" || got.Reason != c.reason || got.ExitCode != c.exit {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	for name, run := range map[string]string{"no-image": `image = "none"`, "no-snapshot": `snapshot = "none"`} {
		addBlock(t, srv, blockFile(name, "1.0.0", run+"\n"+`command = ["cat"]`))
		if status, body := do(t, "POST", srv+"/v1/blocks/"+name+"/run", ""); status != 404 {
			t.Errorf("%s: %d %s", name, status, body)
		}
	}
	addBlock(t, srv, strings.Replace(blockFile("needy", "1.0.0", catBlock), "[run]", "[[requires]]\nname = \"git-cli\"\nversion = \"1\"\n\n[run]", 1))
	if status, body := do(t, "POST", srv+"/v1/blocks/needy/run", ""); status/100 != 4 || !strings.Contains(body, "git-cli") {
		t.Errorf("%d %s", status, body)
	}
}

func TestRunBlockLines(t *testing.T) {
	t.Parallel()
	srv, b := server(t)
	addBlock(t, srv, blockFile("hello", "1.0.0", catBlock))
	ask := func(path, body string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "POST", srv+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "application/x-ndjson")
		req.Header.Set("Content-Type", "application/json")
		return receive(t, req).body
	}
	text := ask("/v1/blocks/hello/run", "")
	all := strings.Split(strings.TrimSpace(text), "\n")
	last := decode[wire.ProgressLine](t, all[len(all)-1])
	if len(all) < 2 || string(decode[wire.BlockRun](t, string(last.Result)).Stdout) != "hello" {
		t.Errorf("%s", text)
	}
	b.Fail = func(op string) error {
		if op == "run" {
			return errors.New("it broke")
		}
		return nil
	}
	text = ask("/v1/blocks/run", `{"file":`+inJSON(t, blockFile("new", "1.0.0", strings.Replace(catBlock, "true", "false", 1)))+`}`)
	all = strings.Split(strings.TrimSpace(text), "\n")
	if last = decode[wire.ProgressLine](t, all[len(all)-1]); last.Code != "internal" {
		t.Errorf("%s", text)
	}
}

// TestBlockLevels: what a caller may do with blocks follows from its scope.
func TestBlockLevels(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	file := func(name, level string) string {
		return strings.Replace(blockFile(name, "1.0.0", catBlock), `"Zero"`, `"`+level+`"`, 1)
	}
	add := func(name, level string) string { return `{"file":` + inJSON(t, file(name, level)) + `}` }
	for _, who := range []string{"read", "fork"} {
		g.expect(t, g.do(t, who, "POST", "/v1/blocks", add("one", "One")), 403, "")
		g.expect(t, g.do(t, who, "DELETE", "/v1/blocks/one", ""), 403, "")
		g.expect(t, g.do(t, who, "POST", "/v1/blocks/one/audits", `{"verdict":"passed"}`), 403, "")
		g.expect(t, g.do(t, who, "POST", "/v1/snapshots", `{"tag":"d","image":"py","deterministic":true}`), 403, "")
		g.expect(t, g.do(t, who, "POST", "/v1/snapshots/py/verify", ""), 403, "")
	}
	for name, level := range map[string]string{"one": "One", "two": "Two"} {
		g.expect(t, g.do(t, "admin", "POST", "/v1/blocks", add(name, level)), 201, "")
	}
	for _, c := range []struct {
		who, path, body string
		status          int
	}{
		{"read", "/v1/blocks/one/run", "", 403},
		{"fork", "/v1/blocks/one/run", "", 200},
		{"fork", "/v1/blocks/two/run", "", 403}, // its level is One
		{"admin", "/v1/blocks/two/run", "", 200},
		{"fork", "/v1/blocks/run", add("other", "Zero"), 403}, // nobody has approved that
		{"fork", "/v1/blocks/run", add("one", "Zero"), 403},   // nor a file of the same name
		{"admin", "/v1/blocks/run", add("other", "Zero"), 200},
		{"fork", "/v1/blocks/one/run", `{"quarantined":true}`, 403},
		{"admin", "/v1/blocks/one/run", `{"quarantined":true}`, 200},
	} {
		g.expect(t, g.do(t, c.who, "POST", c.path, c.body), c.status, "")
	}
	for _, who := range []string{"read", "fork", "admin"} {
		g.expect(t, g.do(t, who, "GET", "/v1/blocks", ""), 200, "")
		g.expect(t, g.do(t, who, "GET", "/v1/blocks/one/trust", ""), 200, "")
	}
	// Whoever has published a block does not audit it, and a token is not another
	// auditor because it says so.
	a := g.do(t, "admin", "POST", "/v1/blocks/one/audits", `{"verdict":"passed","note":"mine"}`)
	trust := decode[wire.BlockTrust](t, a.body)
	if a.status != 201 || trust.Score != 0 || len(trust.Evidence) != 1 || trust.Evidence[0].Key != "token:admin" || trust.Evidence[0].Why == "" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

// TestBlockTrust: a mismatch puts a block into quarantine, and an audit lifts it.
func TestBlockTrust(t *testing.T) {
	t.Parallel()
	srv, _ := server(t)
	addBlock(t, srv, blockFile("drifts", "1.0.0", `image = "py"`+"\n"+`command = ["drift"]`))
	_, body := do(t, "POST", srv+"/v1/blocks/drifts/run", "")
	id := decode[wire.BlockRun](t, body).RecordID
	if status, text := do(t, "POST", srv+"/v1/verify", `{"id":"`+id+`","runs":2}`); status != 200 || !strings.Contains(text, "mismatch") {
		t.Fatalf("%d %s", status, text)
	}
	_, body = do(t, "GET", srv+"/v1/blocks/drifts/trust", "")
	if trust := decode[wire.BlockTrust](t, body); trust.Status != "quarantined" || trust.Score != 0 || trust.Evidence[0].Record != id {
		t.Errorf("%s", body)
	}
	status, body := do(t, "POST", srv+"/v1/blocks/drifts/run", "")
	if status != 403 || !strings.Contains(body, "quarantined") {
		t.Errorf("%d %s", status, body)
	}
	for _, bad := range []string{`{}`, `{"verdict":"perfect"}`, `{"verdict":"rejected","lift":true}`, `{"verdict":"passed","note":"two\nlines"}`} {
		if status, body = do(t, "POST", srv+"/v1/blocks/drifts/audits", bad); status != 400 {
			t.Errorf("%s: %d %s", bad, status, body)
		}
	}
	_, body = do(t, "POST", srv+"/v1/blocks/drifts/audits", `{"verdict":"passed","lift":true,"note":"it prints a counter"}`)
	if trust := decode[wire.BlockTrust](t, body); trust.Status != "disputed" {
		t.Errorf("%s", body)
	}
	if status, body = do(t, "POST", srv+"/v1/blocks/drifts/run", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	// Removing it and publishing it again does not clear its name.
	do(t, "DELETE", srv+"/v1/blocks/drifts", "")
	addBlock(t, srv, blockFile("drifts", "1.0.0", `image = "py"`+"\n"+`command = ["drift"]`))
	_, body = do(t, "GET", srv+"/v1/blocks/drifts/trust", "")
	if trust := decode[wire.BlockTrust](t, body); len(trust.Evidence) != 2 {
		t.Errorf("%s", body)
	}
}

// TestBlockActions: what is done to blocks has a name in the audit log.
func TestBlockActions(t *testing.T) {
	t.Parallel()
	for pattern, want := range map[string]string{
		"POST /v1/blocks": "block.create", "DELETE /v1/blocks/{ref}": "block.delete", "POST /v1/blocks/{ref}/run": "block.run",
		"POST /v1/blocks/run": "block.run", "POST /v1/blocks/{ref}/audits": "block.audit", "POST /v1/snapshots/{tag}/verify": "snapshot.verify",
	} {
		if got := api.ActionOf(pattern); got != want {
			t.Errorf("%s: %s, want %s", pattern, got, want)
		}
	}
}
