package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// realAgent returns the host's end of a link to a real agent.
func realAgent(t testing.TB) net.Conn {
	t.Helper()
	a := agent.New(agent.Config{Fake: agent.NewFake(t.TempDir())})
	host, guestEnd := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() {
		if err := a.Serve(context.WithoutCancel(t.Context()), guestEnd); err != nil {
			t.Errorf("serve: %v", err)
		}
		_ = guestEnd.Close()
	})
	t.Cleanup(func() {
		_ = host.Close()
		a.Close()
		work.Wait()
	})
	return host
}

// script is a guest that does as it is told, frame by frame.
type script struct {
	net.Conn
	frames *guestproto.Reader
}

// scripted returns the host's end of a link to a guest that run plays.
func scripted(t *testing.T, run func(g *script)) net.Conn {
	t.Helper()
	host, guestEnd := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() {
		defer guestEnd.Close()
		run(&script{Conn: guestEnd, frames: guestproto.NewReader(guestEnd)})
	})
	t.Cleanup(func() {
		_ = host.Close()
		work.Wait()
	})
	return host
}

// expect reads frames up to one of a type.
func (g *script) expect(t guestproto.FrameType) guestproto.Frame {
	for {
		f, err := g.frames.Next()
		if err != nil || f.Type == t {
			return f
		}
	}
}

func (g *script) send(t guestproto.FrameType, stream uint32, parts ...[]byte) {
	_, _ = g.Write(guestproto.AppendFrame(nil, t, stream, parts...)) // the host may be gone
}

// greet reads the Hello and confirms it.
func (g *script) greet() {
	g.ack(guestproto.Version)
}

func (g *script) ack(version int) {
	var h guestproto.Hello
	_ = guestproto.Decode(g.expect(guestproto.TypeHello).Payload, &h)
	g.send(guestproto.TypeHelloAck, 0, guestproto.Encode(&guestproto.HelloAck{Version: version, Nonce: h.Nonce, Agent: "script"}))
}

// linger reads until the host goes away.
func (g *script) linger() { _, _ = io.Copy(io.Discard, g.Conn) }

