package block

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

// MaxStdin bounds what a block is given to read.
const MaxStdin = 64 << 20

// Target is what a block runs on: one of the three, see Run.
type Target struct {
	Source   string
	Image    string
	Snapshot string
	// Warmup are shell commands to run before the machine is frozen.
	Warmup []string
}

// Job is a run for an Executor.
type Job struct {
	Target Target
	Input  record.Input
	// Block and BlockID are for the record.
	Block   Ref
	BlockID ID
	User    string
	// Canonical are the rules that stdout and stderr are compared under,
	// CanonicalFiles those for collected files.
	Canonical      []string
	CanonicalFiles []string
}

// Execution is what an Executor has done.
type Execution struct {
	RecordID string
	// Snapshot is the digest of what it ran on.
	Snapshot string
	// Started is when it began on the host.
	Started time.Time
	Output  record.Output
}

// Executor runs commands and keeps their records.
type Executor interface {
	// Run runs job.Input on job.Target, delivers Input.Stdin as the command's
	// standard input, and returns when the record is kept. That a command fails
	// is not an error: its Output says so. Run is safe for concurrent use; when
	// ctx ends it stops the run.
	Run(ctx context.Context, job Job) (Execution, error)
}

// Runner runs blocks.
type Runner struct {
	Registry *Registry
	Executor Executor
}

// RunRequest asks for a block to be run.
type RunRequest struct {
	// Block is an entry of the registry, or one made by NewEntry.
	Block Entry
	// Stdin takes the place of the block's own when it is not nil.
	Stdin []byte
	// Level and User are the caller's.
	Level TrustLevel
	User  string
	// Seed and Start take the place of the block's own when they are not nil.
	Seed  *uint64
	Start *time.Time
	// Quarantined runs a block even in quarantine, to find out about it. That
	// takes level Two.
	Quarantined bool
}

// Result is what a run of a block came to.
type Result struct {
	RecordID string
	Input    record.Input
	Output   record.Output
	Status   ExecutionStatus
	// Requires says who meets the block's requirements.
	Requires []Met
	Forge    ForgeRecord
}

// Run checks that the caller may run the block and that what it requires is
// there, and runs it. A command that fails is a result with the status Failed.
func (r Runner) Run(ctx context.Context, req RunRequest) (Result, error) {
	entry, met, err := r.check(req)
	if err != nil {
		return Result{}, err
	}
	spec := entry.Spec
	in, err := req.input(spec.Run)
	if err != nil {
		return Result{}, fmt.Errorf("run block %s: %w", key(entry.Ref), err)
	}
	job := Job{
		Target: Target{Source: spec.Run.Source, Image: spec.Run.Image, Snapshot: spec.Run.Snapshot, Warmup: spec.Run.Warmup},
		Input:  in, Block: entry.Ref, BlockID: entry.ID(), User: req.User,
		Canonical: spec.Run.Canonical, CanonicalFiles: spec.Run.CanonicalFiles,
	}
	done, err := r.Executor.Run(ctx, job)
	if err != nil {
		return Result{}, fmt.Errorf("run block %s: %w", key(entry.Ref), err)
	}
	return Result{
		RecordID: done.RecordID, Input: in, Output: done.Output, Status: StatusOf(done.Output), Requires: met,
		Forge: NewForgeRecord(Facts{
			RecordID: done.RecordID, Block: job.BlockID, User: req.User, Stdin: in.Stdin, Output: done.Output,
			Started: done.Started, Snapshot: done.Snapshot,
		}),
	}, nil
}

func (req RunRequest) input(run Run) (record.Input, error) {
	if len(req.Stdin) > MaxStdin {
		return record.Input{}, fmt.Errorf("%w: input of %d bytes: at most %d", errdef.ErrInvalid, len(req.Stdin), MaxStdin)
	}
	in, err := run.Input(req.Stdin)
	if err == nil && req.Seed != nil {
		in.Seed = *req.Seed
	}
	if err == nil && req.Start != nil {
		in.Start = req.Start.UTC()
	}
	return in, err
}

// check is the gate, and looks for what the block requires. Of a block in the
// registry it returns the entry there, whatever the caller's says. A block that
// is not there is one that nobody has approved.
func (r Runner) check(req RunRequest) (Entry, []Met, error) {
	e, act := req.Block, ActRun
	published, err := r.Registry.Get(e.Ref.String())
	if err == nil {
		e = published
	}
	switch {
	case err != nil && r.isSwap(e):
		act = ActSwap
	case err != nil, req.Quarantined:
		act = ActCompose
	}
	if allowed := Allow(req.Level, act, e.Ref.Name, e.Spec.MinimumTrustLevel); allowed != nil {
		return Entry{}, nil, allowed
	}
	resolution, unmet := Resolve(e, r.Registry.List(), ResolveOptions{})
	if unmet != nil {
		return Entry{}, nil, unmet
	}
	if req.Quarantined {
		return e, resolution.Met, nil
	}
	concerned := e.Spec.ComposedOf
	if err == nil { // of what was never published nothing is known
		concerned = append([]Ref{e.Ref}, concerned...)
	}
	for _, m := range resolution.Met {
		concerned = append(slices.Clip(concerned), m.Provider)
	}
	return e, resolution.Met, r.refuseQuarantined(e, concerned)
}

// isSwap reports whether e is what Swap makes of a composition and a block of
// the registry: one that has been approved, but for one part.
func (r Runner) isSwap(e Entry) bool {
	all := r.Registry.List()
	title := Title{e.Spec.Name, e.Spec.Version, e.Spec.Description, e.Spec.Author, e.Spec.AuthorKey}
	for _, approved := range all {
		if approved.Ref.Name != e.Ref.Name || len(approved.Spec.ComposedOf) == 0 {
			continue
		}
		added := without(e.Spec.ComposedOf, approved.Spec.ComposedOf)
		if len(added) != 1 {
			continue
		}
		i := slices.IndexFunc(all, func(by Entry) bool { return by.Ref == added[0] })
		if i < 0 {
			continue
		}
		for _, old := range without(approved.Spec.ComposedOf, e.Spec.ComposedOf) {
			made, err := Swap(Three, title, approved.Spec, old.Name, all[i], all)
			if err == nil && sameSpec(made, e.Spec) {
				return true
			}
		}
	}
	return false
}

// without is what of refs is not among others.
func without(refs, others []Ref) []Ref {
	return slices.DeleteFunc(slices.Clone(refs), func(r Ref) bool { return slices.Contains(others, r) })
}

// sameSpec compares what the files of two blocks would be.
func sameSpec(a, b Spec) bool {
	first, err1 := a.Encode()
	second, err2 := b.Encode()
	return err1 == nil && err2 == nil && bytes.Equal(first, second)
}

// refuseQuarantined looks at the blocks that a run concerns.
func (r Runner) refuseQuarantined(running Entry, concerned []Ref) error {
	for _, ref := range concerned {
		trust, err := r.Registry.Trust(ref.Digest)
		if err != nil {
			return fmt.Errorf("run block %s: %w", key(running.Ref), err)
		}
		if trust.Status == Quarantined {
			return errdef.WithHint(fmt.Errorf("%w: run block %s: block %s is quarantined: running it again came to another result",
				errdef.ErrDenied, key(running.Ref), key(ref)), "look at its evidence, and let an audit at trust level Three lift it")
		}
	}
	return nil
}
