package api

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/wire"
)

// execEvents is an answer that runs a command while it is written, an event for
// each piece of output. A command that could not be begun answers like any
// other failure.
type execEvents struct {
	ctx     context.Context
	s       *server
	id      string
	spec    guest.ExecSpec
	in      io.Reader // nil: the command reads nothing
	timeout time.Duration
}

// VisitExecSandboxResponse runs the command. When the client goes away the
// context ends, and the command with it.
func (x execEvents) VisitExecSandboxResponse(w http.ResponseWriter) error {
	leave, err := x.s.enterStream()
	if err != nil {
		return err
	}
	defer leave()
	out := newEventWriter(w, false)
	start := time.Now()
	err = x.s.Sandboxes.With(x.ctx, x.id, func(ctx context.Context, g *guest.Client) error {
		return x.run(ctx, g, out)
	})
	if err == nil {
		x.s.Metrics.Exec("exec", time.Since(start))
	}
	if err == nil || !out.begun() {
		return err
	}
	_, body := answerTo(x.ctx, err)
	body.RequestID = requestID(x.ctx)
	noteFailure(w, body.Code)
	return out.event("error", "", body)
}

func (x execEvents) run(ctx context.Context, g *guest.Client, out *eventWriter) error {
	var work sync.WaitGroup
	defer work.Wait() // last: what follows ends it
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ctx, cancel := within(ctx, x.timeout)
	defer cancel()
	spec := x.spec
	spec.Stdin = x.in != nil
	p, err := g.Exec(ctx, spec)
	if err != nil {
		result, stillErr := notStarted(err)
		if stillErr != nil {
			return stillErr
		}
		return out.event("exit", "", wire.ExecEnd{ExitCode: result.ExitCode, Error: result.Error, Code: result.Code})
	}
	defer func() { _ = p.Close() }() //nolint:contextcheck // it must also work when ctx has ended; it never fails
	work.Go(func() { x.feed(p) })
	work.Go(func() { beatEvents(ctx, stop, out) })
	if err = out.event("started", "", wire.StreamStarted{PID: p.PID()}); err != nil {
		return err
	}
	return x.pass(ctx, p, out)
}

// feed gives the command its input; what fails shows in how the command ends.
func (x execEvents) feed(p *guest.Process) {
	if x.in == nil {
		return
	}
	in := p.Stdin()
	_, _ = io.Copy(in, x.in)
	_ = in.Close()
}

// beatEvents shows now and then that the connection lives, and ends the
// command when it does not.
func beatEvents(ctx context.Context, stop context.CancelCauseFunc, out *eventWriter) {
	if err := beat(ctx, out.comment); err != nil {
		stop(err)
	}
}

// pass sends the command's output, and how it ended.
func (x execEvents) pass(ctx context.Context, p *guest.Process, out *eventWriter) error {
	for {
		piece, err := p.Next(ctx)
		if err != nil {
			return err
		}
		if piece.Exit != nil {
			return out.event("exit", "", x.endOf(*piece.Exit))
		}
		name := "stdout"
		if piece.Channel == guest.Stderr {
			name = "stderr"
		}
		if err = out.event(name, "", chunkOf(piece.Data)); err != nil {
			return err
		}
	}
}

func (x execEvents) endOf(e guest.Exit) wire.ExecEnd {
	exit := exitOf(e)
	end := wire.ExecEnd{ExitCode: exit.ExitCode, Signal: exit.Signal, TimedOut: exit.TimedOut, DurationMS: millis(e.Duration)}
	if end.TimedOut {
		end.Error = fmt.Sprintf("the command timed out after %v", x.timeout)
		end.Code = errdef.Code(errdef.ErrTimeout)
	}
	return end
}

// chunkOf is bytes as JSON can carry them.
func chunkOf(data []byte) wire.ExecChunk {
	if utf8.Valid(data) {
		return wire.ExecChunk{Text: string(data)}
	}
	return wire.ExecChunk{Base64: base64.StdEncoding.EncodeToString(data)}
}