func TestDialSkipsOldSessions(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	conn := scripted(t, func(g *script) {
		old := guestproto.AppendFrame(nil, guestproto.TypeData, 77, []byte("of an old session"))
		var h guestproto.Hello
		_ = guestproto.Decode(g.expect(guestproto.TypeHello).Payload, &h)
		_, _ = g.Write(append([]byte("the end of a frame that was cut off\x00"), old...))
		g.send(guestproto.TypeHelloAck, 0, guestproto.Encode(&guestproto.HelloAck{Version: 1, Nonce: []byte("another's")}))
		g.send(guestproto.TypeReset, 1, guestproto.Encode(&guestproto.Reset{Code: "denied"}))
		_, _ = g.Write(append(old[:9], 0))
		g.send(guestproto.TypeHelloAck, 0, guestproto.Encode(&guestproto.HelloAck{Version: 1, Nonce: h.Nonce, Agent: "script"}))
		g.expect(guestproto.TypeOpen)
		g.send(guestproto.TypeEnd, 1, []byte{0}, guestproto.Encode(&guestproto.Pong{PID: 9}))
		g.linger()
	})
	c, err := guest.Dial(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if pong, err := c.Ping(ctx); err != nil || pong.PID != 9 || c.AgentVersion() != "script" {
		t.Errorf("%+v, %v", pong, err)
	}
}

func TestDialFails(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		run  func(*script)
		want error
		text string
	}{
		"silent":      {func(g *script) { g.linger() }, context.DeadlineExceeded, "does not answer"},
		"hung-up":     {func(g *script) { g.expect(guestproto.TypeHello) }, errdef.ErrUnavailable, "closed the connection"},
		"new-version": {func(g *script) { g.ack(99); g.linger() }, errdef.ErrUnsupported, "version 99"},
		"flood": {func(g *script) {
			g.expect(guestproto.TypeHello)
			for junk := bytes.Repeat([]byte("junk\x00"), 1<<16); ; {
				if _, err := g.Write(junk); err != nil {
					return
				}
			}
		}, errdef.ErrUnavailable, "no greeting"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limit := 10 * time.Second
			if errors.Is(tt.want, context.DeadlineExceeded) {
				limit = 50 * time.Millisecond
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			_, err := guest.Dial(ctx, scripted(t, tt.run))
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// TestHostileGuest: a guest that breaks the protocol loses its own session.
func TestHostileGuest(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(*script){
		"garbage":      func(g *script) { _, _ = g.Write([]byte("garbage\x00")) },
		"oversized":    func(g *script) { _, _ = g.Write(append(bytes.Repeat([]byte{7}, 1<<20), 0)) },
		"never-opened": func(g *script) { g.send(guestproto.TypeData, 99, []byte{0, 1}) },
		"flood": func(g *script) {
			for range 20 {
				g.send(guestproto.TypeData, 1, make([]byte, guestproto.MaxData))
			}
		},
		"tiny-flood": func(g *script) {
			for range 10_000 {
				g.send(guestproto.TypeData, 1, []byte{0})
			}
		},
		"malformed":     func(g *script) { g.send(guestproto.TypeEnd, 1, []byte{0, 200, 'x'}) },
		"wrong-channel": func(g *script) { g.send(guestproto.TypeEnd, 1, []byte{2, 'x'}) },
		"no-answer":     func(g *script) { g.send(guestproto.TypeEnd, 1) },
		"two-answers":   func(g *script) { g.send(guestproto.TypeData, 1, []byte{0}) },
		"hello":         func(g *script) { g.send(guestproto.TypeHello, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := within(t)
			c, err := guest.Dial(ctx, scripted(t, func(g *script) {
				g.greet()
				g.expect(guestproto.TypeOpen)
				run(g)
				g.linger()
			}))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = c.Ping(ctx)
			if !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "guest broke the protocol") {
				t.Errorf("error is %v", err)
			}
			<-c.Done()
			if c.Err() == nil {
				t.Error("the session goes on")
			}
		})
	}
}

func TestIdentityOfAnotherGeneration(t *testing.T) {
	t.Parallel()
	_, err := guest.DialIdentity(within(t), scripted(t, func(g *script) {
		g.greet()
		g.expect(guestproto.TypeOpen)
		g.send(guestproto.TypeEnd, 1, []byte{0}, guestproto.Encode(&guestproto.IdentityDone{Generation: "other"}))
		g.linger()
	}), guest.NewIdentity("host", "mine"))
	if !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("error is %v", err)
	}
}

// TestSecretsThatAnOldAgentIgnores: it confirms the identity, but knows nothing
// of the field.
func TestSecretsThatAnOldAgentIgnores(t *testing.T) {
	t.Parallel()
	id := guest.NewIdentity("host", "mine")
	id.Secrets = []guest.Secret{{Name: "token", Value: []byte("x")}}
	_, err := guest.DialIdentity(within(t), scripted(t, func(g *script) {
		g.greet()
		g.expect(guestproto.TypeOpen)
		g.send(guestproto.TypeEnd, 1, []byte{0}, guestproto.Encode(&guestproto.IdentityDone{Generation: "mine"})[:5])
		g.linger()
	}), id)
	if !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("error is %v", err)
	}
}

// TestChangesOfAHostileGuest: what others rely on is checked.
func TestChangesOfAHostileGuest(t *testing.T) {
	t.Parallel()
	change := func(path string) guest.Change { return guest.Change{Path: path} }
	for name, list := range map[string][]guest.Change{
		"no-path":     {{}},
		"relative":    {change("etc/passwd")},
		"backwards":   {change("/b"), change("/a")},
		"twice":       {change("/a"), change("/a")},
		"long-path":   {change("/" + strings.Repeat("x", 4096))},
		"long-target": {{Path: "/a", Target: strings.Repeat("x", 4097)}},
		"short-hash":  {{Path: "/a", Hash: []byte("x")}},
		"size":        {{Path: "/a", Size: -1}},
		"kind":        {{Path: "/a", Kind: 5}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := guest.Dial(within(t), scripted(t, func(g *script) {
				g.greet()
				g.expect(guestproto.TypeOpen)
				g.send(guestproto.TypeData, 1, []byte{0}, guestproto.Encode(&guestproto.Changes{Changes: list}))
				g.linger()
			}))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_, err = c.Changes(within(t), func(guest.Change) error { return nil })
			if !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "guest broke the protocol") {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestChangesWithoutAnEnd(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), scripted(t, func(g *script) {
		g.greet()
		g.expect(guestproto.TypeOpen)
		go g.linger() // the credit that the host gives
		n := 0
		for {
			var part guestproto.Changes
			for range 400 {
				n++
				part.Changes = append(part.Changes, guest.Change{Path: fmt.Sprintf("/%08d", n)})
			}
			if _, werr := g.Write(guestproto.AppendFrame(nil, guestproto.TypeData, 1, []byte{0}, guestproto.Encode(&part))); werr != nil {
				return
			}
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	n := 0
	_, err = c.Changes(within(t), func(guest.Change) error { n++; return nil })
	if err == nil || n > guestproto.MaxChanges {
		t.Errorf("%d changes, %v", n, err)
	}
}

// TestIdentityIsOneWrite: preamble, Hello and identity leave together.
func TestIdentityIsOneWrite(t *testing.T) {
	t.Parallel()
	reads := make(chan []byte, 1)
	conn := scripted(t, func(g *script) {
		buf := make([]byte, 64<<10)
		n, _ := g.Read(buf)
		reads <- buf[:n]
		g.linger()
	})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := guest.DialIdentity(ctx, conn, guest.NewIdentity("host", "gen"))
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	first := <-reads
	if !bytes.HasPrefix(first, []byte{0, 0}) {
		t.Error("no preamble")
	}
	var types []guestproto.FrameType
	for r := guestproto.NewReader(bytes.NewReader(first)); ; {
		f, err := r.Next()
		if err != nil {
			break
		}
		types = append(types, f.Type)
	}
	if len(types) != 2 || types[0] != guestproto.TypeHello || types[1] != guestproto.TypeOpen {
		t.Errorf("first write holds frames of types %v", types)
	}
}

func TestGuestThatDoesNotRead(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	c, err := guest.Dial(within(t), scripted(t, func(g *script) {
		g.greet()
		<-release
	}))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.WriteFile(ctx, "file", guest.WriteOptions{}, zeros{})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
	if _, err = c.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ping: %v", err)
	}
	_ = c.Close()
	close(release)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestCloseEndsCalls(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), scripted(t, func(g *script) { g.greet(); g.linger() }))
	if err != nil {
		t.Fatal(err)
	}
	failed := make(chan error)
	go func() {
		_, perr := c.Ping(within(t))
		failed <- perr
	}()
	_ = c.Close()
	if err = <-failed; !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("ping: %v", err)
	}
	if err = c.Close(); err != nil {
		t.Error(err)
	}
	if _, err = c.Ping(within(t)); !errors.Is(err, errdef.ErrUnavailable) || c.Err() == nil {
		t.Errorf("ping after close: %v", err)
	}
}

func TestNewIdentity(t *testing.T) {
	t.Parallel()
	a, b := guest.NewIdentity("h", "g"), guest.NewIdentity("h", "g")
	if bytes.Equal(a.Entropy, b.Entropy) || a.MachineID == b.MachineID || a.BootID == b.BootID {
		t.Error("two identities are alike")
	}
	if len(a.Entropy) != 64 || len(a.MachineID) != 32 || len(a.BootID) != 36 || a.BootID[14] != '4' {
		t.Errorf("identity is %+v", a)
	}
}

func TestDialRealAgent(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	c, err := guest.DialIdentity(ctx, realAgent(t), guest.NewIdentity("fork", "gen-7"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if pong, err := c.Ping(ctx); err != nil || pong.Generation != "gen-7" {
		t.Errorf("%+v, %v", pong, err)
	}
}

func TestStdinOfAProcessThatEnds(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	c, err := guest.Dial(ctx, realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"true"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if _, err = p.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err = p.Next(ctx); !errors.Is(err, io.EOF) {
		t.Errorf("after the exit: %v", err)
	}
	if _, err = p.Stdin().Write([]byte("x")); err == nil {
		t.Error("write after the exit went well")
	}
	if err = p.Stdin().Close(); err != nil {
		t.Errorf("close after the exit: %v", err)
	}
}
