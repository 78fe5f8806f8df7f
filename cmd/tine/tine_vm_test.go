//go:build vm

package main_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmtest"
)

// host is a state directory with the shared image and snapshot, and the tine
// program as a user runs it.
type host struct {
	t   *testing.T
	dir string
}

func newHost(t *testing.T) *host {
	t.Helper()
	vmtest.Snapshot(t)
	dir, err := os.MkdirTemp("", "tine") //nolint:usetesting // its path has to be short
	if err != nil {
		t.Fatal(err)
	}
	for _, shared := range []string{"images", "snapshots"} {
		if err := os.Symlink(filepath.Join(vmtest.StateDir(t), shared), filepath.Join(dir, shared)); err != nil {
			t.Fatal(err)
		}
	}
	h := &host{t: t, dir: dir}
	t.Cleanup(func() {
		for _, pid := range h.machines() {
			t.Errorf("machine %d is left behind", pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return h
}

// machines are the monitors that work in the state directory.
func (h *host) machines() []int {
	h.t.Helper()
	pids, err := linux.FindProcesses(func(_ int, argv []string) bool {
		return len(argv) > 0 && (strings.Contains(argv[0], "qemu") || strings.Contains(argv[0], "firecracker")) &&
			slices.ContainsFunc(sandboxes(h.dir), func(id string) bool { return slices.Contains(argv, "tine-"+id) })
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return pids
}

// sandboxes are the ids of those that have a directory.
func sandboxes(stateDir string) []string {
	entries, _ := os.ReadDir(filepath.Join(stateDir, "sandboxes")) // none before the first daemon
	ids := make([]string, len(entries))
	for i, e := range entries {
		ids[i] = e.Name()
	}
	return ids
}

// command is a tine of the tests' engine, if they are to have a certain one.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	if name, ok := vmtest.NamedEngine(); ok {
		args = append([]string{"--engine", name}, args...)
	}
	cmd := exec.CommandContext(ctx, vmtest.Program(h.t, "tine"), args...)
	cmd.Env = append(os.Environ(), "TINE_STATE_DIR="+h.dir, "TINE_URL=")
	return cmd
}

// tine runs a command and returns what it printed and its exit code.
func (h *host) tine(args ...string) (stdout, stderr string, code int) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 3*time.Minute)
	defer cancel()
	cmd := h.command(ctx, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatalf("tine %q: %v", args, err)
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

// want runs a command that must print exactly that and succeed.
func (h *host) want(stdout string, args ...string) {
	h.t.Helper()
	out, errOut, code := h.tine(args...)
	if code != 0 || out != stdout {
		h.t.Errorf("tine %q: exit code %d, stdout %q, stderr %q; want stdout %q", args, code, out, errOut, stdout)
	}
}

// fails runs a command that must end with the exit code and leave stdout empty.
func (h *host) fails(code int, args ...string) {
	h.t.Helper()
	out, errOut, got := h.tine(args...)
	if got != code || out != "" || errOut == "" {
		h.t.Errorf("tine %q: exit code %d, stdout %q, stderr %q; want exit code %d", args, got, out, errOut, code)
	}
}

// serve starts a daemon and waits until it answers.
func (h *host) serve() *exec.Cmd {
	h.t.Helper()
	cmd := h.command(context.WithoutCancel(h.t.Context()), "serve")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	var once sync.Once
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ends is the test's business
		once.Do(func() { close(ended) })
	}()
	h.t.Cleanup(func() {
		_ = cmd.Process.Kill() // unless it has ended
		<-ended
	})
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); ; <-tick.C {
		if _, _, code := h.tine("ls"); code == 0 {
			return cmd
		}
		select {
		case <-ended:
			h.t.Fatalf("the daemon ended: %s", log.String())
		default:
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the daemon does not answer: %s", log.String())
		}
	}
}

// ids are the sandboxes that tine ls lists.
func (h *host) ids() []string {
	h.t.Helper()
	out, errOut, code := h.tine("ls", "--json")
	if code != 0 {
		h.t.Fatalf("tine ls: exit code %d: %s", code, errOut)
	}
	var list []struct {
		ID    string `json:"id"`
		State string `json:"state"`
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		h.t.Fatal(err)
	}
	var ids []string
	for _, s := range list {
		if s.State != "running" {
			h.t.Errorf("sandbox %s is %s", s.ID, s.State)
		}
		ids = append(ids, s.ID)
	}
	return ids
}

func end(t *testing.T, cmd *exec.Cmd, sig os.Signal) {
	t.Helper()
	if err := cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for tick := time.Tick(5 * time.Millisecond); cmd.Process.Signal(syscall.Signal(0)) == nil; <-tick {
		if time.Now().After(deadline) {
			t.Fatal("the daemon goes on")
		}
	}
}

// TestDoctor: on a host that the tests can use, doctor finds nothing that is
// wrong, and says which engine it is.
func TestDoctor(t *testing.T) {
	h := newHost(t)
	cmd := exec.CommandContext(t.Context(), vmtest.Program(t, "tine"), "doctor")
	cmd.Env = append(os.Environ(), "TINE_STATE_DIR="+h.dir, "TINE_URL=")
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
	if name, ok := vmtest.NamedEngine(); ok && !strings.Contains(string(out), "auto means "+name) {
		t.Errorf("auto is not %s", name)
	}
}

// TestDailyPath goes the way of a user, with a daemon that is killed on it.
func TestDailyPath(t *testing.T) {
	h := newHost(t)
	h.fails(6, "ls")
	daemon := h.serve()
	if _, errOut, code := h.tine("fork", "--snapshot", "py", "-n", "2"); code != 0 {
		t.Fatalf("fork: exit code %d: %s", code, errOut)
	}
	ids := h.ids()
	if len(ids) != 2 {
		t.Fatalf("%d sandboxes, want 2", len(ids))
	}
	id, file := ids[0], filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("from the host\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.want("", "cp", file, id+":/tmp/file")
	h.want("from the host\n", "exec", id, "--", "cat", "/tmp/file")
	h.want("", "eval", id, "answer = 42")
	h.want(id+"\n", "exec", id, "--", "hostname")
	h.fails(127, "exec", id, "--", "no-such-command")
	h.fails(3, "exec", "sb-nosuch", "--", "true")
	h.fails(3, "fork", "--snapshot", "nosuch")
	h.fails(2, "fork", "--snapshot", "../escape")
	h.fails(2, "fork", "--snapshot", "py", "-n", "0")
	h.fails(2, "fork", "--snapshot", "py", "-n", "100000")
	if _, _, code := h.tine("run", "--snapshot", "py", "--", "sh", "-c", "exit 7"); code != 7 {
		t.Errorf("run: exit code %d, want the guest's 7", code)
	}
	// What other tests have left that stands on it would keep it, and then only
	// its tag would go.
	if _, errOut, code := h.tine("snapshot", "gc"); code != 0 {
		t.Errorf("snapshot gc: exit code %d: %s", code, errOut)
	}
	h.fails(4, "snapshot", "rm", "py")

	end(t, daemon, syscall.SIGKILL)
	daemon = h.serve()
	h.want("42\n", "eval", id, "answer")
	if got := h.ids(); !slices.Equal(got, ids) {
		t.Errorf("after kill -9 there are %q, want %q", got, ids)
	}
	end(t, daemon, syscall.SIGTERM)
	if got := len(h.machines()); got != 2 {
		t.Errorf("%d machines run without the daemon, want 2", got)
	}
	h.serve()
	if _, errOut, code := h.tine("rm", "--all"); code != 0 {
		t.Errorf("rm --all: exit code %d: %s", code, errOut)
	}
	if got := sandboxes(h.dir); len(got) != 0 {
		t.Errorf("left in the state directory: %q", got)
	}
}

// TestKillMinusNine kills the daemon at one moment of a fork after another:
// what was promised is still there, and nothing else is.
func TestKillMinusNine(t *testing.T) {
	h := newHost(t)
	for i := range 4 {
		daemon := h.serve()
		before := h.ids()
		ctx, cancel := context.WithCancel(t.Context())
		fork := h.command(ctx, "fork", "--snapshot", "py", "-n", "2", "--json")
		if err := fork.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(i*120) * time.Millisecond)
		end(t, daemon, syscall.SIGKILL)
		cancel()
		_ = fork.Wait() // it lost its daemon

		daemon = h.serve()
		after := h.ids()
		for _, id := range before {
			if !slices.Contains(after, id) {
				t.Errorf("round %d: sandbox %s is lost", i, id)
			}
		}
		t.Logf("round %d: %d sandboxes", i, len(after))
		if running := h.machines(); len(running) != len(after) {
			t.Errorf("round %d: %d machines for %d sandboxes", i, len(running), len(after))
		}
		for _, id := range after {
			h.want(id+"\n", "exec", id, "--", "hostname")
		}
		end(t, daemon, syscall.SIGKILL)
	}
	h.serve()
	h.tine("rm", "--all")
	if got := sandboxes(h.dir); len(got) != 0 {
		t.Errorf("left in the state directory: %q", got)
	}
}

// TestInterrupt presses ctrl-C in the midst of a local run.
func TestInterrupt(t *testing.T) {
	h := newHost(t)
	for _, wait := range []time.Duration{50, 150, 300, 600} {
		cmd := h.command(t.Context(), "run", "--local", "--snapshot", "py", "--", "sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(wait * time.Millisecond)
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // its exit code is looked at below
		if code := cmd.ProcessState.ExitCode(); code != 130 {
			t.Errorf("interrupted after %d ms: exit code %d, want 130", wait, code)
		}
		if got := sandboxes(h.dir); len(got) != 0 {
			t.Errorf("interrupted after %d ms: left behind: %q", wait, got)
		}
	}
}

// TestDemo forks its own template; only the image is the shared one.
func TestDemo(t *testing.T) {
	h := newHost(t)
	if err := os.Remove(filepath.Join(h.dir, "snapshots")); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"first", "second"} {
		out, errOut, code := h.tine("demo", "-n", "3")
		if code != 0 || !strings.HasSuffix(out, "\ndemo: 3/3 forks answered\n") {
			t.Errorf("%s demo: exit code %d, stdout %q, stderr %q", what, code, out, errOut)
		}
	}
	out, errOut, code := h.tine("demo", "-n", "2", "--json")
	var result struct {
		Answered int `json:"answered"`
		Forks    []struct {
			Result string `json:"result"`
		} `json:"forks"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil || code != 0 {
		t.Fatalf("demo --json: exit code %d, %v, stdout %q, stderr %q", code, err, out, errOut)
	}
	if result.Answered != 2 || len(result.Forks) != 2 || result.Forks[0].Result != "332833500" {
		t.Errorf("demo --json: %+v", result)
	}
	if got := sandboxes(h.dir); len(got) != 0 {
		t.Errorf("left behind: %q", got)
	}
}
