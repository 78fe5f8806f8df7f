package client

import (
	"context"

	"github.com/tinevm/tine/internal/wire"
)

// What a daemon says of itself and its host.
type (
	// Version is what the daemon is.
	Version = wire.Version
	// AuditFile is a sealed file of the daemon's audit log.
	AuditFile = wire.AuditFile
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

// RotateAudit has the daemon seal the active file of its audit log.
func (c *Client) RotateAudit(ctx context.Context) (AuditFile, error) {
	return post[AuditFile](ctx, c, "/v1/audit/rotate", nil)
}

// What an examination can come to.
const (
	CheckOK   = wire.DoctorCheckStatusOK
	CheckWarn = wire.DoctorCheckStatusWarn
	CheckFail = wire.DoctorCheckStatusFail
	CheckSkip = wire.DoctorCheckStatusSkip
)
