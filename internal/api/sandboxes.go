package api

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

const (
	// maxFork is the most sandboxes that one request may ask for.
	maxFork = 1000
	// discardTime bounds the removal of sandboxes that nobody waits for.
	discardTime = time.Minute
	// guestAddr is where forkd's clients think every guest is.
	guestAddr = "10.42.0.2:8888"
)

// ListSandboxes answers GET /v1/sandboxes.
func (s *server) ListSandboxes(ctx context.Context, r wire.ListSandboxesRequestObject) (wire.ListSandboxesResponseObject, error) {
	by := sandboxOrder()
	boxes, next, err := by.cut(s.boxes(ctx), r.Params.Limit, r.Params.After)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Sandbox, 0, len(boxes))
	for _, b := range boxes {
		out = append(out, s.sandboxOf(b))
	}
	return page[wire.Sandbox]{items: out, path: by.path, limit: r.Params.Limit, next: next}, nil
}

// CreateSandboxes answers POST /v1/sandboxes.
func (s *server) CreateSandboxes(ctx context.Context, r wire.CreateSandboxesRequestObject) (wire.CreateSandboxesResponseObject, error) {
	req, err := forkRequest(*r.Body)
	if err != nil {
		return nil, err
	}
	if r.Body.PerChildNetns {
		if err = s.ownNetns(ctx, req.Snapshot); err != nil {
			return nil, err
		}
	}
	boxes, err := s.fork(ctx, req)
	if errors.Is(err, errdef.ErrNotFound) {
		err = s.notReady(r.Body.SnapshotTag, err)
	}
	return wire.CreateSandboxes201JSONResponse(boxes), err
}

// fork makes sandboxes for a client, if that is still there to learn of them.
func (s *server) fork(ctx context.Context, req sandbox.ForkRequest) ([]wire.Sandbox, error) {
	results, err := s.Sandboxes.Fork(ctx, req)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, s.discard(ctx, results)
	}
	out := make([]wire.Sandbox, 0, len(results))
	for _, result := range results {
		if result.Err == nil {
			out = append(out, s.sandboxOf(result.Sandbox))
			continue
		}
		if req.AllOrNothing {
			return nil, result.Err
		}
		_, body := answerTo(ctx, result.Err)
		out = append(out, wire.Sandbox{
			SnapshotTag: req.Snapshot, GuestAddr: guestAddr, State: wire.SandboxStateDead,
			Error: body.Error, Code: body.Code, Hint: body.Hint,
		})
	}
	return out, nil
}

// discard removes sandboxes whose client has left before it could learn of
// them.
func (s *server) discard(ctx context.Context, results []sandbox.ForkResult) error {
	err := context.Cause(ctx)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), discardTime)
	defer cancel()
	for _, r := range results {
		if r.Err == nil {
			err = errors.Join(err, s.Sandboxes.Kill(ctx, r.Sandbox.ID))
		}
	}
	return err
}

// forkRequest checks and completes what a client asks for.
func forkRequest(b wire.CreateSandboxesRequest) (sandbox.ForkRequest, error) {
	req := sandbox.ForkRequest{
		Snapshot: b.SnapshotTag, N: or(b.N, 1), AllOrNothing: or(b.AllOrNothing, true), NoPool: !or(b.Pool, true),
		Labels:      b.Labels,
		IdleSuspend: b.IdleAction == wire.CreateSandboxesRequestIdleActionSuspend, Secrets: b.Secrets, KeepSecrets: b.KeepSecrets,
	}
	switch {
	case req.Snapshot == "":
		return req, fmt.Errorf("%w: snapshot_tag is missing", errdef.ErrInvalid)
	case req.N < 1:
		return req, fmt.Errorf("%w: n must be at least 1", errdef.ErrInvalid)
	case req.N > maxFork:
		return req, fmt.Errorf("%w: n must be at most %d", errdef.ErrInvalid, maxFork)
	case checkLabels(req.Labels) != nil:
		return req, checkLabels(req.Labels)
	case b.IdleAction != "" && !b.IdleAction.Valid():
		return req, fmt.Errorf("%w: idle_action must be remove or suspend", errdef.ErrInvalid)
	case req.IdleSuspend && b.IdleTTLSecs == 0:
		return req, fmt.Errorf("%w: idle_action suspend needs idle_ttl_secs", errdef.ErrInvalid)
	}
	var err error
	if req.Limits, err = (limitFields{or(b.MemoryLimitMiB, 0), b.CPULimit, b.PIDsLimit, b.IOLimitBytes}).limits(); err != nil {
		return req, err
	}
	if req.Net, err = netOf(b.Net); err != nil {
		return req, err
	}
	if req.IdleTTL, err = duration("idle_ttl_secs", b.IdleTTLSecs); err != nil {
		return req, err
	}
	req.Lifetime, err = duration("lifetime_secs", b.LifetimeSecs)
	return req, err
}

// or is *p, or fallback where there is none.
func or[T any](p *T, fallback T) T {
	if p == nil {
		return fallback
	}
	return *p
}

