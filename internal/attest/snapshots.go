package attest

import (
	"context"
	"errors"

	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
)

// BuildSnapshot makes a deterministic snapshot.
func (a *Attestor) BuildSnapshot(ctx context.Context, req deterministic.BuildRequest) (snapshot.Snapshot, error) {
	return a.cfg.Deterministic.Build(ctx, req)
}

// Remade is what came of making a snapshot again.
type Remade struct {
	// Result goes by the memory. That the devices are not the same means that
	// the clock is a tick further, where the host was busy.
	Result   record.Result
	Snapshot snapshot.Snapshot
	// Memory and Device are the files as they came out this time.
	Memory, Device snapshot.File
	// Missing is what it takes to compare, and is not there.
	Missing []string
}

// RemakeSnapshot makes a deterministic snapshot again, and compares. Errors are
// about the host, and that there is no such snapshot.
func (a *Attestor) RemakeSnapshot(ctx context.Context, ref string) (Remade, error) {
	snap, err := a.cfg.Snapshots.Resolve(ref)
	if err != nil {
		return Remade{}, err
	}
	c, err := a.cfg.Deterministic.Remake(ctx, snap.Digest)
	if errors.Is(err, errdef.ErrConflict) || errors.Is(err, errdef.ErrUnsupported) {
		return Remade{Result: record.CannotCompare, Snapshot: snap, Missing: []string{err.Error()}}, nil
	}
	if err != nil {
		return Remade{}, err
	}
	r := Remade{Result: record.Mismatch, Snapshot: snap, Memory: c.Memory, Device: c.Device}
	if c.SameMemory() {
		r.Result = record.Verified
	}
	return r, nil
}
