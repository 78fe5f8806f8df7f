package agent_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

func TestExec(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	m.write("work/file", "", 0o644)
	m.write("plain", "", 0o644)
	m.write("nointerp", "#!/no/such/interpreter\n", 0o755)
	m.write("garbage", "\x00\x01\x02 not a program", 0o755)
	tests := map[string]struct {
		spec   guest.ExecSpec
		in     string
		stdout string
		stderr string
		code   int
		signal int
		err    string
		is     error
	}{
		"output":        {spec: sh("echo out; echo err >&2"), stdout: "out\n", stderr: "err\n"},
		"exit-code":     {spec: sh("exit 42"), code: 42},
		"signal":        {spec: sh("kill -TERM $$"), code: -1, signal: 15},
		"in-path":       {spec: guest.ExecSpec{Argv: []string{"echo", "hi"}}, stdout: "hi\n"},
		"no-stdin":      {spec: sh("cat"), stdout: ""},
		"stdin":         {spec: sh("cat"), in: "some input", stdout: "some input"},
		"stdin-ignored": {spec: sh("echo done"), in: strings.Repeat("x", 1<<20), stdout: "done\n"},
		"env":           {spec: guest.ExecSpec{Argv: sh("echo $A $FROM_IMAGE $LANG").Argv, Env: []string{"A=1", "LANG=C"}}, stdout: "1 yes C\n"},
		"env-replaced":  {spec: guest.ExecSpec{Argv: []string{"/usr/bin/env"}, Env: []string{"A=1"}, ReplaceEnv: true}, stdout: "A=1\n"},
		"dir":           {spec: guest.ExecSpec{Argv: sh("pwd").Argv, Dir: "/"}, stdout: "/\n"},
		"relative-dir":  {spec: guest.ExecSpec{Argv: []string{"ls"}, Dir: "work"}, stdout: "file\n"},
		"home":          {spec: sh("pwd"), stdout: m.dir + "\n"},
		"new-session":   {spec: sh("test $(cut -d' ' -f6 /proc/self/stat) = $$ && echo leader"), stdout: "leader\n"},
		"nope":          {spec: guest.ExecSpec{Argv: []string{"nope"}}, err: "exec nope: no such file or directory in $PATH", is: errdef.ErrNotFound},
		"nope-path":     {spec: guest.ExecSpec{Argv: []string{"/nope"}}, err: "exec /nope: no such file or directory", is: errdef.ErrNotFound},
		"no-dir":        {spec: guest.ExecSpec{Argv: sh("").Argv, Dir: "/nope"}, err: "working directory /nope: no such directory", is: errdef.ErrNotFound},
		"not-exec":      {spec: guest.ExecSpec{Argv: []string{"./plain"}}, err: "exec ./plain: permission denied", is: errdef.ErrDenied},
		"directory":     {spec: guest.ExecSpec{Argv: []string{"/"}}, err: "is a directory", is: errdef.ErrDenied},
		"no-interp":     {spec: guest.ExecSpec{Argv: []string{"./nointerp"}}, err: "interpreter does not exist", is: errdef.ErrNotFound},
		"not-a-program": {spec: guest.ExecSpec{Argv: []string{"./garbage"}}, err: "exec format error", is: errdef.ErrInvalid},
		"empty":         {spec: guest.ExecSpec{}, err: "argv is empty", is: errdef.ErrInvalid},
		"zero-byte":     {spec: guest.ExecSpec{Argv: []string{"a\x00b"}}, err: "zero byte", is: errdef.ErrInvalid},
		"no-user":       {spec: guest.ExecSpec{Argv: []string{"true"}, User: "nosuchuser"}, err: "user nosuchuser", is: errdef.ErrNotFound},
		"long-request":  {spec: guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "echo ${#A}"}, Env: []string{"A=" + strings.Repeat("x", 100_000)}}, stdout: "100000\n"},
		"too-long":      {spec: guest.ExecSpec{Argv: []string{"echo", strings.Repeat("x", 1<<20)}}, err: "too long", is: errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var in io.Reader
			if tt.in != "" {
				in = strings.NewReader(tt.in)
			}
			r, err := c.Run(within(t), tt.spec, in, 1<<20)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !errors.Is(err, tt.is) {
					t.Fatalf("error is %v (%s), want %q", err, errdef.Code(err), tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if string(r.Stdout) != tt.stdout || string(r.Stderr) != tt.stderr || r.Exit.Code != tt.code || r.Exit.Signal != tt.signal {
				t.Errorf("stdout %q, stderr %q, exit %+v", r.Stdout, r.Stderr, r.Exit)
			}
		})
	}
}

