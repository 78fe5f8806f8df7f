package api

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/wire"
)

// GetTree answers GET /v1/tree.
func (s *server) GetTree(ctx context.Context, _ wire.GetTreeRequestObject) (wire.GetTreeResponseObject, error) {
	snaps, err := s.Snapshots.List()
	if err != nil {
		return nil, err
	}
	snaps = s.visible(ctx, snaps)
	t := tree{
		store: s.Snapshots, nodes: map[string]*wire.Node{}, made: map[string]time.Time{}, known: newNames(nil, snaps),
	}
	for _, snap := range snaps {
		if snap.Status == snapshot.StatusReady {
			t.add(snap)
		}
	}
	for _, snap := range snaps {
		if snap.Status == snapshot.StatusReady {
			t.link(snap)
		}
	}
	for _, box := range s.boxes(ctx) {
		head := cmp.Or(box.Head, box.SnapshotDigest)
		if t.has(head) {
			t.nodes[head].Sandboxes = append(t.nodes[head].Sandboxes, box.ID)
		}
	}
	return wire.GetTree200JSONResponse{Nodes: t.sorted()}, nil
}

// tree is nodes by their digests. It grows by what those lead to that has no
// tag.
type tree struct {
	store Snapshots
	nodes map[string]*wire.Node
	made  map[string]time.Time
	known names
}

// add makes a node of a snapshot, or gives a node another tag.
func (t *tree) add(snap snapshot.Snapshot) {
	n, ok := t.nodes[snap.Digest]
	if !ok {
		n = &wire.Node{
			Digest: snap.Digest, Tag: snap.Tag, Tags: []string{}, CreatedAtUnix: max(snap.CreatedAt.Unix(), 0),
			BranchedFrom: snap.BranchedFrom, Mode: snap.Mode, Warning: snap.Warning, Auto: snap.Auto, Sandboxes: []string{},
			ChainDepth: snap.Depth, Deterministic: snap.Manifest.Machine.Deterministic, TwinOf: t.known.twinOf(snap),
		}
		if use, err := snap.DiskUse(); err == nil { // else it is being removed
			n.DiskBytes = use
		}
		t.nodes[snap.Digest], t.made[snap.Digest] = n, snap.CreatedAt
	}
	if snap.Tag != "" {
		n.Tags = append(n.Tags, snap.Tag)
	}
	n.Auto = n.Auto && snap.Auto
}

// link finds what a node came after: what its sandbox was after, while that is
// there, or what its memory stands on.
func (t *tree) link(snap snapshot.Snapshot) {
	n := t.nodes[snap.Digest]
	if n.Parent != "" {
		return
	}
	for _, digest := range []string{snap.Follows, snap.Manifest.Parent} {
		if digest != snap.Digest && t.has(digest) {
			n.Parent = digest
			return
		}
	}
}

// has reports whether there is such a node. One that has no tag is looked for.
func (t *tree) has(digest string) bool {
	if _, ok := t.nodes[digest]; ok || digest == "" {
		return ok
	}
	snap, err := t.store.Resolve(digest)
	if err != nil {
		return false // removed, or too damaged to be anything's parent
	}
	t.add(snap)
	t.link(snap)
	return true
}

// sorted returns the nodes, oldest first. What has no tag has no date either,
// and is older than what stands on it.
func (t *tree) sorted() []wire.Node {
	out := make([]wire.Node, 0, len(t.nodes))
	for _, n := range t.nodes {
		out = append(out, *n)
	}
	slices.SortFunc(out, func(a, b wire.Node) int {
		return cmp.Or(t.made[a.Digest].Compare(t.made[b.Digest]), cmp.Compare(a.ChainDepth, b.ChainDepth), cmp.Compare(a.Digest, b.Digest))
	})
	return out
}

// GetDiff answers GET /v1/diff.
func (s *server) GetDiff(ctx context.Context, r wire.GetDiffRequestObject) (wire.GetDiffResponseObject, error) {
	if r.Params.A == "" || r.Params.B == "" {
		return nil, fmt.Errorf("%w: a and b must name two nodes", errdef.ErrInvalid)
	}
	if err := s.ownNodes(ctx, r.Params.A, r.Params.B); err != nil {
		return nil, err
	}
	d, err := s.Sandboxes.Diff(ctx, r.Params.A, r.Params.B)
	if err != nil {
		return nil, err
	}
	out := wire.GetDiff200JSONResponse{
		A: d.A, B: d.B, Files: make([]wire.DiffEntry, 0, len(d.Files)), Truncated: d.Truncated, Pages: d.Pages, TotalPages: d.TotalPages,
	}
	for _, f := range d.Files {
		out.Files = append(out.Files, wire.DiffEntry{
			Path: f.Path, Change: wire.DiffEntryChange(f.Change), What: f.What, Before: f.Before, After: f.After,
		})
	}
	return out, nil
}
