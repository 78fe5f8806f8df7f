package publish_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/publish"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// guest is a program that echoes, reached over loopback. It has what a
// connection to a guest has: both directions end by themselves.
type guest struct {
	ln   net.Listener
	work sync.WaitGroup
}

func newGuest(t *testing.T) *guest {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &guest{ln: ln}
	g.work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			g.work.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		g.work.Wait()
	})
	return g
}

func (g *guest) connect(ctx context.Context, use func(context.Context, net.Conn) error) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", g.ln.Addr().String())
	if err != nil {
		return err
	}
	defer conn.Close()
	return use(ctx, conn)
}

func newPorts(t *testing.T) *publish.Ports {
	t.Helper()
	p := publish.New(nil)
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func reach(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	conn, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn.(*net.TCPConn)
}

// greet sees that a connection is passed on, and stays open.
func greet(t *testing.T, conn net.Conn) {
	t.Helper()
	buf := make([]byte, 5)
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "hello" {
		t.Fatalf("%q, %v", buf, err)
	}
}

// over sees that a connection ends.
func over(t *testing.T, conn net.Conn) {
	t.Helper()
	var timeout net.Error
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("the connection is not over: %v", err)
	}
}

func TestPublish(t *testing.T) {
	t.Parallel()
	g, p := newGuest(t), newPorts(t)
	pub, err := p.Publish(t.Context(), "sb-1", 8080, 0, g.connect)
	if err != nil {
		t.Fatal(err)
	}
	if got := p.List("sb-1"); len(got) != 1 || got[0] != pub || pub.GuestPort != 8080 || pub.HostPort == 0 {
		t.Errorf("listed %+v, published %+v", got, pub)
	}
	if got := p.List("sb-2"); len(got) != 0 {
		t.Errorf("of another: %+v", got)
	}
	conn := reach(t, pub.Address)
	greet(t, conn)
	if err = conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if text, rerr := io.ReadAll(conn); len(text) != 0 || rerr != nil {
		t.Errorf("after the half close: %q, %v", text, rerr)
	}
	open := reach(t, pub.Address)
	greet(t, open)
	if _, err = p.Publish(t.Context(), "sb-1", 8080, 0, g.connect); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("twice: %v", err)
	}
	if _, err = p.Publish(t.Context(), "sb-1", 8081, pub.HostPort, g.connect); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("on the same port: %v", err)
	}
	if err = p.Remove("sb-1", 8080); err != nil {
		t.Error(err)
	}
	over(t, open)
	if err = p.Remove("sb-1", 8080); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("remove again: %v", err)
	}
	if pub, err = p.Publish(t.Context(), "sb-1", 8080, pub.HostPort, g.connect); err != nil {
		t.Errorf("once more: %v", err)
	}
}

func TestPublishRefuses(t *testing.T) {
	t.Parallel()
	g, p := newGuest(t), newPorts(t)
	for _, ports := range [][2]int{{0, 0}, {-1, 0}, {65536, 0}, {80, -1}, {80, 22}, {80, 1023}, {80, 65536}} {
		if _, err := p.Publish(t.Context(), "sb-1", ports[0], ports[1], g.connect); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%v: %v", ports, err)
		}
	}
}

// TestBounds: an owner may have so many, and all together so many.
func TestBounds(t *testing.T) {
	t.Parallel()
	g, p := newGuest(t), newPorts(t)
	for i := range publish.MaxTotal {
		owner := string(rune('a' + i/publish.MaxOfOwner))
		if _, err := p.Publish(t.Context(), owner, 1+i, 0, g.connect); err != nil {
			t.Fatal(i, err)
		}
		if i == publish.MaxOfOwner-1 {
			if _, err := p.Publish(t.Context(), owner, 9999, 0, g.connect); !errors.Is(err, errdef.ErrExhausted) {
				t.Errorf("one more of an owner: %v", err)
			}
		}
	}
	if _, err := p.Publish(t.Context(), "another", 1, 0, g.connect); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("one more in all: %v", err)
	}
	p.End("a")
	if _, err := p.Publish(t.Context(), "another", 1, 0, g.connect); err != nil {
		t.Errorf("when others have ended: %v", err)
	}
}

// TestManyConnections: who comes when all places are taken is sent away, and
// the others are not disturbed.
func TestManyConnections(t *testing.T) {
	t.Parallel()
	g, p := newGuest(t), newPorts(t)
	pub, err := p.Publish(t.Context(), "sb-1", 80, 0, g.connect)
	if err != nil {
		t.Fatal(err)
	}
	var first net.Conn
	for i := range publish.MaxConns {
		conn := reach(t, pub.Address)
		greet(t, conn)
		if i == 0 {
			first = conn
		}
	}
	over(t, reach(t, pub.Address))
	greet(t, first)
	_ = first.Close()
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn := reach(t, pub.Address)
		_, _ = io.WriteString(conn, "x") // it may have been sent away
		if _, err = conn.Read(make([]byte, 1)); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the place of one that has ended is not free")
		}
	}
}

// TestGuestThatDoesNotAnswer: the connection ends.
func TestGuestThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	p := newPorts(t)
	pub, err := p.Publish(t.Context(), "sb-1", 80, 0, func(context.Context, func(context.Context, net.Conn) error) error {
		return errdef.ErrUnavailable
	})
	if err != nil {
		t.Fatal(err)
	}
	over(t, reach(t, pub.Address))
}

// TestEnd: an owner that is gone takes its publications along, while those who
// connect to a guest that does not answer wait.
func TestEnd(t *testing.T) {
	t.Parallel()
	g, p := newGuest(t), newPorts(t)
	kept, err := p.Publish(t.Context(), "sb-2", 80, 0, g.connect)
	if err != nil {
		t.Fatal(err)
	}
	dialing := make(chan struct{})
	pub, err := p.Publish(t.Context(), "sb-1", 80, 0, func(ctx context.Context, _ func(context.Context, net.Conn) error) error {
		close(dialing)
		<-ctx.Done()
		return context.Cause(ctx)
	})
	if err != nil {
		t.Fatal(err)
	}
	waits := reach(t, pub.Address)
	<-dialing
	p.End("sb-1")
	p.End("sb-1")
	over(t, waits)
	if got := p.List("sb-1"); len(got) != 0 {
		t.Errorf("left: %+v", got)
	}
	greet(t, reach(t, kept.Address))
	if err = p.Close(); err != nil {
		t.Error(err)
	}
	if _, err = p.Publish(t.Context(), "sb-1", 80, 0, g.connect); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

// TestJoinWithoutAReader: what one side has said is passed on although the
// other cannot be written to any more.
func TestJoinWithoutAReader(t *testing.T) {
	t.Parallel()
	near, nearEnd := net.Pipe()
	far, farEnd := net.Pipe()
	var work sync.WaitGroup
	work.Go(func() { publish.Join(t.Context(), nearEnd, deaf{farEnd}) })
	if _, err := near.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	work.Go(func() {
		_, _ = far.Write([]byte("the answer"))
		_ = far.Close()
	})
	buf := make([]byte, 10)
	if _, err := io.ReadFull(near, buf); err != nil || string(buf) != "the answer" {
		t.Errorf("%q, %v", buf, err)
	}
	_ = near.Close()
	work.Wait()
}

// deaf is a connection that takes nothing any more.
type deaf struct{ net.Conn }

func (deaf) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }
