//go:build vm

package main_test

import (
	"bufio"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmtest"
)

// recite is a program that says all that should never be the same twice.
const recite = `
import os, random, sys, time, uuid
print(time.time(), time.monotonic(), random.random(), uuid.uuid4(), os.getpid(), hash("x"), os.urandom(8).hex())
print(sys.stdin.read(), open("/in").read())
open("/out", "w").write(str(time.time_ns()))
sys.exit(3)
`

// TestRecord makes a record, kills the daemon, and has the record verified by
// the next one, and not verified when a byte of it is another.
func TestRecord(t *testing.T) {
	vmtest.Deterministic(t, 1)
	h, dir := newHost(t), t.TempDir()
	in, out, bundle := filepath.Join(dir, "in"), filepath.Join(dir, "out"), filepath.Join(dir, "record.tar")
	if err := os.WriteFile(in, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	daemon := h.serve()
	run := func(seed string, more ...string) string {
		t.Helper()
		args := append([]string{"run", "-q", "--deterministic", "--snapshot", vmtest.DeterministicTag, "--seed", seed, "--file", "/in=" + in}, more...)
		stdout, stderr, code := h.tine(append(args, "--", "python3", "-c", recite)...)
		if code != 3 || stderr != "" || !strings.HasSuffix(stdout, "\n from a file\n") {
			t.Fatalf("seed %s: exit code %d, stdout %q, stderr %q", seed, code, stdout, stderr)
		}
		return stdout
	}
	first := run("7", "--collect", "/out="+out, "--record", bundle)
	if again := run("7", "--collect", "/out"); again != first {
		t.Errorf("it said\n%sand then\n%s", first, again)
	}
	if other := run("8"); other == first {
		t.Errorf("another seed: %s", other)
	}
	if data, err := os.ReadFile(out); err != nil || !strings.HasPrefix(string(data), "17356896") { // the first of 2025
		t.Errorf("collected %q, %v", data, err)
	}

	ordinary := func() string {
		stdout, stderr, code := h.tine("run", "-q", "--recorded", "--snapshot", vmtest.SnapshotTag, "--file", "/in="+in, "--", "python3", "-c", recite)
		if code != 3 {
			t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
		}
		return stdout
	}
	if one, two := ordinary(), ordinary(); one == two {
		t.Errorf("two ordinary runs said %s", one)
	}

	h.interrupted(func(run *os.Process) error { return run.Signal(os.Interrupt) })
	h.interrupted(func(*os.Process) error { end(t, daemon, syscall.SIGKILL); return nil })
	h.serve()
	h.want("verified\n", "verify", "-q", bundle)
	if stdout, _, _ := h.tine("record", "ls", "-q"); strings.Count(stdout, "\n") != 5 {
		t.Errorf("records: %q, want 5", stdout)
	}
	if stdout, stderr, code := h.tine("record", "check", "--contents"); code != 0 || !strings.HasPrefix(stdout, "ok: 5 records") {
		t.Errorf("check: exit code %d, %s%s", code, stdout, stderr)
	}
	data, err := os.ReadFile(bundle)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/3] ^= 1
	if err = os.WriteFile(bundle, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if stdout, stderr, code := h.tine("verify", bundle); code != 1 || !strings.HasPrefix(stdout, "mismatch") {
		t.Errorf("another byte: exit code %d, %s%s", code, stdout, stderr)
	}
}

// interrupted starts a run that does not end, does something to it when it has
// begun, and sees that nothing is left of it.
func (h *host) interrupted(do func(run *os.Process) error) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	cmd := h.command(ctx, "run", "-q", "--deterministic", "--snapshot", vmtest.DeterministicTag, "--", "sh", "-c", "echo begun; while :; do :; done")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		h.t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	if line, lineErr := bufio.NewReader(stdout).ReadString('\n'); line != "begun\n" {
		h.t.Errorf("the run says %q, %v", line, lineErr)
	}
	if err = do(cmd.Process); err != nil {
		h.t.Error(err)
	}
	if err = cmd.Wait(); err == nil {
		h.t.Error("a run that does not end has ended well")
	}
	deadline := time.Now().Add(20 * time.Second)
	for tick := time.Tick(20 * time.Millisecond); ; <-tick {
		left := h.runs()
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("machines of runs are left: %v", left)
		}
	}
}

// runs are the machines of runs of this state directory.
func (h *host) runs() []int {
	h.t.Helper()
	seats, err := filepath.Glob(filepath.Join(h.dir, "runs", "m-*"))
	if err != nil {
		h.t.Fatal(err)
	}
	pids, err := linux.FindProcesses(func(_ int, argv []string) bool {
		return slices.ContainsFunc(seats, func(seat string) bool {
			return slices.ContainsFunc(argv, func(arg string) bool { return strings.HasPrefix(arg, "tine-"+filepath.Base(seat)) })
		})
	})
	if err != nil {
		h.t.Fatal(err)
	}
	return pids
}
