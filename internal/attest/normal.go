package attest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/sandbox"
)

// removeTime bounds the removal of the sandbox of a run, whatever became of it.
const removeTime = 30 * time.Second

// prepareNormal checks the input of a run that is not deterministic, and puts
// in the values that apply where it says nothing.
func prepareNormal(req Request) (record.Input, error) {
	in := req.Input
	var err error
	switch {
	case in.Seed != 0 || !in.Start.IsZero() || in.Limits.Virtual != 0:
		err = errors.New("seed, start time and virtual time")
	case req.MemoryDigest:
		err = errors.New("the digest of the memory")
	}
	if err != nil {
		return in, fmt.Errorf("%w: %w are of deterministic runs", errdef.ErrInvalid, err)
	}
	for _, p := range in.Collect {
		if !path.IsAbs(p) {
			return in, fmt.Errorf("%w: file %q to be collected: its path must be absolute", errdef.ErrInvalid, p)
		}
	}
	if in, err = deterministic.Prepare(in); err != nil {
		return in, err
	}
	in.Start, in.Limits.Virtual = time.Time{}, 0 // it has neither
	return in, nil
}

// runNormal runs a command in a sandbox of its own, which is removed.
func (a *Attestor) runNormal(ctx context.Context, w *work) (_ record.Output, err error) {
	began := time.Now()
	forks, err := a.cfg.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: w.snap.Digest, N: 1})
	if err != nil {
		return record.Output{}, err
	}
	if err = forks[0].Err; err != nil {
		return record.Output{}, err
	}
	id := forks[0].Sandbox.ID
	defer func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
		defer cancel()
		err = errors.Join(err, a.cfg.Sandboxes.Kill(late, id))
	}()
	var out record.Output
	err = a.cfg.Sandboxes.With(ctx, id, func(ctx context.Context, c *guest.Client) (err error) {
		if err = putFiles(ctx, c, w.input.Files); err != nil {
			return err
		}
		if out, err = command(ctx, c, w); err != nil {
			return err
		}
		out.Files, err = collect(ctx, c, w.input.Collect)
		return err
	})
	out.Wall = time.Since(began)
	return out, err
}

func putFiles(ctx context.Context, c *guest.Client, files []record.File) error {
	for _, f := range files {
		opts := guest.WriteOptions{Mode: f.Mode, Parents: true}
		if _, err := c.WriteFile(ctx, f.Path, opts, bytes.NewReader(f.Data)); err != nil {
			return fmt.Errorf("write file %s: %w", f.Path, err)
		}
	}
	return nil
}

// command runs the command of a run that is not deterministic. That it could
// not be started is an outcome.
func command(ctx context.Context, c *guest.Client, w *work) (record.Output, error) {
	in := w.input
	spec := guest.ExecSpec{Argv: in.Argv, Env: in.Env, Dir: in.Cwd, Timeout: in.Limits.Wall}
	res, err := c.Run(ctx, spec, bytes.NewReader(in.Stdin), in.Limits.Output)
	switch {
	case errors.Is(err, errdef.ErrNotFound):
		return record.Output{Exit: -1, Failure: record.NotFound}, nil
	case errors.Is(err, errdef.ErrDenied):
		return record.Output{Exit: -1, Failure: record.NotExecutable}, nil
	case err != nil:
		return record.Output{}, err
	}
	out := record.Output{Stdout: res.Stdout, Stderr: res.Stderr, Exit: res.Exit.Code}
	if res.Exit.Signal != 0 {
		out.Signal = unix.SignalName(unix.Signal(res.Exit.Signal))
	}
	switch {
	case res.Exit.TimedOut:
		out.Failure = record.TimedOut
	case res.Truncated:
		out.Failure = record.OutputLimit
	}
	return out, errors.Join(w.show(w.opt.Stdout, out.Stdout), w.show(w.opt.Stderr, out.Stderr))
}

func (w *work) show(to io.Writer, data []byte) error {
	if to == nil || len(data) == 0 {
		return nil
	}
	_, err := to.Write(data)
	return err
}

// collect reads the files that are there.
func collect(ctx context.Context, c *guest.Client, paths []string) ([]record.File, error) {
	var files []record.File
	room := int64(deterministic.MaxFiles)
	for _, p := range paths {
		f, err := readFile(ctx, c, p, room)
		if errors.Is(err, errdef.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("collect file %s: %w", p, err)
		}
		if room -= int64(len(f.Data)); room < 0 {
			return nil, fmt.Errorf("%w: the files to be collected have more than %d bytes", errdef.ErrExhausted, deterministic.MaxFiles)
		}
		files = append(files, f)
	}
	return files, nil
}

// readFile reads a file, and no more than a byte beyond limit.
func readFile(ctx context.Context, c *guest.Client, name string, limit int64) (record.File, error) {
	f, err := c.ReadFile(ctx, name, guest.ReadOptions{})
	if err != nil {
		return record.File{}, err
	}
	defer func() { _ = f.Close() }() //nolint:contextcheck // a file knows its own; it was only read
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	return record.File{Path: name, Mode: f.Entry().Mode & 0o777, Data: data}, err
}
