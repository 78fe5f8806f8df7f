package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

// hasAttestor refuses what a daemon without records cannot do.
func (s *server) hasAttestor() error {
	if s.Attestor == nil {
		return fmt.Errorf("%w: this daemon runs nothing deterministically", errdef.ErrUnsupported)
	}
	return nil
}

// checkDeterministic refuses what only an ordinary machine can have.
func (s *server) checkDeterministic(b wire.CreateSnapshotRequest) error {
	switch {
	case !b.Deterministic && b.ClockShift != nil:
		return fmt.Errorf("%w: clock_shift is for deterministic snapshots", errdef.ErrInvalid)
	case !b.Deterministic:
		return nil
	case b.VCPUs > 1:
		return fmt.Errorf("%w: a deterministic machine has one processor", errdef.ErrInvalid)
	case b.DiskMiB > 0:
		return fmt.Errorf("%w: a deterministic machine has no disk", errdef.ErrInvalid)
	case b.Net:
		return fmt.Errorf("%w: a deterministic machine has no network card", errdef.ErrInvalid)
	case b.ClockShift != nil && (*b.ClockShift < 0 || *b.ClockShift > vmm.MaxClockShift):
		return fmt.Errorf("%w: clock_shift must be 0 to %d", errdef.ErrInvalid, vmm.MaxClockShift)
	}
	if _, want := s.Sandboxes.Pool(b.Tag); b.Replace && want > 0 {
		err := fmt.Errorf("%w: snapshot %s has a pool, and a deterministic one has no forks", errdef.ErrConflict, b.Tag)
		return errdef.WithHint(err, "tine snapshot pool "+b.Tag+" 0")
	}
	return s.hasAttestor()
}

// buildDeterministic makes a snapshot for deterministic runs.
func (s *server) buildDeterministic(ctx context.Context, b wire.CreateSnapshotRequest, req sandbox.SnapshotRequest) (snapshot.Snapshot, error) {
	began := time.Now()
	snap, err := s.Attestor.BuildSnapshot(ctx, deterministic.BuildRequest{
		Tag: req.Tag, Image: req.Image, Warmup: req.Warmup, Imports: req.Imports, MemoryMiB: req.Machine.MemoryMiB,
		ClockShift: b.ClockShift, Replace: req.Replace,
	})
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	audit.Made(ctx, snap.Tag)
	s.Events.Add(sandbox.SnapshotCreated, "", sandbox.EventData{
		Snapshot: snap.Tag, Digest: snap.Digest, TookMS: millis(time.Since(began)),
	})
	return snap, nil
}

// VerifySnapshot answers POST /v1/snapshots/{tag}/verify.
func (s *server) VerifySnapshot(ctx context.Context, r wire.VerifySnapshotRequestObject) (wire.VerifySnapshotResponseObject, error) {
	if err := s.hasAttestor(); err != nil {
		return nil, err
	}
	verify := func(ctx context.Context) (wire.SnapshotVerification, error) {
		leave, err := s.enterRun()
		if err != nil {
			return wire.SnapshotVerification{}, err
		}
		defer leave()
		began := time.Now()
		remade, err := s.Attestor.RemakeSnapshot(ctx, r.Tag)
		if errors.Is(err, errdef.ErrNotFound) {
			err = s.notReady(r.Tag, err)
		}
		if err != nil {
			return wire.SnapshotVerification{}, err
		}
		snap := remade.Snapshot
		out := wire.SnapshotVerification{
			Result: wire.SnapshotVerificationResult(remade.Result), Tag: snap.Tag, Digest: snap.Digest, Missing: []string{},
			TookMS: time.Since(began).Milliseconds(),
		}
		for _, m := range remade.Missing {
			out.Missing = append(out.Missing, conceal(ctx, m))
		}
		if len(remade.Missing) == 0 {
			out.Memory, out.Device = pairOf(snap.Manifest.Memory, remade.Memory), pairOf(snap.Manifest.Device, remade.Device)
		}
		return out, nil
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return verify(ctx) }}, nil
	}
	out, err := verify(ctx)
	return wire.VerifySnapshot200JSONResponse(out), err
}

func pairOf(was, is snapshot.File) *wire.DigestPair {
	return &wire.DigestPair{Was: was.Digest, Is: is.Digest, Same: was == is}
}

// twinOf is the snapshot that one stands for in deterministic runs: its tag, or
// the beginning of its digest where nobody knows that any more.
func (n names) twinOf(snap snapshot.Snapshot) string {
	if !snap.Manifest.Machine.Deterministic {
		return ""
	}
	return cmp.Or(n.twins[snap.Tag], deterministic.TwinSource(snap.Tag))
}

// twinsOf are the tags of snapshots, by the tags that their twins have.
func twinsOf(tags map[string]string) map[string]string {
	twins := make(map[string]string, len(tags))
	for digest, tag := range tags {
		twins[deterministic.TwinTag(digest)] = tag
	}
	return twins
}