// duration reads a field of seconds.
func duration(field string, seconds float64) (time.Duration, error) {
	if seconds < 0 || seconds > math.MaxInt64/float64(time.Second)/2 {
		return 0, fmt.Errorf("%w: %s is out of range", errdef.ErrInvalid, field)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// GetSandbox answers GET /v1/sandboxes/{id}.
func (s *server) GetSandbox(_ context.Context, r wire.GetSandboxRequestObject) (wire.GetSandboxResponseObject, error) {
	info, err := s.Sandboxes.Get(r.ID)
	if err != nil {
		return nil, err
	}
	out := s.sandboxOf(info)
	if private, shared, merr := s.Sandboxes.Memory(r.ID); merr == nil { // else it has no process to measure
		out.PrivateBytes, out.SharedBytes = private, shared
	}
	return wire.GetSandbox200JSONResponse(out), nil
}

// DeleteSandbox answers DELETE /v1/sandboxes/{id}.
func (s *server) DeleteSandbox(ctx context.Context, r wire.DeleteSandboxRequestObject) (wire.DeleteSandboxResponseObject, error) {
	return wire.DeleteSandbox204Response{}, s.Sandboxes.Kill(ctx, r.ID)
}

// PingSandbox answers POST /v1/sandboxes/{id}/ping.
func (s *server) PingSandbox(ctx context.Context, r wire.PingSandboxRequestObject) (wire.PingSandboxResponseObject, error) {
	var out wire.Pong
	err := s.Sandboxes.With(ctx, r.ID, func(ctx context.Context, g *guest.Client) error {
		start := time.Now()
		pong, err := g.Ping(ctx)
		out = wire.Pong{
			Pong: true, PID: pong.PID, Agent: pong.Agent, Generation: pong.Generation,
			UptimeMS: millis(pong.Uptime), RoundTripMS: millis(time.Since(start)),
		}
		return err
	})
	return wire.PingSandbox200JSONResponse(out), err
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (s *server) sandboxOf(i sandbox.Info) wire.Sandbox {
	out := wire.Sandbox{
		ID: i.ID, SnapshotTag: i.SnapshotTag, SnapshotDigest: i.SnapshotDigest, GuestAddr: guestAddr,
		CreatedAtUnix: i.CreatedAt.Unix(), CreatedAt: rfc3339(i.CreatedAt), State: wire.SandboxState(i.State), Reason: i.Reason, Engine: i.Engine,
		MemoryMiB: i.Machine.MemoryMiB, DiskMiB: i.Machine.DiskMiB, Net: i.Machine.Net, VCPUs: i.Machine.VCPUs, IdleTTLSecs: i.IdleTTL.Seconds(), Labels: i.Labels,
		ForkMS: i.ForkMS, FromPool: i.FromPool, Head: i.Head, HasBranched: i.Branches > 0, BranchCount: i.Branches,
		Limits: limitsOf(i.Limits), OutOfMemory: i.OutOfMemory,
	}
	if i.IdleTTL != 0 {
		out.IdleAction = wire.SandboxIdleActionRemove
	}
	if i.IdleTTL != 0 && i.IdleSuspend {
		out.IdleAction = wire.SandboxIdleActionSuspend
	}
	if path := s.memoryOf(i); path != "" {
		out.LastBranchMemoryPath = &path
	}
	if i.PID != 0 {
		out.PID = &i.PID
	}
	if limit := int64(i.MemoryLimitMiB); limit != 0 {
		out.MemoryLimitMiB = &limit
	}
	if !i.LastActive.IsZero() {
		out.LastActiveUnix, out.LastActiveAt = i.LastActive.Unix(), rfc3339(i.LastActive)
	}
	if !i.ExpiresAt.IsZero() {
		out.ExpiresAtUnix, out.ExpiresAt = i.ExpiresAt.Unix(), rfc3339(i.ExpiresAt)
	}
	return out
}

// memoryOf is the file of the memory of a sandbox's last branch, or "".
func (s *server) memoryOf(i sandbox.Info) string {
	if i.Branches == 0 || i.Head == "" {
		return ""
	}
	snap, err := s.Snapshots.Resolve(i.Head)
	if err != nil {
		return "" // it was removed since
	}
	return s.memoryPath(snap)
}

// RollbackSandbox answers POST /v1/sandboxes/{id}/rollback.
func (s *server) RollbackSandbox(ctx context.Context, r wire.RollbackSandboxRequestObject) (wire.RollbackSandboxResponseObject, error) {
	if r.Body.To == "" {
		return nil, fmt.Errorf("%w: to is missing", errdef.ErrInvalid)
	}
	info, err := s.Sandboxes.Rollback(ctx, r.ID, r.Body.To)
	if err != nil {
		return nil, err
	}
	return wire.RollbackSandbox200JSONResponse(s.sandboxOf(info)), nil
}

// SuspendSandbox answers POST /v1/sandboxes/{id}/suspend.
func (s *server) SuspendSandbox(ctx context.Context, r wire.SuspendSandboxRequestObject) (wire.SuspendSandboxResponseObject, error) {
	info, err := s.Sandboxes.Suspend(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	return wire.SuspendSandbox200JSONResponse(s.sandboxOf(info)), nil
}

// ResumeSandbox answers POST /v1/sandboxes/{id}/resume.
func (s *server) ResumeSandbox(ctx context.Context, r wire.ResumeSandboxRequestObject) (wire.ResumeSandboxResponseObject, error) {
	info, err := s.Sandboxes.Resume(ctx, r.ID)
	if err != nil {
		return nil, err
	}
	return wire.ResumeSandbox200JSONResponse(s.sandboxOf(info)), nil
}
