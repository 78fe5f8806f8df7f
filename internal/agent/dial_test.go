package agent_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// TestDialEndsWithAgent: a connection that stands still does not keep the agent
// from closing.
func TestDialEndsWithAgent(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	m := newMachine(t)
	c := m.dial()
	conn, err := c.DialPort(within(t), ln.Addr().(*net.TCPAddr).Port)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	m.agent.Close()
	deadline := time.Now().Add(20 * time.Second)
	_, _ = conn.SetReadDeadline(deadline), far.SetReadDeadline(deadline)
	if _, err = conn.Read(make([]byte, 1)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("the host's side: %v", err)
	}
	if _, err = io.ReadAll(far); err != nil {
		t.Errorf("the program's side: %v", err)
	}
}

// TestDialEndsWithSession: so it is in a fork, whose host says Hello while the
// connections of the machine that it was forked from are open.
func TestDialEndsWithSession(t *testing.T) {
	t.Parallel()
	var config net.ListenConfig
	ln, err := config.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	m := newMachine(t)
	link := m.pipe()
	c := m.dialOn(link)
	if _, err = c.DialPort(within(t), ln.Addr().(*net.TCPAddr).Port); err != nil {
		t.Fatal(err)
	}
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = far.Close() }()
	_ = link.Close()
	_ = far.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err = io.ReadAll(far); err != nil {
		t.Errorf("the program's side: %v", err)
	}
}
