//go:build vm

package main_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
)

// TestPorts reaches a web server in a fork, which has no network, by every way
// that there is.
func TestPorts(t *testing.T) {
	h := newHost(t)
	daemon := h.serve()
	out, errOut, code := h.tine("fork", "-q", "--snapshot", "py")
	if code != 0 {
		t.Fatalf("fork: exit code %d: %s", code, errOut)
	}
	id := strings.TrimSpace(out)
	const page = "a page that the fork has\n"
	h.want("", "exec", id, "--", "sh", "-c", "mkdir -p /srv/in && printf '"+page+"' > /srv/in/page.txt")
	c, err := client.New(client.Config{Socket: filepath.Join(h.dir, "tine.sock")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.DialPort(t.Context(), id, 8000)
	if remote, ok := errors.AsType[*client.Error](err); !ok || remote.Status != http.StatusBadGateway {
		t.Errorf("before anybody listens: %v", err)
	}
	if _, errOut, code = h.tine("exec", "-d", "-w", "/srv", id, "--", "python3", "-u", "-m", "http.server", "8000", "--bind", "127.0.0.1"); code != 0 {
		t.Fatalf("exec: exit code %d: %s", code, errOut)
	}
	h.listens(c, id, 8000)

	unix := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(h.dir, "tine.sock"))
	}}
	defer unix.CloseIdleConnections()
	proxy := "http://tine/v1/sandboxes/" + id + "/ports/8000/in/page.txt"
	if header := h.fetch(unix, proxy, page); header.Get("Content-Security-Policy") == "" {
		t.Errorf("the proxy's answer: %v", header)
	}

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	forward := h.command(ctx, "port", id, "8000")
	forward.Cancel = func() error { return forward.Process.Signal(syscall.SIGINT) }
	stdout, err := forward.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = forward.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("tine port printed %q: %v", line, err)
	}
	direct := &http.Transport{}
	defer direct.CloseIdleConnections()
	h.fetch(direct, "http://"+strings.TrimSpace(line)+"/in/page.txt", page)
	stop()
	if err = forward.Wait(); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("tine port: %v", err)
	}

	out, errOut, code = h.tine("port", "publish", id, "8000")
	if code != 0 {
		t.Fatalf("publish: exit code %d: %s", code, errOut)
	}
	published := "http://" + strings.TrimSpace(out) + "/in/page.txt"
	h.fetch(direct, published, page)

	// Whoever uses a suspended sandbox resumes it, and its programs go on.
	if _, errOut, code = h.tine("suspend", id); code != 0 {
		t.Fatalf("suspend: exit code %d: %s", code, errOut)
	}
	direct.CloseIdleConnections()
	h.fetch(direct, published, page)
	start := time.Now()
	const requests = 20
	for range requests {
		h.fetch(unix, proxy, page)
	}
	t.Logf("%d requests through the proxy, each on a connection of its own: %v each", requests, time.Since(start)/requests)
	h.throughput(c, id)

	if _, errOut, code = h.tine("rm", id); code != 0 {
		t.Errorf("rm: exit code %d: %s", code, errOut)
	}
	direct.CloseIdleConnections()
	if resp, err := direct.RoundTrip(h.request(published)); err == nil {
		_ = resp.Body.Close()
		t.Error("the publication outlives its sandbox")
	}
	end(t, daemon, syscall.SIGTERM)
}

// listens waits until a program of the guest does.
func (h *host) listens(c *client.Client, id string, port int) {
	h.t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(time.Minute); ; <-tick.C {
		conn, err := c.DialPort(h.t.Context(), id, port)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatal(err)
		}
	}
}

func (h *host) request(url string) *http.Request {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	h.t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		h.t.Fatal(err)
	}
	return req
}

// fetch sees that a page is what it should be, and returns its header.
func (h *host) fetch(transport *http.Transport, url, page string) http.Header {
	h.t.Helper()
	resp, err := transport.RoundTrip(h.request(url))
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if text, err := io.ReadAll(resp.Body); err != nil || string(text) != page || resp.StatusCode != http.StatusOK {
		h.t.Errorf("%s: %s %q, %v", url, resp.Status, text, err)
	}
	return resp.Header
}

// throughput sees that 32 MiB of zeros come as they are, and says how quickly.
func (h *host) throughput(c *client.Client, id string) {
	h.t.Helper()
	const size = 32 << 20
	program := fmt.Sprintf("import socket; s = socket.create_server(('127.0.0.1', 8001)); c, _ = s.accept(); c, _ = s.accept(); "+
		"[c.sendall(bytes(1 << 20)) for _ in range(%d)]", size>>20)
	if _, errOut, code := h.tine("exec", "-d", id, "--", "python3", "-c", program); code != 0 {
		h.t.Fatalf("exec: exit code %d: %s", code, errOut)
	}
	h.listens(c, id, 8001)
	conn, err := c.DialPort(h.t.Context(), id, 8001)
	if err != nil {
		h.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(3 * time.Minute))
	start := time.Now()
	n, err := io.Copy(io.Discard, conn)
	if n != size || err != nil {
		h.t.Errorf("%d bytes, %v", n, err)
	}
	h.t.Logf("%.1f MiB a second from the guest", float64(n)/(1<<20)/time.Since(start).Seconds())
}
