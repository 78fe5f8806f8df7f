package agent_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

// trunk is one link to the agent that many hosts use, one after another, as a
// machine's port is: what one leaves half read or half written, the next finds.
type trunk struct{ conn net.Conn }

// tap is one host's hold of a trunk. It breaks after a number of bytes in
// either direction; a negative number is no limit.
type tap struct {
	net.Conn
	mu            sync.Mutex
	reads, writes int
}

var errVanished = errors.New("the host has vanished")

func (tr *trunk) tap(reads, writes int) *tap {
	_ = tr.conn.SetDeadline(time.Time{})
	return &tap{Conn: tr.conn, reads: reads, writes: writes}
}

// room is how much of p may pass.
func (h *tap) room(left *int, p []byte) []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	if *left < 0 {
		return p
	}
	p = p[:min(len(p), *left)]
	*left -= len(p)
	return p
}

func (h *tap) Read(p []byte) (int, error) {
	p = h.room(&h.reads, p)
	if len(p) == 0 {
		return 0, errVanished
	}
	return h.Conn.Read(p)
}

func (h *tap) Write(p []byte) (int, error) {
	part := h.room(&h.writes, p)
	n, err := h.Conn.Write(part)
	if err == nil && len(part) < len(p) {
		err = errVanished
	}
	return n, err
}

// Close lets go of the trunk, and leaves it.
func (h *tap) Close() error { return h.Conn.SetDeadline(time.Unix(1, 0)) }

// goroutines counts those that run a function.
func goroutines(name string) int {
	buf := make([]byte, 4<<20)
	return strings.Count(string(buf[:runtime.Stack(buf, true)]), name+"(")
}

const counting = "i=0; while [ ! -e stop ]; do i=$((i+1)); echo $i; done; echo end"

