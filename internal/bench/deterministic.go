package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/sandbox"
)

// errand is what a run is given to do.
type errand struct {
	name string
	argv []string
}

// errands are one that does nothing, one that computes, and one that makes
// processes.
func errands() []errand {
	return []errand{
		{"echo", []string{"echo", "hello"}},
		{"Python loop", []string{"python3", "-c", "s = 0\nfor i in range(1_000_000): s += i * i\nprint(s)"}},
		{"100 processes", []string{"sh", "-c", "i=0; while [ $i -lt 100 ]; do /bin/true; i=$((i+1)); done"}},
	}
}

// abreast is how many runs are measured at once, for each processor.
const abreast = 4

// runs measures deterministic runs beside normal forks that do the same.
type runs struct {
	sub    *subject
	opts   Options
	result *Result
	twin   string // the digest of the deterministic snapshot
	// attestor keeps records of its own: the host's are for ever.
	attestor *attest.Attestor
}

// measureRuns is Measure for deterministic runs.
func measureRuns(ctx context.Context, sub *subject, opts Options) (_ *Result, err error) {
	if engine := sub.d.Sandboxes.Engine; !engine.Caps().Deterministic {
		err = fmt.Errorf("%w: measure deterministic runs: %s has no deterministic machines", errdef.ErrUnsupported, engine.Name())
		return nil, errdef.WithHint(err, "use --engine qemu-tcg for it")
	}
	twin, err := sub.d.Runner.Twin(ctx, sub.ref)
	if err != nil {
		return nil, err
	}
	d := sub.d
	work, err := os.MkdirTemp(filepath.Dir(d.Sandboxes.Dir), "bench-")
	if err != nil {
		return nil, fmt.Errorf("make work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	r := &runs{sub: sub, opts: opts, result: sub.result(opts), twin: twin.Digest, attestor: attest.New(attest.Config{
		Records: filepath.Join(work, "records"), Engine: d.Sandboxes.Engine, Deterministic: d.Runner,
		Sandboxes: d.Sandboxes, Snapshots: d.Snapshots, Images: d.Images,
	})}
	defer func() { err = errors.Join(err, r.attestor.Close()) }()
	return r.result, r.run(ctx)
}

func (r *runs) run(ctx context.Context) (err error) {
	for _, e := range errands() {
		if err = r.beside(ctx, "fork to result: "+e.name, r.deterministic(e), r.normal(e)); err != nil {
			return err
		}
	}
	hello := errands()[0]
	if err = r.beside(ctx, "deterministic fork beside cold boot: "+hello.name, r.deterministic(hello), r.cold(hello)); err != nil {
		return err
	}
	if err = r.beside(ctx, fmt.Sprintf("%d at once, for each: %s", r.atOnce(), hello.name), r.many(r.deterministic(hello)), r.many(r.normal(hello))); err != nil {
		return err
	}
	if err = r.verification(ctx, errands()[1]); err != nil {
		return err
	}
	r.result.judge()
	return nil
}

// measured does something once and says how long it took, in ms.
type measured func(ctx context.Context) (float64, error)

func timed(ctx context.Context, what func(context.Context) error) (float64, error) {
	ctx, cancel := bound(ctx, groupTime)
	defer cancel()
	begin := time.Now()
	err := what(ctx)
	return ms(time.Since(begin)), err
}

// beside measures by turns. The first turn is for warming up.
func (r *runs) beside(ctx context.Context, name string, tine, floor measured) error {
	samples := make([][]float64, 2)
	for i := range r.opts.Rounds + 1 {
		progress.ReportAmount(ctx, step, "measuring "+name, int64(i), int64(r.opts.Rounds))
		for side, what := range []measured{tine, floor} {
			took, err := what(ctx)
			if err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			if i > 0 {
				samples[side] = append(samples[side], took)
			}
		}
	}
	r.result.addRow(name, "", Milliseconds, samples)
	return nil
}

