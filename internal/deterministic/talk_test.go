package deterministic

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/vmm"
)

// desk is a machine without one: two goroutines take turns at a mailbox.
type desk struct {
	mem            []byte
	asked, replied chan struct{}
}

func newDesk() *desk {
	return &desk{mem: make([]byte, vmm.MailboxSize), asked: make(chan struct{}), replied: make(chan struct{})}
}

func (d *desk) ReadAt(p []byte, off int64) (int, error)  { return copy(p, d.mem[off:]), nil }
func (d *desk) WriteAt(p []byte, off int64) (int, error) { return copy(d.mem[off:], p), nil }

func (d *desk) Halted(ctx context.Context) error {
	select {
	case _, ok := <-d.asked:
		if !ok {
			return io.EOF
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (d *desk) Answer() error {
	d.replied <- struct{}{}
	return nil
}

func (d *desk) knock() error {
	d.asked <- struct{}{}
	if _, ok := <-d.replied; !ok {
		return io.EOF
	}
	return nil
}

// withAgent has the real agent at the other side of the mailbox, and returns
// its files' directory.
func withAgent(t *testing.T) (*talk, string) {
	t.Helper()
	dir := t.TempDir()
	a := agent.New(agent.Config{Fake: agent.NewFake(dir)})
	d := newDesk()
	done := make(chan error, 1)
	go func() { done <- a.ServeMailbox(d.mem, d.knock) }()
	t.Cleanup(func() {
		close(d.replied)
		if err := <-done; !errors.Is(err, io.EOF) {
			t.Errorf("agent: %v", err)
		}
		a.Close()
	})
	tk := &talk{vm: d, box: d}
	if err := tk.listen(t.Context()); err != nil {
		t.Fatal(err)
	}
	return tk, dir
}

// sameBytes compares slices of bytes at once, which cmp does one by one.
func sameBytes() cmp.Option { return cmp.Comparer(bytes.Equal) }

func prepared(t *testing.T, in record.Input) record.Input {
	t.Helper()
	in, err := Prepare(in)
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func TestOutcome(t *testing.T) {
	t.Parallel()
	big := bytes.Repeat([]byte("0123456789"), 250_000)
	for name, tt := range map[string]struct {
		in   record.Input
		want record.Output
	}{
		"output": {
			record.Input{Argv: []string{"sh", "-c", "echo $V; echo x >&2; exit 7"}, Env: []string{"V=value"}},
			record.Output{Stdout: []byte("value\n"), Stderr: []byte("x\n"), Exit: 7},
		},
		"input":         {record.Input{Argv: []string{"cat"}, Stdin: big}, record.Output{Stdout: big}},
		"unread input":  {record.Input{Argv: []string{"true"}, Stdin: big}, record.Output{}},
		"signal":        {record.Input{Argv: []string{"sh", "-c", "kill -HUP $$"}}, record.Output{Exit: -1, Signal: "SIGHUP"}},
		"not there":     {record.Input{Argv: []string{"no-such-command"}}, record.Output{Exit: -1, Failure: "not found"}},
		"no program":    {record.Input{Argv: []string{"/etc/passwd"}}, record.Output{Exit: -1, Failure: "not executable"}},
		"a directory":   {record.Input{Argv: []string{"/etc"}}, record.Output{Exit: -1, Failure: "not executable"}},
		"too much":      {record.Input{Argv: []string{"yes"}, Limits: record.Limits{Output: 3}}, record.Output{Stdout: []byte("y\ny"), Exit: -1, Signal: "SIGKILL", Failure: "output limit"}},
		"too long":      {record.Input{Argv: []string{"sleep", "60"}, Limits: record.Limits{Virtual: 50 * time.Millisecond}}, record.Output{Exit: -1, Signal: "SIGKILL", Failure: "timed out"}},
		"just enough":   {record.Input{Argv: []string{"echo", "ab"}, Limits: record.Limits{Output: 3}}, record.Output{Stdout: []byte("ab\n")}},
		"closed output": {record.Input{Argv: []string{"sh", "-c", "exec >&- 2>&-; sleep 0.05; exit 2"}}, record.Output{Exit: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tk, _ := withAgent(t)
			for range 2 { // an agent does one job after another
				out, err := tk.outcome(t.Context(), prepared(t, tt.in), Options{})
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, out, cmpopts.IgnoreFields(record.Output{}, "Virtual"), sameBytes()); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

func TestOutcomeFiles(t *testing.T) {
	t.Parallel()
	tk, dir := withAgent(t)
	big := bytes.Repeat([]byte("0123456789"), 250_000)
	in := prepared(t, record.Input{
		Argv: []string{"sh", "-c", "cat a/in > out"}, Cwd: dir, Start: time.Unix(1234567890, 5),
		Files:   []record.File{{Path: filepath.Join(dir, "a/in"), Mode: 0o640, Data: big}, {Path: filepath.Join(dir, "empty"), Mode: 0o600}},
		Collect: []string{"no", "out", "a", filepath.Join(dir, "empty")},
	})
	out, err := tk.outcome(t.Context(), in, Options{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(dir, "a/in"))
	if err != nil || st.Mode() != 0o640 || !st.ModTime().Equal(in.Start) {
		t.Errorf("%v, %v", st, err)
	}
	want := []record.File{{Path: "out", Mode: 0o644, Data: big}, {Path: filepath.Join(dir, "empty"), Mode: 0o600, Data: []byte{}}}
	if diff := cmp.Diff(want, out.Files, sameBytes()); diff != "" {
		t.Error(diff)
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	tk, dir := withAgent(t)
	for name, in := range map[string]record.Input{
		"no directory": {Argv: []string{"true"}, Cwd: filepath.Join(dir, "none")},
		"below a file": {Argv: []string{"true"}, Files: []record.File{{Path: "/etc/passwd/x"}}},
	} {
		_, err := tk.outcome(t.Context(), prepared(t, in), Options{})
		if !errors.Is(err, errdef.ErrInvalid) || !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestGarbage: whatever a guest puts into the mailbox is an error that says so.
func TestGarbage(t *testing.T) {
	t.Parallel()
	letter := func(l guestproto.Letter) []byte {
		head := make([]byte, guestproto.LetterHead)
		l.PutHead(head)
		return append(head, l.Body...)
	}
	done := func(d guestproto.JobDone) []byte {
		return letter(guestproto.Letter{Kind: guestproto.LetterDone, Body: guestproto.Encode(&d)})
	}
	for name, content := range map[string][]byte{
		"zeros":             make([]byte, 100),
		"noise":             bytes.Repeat([]byte{0xa5}, 4096),
		"the host's own":    letter(guestproto.Letter{Kind: guestproto.LetterData}),
		"unknown":           letter(guestproto.Letter{Kind: 40}),
		"ready again":       letter(guestproto.Letter{Kind: guestproto.LetterReady}),
		"unknown input":     letter(guestproto.Letter{Kind: guestproto.LetterWant, Stream: 17}),
		"input far out":     letter(guestproto.Letter{Kind: guestproto.LetterWant, Stream: 1 << 31}),
		"unknown output":    letter(guestproto.Letter{Kind: guestproto.LetterOutput, Stream: 0}),
		"too much output":   letter(guestproto.Letter{Kind: guestproto.LetterOutput, Stream: 1, Body: make([]byte, 11)}),
		"unasked file":      letter(guestproto.Letter{Kind: guestproto.LetterFile, Stream: 1}),
		"file far out":      letter(guestproto.Letter{Kind: guestproto.LetterFile, Stream: 1<<32 - 1}),
		"malformed end":     letter(guestproto.Letter{Kind: guestproto.LetterDone, Body: bytes.Repeat([]byte{0xff}, 30)}),
		"unknown end":       done(guestproto.JobDone{End: 6}),
		"exit code":         done(guestproto.JobDone{Code: 256}),
		"signal":            done(guestproto.JobDone{Signal: 65}),
		"negative time":     done(guestproto.JobDone{Virtual: -1}),
		"file of no number": done(guestproto.JobDone{Files: []guestproto.JobCollected{{Index: 1}}}),
		"file below none":   done(guestproto.JobDone{Files: []guestproto.JobCollected{{Index: -1}}}),
		"file not sent":     done(guestproto.JobDone{Files: []guestproto.JobCollected{{Size: 5}}}),
		"file twice":        done(guestproto.JobDone{Files: []guestproto.JobCollected{{}, {}}}),
		"file's mode":       done(guestproto.JobDone{Files: []guestproto.JobCollected{{Mode: 0o4755}}}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk()
			go func() {
				defer close(d.asked)
				copy(d.mem, letter(guestproto.Letter{Kind: guestproto.LetterReady}))
				if d.knock() == nil {
					copy(d.mem, content)
					d.asked <- struct{}{}
				}
			}()
			tk := &talk{vm: d, box: d}
			if err := tk.listen(t.Context()); err != nil {
				t.Fatal(err)
			}
			in := prepared(t, record.Input{Argv: []string{"true"}, Collect: []string{"x"}, Limits: record.Limits{Output: 10}})
			if out, err := tk.outcome(t.Context(), in, Options{}); !errors.Is(err, guestproto.ErrProtocol) {
				t.Errorf("%+v, %v", out, err)
			}
		})
	}
}

func TestPrepare(t *testing.T) {
	t.Parallel()
	got := prepared(t, record.Input{Argv: []string{"true"}})
	want := record.Input{
		Argv: []string{"true"}, Start: DefaultStart(),
		Limits: record.Limits{Virtual: DefaultVirtual, Wall: DefaultWall, Output: DefaultOutput},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	argv := []string{"true"}
	for name, in := range map[string]record.Input{
		"no command":        {},
		"empty command":     {Argv: []string{""}},
		"zero byte":         {Argv: []string{"a\x00b"}},
		"zero in variable":  {Argv: argv, Env: []string{"A=\x00"}},
		"before its time":   {Argv: argv, Start: time.Unix(5, 0)},
		"after all time":    {Argv: argv, Start: time.Date(3000, 1, 1, 0, 0, 0, 0, time.UTC)},
		"negative virtual":  {Argv: argv, Limits: record.Limits{Virtual: -1}},
		"virtual for ever":  {Argv: argv, Limits: record.Limits{Virtual: MaxVirtual + 1}},
		"wall for ever":     {Argv: argv, Limits: record.Limits{Wall: MaxWall + 1}},
		"negative output":   {Argv: argv, Limits: record.Limits{Output: -1}},
		"output for ever":   {Argv: argv, Limits: record.Limits{Output: MaxOutput + 1}},
		"huge command":      {Argv: []string{strings.Repeat("x", vmm.MailboxSize)}},
		"relative file":     {Argv: argv, Files: []record.File{{Path: "x"}}},
		"unclean file":      {Argv: argv, Files: []record.File{{Path: "/a/../x"}}},
		"the root":          {Argv: argv, Files: []record.File{{Path: "/"}}},
		"setuid file":       {Argv: argv, Files: []record.File{{Path: "/x", Mode: 0o4755}}},
		"nameless":          {Argv: argv, Collect: []string{""}},
		"too many to fetch": {Argv: argv, Collect: make([]string, maxNames+1)},
		"huge input":        {Argv: argv, Stdin: make([]byte, MaxStdin+1)},
		"huge file":         {Argv: argv, Files: []record.File{{Path: "/x", Data: make([]byte, MaxFiles+1)}}},
	} {
		if _, err := Prepare(in); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSizes(t *testing.T) {
	t.Parallel()
	if vmm.MailboxSize != guestproto.MailboxSize {
		t.Error("host and guest do not agree on the size of the mailbox")
	}
	if bytes.Equal(entropy(1), entropy(2)) || len(entropy(1)) != 32 {
		t.Error("seeds do not differ")
	}
}
