package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

// side is one of the two that are compared: Tine, and QEMU driven by hand.
type side interface {
	// prepare gets ready what raise takes for granted, outside the time that is
	// measured.
	prepare(ctx context.Context, how start) error
	// raise brings up one machine, to where its guest can be asked. It belongs
	// to the caller, who ends it.
	raise(ctx context.Context, how start) (machine, error)
	// fork brings up n machines side by side and calls each with every one of
	// them, or with why there is none, from several goroutines.
	fork(ctx context.Context, n int, each func(machine, error)) error
	// freeze boots and warms a template, and freezes it.
	freeze(ctx context.Context) (frozen, error)
	// close gives back what prepare made.
	close(ctx context.Context) error
}

// machine is one running machine of a side.
type machine interface {
	with(ctx context.Context, ask func(context.Context, *guest.Client) error) error
	memory() (private, shared int64, err error)
	// end removes the machine, also when ctx has ended. It is idempotent.
	end(ctx context.Context) error
}

// start is a way to bring up a machine.
type start string

const (
	coldBoot start = "cold boot"
	coldFork start = "fork"
	poolFork start = "fork from the pool"
)

// frozen is how long a freeze took. A side that does not store what it froze
// has no commit.
type frozen struct{ freeze, commit time.Duration }

// point is where a measurement ends.
type point struct {
	name string
	ask  func(context.Context, *guest.Client) error
}

// points returns the end points that the snapshot has: an eval needs a warm
// interpreter.
func points(s *subject) []point {
	all := []point{{Ping, askPing}}
	if slices.Contains(s.snap.Manifest.Languages, python) {
		all = append(all, point{Eval, askEval})
	}
	return append(all, point{Exec, askExec})
}

// python is the language that eval speaks.
const python = "python"

func askPing(ctx context.Context, c *guest.Client) error {
	_, err := c.Ping(ctx)
	return err
}

func askEval(ctx context.Context, c *guest.Client) error {
	r, err := c.Eval(ctx, guest.EvalRequest{Language: python, Code: "6 * 7"})
	switch {
	case err != nil:
		return err
	case r.Error != nil:
		return r.Error
	case r.Value != "42":
		return fmt.Errorf("%w: the interpreter says that 6 * 7 is %q", errdef.ErrUnavailable, r.Value)
	}
	return nil
}

func askExec(ctx context.Context, c *guest.Client) error {
	r, err := c.Run(ctx, guest.ExecSpec{Argv: []string{"/bin/true"}}, nil, 1<<10)
	if err == nil && r.Exit.Code != 0 {
		err = fmt.Errorf("%w: /bin/true ended with status %d", errdef.ErrUnavailable, r.Exit.Code)
	}
	return err
}

// warm does to a template what sandbox does: it starts the interpreters. It
// leaves the guest ready to be frozen and ends the session.
func (s *subject) warm(ctx context.Context, c *guest.Client) error {
	for _, in := range s.img.Manifest.Interpreters {
		if _, err := c.Warm(ctx, in.Name, nil, s.img.Manifest.Imports); err != nil {
			return fmt.Errorf("start the %s interpreter: %w", in.Name, err)
		}
	}
	if err := c.Quiesce(ctx); err != nil {
		return err
	}
	return c.Close()
}

// dirs makes directories for machines. Names are short: sockets lie in them.
type dirs struct {
	root string
	last atomic.Int64
}

func (d *dirs) make() (string, error) {
	dir := filepath.Join(d.root, strconv.FormatInt(d.last.Add(1), 10))
	return dir, os.Mkdir(dir, 0o700)
}

// endTime bounds how long the end of one machine may take.
const endTime = 30 * time.Second

// late returns a context for cleaning up, whatever became of ctx.
func late(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), endTime)
}
