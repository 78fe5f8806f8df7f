//go:build vm

package main_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/vmtest"
)

// newOwnHost is newHost with snapshots of its own, so that they can be changed.
func newOwnHost(t *testing.T) *host {
	t.Helper()
	h := newHost(t)
	own := filepath.Join(h.dir, "snapshots")
	if err := os.Remove(own); err != nil {
		t.Fatal(err)
	}
	shared := filepath.Join(vmtest.StateDir(t), "snapshots")
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", "--sparse=always", shared, own).CombinedOutput(); err != nil {
		t.Fatalf("copy snapshots: %v: %s", err, out)
	}
	return h
}

// must runs a command that must succeed and returns what it printed.
func (h *host) must(args ...string) string {
	h.t.Helper()
	out, errOut, code := h.tine(args...)
	if code != 0 {
		h.t.Fatalf("tine %q: exit code %d: %s", args, code, errOut)
	}
	return strings.TrimSpace(out)
}

// list decodes what a command prints as JSON.
func list[T any](h *host, args ...string) (all []T) {
	h.t.Helper()
	if err := json.Unmarshal([]byte(h.must(append(args, "--json")...)), &all); err != nil {
		h.t.Fatalf("tine %q: %v", args, err)
	}
	return all
}

type listed struct {
	ID     string `json:"id"`
	Tag    string `json:"tag"`
	Status string `json:"status"`
	State  string `json:"state"`
}

// forkOf is a new sandbox from a snapshot.
func (h *host) forkOf(tag string) string {
	h.t.Helper()
	return list[listed](h, "fork", "--snapshot", tag)[0].ID
}

// TestBranchDailyPath goes the way of a user through the tree.
func TestBranchDailyPath(t *testing.T) {
	h := newOwnHost(t)
	h.serve()
	id := h.forkOf("py")
	h.must("exec", id, "--", "sh", "-c", "echo first > /root/at")
	h.must("eval", id, "answer = 41")
	h.must("branch", id, "--tag", "first")
	h.fails(4, "branch", id, "--tag", "first")
	h.must("eval", id, "answer += 1")
	h.must("exec", id, "--", "sh", "-c", "echo second > /root/at")
	kids := list[listed](h, "fork", "--snapshot", "first", "-n", "2")
	for _, kid := range kids {
		h.want("first\n", "exec", kid.ID, "--", "cat", "/root/at")
		h.want("41\n", "eval", kid.ID, "answer")
		h.want(kid.ID+"\n", "exec", kid.ID, "--", "hostname")
	}
	h.want("42\n", "eval", id, "answer")
	if diff := h.must("diff", "first", id); !strings.Contains(diff, "/root/at") {
		t.Errorf("diff: %q", diff)
	}
	h.must("branch", id, "--tag", "second", "--mode", "diff")
	h.must("rollback", id, "first")
	h.want("41\n", "eval", id, "answer")
	h.must("suspend", id)
	h.want("first\n", "exec", id, "--", "cat", "/root/at") // which resumes it
	tree := h.must("tree")
	for _, want := range []string{"py", "first", "second"} {
		if !strings.Contains(tree, want) {
			t.Errorf("the tree lacks %s: %s", want, tree)
		}
	}
	h.fails(4, "snapshot", "rm", "first")
	h.must("promote", "second", "best")
	h.want("42\n", "eval", h.forkOf("best"), "answer")
	h.must("snapshot", "compact", "second", "--to", "flat")
	h.want("42\n", "eval", h.forkOf("flat"), "answer")
	h.must("rm", "--all")
	h.must("snapshot", "rm", "--cascade", "first")
	h.must("snapshot", "gc")
	h.must("snapshot", "check")
}