// TestHostsThatVanish lets hosts come and go at any byte, as a branch does with
// the one of its parent. It is not parallel: it counts goroutines.
func TestHostsThatVanish(t *testing.T) {
	needPython(t)
	m := newMachine(t)
	line := &trunk{conn: m.pipe()}
	ctx := within(t)
	first, err := guest.Dial(ctx, line.tap(-1, -1))
	if err != nil {
		t.Fatal(err)
	}
	p, err := first.Exec(ctx, sh(counting))
	if err != nil {
		t.Fatal(err)
	}
	reader, err := first.Exec(ctx, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "while [ ! -e stop ]; do sleep 0.01; done; wc -c"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	go func() { _, _ = io.Copy(reader.Stdin(), strings.NewReader(strings.Repeat("x", 1<<20))) }()
	e := background(t, first, "import os, time\nopen('started', 'w').close()\nwhile not os.path.exists('stop'): print('x' * 1000); time.sleep(0.0001)\nfinished = 1")
	eventually(t, "the evaluation to run", m.exists("started"))
	_ = first.Close()
	<-e.done

	rapid.Check(t, func(rt *rapid.T) {
		reads := rapid.OneOf(rapid.IntRange(0, 300), rapid.IntRange(0, 100_000)).Draw(rt, "reads")
		writes := rapid.OneOf(rapid.Just(-1), rapid.IntRange(0, 150)).Draw(rt, "writes")
		c, derr := guest.Dial(ctx, line.tap(reads, writes))
		if derr != nil {
			return // it vanished before
		}
		for _, pid := range []int{p.PID(), reader.PID()} {
			if follower, aerr := c.Attach(ctx, pid); aerr == nil {
				for aerr == nil && rapid.Bool().Draw(rt, "more") {
					_, aerr = follower.Next(ctx)
				}
			}
		}
		_ = c.Close()
	})

	c, err := guest.Dial(ctx, line.tap(-1, -1))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	eventually(t, "the handlers of old hosts to end", func() bool {
		return goroutines("agent.(*Agent).follow") == 0 && goroutines("agent.(*process).feed") <= 1
	})
	if err = follow(ctx, c, p.PID(), func() { m.write("stop", "", 0o644) }); err != nil {
		t.Error(err)
	}
	attached, err := c.Attach(ctx, reader.PID())
	if err != nil {
		t.Fatal(err)
	}
	_ = attached.Stdin().Close()
	if exit, werr := attached.Wait(ctx); werr != nil || exit.Code != 0 {
		t.Errorf("reader: %+v, %v", exit, werr)
	}
	if r := eval(t, c, "finished"); r.Value != "1" || r.Restarted {
		t.Errorf("%+v", r)
	}
}

// follow checks that a counting process's output has no gap after its first
// line, and that it goes on, then has it stopped and reads on to its end.
func follow(ctx context.Context, c *guest.Client, pid int, stop func()) error {
	p, err := c.Attach(ctx, pid)
	if err != nil {
		return err
	}
	var text strings.Builder
	for {
		out, err := p.Next(ctx)
		if err != nil {
			return err
		}
		if out.Exit != nil {
			return gapless(text.String())
		}
		before := text.Len()
		text.Write(out.Data)
		const enough = 600 << 10 // more than is kept, and than the window
		if before < enough && text.Len() >= enough {
			stop()
		}
	}
}

func gapless(text string) error {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	if last := len(lines) - 1; lines[last] != "end" {
		return errors.New("the last line is " + lines[last])
	}
	for i := 2; i < len(lines)-1; i++ {
		before, err := strconv.Atoi(lines[i-1])
		if err != nil {
			return err
		}
		if lines[i] != strconv.Itoa(before+1) {
			return errors.New(lines[i] + " comes after " + lines[i-1])
		}
	}
	return nil
}

// TestStuckInputLeavesNobody: hosts that send input to a process that takes
// none, and go away, leave one goroutine at most. It is not parallel.
func TestStuckInputLeavesNobody(t *testing.T) {
	m := newMachine(t)
	ctx := within(t)
	c := m.dial()
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", "while [ ! -e stop ]; do sleep 0.01; done; head -c 65536 | wc -c"}, Stdin: true, Background: true})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		attached, aerr := c.Attach(ctx, p.PID())
		if aerr != nil {
			t.Fatal(aerr)
		}
		if _, aerr = attached.Stdin().Write(make([]byte, 100<<10)); aerr != nil {
			t.Fatal(aerr)
		}
		attached.Detach()
	}
	eventually(t, "those who wait to give up", func() bool { return goroutines("agent.(*process).feed") <= 1 })
	attached, err := c.Attach(ctx, p.PID())
	if err != nil {
		t.Fatal(err)
	}
	if err = os.WriteFile(m.path("stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := attached.Next(ctx)
	if err != nil || string(out.Data) != "65536\n" {
		t.Errorf("%q, %v", out.Data, err)
	}
	if exit, err := attached.Wait(ctx); err != nil || exit.Code != 0 {
		t.Errorf("%+v, %v", exit, err)
	}
}

// TestHalfFrameInTheSnapshot: the agent has read a part of a frame when its
// machine is frozen; the host that the branch has begins with a session.
func TestHalfFrameInTheSnapshot(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	l := m.raw()
	defer l.conn.Close()
	nonce := []byte("0123456789abcdef")
	whole := open(9, guestproto.VerbExec, &guestproto.ExecRequest{Argv: []string{"/bin/touch", "harm"}, Env: []string{"A=\x01"}})
	for cut := range len(whole) - 1 { // the delimiter alone is no more than late
		nonce[0] = byte(cut)
		l.write(preamble(nonce))
		l.untilAck(nonce)
		l.write(whole[:cut])
	}
	nonce[0] = 255
	l.write(preamble(nonce))
	l.untilAck(nonce)
	l.write(open(1, guestproto.VerbPing, &guestproto.Empty{}))
	if f := <-l.frames; f.Type != guestproto.TypeEnd || f.Stream != 1 {
		t.Errorf("answer is %+v", f)
	}
	if m.exists("harm")() {
		t.Error("a part of a frame was taken for one")
	}
}
