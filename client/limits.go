package client

import (
	"context"
	"net/http"

	"github.com/tinevm/tine/internal/wire"
)

// What sandboxes may take of their host, and what they do.
type (
	// Limits are in force for a sandbox; what is 0 has no limit.
	Limits = wire.Limits
	// Usage is what a sandbox takes.
	Usage = wire.Usage
)

// LimitChange says what is to change of a sandbox's limits: nil stays as it is, 0
// is what a sandbox has that asked for nothing.
type LimitChange struct {
	MemoryMiB *int64
	CPUs      *float64 // cores: 0.5 is half of one
	PIDs      *int
	IOBytes   *int64 // a second, of reading, and as many of writing
}

// Limit changes what a sandbox may take of its host, at once.
func (c *Client) Limit(ctx context.Context, id string, change LimitChange) (Sandbox, error) {
	var out Sandbox
	err := c.call(ctx, http.MethodPatch, box(id, "limits"), nil, wire.LimitRequest{
		MemoryLimitMiB: change.MemoryMiB, CPULimit: change.CPUs, PIDsLimit: change.PIDs, IOLimitBytes: change.IOBytes,
	}, &out)
	return out, err
}

// Usage says what a sandbox takes of its host: nothing while it is suspended.
func (c *Client) Usage(ctx context.Context, id string) (Usage, error) {
	return get[Usage](ctx, c, box(id, "usage"), nil)
}
