package guest_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
)

// program listens on a port of this host's loopback, which is the guest's too,
// and has serve deal with each connection, until the test ends.
func program(t *testing.T, address string, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Skipf("cannot listen on %s: %v", address, err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		work.Wait()
	})
	return ln.Addr().(*net.TCPAddr).Port
}

const anyPort = "127.0.0.1:0"

func echo(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }

// dialed returns a connection to a port by way of a real agent.
func dialed(t *testing.T, port int) net.Conn {
	t.Helper()
	c, err := guest.Dial(within(t), realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return dialPort(t, c, port)
}

func dialPort(t *testing.T, c *guest.Client, port int) net.Conn {
	t.Helper()
	conn, err := c.DialPort(within(t), port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err = conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func closeWrite(t *testing.T, conn net.Conn) {
	t.Helper()
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Error(err)
	}
}

func TestDialPort(t *testing.T) {
	t.Parallel()
	for _, address := range []string{anyPort, "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			t.Parallel()
			conn := dialed(t, program(t, address, echo))
			if _, err := io.WriteString(conn, "hello"); err != nil {
				t.Fatal(err)
			}
			closeWrite(t, conn)
			closeWrite(t, conn)
			if _, err := conn.Write([]byte("more")); err == nil {
				t.Error("a write after CloseWrite went well")
			}
			for range 2 {
				text, err := io.ReadAll(conn)
				if err != nil || len(text) != 0 && string(text) != "hello" {
					t.Errorf("%q, %v", text, err)
				}
			}
			if remote, local := conn.RemoteAddr().String(), conn.LocalAddr().String(); !strings.HasPrefix(remote, "guest:") || local != "host" {
				t.Errorf("from %s to %s", local, remote)
			}
		})
	}
}

// TestDialPortHalfClosed: a program that has said all still hears.
func TestDialPortHalfClosed(t *testing.T) {
	t.Parallel()
	heard := make(chan string, 1)
	conn := dialed(t, program(t, anyPort, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, "welcome")
		_ = conn.CloseWrite()
		text, _ := io.ReadAll(conn)
		heard <- string(text)
	}))
	if text, err := io.ReadAll(conn); string(text) != "welcome" || err != nil {
		t.Fatalf("%q, %v", text, err)
	}
	if _, err := io.WriteString(conn, "still here"); err != nil {
		t.Fatal(err)
	}
	closeWrite(t, conn)
	if text := <-heard; text != "still here" {
		t.Errorf("the program heard %q", text)
	}
}

// TestDialPortClose: what was written before Close arrives.
func TestDialPortClose(t *testing.T) {
	t.Parallel()
	heard := make(chan int64, 1)
	conn := dialed(t, program(t, anyPort, func(conn *net.TCPConn) {
		n, _ := io.Copy(io.Discard, conn)
		heard <- n
	}))
	const size = 200 << 10 // less than the window
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if n := <-heard; n != size {
		t.Errorf("%d bytes have come", n)
	}
	if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if _, err := conn.Write(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
}

// TestDialPortMuch sends 16 MiB each way at once, of two streams of numbers.
func TestDialPortMuch(t *testing.T) {
	t.Parallel()
	const size = 16 << 20
	numbers := func(seed byte) io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size) }
	sum := func(h hash.Hash, r io.Reader) string {
		n, err := io.Copy(h, r)
		return fmt.Sprintf("%d %v %x", n, err, h.Sum(nil))
	}
	heard := make(chan string, 1)
	conn := dialed(t, program(t, anyPort, func(conn *net.TCPConn) {
		var work sync.WaitGroup
		work.Go(func() {
			_, _ = io.Copy(conn, numbers(1))
			_ = conn.CloseWrite()
		})
		heard <- sum(sha256.New(), conn)
		work.Wait()
	}))
	var work sync.WaitGroup
	work.Go(func() {
		if _, err := io.Copy(conn, numbers(2)); err != nil {
			t.Errorf("write: %v", err)
		}
		closeWrite(t, conn)
	})
	if got, want := sum(sha256.New(), conn), sum(sha256.New(), numbers(1)); got != want {
		t.Errorf("from the guest: %s, want %s", got, want)
	}
	work.Wait()
	if got, want := <-heard, sum(sha256.New(), numbers(2)); got != want {
		t.Errorf("to the guest: %s, want %s", got, want)
	}
}

// TestDialPortDeadlines: an operation that ran out of time costs nothing, and
// deadlines that are moved count for whoever waits.
func TestDialPortDeadlines(t *testing.T) {
	t.Parallel()
	read := make(chan struct{})
	conn := dialed(t, program(t, anyPort, func(conn *net.TCPConn) {
		<-read
		echo(conn)
	}))
	waits := make(chan error)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		waits <- err
	}()
	past := time.Now().Add(-time.Second)
	_ = conn.SetReadDeadline(past)
	var timeout net.Error
	if err := <-waits; !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("read: %v", err)
	}
	go func() {
		_, err := io.Copy(conn, zeros{}) // until the window and the sockets are full
		waits <- err
	}()
	_ = conn.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	if err := <-waits; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
	close(read)
	later := time.Now().Add(20 * time.Second)
	_ = conn.SetDeadline(later)
	if _, err := io.WriteString(conn, "the end"); err != nil {
		t.Fatal(err)
	}
	closeWrite(t, conn)
	text, err := io.ReadAll(conn)
	if err != nil || !bytes.HasSuffix(text, []byte("\x00the end")) {
		t.Errorf("%d bytes, %v", len(text), err)
	}
}

