package daemon

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"

	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// TestPublicationsEndWithDaemon, and those who are connected do not keep its
// sandboxes from being suspended, nor resume them. The next daemon has none.
func TestPublicationsEndWithDaemon(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0") // the fake's guests are on this host
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	go func() {
		for {
			conn, aerr := ln.Accept()
			if aerr != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	dir := stateDir(t)
	engine := fake.New()
	d, r, stop := start(t, engine, Config{StateDir: dir, OnStop: Suspend})
	template(t, d)
	id := fork(t, d, 1)[0]
	path := "/v1/sandboxes/" + id + "/ports"
	publish := func(r *reached) (address string) {
		t.Helper()
		status, _, body := r.ask(t, "unix", http.MethodPost, path, fmt.Sprintf(`{"guest_port":%d}`, ln.Addr().(*net.TCPAddr).Port))
		var p struct{ Address string }
		if jerr := json.Unmarshal([]byte(body), &p); jerr != nil || status != http.StatusCreated {
			t.Fatalf("publish: %d %s", status, body)
		}
		return p.Address
	}
	address := publish(r)
	conn := reach(t, address)
	write(t, conn, "hello")
	if _, err = io.ReadFull(conn, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	stop()
	closed(t, conn)
	var dialer net.Dialer
	if left, derr := dialer.DialContext(t.Context(), "tcp", address); derr == nil {
		_ = left.Close()
		t.Error("somebody listens still")
	}
	d, r, stop = start(t, engine, Config{StateDir: dir, OnStop: Remove})
	defer stop()
	if box, gerr := d.Sandboxes.Get(id); gerr != nil || box.State != sandbox.Suspended {
		t.Errorf("the sandbox: %+v, %v", box, gerr)
	}
	if status, _, body := r.ask(t, "unix", http.MethodGet, path, ""); status != http.StatusOK || body != "[]\n" {
		t.Errorf("the next daemon has %d %q", status, body)
	}
	// It is resumed by whoever comes, and what is published ends with it.
	conn = reach(t, publish(r))
	write(t, conn, "hello")
	if _, err = io.ReadFull(conn, make([]byte, 5)); err != nil {
		t.Error(err)
	}
	if err = d.Sandboxes.Kill(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	closed(t, conn)
}
