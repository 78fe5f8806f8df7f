package api_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

// sesame is a secret's value: it must be in nothing that the daemon says. audited
// looks for it in the audit log.
const sesame = "s3cret-0pen"

// netServer has the snapshot net, with a network card, beside what server has.
func netServer(t *testing.T) (string, *apitest.Backend) {
	t.Helper()
	url, b := server(t)
	if status, body := do(t, "POST", url+"/v1/snapshots", `{"tag":"net","image":"py","net":true}`); status != 201 {
		t.Fatalf("snapshot: %d %s", status, body)
	}
	return url, b
}

// forked forks one sandbox.
func forked(t *testing.T, url, body string) wire.Sandbox {
	t.Helper()
	status, text := do(t, "POST", url+"/v1/sandboxes", body)
	if status != 201 {
		t.Fatalf("fork %s: %d %s", body, status, text)
	}
	return decode[[]wire.Sandbox](t, text)[0]
}

// expectError sees that a request is refused so, with a hint.
func expectError(t *testing.T, method, url, body string, status int, code string) wire.Error {
	t.Helper()
	got, text := do(t, method, url, body)
	if got < 400 {
		t.Errorf("%s %s %.200s: %d %.200s, want %d", method, url, body, got, text, status)
		return wire.Error{}
	}
	e := decode[wire.Error](t, text)
	if got != status || e.Code != code {
		t.Errorf("%s %s %.200s: %d %.300s, want %d %s", method, url, body, got, text, status, code)
	}
	return e
}

func TestForkLimits(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	box := forked(t, url, `{"snapshot_tag":"py","memory_limit_mib":512,"cpu_limit":0.5,"pids_limit":64,"io_limit_bytes":1048576}`)
	want := &wire.Limits{MemoryMiB: 512, CPUMillis: 500, PIDs: 64, IOBytes: 1 << 20}
	if diff := cmp.Diff(want, box.Limits); diff != "" || *box.MemoryLimitMiB != 512 || box.OutOfMemory {
		t.Errorf("limits (-want +got): %s", diff)
	}
	if usual := forked(t, url, `{"snapshot_tag":"py"}`); usual.MemoryLimitMiB != nil || usual.Limits == nil || usual.Limits.CPUMillis != 1500 {
		t.Errorf("who asks for nothing has %+v", usual.Limits)
	}
	for _, bad := range []string{
		`"memory_limit_mib":-1`, `"memory_limit_mib":9223372036854775807`, `"cpu_limit":-0.5`, `"cpu_limit":0.001`, `"cpu_limit":1e300`,
		`"pids_limit":-1`, `"pids_limit":4611686018427387904`, `"io_limit_bytes":-1`, `"io_limit_bytes":9223372036854775807`,
	} {
		if e := expectError(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py",`+bad+`}`, 400, "invalid"); e.Hint == "" {
			t.Errorf("%s: no hint: %+v", bad, e)
		}
	}
}

func TestLimitSandbox(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	path := url + "/v1/sandboxes/sb-1/limits"
	for _, tt := range []struct {
		body string
		want wire.Limits
	}{
		{`{"memory_limit_mib":512}`, wire.Limits{MemoryMiB: 512, CPUMillis: 1500, PIDs: 128}},
		{`{"cpu_limit":2.25,"memory_limit_mib":null}`, wire.Limits{MemoryMiB: 512, CPUMillis: 2250, PIDs: 128}},
		{`{"io_limit_bytes":4096,"pids_limit":20}`, wire.Limits{MemoryMiB: 512, CPUMillis: 2250, PIDs: 20, IOBytes: 4096}},
		{`{"memory_limit_mib":0,"cpu_limit":0}`, wire.Limits{MemoryMiB: 100, CPUMillis: 1500, PIDs: 20, IOBytes: 4096}},
		{`{"io_limit_bytes":0,"pids_limit":0}`, wire.Limits{MemoryMiB: 100, CPUMillis: 1500, PIDs: 128}},
	} {
		status, text := do(t, "PATCH", path, tt.body)
		if status != 200 {
			t.Errorf("%s: %d %s", tt.body, status, text)
			continue
		}
		if diff := cmp.Diff(tt.want, *decode[wire.Sandbox](t, text).Limits); diff != "" {
			t.Errorf("%s (-want +got): %s", tt.body, diff)
		}
	}
	for _, bad := range []string{`{}`, `{"cpus":1}`, `{"cpu_limit":-1}`, `{"memory_limit_mib":-1}`, `{"memory_limit_mib":"1"}`} {
		expectError(t, "PATCH", path, bad, 400, "invalid")
	}
	expectError(t, "PATCH", url+"/v1/sandboxes/none/limits", `{"cpu_limit":1}`, 404, "not_found")
	b.Fail = func(op string) error {
		return fmt.Errorf("%w: this host limits nothing: %s", errdef.ErrUnsupported, op)
	}
	expectError(t, "PATCH", path, `{"cpu_limit":1}`, 501, "unsupported")
	expectError(t, "GET", url+"/v1/sandboxes/sb-1/usage", "", 501, "unsupported")
}

func TestUsage(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	status, text := do(t, "GET", url+"/v1/sandboxes/sb-1/usage", "")
	want := wire.Usage{
		MemoryBytes: 30 << 20, PrivateBytes: 20 << 20, SharedBytes: 10 << 20, PeakBytes: 40 << 20, CPUSecs: 1.5, ThrottledSecs: 0.25,
		PIDs: 3, ReadBytes: 1 << 20, WriteBytes: 2 << 20,
	}
	if diff := cmp.Diff(want, decode[wire.Usage](t, text)); status != 200 || diff != "" {
		t.Errorf("%d (-want +got): %s", status, diff)
	}
	expectError(t, "GET", url+"/v1/sandboxes/none/usage", "", 404, "not_found")
}

// TestNet goes through what can be done with rules, which come in both forms and
// leave in the short one.
func TestNet(t *testing.T) {
	t.Parallel()
	url, b := netServer(t)
	box := forked(t, url, `{"snapshot_tag":"net","net":{"allow":["EXAMPLE.com.:443",{"cidr":"192.0.2.0/24","ports":["80","8000-8010"],"protocol":"tcp"}],
		"inspect":true,"up_bytes_per_second":65536,"secrets":[{"name":"api","header":"Authorization","value":"Bearer `+sesame+`","hosts":["api.example.com"]}]}}`)
	path := url + "/v1/sandboxes/" + box.ID + "/net"
	b.Deny(box.ID, "tcp", "198.51.100.1:22", egress.NoRule)
	expect := func(method, body string, want ...string) wire.SandboxNet {
		t.Helper()
		status, text := do(t, method, path, body)
		if status != 200 || strings.Contains(text, sesame) {
			t.Fatalf("%s %s: %d %s", method, body, status, text)
		}
		got := decode[wire.SandboxNet](t, text)
		if diff := cmp.Diff(append([]string{}, want...), got.Allow); diff != "" {
			t.Errorf("%s %s (-want +got): %s", method, body, diff)
		}
		return got
	}
	got := expect("GET", "", "example.com:443", "tcp:192.0.2.0/24:80,8000-8010")
	if !got.Inspect || got.UpBytesPerSecond != 65536 || got.Stats.Denied != 1 || len(got.Denials) != 1 || got.Denials[0].To != "198.51.100.1:22" ||
		got.Denials[0].Reason != "no_rule" || got.Denials[0].Count != 1 || got.Denials[0].Last == "" {
		t.Errorf("%+v", got)
	}
	if diff := cmp.Diff([]wire.KnownSecret{{Name: "api", Header: "Authorization", Hosts: []string{"api.example.com"}}}, got.Secrets); diff != "" {
		t.Error(diff)
	}
	expect("PATCH", `{"allow":["*.example.org","example.com:443"]}`, "example.com:443", "tcp:192.0.2.0/24:80,8000-8010", "*.example.org")
	expect("PATCH", `{"remove":["example.COM:443"],"allow":["example.com"]}`, "tcp:192.0.2.0/24:80,8000-8010", "*.example.org", "example.com")
	expect("PATCH", `{"remove":["example.com"],"allow":["example.com"]}`, "tcp:192.0.2.0/24:80,8000-8010", "*.example.org", "example.com")
	expectError(t, "PATCH", path, `{"remove":["example.com","example.net"]}`, 404, "not_found")
	if got = expect("PATCH", `{"inspect":false}`, "tcp:192.0.2.0/24:80,8000-8010", "*.example.org", "example.com"); got.Inspect {
		t.Error("it still inspects")
	}
	if got = expect("PUT", `{"allow":["192.0.2.7"],"inspect":true}`, "192.0.2.7"); !got.Inspect || len(got.Secrets) != 1 || got.UpBytesPerSecond != 65536 {
		t.Errorf("%+v", got)
	}
	if got = expect("PUT", `{"allow":[]}`); !got.Inspect {
		t.Error("it inspects no more")
	}

	status, text := do(t, "GET", url+"/v1/net", "")
	if rows := decode[[]wire.NetRow](t, text); status != 200 || len(rows) != 1 || rows[0].ID != box.ID || rows[0].Denied != 1 || rows[0].BytesUp == 0 {
		t.Errorf("%d %s", status, text)
	}
	for _, body := range []string{`{"allow":null}`, `{}`, `{"allow":"x"}`} {
		expectError(t, "PUT", path, body, 400, "invalid")
	}
	expectError(t, "PATCH", path, `{}`, 400, "invalid")
	expectError(t, "PUT", path, `{"allow":["10.0.0.0/8"]}`, 403, "denied")
}

