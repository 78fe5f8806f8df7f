package client

import (
	"context"

	"github.com/tinevm/tine/internal/wire"
)

// What a daemon says of itself and its host.
type (
	// Version is what the daemon is.
	Version = wire.Version
	// Check is one thing that was examined on a host.
	Check = wire.DoctorCheck
)

// Health returns nil when the daemon answers.
func (c *Client) Health(ctx context.Context) error {
	_, err := get[wire.Health](ctx, c, "/healthz", nil)
	return err
}

// Version returns what the daemon is.
func (c *Client) Version(ctx context.Context) (Version, error) {
	return get[Version](ctx, c, "/version", nil)
}

// Doctor examines the daemon's host.
func (c *Client) Doctor(ctx context.Context) ([]Check, error) {
	report, err := get[wire.DoctorReport](ctx, c, "/v1/doctor", nil)
	return report.Checks, err
}

// What an examination can come to.
const (
	CheckOK   = wire.DoctorCheckStatusOK
	CheckWarn = wire.DoctorCheckStatusWarn
	CheckFail = wire.DoctorCheckStatusFail
	CheckSkip = wire.DoctorCheckStatusSkip
)
