package client_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("net/http.(*persistConn).readLoop"), goleak.IgnoreAnyFunction("net/http.(*persistConn).writeLoop"))
}

// connect returns a client of a backend and the id of a sandbox of its.
func connect(t *testing.T) (*client.Client, string) {
	t.Helper()
	c, err := client.New(client.Config{URL: apitest.New(t).Serve("../api/openapi.yaml").URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	boxes, err := c.Fork(t.Context(), client.ForkRequest{Snapshot: "py", Lifetime: time.Hour, Labels: map[string]string{"a": "b"}})
	if err != nil {
		t.Fatal(err)
	}
	return c, boxes[0].ID
}

func TestEverything(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	ctx := t.Context()
	dir := t.TempDir()
	var news []client.Progress
	report := func(p client.Progress) { news = append(news, p) }
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"health", func() error { return c.Health(ctx) }},
		{"version", func() error { _, err := c.Version(ctx); return err }},
		{"doctor", func() error { _, err := c.Doctor(ctx); return err }},
		{"build", func() error {
			_, err := c.BuildImage(ctx, client.BuildImageRequest{Name: "x", Source: "debian:bookworm"}, report)
			return err
		}},
		{"images", func() error { _, err := c.Images(ctx); return err }},
		{"image", func() error { _, err := c.Image(ctx, "x"); return err }},
		{"remove image", func() error { return c.RemoveImage(ctx, "x") }},
		{"create", func() error {
			_, err := c.CreateSnapshot(ctx, client.CreateSnapshotRequest{Tag: "y", Image: "py"}, report)
			return err
		}},
		{"create silently", func() error {
			_, err := c.CreateSnapshot(ctx, client.CreateSnapshotRequest{Tag: "z", Image: "py"}, nil)
			return err
		}},
		{"snapshots", func() error { _, err := c.Snapshots(ctx); return err }},
		{"snapshot", func() error { _, err := c.Snapshot(ctx, "y"); return err }},
		{"check", func() error { _, err := c.CheckSnapshots(ctx, report); return err }},
		{"set pool", func() error { _, err := c.SetPool(ctx, "y", 0); return err }},
		{"pool", func() error { _, err := c.Pool(ctx, "y"); return err }},
		{"remove snapshot", func() error {
			return c.RemoveSnapshot(ctx, "y", client.RemoveSnapshotOptions{Cascade: true})
		}},
		{"collect", func() error { _, err := c.CollectSnapshots(ctx); return err }},
		{"sandboxes", func() error { _, err := c.Sandboxes(ctx); return err }},
		{"sandbox", func() error { _, err := c.Sandbox(ctx, id); return err }},
		{"ping", func() error { _, err := c.Ping(ctx, id); return err }},
		{"eval", func() error { _, err := c.Eval(ctx, id, client.EvalRequest{Code: "1"}); return err }},
		{"write", func() error { return c.WriteFile(ctx, id, dir+"/a", 0o600, strings.NewReader("hi")) }},
		{"read", func() error {
			r, err := c.ReadFile(ctx, id, dir+"/a")
			if err != nil {
				return err
			}
			_, err = io.ReadAll(r)
			return errors.Join(err, r.Close())
		}},
		{"stat", func() error { _, err := c.Stat(ctx, id, dir+"/a"); return err }},
		{"mkdir", func() error { return c.Mkdir(ctx, id, dir+"/d", 0o700) }},
		{"list", func() error { _, err := c.List(ctx, id, dir, 2); return err }},
		{"move", func() error { return c.Move(ctx, id, dir+"/a", dir+"/b") }},
		{"remove", func() error { return c.Remove(ctx, id, dir+"/b", false) }},
		{"branch", func() error {
			s, err := c.Branch(ctx, id, client.BranchRequest{Tag: "b", Mode: client.ModeDiff, N: 1}, report)
			if err == nil && (s.Status != "ready" || len(s.Sandboxes) != 1 || s.Mode != client.ModeDiff) {
				err = fmt.Errorf("%+v", s)
			}
			return err
		}},
		{"branch silently", func() error {
			s, err := c.Branch(ctx, id, client.BranchRequest{Tag: "later", Mode: client.ModeLive, NoWait: true}, nil)
			if err == nil && s.Status != "writing" {
				err = fmt.Errorf("%+v", s)
			}
			return err
		}},
		{"tree", func() error { _, err := c.Tree(ctx); return err }},
		{"diff", func() error { _, err := c.Diff(ctx, "py", id); return err }},
		{"promote", func() error { _, err := c.Promote(ctx, id, "best", report); return err }},
		{"compact", func() error { _, err := c.Compact(ctx, "b", "c", report); return err }},
		{"flatten", func() error { _, err := c.Flatten(ctx, "b", report); return err }},
		{"prune", func() error { _, err := c.Prune(ctx, 1, true); return err }},
		{"rollback", func() error { _, err := c.Rollback(ctx, id, "b"); return err }},
		{"suspend", func() error { _, err := c.Suspend(ctx, id); return err }},
		{"resume", func() error { _, err := c.Resume(ctx, id); return err }},
		{"create workspace", func() error {
			_, err := c.CreateWorkspace(ctx, client.CreateWorkspaceRequest{Name: "w", SnapshotTag: "py"})
			return err
		}},
		{"workspaces", func() error { _, err := c.Workspaces(ctx); return err }},
		{"workspace", func() error { _, err := c.Workspace(ctx, "w"); return err }},
		{"suspend workspace", func() error { _, err := c.SuspendWorkspace(ctx, "w"); return err }},
		{"resume workspace", func() error { _, err := c.ResumeWorkspace(ctx, "w"); return err }},
		{"remove workspace", func() error { return c.RemoveWorkspace(ctx, "w") }},
		{"remove sandbox", func() error { return c.RemoveSandbox(ctx, id) }},
	} {
		if err := step.do(); err != nil {
			t.Errorf("%s: %v", step.name, err)
		}
	}
	if len(news) == 0 {
		t.Error("no progress")
	}
}

