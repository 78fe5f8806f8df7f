package forkd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
)

const spec = "../../api/openapi.yaml"

// ask sends what the SDK sends and returns what it reads.
func ask(t *testing.T, addr, line string) string {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err = io.WriteString(conn, line); err != nil {
		t.Fatal(err)
	}
	if err = conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	reply, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(reply)
}

// program is a run of the program.
type program struct {
	addr string
	stop context.CancelFunc
	code chan int
	errs *bytes.Buffer // to be read when it has ended
}

func start(t *testing.T, daemon string, args ...string) *program {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out, w := io.Pipe()
	p := &program{stop: cancel, code: make(chan int, 1), errs: &bytes.Buffer{}}
	go func() {
		p.code <- Run(ctx, Environment{Args: args, Stdout: w, Stderr: p.errs, Connect: connect, Getenv: env(map[string]string{
			"FORKD_URL": daemon, "FORKD_TARGET": "127.0.0.1:0",
		})})
		_ = w.Close()
	}()
	line, _ := bufio.NewReader(out).ReadString('\n')
	_, p.addr, _ = strings.Cut(strings.TrimSpace(line), " answers on ")
	return p
}

func (p *program) end(t *testing.T) {
	t.Helper()
	p.stop()
	if code := <-p.code; code != 0 {
		t.Errorf("exit code %d: %s", code, p.errs)
	}
}

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

// TestFork goes the way of the SDK, up to the end.
func TestFork(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	p := start(t, b.Serve(spec).URL, "fork", "--tag", "py", "-n", "1", "--settle-secs", "3600")
	boxes := b.List()
	if len(boxes) != 1 || boxes[0].SnapshotTag != "py" || boxes[0].ExpiresAt.IsZero() {
		t.Fatalf("sandboxes: %+v", boxes)
	}
	for _, tt := range []struct{ line, want string }{
		{`{"action":"exec","args":["sh","-c","echo out; echo err >&2; exit 3"],"timeout":10}` + "\n", `{"stdout":"out\n","stderr":"err\n","exit_code":3}`},
		{`{"action": "exec", "args": ["sh", "-c", "kill -9 $$"]}`, `{"stdout":"","stderr":"","exit_code":-9}`},
		{`{"action":"eval","code":"1+1"}` + "\n", `{"result":"2","exit_code":0}`},
		{`{"action":"frob"}`, `{"error":"unknown action: frob","exit_code":1}`},
		{"", ""},
		{"\n", ""},
	} {
		if got := strings.TrimSuffix(ask(t, p.addr, tt.line), "\n"); got != tt.want {
			t.Errorf("%q: %s, want %s", tt.line, got, tt.want)
		}
	}
	for _, line := range []string{
		`{"action":"exec","args":["sleep","60"],"timeout":0.1}`,
		`{"action":"exec","args":["/nope"]}`,
		`{"action":"exec","args":[]}`,
		`{"action":"exec","args":["true"],"timeout":-1}`,
		`{"action":"exec","args":"ls"}`,
		`{"action":"eval","code":""}`,
		`not json`,
		`[]`,
		"\xff",
	} {
		reply := ask(t, p.addr, line)
		var v map[string]any
		if err := json.Unmarshal([]byte(reply), &v); err != nil || v["error"] == "" || v["exit_code"] != 1.0 || v["stdout"] != nil {
			t.Errorf("%s: %s", line, reply)
		}
	}
	var pong map[string]any
	if err := json.Unmarshal([]byte(ask(t, p.addr, `{"action":"ping"}`)), &pong); err != nil || pong["pong"] != true || pong["numpy_version"] == "" {
		t.Errorf("ping: %v %v", pong, err)
	}
	p.end(t)
	if left := b.List(); len(left) != 0 {
		t.Errorf("left behind: %+v", left)
	}
	var d net.Dialer
	if conn, err := d.DialContext(t.Context(), "tcp", p.addr); err == nil {
		_ = conn.Close()
		t.Error("it answers still")
	}
}

// TestSettle ends by itself.
func TestSettle(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	p := start(t, b.Serve(spec).URL, "fork", "--tag", "py", "--settle-secs", "0")
	if code := <-p.code; code != 0 || len(b.List()) != 0 {
		t.Errorf("exit code %d, %s, sandboxes %v", code, p.errs, b.List())
	}
}

