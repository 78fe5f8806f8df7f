package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/errdef"
)

// command runs a command line with deps and an environment.
func command(t *testing.T, deps cli.Deps, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = cli.Run(t.Context(), cli.Environment{
		Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
		Getenv: func(name string) string { return env[name] }, Version: "1.2.3", Deps: deps,
	})
	return code, out.String(), errs.String()
}

// fakeTokens keeps tokens in memory.
func fakeTokens() cli.TokenDeps {
	var all []cli.Token
	return cli.TokenDeps{
		Create: func(_ context.Context, dir string, tok cli.Token) (cli.Token, string, error) {
			if dir != "/state" {
				return tok, "", fmt.Errorf("state directory %q", dir)
			}
			tok.CreatedAt = time.Unix(1795300000, 0).UTC()
			all = append(all, tok)
			return tok, "tine_" + tok.Name + "_secret", nil
		},
		List: func(string) ([]cli.Token, error) { return all, nil },
		Remove: func(_ context.Context, _, name string) error {
			return fmt.Errorf("%w: token %s", errdef.ErrNotFound, name)
		},
	}
}

func TestToken(t *testing.T) {
	t.Parallel()
	deps, env := cli.Deps{Tokens: fakeTokens()}, map[string]string{"TINE_STATE_DIR": "/state"}
	if code, out, _ := command(t, deps, env, "token", "ls", "--json"); code != 0 || out != "[]\n" {
		t.Errorf("ls of nothing: %d %q", code, out)
	}
	code, out, errs := command(t, deps, env, "token", "create", "ci", "--max-sandboxes", "3")
	if code != 0 || out != "tine_ci_secret\n" || !strings.Contains(errs, "only time") {
		t.Errorf("create: %d %q %q", code, out, errs)
	}
	code, out, _ = command(t, deps, env, "token", "create", "deploy", "--scope", "admin", "--sign", "--json")
	want := map[string]any{"name": "deploy", "scope": "admin", "sign": true, "created_at": "2026-11-22T09:46:40Z", "token": "tine_deploy_secret"}
	var got map[string]any
	if err := json.Unmarshal([]byte(out), &got); err != nil || code != 0 {
		t.Errorf("create: %d %q, %v", code, out, err)
	}
	delete(want, "created_at")
	delete(got, "created_at")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("create (-want +got):\n%s", diff)
	}
	if code, out, _ = command(t, deps, env, "token", "ls"); code != 0 || strings.Contains(out, "secret") ||
		!strings.Contains(out, "ci      fork   3          -       -     -") || !strings.Contains(out, "deploy  admin  -          -       -     yes") {
		t.Errorf("ls: %d\n%s", code, out)
	}
	if code, out, errs = command(t, deps, env, "token", "rm", "none"); code != 3 || out != "" || !strings.Contains(errs, "token none") {
		t.Errorf("rm: %d %q %q", code, out, errs)
	}
	for _, args := range [][]string{{"token"}, {"token", "create"}, {"token", "rm"}, {"token", "create", "a", "b"}} {
		if code, _, _ = command(t, deps, env, args...); code != 2 {
			t.Errorf("%v: %d", args, code)
		}
	}
	if code, _, _ = command(t, cli.Deps{}, env, "token", "ls"); code == 0 {
		t.Error("a program without tokens lists them")
	}
}

