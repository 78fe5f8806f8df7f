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
func (s *server) ListSandboxes(context.Context, wire.ListSandboxesRequestObject) (wire.ListSandboxesResponseObject, error) {
	boxes := s.Sandboxes.List()
	out := make(wire.ListSandboxes200JSONResponse, 0, len(boxes))
	for _, b := range boxes {
		out = append(out, sandboxOf(b))
	}
	return out, nil
}

// CreateSandboxes answers POST /v1/sandboxes.
func (s *server) CreateSandboxes(ctx context.Context, r wire.CreateSandboxesRequestObject) (wire.CreateSandboxesResponseObject, error) {
	req, err := forkRequest(*r.Body)
	if err != nil {
		return nil, err
	}
	results, err := s.Sandboxes.Fork(ctx, req)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, s.discard(ctx, results)
	}
	out := make(wire.CreateSandboxes201JSONResponse, 0, len(results))
	for _, result := range results {
		if result.Err == nil {
			out = append(out, sandboxOf(result.Sandbox))
			continue
		}
		if req.AllOrNothing {
			return nil, result.Err
		}
		_, body := answerFor(result.Err)
		out = append(out, wire.Sandbox{
			SnapshotTag: r.Body.SnapshotTag, GuestAddr: guestAddr, State: wire.SandboxStateDead,
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
		Labels: b.Labels, MemoryLimitMiB: int(or(b.MemoryLimitMiB, 0)),
	}
	switch {
	case req.Snapshot == "":
		return req, fmt.Errorf("%w: snapshot_tag is missing", errdef.ErrInvalid)
	case req.N < 1:
		return req, fmt.Errorf("%w: n must be at least 1", errdef.ErrInvalid)
	case req.N > maxFork:
		return req, fmt.Errorf("%w: n must be at most %d", errdef.ErrInvalid, maxFork)
	case req.MemoryLimitMiB < 0:
		return req, fmt.Errorf("%w: memory_limit_mib must not be negative", errdef.ErrInvalid)
	case b.PerChildNetns:
		return req, errdef.WithHint(fmt.Errorf("%w: sandboxes have no network yet", errdef.ErrInvalid),
			"leave per_child_netns out, or send false")
	}
	var err error
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
	out := sandboxOf(info)
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

func sandboxOf(i sandbox.Info) wire.Sandbox {
	out := wire.Sandbox{
		ID: i.ID, SnapshotTag: i.SnapshotTag, SnapshotDigest: i.SnapshotDigest, GuestAddr: guestAddr,
		CreatedAtUnix: i.CreatedAt.Unix(), State: wire.SandboxState(i.State), Reason: i.Reason, Engine: i.Engine,
		MemoryMiB: i.Machine.MemoryMiB, VCPUs: i.Machine.VCPUs, IdleTTLSecs: i.IdleTTL.Seconds(), Labels: i.Labels,
		ForkMS: i.ForkMS, FromPool: i.FromPool,
	}
	if i.PID != 0 {
		out.PID = &i.PID
	}
	if limit := int64(i.MemoryLimitMiB); limit != 0 {
		out.MemoryLimitMiB = &limit
	}
	if !i.LastActive.IsZero() {
		out.LastActiveUnix = i.LastActive.Unix()
	}
	if !i.ExpiresAt.IsZero() {
		out.ExpiresAtUnix = i.ExpiresAt.Unix()
	}
	return out
}
