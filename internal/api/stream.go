package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/wire"
)

const (
	chanStdin  = 0
	chanStdout = 1
	chanStderr = 2

	// maxMessage bounds one message from a client.
	maxMessage = 1 << 20
	// firstMessage is how long a client may take to say what it wants.
	firstMessage = 10 * time.Second
	// lastMessage is how long a client may take to accept the last event.
	lastMessage = 5 * time.Second
	// heartbeat is how often a stream shows that it lives. It is also how a
	// client that went away is noticed while nothing is read from it.
	heartbeat = 15 * time.Second
	// maxDimension is the largest width or height of a terminal.
	maxDimension = 65535
)

// errClientGone ends a stream whose client has left.
var errClientGone = errors.New("client has left")

// stream answers GET /v1/sandboxes/{id}/exec/stream.
func (s *server) stream(w http.ResponseWriter, r *http.Request) {
	if err := s.checkStream(r); err != nil {
		s.fail(w, r, err)
		return
	}
	leave, err := s.enterStream()
	if err != nil {
		s.fail(w, r, err)
		return
	}
	defer leave()
	conn, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true}) // checkStream has verified
	if err != nil {
		return // Accept has answered
	}
	defer func() { _ = conn.CloseNow() }() // a good end has closed it already
	conn.SetReadLimit(maxMessage)
	st := &execStream{conn: conn}
	err = st.serve(r.Context(), s.Sandboxes, r.PathValue("id"))
	st.finish(r.Context(), err)
	if !errors.Is(err, errClientGone) {
		s.note(r, err)
	}
}

// checkStream finds what is wrong with a request while it can be answered in
// JSON.
func (s *server) checkStream(r *http.Request) error {
	if !strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		return errdef.WithHint(fmt.Errorf("%w: a stream is a WebSocket", errdef.ErrInvalid), "use POST …/exec for one answer")
	}
	if err := checkOrigin(r); err != nil {
		return err
	}
	_, err := s.Sandboxes.Get(r.PathValue("id"))
	return err
}

// execStream is one command on one WebSocket.
type execStream struct {
	conn *websocket.Conn
	over bool // finish was called
}

func (st *execStream) serve(ctx context.Context, boxes Sandboxes, id string) error {
	req, err := st.first(ctx)
	if err != nil {
		return err
	}
	return boxes.With(ctx, id, func(ctx context.Context, g *guest.Client) error {
		p, err := start(ctx, g, req)
		if err != nil {
			return err
		}
		release := sync.OnceFunc(func() { leave(p, req) }) //nolint:contextcheck // it must also work when ctx has ended
		defer release()
		if err := st.started(ctx, p.PID()); err != nil || req.Background {
			return err
		}
		return st.join(ctx, &command{g, p}, release)
	})
}

// started says that the command runs. A context that ends while a message goes
// out takes the connection with it, and with that the message that would say
// why; so this one has a bound of its own.
func (st *execStream) started(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastMessage)
	defer cancel()
	return st.event(ctx, wire.StreamEvent{Started: &wire.StreamStarted{PID: pid}})
}

// finish says how it went, unless the command's exit has said so, and closes
// the connection in order.
func (st *execStream) finish(ctx context.Context, err error) {
	if st.over || errors.Is(err, errClientGone) {
		return
	}
	st.over = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastMessage)
	defer cancel()
	if err != nil {
		_, body := answerTo(ctx, err)
		_ = st.event(ctx, wire.StreamEvent{Error: &body}) // a client that left has no use for it
	}
	_ = st.conn.Close(websocket.StatusNormalClosure, "") // all was said; how the client leaves is its affair
}

// first reads what the client wants.
func (st *execStream) first(ctx context.Context) (wire.StreamRequest, error) {
	ctx, cancel := context.WithTimeout(ctx, firstMessage)
	defer cancel()
	kind, data, err := st.conn.Read(ctx)
	if err != nil {
		return wire.StreamRequest{}, errClientGone
	}
	if kind != websocket.MessageText {
		return wire.StreamRequest{}, fmt.Errorf("%w: the first message must be text", errdef.ErrInvalid)
	}
	if err = audit.Command(ctx, data); err != nil {
		return wire.StreamRequest{}, err
	}
	return decodeStreamRequest(data)
}

func decodeStreamRequest(data []byte) (wire.StreamRequest, error) {
	var req wire.StreamRequest
	if err := json.Unmarshal(data, &req); err != nil {
		return req, fmt.Errorf("%w: stream request: %w", errdef.ErrInvalid, err)
	}
	if (len(req.Args) == 0) == (req.Attach == 0) || req.Attach < 0 {
		return req, fmt.Errorf("%w: a stream request needs args or attach", errdef.ErrInvalid)
	}
	if req.PTY != nil {
		if err := checkSize(*req.PTY); err != nil {
			return req, err
		}
	}
	_, err := duration("timeout_secs", req.TimeoutSecs)
	return req, err
}

func checkSize(size wire.PTYSize) error {
	if size.Cols < 1 || size.Cols > maxDimension || size.Rows < 1 || size.Rows > maxDimension {
		return fmt.Errorf("%w: terminal size %d×%d", errdef.ErrInvalid, size.Cols, size.Rows)
	}
	return nil
}

