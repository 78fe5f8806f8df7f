package forkd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// maxLine bounds a request.
	maxLine = 1 << 20
	// maxConns is how many requests are answered at once; more wait.
	maxConns = 64
	// lineTime is how long a client may take to send its line, or to accept the
	// answer.
	lineTime = 30 * time.Second
	// lingerTime is how long the rest of a line that is too long is thrown
	// away, so that its sender gets to read the answer.
	lingerTime = time.Second
	// defaultTimeout is that of a command.
	defaultTimeout = 30 * time.Second
	// failed is the exit code beside an error.
	failed = 1
)

// sandboxes is what an agent asks of a client.Client.
type sandboxes interface {
	Ping(ctx context.Context, id string) (client.Pong, error)
	Exec(ctx context.Context, id string, req client.ExecRequest) (client.ExecResult, error)
	Eval(ctx context.Context, id string, req client.EvalRequest) (client.EvalResult, error)
}

// agent answers as forkd's agent in a guest does.
type agent struct {
	daemon sandboxes
	id     string
}

// serve answers on ln until ctx ends, and closes it. It returns once all
// connections are closed.
func serve(ctx context.Context, ln net.Listener, a *agent) error {
	var work sync.WaitGroup
	defer work.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = ln.Close() })() // it is about to end
	slots := make(chan struct{}, maxConns)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = conn.Close() // nobody answers any more
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		work.Go(func() {
			a.converse(ctx, conn)
			<-slots
		})
	}
}

// converse reads a line, writes one and closes.
func (a *agent) converse(ctx context.Context, conn net.Conn) {
	defer conn.Close() //nolint:errcheck // it was read and written
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	_ = conn.SetReadDeadline(time.Now().Add(lineTime)) // if it fails, so does reading
	line, err := readLine(conn)
	if err == nil && len(line) == 0 {
		return // it had nothing to ask
	}
	reply := a.answer
	if err != nil {
		reply = func(context.Context, []byte) any { return failure(err) }
	}
	data, err := json.Marshal(reply(ctx, line))
	if err != nil {
		return // replies are made of strings and numbers
	}
	_ = conn.SetWriteDeadline(time.Now().Add(lineTime))
	if _, err = conn.Write(append(data, '\n')); err != nil {
		return // the client went away
	}
	if len(line) > maxLine {
		linger(conn)
	}
}

// linger lets the client read the answer before the connection is reset for
// what it goes on sending.
func linger(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite() // it is closed anyway
	}
	_ = conn.SetReadDeadline(time.Now().Add(lingerTime))
	_, _ = io.CopyN(io.Discard, conn, 64*maxLine)
}

// readLine reads to a newline or to the end. With an error it returns what it
// has read.
func readLine(r io.Reader) ([]byte, error) {
	in := bufio.NewReader(io.LimitReader(r, maxLine+1))
	line, err := in.ReadBytes('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return line, fmt.Errorf("read the request: %w", err)
	}
	if len(line) > maxLine {
		return line, fmt.Errorf("%w: the request is longer than %d bytes", errdef.ErrInvalid, maxLine)
	}
	return bytes.TrimSpace(line), nil
}

// request is a line of any action.
type request struct {
	Action  string   `json:"action"`
	Args    []string `json:"args"`
	Timeout *float64 `json:"timeout"`
	Code    string   `json:"code"`
}

// answer is the reply to a line.
func (a *agent) answer(ctx context.Context, line []byte) any {
	var req request
	if err := json.Unmarshal(line, &req); err != nil {
		return failure(fmt.Errorf("%w: the request is not understood: %w", errdef.ErrInvalid, err))
	}
	var reply any
	var err error
	switch req.Action {
	case "ping":
		reply, err = a.ping(ctx)
	case "exec":
		reply, err = a.exec(ctx, req)
	case "eval":
		reply, err = a.eval(ctx, req.Code)
	default:
		err = fmt.Errorf("unknown action: %.64s", req.Action)
	}
	if err != nil {
		return failure(err)
	}
	return reply
}

// failureReply is the reply where there is nothing else to say. A client of
// commands knows it by the output that it does not have.
type failureReply struct {
	Error     string `json:"error"`
	Traceback string `json:"traceback,omitempty"`
	ExitCode  int    `json:"exit_code"`
}

func failure(err error) failureReply {
	return failureReply{Error: err.Error(), ExitCode: failed}
}

type pingReply struct {
	Pong         bool   `json:"pong"`
	NumpyVersion string `json:"numpy_version"`
	PID          int    `json:"pid"`
	AgentLang    string `json:"agent_lang"`
	WarmupReady  bool   `json:"warmup_ready"`
}

func (a *agent) ping(ctx context.Context) (pingReply, error) {
	pong, err := a.daemon.Ping(ctx, a.id)
	if err != nil {
		return pingReply{}, err
	}
	out := pingReply{Pong: pong.Pong, NumpyVersion: "not-installed", PID: pong.PID, AgentLang: "none"}
	if version, numpyErr := a.numpy(ctx); numpyErr == nil { // else there is no Python to ask
		out.NumpyVersion, out.AgentLang, out.WarmupReady = version, "python", true
	}
	return out, nil
}

// numpyCode imports nothing: what counts is what a fork has from the start.
const numpyCode = `getattr(__import__("sys").modules.get("numpy"), "__version__", "not-installed")`

// numpy is the version of numpy that the warm Python has loaded.
func (a *agent) numpy(ctx context.Context) (string, error) {
	result, err := a.daemon.Eval(ctx, a.id, client.EvalRequest{Language: "python", Code: numpyCode})
	if err != nil {
		return "", err
	}
	if result.Error != nil || result.Result == nil {
		return "", fmt.Errorf("%w: no version of numpy", errdef.ErrUnavailable)
	}
	return strings.Trim(*result.Result, "'"), nil
}

type execReply struct {
	Stdout   string `json:"stdout"`
	Stderr   string `json:"stderr"`
	ExitCode int64  `json:"exit_code"`
}

func (a *agent) exec(ctx context.Context, req request) (execReply, error) {
	timeout := defaultTimeout
	if req.Timeout != nil {
		if *req.Timeout <= 0 || *req.Timeout > math.MaxInt32 {
			return execReply{}, fmt.Errorf("%w: timeout %g is out of range", errdef.ErrInvalid, *req.Timeout)
		}
		timeout = time.Duration(*req.Timeout * float64(time.Second))
	}
	result, err := a.daemon.Exec(ctx, a.id, client.ExecRequest{Args: req.Args, Timeout: timeout})
	if err == nil && result.Error != "" {
		err = errors.New(result.Error)
	}
	return execReply{result.Stdout, result.Stderr, result.ExitCode}, err
}

type evalReply struct {
	Result   *string `json:"result"`
	ExitCode int64   `json:"exit_code"`
}

func (a *agent) eval(ctx context.Context, code string) (any, error) {
	result, err := a.daemon.Eval(ctx, a.id, client.EvalRequest{Code: code})
	switch {
	case err != nil:
		return nil, err
	case result.Error != nil:
		return failureReply{Error: *result.Error, Traceback: result.Traceback, ExitCode: failed}, nil
	case result.TimedOut:
		return nil, fmt.Errorf("%w: the code did not end in time", errdef.ErrTimeout)
	}
	return evalReply{Result: result.Result}, nil
}
