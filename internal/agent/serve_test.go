package agent_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

// rawLink speaks to the agent frame by frame.
type rawLink struct {
	t      interface{ Fatalf(string, ...any) }
	conn   net.Conn
	frames chan guestproto.Frame
}

// raw returns a link whose frames are read in the background, until the
// connection ends.
func (m *machine) raw() *rawLink {
	l := &rawLink{t: m.t, conn: m.pipe(), frames: make(chan guestproto.Frame, 10_000)}
	m.work.Go(func() {
		defer close(l.frames)
		r := guestproto.NewReader(l.conn)
		for {
			f, err := r.Next()
			if errors.Is(err, guestproto.ErrBadFrame) {
				continue
			}
			if err != nil {
				return
			}
			f.Payload = bytes.Clone(f.Payload)
			l.frames <- f
		}
	})
	return l
}

func (l *rawLink) write(b []byte) {
	if _, err := l.conn.Write(b); err != nil {
		l.t.Fatalf("write: %v", err)
	}
}

func preamble(nonce []byte) []byte {
	return guestproto.AppendFrame([]byte{0, 0}, guestproto.TypeHello, 0, guestproto.Encode(&guestproto.Hello{Version: 1, Nonce: nonce}))
}

func open(id uint32, verb guestproto.Verb, m guestproto.Message) []byte {
	return guestproto.AppendFrame(nil, guestproto.TypeOpen, id, []byte{byte(verb), guestproto.FlagEnd}, guestproto.Encode(m))
}

// untilAck drops frames up to the HelloAck of a session.
func (l *rawLink) untilAck(nonce []byte) {
	for f := range l.frames {
		var ack guestproto.HelloAck
		if f.Type == guestproto.TypeHelloAck && guestproto.Decode(f.Payload, &ack) == nil && bytes.Equal(ack.Nonce, nonce) {
			return
		}
	}
	l.t.Fatalf("the link ended without a HelloAck")
}

// TestNoFrameOfAnOldSessionFollowsTheAck starts sessions while the ones before
// are at full blast; streams have ids that tell their session.
func TestNoFrameOfAnOldSessionFollowsTheAck(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.write("big", strings.Repeat("x", 1<<20), 0o644)
	rapid.Check(t, func(t *rapid.T) {
		l := m.raw()
		l.t = t
		defer l.conn.Close()
		sessions := rapid.IntRange(2, 4).Draw(t, "sessions")
		for session := range sessions {
			nonce := bytes.Repeat([]byte{byte(session + 1)}, guestproto.NonceSize)
			l.write(preamble(nonce))
			base := uint32(session * 1000)
			l.untilAck(nonce)
			streams := rapid.IntRange(1, 5).Draw(t, "streams")
			for i := range streams {
				l.write(open(base+uint32(i)+1, guestproto.VerbRead, &guestproto.ReadRequest{Path: "big"}))
			}
			for range rapid.IntRange(0, streams).Draw(t, "frames") {
				f := <-l.frames
				if f.Stream <= base || f.Stream > base+1000 {
					t.Fatalf("a frame of stream %d in session %d", f.Stream, session)
				}
			}
		}
	})
}

func TestGarbageIsIgnored(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	rapid.Check(t, func(t *rapid.T) {
		l := m.raw()
		l.t = t
		defer l.conn.Close()
		l.write(rapid.SliceOfN(rapid.Byte(), 0, 2000).Draw(t, "garbage"))
		whole := open(1, guestproto.VerbExec, &guestproto.ExecRequest{Argv: []string{"true"}})
		l.write(whole[:rapid.IntRange(0, len(whole)-1).Draw(t, "cut")])
		nonce := []byte("0123456789abcdef")
		l.write(preamble(nonce))
		l.untilAck(nonce)
		l.write(open(1, guestproto.VerbPing, &guestproto.Empty{}))
		if f := <-l.frames; f.Type != guestproto.TypeEnd || f.Stream != 1 {
			t.Fatalf("answer is %+v", f)
		}
	})
}

