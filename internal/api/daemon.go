package api

import (
	"context"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// GetHealth answers GET /healthz. A daemon that can only be asked is up, and says
// why it does no more.
func (s *server) GetHealth(context.Context, wire.GetHealthRequestObject) (wire.GetHealthResponseObject, error) {
	health := wire.GetHealth200JSONResponse{OK: true}
	if s.Audit != nil {
		if err := s.Audit.Trouble(); err != nil {
			health.Degraded = err.Error()
		}
	}
	return health, nil
}

// GetVersion answers GET /version.
func (s *server) GetVersion(context.Context, wire.GetVersionRequestObject) (wire.GetVersionResponseObject, error) {
	return wire.GetVersion200JSONResponse{Version: s.Version, API: wire.VersionAPIV1}, nil
}

// GetDoctor answers GET /v1/doctor.
func (s *server) GetDoctor(ctx context.Context, _ wire.GetDoctorRequestObject) (wire.GetDoctorResponseObject, error) {
	report := wire.DoctorReport{Checks: []wire.DoctorCheck{}}
	if s.Doctor != nil {
		report.Checks = append(report.Checks, s.Doctor(ctx)...)
	}
	return wire.GetDoctor200JSONResponse(report), nil
}

// RotateAudit answers POST /v1/audit/rotate.
func (s *server) RotateAudit(ctx context.Context, _ wire.RotateAuditRequestObject) (wire.RotateAuditResponseObject, error) {
	if s.Audit == nil {
		return nil, fmt.Errorf("%w: this daemon has no audit log", errdef.ErrUnsupported)
	}
	sealed, err := s.Audit.Rotate(ctx)
	return wire.RotateAudit200JSONResponse{File: sealed.File, First: int64(sealed.First), Last: int64(sealed.Last)}, err
}
