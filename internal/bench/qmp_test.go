package bench

import (
	"bufio"
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

// play answers the lines of one connection with replies, one after the other,
// and returns the lines when the connection or the replies end.
func play(t *testing.T, replies ...string) (path string, heard func() []string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "q")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	lines := make(chan []string, 1)
	go func() {
		var got []string
		defer func() { lines <- got }()
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer func() { _ = conn.Close() }()
		in := bufio.NewScanner(conn)
		for i, reply := range replies {
			if i > 0 && !in.Scan() { // the first is the greeting
				return
			}
			if i > 0 {
				got = append(got, in.Text())
			}
			if _, err := conn.Write([]byte(reply + "\n")); err != nil {
				return
			}
		}
	}()
	return path, func() []string { return <-lines }
}

const (
	greeting = `{"QMP": {"version": {}, "capabilities": []}}`
	okay     = `{"return": {}}`
)

func TestMigrate(t *testing.T) {
	t.Parallel()
	path, heard := play(t, greeting, okay, okay, `{"event": "MIGRATION"}`+"\n"+okay,
		`{"return": {"status": "active"}}`, `{"return": {"status": "completed"}}`)
	q, err := dialQMP(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.conn.Close() }()
	if err := q.migrate(t.Context(), "migrate-incoming", "fd:3"); err != nil {
		t.Fatal(err)
	}
	want := []string{
		`{"execute":"qmp_capabilities"}`,
		`{"arguments":{"capabilities":[{"capability":"x-ignore-shared","state":true}]},"execute":"migrate-set-capabilities"}`,
		`{"arguments":{"uri":"fd:3"},"execute":"migrate-incoming"}`,
		`{"execute":"query-migrate"}`,
		`{"execute":"query-migrate"}`,
	}
	if diff := cmp.Diff(want, heard()); diff != "" {
		t.Error(diff)
	}
}

func TestMonitorThatFails(t *testing.T) {
	t.Parallel()
	for name, replies := range map[string][]string{
		"refuses":   {greeting, okay, `{"error": {"class": "GenericError", "desc": "no"}}`},
		"fails":     {greeting, okay, okay, okay, `{"return": {"status": "failed"}}`},
		"closes":    {greeting, okay, okay},
		"too_long":  {greeting, okay, strings.Repeat("x", maxReply+1)},
		"only_news": {greeting, okay, `{"event": "STOP"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path, _ := play(t, replies...)
			q, err := dialQMP(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = q.conn.Close() }()
			if err := q.migrate(t.Context(), "migrate-incoming", "fd:3"); !errors.Is(err, errdef.ErrUnavailable) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestMonitorHeedsContext(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "q"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		if conn, err := ln.Accept(); err == nil { // connected, and never greeted
			cancel()
			_, _ = conn.Read(make([]byte, 1)) // until the other side gives up
			_ = conn.Close()
		}
	}()
	if _, err := dialQMP(ctx, ln.Addr().String()); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
