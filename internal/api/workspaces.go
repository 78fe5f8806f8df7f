package api

import (
	"context"
	"fmt"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

// idPrefix is how much of its sandbox's id a workspace's id has.
const idPrefix = 16

// workspaces is where they are, if this daemon has any.
func (s *server) workspaces() (Workspaces, error) {
	if s.Workspaces == nil {
		return nil, errdef.WithHint(fmt.Errorf("%w: this daemon ends with its command, and keeps no workspaces", errdef.ErrUnsupported), "run tine serve")
	}
	return s.Workspaces, nil
}

// ListWorkspaces answers GET /v1/workspaces.
func (s *server) ListWorkspaces(ctx context.Context, r wire.ListWorkspacesRequestObject) (wire.ListWorkspacesResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	all, err := store.List()
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(w workspace.Workspace) bool { return !s.sees(ctx, w.Sandbox) })
	by := workspaceOrder()
	all, next, err := by.cut(all, r.Params.Limit, r.Params.After)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Workspace, 0, len(all))
	for _, w := range all {
		out = append(out, s.workspaceOf(w))
	}
	return page[wire.Workspace]{items: out, path: by.path, limit: r.Params.Limit, next: next}, nil
}

// CreateWorkspace answers POST /v1/workspaces.
func (s *server) CreateWorkspace(ctx context.Context, r wire.CreateWorkspaceRequestObject) (wire.CreateWorkspaceResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	if err = workspace.CheckName(r.Body.Name); err != nil {
		return nil, err
	}
	if r.Body.SnapshotTag == "" {
		return nil, fmt.Errorf("%w: snapshot_tag is missing", errdef.ErrInvalid)
	}
	limits, err := limitFields{memoryMiB: or(r.Body.MemoryLimitMiB, 0)}.limits()
	if err != nil {
		return nil, err
	}
	if r.Body.PerChildNetns {
		if err = s.ownNetns(ctx, r.Body.SnapshotTag); err != nil {
			return nil, err
		}
	}
	w, err := store.Create(ctx, workspace.CreateRequest{Name: r.Body.Name, Snapshot: r.Body.SnapshotTag, MemoryLimitMiB: limits.MemoryMiB})
	if err != nil {
		return nil, err
	}
	return wire.CreateWorkspace201JSONResponse(s.workspaceOf(w)), nil
}

// GetWorkspace answers GET /v1/workspaces/{name}.
func (s *server) GetWorkspace(_ context.Context, r wire.GetWorkspaceRequestObject) (wire.GetWorkspaceResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	w, err := store.Get(r.Name)
	return wire.GetWorkspace200JSONResponse(s.workspaceOf(w)), err
}

// SuspendWorkspace answers POST /v1/workspaces/{name}/suspend.
func (s *server) SuspendWorkspace(ctx context.Context, r wire.SuspendWorkspaceRequestObject) (wire.SuspendWorkspaceResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	w, err := store.Suspend(ctx, r.Name)
	return wire.SuspendWorkspace200JSONResponse(s.workspaceOf(w)), err
}

// ResumeWorkspace answers POST /v1/workspaces/{name}/resume.
func (s *server) ResumeWorkspace(ctx context.Context, r wire.ResumeWorkspaceRequestObject) (wire.ResumeWorkspaceResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	w, err := store.Resume(ctx, r.Name)
	return wire.ResumeWorkspace200JSONResponse(s.workspaceOf(w)), err
}

// DeleteWorkspace answers DELETE /v1/workspaces/{name}.
func (s *server) DeleteWorkspace(ctx context.Context, r wire.DeleteWorkspaceRequestObject) (wire.DeleteWorkspaceResponseObject, error) {
	store, err := s.workspaces()
	if err != nil {
		return nil, err
	}
	return wire.DeleteWorkspace204Response{}, store.Delete(ctx, r.Name)
}

func (s *server) workspaceOf(w workspace.Workspace) wire.Workspace {
	out := wire.Workspace{
		ID: "ws-" + w.SandboxID[:min(idPrefix, len(w.SandboxID))], Name: w.Name, SourceSnapshotTag: w.Snapshot,
		Status: wire.WorkspaceStatus(w.Status), SandboxID: w.SandboxID, MemoryLimitMiB: int64(w.MemoryLimitMiB),
		CreatedAtUnix: max(w.CreatedAt.Unix(), 0), LastActiveUnix: max(w.Sandbox.LastActive.Unix(), w.CreatedAt.Unix(), 0),
		LastBranchMemoryPath: s.memoryOf(w.Sandbox),
	}
	switch w.Status {
	case workspace.Running:
		out.LiveSandboxID = w.SandboxID
	case workspace.Suspended:
		out.CurrentStateTag = "ws-" + w.Name + "-state"
	case workspace.Stale:
	}
	return out
}
