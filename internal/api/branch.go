package api

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

// BranchSandbox answers POST /v1/sandboxes/{id}/branch.
func (s *server) BranchSandbox(ctx context.Context, r wire.BranchSandboxRequestObject) (wire.BranchSandboxResponseObject, error) {
	body := or(r.Body, wire.BranchRequest{})
	req, err := branchRequest(body)
	if err != nil {
		return nil, err
	}
	if err = mayReplace(ctx, body); err != nil {
		return nil, err
	}
	source, err := s.source(r.ID, body)
	if err != nil {
		return nil, err
	}
	branch := func(ctx context.Context) (wire.Snapshot, error) { return s.branch(ctx, source, req, body.N) }
	if wantsLines(ctx) && !req.NoWait {
		return lines{ctx, func(ctx context.Context) (any, error) { return branch(ctx) }}, nil
	}
	out, err := branch(ctx)
	if err == nil && out.Status == wire.SnapshotStatusWriting {
		return wire.BranchSandbox202JSONResponse(out), nil
	}
	return wire.BranchSandbox201JSONResponse(out), err
}

// branchRequest checks what can be checked of a request without looking at
// anything else. Unlike the command line's, a branch is full unless it says
// otherwise, as forkd's clients expect.
func branchRequest(b wire.BranchRequest) (sandbox.BranchRequest, error) {
	req := sandbox.BranchRequest{Tag: b.Tag, Mode: sandbox.Full, Replace: b.Replace, NoWait: !or(b.Wait, true)}
	if b.Tag != "" {
		if err := snapshot.CheckTag(b.Tag); err != nil {
			return req, err
		}
	}
	diff := b.Diff || b.Mode == wire.BranchRequestModeDiff
	live := b.Live || b.Mode == wire.BranchRequestModeLive
	switch {
	case b.Mode != "" && !b.Mode.Valid():
		return req, fmt.Errorf("%w: mode must be full, diff or live", errdef.ErrInvalid)
	case b.Mode != "" && (b.Diff || b.Live):
		return req, fmt.Errorf("%w: set either `mode` (canonical) OR the legacy `diff` / `live` booleans, not both", errdef.ErrInvalid)
	case diff && live, b.MeasureDiff && (diff || live):
		return req, fmt.Errorf("%w: set at most one of measure_diff / diff / live", errdef.ErrInvalid)
	case req.NoWait && !live:
		return req, fmt.Errorf("%w: `wait: false` requires `live: true` (or `mode: \"live\"`)", errdef.ErrInvalid)
	case b.N < 0 || b.N > maxFork:
		return req, fmt.Errorf("%w: n must be 0 to %d", errdef.ErrInvalid, maxFork)
	case req.NoWait && b.N > 0:
		return req, fmt.Errorf("%w: `n` needs the snapshot, which `wait: false` does not wait for", errdef.ErrInvalid)
	case diff:
		req.Mode = sandbox.Diff
	case live:
		req.Mode = sandbox.Live
	}
	return req, nil
}

// source finds the sandbox to branch, in forkd's order: the tag, the sandbox,
// then what is said of its parent. That nobody else takes the tag meanwhile is
// for Branch to see.
func (s *server) source(id string, b wire.BranchRequest) (sandbox.Info, error) {
	if b.Tag != "" && !b.Replace {
		if _, err := s.Snapshots.Resolve(b.Tag); err == nil {
			return sandbox.Info{}, errdef.WithHint(fmt.Errorf("snapshot %s %w; DELETE first", b.Tag, errdef.ErrExists), "or choose another tag")
		}
	}
	info, err := s.Sandboxes.Get(id)
	switch {
	case err != nil:
		return info, err
	case b.ParentTag != "" && b.ParentTag != info.SnapshotTag:
		return info, fmt.Errorf("%w: parent_tag %q must be the source's snapshot_tag, %q", errdef.ErrInvalid, b.ParentTag, info.SnapshotTag)
	case b.ParentTag != "" && !b.Diff && b.Mode != wire.BranchRequestModeDiff:
		return info, fmt.Errorf("%w: parent_tag requires `diff: true` (or `mode: \"diff\"`)", errdef.ErrInvalid)
	}
	return info, nil
}

// branch takes a snapshot of a sandbox and forks n from it.
func (s *server) branch(ctx context.Context, source sandbox.Info, req sandbox.BranchRequest, n int) (wire.Snapshot, error) {
	snap, err := s.Sandboxes.Branch(ctx, source.ID, req)
	if err != nil {
		return wire.Snapshot{}, err
	}
	out, err := s.describe(snap)
	if err != nil || n == 0 {
		return out, err
	}
	out.Sandboxes, err = s.fork(ctx, siblings(source, snap, n))
	if err != nil {
		hint := fmt.Sprintf("the branch is there: fork snapshot %s, or remove it", snap.Tag)
		return out, errdef.WithHint(fmt.Errorf("fork branch %s: %w", snap.Tag, err), errorHint(err, hint))
	}
	return out, nil
}

