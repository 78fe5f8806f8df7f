// Package bench measures what Tine costs beside what it is made of: boots,
// forks, round trips, memory and snapshots, each by turns through Tine and with
// the bare monitor driven by hand, which is the floor.
//
// Two end points are kept apart: the first answer (a ping, or an eval in the
// warm interpreter) and the first exec (/bin/true spawned in the guest). Every
// machine is asked for one of them only. docs/bench.md says what each number
// means, and describes the JSON.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
)

// Options say what to measure.
type Options struct {
	// Snapshot is the tag or digest to fork from.
	Snapshot string
	// Forks are the sizes of the parallel forks.
	Forks []int
	// Rounds is how often a fork is measured. What takes seconds is measured a
	// third as often.
	Rounds int
	// Floor measures the bare monitor too.
	Floor bool
	// Branch measures branches and nothing else: in guests of Memory MiB of
	// which Dirty MiB are written, and forks of trees so many branches deep.
	// Forks and Floor do not matter then. What is nil has its default.
	Branch                bool
	Memory, Dirty, Depths []int
	// Deterministic measures deterministic runs and nothing else, beside normal
	// forks that run the same. Forks and Floor do not matter then.
	Deterministic bool
	// Isolation, if not nil, measures what isolation costs and nothing else. The
	// largest of Forks is how many networks there are at once then; Floor does
	// not matter.
	Isolation *Isolation
	// Out receives the tables, or one JSON object if JSON is set.
	Out  io.Writer
	JSON bool
}

// maxRounds and maxForks bound what can be asked for.
const (
	maxRounds = 1000
	maxForks  = 16
)

// check checks the options; limit is the largest fork that the manager makes.
func (o *Options) check(limit int) error {
	switch {
	case o.Rounds < 1 || o.Rounds > maxRounds:
		return fmt.Errorf("%w: %d rounds: it must be 1 to %d", errdef.ErrInvalid, o.Rounds, maxRounds)
	case len(o.Forks) > maxForks:
		return fmt.Errorf("%w: %d sizes of parallel forks, %d allowed", errdef.ErrInvalid, len(o.Forks), maxForks)
	}
	for _, n := range o.Forks {
		if n < 1 || n > limit {
			return fmt.Errorf("%w: %d parallel forks: it must be 1 to %d", errdef.ErrInvalid, n, limit)
		}
	}
	return nil
}

// parts is how many parts are asked for that are measured alone.
func (o *Options) parts() (n int) {
	for _, asked := range []bool{o.Branch, o.Deterministic, o.Isolation != nil} {
		if asked {
			n++
		}
	}
	return n
}

// Run measures and writes what it measured. Missing a target is no error.
// Whatever it started is gone when it returns.
func Run(ctx context.Context, d *daemon.Daemon, opts Options) error {
	res, err := Measure(ctx, d, opts)
	if err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	return res.Write(opts.Out, opts.JSON)
}

// Measure is Run without the writing.
func Measure(ctx context.Context, d *daemon.Daemon, opts Options) (_ *Result, err error) {
	if err = opts.check(d.Sandboxes.Limits.Fork); err != nil {
		return nil, err
	}
	sub, err := newSubject(d, opts.Snapshot)
	if err != nil {
		return nil, err
	}
	switch {
	case opts.parts() > 1:
		return nil, fmt.Errorf("%w: branches, deterministic runs and isolation are measured one at a time", errdef.ErrInvalid)
	case opts.Branch:
		return measureBranches(ctx, sub, opts)
	case opts.Deterministic:
		return measureRuns(ctx, sub, opts)
	case opts.Isolation != nil:
		return measureIsolation(ctx, sub, opts)
	}
	work, err := os.MkdirTemp(filepath.Dir(d.Sandboxes.Dir), "bench-")
	if err != nil {
		return nil, fmt.Errorf("make work directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	s := &suite{opts: opts, points: points(sub), snap: sub.snap, result: sub.result(opts)}
	t := &tine{subject: sub, dirs: &dirs{root: work}}
	s.sides = []side{t}
	defer func() { err = errors.Join(err, t.close(ctx)) }()
	b, reason, err := s.bare(ctx, t)
	if err != nil {
		return nil, err
	}
	if s.result.NoFloor = reason; b != nil {
		s.sides = append(s.sides, b)
		defer func() { err = errors.Join(err, b.close(ctx)) }()
	}
	if err = s.run(ctx); err != nil {
		return nil, err
	}
	s.result.judge()
	s.result.NotMeasured = missing(sub)
	return s.result, nil
}

// missing says what there is nothing to measure of with the subject's engine.
func missing(s *subject) []string {
	engine := s.d.Sandboxes.Engine
	if engine.Caps().Deterministic {
		return nil
	}
	return []string{"deterministic runs: " + engine.Name() + " has no deterministic machines; qemu-tcg does"}
}

// bare makes the floor, or says why there is none.
func (s *suite) bare(ctx context.Context, t *tine) (_ *bare, reason string, err error) {
	if !s.opts.Floor {
		return nil, "not asked for", nil
	}
	progress.Report(ctx, step, "looking at how machines are started")
	m, reason, err := learn(ctx, t)
	if m == nil || err != nil {
		return nil, reason, err
	}
	return &bare{subject: t.subject, monitor: m}, "", nil
}

// subject is what both sides measure: one snapshot and its image.
type subject struct {
	d    *daemon.Daemon
	ref  string
	snap snapshot.Snapshot
	img  image.Image
}

func newSubject(d *daemon.Daemon, ref string) (*subject, error) {
	snap, err := d.Snapshots.Resolve(ref)
	if err != nil {
		return nil, err
	}
	img, err := d.Images.Get(snap.Manifest.Image)
	if err != nil {
		return nil, fmt.Errorf("image of snapshot %s: %w", ref, err)
	}
	return &subject{d: d, ref: ref, snap: snap, img: img}, nil
}

func (s *subject) result(opts Options) *Result {
	m := s.snap.Manifest
	return &Result{
		Version: Version, At: time.Now().UTC().Truncate(time.Second),
		Snapshot: s.ref, Digest: s.snap.Digest, Engine: m.Engine, EngineVersion: m.EngineVersion,
		Machine: m.Machine, CPUs: runtime.NumCPU(), Rounds: opts.Rounds, Rows: []Row{}, Parallel: []Parallel{},
	}
}