func TestExecAsUser(t *testing.T) {
	t.Parallel()
	asRoot(t)
	c := newMachine(t).dial()
	for name, tt := range map[string]struct{ user, want string }{
		"name":       {"nobody", "65534:65534"},
		"uid":        {"12345", "12345:12345"},
		"with-group": {"nobody:0", "65534:0"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, err := c.Run(within(t), guest.ExecSpec{Argv: sh("echo $(id -u):$(id -g)").Argv, User: tt.user, Dir: "/"}, nil, 1000)
			if err != nil || strings.TrimSpace(string(r.Stdout)) != tt.want {
				t.Errorf("%q %q, %v", r.Stdout, r.Stderr, err)
			}
		})
	}
}

func TestOutputLimit(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	r, err := c.Run(within(t), sh("echo $$ > pid; exec yes"), nil, 100_000)
	if err != nil || !r.Truncated || len(r.Stdout) != 100_000 || r.Exit.Signal != 9 {
		t.Errorf("%d bytes, %+v, %v", len(r.Stdout), r.Exit, err)
	}
	gone(t, m.read("pid"))
}

// gone waits until a process does not exist.
func gone(t *testing.T, pid string) {
	t.Helper()
	id, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the end of process "+pid, func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", id))
		return err != nil || bytes.Contains(stat, []byte(") Z "))
	})
}

func TestTimeoutKillsGrandchildren(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"same-group":  "sleep 100 & echo $! > pid; wait",
		"other-group": "set -m; sleep 100 & echo $! > pid; wait",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			spec := sh(script)
			spec.Timeout = 300 * time.Millisecond
			r, err := m.dial().Run(within(t), spec, nil, 1000)
			if err != nil || !r.Exit.TimedOut || r.Exit.Signal != 9 {
				t.Fatalf("%+v, %v", r, err)
			}
			gone(t, m.read("pid"))
		})
	}
}