// TestBranchKillMinusNine kills the daemon at one moment after another of all
// that changes the tree. What was told to be there is there, what is there is
// whole, and the sandbox has not noticed.
func TestBranchKillMinusNine(t *testing.T) {
	h := newOwnHost(t)
	daemon := h.serve()
	id := h.forkOf("py")
	h.must("exec", id, "--", "sh", "-c", "echo kept > /root/at; head -c 30000000 /dev/urandom > /root/noise; sha256sum /root/noise > /root/sum")
	h.must("branch", id, "--tag", "node")
	h.must("branch", id, "--tag", "spare")
	verbs := []func(i int) []string{
		func(i int) []string { return []string{"branch", id, "--tag", "b" + strconv.Itoa(i), "--mode", "live"} },
		func(i int) []string { return []string{"branch", id, "--tag", "b" + strconv.Itoa(i), "--mode", "diff"} },
		func(i int) []string { return []string{"branch", id, "--tag", "b" + strconv.Itoa(i), "--mode", "full"} },
		func(int) []string { return []string{"rollback", id, "node"} },
		func(int) []string { return []string{"suspend", id} },
		func(int) []string { return []string{"resume", id} },
		func(int) []string { return []string{"snapshot", "flatten", "node"} },
		func(i int) []string { return []string{"snapshot", "compact", "node", "--to", "c" + strconv.Itoa(i)} },
		func(i int) []string { return []string{"promote", "node", "p" + strconv.Itoa(i)} },
		func(int) []string { return []string{"snapshot", "rm", "spare"} },
	}
	for i, verbOf := range verbs {
		verb := verbOf(i)
		cmd := h.command(t.Context(), verb...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(10+(i*37)%400) * time.Millisecond)
		end(t, daemon, syscall.SIGKILL)
		_ = cmd.Wait() // it may have lost its daemon
		told := cmd.ProcessState.ExitCode() == 0
		daemon = h.serve()
		h.sound(id, fmt.Sprintf("round %d, %q, told %v", i, verb, told))
		if told && verb[0] == "branch" && !h.has(verb[3]) {
			t.Errorf("round %d: %s is lost", i, verb[3])
		}
	}
	h.must("rm", "--all")
	if got := sandboxes(h.dir); len(got) != 0 {
		t.Errorf("left in the state directory: %q", got)
	}
}

func (h *host) has(tag string) bool {
	h.t.Helper()
	return slices.ContainsFunc(list[listed](h, "snapshot", "ls"), func(s listed) bool { return s.Tag == tag && s.Status == "ready" })
}

// sound checks that the sandbox and all snapshots are as they should be.
func (h *host) sound(id, when string) {
	h.t.Helper()
	if _, errOut, code := h.tine("snapshot", "check"); code != 0 {
		h.t.Errorf("%s: check: %s", when, errOut)
	}
	for _, s := range list[listed](h, "snapshot", "ls") {
		if s.Status != "ready" {
			h.t.Errorf("%s: snapshot %s is %s", when, s.Tag, s.Status)
		}
	}
	running := 0
	for _, s := range list[listed](h, "ls") {
		if s.State == "running" {
			running++
		} else if s.State != "suspended" || s.ID != id {
			h.t.Errorf("%s: sandbox %s is %s", when, s.ID, s.State)
		}
	}
	if machines := h.machines(); len(machines) != running {
		h.t.Errorf("%s: %d machines for %d running sandboxes", when, len(machines), running)
	}
	staging, err := os.ReadDir(filepath.Join(h.dir, "snapshots", "staging"))
	if err != nil || len(staging) > 0 {
		h.t.Errorf("%s: left in staging: %v, %v", when, staging, err)
	}
	out, errOut, code := h.tine("exec", id, "--", "sh", "-c", "cat /root/at && sha256sum --quiet -c /root/sum && hostname")
	if code != 0 || out != "kept\n"+id+"\n" {
		h.t.Errorf("%s: the sandbox: exit code %d, %q, %q", when, code, out, errOut)
	}
}

// TestMachineKilledWhileBranched: its end is the sandbox's, and of nothing else.
func TestMachineKilledWhileBranched(t *testing.T) {
	h := newOwnHost(t)
	h.serve()
	for i := range 4 {
		id := h.forkOf("py")
		h.must("exec", id, "--", "sh", "-c", "head -c 30000000 /dev/urandom > /root/noise")
		pid := h.machines()
		tag, mode := "b"+strconv.Itoa(i), []string{"live", "diff"}[i%2]
		cmd := h.command(t.Context(), "branch", id, "--tag", tag, "--mode", mode)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		<-time.After(time.Duration(i*20) * time.Millisecond)
		for _, pid := range pid {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended
		}
		_ = cmd.Wait() // whether it was in time is not known
		if told := cmd.ProcessState.ExitCode() == 0; told != h.has(tag) {
			t.Errorf("round %d: told %v, and there is one: %v", i, told, h.has(tag))
		}
		h.must("rm", id)
		h.must("snapshot", "check")
	}
	if got := h.machines(); len(got) != 0 {
		t.Errorf("machines left: %v", got)
	}
}
