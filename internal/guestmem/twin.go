package guestmem

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// Freezer makes copy-on-write twins of processes, as a fork of the process
// would be: a twin keeps the memory of one instant while the process goes on.
type Freezer struct {
	// Command is the helper process: a program that calls ServeTwin, and its
	// arguments.
	Command []string
}

// Prepare starts the helper, which takes longer than the rest. It looks at the
// process and does not touch it.
func (z Freezer) Prepare(ctx context.Context, s Space) (p *Pending, err error) {
	h, err := startHelper(ctx, z.Command)
	if err != nil {
		return nil, fmt.Errorf("freeze memory of process %d: %w", s.PID, err)
	}
	p = &Pending{space: s, helper: h}
	request, err := json.Marshal(twinRequest(s))
	if err == nil {
		_, err = h.ask(ctx, append(request, '\n'))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("freeze memory of process %d: %w", s.PID, err), p.Close())
	}
	return p, nil
}

// Pending is a helper that waits to make a twin.
type Pending struct {
	space  Space
	helper *helper // nil once a Twin has it
}

// Freeze makes the twin. The machine is paused by the caller, who lets it go on
// as soon as Freeze returns. The process is unharmed whatever it returns:
// errdef.ErrUnsupported where the host does not allow it, errdef.ErrExhausted
// where there is no room for one more process, errdef.ErrNotFound when the
// process has ended. A memory that was kept out of forks or not is kept out of
// them afterwards. Freeze is called at most once.
func (p *Pending) Freeze(ctx context.Context) (*Twin, error) {
	if p.helper == nil {
		return nil, fmt.Errorf("%w: process %d was frozen or let go before", errdef.ErrConflict, p.space.PID)
	}
	pid, err := p.helper.ask(ctx, []byte{'\n'})
	if err != nil {
		return nil, fmt.Errorf("freeze memory of process %d: %w", p.space.PID, err)
	}
	t := &Twin{space: Space{PID: pid, Ranges: p.space.Ranges}, helper: p.helper}
	p.helper = nil
	return t, nil
}

// Close ends the helper. It does nothing when Freeze has returned a Twin.
func (p *Pending) Close() error {
	h := p.helper
	p.helper = nil
	return h.close()
}

// Twin is a process that never runs and has the memory of another one at the
// instant of its making. What the source writes meanwhile costs the host one
// more page each.
type Twin struct {
	space  Space
	helper *helper
}

// Private yields the pages that were the process's own.
func (t *Twin) Private(yield func(first, count uint64) bool) error { return t.space.Private(yield) }

// ReadAt reads what the process had in place of the image's bytes from off.
func (t *Twin) ReadAt(p []byte, off int64) (int, error) { return t.space.ReadAt(p, off) }

// Close ends the twin and waits until nothing is left of it. Nothing may be
// reading from it.
func (t *Twin) Close() error {
	h := t.helper
	t.helper = nil
	return h.close()
}

// helper is the process that traces.
type helper struct {
	cmd    *exec.Cmd
	stdin  *os.File
	stdout *os.File
	lines  *bufio.Reader
	twin   int
}

// startHelper starts it in a session of its own, and not to die with this
// process: it must never end in the middle of its work.
func startHelper(ctx context.Context, command []string) (*helper, error) {
	if len(command) == 0 {
		return nil, fmt.Errorf("%w: no helper command", errdef.ErrUnsupported)
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, theirIn.Close(), in.Close())
	}
	h := &helper{stdin: in, stdout: out, lines: bufio.NewReaderSize(out, maxTwinAnswer)}
	h.cmd = exec.CommandContext(context.WithoutCancel(ctx), command[0], command[1:]...)
	h.cmd.Stdin, h.cmd.Stdout = theirIn, theirOut
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = h.cmd.Start()
	err = errors.Join(err, theirIn.Close(), theirOut.Close())
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start helper: %w", err), in.Close(), out.Close())
	}
	return h, nil
}

// ask writes a line and reads the answer.
func (h *helper) ask(ctx context.Context, line []byte) (twin int, err error) {
	gaveUp := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = h.stdout.SetReadDeadline(time.Unix(1, 0)) // a pipe has deadlines
		close(gaveUp)
	})
	defer func() {
		if !stop() {
			<-gaveUp // close sets the deadline again
		}
	}()
	if _, err = h.stdin.Write(line); err != nil {
		return 0, helperGone(err)
	}
	err = h.answer()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = context.Cause(ctx)
	}
	return h.twin, err
}

func (h *helper) answer() error {
	line, err := readLine(h.lines)
	if err != nil {
		return helperGone(err)
	}
	var a twinAnswer
	if err := json.Unmarshal(line, &a); err != nil {
		return fmt.Errorf("%w: answer of helper: %w", errdef.ErrInvalid, err)
	}
	if a.Error != "" {
		return errdef.Remote(a.Code, a.Error)
	}
	h.twin = a.Twin
	return nil
}

func helperGone(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: helper ended: %w", errdef.ErrUnavailable, err)
}

// close has the helper kill its twin, if it has one, and waits for both.
func (h *helper) close() error {
	if h == nil {
		return nil
	}
	err := h.stdin.Close()
	// A call of ask that gave up may have left an answer with a twin.
	_ = h.stdout.SetReadDeadline(time.Time{})
	for h.answer() == nil {
		continue // until its output ends
	}
	err = errors.Join(err, h.stdout.Close())
	if waitErr := h.cmd.Wait(); waitErr != nil && h.twin != 0 {
		err = errors.Join(err, fmt.Errorf("%w: helper of twin %d: %w", errdef.ErrUnavailable, h.twin, waitErr))
	}
	if h.twin == 0 {
		return err
	}
	// The twin has the parent of the machine, and that may be this process.
	return errors.Join(err, linux.WaitChild(h.twin))
}
