package api_test

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// hostEnd is a unix socket where script has each connection.
func hostEnd(t *testing.T, script func(net.Conn)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "v")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			script(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return path
}

func TestDialGuest(t *testing.T) {
	t.Parallel()
	path := hostEnd(t, func(conn net.Conn) {
		var line [len("CONNECT 1024\n")]byte
		if _, err := io.ReadFull(conn, line[:]); err != nil || string(line[:]) != "CONNECT 1024\n" {
			t.Errorf("%q, %v", line, err)
		}
		// The guest speaks first, in the same packet.
		_, _ = io.WriteString(conn, "OK 1073741824\nhello\nOK 7\n")
		_, _ = io.Copy(conn, conn)
	})
	conn, err := api.DialGuest(bounded(t), path, 1024)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	want := "hello\nOK 7\n"
	got := make([]byte, len(want))
	if _, err = io.ReadFull(conn, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
}

// The context of the call is not that of the connection.
func TestDialGuestOutlivesCall(t *testing.T) {
	t.Parallel()
	path := hostEnd(t, func(conn net.Conn) {
		_, _ = io.WriteString(conn, "OK 1\n")
		_, _ = io.Copy(io.Discard, conn)
	})
	ctx, cancel := context.WithCancel(t.Context())
	conn, err := api.DialGuest(ctx, path, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	if _, err = io.WriteString(conn, "still here"); err != nil {
		t.Error(err)
	}
}

func TestDialGuestFails(t *testing.T) {
	t.Parallel()
	say := func(s string) func(net.Conn) {
		return func(conn net.Conn) { _, _ = io.WriteString(conn, s) }
	}
	tests := map[string]struct {
		script func(net.Conn)
		want   error // nil is in no category
		words  string
	}{
		"nobody listens":    {func(conn net.Conn) { _, _ = io.ReadFull(conn, make([]byte, 10)) }, errdef.ErrUnavailable, ""},
		"hangs up at once":  {func(net.Conn) {}, errdef.ErrUnavailable, ""},
		"hangs up in it":    {say("OK 12"), errdef.ErrUnavailable, ""},
		"hangs":             {func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }, context.DeadlineExceeded, ""},
		"hangs in it":       {func(conn net.Conn) { _, _ = io.WriteString(conn, "OK 1"); _, _ = io.Copy(io.Discard, conn) }, context.DeadlineExceeded, ""},
		"a line too long":   {say("OK " + strings.Repeat("1", 1<<20)), nil, "longer"},
		"another word":      {say("NO 12\n"), nil, "not a port"},
		"no port":           {say("OK \n"), nil, "not a port"},
		"a port that is no": {say("OK 4294967296\n"), nil, "not a port"},
		"a carriage return": {say("OK 12\r\n"), nil, "not a port"},
		"an escape":         {say("OK \x1b[2J\n"), nil, "?[2J"},
		"an empty line":     {say("\n"), nil, "not a port"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := hostEnd(t, tt.script)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			if !errors.Is(tt.want, context.DeadlineExceeded) {
				ctx = bounded(t)
			}
			defer cancel()
			conn, err := api.DialGuest(ctx, path, 1024)
			if conn != nil {
				t.Error("there is a connection")
			}
			if err == nil || tt.want != nil && !errors.Is(err, tt.want) || tt.want == nil && errdef.Code(err) != "internal" {
				// A host that hangs up on what it has not read may cut off the line.
				if !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "reset") && !strings.Contains(err.Error(), "pipe") {
					t.Errorf("got %v", err)
				}
				return
			}
			if !strings.Contains(err.Error(), tt.words) || strings.Contains(err.Error(), "\x1b") {
				t.Errorf("got %q", err)
			}
		})
	}
	if _, err := api.DialGuest(bounded(t), filepath.Join(t.TempDir(), "none"), 1); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("no socket: %v", err)
	}
}
