package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// qmp speaks to QEMU as a shell script would: a line out, lines in until the
// answer. One goroutine uses it at a time.
type qmp struct {
	conn *net.UnixConn
	in   *bufio.Scanner
}

// maxReply bounds a line from QEMU.
const maxReply = 1 << 20

func dialQMP(ctx context.Context, path string) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	q := &qmp{conn: conn.(*net.UnixConn), in: bufio.NewScanner(conn)}
	q.in.Buffer(nil, maxReply)
	defer q.bound(ctx)()
	if !q.in.Scan() { // the greeting
		return nil, errors.Join(q.gone(ctx), conn.Close())
	}
	if err = q.do(ctx, "qmp_capabilities", nil, nil); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return q, nil
}

// do runs a command and decodes its result into out, unless that is nil.
func (q *qmp) do(ctx context.Context, command string, args map[string]any, out any) error {
	return q.send(ctx, command, args, nil, out)
}

// give hands QEMU a copy of f, under the name device.
func (q *qmp) give(ctx context.Context, f *os.File) error {
	return q.send(ctx, "getfd", map[string]any{"fdname": "device"}, f, nil)
}

func (q *qmp) send(ctx context.Context, command string, args map[string]any, f *os.File, out any) error {
	defer q.bound(ctx)()
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	text, err := json.Marshal(request)
	if err != nil {
		return err
	}
	var rights []byte
	if f != nil {
		rights = unix.UnixRights(int(f.Fd()))
	}
	if _, _, err = q.conn.WriteMsgUnix(append(text, '\n'), rights, nil); err != nil {
		return fmt.Errorf("%s: %w", command, errors.Join(q.gone(ctx), err))
	}
	result, err := q.answer(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(result, out)
}

// answer reads up to the answer, past events.
func (q *qmp) answer(ctx context.Context) (json.RawMessage, error) {
	for q.in.Scan() {
		var r struct {
			Return json.RawMessage `json:"return"`
			Event  string          `json:"event"`
			Error  *struct {
				Desc string `json:"desc"`
			} `json:"error"`
		}
		if err := json.Unmarshal(q.in.Bytes(), &r); err != nil {
			return nil, err
		}
		switch {
		case r.Error != nil:
			return nil, fmt.Errorf("%w: QEMU: %s", errdef.ErrUnavailable, r.Error.Desc)
		case r.Event == "":
			return r.Return, nil
		}
	}
	return nil, q.gone(ctx)
}

func (q *qmp) gone(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(fmt.Errorf("%w: QEMU closed its control connection", errdef.ErrUnavailable), q.in.Err())
}

// bound makes reads and writes fail when ctx ends.
func (q *qmp) bound(ctx context.Context) (stop func()) {
	cancel := context.AfterFunc(ctx, func() { _ = q.conn.SetDeadline(time.Unix(1, 0)) })
	return func() { cancel() }
}

// migrate starts a migration, which leaves shared memory out, and asks until it
// has ended.
func (q *qmp) migrate(ctx context.Context, command, uri string) error {
	ignoreShared := map[string]any{"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": true}}}
	if err := q.do(ctx, "migrate-set-capabilities", ignoreShared, nil); err != nil {
		return err
	}
	if err := q.do(ctx, command, map[string]any{"uri": uri}, nil); err != nil {
		return err
	}
	tick := time.NewTicker(200 * time.Microsecond)
	defer tick.Stop()
	for {
		var state struct {
			Status string `json:"status"`
		}
		if err := q.do(ctx, "query-migrate", nil, &state); err != nil {
			return err
		}
		switch state.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("%w: QEMU: migration %s", errdef.ErrUnavailable, state.Status)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
