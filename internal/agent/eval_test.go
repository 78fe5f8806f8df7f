package agent_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

func needPython(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("python3"); err != nil {
		t.Skip("needs python3")
	}
}

func eval(t *testing.T, c *guest.Client, code string) guest.EvalResult {
	t.Helper()
	r, err := c.Eval(within(t), guest.EvalRequest{Code: code})
	if err != nil {
		t.Fatalf("eval %q: %v", code, err)
	}
	return r
}

func TestEval(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	for _, tt := range []struct {
		name, code, value, json, stdout, stderr, err string
	}{
		{"expression", "1 + 1", "2", "2", "", "", ""},
		{"nothing", "", "", "", "", "", ""},
		{"statement", "x = 5", "", "", "", "", ""},
		{"state", "x * 2", "10", "10", "", "", ""},
		{"underscore", "_ + 1", "11", "11", "", "", ""},
		{"last-expression", "y = 1\nfor i in range(3): y *= 2\ny", "8", "8", "", "", ""},
		{"none", "None", "", "", "", "", ""},
		{"string", "'a\\n\\u00e9'", `'a\né'`, `"a\n\u00e9"`, "", "", ""},
		{"not-json", "object", "<class 'object'>", "", "", "", ""},
		{"nan", "float('nan')", "nan", "", "", "", ""},
		{"structure", "{'a': [1, None]}", "{'a': [1, None]}", `{"a": [1, null]}`, "", "", ""},
		{"output", "import sys; print('o'); print('e', file=sys.stderr); 3", "3", "3", "o\n", "e\n", ""},
		{"unflushed", "import os; sys.stdout.write('no newline')", "10", "10", "no newline", "", ""},
		{"raw-output", "os.write(1, b'raw'); None", "", "", "raw", "", ""},
		{"subprocess", "import subprocess; subprocess.run(['echo', 'child']).returncode", "0", "0", "child\n", "", ""},
		{"function", "def f(n): return 1 / n", "", "", "", "", ""},
		{"exception", "f(0)", "", "", "", "", "ZeroDivisionError"},
		{"syntax", "def", "", "", "", "", "SyntaxError"},
		{"exit", "import sys; sys.exit(3)", "", "", "", "", "SystemExit"},
		{"lives-on", "x", "5", "5", "", "", ""},
		{"main", "__name__", "'__main__'", `"__main__"`, "", "", ""},
		{"pickle", "import pickle\nclass C: pass\ntype(pickle.loads(pickle.dumps(C()))).__name__", "'C'", `"C"`, "", "", ""},
		{"bad-repr", "class R:\n  def __repr__(self): raise ValueError('no')\nR()", "", "", "", "", "ValueError"},
		{"stdin", "input()", "", "", "", "", "EOFError"},
		{"inherited-fds", "subprocess.run(['ls', '-l', '/proc/self/fd/'], capture_output=True).stdout.count(b'pipe') <= 3", "True", "true", "", "", ""},
		{"deep-recursion", "def r(): r()\nr()", "", "", "", "", "RecursionError"},
		{"surrogate", "'\\ud800'", `'\ud800'`, `"\ud800"`, "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := eval(t, c, tt.code)
			kind := ""
			if r.Error != nil {
				kind = r.Error.Type
			}
			if r.Value != tt.value || string(r.ValueJSON) != tt.json || string(r.Stdout) != tt.stdout || string(r.Stderr) != tt.stderr || kind != tt.err {
				t.Errorf("value %q, json %s, stdout %q, stderr %q, error %v", r.Value, r.ValueJSON, r.Stdout, r.Stderr, r.Error)
			}
		})
	}
}

func TestTracebackShowsUserCodeOnly(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	r := eval(t, c, "def outer():\n    inner()\ndef inner():\n    raise KeyError('k')\nouter()")
	if r.Error == nil {
		t.Fatal("no error")
	}
	tb := r.Error.Traceback
	if strings.Contains(tb, "warm.py") || !strings.Contains(tb, "raise KeyError('k')") || !strings.Contains(tb, "in outer") {
		t.Errorf("traceback is\n%s", tb)
	}
}

