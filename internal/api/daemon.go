package api

import (
	"context"

	"github.com/tinevm/tine/internal/wire"
)

// GetHealth answers GET /healthz.
func (s *server) GetHealth(context.Context, wire.GetHealthRequestObject) (wire.GetHealthResponseObject, error) {
	return wire.GetHealth200JSONResponse{OK: true}, nil
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