// TestBadRequests: whatever a host sends, the stream fails and the agent lives.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	l := m.raw()
	defer l.conn.Close()
	nonce := []byte("0123456789abcdef")
	l.write(preamble(nonce))
	l.untilAck(nonce)
	random := rand.New(rand.NewPCG(1, 2))
	id := uint32(0)
	for verb := guestproto.Verb(1); verb < 30; verb++ {
		if verb == guestproto.VerbPowerOff || verb == guestproto.VerbQuiesce || verb == guestproto.VerbResume || verb == guestproto.VerbProcesses || verb == guestproto.VerbPing {
			continue
		}
		id++
		junk := bytes.Repeat([]byte{0xff}, 20+random.IntN(20))
		l.write(guestproto.AppendFrame(nil, guestproto.TypeOpen, id, []byte{byte(verb), guestproto.FlagEnd}, junk))
		f := <-l.frames
		var reset guestproto.Reset
		if f.Type != guestproto.TypeReset || f.Stream != id || guestproto.Decode(f.Payload, &reset) != nil {
			t.Errorf("verb %d: answer is %+v", verb, f)
		}
		if reset.Code != "invalid" && reset.Code != "unsupported" {
			t.Errorf("verb %d: %+v", verb, reset)
		}
	}
}

func TestHelloThatIsNone(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	l := m.raw()
	defer l.conn.Close()
	l.write(preamble([]byte("short")))
	l.write(guestproto.AppendFrame(nil, guestproto.TypeHello, 0, []byte{0xff}))
	l.write(open(1, guestproto.VerbPing, &guestproto.Empty{}))
	nonce := []byte("0123456789abcdef")
	l.write(preamble(nonce))
	if f := <-l.frames; f.Type != guestproto.TypeHelloAck {
		t.Errorf("first answer is %+v", f)
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	a := agent.New(agent.Config{Fake: agent.NewFake(t.TempDir())})
	defer a.Close()
	host, guestEnd := net.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := a.Serve(ctx, guestEnd); !errors.Is(err, context.Canceled) {
		t.Errorf("serve: %v", err)
	}
	_, _ = host.Close(), guestEnd.Close()
}

func TestCloseEndsEverything(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	p, err := c.Exec(ctx, sh("echo $$ > pid; echo; exec sleep 100"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err = p.Next(ctx); err != nil {
		t.Fatal(err)
	}
	m.agent.Close()
	gone(t, m.read("pid"))
	if _, err = c.Exec(ctx, sh("true")); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("exec after close: %v", err)
	}
}

// harmful reports whether a host that says this asks for what must not be tried
// here: the machine is a fake, but its files and programs are the test's own.
func harmful(wire []byte) bool {
	frames := guestproto.NewReader(bytes.NewReader(bytes.Clone(wire)))
	for {
		f, err := frames.Next()
		if err != nil && !errors.Is(err, guestproto.ErrBadFrame) {
			return false
		}
		if err != nil || f.Type != guestproto.TypeOpen || len(f.Payload) == 0 {
			continue
		}
		switch guestproto.Verb(f.Payload[0]) {
		case guestproto.VerbExec, guestproto.VerbEval, guestproto.VerbWarm, guestproto.VerbWrite,
			guestproto.VerbMkdir, guestproto.VerbMove, guestproto.VerbRemove:
			return true
		}
	}
}

func FuzzServe(f *testing.F) {
	nonce := []byte("0123456789abcdef")
	f.Add(append(preamble(nonce), open(1, guestproto.VerbStat, &guestproto.PathRequest{Path: "x"})...))
	f.Add(append(preamble(nonce), open(1, guestproto.VerbIdentity, &guestproto.Identity{ClockOnly: true, Clock: 1})...))
	f.Add([]byte{0, 0, 1, 2, 3, 0})
	f.Fuzz(func(t *testing.T, wire []byte) {
		if harmful(wire) {
			t.Skip("could run programs or change files on this machine")
		}
		a := agent.New(agent.Config{Fake: agent.NewFake(t.TempDir())})
		defer a.Close()
		if err := a.Serve(t.Context(), &script{r: bytes.NewReader(wire)}); err != nil {
			t.Fatal(err)
		}
	})
}

// script is a host that says its lines and does not listen.
type script struct{ r io.Reader }

func (s *script) Read(p []byte) (int, error)  { return s.r.Read(p) }
func (s *script) Write(p []byte) (int, error) { return len(p), nil }

func BenchmarkPing(b *testing.B) {
	c := newMachine(b).dial()
	for b.Loop() {
		if _, err := c.Ping(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkReadFile(b *testing.B) {
	m := newMachine(b)
	const size = 16 << 20
	m.write("file", strings.Repeat("0123456789abcde\x00", size/16), 0o644)
	c := m.dial()
	b.SetBytes(size)
	for b.Loop() {
		f, err := c.ReadFile(b.Context(), "file", guest.ReadOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, f); err != nil || n != size {
			b.Fatal(n, err)
		}
		_ = f.Close()
	}
}
