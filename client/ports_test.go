package client_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
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

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// program serves each connection to a port of this host's loopback, which is the
// sandbox's too.
func program(t *testing.T, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer func() { _ = conn.Close() }()
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

func dialPort(t *testing.T, c *client.Client, id string, port int) net.Conn {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := c.DialPort(ctx, id, port)
	cancel() // it bounds the call only
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

func TestDialPort(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	const size = 16 << 20
	numbers := func(seed byte) io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{seed}), size) }
	sum := func(r io.Reader) string {
		h := sha256.New()
		n, err := io.Copy(h, r)
		return fmt.Sprintf("%d %v %x", n, err, h.Sum(nil))
	}
	heard := make(chan string, 1)
	port := program(t, func(conn *net.TCPConn) {
		var work sync.WaitGroup
		work.Go(func() {
			_, _ = io.Copy(conn, numbers(1))
			_ = conn.CloseWrite()
		})
		heard <- sum(conn)
		work.Wait()
	})
	conn := dialPort(t, c, id, port)
	var work sync.WaitGroup
	work.Go(func() {
		if _, err := io.Copy(conn, numbers(2)); err != nil {
			t.Errorf("write: %v", err)
		}
		for range 2 {
			if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Errorf("close: %v", err)
			}
		}
		if _, err := conn.Write([]byte("x")); err == nil {
			t.Error("a write after CloseWrite went well")
		}
	})
	if got, want := sum(conn), sum(numbers(1)); got != want {
		t.Errorf("from the sandbox: %s, want %s", got, want)
	}
	work.Wait()
	if got, want := <-heard, sum(numbers(2)); got != want {
		t.Errorf("to the sandbox: %s, want %s", got, want)
	}
	if want := fmt.Sprintf("%s:%d", id, port); conn.RemoteAddr().String() != want {
		t.Errorf("address %s, want %s", conn.RemoteAddr(), want)
	}
}

// TestDialPortClose: what was written before Close arrives, and nothing waits.
func TestDialPortClose(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	heard := make(chan string, 1)
	conn := dialPort(t, c, id, program(t, func(conn *net.TCPConn) {
		_, _ = io.WriteString(conn, strings.Repeat("never read", 10_000))
		text, _ := io.ReadAll(conn)
		heard <- string(text)
	}))
	if _, err := io.WriteString(conn, "the last words"); err != nil {
		t.Fatal(err)
	}
	waits := make(chan error)
	go func() {
		_, err := io.Copy(io.Discard, conn)
		waits <- err
	}()
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	if err := <-waits; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read that waits: %v", err)
	}
	if text := <-heard; text != "the last words" {
		t.Errorf("heard %q", text)
	}
	if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second close: %v", err)
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
}

// TestDialPortDeadline: a read that ran out of time costs nothing.
func TestDialPortDeadline(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	conn := dialPort(t, c, id, program(t, func(conn *net.TCPConn) { _, _ = io.Copy(conn, conn) }))
	for _, passed := range []time.Time{time.Now().Add(-time.Second), time.Now().Add(10 * time.Millisecond)} {
		_ = conn.SetReadDeadline(passed)
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read: %v", err)
		}
	}
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := io.ReadFull(conn, buf); err != nil || string(buf) != "hello" {
		t.Errorf("%q, %v", buf, err)
	}
	_ = conn.SetWriteDeadline(time.Now().Add(-time.Second))
	if _, err := conn.Write([]byte("x")); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("write: %v", err)
	}
}

func TestDialPortFails(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	_, err := c.DialPort(t.Context(), id, 0)
	if !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("port 0: %v", err)
	}
	if _, err = c.DialPort(t.Context(), "none", 80); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no sandbox: %v", err)
	}
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	_, err = c.DialPort(t.Context(), id, ln.Addr().(*net.TCPAddr).Port)
	if remote, ok := errors.AsType[*client.Error](err); !ok || remote.Status != http.StatusBadGateway || remote.Hint == "" {
		t.Errorf("nobody listens: %v", err)
	}
	conn := dialPort(t, c, id, program(t, func(conn *net.TCPConn) {
		_, _ = conn.Read(make([]byte, 1))
		_ = conn.SetLinger(0)
	}))
	if _, err = conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err = conn.Read(make([]byte, 1)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a connection that breaks: %v", err)
	}
}

// TestPublishedPorts also has net/http dial through the daemon.
func TestPublishedPorts(t *testing.T) {
	t.Parallel()
	c, id := connect(t)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) }))
	t.Cleanup(srv.Close)
	port := srv.Listener.Addr().(*net.TCPAddr).Port
	p, err := c.PublishPort(t.Context(), id, port, 0)
	if err != nil {
		t.Fatal(err)
	}
	if all, lerr := c.PublishedPorts(t.Context(), id); lerr != nil || len(all) != 1 || all[0] != p {
		t.Errorf("%+v, %v", all, lerr)
	}
	through := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.DialPort(ctx, id, port) }}
	t.Cleanup(through.CloseIdleConnections)
	for host, transport := range map[string]*http.Transport{p.Address: {}, "any.name": through} {
		if text := fetch(t, transport, "http://"+host+"/"); text != host {
			t.Errorf("%s answers %q", host, text)
		}
		transport.CloseIdleConnections()
	}
	if err = c.UnpublishPort(t.Context(), id, port); err != nil {
		t.Error(err)
	}
	if err = c.UnpublishPort(t.Context(), id, port); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("again: %v", err)
	}
}

func fetch(t *testing.T, transport *http.Transport, url string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
