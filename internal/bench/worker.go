package bench

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

//go:embed worker.py
var workerProgram string

// What a worker can be told.
const (
	workRest  = "rest"  // sleep
	workWatch = "watch" // look at the clock
	workWrite = "write" // look at the clock and write
	workAgain = "again" // write to every page once
	workGap   = "gap"   // say the longest time between two looks since the last order
)

// worker is a program in a guest that holds memory and does as it is told, a
// line in, a line out. One goroutine uses it at a time.
type worker struct {
	process *guest.Process
	text    []byte // that it has written and nobody has read
}

// withWorker runs f with a worker that has written so many MiB, and ends it.
func withWorker(ctx context.Context, c *guest.Client, mib int, f func(*worker) error) error {
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"python3", "-uc", workerProgram, strconv.Itoa(mib)}, Stdin: true})
	if err != nil {
		return err
	}
	defer p.Close() //nolint:errcheck,contextcheck // never fails, and does not wait
	w := &worker{process: p}
	if _, err = w.line(ctx); err != nil {
		return fmt.Errorf("start a program that writes %d MiB: %w", mib, err)
	}
	return f(w)
}

// tell gives an order and waits for the answer.
func (w *worker) tell(ctx context.Context, order string) (string, error) {
	if _, err := w.process.Stdin().Write([]byte(order + "\n")); err != nil {
		return "", err
	}
	return w.line(ctx)
}

// gap is the longest time between two looks since the last order, in ms of the
// guest's clock.
func (w *worker) gap(ctx context.Context) (float64, error) {
	text, err := w.tell(ctx, workGap)
	if err != nil {
		return 0, err
	}
	ms, err := strconv.ParseFloat(text, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: the longest gap is %q", errdef.ErrUnavailable, text)
	}
	return ms, nil
}

// maxLine bounds what a worker may write without a newline.
const maxLine = 4 << 10

func (w *worker) line(ctx context.Context) (string, error) {
	for {
		if line, rest, ok := bytes.Cut(w.text, []byte{'\n'}); ok {
			w.text = rest
			return strings.TrimSpace(string(line)), nil
		}
		if len(w.text) > maxLine {
			return "", fmt.Errorf("%w: a line of more than %d bytes", errdef.ErrUnavailable, maxLine)
		}
		out, err := w.process.Next(ctx)
		if err != nil {
			return "", err
		}
		if out.Exit != nil {
			return "", fmt.Errorf("%w: it ended with status %d: %s", errdef.ErrUnavailable, out.Exit.Code, bytes.TrimSpace(w.text))
		}
		w.text = append(w.text, out.Data...)
	}
}