func TestEvalBigOutput(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	var counted counter
	r, err := c.Eval(within(t), guest.EvalRequest{Code: "for i in range(3000): print('x' * 1000)\n'y' * 3000000", Stdout: &counted})
	if err != nil || counted != 3_003_000 || len(r.Value) != 1<<20 {
		t.Errorf("%d bytes of output, %d of value, %v", counted, len(r.Value), err)
	}
	r = eval(t, c, "print('z' * 9000000)")
	if len(r.Stdout) != 8<<20 || !r.Truncated {
		t.Errorf("%d bytes of output, truncated %t", len(r.Stdout), r.Truncated)
	}
	if r = eval(t, c, "s = '"+strings.Repeat("c", 1<<20)+"'; len(s)"); r.Value != "1048576" {
		t.Errorf("long code: %+v", r)
	}
}

type counter int

func (c *counter) Write(p []byte) (int, error) {
	*c += counter(len(p))
	return len(p), nil
}

func TestEvalTimeout(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	eval(t, c, "kept = 1")
	r, err := c.Eval(within(t), guest.EvalRequest{Code: "import time; time.sleep(100)", Timeout: 300 * time.Millisecond})
	if err != nil || !r.TimedOut || r.Error == nil || r.Error.Type != "KeyboardInterrupt" {
		t.Fatalf("%+v, %v", r, err)
	}
	if r = eval(t, c, "kept"); r.Value != "1" || r.Restarted {
		t.Errorf("state after an interrupt: %+v", r)
	}
}

func TestEvalTimeoutStubborn(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	code := "import time\nwhile True:\n  try: time.sleep(100)\n  except KeyboardInterrupt: pass"
	r, err := c.Eval(within(t), guest.EvalRequest{Code: code, Timeout: 200 * time.Millisecond})
	if err != nil || !r.TimedOut || r.Error == nil || r.Error.Type != "Timeout" {
		t.Fatalf("%+v, %v", r, err)
	}
	if r = eval(t, c, "1"); r.Value != "1" || !r.Restarted {
		t.Errorf("after a restart: %+v", r)
	}
	if r = eval(t, c, "2"); r.Restarted {
		t.Errorf("restarted twice: %+v", r)
	}
}

