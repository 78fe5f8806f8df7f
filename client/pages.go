package client

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// SandboxPage lists at most limit sandboxes, oldest first, that come after what
// the page before said was next; "" begins. Next is "" on the last page.
func (c *Client) SandboxPage(ctx context.Context, limit int, after string) (boxes []Sandbox, next string, err error) {
	return getPage[Sandbox](ctx, c, "/v1/sandboxes", limit, after)
}

// SnapshotPage lists at most limit snapshots, as SandboxPage does.
func (c *Client) SnapshotPage(ctx context.Context, limit int, after string) (snaps []Snapshot, next string, err error) {
	return getPage[Snapshot](ctx, c, "/v1/snapshots", limit, after)
}

// ImagePage lists at most limit images, as SandboxPage does.
func (c *Client) ImagePage(ctx context.Context, limit int, after string) (images []Image, next string, err error) {
	return getPage[Image](ctx, c, "/v1/images", limit, after)
}

// WorkspacePage lists at most limit workspaces, as SandboxPage does.
func (c *Client) WorkspacePage(ctx context.Context, limit int, after string) (workspaces []Workspace, next string, err error) {
	return getPage[Workspace](ctx, c, "/v1/workspaces", limit, after)
}

func getPage[T any](ctx context.Context, c *Client, path string, limit int, after string) (items []T, next string, err error) {
	query := url.Values{"limit": {itoa(limit)}}
	if after != "" {
		query.Set("after", after)
	}
	resp, err := c.send(ctx, request{method: http.MethodGet, path: path, query: query})
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if err = json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&items); err != nil {
		return nil, "", fmt.Errorf("read the answer of GET %s: %w", path, err)
	}
	return items, resp.Header.Get("X-Next-After"), nil
}
