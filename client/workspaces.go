package client

import (
	"context"
	"net/http"

	"github.com/tinevm/tine/internal/wire"
)

// Workspaces.
type (
	// Workspace is a sandbox with a name.
	Workspace = wire.Workspace
	// CreateWorkspaceRequest says what workspace to make.
	CreateWorkspaceRequest = wire.CreateWorkspaceRequest
)

// Workspaces lists the workspaces, by name.
func (c *Client) Workspaces(ctx context.Context) ([]Workspace, error) {
	return get[[]Workspace](ctx, c, "/v1/workspaces", nil)
}

// Workspace describes a workspace.
func (c *Client) Workspace(ctx context.Context, name string) (Workspace, error) {
	return get[Workspace](ctx, c, workspace(name), nil)
}

// CreateWorkspace forks a sandbox that has a name.
func (c *Client) CreateWorkspace(ctx context.Context, req CreateWorkspaceRequest) (Workspace, error) {
	return post[Workspace](ctx, c, "/v1/workspaces", req)
}

// SuspendWorkspace suspends a workspace's sandbox.
func (c *Client) SuspendWorkspace(ctx context.Context, name string) (Workspace, error) {
	return post[Workspace](ctx, c, workspace(name, "suspend"), wire.SuspendWorkspaceRequest{})
}

// ResumeWorkspace resumes a workspace's sandbox.
func (c *Client) ResumeWorkspace(ctx context.Context, name string) (Workspace, error) {
	return post[Workspace](ctx, c, workspace(name, "resume"), nil)
}

// RemoveWorkspace removes a workspace and its sandbox.
func (c *Client) RemoveWorkspace(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, workspace(name), nil, nil, nil)
}

// workspace is the path of a workspace and what is under it.
func workspace(name string, more ...string) string {
	return "/v1/workspaces" + segments(append([]string{name}, more...)...)
}