// errorHint is err's own hint, if it has one, and then more.
func errorHint(err error, more string) string {
	if hint := errdef.Hint(err); hint != "" {
		return hint + "; " + more
	}
	return more
}

// siblings asks for sandboxes that live by the rules of the one that they were
// branched from. What that may reach they may not: secrets are not inherited, and
// nor is where they are sent.
func siblings(source sandbox.Info, snap snapshot.Snapshot, n int) sandbox.ForkRequest {
	req := sandbox.ForkRequest{
		Snapshot: snap.Tag, N: n, AllOrNothing: true, Labels: maps.Clone(source.Labels), Limits: askedOf(source),
		IdleTTL: source.IdleTTL, IdleSuspend: source.IdleSuspend,
	}
	delete(req.Labels, workspace.Label) // a workspace has one sandbox
	if !source.ExpiresAt.IsZero() {
		req.Lifetime = source.ExpiresAt.Sub(source.CreatedAt)
	}
	return req
}

// PromoteSnapshot answers POST /v1/snapshots/{tag}/promote.
func (s *server) PromoteSnapshot(ctx context.Context, r wire.PromoteSnapshotRequestObject) (wire.PromoteSnapshotResponseObject, error) {
	if err := snapshot.CheckTag(r.Tag); err != nil {
		return nil, err
	}
	if r.Body.From == "" {
		return nil, fmt.Errorf("%w: from is missing", errdef.ErrInvalid)
	}
	promote := func(ctx context.Context) (wire.Snapshot, error) {
		snap, err := s.Sandboxes.Promote(ctx, r.Body.From, r.Tag)
		if errors.Is(err, errdef.ErrNotFound) {
			err = s.notReady(r.Body.From, err)
		}
		if err != nil {
			return wire.Snapshot{}, err
		}
		return s.describe(snap)
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return promote(ctx) }}, nil
	}
	out, err := promote(ctx)
	return wire.PromoteSnapshot200JSONResponse(out), err
}

// CompactSnapshot answers POST /v1/snapshots/{tag}/compact.
func (s *server) CompactSnapshot(ctx context.Context, r wire.CompactSnapshotRequestObject) (wire.CompactSnapshotResponseObject, error) {
	if err := snapshot.CheckTag(r.Body.To); err != nil {
		return nil, err
	}
	if r.Body.To == r.Tag {
		return nil, fmt.Errorf("%w: compact target tag must differ from source tag", errdef.ErrInvalid)
	}
	compact := func(ctx context.Context) (wire.Snapshot, error) {
		snap, err := s.Snapshots.Compact(ctx, r.Tag, r.Body.To)
		if errors.Is(err, errdef.ErrNotFound) {
			err = s.notReady(r.Tag, err)
		}
		if err != nil {
			return wire.Snapshot{}, err
		}
		return s.describe(snap)
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return compact(ctx) }}, nil
	}
	out, err := compact(ctx)
	return wire.CompactSnapshot200JSONResponse(out), err
}

// FlattenSnapshot answers POST /v1/snapshots/{tag}/flatten.
func (s *server) FlattenSnapshot(ctx context.Context, r wire.FlattenSnapshotRequestObject) (wire.FlattenSnapshotResponseObject, error) {
	snap, err := s.Snapshots.Resolve(r.Tag)
	if errors.Is(err, errdef.ErrNotFound) {
		err = s.notReady(r.Tag, err)
	}
	if err != nil {
		return nil, err
	}
	flatten := func(ctx context.Context) (wire.Snapshot, error) {
		if flatErr := s.Snapshots.Flatten(ctx, snap); flatErr != nil {
			return wire.Snapshot{}, flatErr
		}
		return s.describe(snap)
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return flatten(ctx) }}, nil
	}
	out, err := flatten(ctx)
	return wire.FlattenSnapshot200JSONResponse(out), err
}

// PruneSnapshots answers POST /v1/snapshots/prune.
func (s *server) PruneSnapshots(ctx context.Context, r wire.PruneSnapshotsRequestObject) (wire.PruneSnapshotsResponseObject, error) {
	if r.Body.KeepLast == nil || *r.Body.KeepLast < 0 {
		return nil, fmt.Errorf("%w: keep_last must be 0 or more", errdef.ErrInvalid)
	}
	tags, freed, err := s.Snapshots.Prune(ctx, snapshot.PrunePolicy{KeepLast: *r.Body.KeepLast, DryRun: r.Body.DryRun})
	return wire.PruneSnapshots200JSONResponse{Removed: list(tags), FreedBytes: freed.Bytes, DryRun: r.Body.DryRun}, err
}
