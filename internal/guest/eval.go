package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	maxCode       = 4 << 20
	maxReply      = 16 << 20
	maxEvalOutput = 8 << 20 // of stdout, and of stderr, where no writer is given
)

// EvalRequest is code for a warm interpreter.
type EvalRequest struct {
	Language string // "" is python
	Code     string
	Timeout  time.Duration // 0 is the agent's own
	// Stdout and Stderr, if not nil, are given output as it comes, in place
	// of the fields of EvalResult.
	Stdout, Stderr io.Writer
}

// EvalResult is what became of the code.
type EvalResult struct {
	Value     string          // the last expression's value as text, "" if none
	ValueJSON json.RawMessage // and as JSON, where it can be that
	Stdout    []byte
	Stderr    []byte
	Truncated bool       // there was more output than is kept
	Error     *EvalError // how the code failed
	Restarted bool       // the interpreter had died: state of earlier calls is lost
	TimedOut  bool
}

// EvalError is an exception that the code raised.
type EvalError struct {
	Type      string `json:"type"`
	Message   string `json:"message"`
	Traceback string `json:"traceback"`
}

// Error returns the exception's type and message.
func (e *EvalError) Error() string { return e.Type + ": " + e.Message }

// evalReply is the interpreter's reply line; see docs/formats/interpreter.md.
type evalReply struct {
	ID        int64           `json:"id"`
	Value     *string         `json:"value"`
	ValueJSON json.RawMessage `json:"value_json"`
	Error     *EvalError      `json:"error"`
}

// Eval runs code in the warm interpreter, starting it if none runs. Code that
// fails is a result with an Error, not an error. When ctx ends the code is
// interrupted.
func (c *Client) Eval(ctx context.Context, req EvalRequest) (EvalResult, error) {
	if len(req.Code) > maxCode {
		return EvalResult{}, fmt.Errorf("%w: eval: %d bytes of code are over the limit of %d", errdef.ErrInvalid, len(req.Code), maxCode)
	}
	id := c.evals.Add(1)
	line, err := json.Marshal(map[string]any{"id": id, "op": "eval", "code": req.Code})
	if err != nil {
		return EvalResult{}, fmt.Errorf("eval: %w", err)
	}
	st, err := c.session.Open(ctx, guestproto.VerbEval, &guestproto.EvalRequest{
		Language: language(req.Language), Line: line, Timeout: req.Timeout, ID: id,
	}, true)
	if err != nil {
		return EvalResult{}, c.explain(err)
	}
	return c.collectEval(ctx, st, id, &req)
}

func language(l string) string {
	if l == "" {
		return "python"
	}
	return l
}

// collectEval takes output and reply until the stream's end.
func (c *Client) collectEval(ctx context.Context, st *guestproto.Stream, id int64, req *EvalRequest) (EvalResult, error) {
	var r EvalResult
	var line []byte
	for {
		chunk, err := c.recv(ctx, st)
		if err != nil {
			return r, err
		}
		switch {
		case chunk.Final:
			return r, c.finishEval(st, chunk, id, line, &r)
		case chunk.Channel == guestproto.ChanReply:
			if line = append(line, chunk.Data...); len(line) > maxReply {
				return r, c.broke(st, "reply is too long")
			}
		case chunk.Channel == Stderr:
			err = r.keep(&r.Stderr, req.Stderr, chunk.Data)
		default:
			err = r.keep(&r.Stdout, req.Stdout, chunk.Data)
		}
		if err != nil {
			st.Reset(guestproto.CodeCanceled, "output not taken")
			return r, fmt.Errorf("eval: write output: %w", err)
		}
	}
}

// keep hands output on, or keeps what there is room for.
func (r *EvalResult) keep(kept *[]byte, w io.Writer, data []byte) error {
	if w != nil {
		_, err := w.Write(data)
		return err
	}
	if room := maxEvalOutput - len(*kept); len(data) > room {
		data, r.Truncated = data[:room], true
	}
	*kept = append(*kept, data...)
	return nil
}

func (c *Client) finishEval(st *guestproto.Stream, chunk guestproto.Chunk, id int64, line []byte, r *EvalResult) error {
	var done guestproto.EvalDone
	if err := c.decode(st, chunk, &done); err != nil {
		return err
	}
	r.Restarted, r.TimedOut = done.Restarted, done.TimedOut
	if done.Killed {
		r.Error = &EvalError{Type: "Timeout", Message: "the code did not stop when interrupted; its interpreter was ended"}
		return nil
	}
	var reply evalReply
	if err := json.Unmarshal(line, &reply); err != nil {
		return fmt.Errorf("%w: interpreter's reply: %w", errdef.ErrUnavailable, err)
	}
	if reply.ID != id {
		return fmt.Errorf("%w: interpreter answered request %d instead of %d", errdef.ErrUnavailable, reply.ID, id)
	}
	if reply.Value != nil {
		r.Value = *reply.Value
	}
	r.ValueJSON, r.Error = reply.ValueJSON, reply.Error
	return nil
}

// WarmInfo is what an interpreter says of itself.
type WarmInfo struct {
	PID      int    `json:"-"`
	Language string `json:"language"`
	Version  string `json:"version"`
}

// Warm starts the interpreter of a language, unless it runs, and imports
// modules in it. An empty argv means the agent's own interpreter. Imports are
// for languages whose import statement is Python's.
func (c *Client) Warm(ctx context.Context, lang string, argv, imports []string) (WarmInfo, error) {
	var done guestproto.WarmDone
	var info WarmInfo
	req := &guestproto.WarmRequest{Language: language(lang), Argv: argv}
	if err := c.call(ctx, guestproto.VerbWarm, req, &done); err != nil {
		return info, err
	}
	if err := json.Unmarshal(done.Line, &info); err != nil {
		return info, fmt.Errorf("%w: warm %s: first line: %w", errdef.ErrUnavailable, req.Language, err)
	}
	info.PID = done.PID
	for _, module := range imports {
		r, err := c.Eval(ctx, EvalRequest{Language: lang, Code: "import " + module})
		if err == nil && r.Error != nil {
			err = fmt.Errorf("%w: %w", errdef.ErrInvalid, r.Error)
		}
		if err != nil {
			return info, fmt.Errorf("warm %s: import %s: %w", req.Language, module, err)
		}
	}
	return info, nil
}
