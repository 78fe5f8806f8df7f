package agent_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

func (m *machine) exists(path string) func() bool {
	return func() bool {
		_, err := os.Stat(m.path(path))
		return err == nil
	}
}

// identify gives the machine an identity over a link of its own, and returns
// what the agent confirms.
func (m *machine) identify(id guest.Identity) guestproto.IdentityDone {
	m.t.Helper()
	l := m.raw()
	defer l.conn.Close()
	nonce := []byte("0123456789abcdef")
	id.Clock = 1
	l.write(append(preamble(nonce), open(1, guestproto.VerbIdentity, &id)...))
	l.untilAck(nonce)
	var done guestproto.IdentityDone
	f := <-l.frames
	if f.Type != guestproto.TypeEnd || len(f.Payload) == 0 || guestproto.Decode(f.Payload[1:], &done) != nil {
		m.t.Fatalf("answer is %+v: %q", f, f.Payload)
	}
	return done
}

// evaluation is one that runs in the background.
type evaluation struct {
	result guest.EvalResult
	err    error
	done   chan struct{}
}

func background(t *testing.T, c *guest.Client, code string) *evaluation {
	t.Helper()
	e := &evaluation{done: make(chan struct{})}
	ctx := within(t)
	go func() {
		defer close(e.done)
		e.result, e.err = c.Eval(ctx, guest.EvalRequest{Code: code})
	}()
	return e
}

// drawing draws numbers until the file "go" appears, and returns how many, and
// which was the first that a twin with the same seed would not have drawn.
const drawing = `
import os, random, threading, time
idler = threading.Event()
for _ in range(%d): threading.Thread(target=idler.wait, daemon=True).start()
random.seed(7)
drawn = [random.random() for _ in range(100)]
open('started', 'w').close()
while not os.path.exists('go'):
    drawn.append(random.random())
    time.sleep(0.0005)
drawn += [random.random() for _ in range(100)]
twin = random.Random(7)
same = [twin.random() == x for x in drawn]
[len(same), same.index(False) if False in same else -1, sum(same)]`

func TestForkInTheMiddleOfAnEvaluation(t *testing.T) {
	t.Parallel()
	needPython(t)
	for name, tt := range map[string]struct {
		threads int
		fork    bool
	}{
		"twin": {0, false}, "forked": {0, true}, "threads": {3, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			c := m.dial()
			e := background(t, c, fmt.Sprintf(drawing, tt.threads))
			eventually(t, "the evaluation to run", m.exists("started"))
			if tt.fork {
				start := time.Now()
				if done := m.identify(guest.NewIdentity("fork", "gen")); done.Signaled != 1 || done.Generation != "gen" {
					t.Errorf("confirmed %+v", done)
				}
				if took := time.Since(start); took > 2*time.Second {
					t.Errorf("it took %s", took)
				}
			}
			select {
			case <-e.done:
				t.Fatalf("the evaluation has ended: %+v, %v", e.result, e.err)
			case <-time.After(20 * time.Millisecond): // draws with the new state
			}
			m.write("go", "", 0o644)
			<-e.done
			if e.err != nil || e.result.Error != nil {
				t.Fatalf("%+v, %v", e.result, e.err)
			}
			var got [3]int
			if err := json.Unmarshal(e.result.ValueJSON, &got); err != nil {
				t.Fatal(err)
			}
			all, departs, same := got[0], got[1], got[2]
			if !tt.fork && (departs != -1 || same != all) || tt.fork && (departs < 100 || departs > all-100 || same != departs) {
				t.Errorf("of %d numbers %d are the twin's, all before number %d", all, same, departs)
			}
			// The request that is owed comes before the next, and disturbs nothing.
			if r := eval(t, c, "len(drawn) > 0"); r.Value != "True" || r.Restarted {
				t.Errorf("%+v", r)
			}
		})
	}
}