// TestCredentials is where the token that is sent comes from.
func TestCredentials(t *testing.T) {
	t.Parallel()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(map[string]string{"error": "got " + r.Header.Get("Authorization"), "code": "denied"})
	}))
	defer srv.Close()
	dir := t.TempDir()
	path := func(name, content string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	one, two, bad := path("one", " first\n"), path("two", "second"), path("bad", "a b")
	for name, tt := range map[string]struct {
		env  map[string]string
		args []string
		code int
		want string
	}{
		"none":          {nil, nil, 5, "got \n"},
		"variable":      {map[string]string{"TINE_TOKEN": "direct"}, nil, 5, "got Bearer direct\n"},
		"variable_file": {map[string]string{"TINE_TOKEN_FILE": one}, nil, 5, "got Bearer first\n"},
		"both":          {map[string]string{"TINE_TOKEN": "direct", "TINE_TOKEN_FILE": one}, nil, 5, "got Bearer direct\n"},
		"flag_first":    {map[string]string{"TINE_TOKEN": "direct"}, []string{"--token-file", two}, 5, "got Bearer second\n"},
		"bad":           {nil, []string{"--token-file", bad}, 2, "does not hold a token"},
		"missing":       {nil, []string{"--token-file", filepath.Join(dir, "none")}, 2, "no such file"},
		"bad_ca":        {nil, []string{"--ca-file", two}, 2, "no certificate"},
		"half_a_pair":   {nil, []string{"--cert-file", two}, 2, "client certificate"},
	} {
		code, _, errs := command(t, cli.Deps{}, tt.env, append([]string{"ls", "--url", srv.URL}, tt.args...)...)
		if code != tt.code || !strings.Contains(errs, tt.want) {
			t.Errorf("%s: %d %q", name, code, errs)
		}
	}
}

// TestServeAuth is what serve is told of who may come in.
func TestServeAuth(t *testing.T) {
	t.Parallel()
	var got cli.AuthOptions
	deps := cli.Deps{Serve: func(_ context.Context, o cli.ServeOptions) error { got = o.Auth; return nil }}
	code, _, errs := command(t, deps, map[string]string{"HOME": t.TempDir(), "TINE_TOKEN_FILE": "not for serve"}, "serve",
		"--token-file", "t", "--tls-cert", "c", "--tls-key", "k", "--tls-client-ca", "ca", "--tls-client-scope", "fork",
		"--insecure-plain", "--sign-window", "1m", "--rate", "2.5", "--burst", "9")
	want := cli.AuthOptions{
		TokenFile: "t", TLSCert: "c", TLSKey: "k", ClientCA: "ca", ClientScope: "fork", Plain: true, SignWindow: time.Minute, Rate: 2.5, Burst: 9,
	}
	if diff := cmp.Diff(want, got); diff != "" || code != 0 {
		t.Errorf("exit code %d, %s (-want +got):\n%s", code, errs, diff)
	}
	got = cli.AuthOptions{}
	command(t, deps, map[string]string{"HOME": t.TempDir(), "TINE_TOKEN_FILE": "not for serve"}, "serve")
	if diff := cmp.Diff(cli.AuthOptions{ClientScope: "admin"}, got); diff != "" {
		t.Errorf("without flags (-want +got):\n%s", diff)
	}
}

// TestTokenAsksDaemon: while a daemon answers it is asked, and nothing is
// changed behind its back.
func TestTokenAsksDaemon(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "tine") //nolint:usetesting // its path has to be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "tine.sock"))
	if err != nil {
		t.Fatal(err)
	}
	var asked []string
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // an error shows in the comparison
		asked = append(asked, strings.TrimSpace(r.Method+" "+r.URL.Path+" "+string(body)))
		w.Header().Set("Content-Type", "application/json")
		switch r.Method {
		case http.MethodPost:
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, `{"name":"ci","scope":"read","created_at":"2026-11-22T00:00:00Z","token":"tine_ci_secret"}`)
		case http.MethodGet:
			_, _ = io.WriteString(w, `[{"name":"ci","scope":"read","created_at":"2026-11-22T00:00:00Z"}]`)
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	}))
	srv.Listener = ln
	srv.Start()
	t.Cleanup(srv.Close)
	env := map[string]string{"TINE_STATE_DIR": dir, "TINE_URL": "http://127.0.0.1:1"}
	for _, step := range []struct {
		want string
		args []string
	}{
		{"tine_ci_secret\n", []string{"token", "create", "ci", "--scope", "read"}},
		{"read", []string{"token", "ls"}},
		{"", []string{"token", "rm", "ci"}},
	} {
		if code, out, errs := command(t, cli.Deps{}, env, step.args...); code != 0 || !strings.Contains(out, step.want) {
			t.Errorf("%q: %d %q %q", step.args, code, out, errs)
		}
	}
	want := []string{`POST /v1/tokens {"name":"ci","scope":"read"}`, "GET /v1/tokens", "DELETE /v1/tokens/ci"}
	if diff := cmp.Diff(want, asked); diff != "" {
		t.Error(diff)
	}
}
