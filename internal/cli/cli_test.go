package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

const spec = "../../api/openapi.yaml"

// fakes are Deps that say what they were asked for. A daemon of this process's
// own is the one at $LOCAL_URL.
func fakes(getenv func(string) string) cli.Deps {
	return cli.Deps{
		Serve: func(ctx context.Context, o cli.ServeOptions) error {
			_, err := fmt.Fprintf(o.Log, "serve listen=%s socket=%s pool=%v verbose=%v engine=%s branches=%d\n", o.Listen, o.Socket, o.Pool, o.Verbose, o.Engine, o.Branches)
			if o.Firecracker+o.CPUTemplate != "" {
				_, err = fmt.Fprintf(o.Log, "firecracker=%s template=%s\n", o.Firecracker, o.CPUTemplate)
			}
			o.Ready([]string{o.Listen})
			if o.Listen == "wait" {
				<-ctx.Done()
			}
			return err
		},
		Local: func(ctx context.Context, o cli.HostOptions) (*client.Client, func(context.Context) error, error) {
			progress.Report(ctx, "daemon", "starting in "+o.StateDir)
			c, err := client.New(client.Config{URL: getenv("LOCAL_URL")})
			return c, func(context.Context) error { progress.Report(ctx, "daemon", "ended"); return nil }, err
		},
		Demo: func(ctx context.Context, o cli.DemoOptions) error {
			progress.Report(ctx, "image", "building")
			_, err := fmt.Fprintf(o.Out, "demo: %d json=%v\n", o.N, o.JSON)
			return err
		},
		Bench: func(_ context.Context, o cli.BenchOptions) error {
			_, err := fmt.Fprintf(o.Out, "bench: %s %v %d %v\n", o.Snapshot, o.Forks, o.Rounds, o.Floor)
			return err
		},
		Doctor: func(context.Context, cli.HostOptions) ([]client.Check, error) {
			status := client.CheckOK
			if getenv("SICK") != "" {
				status = client.CheckFail
			}
			return []client.Check{{Name: "disk", Status: status, Detail: "5 GiB free", Hint: "buy another"}}, nil
		},
	}
}

func TestScripts(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			b := apitest.New(t)
			b.Most = 20
			b.Fail = func(op string) error {
				if op == "fork 3" {
					return fmt.Errorf("%w: no room for the fourth", errdef.ErrExhausted)
				}
				return nil
			}
			url := b.Serve(spec).URL
			env.Setenv("TINE_URL", url)
			env.Setenv("LOCAL_URL", url)
			env.Setenv("HOME", filepath.Join(env.WorkDir, "home"))
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"tine":  tine,
			"exits": exits,
			"json":  isJSON,
		},
	})
}

// tine runs a command line in this process. A first argument of <FILE is its
// standard input.
func tine(ts *testscript.TestScript, neg bool, args []string) {
	if code := run(ts, args); (code != 0) != neg {
		ts.Fatalf("exit code %d", code)
	}
}

// exits N tine ARGS... runs a command line that must end with exit code N.
func exits(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	if got := run(ts, args[2:]); got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func run(ts *testscript.TestScript, args []string) int {
	var stdin string
	if len(args) > 0 && strings.HasPrefix(args[0], "<") {
		stdin, args = ts.ReadFile(args[0][1:]), args[1:]
	}
	return cli.Run(context.Background(), cli.Environment{
		Args: args, Stdin: strings.NewReader(stdin), Stdout: ts.Stdout(), Stderr: ts.Stderr(),
		Getenv: ts.Getenv, Version: "1.2.3", Deps: fakes(ts.Getenv),
	})
}

// isJSON sees that each line, or with -whole all, of a stream is JSON.
func isJSON(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0])
	parts := strings.Split(strings.TrimSpace(text), "\n")
	if len(args) > 1 {
		parts = []string{text}
	}
	for _, part := range parts {
		if !json.Valid([]byte(part)) {
			ts.Fatalf("not JSON: %q", part)
		}
	}
}

// TestDeniedIsShown: what a sandbox was denied is shown with the reason, and with
// how to allow it; what the sandbox chose does nothing to the terminal, or to a
// shell that the hint is pasted into.
func TestDeniedIsShown(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	url := b.Serve(spec).URL
	run := func(args ...string) (stdout, stderr string) {
		t.Helper()
		var out, errs bytes.Buffer
		code := cli.Run(t.Context(), cli.Environment{
			Args: args, Stdin: strings.NewReader(""), Stdout: &out, Stderr: &errs,
			Getenv: func(name string) string { return map[string]string{"TINE_URL": url}[name] },
		})
		if code != 0 {
			t.Fatalf("%v: %d %s", args, code, &errs)
		}
		return out.String(), errs.String()
	}
	run("snapshot", "create", "web", "--image", "py", "--net")
	run("fork", "--snapshot", "web")
	b.Deny("sb-1", "dns", "a';reboot;'.example", "unknown_name")
	b.Deny("sb-1", "tcp", "\x1b[2J\n\u202e", "wrong_server_name")
	b.Deny("sb-1", "tcp", "169.254.169.254:80", "link_local")
	b.Deny("sb-1", "dns", "api.example.com.", "unknown_name")
	b.Deny("sb-1", "udp", "203.0.113.7:53000", "no_rule")
	out, errs := run("net", "show", "sb-1")
	for _, want := range []string{
		"dns api.example.com.", "no rule is for that name", "1 times", "169.254.169.254:80", "never: link-local", `"\x1b[2J\n\u202e"`,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.ContainsRune(out, 0x1b) || strings.Contains(errs, "reboot") {
		t.Errorf("%q, %q", out, errs)
	}
	if want := "hint: to allow the latest that a rule can: tine net allow sb-1 'api.example.com'\n"; errs != want {
		t.Errorf("hint %q", errs)
	}
}

// TestInterrupted sees that a command that is interrupted ends with 130, and
// that run removes its sandbox all the same.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	url := b.Serve(spec).URL
	ctx, interrupt := context.WithCancel(t.Context())
	var stdout writerFunc = func(p []byte) (int, error) { interrupt(); return len(p), nil }
	var stderr bytes.Buffer
	code := cli.Run(ctx, cli.Environment{
		Args: []string{"run", "--snapshot", "py", "--", "sh", "-c", "echo ready; sleep 60"}, Stdin: strings.NewReader(""),
		Stdout: stdout, Stderr: &stderr, Getenv: func(name string) string { return map[string]string{"TINE_URL": url}[name] },
	})
	if code != 130 || stderr.String() != "tine: interrupted\n" {
		t.Errorf("exit code %d, stderr %q", code, stderr.String())
	}
	if boxes := b.List(); len(boxes) != 0 {
		t.Errorf("sandboxes are left: %v", boxes)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestNoDeps sees that a build without a part says so.
func TestNoDeps(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"serve"}, {"demo"}, {"bench"}, {"doctor"}, {"ls", "--local"}} {
		var stderr bytes.Buffer
		code := cli.Run(t.Context(), cli.Environment{
			Args: args, Stdin: strings.NewReader(""), Stdout: &bytes.Buffer{}, Stderr: &stderr, Getenv: func(string) string { return "" },
		})
		if code != 1 || !strings.Contains(stderr.String(), "this build has no") {
			t.Errorf("%v: exit code %d, stderr %q", args, code, stderr.String())
		}
	}
}
