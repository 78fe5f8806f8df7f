// Package attest signs for what commands come to, and runs again what is
// recorded, to see whether it comes to the same.
//
// It joins what runs (package deterministic, and sandboxes for runs that are
// not) with what keeps (package record), and knows blocks: running one, and
// what verifying its records says of it. It draws no conclusions of its own:
// record.Compare does, and block.Score.
package attest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// Deterministic makes snapshots and runs commands in them: a
// deterministic.Runner.
type Deterministic interface {
	Build(ctx context.Context, req deterministic.BuildRequest) (snapshot.Snapshot, error)
	Twin(ctx context.Context, ref string) (snapshot.Snapshot, error)
	Remake(ctx context.Context, ref string) (deterministic.Comparison, error)
	Run(ctx context.Context, ref string, in record.Input, opt deterministic.Options) (record.Output, error)
}

// Sandboxes is what runs that are not deterministic need of a sandbox.Manager.
type Sandboxes interface {
	Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error)
	With(ctx context.Context, id string, f func(context.Context, *guest.Client) error) error
	Kill(ctx context.Context, id string) error
}

// Snapshots is what is asked of a snapshot.Store.
type Snapshots interface {
	Resolve(ref string) (snapshot.Snapshot, error)
}

// Images is what is asked of an image.Store.
type Images interface {
	Build(ctx context.Context, req image.BuildRequest) (img image.Image, hit bool, err error)
	Get(ref string) (image.Image, error)
}

// Config is what an Attestor joins.
type Config struct {
	// Records and Blocks are the directories of records and of blocks. They are
	// opened when they are first needed, and held until Close: only one process
	// has them at a time.
	Records, Blocks string
	// Trusted is a directory of public keys in PEM, NAME.pem each, that the
	// operator believes: their records can be verified here, and what they say
	// of blocks counts as said by different people. It need not be there.
	Trusted string

	Engine        vmm.Engine
	Deterministic Deterministic
	Sandboxes     Sandboxes
	Snapshots     Snapshots
	Images        Images
	// Logger may be nil.
	Logger *slog.Logger
}

// Attestor runs, records and verifies. It is safe for concurrent use.
type Attestor struct {
	cfg    Config
	making chan struct{} // held by who makes what a block runs on

	mu      sync.Mutex
	closed  bool
	records *record.Store
	blocks  *block.Registry
}

// New returns an Attestor. It opens nothing yet.
func New(cfg Config) *Attestor {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Attestor{cfg: cfg, making: make(chan struct{}, 1)}
}

var errClosed = fmt.Errorf("%w: the daemon is stopping", errdef.ErrUnavailable)

// Records opens the store of records, the first time.
func (a *Attestor) Records(ctx context.Context) (*record.Store, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, errClosed
	}
	if a.records != nil {
		return a.records, nil
	}
	s, err := record.Open(ctx, record.Config{Dir: a.cfg.Records, Logger: a.cfg.Logger})
	a.records = s
	return s, held(err)
}

// Blocks opens the registry of blocks, the first time.
func (a *Attestor) Blocks(ctx context.Context) (*block.Registry, error) {
	records, err := a.Records(ctx) // what the own key says counts too
	if err != nil {
		return nil, err
	}
	own := records.Public().ID()
	known := func(key string) bool { return key == own || a.isTrusted(key) }
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, errClosed
	}
	if a.blocks != nil {
		return a.blocks, nil
	}
	r, err := block.Open(ctx, block.Config{Dir: a.cfg.Blocks, Rule: CheckRule, Known: known, Logger: a.cfg.Logger})
	a.blocks = r
	return r, held(err)
}

// held tells what to do about a directory that another process has.
func held(err error) error {
	if errors.Is(err, errdef.ErrConflict) {
		err = errdef.WithHint(err, "a daemon that runs has it: go through that one, without --local")
	}
	return err
}

// CheckRule returns errdef.ErrInvalid unless there is such a rule.
func CheckRule(name string) error { return record.Rules{Streams: []string{name}}.Validate() }

// Close lets go of what was opened. Nothing may be under way.
func (a *Attestor) Close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	var errs []error
	if a.records != nil {
		errs = append(errs, a.records.Close())
	}
	if a.blocks != nil {
		errs = append(errs, a.blocks.Close())
	}
	return errors.Join(errs...)
}

// Request asks for a command to be run, and for a record of it.
type Request struct {
	// Snapshot is a tag or digest. A deterministic run in a snapshot that is
	// not deterministic runs in its twin, which is made if there is none.
	Snapshot string
	// Mode is record.Deterministic unless it says otherwise.
	Mode  record.Mode
	Input record.Input
	// Rules say what of the output does not count.
	Rules record.Rules
	// Block and User, and the id of the record that this run repeats or
	// follows, are only recorded.
	Block, User, Parent string
	// MemoryDigest asks for the digest of the guest's memory at the end, of a
	// deterministic run.
	MemoryDigest bool
	// Stdout and Stderr, if not nil, are given the output as it comes.
	Stdout, Stderr io.Writer
}