func start(ctx context.Context, g *guest.Client, req wire.StreamRequest) (*guest.Process, error) {
	if req.Attach != 0 {
		return g.Attach(ctx, req.Attach)
	}
	timeout, err := duration("timeout_secs", req.TimeoutSecs)
	if err != nil {
		return nil, err
	}
	env, err := environ(req.Env)
	if err != nil {
		return nil, err
	}
	spec := guest.ExecSpec{
		Argv: req.Args, Env: env, Dir: req.Cwd, User: req.User, Stdin: req.Stdin,
		Timeout: timeout, Background: req.Background,
	}
	if req.PTY != nil {
		spec.PTY, spec.Cols, spec.Rows = true, req.PTY.Cols, req.PTY.Rows
	}
	return g.Exec(ctx, spec)
}

// leave ends the command, unless somebody else started it.
func leave(p *guest.Process, req wire.StreamRequest) {
	if req.Attach != 0 || req.Background {
		p.Detach()
		return
	}
	_ = p.Close() // it never fails
}

// command is a process in a guest and the session to the guest's agent.
type command struct {
	guest *guest.Client
	*guest.Process
}

// join passes bytes and messages between the client and the command until one
// of them has ended. release lets go of the command.
func (st *execStream) join(parent context.Context, cmd *command, release func()) error {
	ctx, cancel := context.WithCancelCause(parent)
	var work sync.WaitGroup
	work.Go(func() { st.readAll(context.WithoutCancel(parent), cancel, cmd) }) // it ends with the connection
	work.Go(func() { st.beat(ctx, cancel) })
	err := st.writeAll(ctx, cmd.Process)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	release() // a write to stdin that waits for the command waits no more
	st.finish(parent, err)
	_ = st.conn.CloseNow() // a good end has closed it already
	cancel(errClientGone)
	work.Wait()
	return err
}

// writeAll sends the command's output, and how it ended.
func (st *execStream) writeAll(ctx context.Context, p *guest.Process) error {
	for {
		out, err := p.Next(ctx)
		if err != nil {
			return err
		}
		if out.Exit != nil {
			exit := exitOf(*out.Exit)
			return st.event(ctx, wire.StreamEvent{Exit: &exit})
		}
		channel := byte(chanStdout)
		if out.Channel == guest.Stderr {
			channel = chanStderr
		}
		if err := st.conn.Write(ctx, websocket.MessageBinary, append([]byte{channel}, out.Data...)); err != nil {
			return errClientGone
		}
	}
}

// readAll passes on what the client sends until it leaves.
func (st *execStream) readAll(ctx context.Context, cancel context.CancelCauseFunc, cmd *command) {
	for {
		kind, data, err := st.conn.Read(ctx)
		if err != nil {
			cancel(errClientGone)
			return
		}
		if err := take(ctx, cmd, kind, data); err != nil {
			cancel(err)
			return
		}
	}
}

// take does what one message from the client asks.
func take(ctx context.Context, cmd *command, kind websocket.MessageType, data []byte) error {
	if kind == websocket.MessageBinary {
		if len(data) == 0 || data[0] != chanStdin {
			return fmt.Errorf("%w: a client sends on channel %d only", errdef.ErrInvalid, chanStdin)
		}
		_, _ = cmd.Stdin().Write(data[1:]) // a command that has ended or reads nothing says so by its exit
		return nil
	}
	control, err := decodeStreamControl(data)
	if err != nil {
		return err
	}
	switch {
	case control.StdinEOF:
		return cmd.Stdin().Close()
	case control.Resize != nil:
		err = cmd.Resize(ctx, control.Resize.Rows, control.Resize.Cols)
	case control.signal != 0:
		err = cmd.guest.Signal(ctx, cmd.PID(), control.signal, true)
	}
	if errors.Is(err, errdef.ErrNotFound) {
		return nil // the command was faster
	}
	return err
}

// streamControl is a control message whose values are good.
type streamControl struct {
	wire.StreamControl
	signal int
}

func decodeStreamControl(data []byte) (streamControl, error) {
	var c streamControl
	if err := json.Unmarshal(data, &c.StreamControl); err != nil {
		return c, fmt.Errorf("%w: stream message: %w", errdef.ErrInvalid, err)
	}
	if c.Resize != nil {
		if err := checkSize(*c.Resize); err != nil {
			return c, err
		}
	}
	var err error
	if c.Signal != "" {
		c.signal, err = parseSignal(c.Signal)
	}
	return c, err
}

// beat sends an empty event now and then.
func (st *execStream) beat(ctx context.Context, cancel context.CancelCauseFunc) {
	if err := beat(ctx, func() error { return st.event(ctx, wire.StreamEvent{}) }); err != nil {
		cancel(errClientGone)
	}
}

// beat calls send now and then, until ctx ends or it fails.
func beat(ctx context.Context, send func() error) error {
	ticker := time.NewTicker(heartbeat)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			if err := send(); err != nil {
				return err
			}
		}
	}
}

func (st *execStream) event(ctx context.Context, e wire.StreamEvent) error {
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	if err := st.conn.Write(ctx, websocket.MessageText, data); err != nil {
		return errClientGone
	}
	return nil
}