// TestBusy ends while it answers.
func TestBusy(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	p := start(t, b.Serve(spec).URL, "fork", "--tag", "py", "--settle-secs", "3600")
	var d net.Dialer
	for range 3 {
		conn, err := d.DialContext(t.Context(), "tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err = io.WriteString(conn, `{"action":"exec","args":["sleep","60"],"timeout":60}`+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	p.end(t)
}

func TestLongLine(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	p := start(t, b.Serve(spec).URL, "fork", "--tag", "py", "--settle-secs", "3600")
	defer p.end(t)
	got := ask(t, p.addr, `{"action":"eval","code":"`+strings.Repeat("x", 4*maxLine)+`"}`)
	if !strings.Contains(got, "longer than 1048576 bytes") {
		t.Errorf("got %q", got)
	}
}

// TestRefused is every way not to begin.
func TestRefused(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	server := b.Serve(spec).URL
	ln, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	for _, tt := range []struct {
		args   string
		target string
		code   int
		says   string
	}{
		{"", "", 2, "only command is fork"},
		{"ls", "", 2, "only command is fork"},
		{"fork", "", 2, "--tag is missing"},
		{"fork --tag py -n 2", "", 2, "one sandbox"},
		{"fork --tag py more", "", 2, "too many"},
		{"fork --tag py --frob", "", 2, "frob"},
		{"fork --tag py --settle-secs -1", "", 2, "out of range"},
		{"fork --tag py --settle-secs 9223372036854775807", "", 2, "out of range"},
		{"fork --tag py", "nowhere", 2, "FORKD_TARGET"},
		{"fork --tag py", "0.0.0.0:8888", 1, "others may reach"},
		{"fork --tag py", "example.com:8888", 1, "others may reach"},
		{"fork --tag py", ln.Addr().String(), 1, "127.0.0.1:8888"},
		{"fork --tag none", "127.0.0.1:0", 1, "not found"},
	} {
		var out, errs bytes.Buffer
		code := Run(t.Context(), Environment{Args: strings.Fields(tt.args), Stdout: &out, Stderr: &errs, Connect: connect, Getenv: env(map[string]string{
			"FORKD_URL": server, "FORKD_TARGET": tt.target,
		})})
		if code != tt.code || out.Len() != 0 || !strings.Contains(errs.String(), tt.says) {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q", tt.args, code, out.String(), errs.String())
		}
	}
	if left := b.List(); len(left) != 0 {
		t.Errorf("left behind: %+v", left)
	}
}

// TestNoDaemon says what to do.
func TestNoDaemon(t *testing.T) {
	t.Parallel()
	var errs bytes.Buffer
	code := Run(t.Context(), Environment{
		Args: []string{"fork", "--tag", "py"}, Stdout: io.Discard, Stderr: &errs, Connect: connect,
		Getenv: env(map[string]string{"FORKD_URL": "http://127.0.0.1:1", "FORKD_TARGET": "127.0.0.1:0"}),
	})
	if code != 1 || !strings.Contains(errs.String(), "tine serve") {
		t.Errorf("exit code %d, %q", code, errs.String())
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"--help", "-h", "help", "fork --help"} {
		var out, errs bytes.Buffer
		if code := Run(t.Context(), Environment{Args: strings.Fields(args), Stdout: &out, Stderr: &errs}); code != 0 || errs.Len() != 0 || out.String() != usage {
			t.Errorf("%s: exit code %d, %q", args, code, errs.String())
		}
	}
}

// connect makes a client as tine does.
func connect(getenv func(string) string) (*client.Client, error) {
	return client.New(client.Config{URL: getenv("TINE_URL"), Token: getenv("TINE_TOKEN")})
}

func TestVariables(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name             string
		vars             map[string]string
		url, token, file string
	}{
		{"none", nil, "", "", ""},
		{"forkd", map[string]string{"FORKD_URL": "u", "FORKD_TOKEN": "t"}, "u", "t", ""},
		{"tine first", map[string]string{"FORKD_URL": "u", "FORKD_TOKEN": "t", "TINE_URL": "v", "TINE_TOKEN": "s"}, "v", "s", ""},
		{"file first", map[string]string{"FORKD_TOKEN": "t", "TINE_TOKEN_FILE": "f"}, "", "", "f"},
	} {
		get := withForkds(env(tt.vars))
		if url, token, file := get("TINE_URL"), get("TINE_TOKEN"), get("TINE_TOKEN_FILE"); url != tt.url || token != tt.token || file != tt.file {
			t.Errorf("%s: %q %q %q", tt.name, url, token, file)
		}
	}
}

// broken is a daemon that does nothing.
type broken struct{ err error }

func (b broken) Ping(context.Context, string) (client.Pong, error) { return client.Pong{}, b.err }

func (b broken) Exec(context.Context, string, client.ExecRequest) (client.ExecResult, error) {
	return client.ExecResult{}, b.err
}

func (b broken) Eval(context.Context, string, client.EvalRequest) (client.EvalResult, error) {
	return client.EvalResult{TimedOut: b.err == nil}, b.err
}

// TestWithoutPython answers a ping all the same.
func TestWithoutPython(t *testing.T) {
	t.Parallel()
	a := &agent{daemon: broken{}, id: "sb-1"}
	want := pingReply{NumpyVersion: "not-installed", AgentLang: "none"}
	if diff := cmp.Diff(any(want), a.answer(t.Context(), []byte(`{"action":"ping"}`))); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if got := a.answer(t.Context(), []byte(`{"action":"eval","code":"1"}`)); !strings.Contains(got.(failureReply).Error, errdef.ErrTimeout.Error()) {
		t.Errorf("got %+v", got)
	}
}

// FuzzAnswer sees that whatever comes has a reply of one line.
func FuzzAnswer(f *testing.F) {
	for _, line := range []string{
		`{"action":"ping"}`, `{"action":"exec","args":["ls"],"timeout":1e308}`, `{"action":"eval","code":"1"}`, `{`, `null`, `[]`, "\x00", "", "\n\n",
		`{"action":"exec","timeout":-0}`,
	} {
		f.Add([]byte(line), line == "")
	}
	f.Fuzz(func(t *testing.T, data []byte, fails bool) {
		line, err := readLine(bytes.NewReader(data))
		if err != nil || bytes.ContainsRune(line, '\n') {
			t.Fatalf("%q: %v", line, err)
		}
		var d broken
		if fails {
			d.err = errors.New("broken")
		}
		a := &agent{daemon: d, id: "sb-1"}
		reply, err := json.Marshal(a.answer(t.Context(), line))
		var v map[string]any
		if err = errors.Join(err, json.Unmarshal(reply, &v)); err != nil || bytes.ContainsRune(reply, '\n') {
			t.Fatalf("%q: %s: %v", data, reply, err)
		}
		if fails && v["error"] == nil {
			t.Fatalf("%q: %s", data, reply)
		}
	})
}