func TestEvalCanceled(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	eval(t, c, "kept = 1")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.Eval(ctx, guest.EvalRequest{Code: "import time; time.sleep(100)"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	if r := eval(t, c, "kept"); r.Value != "1" || r.Restarted {
		t.Errorf("after cancel: %+v", r)
	}
}

func TestInterpreterCrash(t *testing.T) {
	t.Parallel()
	needPython(t)
	for name, tt := range map[string]struct{ code, want string }{
		"exit":      {"import os; os._exit(7)", "it ended with status 7"},
		"signal":    {"import os; os.kill(os.getpid(), 11)", "it was ended by signal 11"},
		"closed-fd": {"import os; os.close(4)", "it ended with status 1"},
		"too-long":  {"import os\nwhile True: os.write(4, b'x' * 65536)", "longer than"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newMachine(t).dial()
			eval(t, c, "x = 1")
			_, err := c.Eval(within(t), guest.EvalRequest{Code: tt.code})
			if err == nil || !strings.Contains(err.Error(), tt.want) || !errors.Is(err, errdef.ErrUnavailable) {
				t.Errorf("error is %v", err)
			}
			if r := eval(t, c, "1 + 1"); r.Value != "2" {
				t.Errorf("next: %+v", r)
			}
		})
	}
}

func TestStrayRepliesAreIgnored(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	for i := range 5 {
		eval(t, c, `import os; os.write(4, b'garbage\n{"id":99}\n{"id":98,\nno newline')`)
		if r := eval(t, c, "1 + "+strconv.Itoa(i)); r.Value != strconv.Itoa(1+i) || r.Restarted {
			t.Errorf("next: %+v", r)
		}
	}
}

func TestWarm(t *testing.T) {
	t.Parallel()
	needPython(t)
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	info, err := c.Warm(ctx, "python", nil, []string{"json", "random"})
	if err != nil || info.Language != "python" || info.PID == 0 || info.Version == "" {
		t.Fatalf("%+v, %v", info, err)
	}
	if list, lerr := c.Processes(ctx); lerr != nil || len(list) != 1 || list[0].Tag != "interpreter" || list[0].PID != info.PID {
		t.Errorf("%+v, %v", list, lerr)
	}
	if r := eval(t, c, "import sys; 'json' in sys.modules"); r.Value != "True" || r.Restarted {
		t.Errorf("%+v", r)
	}
	if _, err = c.Warm(ctx, "python", nil, []string{"no_such_module"}); !errors.Is(err, errdef.ErrInvalid) || !strings.Contains(err.Error(), "no_such_module") {
		t.Errorf("import: %v", err)
	}
	for name, tt := range map[string]struct {
		language string
		argv     []string
		want     error
	}{
		"unknown":     {"cobol", nil, errdef.ErrUnsupported},
		"no-program":  {"ruby", []string{"no-such-program"}, errdef.ErrNotFound},
		"not-a-one":   {"true", []string{"true"}, nil},
		"says-no":     {"sh", []string{"sh", "-c", "echo oops >&2; echo nonsense >&4; sleep 100"}, errdef.ErrUnavailable},
		"bad-name":    {"a/b", nil, errdef.ErrInvalid},
		"own-program": {"echo", []string{"sh", "-c", `echo '{"ready":true,"language":"echo","version":"1"}' >&4; cat <&3 >/dev/null`}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Warm(ctx, tt.language, tt.argv, nil)
			if tt.want != nil && !errors.Is(err, tt.want) || tt.language == "true" && err == nil || tt.language == "echo" && err != nil {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestForkReseeds(t *testing.T) {
	t.Parallel()
	needPython(t)
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	if _, err := c.Warm(ctx, "", nil, []string{"random", "uuid", "ssl", "tempfile"}); err != nil {
		t.Fatal(err)
	}
	eval(t, c, "random.seed(1)")
	if err := c.Identify(ctx, guest.NewIdentity("fork", "gen")); err != nil {
		t.Fatal(err)
	}
	after := eval(t, c, "random.random()").Value
	eval(t, c, "random.seed(1)")
	if plain := eval(t, c, "random.random()").Value; plain == after {
		t.Error("the generator was not reseeded")
	}
}

// TestEvalOutlivesItsSession: a host that goes away does not interrupt code.
func TestEvalOutlivesItsSession(t *testing.T) {
	t.Parallel()
	needPython(t)
	m := newMachine(t)
	old := m.dial()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = old.Eval(within(t), guest.EvalRequest{Code: "import os, time\nopen('started', 'w')\nwhile not os.path.exists('go'): time.sleep(.01)\nfinished = True"})
	}()
	eventually(t, "the evaluation to run", func() bool { _, err := os.Stat(m.path("started")); return err == nil })
	_ = old.Close()
	<-done
	c := m.dial()
	m.write("go", "", 0o644)
	if r := eval(t, c, "finished"); r.Value != "True" || r.Restarted {
		t.Errorf("%+v", r)
	}
}

func TestEvalsWaitTheirTurn(t *testing.T) {
	t.Parallel()
	needPython(t)
	c := newMachine(t).dial()
	eval(t, c, "n = 0")
	errs := make(chan error)
	for range 20 {
		go func() {
			_, err := c.Eval(within(t), guest.EvalRequest{Code: "old = n\nimport time\ntime.sleep(0.002)\nn = old + 1"})
			errs <- err
		}()
	}
	for range 20 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if r := eval(t, c, "n"); r.Value != "20" {
		t.Errorf("%+v", r)
	}
}