// TestDialPortStalls: a reader that stands still holds nobody else up.
func TestDialPortStalls(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	c, err := guest.Dial(ctx, realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const size = 8 << 20
	full := make(chan struct{})
	stalled := dialPort(t, c, program(t, anyPort, func(conn *net.TCPConn) {
		sent := 0
		for piece := make([]byte, 64<<10); sent < size; sent += len(piece) {
			_ = conn.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
			if _, werr := conn.Write(piece); werr != nil {
				break
			}
		}
		close(full)
	}))
	<-full
	other := dialPort(t, c, program(t, anyPort, echo))
	if _, err = io.WriteString(other, "still"); err != nil {
		t.Fatal(err)
	}
	if _, err = io.ReadFull(other, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	if n, err := io.Copy(io.Discard, stalled); err != nil || n == 0 || n >= size {
		t.Errorf("%d bytes, %v: it should have stood still", n, err)
	}
}

func TestDialPortReset(t *testing.T) {
	t.Parallel()
	conn := dialed(t, program(t, anyPort, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.SetLinger(0) // so that closing is a reset
	}))
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "reset by peer") {
		t.Errorf("read: %v", err)
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("write: %v", err)
	}
}

func TestDialPortFails(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, port := range []int{0, -1, 65536} {
		if _, err := c.DialPort(within(t), port); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("port %d: %v", port, err)
		}
	}
	if _, err := c.DialPort(within(t), free(t)); !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("where nobody listens: %v", err)
	}
}

// free is a port on which nobody listens.
func free(t *testing.T) int {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", anyPort)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// TestDialPortTooOften: the agent has room for so many connections, and others
// have when they end.
func TestDialPortTooOften(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	port := program(t, anyPort, echo)
	var last net.Conn
	for range guestproto.MaxDials {
		last = dialPort(t, c, port)
	}
	if _, err = c.DialPort(within(t), port); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("one more: %v", err)
	}
	_ = last.Close()
	for ctx := within(t); ; {
		conn, err := c.DialPort(ctx, port)
		if err == nil {
			_ = conn.Close()
			return
		}
		if !errors.Is(err, errdef.ErrExhausted) {
			t.Fatalf("after one has ended: %v", err)
		}
	}
}

// TestDialPortEndsWithClient: neither side is left waiting.
func TestDialPortEndsWithClient(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	conn := dialPort(t, c, program(t, anyPort, func(conn *net.TCPConn) {
		echo(conn)
		close(ended)
	}))
	waits := make(chan error)
	go func() {
		_, rerr := conn.Read(make([]byte, 1))
		waits <- rerr
	}()
	_ = c.Close()
	if err = <-waits; !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("read: %v", err)
	}
	<-ended
}

// TestDialPortOfAnOldAgent: it does not know the verb.
func TestDialPortOfAnOldAgent(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), scripted(t, func(g *script) {
		g.greet()
		g.expect(guestproto.TypeOpen)
		g.send(guestproto.TypeReset, 1, guestproto.Encode(&guestproto.Reset{Code: "unsupported", Message: "agent 0.2.0 does not know verb 22"}))
		g.linger()
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.DialPort(within(t), 80)
	if !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(errdef.Hint(err), "make it anew") {
		t.Errorf("%v, hint %q", err, errdef.Hint(err))
	}
}

// TestDialPortOfAHostileGuest: what breaks the protocol ends its session.
func TestDialPortOfAHostileGuest(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(*script){
		"bytes first": func(g *script) { g.send(guestproto.TypeData, 1, []byte{2, 'x'}) },
		"end first":   func(g *script) { g.send(guestproto.TypeEnd, 1, []byte{0}) },
		"bare end":    func(g *script) { g.send(guestproto.TypeData, 1, []byte{0}); g.send(guestproto.TypeEnd, 1) },
		"wrong channel": func(g *script) {
			g.send(guestproto.TypeData, 1, []byte{0})
			g.send(guestproto.TypeData, 1, []byte{3, 'x'})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := guest.Dial(within(t), scripted(t, func(g *script) {
				g.greet()
				g.expect(guestproto.TypeOpen)
				run(g)
				g.linger()
			}))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			conn, err := c.DialPort(within(t), 80)
			if err == nil {
				_, err = conn.Read(make([]byte, 1))
			}
			if !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "guest broke the protocol") {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// TestDialPortForHTTP has net/http use the connections, several times each.
func TestDialPortForHTTP(t *testing.T) {
	t.Parallel()
	c, err := guest.Dial(within(t), realAgent(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_, _ = w.Write(body)
	}))
	defer srv.Close()
	dials := 0
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		dials++
		return c.DialPort(ctx, srv.Listener.Addr().(*net.TCPAddr).Port)
	}}
	defer transport.CloseIdleConnections()
	body := strings.Repeat("0123456789", 50_000)
	for range 5 {
		req, err := http.NewRequestWithContext(within(t), http.MethodPost, "http://guest/", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		if err != nil || string(got) != body {
			t.Errorf("%d bytes, %v", len(got), err)
		}
		_ = resp.Body.Close()
	}
	if dials != 1 {
		t.Errorf("%d connections for five requests", dials)
	}
}
