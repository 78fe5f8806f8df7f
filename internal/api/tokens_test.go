package api_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/wire"
)

func TestTokens(t *testing.T) {
	t.Parallel()
	g := newGuarded(t, auth.Config{})
	for _, who := range []string{"read", "fork"} { // not even their names are for everybody
		g.expect(t, g.do(t, who, "GET", "/v1/tokens", ""), 403, "")
		g.expect(t, g.do(t, who, "POST", "/v1/tokens", `{"name":"x"}`), 403, "")
		g.expect(t, g.do(t, who, "DELETE", "/v1/tokens/few", ""), 403, "")
	}
	a := g.do(t, "admin", "POST", "/v1/tokens", `{"name":"new","max_sandboxes":3}`, func(r *http.Request) { r.Header.Set("Idempotency-Key", "k") })
	made := decode[wire.CreatedToken](t, a.body)
	if a.status != 201 || made.Name != "new" || made.Scope != "fork" || made.MaxSandboxes != 3 || made.CreatedAt.IsZero() {
		t.Fatalf("%d %s", a.status, a.body)
	}
	g.tokens["new"] = made.Token
	g.expect(t, g.do(t, "new", "POST", "/v1/sandboxes", `{"snapshot_tag":"py"}`), 201, "") // at once
	a = g.do(t, "admin", "GET", "/v1/tokens", "")
	var names []string
	for _, one := range decode[[]wire.Token](t, a.body) {
		names = append(names, one.Name)
	}
	if diff := cmp.Diff([]string{"admin", "few", "fork", "new", "read", "signs", "small"}, names); diff != "" || strings.Contains(a.body, "sha256") {
		t.Errorf("%s\n%s", diff, a.body)
	}
	for body, status := range map[string]int{
		`{"name":"new"}`: 409, `{"name":"token-file"}`: 400, `{"name":"Ci"}`: 400, `{}`: 400, `{"name":"x","scope":"root"}`: 400,
		`{"name":"x","max_sandboxes":-1}`: 400,
	} {
		g.expect(t, g.do(t, "admin", "POST", "/v1/tokens", body), status, "")
	}
	g.expect(t, g.do(t, "admin", "DELETE", "/v1/tokens/new", ""), 204, "")
	g.expect(t, g.do(t, "new", "GET", "/v1/sandboxes", ""), 401, "invalid bearer token")
	g.expect(t, g.do(t, "admin", "DELETE", "/v1/tokens/new", ""), 404, "")
	if strings.Contains(g.log.String(), made.Token) {
		t.Error("the log has the token")
	}
	// A daemon that asks nobody has none.
	url, _ := server(t)
	if status, _ := do(t, "GET", url+"/v1/tokens", ""); status != 501 {
		t.Errorf("status %d", status)
	}
}