func TestCancelKills(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("changed my mind")
	p, err := m.dial().Exec(within(t), sh("echo $$ > pid; echo; sleep 100"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = p.Next(within(t)); err != nil {
		t.Fatal(err)
	}
	cancel(cause)
	if _, err = p.Wait(ctx); !errors.Is(err, cause) {
		t.Errorf("wait: %v", err)
	}
	_ = p.Close()
	gone(t, m.read("pid"))
}

func TestPipeHeldByGrandchild(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	begin := time.Now()
	r, err := m.dial().Run(within(t), sh("(sleep 1; echo late; echo alive > still; exec sleep 100) & echo $! > pid; echo first"), nil, 1000)
	if err != nil || string(r.Stdout) != "first\n" {
		t.Fatalf("%q, %v", r.Stdout, err)
	}
	if took := time.Since(begin); took > 900*time.Millisecond {
		t.Errorf("took %s", took)
	}
	eventually(t, "the grandchild to write without dying", func() bool { _, err := os.Stat(m.path("still")); return err == nil })
	pid, _ := strconv.Atoi(m.read("pid"))
	_ = syscall.Kill(pid, syscall.SIGKILL)
}

// TestBigOutput sends 30 MB to a reader that takes its time, with memory
// bounded on both sides.
func TestBigOutput(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	p, err := c.Exec(ctx, sh("head -c 30000000 /dev/zero"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	sum, total := sha256.New(), 0
	var most uint64
	for {
		out, nerr := p.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if out.Exit != nil {
			break
		}
		if total/1_000_000 != (total+len(out.Data))/1_000_000 {
			time.Sleep(10 * time.Millisecond) // the slow reader
			var mem runtime.MemStats
			runtime.ReadMemStats(&mem)
			most = max(most, mem.HeapInuse)
		}
		total += len(out.Data)
		sum.Write(out.Data)
	}
	want := sha256.Sum256(make([]byte, 30_000_000))
	if total != 30_000_000 || !bytes.Equal(sum.Sum(nil), want[:]) {
		t.Errorf("%d bytes came", total)
	}
	if most > 100<<20 {
		t.Errorf("%d MiB of heap", most>>20)
	}
}

func TestSlowReaderGetsAllAfterExit(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	p, err := c.Exec(ctx, sh("head -c 330000 /dev/zero"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	// The process ends with some 64 KiB in its pipe, which nobody reads for
	// longer than the agent waits for output of others.
	time.Sleep(600 * time.Millisecond)
	total := 0
	for {
		out, nerr := p.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if out.Exit != nil {
			break
		}
		total += len(out.Data)
	}
	if total != 330_000 {
		t.Errorf("%d bytes", total)
	}
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	spec := sh(`stty -echo; stty size; read line; echo "got $line"; stty size; echo $TERM; tty >/dev/null && echo terminal`)
	spec.PTY, spec.Rows, spec.Cols = true, 30, 100
	p, err := c.Exec(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	var text string
	for {
		out, nerr := p.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if out.Exit != nil {
			break
		}
		text += string(out.Data)
		if text == "30 100\r\n" {
			if err = p.Resize(ctx, 40, 120); err != nil {
				t.Fatal(err)
			}
			if _, err = io.WriteString(p.Stdin(), "hello\n"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if text != "30 100\r\ngot hello\r\n40 120\r\nxterm-256color\r\nterminal\r\n" {
		t.Errorf("terminal shows %q", text)
	}
	if err = c.Resize(ctx, 1<<30, 1, 1); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("resize of nothing: %v", err)
	}
}

func TestProcessesAndSignals(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"sleep", "100"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	list, err := c.Processes(ctx)
	if err != nil || len(list) != 1 {
		t.Fatalf("%+v, %v", list, err)
	}
	if got := list[0]; got.PID != p.PID() || got.Argv[0] != "sleep" || !got.Running || !got.Attached || got.User != "root" {
		t.Errorf("%+v", got)
	}
	if err = c.Resize(ctx, p.PID(), 10, 10); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("resize without a terminal: %v", err)
	}
	if err = p.Signal(ctx, int(syscall.SIGINT)); err != nil {
		t.Fatal(err)
	}
	if exit, werr := p.Wait(ctx); werr != nil || exit.Signal != int(syscall.SIGINT) {
		t.Errorf("%+v, %v", exit, werr)
	}
	if err = p.Signal(ctx, 9); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("signal after the end: %v", err)
	}
	if list, err = c.Processes(ctx); err != nil || len(list) != 0 {
		t.Errorf("%+v, %v", list, err)
	}
}

// TestAttachAfterReset: a new session on the same link leaves processes alone,
// keeps what they write meanwhile, and can attach to them.
func TestAttachAfterReset(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	ctx := within(t)
	if err := syscall.Mkfifo(m.path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	old := m.dial()
	script := "echo one; read a < fifo; echo two $a; read b; echo three $b >&2; exit 5"
	p, err := old.Exec(ctx, guest.ExecSpec{Argv: sh(script).Argv, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	if out, nerr := p.Next(ctx); nerr != nil || string(out.Data) != "one\n" {
		t.Fatalf("%q %v", out.Data, nerr)
	}
	_ = old.Close()
	c := m.dial()
	alone(t, c)
	if err = os.WriteFile(m.path("fifo"), []byte("A\n"), 0); err != nil { // it opens when the process reads
		t.Fatal(err)
	}
	again, err := c.Attach(ctx, p.PID())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if _, err = io.WriteString(again.Stdin(), "B\n"); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr string
	for {
		out, nerr := again.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if out.Exit != nil {
			if out.Exit.Code != 5 {
				t.Errorf("exit %+v", out.Exit)
			}
			break
		}
		if out.Channel == guest.Stderr {
			stderr += string(out.Data)
		} else {
			stdout += string(out.Data)
		}
	}
	if stdout != "two A\n" || stderr != "three B\n" {
		t.Errorf("stdout %q, stderr %q", stdout, stderr)
	}
	again, err = c.Attach(ctx, p.PID())
	if err != nil {
		t.Fatalf("attach after the end was told: %v", err)
	}
	if exit, werr := again.Wait(ctx); werr != nil || exit.Code != 5 {
		t.Errorf("%+v, %v", exit, werr)
	}
	if _, err = c.Attach(ctx, 1); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("attach to no process of the agent's: %v", err)
	}
}

func TestDetachedOutputIsBounded(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	ctx := within(t)
	c := m.dial()
	if err := syscall.Mkfifo(m.path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := c.Exec(ctx, sh("read go < fifo; head -c 3000000 /dev/zero; echo the end"))
	if err != nil {
		t.Fatal(err)
	}
	p.Detach()
	alone(t, c)
	if err = os.WriteFile(m.path("fifo"), []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	var pid int
	eventually(t, "the detached process to end", func() bool {
		list, lerr := c.Processes(ctx)
		for _, info := range list {
			if info.PID == p.PID() && !info.Running {
				pid = info.PID
			}
		}
		return lerr == nil && pid != 0
	})
	again, err := c.Attach(ctx, pid)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		out, nerr := again.Next(ctx)
		if nerr != nil {
			t.Fatal(nerr)
		}
		if out.Exit != nil {
			break
		}
		got = append(got, out.Data...)
	}
	if len(got) > 256<<10 || len(got) < 128<<10 || !bytes.HasSuffix(got, []byte("the end\n")) {
		t.Errorf("%d bytes were kept", len(got))
	}
	if int64(len(got))+again.Dropped() != 3_000_008 {
		t.Errorf("%d kept and %d dropped", len(got), again.Dropped())
	}
}

// alone waits until the only process is attached to nobody.
func alone(t *testing.T, c *guest.Client) {
	t.Helper()
	eventually(t, "the process to be alone", func() bool {
		list, err := c.Processes(within(t))
		return err == nil && len(list) == 1 && !list[0].Attached && list[0].Running
	})
}

func TestSecondAttachTakesOver(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	first, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"cat"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.Attach(ctx, first.PID())
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if _, err = first.Next(ctx); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("first: %v", err)
	}
	if _, err = io.WriteString(second.Stdin(), "x"); err != nil {
		t.Fatal(err)
	}
	if out, err := second.Next(ctx); err != nil || string(out.Data) != "x" {
		t.Errorf("%q, %v", out.Data, err)
	}
}

func TestBackgroundSurvivesClose(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	spec := guest.ExecSpec{Argv: []string{"sleep", "100"}, Background: true}
	p, err := c.Exec(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	_ = p.Close()
	alone(t, c)
	if err = c.Signal(ctx, p.PID(), 9, true); err != nil {
		t.Error(err)
	}
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	c := newMachine(t).dial()
	ctx := within(t)
	results := make(chan error)
	for i := range 50 {
		go func() {
			r, err := c.Run(ctx, sh(fmt.Sprintf("echo %d", i)), nil, 100)
			if err == nil && string(r.Stdout) != fmt.Sprintf("%d\n", i) {
				err = fmt.Errorf("command %d wrote %q", i, r.Stdout)
			}
			results <- err
		}()
	}
	for range 50 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}
