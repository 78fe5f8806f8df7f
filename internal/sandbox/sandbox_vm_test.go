//go:build vm

package sandbox_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmtest"
)

// lab is a Manager of real machines, on the shared snapshot.
type lab struct {
	*sandbox.Manager
	dir   string
	store *snapshot.Store // shared; tags are what the test adds to it
	tags  []string
}

// newLab makes an ephemeral Manager, at whose end nothing may be left.
func newLab(t *testing.T) *lab {
	dir := t.TempDir()
	l := openLab(t, dir, true)
	t.Cleanup(func() { l.end(t) })
	return l
}

func openLab(t *testing.T, dir string, ephemeral bool) *lab {
	t.Helper()
	store, _ := vmtest.Snapshot(t)
	m, err := sandbox.NewManager(within(t, time.Minute), sandbox.Config{
		Dir: dir, Engine: vmtest.Engine(t), Snapshots: store, Images: vmtest.Images(t), Ephemeral: ephemeral,
		Freezer: guestmem.Freezer{Command: []string{vmtest.Program(t, "tine"), "role", "twin"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return &lab{Manager: m, dir: dir, store: store}
}

// end closes the Manager and sees that it has left nothing.
func (l *lab) end(t *testing.T) {
	t.Helper()
	l.close(t)
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", e.Name())
	}
	if pids := l.processes(t); len(pids) > 0 {
		t.Errorf("processes left behind: %v", pids)
	}
	ctx := context.WithoutCancel(t.Context())
	for _, tag := range l.tags {
		if err := l.store.Remove(ctx, tag); err != nil {
			t.Error(err)
		}
	}
	if _, err := l.store.GC(ctx, false); err != nil {
		t.Error(err)
	}
}

func (l *lab) close(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// processes are the monitors of the sandboxes that have a directory in the lab's.
func (l *lab) processes(t *testing.T) []int {
	t.Helper()
	entries, err := os.ReadDir(l.dir)
	if err != nil {
		t.Fatal(err)
	}
	pids, err := linux.FindProcesses(func(_ int, argv []string) bool {
		return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return slices.Contains(argv, "tine-"+e.Name()) })
	})
	if err != nil {
		t.Fatal(err)
	}
	return pids
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func (l *lab) fork(t *testing.T, n int, change ...func(*sandbox.ForkRequest)) []string {
	t.Helper()
	req := sandbox.ForkRequest{Snapshot: vmtest.SnapshotTag, N: n}
	for _, f := range change {
		f(&req)
	}
	results, err := l.Fork(within(t, time.Minute), req)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, n)
	for i, r := range results {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		ids[i] = r.Sandbox.ID
	}
	return ids
}

// run runs a command to its end, whatever that is.
func (l *lab) run(ctx context.Context, id string, spec guest.ExecSpec) (res guest.Result, err error) {
	err = l.With(ctx, id, func(ctx context.Context, c *guest.Client) (err error) {
		res, err = c.Run(ctx, spec, nil, 1<<20)
		return err
	})
	return res, err
}

// sh runs a command line that must succeed.
func (l *lab) sh(t *testing.T, id, line string) string {
	t.Helper()
	res, err := l.run(within(t, time.Minute), id, guest.ExecSpec{Argv: []string{"/bin/bash", "-c", line}})
	if err != nil || res.Exit.Code != 0 {
		t.Fatalf("%s: %v, exit %+v: %s", line, err, res.Exit, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// start runs a command line in the background; what becomes of it is no
// concern.
func (l *lab) start(t *testing.T, id, line string) {
	t.Helper()
	err := l.With(within(t, time.Minute), id, func(ctx context.Context, c *guest.Client) error {
		p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"/bin/bash", "-c", line}, Background: true})
		if err != nil {
			return err
		}
		p.Detach()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (l *lab) eval(t *testing.T, id, code string) string {
	t.Helper()
	var res guest.EvalResult
	err := l.With(within(t, time.Minute), id, func(ctx context.Context, c *guest.Client) (err error) {
		res, err = c.Eval(ctx, guest.EvalRequest{Code: code})
		return err
	})
	if err != nil || res.Error != nil {
		t.Fatalf("%s: %v, %+v", code, err, res.Error)
	}
	return res.Value
}

func (l *lab) ping(ctx context.Context, id string) error {
	return l.With(ctx, id, func(ctx context.Context, c *guest.Client) error {
		_, err := c.Ping(ctx)
		return err
	})
}

// well checks that sandboxes answer.
func (l *lab) well(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := l.ping(within(t, 20*time.Second), id); err != nil {
			t.Errorf("sandbox %s is not well: %v", id, err)
		}
	}
}

// wellOrDead waits until the sandbox either answers or is listed as dead.
func (l *lab) wellOrDead(t *testing.T, id string) {
	t.Helper()
	err := l.ping(within(t, 40*time.Second), id)
	info, getErr := l.Get(id)
	if getErr != nil {
		t.Fatal(getErr)
	}
	t.Logf("ping: %v; state %s %s", err, info.State, info.Reason)
	if err != nil && info.State != sandbox.Dead {
		t.Errorf("sandbox %s neither answers nor is it dead: %v", id, err)
	}
}

// dead waits until the sandbox is listed as dead, and returns why.
func (l *lab) dead(t *testing.T, id string) string {
	t.Helper()
	var info sandbox.Info
	until(t, "sandbox "+id+" to be dead", func() bool {
		var err error
		if info, err = l.Get(id); err != nil {
			t.Fatal(err)
		}
		return info.State == sandbox.Dead
	})
	if info.Reason == "" {
		t.Error("no reason")
	}
	if err := l.ping(within(t, time.Minute), id); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("ping of a dead sandbox: %v, want ErrConflict", err)
	}
	return info.Reason
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(30 * time.Second)
	defer late.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-late.C:
			t.Fatalf("in vain waited for %s", what)
		}
	}
}

// TestVMUniqueness: nothing that must differ between forks is the same, those
// from the pool included.
func TestVMUniqueness(t *testing.T) {
	l := newLab(t)
	if err := l.SetPool(within(t, time.Minute), vmtest.SnapshotTag, 2); err != nil {
		t.Fatal(err)
	}
	until(t, "2 parked", func() bool { n, _ := l.Pool(vmtest.SnapshotTag); return n == 2 })
	ids := l.fork(t, 4)
	if err := l.SetPool(within(t, time.Minute), vmtest.SnapshotTag, 0); err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(id string) string{
		"hostname":   func(id string) string { return l.sh(t, id, "cat /proc/sys/kernel/hostname") },
		"machine-id": func(id string) string { return l.sh(t, id, "cat /etc/machine-id") },
		"boot-id":    func(id string) string { return l.sh(t, id, "cat /proc/sys/kernel/random/boot_id") },
		"urandom":    func(id string) string { return l.sh(t, id, "od -An -tx1 -N16 /dev/urandom") },
		"random":     func(id string) string { return l.eval(t, id, "random.random()") },
		"uuid":       func(id string) string { return l.eval(t, id, "uuid.uuid4().hex") },
		"ssl":        func(id string) string { return l.eval(t, id, "ssl.RAND_bytes(16).hex()") },
		"os-urandom": func(id string) string { return l.eval(t, id, "os.urandom(16).hex()") },
	} {
		seen := map[string]string{}
		for _, id := range ids {
			value := f(id)
			if other := seen[value]; other != "" || value == "" {
				t.Errorf("%s of %s and %s is %q", name, id, other, value)
			}
			seen[value] = id
		}
	}
	for _, id := range ids {
		if got := l.sh(t, id, "hostname"); got != id {
			t.Errorf("hostname of %s is %q", id, got)
		}
		before := time.Now()
		text := l.eval(t, id, "time.time()")
		seconds, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		clock := time.Unix(0, int64(seconds*1e9))
		if clock.Before(before.Add(-2*time.Second)) || clock.After(time.Now().Add(2*time.Second)) {
			t.Errorf("the clock of %s is off by %s", id, time.Since(clock))
		}
	}
}

func TestVMIsolation(t *testing.T) {
	l := newLab(t)
	ids := l.fork(t, 3)
	for i, id := range ids {
		// The interpreter is the template's: random is imported there.
		if got := l.eval(t, id, "random.__name__"); got != "'random'" && got != "random" {
			t.Errorf("the template's imports: %s", got)
		}
		l.eval(t, id, fmt.Sprintf("mine = %d; json.shared = mine", i))
		l.sh(t, id, fmt.Sprintf("echo %d > /root/mine; echo %d >> /etc/hosts", i, i))
	}
	for i, id := range ids {
		if got := l.eval(t, id, "mine, json.shared"); got != fmt.Sprintf("(%d, %d)", i, i) {
			t.Errorf("interpreter of fork %d has %s", i, got)
		}
		if got := l.sh(t, id, "cat /root/mine; tail -n 1 /etc/hosts"); got != fmt.Sprintf("%d\n%d", i, i) {
			t.Errorf("files of fork %d hold %q", i, got)
		}
		private, shared, err := l.Memory(id)
		if err != nil || private <= 0 || shared <= 0 {
			t.Errorf("Memory: %d, %d, %v", private, shared, err)
		}
	}
}

func TestVMExec(t *testing.T) {
	l := newLab(t)
	id := l.fork(t, 1)[0]
	for name, tt := range map[string]struct {
		spec   guest.ExecSpec
		stdout string
		exit   guest.Exit
	}{
		"environment": {spec: guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "echo $A $HOME"}, Env: []string{"A=b c"}}, stdout: "b c /root\n"},
		"user":        {spec: guest.ExecSpec{Argv: []string{"id", "-un"}, User: "nobody"}, stdout: "nobody\n"},
		"directory":   {spec: guest.ExecSpec{Argv: []string{"pwd"}, Dir: "/usr/lib"}, stdout: "/usr/lib\n"},
		"exit-status": {spec: guest.ExecSpec{Argv: []string{"sh", "-c", "exit 42"}}, exit: guest.Exit{Code: 42}},
		"signal":      {spec: guest.ExecSpec{Argv: []string{"sh", "-c", "kill -9 $$"}}, exit: guest.Exit{Signal: 9}},
		"timeout":     {spec: guest.ExecSpec{Argv: []string{"sleep", "100"}, Timeout: 200 * time.Millisecond}, exit: guest.Exit{TimedOut: true}},
		"terminal":    {spec: guest.ExecSpec{Argv: []string{"sh", "-c", "test -t 0 && stty size"}, PTY: true, Rows: 11, Cols: 33}, stdout: "11 33\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			res, err := l.run(within(t, time.Minute), id, tt.spec)
			if err != nil {
				t.Fatal(err)
			}
			if string(res.Stdout) != tt.stdout {
				t.Errorf("stdout %q, want %q; stderr %q", res.Stdout, tt.stdout, res.Stderr)
			}
			if tt.exit.TimedOut != res.Exit.TimedOut || !tt.exit.TimedOut && (tt.exit.Signal != res.Exit.Signal || tt.exit.Signal == 0 && tt.exit.Code != res.Exit.Code) {
				t.Errorf("exit %+v, want %+v", res.Exit, tt.exit)
			}
		})
	}
	if _, err := l.run(within(t, time.Minute), id, guest.ExecSpec{Argv: []string{"no-such-command"}}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a command that does not exist: %v, want ErrNotFound", err)
	}
}

