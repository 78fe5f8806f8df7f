package guest

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/tinevm/tine/internal/guestproto"
)

// ExecSpec is a command to run in the guest.
type ExecSpec struct {
	Argv       []string
	Env        []string // NAME=value, added to the guest's defaults
	ReplaceEnv bool     // Env is the whole environment
	Dir        string   // "" is the user's home
	User       string   // name or uid, with an optional :group; "" is root
	Stdin      bool     // input comes through Process.Stdin; else there is none
	PTY        bool
	Rows, Cols int
	Timeout    time.Duration // in the guest; 0 is none
	Background bool          // goes on when the Process is closed
	SecretEnv  []string      // names of secrets to put in the environment, as NAME=value
}

// Channels of a process's output.
const (
	Stdout = guestproto.ChanStdout
	Stderr = guestproto.ChanStderr
)

// Output is a piece of what a process wrote, or its end.
type Output struct {
	Channel guestproto.Channel // Stdout, which is also the terminal's, or Stderr
	Data    []byte
	Exit    *Exit // not nil: the process has ended, and there is no more
}

// Process is a connection to a process in the guest. Its methods may be called
// concurrently, but Next and Wait from one goroutine only.
type Process struct {
	client *Client
	stream *guestproto.Stream
	pid    int
	lost   int64
	exit   *Exit
}

// Exec starts a command. ctx bounds the start only.
func (c *Client) Exec(ctx context.Context, spec ExecSpec) (*Process, error) {
	req := guestproto.ExecRequest(spec)
	return c.process(ctx, guestproto.VerbExec, &req, !spec.Stdin && !spec.PTY)
}

// Attach connects to a process that the agent started before, taking it from
// whoever was connected. What it wrote while nobody was comes first.
func (c *Client) Attach(ctx context.Context, pid int) (*Process, error) {
	return c.process(ctx, guestproto.VerbAttach, &guestproto.ProcessRequest{PID: pid}, false)
}

func (c *Client) process(ctx context.Context, verb guestproto.Verb, req guestproto.Message, end bool) (*Process, error) {
	st, err := c.session.Open(ctx, verb, req, end)
	if err != nil {
		return nil, c.explain(err)
	}
	chunk, err := c.recv(ctx, st)
	if err != nil {
		return nil, err
	}
	var started guestproto.Started
	if err = c.decode(st, chunk, &started); err != nil {
		return nil, err
	}
	return &Process{client: c, stream: st, pid: started.PID, lost: started.Dropped}, nil
}

// PID is the process's id in the guest.
func (p *Process) PID() int { return p.pid }

// Dropped is how many bytes of output were lost before Attach, for want of
// room in the guest.
func (p *Process) Dropped() int64 { return p.lost }

// Next returns the next output. After the one with Exit it returns io.EOF. A
// ctx that ends ends the wait only: call Close to end the process.
func (p *Process) Next(ctx context.Context) (Output, error) {
	if p.exit != nil {
		return Output{}, io.EOF
	}
	chunk, err := p.stream.Recv(ctx)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = p.client.broke(p.stream, "process without an end")
		}
		return Output{}, p.client.explain(err)
	}
	if !chunk.Final {
		return Output{Channel: chunk.Channel, Data: chunk.Data}, nil
	}
	var exit Exit
	if err = p.client.decode(p.stream, chunk, &exit); err != nil {
		return Output{}, err
	}
	p.exit = &exit
	return Output{Exit: &exit}, nil
}

// Wait drops output until the process ends.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	for p.exit == nil {
		if _, err := p.Next(ctx); err != nil {
			return Exit{}, err
		}
	}
	return *p.exit, nil
}

// Stdin returns the process's input. Writes wait while the process does not
// read, and fail once it has ended. Close is the end of input.
func (p *Process) Stdin() io.WriteCloser { return stdin{p} }

type stdin struct{ p *Process }

func (s stdin) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := s.p.stream.Send(s.p.stream.Context(), guestproto.ChanStdin, b)
	return n, s.p.client.explain(err)
}

