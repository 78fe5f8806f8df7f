package client

import (
	"context"
	"net/http"

	"github.com/tinevm/tine/internal/wire"
)

// Named tokens. Who changes them needs scope admin, or the daemon's unix socket.
type (
	// Token is what is known of a named token.
	Token = wire.Token
	// CreateTokenRequest says what token to make.
	CreateTokenRequest = wire.CreateTokenRequest
	// CreatedToken is a new token, with the token itself.
	CreatedToken = wire.CreatedToken
)

// Tokens lists the named tokens, by name.
func (c *Client) Tokens(ctx context.Context) ([]Token, error) {
	return get[[]Token](ctx, c, "/v1/tokens", nil)
}

// CreateToken makes a named token. Nobody is ever told it again.
func (c *Client) CreateToken(ctx context.Context, req CreateTokenRequest) (CreatedToken, error) {
	return post[CreatedToken](ctx, c, "/v1/tokens", req)
}

// RemoveToken removes a named token.
func (c *Client) RemoveToken(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/tokens"+segments(name), nil, nil, nil)
}