func TestVMTimeToLive(t *testing.T) {
	l := newLab(t)
	l.fork(t, 1, func(r *sandbox.ForkRequest) { r.IdleTTL = 300 * time.Millisecond })
	l.fork(t, 1, func(r *sandbox.ForkRequest) { r.Lifetime = 300 * time.Millisecond })
	forever := l.fork(t, 1)[0]
	until(t, "both to go", func() bool { return len(l.List()) == 1 })
	l.well(t, forever)
}

func TestVMDeaths(t *testing.T) {
	l := newLab(t)
	ids := l.fork(t, 5)
	info, err := l.Get(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if why := l.dead(t, ids[0]); !strings.Contains(why, "killed") {
		t.Errorf("the monitor was killed, and the reason is %q", why)
	}
	for i, line := range []string{
		"echo b > /proc/sysrq-trigger", // restarts
		"echo c > /proc/sysrq-trigger", // panics
	} {
		_, err := l.run(within(t, 20*time.Second), ids[i+1], guest.ExecSpec{Argv: []string{"/bin/sh", "-c", line + "; sleep 100"}})
		t.Logf("%s: %v", line, err)
		if err == nil {
			t.Errorf("%s: no error", line)
		}
		l.dead(t, ids[i+1])
	}
	powerOff := func(ctx context.Context, c *guest.Client) error { return c.PowerOff(ctx) }
	if err := l.With(within(t, 20*time.Second), ids[3], powerOff); err != nil {
		t.Errorf("power off: %v", err)
	}
	if why := l.dead(t, ids[3]); why != "the guest powered off or restarted" {
		t.Errorf("the guest powered off, and the reason is %q", why)
	}
	l.well(t, ids[4])
	for _, id := range ids {
		if err := l.Kill(within(t, time.Minute), id); err != nil {
			t.Error(err)
		}
	}
}

func TestVMForkBomb(t *testing.T) {
	l := newLab(t)
	ids := l.fork(t, 2)
	l.start(t, ids[0], "bomb() { bomb | bomb & }; bomb; sleep 100")
	for range 5 { // while it grows
		start := time.Now()
		l.well(t, ids[1])
		t.Logf("the sibling answers after %s", time.Since(start))
		l.wellOrDead(t, ids[0])
		<-time.After(time.Second)
	}
	_, err := l.run(within(t, 2*time.Second), ids[0], guest.ExecSpec{Argv: []string{"true"}})
	t.Logf("a command in the bombed sandbox: %v", err)
}

func TestVMMemoryHogs(t *testing.T) {
	l := newLab(t)
	for name, argv := range map[string][]string{
		"python": {"python3", "-c", "a = bytearray(10**10)"},
		"pages":  {"python3", "-c", "a = [bytearray(1 << 20) for i in range(10000)]"},
		"tail":   {"tail", "/dev/zero"},
		"tmpfs":  {"dd", "if=/dev/zero", "of=/tmp/big", "bs=1M"},
	} {
		t.Run(name, func(t *testing.T) {
			ids := l.fork(t, 2)
			res, err := l.run(within(t, time.Minute), ids[0], guest.ExecSpec{Argv: argv})
			t.Logf("exit %+v, %v: %.300s", res.Exit, err, res.Stderr)
			if err == nil && res.Exit.Code == 0 && res.Exit.Signal == 0 {
				t.Error("the hog was content")
			}
			l.wellOrDead(t, ids[0])
			l.well(t, ids[1])
			if got := l.sh(t, ids[1], "echo fine"); got != "fine" {
				t.Errorf("the sibling says %q", got)
			}
		})
	}
}

// TestVMCanceled: ctrl-C at any moment leaves nothing.
func TestVMCanceled(t *testing.T) {
	l := newLab(t)
	for ms := 1; ms <= 128; ms *= 2 {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(ms)*time.Millisecond, context.Canceled)
		results, err := l.Fork(ctx, sandbox.ForkRequest{Snapshot: vmtest.SnapshotTag, N: 2, AllOrNothing: true})
		cancel()
		made := 0
		for _, r := range results {
			if r.Err == nil {
				made++
			}
		}
		t.Logf("after %d ms: %d made, %v", ms, made, err)
		if n := len(l.List()); n != made {
			t.Errorf("%d made, %d listed", made, n)
		}
		for _, info := range l.List() {
			if err := l.Kill(within(t, time.Minute), info.ID); err != nil {
				t.Error(err)
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	_, err := l.CreateSnapshot(ctx, sandbox.SnapshotRequest{Tag: "canceled", Image: vmtest.Image(t).Digest})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("CreateSnapshot: %v, want the context's error", err)
	}
	if _, err := l.Snapshots.Resolve("canceled"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("Resolve: %v, want ErrNotFound", err)
	}
	if left, err := filepath.Glob(filepath.Join(vmtest.StateDir(t), "snapshots", "staging", "canceled*")); err != nil || len(left) > 0 {
		t.Errorf("left in staging: %v, %v", left, err)
	}
}

// TestVMFlood: what a guest writes without end is cut, and costs the host
// nothing.
func TestVMFlood(t *testing.T) {
	l := newLab(t)
	id := l.fork(t, 1)[0]
	before := heap()
	res, err := l.run(within(t, time.Minute), id, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "yes | head -c 10G"}})
	if err != nil || !res.Truncated || len(res.Stdout) != 1<<20 {
		t.Errorf("%d bytes, truncated %v, %v", len(res.Stdout), res.Truncated, err)
	}
	// One whose reader does not read.
	err = l.With(within(t, time.Minute), id, func(ctx context.Context, c *guest.Client) error {
		p, execErr := c.Exec(ctx, guest.ExecSpec{Argv: []string{"yes"}})
		for i := 0; i < 50 && execErr == nil; i++ {
			_, execErr = c.Ping(ctx)
		}
		if p != nil {
			execErr = errors.Join(execErr, p.Close())
		}
		return execErr
	})
	if err != nil {
		t.Error(err)
	}
	if grown := heap() - before; grown > 32<<20 {
		t.Errorf("the host's memory has grown by %d MiB", grown>>20)
	}
	l.well(t, id)
	until(t, "the writers to be gone", func() bool { return l.sh(t, id, "cat /proc/[0-9]*/comm 2>/dev/null | grep -cx yes || true") == "0" })
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse)
}

