package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// monitor is a client of the QEMU Machine Protocol, as far as this package
// needs it: one command at a time, events skipped.
// The protocol: docs/interop/qmp-spec.txt in QEMU's sources.
type monitor struct {
	mu   sync.Mutex // held for a command and its answer
	conn *net.UnixConn
	in   *bufio.Scanner
	dead bool

	seen map[string]bool // the events that there were, if they are of interest

	scratch scratch
}

// command is one request to QEMU.
type command struct {
	Execute   string         `json:"execute"`
	Arguments map[string]any `json:"arguments,omitempty"`
}

// reply is one line from QEMU: an answer, an error or an event.
type reply struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
}

// maxReply bounds a line from QEMU. A guest that has taken over its QEMU can
// send anything; a full console ring in JSON escapes is the longest true one.
const maxReply = 1 << 20

// dialTimeout bounds how long QEMU may take to greet and to answer. On a host that
// is slow and busy the greeting has come after 13 s.
const dialTimeout = 30 * time.Second

func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	m := &monitor{conn: conn.(*net.UnixConn), in: bufio.NewScanner(conn)}
	m.in.Buffer(make([]byte, 0, 4096), maxReply)
	stop := m.bound(ctx)
	defer stop()
	if !m.in.Scan() { // the greeting
		_ = conn.Close()
		return nil, errors.Join(errNoAnswer, m.in.Err(), context.Cause(ctx))
	}
	if _, err := m.exchange(command{Execute: "qmp_capabilities"}, nil); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return m, nil
}

var errNoAnswer = errors.New("QEMU closed its control connection")

// execute runs one command and returns its result.
func (m *monitor) execute(ctx context.Context, c command) (json.RawMessage, error) {
	return m.do(ctx, c, nil)
}

// send has a command run without waiting for its answer, and without reading it:
// the monitor is dead then.
func (m *monitor) send(ctx context.Context, c command) error {
	line, err := json.Marshal(c)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errNoAnswer
	}
	stop := m.bound(ctx)
	defer stop()
	m.dead = true
	_, err = m.conn.Write(append(line, '\n'))
	return err
}

// executeAll runs commands one after the other until one fails.
func (m *monitor) executeAll(ctx context.Context, commands ...command) error {
	for _, c := range commands {
		if _, err := m.execute(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// query runs a command without arguments and decodes its result into v.
func (m *monitor) query(ctx context.Context, name string, v any) error {
	raw, err := m.execute(ctx, command{Execute: name})
	if err != nil {
		return err
	}
	return decode(raw, v)
}

// sendFile gives QEMU a copy of f under a name that "fd:name" refers to.
func (m *monitor) sendFile(ctx context.Context, name string, f *os.File) error {
	_, err := m.do(ctx, command{Execute: "getfd", Arguments: map[string]any{"fdname": name}}, f)
	return err
}

func (m *monitor) do(ctx context.Context, c command, f *os.File) (json.RawMessage, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return nil, errNoAnswer
	}
	stop := m.bound(ctx)
	defer stop()
	raw, err := m.exchange(c, f)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return raw, err
}

// exchange sends a command, with f if there is one, and reads up to its
// answer. After an error of the connection the monitor is dead: an answer that
// comes late must not be taken for the next command's.
func (m *monitor) exchange(c command, f *os.File) (json.RawMessage, error) {
	line, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	if _, _, err := m.conn.WriteMsgUnix(append(line, '\n'), rights, nil); err != nil {
		m.dead = true
		return nil, err
	}
	for m.in.Scan() {
		var r reply
		if err := json.Unmarshal(m.in.Bytes(), &r); err != nil {
			m.dead = true
			return nil, fmt.Errorf("read QEMU's answer: %w", err)
		}
		switch {
		case r.Event != "":
			m.note(r.Event)
		case r.Error != nil:
			return nil, fmt.Errorf("QEMU: %s: %s", c.Execute, r.Error.Desc)
		default:
			return r.Return, nil
		}
	}
	m.dead = true
	return nil, errors.Join(errNoAnswer, m.in.Err())
}

// bound makes reads and writes fail when ctx ends, or after dialTimeout.
func (m *monitor) bound(ctx context.Context) (stop func()) {
	_ = m.conn.SetDeadline(time.Now().Add(dialTimeout))
	cancel := context.AfterFunc(ctx, func() { _ = m.conn.SetDeadline(time.Unix(1, 0)) })
	return func() { cancel() }
}

func (m *monitor) broken() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dead
}

// close ends the connection; a command under way fails.
func (m *monitor) close() error {
	err := m.conn.Close()
	return errors.Join(err, m.scratch.close())
}

func decode(raw json.RawMessage, v any) error {
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("read QEMU's answer: %w", err)
	}
	return nil
}
