package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/wire"
)

const (
	defaultTimeout = 30 // seconds
	// graceTime is how much longer than its own timeout a guest has to say that
	// it has kept to it.
	graceTime = 10 * time.Second

	exitTimeout   = 124
	exitNotExec   = 126
	exitNoCommand = 127
)

// ExecSandbox answers POST /v1/sandboxes/{id}/exec.
func (s *server) ExecSandbox(ctx context.Context, r wire.ExecSandboxRequestObject) (wire.ExecSandboxResponseObject, error) {
	if len(r.Body.Args) == 0 {
		return nil, fmt.Errorf("%w: args must contain at least one element", errdef.ErrInvalid)
	}
	timeout, err := duration("timeout_secs", or(r.Body.TimeoutSecs, defaultTimeout))
	if err != nil {
		return nil, err
	}
	env, err := environ(r.Body.Env)
	if err != nil {
		return nil, err
	}
	spec := guest.ExecSpec{
		Argv: r.Body.Args, Env: env, Dir: r.Body.Cwd, User: r.Body.User, Timeout: timeout,
	}
	var in io.Reader
	if r.Body.Stdin != "" {
		in = strings.NewReader(r.Body.Stdin)
	}
	if wantsEvents(ctx) {
		return execEvents{ctx: ctx, s: s, id: r.ID, spec: spec, in: in, timeout: timeout}, nil
	}
	var out wire.ExecResult
	err = s.Sandboxes.With(ctx, r.ID, func(ctx context.Context, g *guest.Client) error {
		ctx, cancel := within(ctx, timeout)
		defer cancel()
		result, rerr := g.Run(ctx, spec, in, s.maxOutput)
		if rerr != nil {
			out, rerr = notStarted(rerr)
			return rerr
		}
		out = s.execResult(result, timeout)
		return nil
	})
	return wire.ExecSandbox200JSONResponse(out), err
}

// within bounds a call whose guest has a timeout of its own; 0 is none.
func within(ctx context.Context, timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeoutCause(ctx, timeout+graceTime,
		fmt.Errorf("%w: the guest does not answer", errdef.ErrTimeout))
}

// environ turns a map into the list that processes have.
func environ(env map[string]string) ([]string, error) {
	out := make([]string, 0, len(env))
	for name, value := range env {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return nil, fmt.Errorf("%w: %q cannot be the name of a variable", errdef.ErrInvalid, name)
		}
		out = append(out, name+"="+value)
	}
	slices.Sort(out)
	return out, nil
}

// notStarted is the result of a command that could not be started, as shells
// have it; other errors stay errors.
func notStarted(err error) (wire.ExecResult, error) {
	out := wire.ExecResult{Error: err.Error(), Code: errdef.Code(err)}
	switch {
	case errors.Is(err, errdef.ErrNotFound):
		out.ExitCode = exitNoCommand
	case errors.Is(err, errdef.ErrDenied):
		out.ExitCode = exitNotExec
	default:
		return out, err
	}
	return out, nil
}

func (s *server) execResult(r guest.Result, timeout time.Duration) wire.ExecResult {
	out := wire.ExecResult{
		Stdout: string(r.Stdout), Stderr: string(r.Stderr), Truncated: r.Truncated, DurationMS: millis(r.Exit.Duration),
	}
	exit := exitOf(r.Exit)
	out.ExitCode, out.Signal, out.TimedOut = exit.ExitCode, exit.Signal, exit.TimedOut
	switch {
	case r.Truncated:
		out.Error = fmt.Sprintf("the command wrote more than %d bytes and was ended", s.maxOutput)
		out.Code = errdef.Code(errdef.ErrExhausted)
	case out.TimedOut:
		out.Error = fmt.Sprintf("the command timed out after %v", timeout)
		out.Code = errdef.Code(errdef.ErrTimeout)
	}
	return out
}

// exitOf says how a process ended: its code, or minus its signal.
func exitOf(e guest.Exit) wire.StreamExit {
	out := wire.StreamExit{ExitCode: int64(e.Code), TimedOut: e.TimedOut}
	if e.Signal != 0 {
		out.ExitCode, out.Signal = -int64(e.Signal), signalName(e.Signal)
	}
	if e.TimedOut {
		out.ExitCode = exitTimeout
	}
	return out
}

// EvalSandbox answers POST /v1/sandboxes/{id}/eval.
func (s *server) EvalSandbox(ctx context.Context, r wire.EvalSandboxRequestObject) (wire.EvalSandboxResponseObject, error) {
	timeout, err := duration("timeout_secs", or(r.Body.TimeoutSecs, defaultTimeout))
	if err != nil {
		return nil, err
	}
	if r.Body.Code == "" {
		return nil, fmt.Errorf("%w: code is missing", errdef.ErrInvalid)
	}
	var out wire.EvalResult
	err = s.Sandboxes.With(ctx, r.ID, func(ctx context.Context, g *guest.Client) error {
		ctx, cancel := within(ctx, timeout)
		defer cancel()
		start := time.Now()
		result, eerr := g.Eval(ctx, guest.EvalRequest{Language: r.Body.Language, Code: r.Body.Code, Timeout: timeout})
		out = evalResult(result)
		out.DurationMS = millis(time.Since(start))
		return eerr
	})
	return wire.EvalSandbox200JSONResponse(out), err
}

func evalResult(r guest.EvalResult) wire.EvalResult {
	out := wire.EvalResult{
		Stdout: string(r.Stdout), Stderr: string(r.Stderr), Restarted: r.Restarted, TimedOut: r.TimedOut,
	}
	if r.Value != "" {
		out.Result = &r.Value
	}
	if r.Error != nil {
		text := r.Error.Error()
		out.Error, out.Traceback, out.ExitCode = &text, r.Error.Traceback, 1
	}
	return out
}

// ListProcesses answers GET /v1/sandboxes/{id}/processes.
func (s *server) ListProcesses(ctx context.Context, r wire.ListProcessesRequestObject) (wire.ListProcessesResponseObject, error) {
	out := wire.ListProcesses200JSONResponse{}
	err := s.Sandboxes.With(ctx, r.ID, func(ctx context.Context, g *guest.Client) error {
		processes, err := g.Processes(ctx)
		for _, p := range processes {
			out = append(out, processOf(p))
		}
		return err
	})
	return out, err
}

func processOf(p guest.ProcessInfo) wire.Process {
	out := wire.Process{
		PID: p.PID, Args: list(p.Argv), Running: p.Running, User: p.User, Cwd: p.Dir,
		StartedAtUnixMS: p.Started / int64(time.Millisecond), PTY: p.PTY, Background: p.Background,
	}
	if !p.Running {
		code := exitOf(p.Exit).ExitCode
		out.ExitCode = &code
	}
	return out
}

// SignalProcess answers POST /v1/sandboxes/{id}/processes/{pid}/signal.
func (s *server) SignalProcess(ctx context.Context, r wire.SignalProcessRequestObject) (wire.SignalProcessResponseObject, error) {
	signal, err := parseSignal(r.Body.Signal)
	if err != nil {
		return nil, err
	}
	err = s.Sandboxes.With(ctx, r.ID, func(ctx context.Context, g *guest.Client) error {
		return g.Signal(ctx, r.PID, signal, true)
	})
	return wire.SignalProcess204Response{}, err
}
