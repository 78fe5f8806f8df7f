//go:build vm

package deterministic_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmtest"
)

// everything prints all that differs from one run to another on an ordinary
// machine.
const everything = `
import hashlib, os, random, subprocess, sys, tempfile, threading, time, uuid
print("wall", time.time_ns(), "monotonic", time.monotonic_ns(), "cpu", time.process_time_ns())
print("urandom", hashlib.sha256(open("/dev/urandom", "rb").read(1 << 20)).hexdigest())
print("random", random.random(), "uuid4", uuid.uuid4(), "uuid1", uuid.uuid1(), "hash", hash("x"), "id", id(object()))
print("pids", os.getpid(), os.getppid(), subprocess.run(["sh", "-c", "echo $$; ps 2>/dev/null; cat /proc/self/stat"], capture_output=True).stdout)
print("boot", open("/proc/sys/kernel/random/boot_id").read(), open("/proc/uptime").read(), open("/proc/loadavg").read())
race = []
def run(n):
    for i in range(300):
        race.append(n)
        if i % 7 == n % 7:
            time.sleep(0)
        if i % 50 == n:
            time.sleep(0.0001 * (n + 1))
threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print("race", hashlib.sha256(bytes(race)).hexdigest())
for i in range(500):
    open("/tmp/" + tempfile.mktemp(dir="") .lstrip("/") + str(i), "w").close()
print("tmp", hashlib.sha256(" ".join(os.listdir("/tmp")).encode()).hexdigest(), os.stat("/tmp").st_mtime_ns)
x = random.random()
for i in range(10000): x = 3.99 * x * (1 - x)
print("chaos", x)
print(open("/proc/interrupts").read(), open("/proc/meminfo").read(), open("/proc/stat").read(), open("/proc/vmstat").read())
print("maps", hashlib.sha256(open("/proc/self/maps", "rb").read()).hexdigest())
print("end", time.time_ns(), time.perf_counter_ns())
print("to stderr", time.time_ns(), file=sys.stderr)
open("/tmp/result", "w").write(str(uuid.uuid4()))
`

func sumOf(t *testing.T, out record.Output) string {
	t.Helper()
	out.Wall = 0
	data, err := json.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// TestSameEveryTime: by hand, more often: TINE_RUNS=20, and with the host busy.
func TestSameEveryTime(t *testing.T) {
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	runs, _ := strconv.Atoi(os.Getenv("TINE_RUNS"))
	runs = max(runs, 3)
	input := func(seed uint64) record.Input {
		return record.Input{
			Argv: []string{"python3", "-c", everything}, Seed: seed, Stdin: []byte("input\n"),
			Start: time.Date(2026, time.November, 21, 10, 11, 12, 131415, time.UTC), Collect: []string{"/tmp/result"},
		}
	}
	outs := make([]record.Output, runs+1)
	errs := make([]error, runs+1)
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() {
			seed := uint64(7)
			if i == runs {
				seed = 8
			}
			outs[i], errs[i] = r.Run(t.Context(), vmtest.DeterministicTag, input(seed), deterministic.Options{MemoryDigest: true})
		})
	}
	wg.Wait()
	for i, err := range errs {
		if err != nil {
			t.Fatalf("run %d: %v", i, err)
		}
	}
	first := outs[0]
	if first.Exit != 0 || !strings.HasPrefix(string(first.Stdout), "wall 179525587") || len(first.Files) != 1 {
		t.Fatalf("exit %d, files %v: %s %s", first.Exit, first.Files, first.Stdout, first.Stderr)
	}
	for i, out := range outs[1:runs] {
		if sumOf(t, out) != sumOf(t, first) {
			t.Errorf("run %d differs: %s", i+1, diff(first, out))
		}
	}
	if sumOf(t, outs[runs]) == sumOf(t, first) {
		t.Error("another seed, but the same outcome")
	}
	t.Logf("%d runs: %s, %s virtual, %s", runs, sumOf(t, first), first.Virtual, first.Wall)
}