func (s stdin) Close() error {
	err := s.p.stream.End(s.p.stream.Context(), nil)
	if errors.Is(err, guestproto.ErrStreamOver) {
		return nil // the process was faster
	}
	return s.p.client.explain(err)
}

// Signal sends a signal to the process.
func (p *Process) Signal(ctx context.Context, sig int) error {
	return p.client.Signal(ctx, p.pid, sig, false)
}

// Resize sets the size of the process's terminal.
func (p *Process) Resize(ctx context.Context, rows, cols int) error {
	return p.client.Resize(ctx, p.pid, rows, cols)
}

// Close lets go of the process. If it has not ended it is killed, unless it is
// a background process.
func (p *Process) Close() error {
	p.stream.Reset(guestproto.CodeCanceled, "closed")
	return nil
}

// Detach lets go of the process and leaves it running.
func (p *Process) Detach() { p.stream.Reset(guestproto.CodeDetached, "detached") }

// Processes lists the processes that the agent started.
func (c *Client) Processes(ctx context.Context) ([]ProcessInfo, error) {
	st, err := c.session.Open(ctx, guestproto.VerbProcesses, &guestproto.Empty{}, true)
	if err != nil {
		return nil, c.explain(err)
	}
	var all []ProcessInfo
	const most = 10_000
	for {
		chunk, err := c.recv(ctx, st)
		if err != nil {
			return nil, err
		}
		if chunk.Final {
			return all, nil
		}
		var part guestproto.Processes
		if err = c.decode(st, chunk, &part); err != nil {
			return nil, err
		}
		if all = append(all, part.Processes...); len(all) > most {
			return nil, c.broke(st, "too many processes")
		}
	}
}

// Signal sends a signal to a process that the agent started, or to its whole
// process group.
func (c *Client) Signal(ctx context.Context, pid, sig int, group bool) error {
	return c.call(ctx, guestproto.VerbSignal, &guestproto.SignalRequest{PID: pid, Signal: sig, Group: group}, &guestproto.Empty{})
}

// Resize sets the size of a process's terminal.
func (c *Client) Resize(ctx context.Context, pid, rows, cols int) error {
	return c.call(ctx, guestproto.VerbResize, &guestproto.ResizeRequest{PID: pid, Rows: rows, Cols: cols}, &guestproto.Empty{})
}

// Result is all that a process wrote, and its end.
type Result struct {
	Stdout, Stderr []byte
	Truncated      bool // it wrote more than the limit, and was killed for it
	Exit           Exit
}

// Run runs a command to its end. A nil in means no input. Together stdout and
// stderr are kept up to maxOutput bytes; a process that writes more is killed.
// When ctx ends, so does the process.
func (c *Client) Run(ctx context.Context, spec ExecSpec, in io.Reader, maxOutput int64) (Result, error) {
	spec.Stdin = in != nil
	p, err := c.Exec(ctx, spec)
	if err != nil {
		return Result{}, err
	}
	defer p.Close() //nolint:errcheck // never fails
	if in != nil {
		// It ends with the stream at the latest, or when in does: in belongs to
		// the caller, who must see to it that it can be read to its end.
		go p.feed(in)
	}
	return p.collect(ctx, maxOutput)
}

// feed copies in to the process; what fails shows in how the process ends.
func (p *Process) feed(in io.Reader) {
	w := p.Stdin()
	_, _ = io.Copy(w, in)
	_ = w.Close()
}

func (p *Process) collect(ctx context.Context, maxOutput int64) (Result, error) {
	var r Result
	for {
		out, err := p.Next(ctx)
		switch {
		case err != nil:
			return r, err
		case out.Exit != nil:
			r.Exit = *out.Exit
			return r, nil
		}
		room := maxOutput - int64(len(r.Stdout)+len(r.Stderr))
		if r.Truncated = int64(len(out.Data)) > room; r.Truncated {
			out.Data = out.Data[:room]
		}
		if out.Channel == Stderr {
			r.Stderr = append(r.Stderr, out.Data...)
		} else {
			r.Stdout = append(r.Stdout, out.Data...)
		}
		if r.Truncated {
			const sigkill = 9
			r.Exit = Exit{Code: -1, Signal: sigkill}
			return r, nil
		}
	}
}