// TestNoCard: without a network card there is nothing to say of a network.
func TestNoCard(t *testing.T) {
	t.Parallel()
	url, _ := netServer(t)
	path := url + "/v1/sandboxes/sb-1/net"
	for _, e := range []wire.Error{
		expectError(t, "GET", path, "", 501, "unsupported"),
		expectError(t, "PUT", path, `{"allow":["example.com"]}`, 501, "unsupported"),
		expectError(t, "PATCH", path, `{"allow":["example.com"]}`, 501, "unsupported"),
		expectError(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py","net":{"allow":["example.com"]}}`, 400, "invalid"),
	} {
		if !strings.Contains(e.Hint, "tine snapshot create --net") {
			t.Errorf("hint %q", e.Hint)
		}
	}
	expectError(t, "GET", url+"/v1/sandboxes/none/net", "", 404, "not_found")
	expectError(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"py","per_child_netns":true}`, 400, "invalid")
	expectError(t, "POST", url+"/v1/sandboxes", `{"snapshot_tag":"none","per_child_netns":true}`, 404, "not_found")
	if box := forked(t, url, `{"snapshot_tag":"net","per_child_netns":true}`); !box.Net || box.Netns != nil {
		t.Errorf("%+v", box)
	}
	if status, text := do(t, "POST", url+"/v1/workspaces", `{"name":"w","snapshot_tag":"net","per_child_netns":true}`); status != 201 {
		t.Errorf("%d %s", status, text)
	}
}

func TestNetAllowOfWarmup(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	status, text := do(t, "POST", url+"/v1/snapshots", `{"tag":"w","image":"py","net":true,"net_allow":["Example.com"]}`)
	if status != 201 || b.Warmup() == nil || cmp.Diff([]egress.Rule{{Domain: "example.com"}}, b.Warmup().Rules.Allow) != "" {
		t.Errorf("%d %s: %+v", status, text, b.Warmup())
	}
	if e := expectError(t, "POST", url+"/v1/snapshots", `{"tag":"x","image":"py","net_allow":["example.com"]}`, 400, "invalid"); e.Hint == "" {
		t.Error("no hint")
	}
	expectError(t, "POST", url+"/v1/snapshots", `{"tag":"x","image":"py","net":true,"net_allow":["example com"]}`, 400, "invalid")
}

func TestNetGC(t *testing.T) {
	t.Parallel()
	url, b := netServer(t)
	expectError(t, "POST", url+"/v1/net/gc", "", 501, "unsupported")
	cfg := b.Config()
	var failure error
	swept := 0
	cfg.Sweep = func(context.Context) error { swept++; return failure }
	srv := httptest.NewServer(apitest.Checked(t, spec, api.New(cfg)))
	defer srv.Close()
	forked(t, srv.URL, `{"snapshot_tag":"net","n":2}`)
	status, text := do(t, "POST", srv.URL+"/v1/net/gc", "")
	if report := decode[wire.NetGCReport](t, text); status != 200 || report.Networks != 2 || swept != 1 {
		t.Errorf("%d %s, swept %d", status, text, swept)
	}
	failure = errors.New("a group is stuck")
	expectError(t, "POST", srv.URL+"/v1/net/gc", "", 500, "internal")
}

// TestRulesAreBounded: no list of rules is too much for the daemon, and none is
// half of what its sender meant.
func TestRulesAreBounded(t *testing.T) {
	t.Parallel()
	url, _ := netServer(t)
	path := url + "/v1/sandboxes/" + forked(t, url, `{"snapshot_tag":"net"}`).ID + "/net"
	list := func(n int, rule string) string {
		return `{"allow":[` + strings.TrimSuffix(strings.Repeat(rule+",", n), ",") + `]}`
	}
	var many strings.Builder
	for i := range egress.MaxRules {
		_, _ = fmt.Fprintf(&many, `,"host-%d.example.com:443"`, i)
	}
	if status, text := do(t, "PUT", path, `{"allow":[`+many.String()[1:]+`]}`); status != 200 || len(decode[wire.SandboxNet](t, text).Allow) != egress.MaxRules {
		t.Errorf("%d rules: %d", egress.MaxRules, status)
	}
	ports := strings.Repeat("1,", 64) + "1"
	for name, body := range map[string]string{
		"too many":         list(egress.MaxRules+1, `"a.example"`),
		"empty ones":       list(600_000, `""`),
		"empty objects":    list(600_000, `{}`),
		"too many ports":   list(1, `"a.example:`+ports+`"`),
		"ports, long form": list(1, `{"domain":"a.example","ports":[`+strings.Repeat(`"1",`, 64)+`"1"]}`),
		"too long":         list(1, `"`+strings.Repeat("a", 1<<20)+`"`),
		"a misspelling":    list(1, `{"domain":"a.example","port":["443"]}`),
		"both":             list(1, `{"domain":"a.example","cidr":"192.0.2.1"}`),
		"neither":          list(1, `{"ports":["443"]}`),
		"a number":         list(1, `7`),
		"null":             list(1, `null`),
		"nested":           list(1, strings.Repeat("[", 5000)+strings.Repeat("]", 5000)),
		"IPv4, badly":      list(1, `"192.0.2.256"`),
		"no ASCII":         list(1, `"bücher.example"`),
		"a zero port":      list(1, `"a.example:0"`),
		"a long range":     list(1, `"a.example:1-65536"`),
		"a control":        list(1, `"a.example\u0000"`),
	} {
		if e := expectError(t, "PUT", path, body, 400, "invalid"); len(e.Error) > 1000 {
			t.Errorf("%s: an error of %d bytes", name, len(e.Error))
		}
	}
	expectError(t, "PUT", path, list(1, `"::1"`), 501, "unsupported")
	expectError(t, "PUT", path, list(300_000, `"a.example"`), 413, "too_large")
	if status, text := do(t, "GET", path, ""); status != 200 || len(decode[wire.SandboxNet](t, text).Allow) != egress.MaxRules {
		t.Errorf("what was refused has changed something: %d", status)
	}
}

// TestSecretsAreNowhere: the value of an egress secret is in no answer, error, log
// line or audit line, whatever is wrong with it.
func TestSecretsAreNowhere(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	g.expect(t, g.do(t, "admin", "POST", "/v1/snapshots", `{"tag":"net","image":"py","net":true}`), 201, "")
	good := `{"name":"api","header":"Authorization","value":"` + sesame + `","hosts":["api.example.com"]}`
	fork := func(secrets string) string {
		return `{"snapshot_tag":"net","net":{"allow":["api.example.com"],"secrets":` + secrets + `}}`
	}
	a := g.do(t, "fork", "POST", "/v1/sandboxes", fork(`[`+good+`]`), func(r *http.Request) { r.Header.Set("Idempotency-Key", "k") })
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	bodies := []string{a.body}
	for _, secrets := range []string{
		`[` + good + `,` + good + `]`, `[{"name":"a","header":"Authorization: ` + sesame + `","value":"x","hosts":["a.example"]}]`,
		`[{"name":"a","header":"X","value":"` + sesame + `\n","hosts":["a.example"]}]`,
		`[{"name":"a","header":"X","value":"` + sesame + `","hosts":["not a host"]}]`,
		`[{"name":"a","header":"X","value":"` + sesame + `","hosts":[]}]`,
		`[{"name":"a","header":"Host","value":"` + sesame + `","hosts":["a.example"]}]`,
		`[{"name":"a","header":"X","value":["` + sesame + `"],"hosts":["a.example"]}]`,
		`[{"name":"a","header":"X","value":{"x":"` + sesame + `"},"hosts":["a.example"]}]`,
		`["` + sesame + `"]`, `{"value":"` + sesame + `"}`, `"` + sesame + `"`,
		`[{"name":"","header":"X","value":"` + sesame + `","hosts":["a.example"]}]`,
		`[` + strings.Repeat(good+",", 64) + good + `]`,
		`[{"name":"a","header":"X","value":"` + sesame + strings.Repeat("x", 16<<10) + `","hosts":["a.example"]}]`,
	} {
		a := g.do(t, "fork", "POST", "/v1/sandboxes", fork(secrets))
		if a.status != 400 {
			t.Errorf("%.100s: %d %s", secrets, a.status, a.body)
		}
		bodies = append(bodies, a.body)
	}
	for _, path := range []string{"/v1/sandboxes", "/v1/sandboxes/" + id, "/v1/sandboxes/" + id + "/net", "/v1/net"} {
		bodies = append(bodies, g.do(t, "fork", "GET", path, "").body)
	}
	bodies = append(bodies, g.do(t, "fork", "POST", "/v1/sandboxes/"+id+"/branch", `{"tag":"twin","n":1}`).body)
	if all := strings.Join(bodies, "\n"); strings.Contains(all, sesame) {
		t.Errorf("an answer has it: %s", all)
	}
	if strings.Contains(g.log.String(), sesame) {
		t.Errorf("the log has it: %s", g.log)
	}
	twin := decode[[]wire.Sandbox](t, g.do(t, "fork", "GET", "/v1/sandboxes", "").body)[1].ID
	if n := decode[wire.SandboxNet](t, g.do(t, "fork", "GET", "/v1/sandboxes/"+twin+"/net", "").body); len(n.Secrets) != 0 || len(n.Allow) != 0 {
		t.Errorf("a fork of a branch has %+v", n)
	}

	url, end := audited(t, false)
	do(t, "POST", url+"/v1/snapshots", `{"tag":"net","image":"py","net":true}`)
	if status, text := do(t, "POST", url+"/v1/sandboxes", fork(`[`+good+`]`)); status != 201 {
		t.Fatalf("%d %s", status, text)
	}
	do(t, "PUT", url+"/v1/sandboxes/sb-1/net", `{"allow":["a.example"]}`)
	do(t, "PATCH", url+"/v1/sandboxes/sb-1/net", `{"allow":["b.example"]}`)
	do(t, "PATCH", url+"/v1/sandboxes/sb-1/limits", `{"cpu_limit":1}`)
	do(t, "POST", url+"/v1/net/gc", "")
	do(t, "GET", url+"/v1/sandboxes/sb-1/net", "")
	lines := strings.Join(briefs(end()), "\n")
	for _, want := range []string{
		"outcome sandbox.net.set sb-1 local 200 ok", "outcome sandbox.net.change sb-1 local 200 ok", "outcome sandbox.limits.set sb-1 local 200 ok",
		"outcome net.gc local 501 error unsupported",
	} {
		if !strings.Contains(lines, want) {
			t.Errorf("no %q in\n%s", want, lines)
		}
	}
}

// TestTotals: the limits of a token's sandboxes come to no more than it may have,
// however they are asked for, and by whom.
func TestTotals(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	refused := func(a answer, part string) {
		t.Helper()
		if a.status != 429 || a.header.Get("Retry-After") == "" || !strings.Contains(a.body, part) || decode[wire.Error](t, a.body).Hint == "" {
			t.Errorf("status %d, body %s; want 429 and %q", a.status, a.body, part)
		}
	}
	// small may have 250 MiB and 4 cores; a sandbox has 100 MiB and 1.5 unless it asks.
	refused(g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","n":3}`), "token small may have sandboxes with 250 MiB of memory, has 0 MiB and asks for 300 MiB")
	refused(g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":1,"cpu_limit":4.001}`), "4 cores, has 0 and asks for 4.001")
	refused(g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":1073741824,"n":1000}`), "250 MiB")
	a := g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`)
	g.expect(t, a, 201, "")
	id := decode[[]wire.Sandbox](t, a.body)[0].ID
	refused(g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":151}`), "has 100 MiB")
	refused(g.do(t, "small", "POST", "/v1/sandboxes/"+id+"/branch", `{"tag":"b","n":2}`), "250 MiB")
	refused(g.do(t, "small", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":251}`), "250 MiB")
	g.expect(t, g.do(t, "small", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":250}`), 200, "")
	refused(g.do(t, "small", "POST", "/v1/workspaces", `{"name":"w","snapshot_tag":"py"}`), "has 250 MiB")
	g.expect(t, g.do(t, "small", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":10}`), 200, "")
	g.expect(t, g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":240}`), 201, "")
	refused(g.do(t, "small", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":0}`), "has 240 MiB and asks for 100 MiB")
	g.expect(t, g.do(t, "fork", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":20}`), 404, "")
	g.expect(t, g.do(t, "read", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":20}`), 403, "")
	g.expect(t, g.do(t, "admin", "PATCH", "/v1/sandboxes/"+id+"/limits", `{"memory_limit_mib":4096}`), 200, "")
	refused(g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":1}`), "has 4336 MiB")
	g.expect(t, g.do(t, "small", "DELETE", "/v1/sandboxes/"+id, ""), 204, "")
	var work sync.WaitGroup
	var mu sync.Mutex
	statuses := map[int]int{}
	for range 8 {
		work.Go(func() {
			a := g.do(t, "small", "POST", "/v1/sandboxes", `{"snapshot_tag":"py","memory_limit_mib":10,"cpu_limit":0.1}`)
			mu.Lock()
			defer mu.Unlock()
			statuses[a.status]++
		})
	}
	work.Wait()
	if statuses[201] != 1 || statuses[429] != 7 {
		t.Errorf("of eight at once: %v", statuses)
	}
}

// TestNetOwners: networks and limits are for those who may use the sandbox, and
// for scope read to look at.
func TestNetOwners(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	g.expect(t, g.do(t, "admin", "POST", "/v1/snapshots", `{"tag":"net","image":"py","net":true}`), 201, "")
	a := g.do(t, "fork", "POST", "/v1/sandboxes", `{"snapshot_tag":"net","net":{"allow":["example.com"]}}`)
	g.expect(t, a, 201, "")
	path := "/v1/sandboxes/" + decode[[]wire.Sandbox](t, a.body)[0].ID
	for _, tt := range []struct{ method, path, body string }{
		{"GET", "/net", ""},
		{"GET", "/usage", ""},
		{"PUT", "/net", `{"allow":["a.example"]}`},
		{"PATCH", "/net", `{"allow":["b.example"]}`},
		{"PATCH", "/limits", `{"cpu_limit":1}`},
	} {
		for who, want := range map[string]int{"fork": 200, "admin": 200, "few": 404, "read": 200, "": 401} {
			if who == "read" && tt.method != "GET" {
				want = 403
			}
			if a := g.do(t, who, tt.method, path+tt.path, tt.body); a.status != want {
				t.Errorf("%q: %s %s: %d %s, want %d", who, tt.method, tt.path, a.status, a.body, want)
			}
		}
	}
	for who, want := range map[string]int{"fork": 1, "admin": 1, "read": 1, "few": 0} {
		if rows := idsIn(t, g.do(t, who, "GET", "/v1/net", "")); len(rows) != want {
			t.Errorf("%s sees %v", who, rows)
		}
	}
	for who, want := range map[string]int{"fork": 403, "read": 403, "admin": 501} {
		g.expect(t, g.do(t, who, "POST", "/v1/net/gc", ""), want, "")
	}
	g.expect(t, g.do(t, "few", "POST", "/v1/sandboxes", `{"snapshot_tag":"none","per_child_netns":true}`), 404, "")
}

// TestIsolationMetrics: a sandbox that is out of memory is counted, and what
// counts against limits.
func TestIsolationMetrics(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	b.Events.Add(sandbox.OutOfMemory, "sb-1", sandbox.EventData{})
	b.Events.Add(sandbox.EgressDenied, "sb-1", sandbox.EventData{Reason: "tcp to 192.0.2.1:1: no_rule"})
	_, text := do(t, "GET", url+"/metrics", "")
	for _, want := range []string{
		"tine_sandbox_oom_total 1", `tine_events_total{type="egress_denied"} 1`, "tine_sandbox_memory_charged 1",
		"tine_sandbox_memory_charged_bytes 3.145728e+07", "tine_egress_denied_total 0",
	} {
		if !strings.Contains(text, want+"\n") {
			t.Errorf("no %q", want)
		}
	}
}
