package client

import (
	"context"
	"net/url"

	"github.com/tinevm/tine/internal/wire"
)

// The checkpoint tree.
type (
	// Tree is all snapshots, and how they came about.
	Tree = wire.Tree
	// Node is a snapshot in the tree.
	Node = wire.Node
	// Diff says in what two nodes differ.
	Diff = wire.Diff
	// PruneRequest says what to keep.
	PruneRequest = wire.PruneRequest
	// PruneReport says what was removed, or would be.
	PruneReport = wire.PruneReport
)

// How the memory of a branch is taken.
const (
	// ModeFull makes a snapshot that stands alone.
	ModeFull = string(wire.BranchRequestModeFull)
	// ModeDiff copies what has changed while the sandbox stands still.
	ModeDiff = string(wire.BranchRequestModeDiff)
	// ModeLive copies what has changed while the sandbox goes on.
	ModeLive = string(wire.BranchRequestModeLive)
)

// BranchRequest says how to branch a sandbox.
type BranchRequest struct {
	// Tag is the new snapshot's; one is made up where it is empty.
	Tag string
	// Mode is ModeFull where it is empty.
	Mode string
	// NoWait, of a live branch, returns as soon as the sandbox goes on. The
	// snapshot is listed as writing until it is ready.
	NoWait bool
	// Replace moves the tag if it exists.
	Replace bool
	// N forks so many sandboxes from it at once.
	N int
}

// Branch takes a snapshot of a sandbox as it is at this instant. report, which
// may be nil, is told how it goes. What was forked at once is in the result's
// Sandboxes.
func (c *Client) Branch(ctx context.Context, id string, req BranchRequest, report func(Progress)) (Snapshot, error) {
	w := wire.BranchRequest{Tag: req.Tag, Mode: wire.BranchRequestMode(req.Mode), Replace: req.Replace, N: req.N}
	if req.NoWait {
		wait := false
		w.Wait = &wait
	}
	return longCall[Snapshot](ctx, c, box(id, "branch"), w, report)
}

// Rollback puts a sandbox back to a node of its tree, by tag or digest.
func (c *Client) Rollback(ctx context.Context, id, node string) (Sandbox, error) {
	return post[Sandbox](ctx, c, box(id, "rollback"), wire.RollbackRequest{To: node})
}

// Suspend writes a sandbox's memory to disk and ends its machine. Whatever
// uses the sandbox resumes it.
func (c *Client) Suspend(ctx context.Context, id string) (Sandbox, error) {
	return post[Sandbox](ctx, c, box(id, "suspend"), nil)
}

// Resume lets a suspended sandbox run again.
func (c *Client) Resume(ctx context.Context, id string) (Sandbox, error) {
	return post[Sandbox](ctx, c, box(id, "resume"), nil)
}

// Tree lists all nodes, oldest first.
func (c *Client) Tree(ctx context.Context) (Tree, error) {
	return get[Tree](ctx, c, "/v1/tree", nil)
}

// Diff says in what two nodes differ, each a tag, a digest or a sandbox's id.
func (c *Client) Diff(ctx context.Context, a, b string) (Diff, error) {
	return get[Diff](ctx, c, "/v1/diff", url.Values{"a": {a}, "b": {b}})
}

// Promote points a tag at a node, by tag, digest or sandbox id, whatever it
// pointed at before.
func (c *Client) Promote(ctx context.Context, from, tag string, report func(Progress)) (Snapshot, error) {
	return longCall[Snapshot](ctx, c, "/v1/snapshots"+segments(tag, "promote"), wire.PromoteRequest{From: from}, report)
}

// Compact makes a snapshot that needs no other of one that does.
func (c *Client) Compact(ctx context.Context, tag, to string, report func(Progress)) (Snapshot, error) {
	return longCall[Snapshot](ctx, c, "/v1/snapshots"+segments(tag, "compact"), wire.CompactRequest{To: to}, report)
}

// Flatten keeps the whole memory of a snapshot of layers beside them.
func (c *Client) Flatten(ctx context.Context, tag string, report func(Progress)) (Snapshot, error) {
	return longCall[Snapshot](ctx, c, "/v1/snapshots"+segments(tag, "flatten"), nil, report)
}

// Prune removes old branches whose tags nobody chose: of every sandbox all but
// the newest keepLast.
func (c *Client) Prune(ctx context.Context, keepLast int, dryRun bool) (PruneReport, error) {
	return post[PruneReport](ctx, c, "/v1/snapshots/prune", PruneRequest{KeepLast: &keepLast, DryRun: dryRun})
}
