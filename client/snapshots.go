package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/tinevm/tine/internal/wire"
)

// Snapshots.
type (
	// Snapshot is a machine, warmed up and frozen.
	Snapshot = wire.Snapshot
	// SnapshotDetail is all that is known of a snapshot.
	SnapshotDetail = wire.SnapshotDetail
	// SnapshotHost is what a snapshot's device state depends on of its host.
	SnapshotHost = wire.SnapshotHost
	// CreateSnapshotRequest says what snapshot to make.
	CreateSnapshotRequest = wire.CreateSnapshotRequest
	// SnapshotVerification says what came of making a snapshot again. Its Result
	// is Verified, Mismatch or CannotCompare.
	SnapshotVerification = wire.SnapshotVerification
	// DigestPair is a file of a snapshot, and what it is when made again.
	DigestPair = wire.DigestPair
	// GCReport says what was removed.
	GCReport = wire.GCReport
	// CheckReport says what reading everything again has shown.
	CheckReport = wire.CheckReport
	// Pool is the warm forks of a snapshot.
	Pool = wire.Pool
)

// SnapshotReady is the status of a snapshot that is complete.
const SnapshotReady = wire.SnapshotStatusReady

// RemoveSnapshotOptions say what to do about snapshots that were made from the
// one to be removed. With neither, they forbid it.
type RemoveSnapshotOptions struct {
	Cascade bool // remove them as well
	Force   bool // leave them: only its tag goes
}

// Snapshots lists the snapshots, by tag.
func (c *Client) Snapshots(ctx context.Context) ([]Snapshot, error) {
	return get[[]Snapshot](ctx, c, "/v1/snapshots", nil)
}

// Snapshot describes a snapshot.
func (c *Client) Snapshot(ctx context.Context, tag string) (SnapshotDetail, error) {
	return get[SnapshotDetail](ctx, c, "/v1/snapshots"+segments(tag, "info"), nil)
}

// CreateSnapshot boots an image, warms it up and freezes it. report, which may
// be nil, is told how it goes.
func (c *Client) CreateSnapshot(ctx context.Context, req CreateSnapshotRequest, report func(Progress)) (Snapshot, error) {
	return longCall[Snapshot](ctx, c, "/v1/snapshots", req, report)
}

// VerifySnapshot makes a deterministic snapshot again, and compares. report,
// which may be nil, is told how it goes.
func (c *Client) VerifySnapshot(ctx context.Context, tag string, report func(Progress)) (SnapshotVerification, error) {
	return longCall[SnapshotVerification](ctx, c, "/v1/snapshots"+segments(tag, "verify"), nil, report)
}

// RemoveSnapshot removes a snapshot that no sandbox uses.
func (c *Client) RemoveSnapshot(ctx context.Context, tag string, opts RemoveSnapshotOptions) error {
	query := url.Values{}
	if opts.Cascade {
		query.Set("cascade", strconv.FormatBool(true))
	}
	if opts.Force {
		query.Set("force", strconv.FormatBool(true))
	}
	return c.call(ctx, http.MethodDelete, "/v1/snapshots"+segments(tag), query, nil, nil)
}

// CollectSnapshots removes what no tag and no sandbox uses.
func (c *Client) CollectSnapshots(ctx context.Context) (GCReport, error) {
	return post[GCReport](ctx, c, "/v1/snapshots/gc", nil)
}

// CheckSnapshots reads every snapshot again. report, which may be nil, is told
// how it goes.
func (c *Client) CheckSnapshots(ctx context.Context, report func(Progress)) (CheckReport, error) {
	return longCall[CheckReport](ctx, c, "/v1/snapshots/check", nil, report)
}

// Pool says how many warm forks of a snapshot are parked.
func (c *Client) Pool(ctx context.Context, tag string) (Pool, error) {
	return get[Pool](ctx, c, "/v1/snapshots"+segments(tag, "pool"), nil)
}

// SetPool has the daemon keep size warm forks of a snapshot parked.
func (c *Client) SetPool(ctx context.Context, tag string, size int) (Pool, error) {
	var out Pool
	err := c.call(ctx, http.MethodPut, "/v1/snapshots"+segments(tag, "pool"), nil, wire.SetPoolRequest{Size: &size}, &out)
	return out, err
}