// diff is where two outcomes differ first.
func diff(a, b record.Output) string {
	for name, pair := range map[string][2][]byte{"stdout": {a.Stdout, b.Stdout}, "stderr": {a.Stderr, b.Stderr}} {
		for i := range min(len(pair[0]), len(pair[1])) {
			if pair[0][i] != pair[1][i] {
				from := max(0, i-60)
				return fmt.Sprintf("%s at %d: %q, %q", name, i, pair[0][from:min(i+60, len(pair[0]))], pair[1][from:min(i+60, len(pair[1]))])
			}
		}
	}
	a.Stdout, a.Stderr, b.Stdout, b.Stderr = nil, nil, nil, nil
	return fmt.Sprintf("%+v, %+v", a, b)
}

// twice runs an input twice, at the same time, and fails unless the outcomes
// are the same.
func twice(t *testing.T, r *deterministic.Runner, in record.Input) record.Output {
	t.Helper()
	var outs [2]record.Output
	var errs [2]error
	var wg sync.WaitGroup
	for i := range outs {
		wg.Go(func() {
			outs[i], errs[i] = r.Run(t.Context(), vmtest.DeterministicTag, in, deterministic.Options{MemoryDigest: true})
		})
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	if sumOf(t, outs[0]) != sumOf(t, outs[1]) {
		t.Fatalf("two outcomes: %s", diff(outs[0], outs[1]))
	}
	return outs[0]
}

// TestHostile runs programs that would have it otherwise.
func TestHostile(t *testing.T) {
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	shell := func(line string) []string { return []string{"sh", "-c", line} }
	python := func(line string) []string { return []string{"python3", "-c", line} }
	for name, tt := range map[string]struct {
		argv    []string
		virtual time.Duration
		output  int64
		stdout  string // begins so
		failure string
		signal  string
		exit    int
	}{
		"waits for a time": {argv: python("import time\nend = time.time() + 0.3\nn = 0\nwhile time.time() < end: n += 1\nprint('ok', n)"), stdout: "ok "},
		"hammers timers": {argv: python(`
import signal, time
n = 0
def tick(*a):
    global n
    n += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
end = time.monotonic() + 0.3
while time.monotonic() < end: pass
signal.setitimer(signal.ITIMER_REAL, 0)
print("ok", n, time.monotonic_ns())`), stdout: "ok "},
		"uses all memory": {argv: python("x = []\nwhile True: x.append(bytearray(1 << 20))"), failure: "out of memory", signal: "SIGKILL", exit: -1},
		"forks for ever": {
			argv: python("import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.01)"), virtual: 500 * time.Millisecond,
			failure: "timed out", signal: "SIGKILL", exit: -1,
		},
		"leaves processes behind": {argv: shell("(while :; do echo x; done) & sleep 0.05; echo done >&2"), stdout: "x\n"},
		"stops the machine": {
			argv: python("import ctypes\nlibc = ctypes.CDLL(None)\nprint('ok', libc.iopl(3), libc.ioperm(0x505, 1, 1))"), stdout: "ok -1 -1",
		},
		"writes to the mailbox": {
			argv:   python("import os\ntry: os.open('/dev/mem', os.O_RDWR)\nexcept OSError as e: print('ok', e)"),
			stdout: "ok [Errno 1] Operation not permitted",
		},
		"never ends": {
			argv: shell("echo begun; while :; do :; done"), virtual: 200 * time.Millisecond,
			stdout: "begun\n", failure: "timed out", signal: "SIGKILL", exit: -1,
		},
		"never ends to write": {
			argv: []string{"yes", "0123456789"}, output: 100_003,
			stdout: "0123456789\n", failure: "output limit", signal: "SIGKILL", exit: -1,
		},
		"kills itself": {argv: shell("kill -SEGV $$"), signal: "SIGSEGV", exit: -1},
		"reads the time-stamp counter": {argv: python(`
import ctypes, mmap
m = mmap.mmap(-1, 4096, prot=7)
m.write(bytes.fromhex("0f3148c1e2204809d0c3")) # rdtsc; shl $32, rdx; or rdx, rax; ret
f = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(m)))
print("ok", [f() for i in range(100)])`), stdout: "ok "},
		"signals PID 1":  {argv: shell("kill -9 1; kill -SEGV 1; kill -TERM 1; sleep 0.01; echo ok"), stdout: "ok\n"},
		"closes its out": {argv: shell("exec >&- 2>&-; sleep 0.2; exit 5"), exit: 5},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := twice(t, r, record.Input{Argv: tt.argv, Limits: record.Limits{Virtual: tt.virtual, Output: tt.output}})
			got := []any{out.Failure, out.Signal, out.Exit}
			if diff := cmp.Diff([]any{tt.failure, tt.signal, tt.exit}, got); diff != "" || !strings.HasPrefix(string(out.Stdout), tt.stdout) {
				t.Errorf("%s%.200q %.200q", diff, out.Stdout, out.Stderr)
			}
			if tt.failure == "timed out" && out.Virtual != tt.virtual {
				t.Errorf("it took %s of %s", out.Virtual, tt.virtual)
			}
			if tt.output > 0 && int64(len(out.Stdout)) != tt.output {
				t.Errorf("%d bytes of output, %d are allowed", len(out.Stdout), tt.output)
			}
			t.Logf("%s virtual, %s", out.Virtual, out.Wall)
		})
	}
}