// TestVMGarbage: root in a guest writes to the agent's own line.
func TestVMGarbage(t *testing.T) {
	l := newLab(t)
	ids := l.fork(t, 2)
	l.well(t, ids...)
	for name, line := range map[string]string{
		"device":             `for d in /dev/vport*; do head -c 100000 /dev/urandom > $d; done`,
		"agents-descriptors": `for f in /proc/1/fd/*; do case $(readlink $f) in /dev/vport*) head -c 1000000 /dev/urandom > $f;; esac; done`,
		"agents-memory":      `for f in /proc/1/fd/*; do head -c 1000 /dev/urandom > $f; done`,
		"signals":            `for s in USR1 USR2 PIPE ALRM CHLD STOP KILL HUP INT QUIT ILL TRAP ABRT BUS FPE SEGV TERM STKFLT SYS; do kill -$s 1; done`,
	} {
		t.Run(name, func(t *testing.T) {
			res, err := l.run(within(t, 10*time.Second), ids[0], guest.ExecSpec{Argv: []string{"/bin/bash", "-c", line}})
			t.Logf("%v, exit %+v, %.300q", err, res.Exit, res.Stderr)
			l.wellOrDead(t, ids[0])
			l.well(t, ids[1])
		})
	}
	if got := l.sh(t, ids[0], "echo fine"); got != "fine" {
		t.Errorf("after all the garbage: %q", got)
	}
}