func (r *runs) deterministic(e errand) measured {
	return func(ctx context.Context) (float64, error) {
		return timed(ctx, func(ctx context.Context) error {
			out, err := r.sub.d.Runner.Run(ctx, r.twin, record.Input{Argv: e.argv}, deterministic.Options{})
			return errors.Join(err, succeeded(e, out.Exit, out.Failure))
		})
	}
}

func succeeded(e errand, code int, failure string) error {
	if code != 0 || failure != "" {
		return fmt.Errorf("%w: %s ended with exit code %d, %s", errdef.ErrUnavailable, e.name, code, orDash(failure))
	}
	return nil
}

// normal forks a sandbox, runs the errand and removes it.
func (r *runs) normal(e errand) measured {
	return func(ctx context.Context) (float64, error) {
		return timed(ctx, func(ctx context.Context) error { return r.inFork(ctx, r.sub.snap.Digest, e) })
	}
}

func (r *runs) inFork(ctx context.Context, snapshot string, e errand) (err error) {
	boxes := r.sub.d.Sandboxes
	forks, err := boxes.Fork(ctx, sandbox.ForkRequest{Snapshot: snapshot, N: 1, NoPool: true})
	if err == nil {
		err = forks[0].Err
	}
	if err != nil {
		return err
	}
	id := forks[0].Sandbox.ID
	defer func() { err = errors.Join(err, boxes.Kill(context.WithoutCancel(ctx), id)) }()
	return boxes.With(ctx, id, func(ctx context.Context, c *guest.Client) error {
		const enough = 1 << 20
		res, runErr := c.Run(ctx, guest.ExecSpec{Argv: e.argv}, nil, enough)
		return errors.Join(runErr, succeeded(e, res.Exit.Code, ""))
	})
}

// cold makes a snapshot, which boots a machine, and forks it: the least that
// gives a machine of this image something to do without a snapshot.
func (r *runs) cold(e errand) measured {
	return func(ctx context.Context) (float64, error) {
		const tag = "bench-cold"
		took, err := timed(ctx, func(ctx context.Context) error {
			snap, err := r.sub.d.Sandboxes.CreateSnapshot(ctx, sandbox.SnapshotRequest{
				Tag: tag, Image: r.sub.img.Digest, Machine: r.sub.snap.Manifest.Machine, Replace: true,
			})
			if err != nil {
				return err
			}
			return r.inFork(ctx, snap.Digest, e)
		})
		if err != nil {
			return 0, err
		}
		return took, r.sub.d.Snapshots.Remove(context.WithoutCancel(ctx), tag)
	}
}

func (r *runs) atOnce() int { return abreast * runtime.NumCPU() }

// many does the same at once, and says how long each took in the average.
func (r *runs) many(one measured) measured {
	return func(ctx context.Context) (float64, error) {
		took, err := timed(ctx, func(ctx context.Context) error {
			work, ctx := errgroup.WithContext(ctx)
			for range r.atOnce() {
				work.Go(func() error {
					_, err := one(ctx)
					return err
				})
			}
			return work.Wait()
		})
		return took / float64(r.atOnce()), err
	}
}

// verification measures the verification of a record beside the recorded run.
func (r *runs) verification(ctx context.Context, e errand) error {
	var last string
	recorded := func(ctx context.Context) (float64, error) {
		return timed(ctx, func(ctx context.Context) error {
			res, err := r.attestor.Run(ctx, attest.Request{Snapshot: r.twin, Input: record.Input{Argv: e.argv}, User: "bench"})
			last = res.Record.Record.ID
			return err
		})
	}
	verified := func(ctx context.Context) (float64, error) {
		return timed(ctx, func(ctx context.Context) error {
			rep, err := r.attestor.Verify(ctx, attest.VerifyRequest{ID: last})
			if err == nil && rep.Result != record.Verified {
				err = fmt.Errorf("%w: the record of %s: %s", errdef.ErrUnavailable, e.name, rep.Result)
			}
			return err
		})
	}
	if _, err := recorded(ctx); err != nil {
		return fmt.Errorf("record %s: %w", e.name, err)
	}
	return r.beside(ctx, "verification beside the run: "+e.name, verified, recorded)
}