func TestInput(t *testing.T) {
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	big := bytes.Repeat([]byte("0123456789abcdef"), 3<<16) // 3 MiB: several letters
	sum := sha256.Sum256(big)
	var streamed bytes.Buffer
	out, err := r.Run(t.Context(), vmtest.DeterministicTag, record.Input{
		Argv: []string{"sh", "-c", `echo $V; pwd; stat -c %Y.%a in/big; sha256sum < in/big; sha256sum; cp in/big copy; chmod 640 copy; echo x >&2; exit 3`},
		Env:  []string{"V=value"}, Cwd: "/tmp", Stdin: big, Start: time.Unix(1234567890, 0),
		Files:   []record.File{{Path: "/tmp/in/big", Mode: 0o604, Data: big}, {Path: "/tmp/in/empty", Mode: 0o600}},
		Collect: []string{"nothing", "copy", "/tmp/in/empty", "/tmp"},
	}, deterministic.Options{Stdout: &streamed})
	if err != nil {
		t.Fatal(err)
	}
	text := hex.EncodeToString(sum[:]) + "  -\n"
	want := record.Output{
		Stdout: []byte("value\n/tmp\n1234567890.604\n" + text + text), Stderr: []byte("x\n"), Exit: 3,
		Files: []record.File{{Path: "copy", Mode: 0o640, Data: big}, {Path: "/tmp/in/empty", Mode: 0o600, Data: []byte{}}},
	}
	if diff := cmp.Diff(want, out, cmpopts.IgnoreFields(record.Output{}, "Virtual", "Wall"), cmp.Comparer(bytes.Equal)); diff != "" {
		t.Error(diff)
	}
	if !bytes.Equal(want.Stdout, streamed.Bytes()) {
		t.Errorf("%q was streamed", streamed.Bytes())
	}
	_, err = r.Run(t.Context(), vmtest.DeterministicTag, record.Input{
		Argv: []string{"true"}, Files: []record.File{{Path: "/etc/passwd/x", Data: big}},
	}, deterministic.Options{})
	if !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a file below a file: %v", err)
	}
	_, err = r.Run(t.Context(), vmtest.DeterministicTag, record.Input{
		Argv: []string{"sleep", "10000"}, Limits: record.Limits{Virtual: time.Hour, Wall: 100 * time.Millisecond},
	}, deterministic.Options{})
	if !errors.Is(err, errdef.ErrTimeout) {
		t.Errorf("an hour in 100 ms: %v", err)
	}
	_, err = r.Run(t.Context(), vmtest.DeterministicTag, record.Input{
		Argv: []string{"sh", "-c", "echo b > /proc/sysrq-trigger"},
	}, deterministic.Options{})
	if !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a machine that its guest ends: %v", err)
	}
}

