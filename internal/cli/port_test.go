package cli_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/cli"
)

// forwarding is a tine port that runs.
type forwarding struct {
	address string
	stderr  lockedBuffer
	stop    context.CancelFunc
	code    chan int
}

// lockedBuffer is what a command writes while its test reads.
type lockedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// forward runs tine port for a port of sb-1.
func forward(t *testing.T, url string, port int) *forwarding {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	f := &forwarding{stop: stop, code: make(chan int, 1)}
	out, in := io.Pipe()
	go func() {
		f.code <- cli.Run(ctx, cli.Environment{
			Args: []string{"port", "--json", "sb-1", fmt.Sprint(port)}, Stdin: strings.NewReader(""),
			Stdout: in, Stderr: &f.stderr, Getenv: func(name string) string { return map[string]string{"TINE_URL": url}[name] },
		})
		_ = in.Close()
	}()
	t.Cleanup(stop)
	var p client.PublishedPort
	if err := json.NewDecoder(out).Decode(&p); err != nil {
		t.Fatalf("%v, stderr %s", err, f.stderr.String())
	}
	go func() { _, _ = io.Copy(io.Discard, out) }()
	if p.GuestPort != port || p.Address != fmt.Sprintf("127.0.0.1:%d", p.HostPort) {
		t.Errorf("printed %+v", p)
	}
	f.address = p.Address
	return f
}

// forked is a daemon with a sandbox, sb-1.
func forked(t *testing.T) (*client.Client, string) {
	t.Helper()
	url := apitest.New(t).Serve(spec).URL
	c, err := client.New(client.Config{URL: url})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if _, err = c.Fork(t.Context(), client.ForkRequest{Snapshot: "py"}); err != nil {
		t.Fatal(err)
	}
	return c, url
}

func reach(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 10 * time.Second}
	conn, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(*net.TCPConn)
}

func TestPort(t *testing.T) {
	t.Parallel()
	_, url := forked(t)
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, aerr := ln.Accept()
			if aerr != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				text, _ := io.ReadAll(conn)
				_, _ = fmt.Fprintf(conn, "heard %s", text)
			}()
		}
	}()
	f := forward(t, url, ln.Addr().(*net.TCPAddr).Port)
	for range 3 {
		conn := reach(t, f.address)
		if _, err = io.WriteString(conn, "hello"); err != nil {
			t.Fatal(err)
		}
		_ = conn.CloseWrite()
		if text, rerr := io.ReadAll(conn); string(text) != "heard hello" || rerr != nil {
			t.Errorf("%q, %v", text, rerr)
		}
	}
	// Where nobody listens any more the connection ends, and the user is told.
	_ = ln.Close()
	if text, rerr := io.ReadAll(reach(t, f.address)); len(text) != 0 {
		t.Errorf("%q, %v", text, rerr)
	}
	if !strings.Contains(f.stderr.String(), "connection refused") {
		t.Errorf("stderr %q", f.stderr.String())
	}
	f.stop()
	if code := <-f.code; code != 0 {
		t.Errorf("exit code %d, stderr %q", code, f.stderr.String())
	}
}

// TestPortOfASandboxThatEnds: the next connection finds it, and there is no
// sense in waiting for others.
func TestPortOfASandboxThatEnds(t *testing.T) {
	t.Parallel()
	c, url := forked(t)
	f := forward(t, url, 80)
	if err := c.RemoveSandbox(t.Context(), "sb-1"); err != nil {
		t.Fatal(err)
	}
	_, _ = bufio.NewReader(reach(t, f.address)).ReadByte()
	if code := <-f.code; code != 3 || !strings.Contains(f.stderr.String(), "not found") {
		t.Errorf("exit code %d, stderr %q", code, f.stderr.String())
	}
}
