package api

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// ListTokens answers GET /v1/tokens.
func (s *server) ListTokens(context.Context, wire.ListTokensRequestObject) (wire.ListTokensResponseObject, error) {
	records, err := s.Auth.List()
	if err != nil {
		return nil, err
	}
	out := make(wire.ListTokens200JSONResponse, 0, len(records))
	for _, r := range records {
		out = append(out, wire.Token{
			Name: r.Name, Scope: string(r.Scope), MaxSandboxes: r.MaxSandboxes, MaxMemoryMiB: r.MaxMemoryMiB, MaxCPUs: r.MaxCPUs, Sign: r.Sign, CreatedAt: r.CreatedAt,
		})
	}
	return out, nil
}

// CreateToken answers POST /v1/tokens. No key makes it idempotent: the answer is
// not to be remembered anywhere.
func (s *server) CreateToken(ctx context.Context, r wire.CreateTokenRequestObject) (wire.CreateTokenResponseObject, error) {
	if err := mayChangeTokens(ctx); err != nil {
		return nil, err
	}
	made, secret, err := s.Auth.Create(ctx, auth.Record{
		Name: r.Body.Name, Scope: auth.Scope(cmp.Or(r.Body.Scope, string(auth.Fork))),
		MaxSandboxes: r.Body.MaxSandboxes, MaxMemoryMiB: r.Body.MaxMemoryMiB, MaxCPUs: r.Body.MaxCPUs, Sign: r.Body.Sign,
	})
	if err != nil {
		return nil, err
	}
	audit.Made(ctx, made.Name)
	return wire.CreateToken201JSONResponse{
		Name: made.Name, Scope: string(made.Scope), MaxSandboxes: made.MaxSandboxes, MaxMemoryMiB: made.MaxMemoryMiB, MaxCPUs: made.MaxCPUs, Sign: made.Sign, CreatedAt: made.CreatedAt,
		Token: secret,
	}, nil
}

// DeleteToken answers DELETE /v1/tokens/{name}.
func (s *server) DeleteToken(ctx context.Context, r wire.DeleteTokenRequestObject) (wire.DeleteTokenResponseObject, error) {
	if err := mayChangeTokens(ctx); err != nil {
		return nil, err
	}
	return wire.DeleteToken204Response{}, s.Auth.Remove(ctx, r.Name)
}

// mayChangeTokens refuses whoever is let in for nothing, as everybody of this
// host is by a daemon without tokens: they would stay, and could keep others
// out. The user that the daemon belongs to could change the store anyway.
func mayChangeTokens(ctx context.Context) error {
	id := auth.From(ctx)
	if !id.Ambient || strings.HasPrefix(id.Name, "uid:") {
		return nil
	}
	return errdef.WithHint(fmt.Errorf("%w: tokens are made over the unix socket, or by who has one", errdef.ErrDenied),
		"tine token create, as the user that the daemon belongs to")
}