func TestRemake(t *testing.T) {
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	again, err := r.Remake(t.Context(), vmtest.DeterministicTag)
	if err != nil {
		t.Fatal(err)
	}
	if m := again.Snapshot.Manifest; !again.SameMemory() {
		t.Errorf("another memory: %v, %v", again.Memory, m.Memory)
	}
	t.Logf("the state of the devices is the same: %v", again.SameDevice())
}

func TestTwin(t *testing.T) {
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	store, normal := vmtest.Snapshot(t)
	var twins [2]snapshot.Snapshot
	var errs [2]error
	var wg sync.WaitGroup
	for i := range twins {
		wg.Go(func() { twins[i], errs[i] = r.Twin(t.Context(), vmtest.SnapshotTag) })
	}
	wg.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Remove(context.WithoutCancel(t.Context()), twins[0].Tag); err != nil {
			t.Error(err)
		}
	})
	// The shared deterministic snapshot is of the same image and warm-up.
	same, err := store.Resolve(vmtest.DeterministicTag)
	if err != nil || same.Manifest.Memory != twins[0].Manifest.Memory {
		t.Errorf("%+v, %v: not the memory that was made before", same, err)
	}
	if twins[0].Digest != twins[1].Digest || twins[0].Tag != deterministic.TwinTag(normal.Digest) || !twins[0].Auto {
		t.Errorf("%+v, %+v", twins[0], twins[1])
	}
	same, err = r.Twin(t.Context(), twins[0].Tag)
	if err != nil || same.Digest != twins[0].Digest {
		t.Errorf("twin of a twin: %+v, %v", same, err)
	}
	if _, err := r.Run(t.Context(), vmtest.SnapshotTag, record.Input{Argv: []string{"true"}}, deterministic.Options{}); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("run in a normal snapshot: %v", err)
	}
}

// TestBigInput takes half a minute: TINE_BIG=1.
func TestBigInput(t *testing.T) {
	if os.Getenv("TINE_BIG") == "" {
		t.Skip("it is for by hand")
	}
	t.Parallel()
	r := vmtest.Deterministic(t, 2)
	big := bytes.Repeat([]byte("0123456789abcdef"), deterministic.MaxStdin/16)
	sum := sha256.Sum256(big)
	out := twice(t, r, record.Input{Argv: []string{"sha256sum"}, Stdin: big})
	if want := hex.EncodeToString(sum[:]) + "  -\n"; string(out.Stdout) != want {
		t.Errorf("%q", out.Stdout)
	}
	t.Logf("stdin: %s virtual, %s", out.Virtual, out.Wall)
	out = twice(t, r, record.Input{Argv: []string{"cat"}, Stdin: big, Limits: record.Limits{Output: deterministic.MaxStdin}})
	if !bytes.Equal(out.Stdout, big) {
		t.Error("another output")
	}
	t.Logf("stdin and stdout: %s virtual, %s", out.Virtual, out.Wall)
	out = twice(t, r, record.Input{
		Argv: []string{"cp", "/tmp/in", "/tmp/out"}, Files: []record.File{{Path: "/tmp/in", Mode: 0o600, Data: big[:32<<20]}}, Collect: []string{"/tmp/out"},
	})
	if len(out.Files) != 1 || !bytes.Equal(out.Files[0].Data, big[:32<<20]) {
		t.Errorf("%d files, %.500q", len(out.Files), out.Stderr)
	}
	t.Logf("32 MiB of files, there and back: %s virtual, %s", out.Virtual, out.Wall)
}