// Result is what a run came to.
type Result struct {
	Record record.Envelope
	Input  record.Input
	Output record.Output
}

// Run runs a command, and returns when its record is kept. That the command
// fails is no error: the output says so.
func (a *Attestor) Run(ctx context.Context, req Request) (Result, error) {
	if err := req.Rules.Validate(); err != nil {
		return Result{}, err
	}
	store, err := a.Records(ctx) // before the work: what cannot be recorded is not done
	if err != nil {
		return Result{}, fmt.Errorf("run in %s: %w", req.Snapshot, err)
	}
	w, err := a.plan(ctx, req)
	if err != nil {
		return Result{}, err
	}
	fresh, err := w.run(ctx)
	if err != nil {
		return Result{}, err
	}
	e, err := store.Append(context.WithoutCancel(ctx), record.Draft{
		Parent: req.Parent, Block: req.Block, User: req.User, Mode: w.mode, Rules: req.Rules,
		Environment: fresh.Environment, Input: fresh.Input, Output: fresh.Output, Started: fresh.Started,
	})
	if err != nil {
		return Result{}, fmt.Errorf("record the run: %w", err)
	}
	return Result{Record: e, Input: fresh.Input, Output: fresh.Output}, nil
}

// work is one run that is ready to be done, as often as one likes.
type work struct {
	a     *Attestor
	mode  record.Mode
	snap  snapshot.Snapshot
	input record.Input
	opt   deterministic.Options
	where record.Environment
}

func (a *Attestor) plan(ctx context.Context, req Request) (*work, error) {
	w := &work{a: a, mode: req.Mode}
	w.opt = deterministic.Options{Stdout: req.Stdout, Stderr: req.Stderr, MemoryDigest: req.MemoryDigest}
	// What could not be recorded is not run.
	err := req.Input.Validate()
	if err == nil && req.Input.Limits.Output > record.MaxBlob {
		err = fmt.Errorf("%w: limit of %d bytes of output: a record holds at most %d", errdef.ErrInvalid, req.Input.Limits.Output, record.MaxBlob)
	}
	if err != nil {
		return nil, err
	}
	switch w.mode {
	case "", record.Deterministic:
		w.mode = record.Deterministic
		if w.input, err = deterministic.Prepare(req.Input); err != nil {
			return nil, err
		}
		if w.snap, err = a.cfg.Deterministic.Twin(ctx, req.Snapshot); err == nil {
			w.snap.Tag = a.nameOf(w.snap, req.Snapshot)
		}
	case record.Normal:
		if w.input, err = prepareNormal(req); err != nil {
			return nil, err
		}
		w.snap, err = a.cfg.Snapshots.Resolve(req.Snapshot)
	default:
		return nil, fmt.Errorf("%w: mode %q: it is deterministic or normal", errdef.ErrInvalid, w.mode)
	}
	if err != nil {
		return nil, err
	}
	w.where = a.environment(w.snap)
	return w, nil
}

// nameOf is what people call a snapshot: a twin by the name of whom it stands
// for.
func (a *Attestor) nameOf(snap snapshot.Snapshot, ref string) string {
	origin, err := a.cfg.Snapshots.Resolve(ref)
	if err != nil || origin.Tag == "" || snap.Tag != deterministic.TwinTag(origin.Digest) {
		return snap.Tag // a name is all that it lacks
	}
	return origin.Tag
}

func (w *work) run(ctx context.Context) (record.Fresh, error) {
	f := record.Fresh{Environment: w.where, Input: w.input, Started: time.Now().UTC()}
	var err error
	if w.mode == record.Deterministic {
		f.Output, err = w.a.cfg.Deterministic.Run(ctx, w.snap.Digest, w.input, w.opt)
	} else {
		f.Output, err = w.a.runNormal(ctx, w)
	}
	return f, err
}

// environment says what a run in a snapshot runs in.
func (a *Attestor) environment(snap snapshot.Snapshot) record.Environment {
	m := snap.Manifest
	e := record.Environment{
		SnapshotTag: snap.Tag, Snapshot: snap.Digest, Image: m.Image,
		Engine: m.Engine, EngineVersion: m.EngineVersion, VCPUs: m.Machine.VCPUs, MemoryMiB: m.Machine.MemoryMiB,
	}
	if img, err := a.cfg.Images.Get(m.Image); err == nil { // else they are not known
		e.Kernel, e.Agent = img.Manifest.Kernel.Digest, img.Manifest.Initrd.Digest // the agent is all that does anything in there
	}
	if m.Machine.Deterministic {
		model := a.cfg.Engine.Caps().Model
		shift := m.Machine.ClockShift
		e.Machine, e.CPU, e.Icount = model.Machine, model.CPU, &shift
	}
	return e
}
