package daemon

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm/fake"
	"github.com/tinevm/tine/internal/workspace"
)

// TestOnStop: what becomes of sandboxes, and of a workspace's, when the daemon
// is told to stop, and that the next one serves what is left of them.
func TestOnStop(t *testing.T) {
	t.Parallel()
	for choice, want := range map[OnStop]struct{ plain, kept sandbox.State }{
		"":      {sandbox.Running, sandbox.Running},
		Leave:   {sandbox.Running, sandbox.Running},
		Suspend: {sandbox.Suspended, sandbox.Suspended},
		Remove:  {"", sandbox.Suspended},
	} {
		t.Run("on-stop-"+string(choice), func(t *testing.T) {
			t.Parallel()
			dir, engine := stateDir(t), fake.New()
			first, _, stop := start(t, engine, Config{StateDir: dir, OnStop: choice})
			template(t, first)
			plain := fork(t, first, 2)
			w, err := first.workspaces.Create(t.Context(), workspace.CreateRequest{Name: "w", Snapshot: "py"})
			if err != nil {
				t.Fatal(err)
			}
			stop()

			second, reached, _ := start(t, engine, Config{StateDir: dir})
			states := map[string]sandbox.State{plain[0]: want.plain, plain[1]: want.plain, w.SandboxID: want.kept}
			for id, state := range states {
				info, err := second.Sandboxes.Get(id)
				if state == "" {
					if !errors.Is(err, errdef.ErrNotFound) {
						t.Errorf("%s: %+v, %v, want ErrNotFound", id, info, err)
					}
					continue
				}
				if err != nil || info.State != state {
					t.Errorf("%s is %s, %v, want %s", id, info.State, err, state)
				}
				// Use resumes what was suspended.
				if status, _, body := reached.ask(t, "tcp", "POST", "/v1/sandboxes/"+id+"/exec", `{"args":["true"]}`); status != http.StatusOK {
					t.Errorf("exec in %s: %d %s", id, status, body)
				}
			}
			killAll(t, second)
		})
	}
}

// TestDrain: a request that is under way when the daemon is told to stop may
// end, for as long as that is allowed and no longer; others are not let in.
func TestDrain(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		drain time.Duration
		sleep string
		ends  bool
	}{
		"in-time":  {time.Minute, "0.5", true},
		"too-long": {200 * time.Millisecond, "60", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, reached, stop := start(t, fake.New(), Config{StateDir: stateDir(t), DrainTime: tt.drain, OnStop: Remove})
			template(t, d)
			id := fork(t, d, 1)[0]
			conn := reach(t, reached.addr)
			body := `{"args":["sleep","` + tt.sleep + `"]}`
			write(t, conn, "POST /v1/sandboxes/"+id+"/exec HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"+body)
			for deadline := time.Now().Add(20 * time.Second); !runs(t, reached, id); time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the command does not run")
				}
			}
			begun := time.Now()
			stop()
			if took := time.Since(begun); took > 20*time.Second {
				t.Errorf("it took %v to stop", took)
			}
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if ended := err == nil && resp.StatusCode == http.StatusOK; ended != tt.ends {
				t.Errorf("the request: %+v, %v, want an answer: %v", resp, err, tt.ends)
			}
			if err == nil {
				_, _ = io.Copy(io.Discard, resp.Body) // its status was looked at
				_ = resp.Body.Close()
			}
			var dialer net.Dialer
			if c, dialErr := dialer.DialContext(t.Context(), "tcp", reached.addr); dialErr == nil {
				_ = c.Close()
				t.Error("it lets others in")
			}
		})
	}
}

// runs reports whether a command runs in a sandbox.
func runs(t *testing.T, r *reached, id string) bool {
	t.Helper()
	status, _, body := r.ask(t, "unix", "GET", "/v1/sandboxes/"+id+"/processes", "")
	if status != http.StatusOK {
		t.Fatalf("%d %s", status, body)
	}
	return strings.Contains(body, `"sleep"`)
}