// TestForkThatCannotReseed: the code that runs is not told, but the interpreter
// answers no request after it.
func TestForkThatCannotReseed(t *testing.T) {
	t.Parallel()
	needPython(t)
	m := newMachine(t)
	c := m.dial()
	e := background(t, c, `
import os, random, time
def broken(*args):
    open('tried', 'w').close()
    raise ValueError
random.seed = broken
open('started', 'w').close()
while not os.path.exists('go'): time.sleep(0.001)
5`)
	eventually(t, "the evaluation to run", m.exists("started"))
	m.identify(guest.NewIdentity("fork", "gen"))
	eventually(t, "the signal", m.exists("tried"))
	m.write("go", "", 0o644)
	<-e.done
	if e.err != nil || e.result.Value != "5" || len(e.result.Stderr) > 0 {
		t.Errorf("%+v, %s, %v", e.result, e.result.Stderr, e.err)
	}
	if r, err := c.Eval(within(t), guest.EvalRequest{Code: "1"}); err == nil {
		t.Errorf("next: %+v", r)
	}
}

// TestForkWithThreads: an idle interpreter whose threads draw has reseeded when
// the identity is confirmed.
func TestForkWithThreads(t *testing.T) {
	t.Parallel()
	needPython(t)
	m := newMachine(t)
	c := m.dial()
	eval(t, c, `
import os, random, threading, time
drawn = []
def draw():
    while not os.path.exists('go'): time.sleep(0.001)
    drawn.append(random.random())
thread = threading.Thread(target=draw); thread.start()
random.seed(7)`)
	if done := m.identify(guest.NewIdentity("fork", "gen")); done.Signaled != 0 {
		t.Errorf("confirmed %+v", done)
	}
	m.write("go", "", 0o644)
	eventually(t, "a number", func() bool { return eval(t, c, "len(drawn)").Value == "1" })
	if r := eval(t, c, "drawn[0] == random.Random(7).random()"); r.Value != "False" {
		t.Errorf("%+v", r)
	}
}

// TestForkOfAnotherLanguage: an interpreter without a handler is not killed by
// a signal that it does not know; the fork waits for it, and fails.
func TestForkOfAnotherLanguage(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	script := `echo '{"ready":true,"language":"sh","version":"1"}' >&4
		while read -r line <&3; do
			echo "$line" >> lines
			case $line in
			*forked*) echo '{"id":0,"forked":true}' >&4;;
			*) while [ ! -e go ]; do sleep 0.01; done; echo '{"id": 1, "value": "done"}' >&4;;
			esac
		done`
	if _, err := c.Warm(ctx, "sh", []string{"sh", "-c", script}, nil); err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	go func() {
		r, err := c.Eval(ctx, guest.EvalRequest{Language: "sh", Code: "x"})
		if err == nil && (r.Value != "done" || r.Restarted) {
			err = fmt.Errorf("%+v", r)
		}
		result <- err
	}()
	eventually(t, "the evaluation to run", m.exists("lines"))
	id := guest.NewIdentity("fork", "gen")
	id.Deadline = 300 * time.Millisecond
	if err := m.dial().Identify(ctx, id); !errors.Is(err, errdef.ErrTimeout) {
		t.Errorf("identity: %v", err)
	}
	m.write("go", "", 0o644)
	if err := <-result; err != nil {
		t.Error(err)
	}
	if err := c.Err(); err != nil {
		t.Error(err)
	}
}

// TestForkWhileAnInterpreterStarts: what is only being started gets the request
// before its first.
func TestForkWhileAnInterpreterStarts(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	script := `touch started; while [ ! -e go ]; do sleep 0.01; done
		echo '{"ready":true,"language":"sh","version":"1"}' >&4
		while read -r line <&3; do
			echo "$line" >> lines
			case $line in
			*forked*) echo '{"id":0,"forked":true}' >&4;;
			*) echo '{"id": 1, "value": "done"}' >&4;;
			esac
		done`
	result := make(chan error, 1)
	go func() {
		_, err := c.Warm(ctx, "sh", []string{"sh", "-c", script}, nil)
		result <- err
	}()
	eventually(t, "the interpreter to start", m.exists("started"))
	if done := m.identify(guest.NewIdentity("fork", "gen")); done.Signaled != 0 {
		t.Errorf("confirmed %+v", done)
	}
	m.write("go", "", 0o644)
	if err := <-result; err != nil {
		t.Fatal(err)
	}
	if r, err := c.Eval(ctx, guest.EvalRequest{Language: "sh", Code: "x"}); err != nil || r.Value != "done" {
		t.Errorf("%+v, %v", r, err)
	}
	if lines := strings.Split(m.read("lines"), "\n"); len(lines) != 2 || !strings.Contains(lines[0], `"op":"forked","generation":"gen"`) {
		t.Errorf("it got %q", lines)
	}
}
