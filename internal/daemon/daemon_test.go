package daemon

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/fake"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// stateDir is a directory whose path leaves room for sockets.
func stateDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tine") //nolint:usetesting // see above
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func open(t *testing.T, cfg Config) *Daemon {
	t.Helper()
	cfg.Engine = fake.New()
	d, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return d
}

func TestOneDaemonOwnsTheDirectory(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	open(t, Config{StateDir: dir})
	_, err := Open(t.Context(), Config{StateDir: dir, Engine: fake.New()})
	if !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
		t.Errorf("a second daemon: %v, want ErrConflict and a hint", err)
	}
	open(t, Config{StateDir: dir, Ephemeral: true})
}

func TestLongStateDir(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(stateDir(t), strings.Repeat("x", maxStateDir))
	if _, err := Open(t.Context(), Config{StateDir: dir, Engine: fake.New()}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("Open: %v, want ErrInvalid", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it was made all the same: %v", err)
	}
}

func TestListenAddresses(t *testing.T) {
	t.Parallel()
	d := open(t, Config{StateDir: stateDir(t), Ephemeral: true})
	for addr, want := range map[string]error{
		"127.0.0.1:0": nil, "localhost:0": nil, "127.1.2.3:0": nil,
		"0.0.0.0:0": errdef.ErrDenied, ":0": errdef.ErrDenied, "192.0.2.1:0": errdef.ErrDenied, "[::]:0": errdef.ErrDenied,
		"name.example:80": errdef.ErrDenied, "127.0.0.1": errdef.ErrInvalid, "127.0.0.1:http:x": errdef.ErrInvalid,
	} {
		listeners, err := d.Listen(t.Context(), Addresses{Listen: addr})
		if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", addr, err, want)
		}
		closeAll(t, listeners)
	}
}

func closeAll(t *testing.T, listeners []net.Listener) {
	t.Helper()
	for _, ln := range listeners {
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestServe answers on a socket that only its owner may use, also where a
// killed daemon left one, until its context ends.
func TestServe(t *testing.T) {
	t.Parallel()
	dir := stateDir(t)
	d := open(t, Config{StateDir: dir, Version: "v1.2.3"})
	socket := filepath.Join(dir, "tine.sock")
	if err := os.WriteFile(socket, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	listeners, err := d.Listen(t.Context(), Addresses{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("socket has mode %v, want 0600", info.Mode())
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listeners...) }()
	c, err := client.New(client.Config{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if v, err := c.Version(t.Context()); err != nil || v.Version != "v1.2.3" {
		t.Errorf("version %+v, %v", v, err)
	}
	stop()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := c.Health(t.Context()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("after the end: %v, want ErrUnavailable", err)
	}
}

func TestLocal(t *testing.T) {
	t.Parallel()
	d, err := Open(t.Context(), Config{StateDir: stateDir(t), Engine: fake.New(), Ephemeral: true})
	if err != nil {
		t.Fatal(err)
	}
	c, end, err := d.Local(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if list, err := c.Sandboxes(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("sandboxes %v, %v", list, err)
	}
	if err := end(t.Context()); err != nil {
		t.Errorf("end: %v", err)
	}
	if err := c.Health(t.Context()); err == nil {
		t.Error("it answers after its end")
	}
}
