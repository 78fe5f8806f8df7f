package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/coder/websocket"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// The channels of a stream's binary messages.
const (
	chanStdin  = 0
	chanStdout = 1
	chanStderr = 2

	// maxMessage bounds one message from the daemon.
	maxMessage = 1 << 20
	// stdinChunk is how much of stdin goes into one message.
	stdinChunk = 32 << 10
)

// TerminalSize is a terminal's size.
type TerminalSize = wire.PTYSize

// StreamRequest is a command to run, or a running one to attach to.
type StreamRequest struct {
	Args []string
	// Attach is the pid of a running process; Args is empty then.
	Attach int
	Env    map[string]string
	Dir    string
	User   string
	// Terminal, when set, gives the command a terminal of that size. Its
	// output all comes as stdout.
	Terminal *TerminalSize
	// Stdin says that input follows; otherwise the command reads nothing.
	Stdin bool
	// Timeout ends the command and all it has started; 0 means never.
	Timeout time.Duration
	// Background leaves the command running when the stream closes.
	Background bool
}

// Exit says how a streamed command ended.
type Exit struct {
	// Code is the command's own, or minus the number of the signal that
	// ended it.
	Code     int
	Signal   string
	TimedOut bool
}

// Stream is a command that runs in a sandbox. Wait must be called, and reads
// its output; the other methods may be called meanwhile from other goroutines.
type Stream struct {
	// PID is the command's, in the guest.
	PID  int
	conn *websocket.Conn
	once sync.Once
}

// ExecStream starts a command, or attaches to one, and returns when it runs.
// ctx bounds the whole stream: when it ends, so does the command, unless it
// runs in the background.
func (c *Client) ExecStream(ctx context.Context, id string, req StreamRequest) (*Stream, error) {
	conn, err := c.dialStream(ctx, c.base+box(id, "exec", "stream"))
	if err != nil {
		return nil, err
	}
	s := &Stream{conn: conn}
	if err := s.start(ctx, req); err != nil {
		_ = conn.CloseNow() // err says more
		return nil, err
	}
	return s, nil
}

// dialStream opens a WebSocket. ctx bounds the call only.
func (c *Client) dialStream(ctx context.Context, target string) (*websocket.Conn, error) {
	hello, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if err = c.authorize(hello, nil); err != nil {
		return nil, err
	}
	conn, resp, err := websocket.Dial(ctx, target, &websocket.DialOptions{HTTPClient: c.http, HTTPHeader: hello.Header}) //nolint:bodyclose // Dial closes it
	if err != nil {
		if resp != nil && resp.StatusCode >= 400 && resp.Body != nil {
			return nil, readError(resp)
		}
		return nil, unreachable(err)
	}
	conn.SetReadLimit(maxMessage)
	return conn, nil
}

func (s *Stream) start(ctx context.Context, req StreamRequest) error {
	if err := s.writeJSON(ctx, wire.StreamRequest{
		Args: req.Args, Attach: req.Attach, Env: req.Env, Cwd: req.Dir, User: req.User, PTY: req.Terminal,
		Stdin: req.Stdin, TimeoutSecs: req.Timeout.Seconds(), Background: req.Background,
	}); err != nil {
		return err
	}
	kind, data, err := s.conn.Read(ctx)
	if err != nil {
		return fmt.Errorf("read stream: %w", err)
	}
	event, err := decodeEvent(kind, data)
	if err != nil {
		return err
	}
	if event.Started == nil {
		return errors.New("read stream: the first message does not say that the command runs")
	}
	s.PID = event.Started.PID
	return nil
}

func decodeEvent(kind websocket.MessageType, data []byte) (wire.StreamEvent, error) {
	var event wire.StreamEvent
	if kind != websocket.MessageText {
		return event, errors.New("read stream: bytes where an event is due")
	}
	if err := json.Unmarshal(data, &event); err != nil {
		return event, fmt.Errorf("read stream: %w", err)
	}
	if e := event.Error; e != nil {
		return event, &Error{Code: e.Code, Message: e.Error, Hint: e.Hint}
	}
	return event, nil
}

func (s *Stream) writeJSON(ctx context.Context, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if err := s.conn.Write(ctx, websocket.MessageText, data); err != nil {
		return fmt.Errorf("write stream: %w", err)
	}
	return nil
}

// SendStdin sends what r has to the command until r ends, and then an end of
// input. It may be called once.
func (s *Stream) SendStdin(ctx context.Context, r io.Reader) error {
	buf := make([]byte, 1+stdinChunk)
	buf[0] = chanStdin
	for {
		n, err := r.Read(buf[1:])
		if n > 0 {
			if werr := s.conn.Write(ctx, websocket.MessageBinary, buf[:1+n]); werr != nil {
				return fmt.Errorf("write stdin: %w", werr)
			}
		}
		if errors.Is(err, io.EOF) {
			return s.writeJSON(ctx, wire.StreamControl{StdinEOF: true})
		}
		if err != nil {
			return fmt.Errorf("read stdin: %w", err)
		}
	}
}

// Resize tells the command's terminal its new size.
func (s *Stream) Resize(ctx context.Context, size TerminalSize) error {
	return s.writeJSON(ctx, wire.StreamControl{Resize: &size})
}

// Signal sends the command a signal, by name or number.
func (s *Stream) Signal(ctx context.Context, signal string) error {
	return s.writeJSON(ctx, wire.StreamControl{Signal: signal})
}

// Wait copies the command's output until it has ended, closes the stream and
// says how it ended.
func (s *Stream) Wait(ctx context.Context, stdout, stderr io.Writer) (Exit, error) {
	defer s.Close()
	for {
		kind, data, err := s.conn.Read(ctx)
		if err != nil {
			return Exit{}, fmt.Errorf("read stream: %w", err)
		}
		if kind == websocket.MessageBinary {
			if err = deliver(data, stdout, stderr); err != nil {
				return Exit{}, err
			}
			continue
		}
		event, err := decodeEvent(kind, data)
		if err != nil {
			return Exit{}, err
		}
		if e := event.Exit; e != nil {
			return Exit{Code: int(e.ExitCode), Signal: e.Signal, TimedOut: e.TimedOut}, nil
		}
	}
}

func deliver(data []byte, stdout, stderr io.Writer) error {
	if len(data) == 0 {
		return nil
	}
	out := stdout
	if data[0] == chanStderr {
		out = stderr
	}
	if _, err := out.Write(data[1:]); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// Close ends the stream, and the command with it unless it runs in the
// background. It may be called more than once.
func (s *Stream) Close() {
	s.once.Do(func() { _ = s.conn.Close(websocket.StatusNormalClosure, "") }) // it is over either way
}