// TestVMAdoption: a daemon that has stopped is followed by another.
func TestVMAdoption(t *testing.T) {
	dir := t.TempDir()
	first := openLab(t, dir, false)
	ids := first.fork(t, 2)
	first.sh(t, ids[0], "echo before > /root/file")
	first.eval(t, ids[0], "x = 7")
	first.close(t)
	if n := len(first.processes(t)); n != 2 {
		t.Errorf("%d machines run on, want 2", n)
	}
	second := openLab(t, dir, false)
	t.Cleanup(func() { second.end(t) })
	if got := second.sh(t, ids[0], "cat /root/file"); got != "before" {
		t.Errorf("file holds %q", got)
	}
	if got := second.eval(t, ids[0], "x"); got != "7" {
		t.Errorf("interpreter has %s", got)
	}
	info, err := second.Get(ids[1])
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(info.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second.dead(t, ids[1])
	for _, id := range ids {
		if err := second.Kill(within(t, time.Minute), id); err != nil {
			t.Error(err)
		}
	}
}

const daemonDir = "TINE_TEST_DAEMON_DIR"

// TestVMDaemonProcess is the daemon that TestVMDaemonIsKilled kills.
func TestVMDaemonProcess(t *testing.T) {
	dir := os.Getenv(daemonDir)
	if dir == "" {
		return
	}
	l := openLab(t, dir, false)
	if err := l.SetPool(t.Context(), vmtest.SnapshotTag, 2); err != nil {
		t.Fatal(err)
	}
	until(t, "2 parked", func() bool { n, _ := l.Pool(vmtest.SnapshotTag); return n == 2 })
	var wg sync.WaitGroup
	for _, id := range l.fork(t, 3, func(r *sandbox.ForkRequest) { r.NoPool = true }) {
		_, _ = fmt.Fprintln(os.Stderr, "sandbox", id)
	}
	for { // it is killed in the middle of this
		wg.Go(func() {
			results, err := l.Fork(t.Context(), sandbox.ForkRequest{Snapshot: vmtest.SnapshotTag, N: 1, NoPool: true})
			if err == nil && results[0].Err == nil {
				_ = l.Kill(t.Context(), results[0].Sandbox.ID)
			}
		})
		wg.Wait()
	}
}

// TestVMDaemonIsKilled: no sandbox that was handed out is lost, and no other
// machine is left.
func TestVMDaemonIsKilled(t *testing.T) {
	vmtest.Snapshot(t)
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestVMDaemonProcess$")
	cmd.Env = append(os.Environ(), daemonDir+"="+dir)
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for lines := bufio.NewScanner(errs); len(ids) < 3 && lines.Scan(); {
		if id, ok := strings.CutPrefix(lines.Text(), "sandbox "); ok {
			ids = append(ids, id)
		}
	}
	// Wherever it is by now.
	until(t, "a fork to be under way", func() bool {
		entries, err := os.ReadDir(dir)
		return err == nil && len(entries) > 5
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed

	l := openLab(t, dir, false)
	t.Cleanup(func() { l.end(t) })
	listed := map[string]bool{}
	for _, info := range l.List() {
		listed[info.ID] = true
	}
	for _, id := range ids {
		if !listed[id] {
			t.Errorf("sandbox %s is lost", id)
			continue
		}
		l.well(t, id) // another one may have been on its way out, and be dead
	}
	if len(ids) != 3 || len(listed) > 4 { // the last one may have been handed out
		t.Errorf("%d handed out, %d adopted", len(ids), len(listed))
	}
	if entries, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(entries) != len(listed) {
		t.Errorf("%d sandboxes, and in their directory %v, %v", len(listed), entries, err)
	}
	for id := range listed {
		if err := l.Kill(within(t, time.Minute), id); err != nil {
			t.Error(err)
		}
	}
}