func TestError(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	_, err := c.Sandbox(t.Context(), "no/such one")
	var e *client.Error
	if !errors.Is(err, errdef.ErrNotFound) || !errors.As(err, &e) || e.Status != http.StatusNotFound || e.Code != "not_found" {
		t.Errorf("error is %#v", err)
	}
}

func TestErrorWithinProgress(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	b.Fail = func(op string) error {
		if op == "boot" {
			return errdef.WithHint(errdef.Remote("unavailable", "guest did not boot"), "look at its console")
		}
		return nil
	}
	c, err := client.New(client.Config{URL: b.Serve("../api/openapi.yaml").URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	_, err = c.CreateSnapshot(t.Context(), client.CreateSnapshotRequest{Tag: "x", Image: "py"}, func(client.Progress) {})
	var e *client.Error
	if !errors.Is(err, errdef.ErrUnavailable) || !errors.As(err, &e) || e.Hint != "look at its console" || e.Status != 0 {
		t.Errorf("error is %#v", err)
	}
}

// TestTokensUnsupported: a daemon that asks nobody has no tokens. What one with
// tokens does is for internal/daemon to test.
func TestTokensUnsupported(t *testing.T) {
	t.Parallel()
	c, _ := connect(t)
	_, err := c.Tokens(t.Context())
	_, createErr := c.CreateToken(t.Context(), client.CreateTokenRequest{Name: "ci"})
	for _, err := range []error{err, createErr, c.RemoveToken(t.Context(), "ci")} {
		if code := errdef.Code(err); code != "unsupported" && code != "denied" {
			t.Errorf("got %v", err)
		}
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]client.Config{
		"socket": {Socket: filepath.Join(t.TempDir(), "none.sock")},
		"unix":   {URL: "unix://" + filepath.Join(t.TempDir(), "none.sock")},
		"tcp":    {URL: "http://127.0.0.1:1"},
	} {
		c, err := client.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Sandboxes(t.Context())
		_, serr := c.ExecStream(t.Context(), "x", client.StreamRequest{Args: []string{"true"}})
		for _, err := range []error{err, serr} {
			var u *client.UnreachableError
			if !errors.As(err, &u) || !errors.Is(err, errdef.ErrUnavailable) {
				t.Errorf("%s: error is %v", name, err)
			}
		}
	}
	if _, err := client.New(client.Config{URL: "ftp://x"}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("bad URL: %v", err)
	}
}

func TestSocket(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: api.New(apitest.New(t).Config())}
	var work sync.WaitGroup
	work.Go(func() { _ = srv.Serve(listener) })
	t.Cleanup(func() { _ = srv.Close(); work.Wait() })
	c, err := client.New(client.Config{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Health(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestStream(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	for _, tt := range []struct {
		name           string
		req            client.StreamRequest
		stdin          string
		stdout, stderr string
		exit           client.Exit
	}{
		{"output", client.StreamRequest{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}}, "", "out\n", "err\n", client.Exit{Code: 3}},
		{"stdin", client.StreamRequest{Args: []string{"cat"}, Stdin: true}, strings.Repeat("x", 1<<20), strings.Repeat("x", 1<<20), "", client.Exit{}},
		{"unread_stdin", client.StreamRequest{Args: []string{"true"}, Stdin: true}, strings.Repeat("x", 4<<20), "", "", client.Exit{}},
		{"signal", client.StreamRequest{Args: []string{"sh", "-c", "kill -KILL $$"}}, "", "", "", client.Exit{Code: -9, Signal: "SIGKILL"}},
		{"timeout", client.StreamRequest{Args: []string{"sleep", "60"}, Timeout: 100 * time.Millisecond}, "", "", "", client.Exit{Code: 124, TimedOut: true}},
		{"terminal", client.StreamRequest{Args: []string{"stty", "size"}, Terminal: &client.TerminalSize{Cols: 91, Rows: 17}}, "", "17 91\r\n", "", client.Exit{}},
		{"env", client.StreamRequest{Args: []string{"sh", "-c", "pwd; echo $A"}, Dir: "/", Env: map[string]string{"A": "b"}}, "", "/\nb\n", "", client.Exit{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s, err := c.ExecStream(t.Context(), id, tt.req)
			if err != nil {
				t.Fatal(err)
			}
			var work sync.WaitGroup
			if tt.req.Stdin {
				work.Go(func() { _ = s.SendStdin(t.Context(), strings.NewReader(tt.stdin)) })
			}
			var stdout, stderr bytes.Buffer
			exit, err := s.Wait(t.Context(), &stdout, &stderr)
			work.Wait()
			if exit.TimedOut {
				exit.Signal = ""
			}
			if err != nil || exit != tt.exit || stdout.String() != tt.stdout || stderr.String() != tt.stderr {
				t.Errorf("exit %+v, %v; stdout %.40q (%d), stderr %.40q", exit, err, stdout.String(), stdout.Len(), stderr.String())
			}
		})
	}
}

func TestStreamErrors(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	for _, tt := range []struct {
		name   string
		id     string
		req    client.StreamRequest
		status int
		want   error
	}{
		{"no_sandbox", "none", client.StreamRequest{Args: []string{"true"}}, 404, errdef.ErrNotFound},
		{"no_command", id, client.StreamRequest{Args: []string{"/nope"}}, 0, errdef.ErrNotFound},
		{"not_executable", id, client.StreamRequest{Args: []string{"/dev/null"}}, 0, errdef.ErrDenied},
		{"no_args", id, client.StreamRequest{}, 0, errdef.ErrInvalid},
		{"no_size", id, client.StreamRequest{Args: []string{"true"}, Terminal: &client.TerminalSize{}}, 0, errdef.ErrInvalid},
		{"attach_nowhere", id, client.StreamRequest{Attach: 1 << 22}, 0, errdef.ErrNotFound},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := c.ExecStream(t.Context(), tt.id, tt.req)
			var e *client.Error
			if !errors.Is(err, tt.want) || !errors.As(err, &e) || e.Status != tt.status {
				t.Errorf("error is %#v", err)
			}
		})
	}
}

// TestStreamControl signals, resizes, and leaves and meets a process again.
func TestStreamControl(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	ctx := t.Context()
	s, err := c.ExecStream(ctx, id, client.StreamRequest{
		Args: []string{"sh", "-c", "sleep 60; true"}, Stdin: true, Terminal: &client.TerminalSize{Cols: 1, Rows: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err = errors.Join(s.Resize(ctx, client.TerminalSize{Cols: 91, Rows: 17}), s.Signal(ctx, "KILL")); err != nil {
		t.Fatal(err)
	}
	exit, err := s.Wait(ctx, io.Discard, io.Discard)
	if err != nil || exit.Signal != "SIGKILL" {
		t.Errorf("exit %+v, %v", exit, err)
	}

	s, err = c.ExecStream(ctx, id, client.StreamRequest{Args: []string{"sleep", "60"}, Background: true})
	if err != nil {
		t.Fatal(err)
	}
	pid := s.PID
	s.Close()
	if s, err = c.ExecStream(ctx, id, client.StreamRequest{Attach: pid}); err != nil {
		t.Fatal(err)
	}
	if err = c.Signal(ctx, id, pid, "TERM"); err != nil {
		t.Fatal(err)
	}
	if exit, err = s.Wait(ctx, io.Discard, io.Discard); err != nil || exit.Signal != "SIGTERM" || exit.Code != -15 {
		t.Errorf("exit %+v, %v", exit, err)
	}
}

// TestStreamLeft sees that a command ends with the client that started it.
func TestStreamLeft(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	ctx, leave := context.WithCancel(t.Context())
	s, err := c.ExecStream(ctx, id, client.StreamRequest{Args: []string{"sleep", "60"}})
	if err != nil {
		t.Fatal(err)
	}
	leave()
	if _, err := s.Wait(ctx, io.Discard, io.Discard); err == nil {
		t.Error("a stream that was left had an exit")
	}
	deadline := time.After(10 * time.Second)
	for {
		processes, err := c.Processes(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if len(processes) == 0 || !processes[0].Running {
			return
		}
		select {
		case <-deadline:
			t.Fatal("the command still runs")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestStreamGarbage sends what no client of ours would.
func TestStreamGarbage(t *testing.T) {
	t.Parallel()
	srv := apitest.New(t).Serve("../api/openapi.yaml")
	c, err := client.New(client.Config{URL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if _, err = c.Fork(t.Context(), client.ForkRequest{Snapshot: "py"}); err != nil {
		t.Fatal(err)
	}
	for name, messages := range map[string][]string{
		"not_json":       {"{"},
		"bad_control":    {`{"args":["sleep","60"]}`, "{"},
		"bad_signal":     {`{"args":["sleep","60"]}`, `{"signal":"NOPE"}`},
		"bad_resize":     {`{"args":["sleep","60"]}`, `{"resize":{"cols":0,"rows":0}}`},
		"both":           {`{"args":["sleep","60"],"attach":1}`},
		"negative_limit": {`{"args":["sleep","60"],"timeout_secs":-1}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn, _, err := websocket.Dial(t.Context(), srv.URL+"/v1/sandboxes/sb-1/exec/stream", nil) //nolint:bodyclose // Dial closes it
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.CloseNow() }()
			for _, m := range messages {
				if err := conn.Write(t.Context(), websocket.MessageText, []byte(m)); err != nil {
					t.Fatal(err)
				}
			}
			var last string
			for {
				_, data, err := conn.Read(t.Context())
				if err != nil {
					break
				}
				last = string(data)
			}
			if !strings.Contains(last, `"code":"invalid"`) {
				t.Errorf("last message is %q", last)
			}
		})
	}
}

// TestStreamStopped sees that a stream of a daemon that stops says so.
func TestStreamStopped(t *testing.T) {
	t.Parallel()
	stopping := errdef.Remote("unavailable", "the daemon is stopping")
	base, stop := context.WithCancelCause(t.Context())
	srv := httptest.NewUnstartedServer(api.New(apitest.New(t).Config()))
	srv.Config.BaseContext = func(net.Listener) context.Context { return base }
	srv.Start()
	t.Cleanup(srv.Close)
	c, err := client.New(client.Config{URL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if _, err = c.Fork(t.Context(), client.ForkRequest{Snapshot: "py"}); err != nil {
		t.Fatal(err)
	}
	s, err := c.ExecStream(t.Context(), "sb-1", client.StreamRequest{Args: []string{"sleep", "60"}})
	if err != nil {
		t.Fatal(err)
	}
	stop(stopping)
	if _, err = s.Wait(t.Context(), io.Discard, io.Discard); !errors.Is(err, errdef.ErrUnavailable) || err.Error() != "the daemon is stopping" {
		t.Errorf("error is %v", err)
	}
}
