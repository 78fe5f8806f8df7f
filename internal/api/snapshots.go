package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

// maxPool is the largest pool.
const maxPool = 1000

// ListSnapshots answers GET /v1/snapshots.
func (s *server) ListSnapshots(context.Context, wire.ListSnapshotsRequestObject) (wire.ListSnapshotsResponseObject, error) {
	snaps, err := s.Snapshots.List()
	if err != nil {
		return nil, err
	}
	names, err := s.imageNames()
	if err != nil {
		return nil, err
	}
	out := make(wire.ListSnapshots200JSONResponse, 0, len(snaps))
	for _, snap := range snaps {
		out = append(out, s.snapshotOf(snap, names))
	}
	return out, nil
}

// CreateSnapshot answers POST /v1/snapshots.
func (s *server) CreateSnapshot(ctx context.Context, r wire.CreateSnapshotRequestObject) (wire.CreateSnapshotResponseObject, error) {
	if err := checkCreateSnapshot(*r.Body); err != nil {
		return nil, err
	}
	req := sandbox.SnapshotRequest{
		Tag: r.Body.Tag, Image: r.Body.Image, Warmup: r.Body.Warmup, Imports: r.Body.Imports, Replace: r.Body.Replace,
		Machine: vmm.Machine{MemoryMiB: r.Body.MemoryMiB, VCPUs: r.Body.VCPUs},
	}
	create := func(ctx context.Context) (wire.Snapshot, error) {
		snap, err := s.Sandboxes.CreateSnapshot(ctx, req)
		if errors.Is(err, errdef.ErrExists) {
			return wire.Snapshot{}, withStatus(err, http.StatusBadRequest) // what forkd's clients expect
		} else if err != nil {
			return wire.Snapshot{}, err
		}
		names, err := s.imageNames()
		return s.snapshotOf(snap, names), err
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return create(ctx) }}, nil
	}
	snap, err := create(ctx)
	return wire.CreateSnapshot201JSONResponse(snap), err
}

func checkCreateSnapshot(b wire.CreateSnapshotRequest) error {
	if err := snapshot.CheckTag(b.Tag); err != nil {
		return err
	}
	switch {
	case b.Kernel != "" || b.Rootfs != "":
		return errdef.WithHint(fmt.Errorf("%w: kernel and rootfs are not served yet", errdef.ErrInvalid),
			"build an image with POST /v1/images and name it in `image`")
	case b.Image == "":
		return fmt.Errorf("%w: image is missing", errdef.ErrInvalid)
	case b.MemoryMiB < 0 || b.VCPUs < 0:
		return fmt.Errorf("%w: memory_mib and vcpus must not be negative", errdef.ErrInvalid)
	}
	return nil
}

// DeleteSnapshot answers DELETE /v1/snapshots/{tag}.
func (s *server) DeleteSnapshot(ctx context.Context, r wire.DeleteSnapshotRequestObject) (wire.DeleteSnapshotResponseObject, error) {
	if err := snapshot.CheckTag(r.Tag); err != nil {
		return nil, err
	}
	if r.Params.Cascade && r.Params.Force {
		return nil, fmt.Errorf("%w: force and cascade are mutually exclusive", errdef.ErrInvalid)
	}
	snap, err := s.Snapshots.Resolve(r.Tag)
	if err != nil && !errors.Is(err, errdef.ErrUnavailable) { // what is damaged can be removed
		return nil, err
	}
	all, err := s.Snapshots.List()
	if err != nil {
		return nil, err
	}
	tags := dependents(snap.Digest, all)
	if len(tags) > 0 && !r.Params.Cascade && !r.Params.Force {
		return nil, errdef.WithHint(
			fmt.Errorf("%w: snapshot %s is the parent of %s", errdef.ErrConflict, r.Tag, strings.Join(tags, ", ")),
			"use cascade=true to remove those as well, or force=true to leave them")
	}
	if r.Params.Cascade {
		for _, tag := range slices.Backward(tags) {
			if err := s.Snapshots.Remove(ctx, tag); err != nil {
				return nil, err
			}
		}
	}
	return wire.DeleteSnapshot204Response{}, s.Snapshots.Remove(ctx, r.Tag)
}

// dependents are the tags of what was made from the snapshot, directly or not,
// each after the one it was made from.
func dependents(digest string, all []snapshot.Snapshot) []string {
	var tags []string
	seen := map[string]bool{"": true, digest: true}
	for queue := []string{digest}; len(queue) > 0; queue = queue[1:] {
		for _, s := range all {
			if s.Manifest.Parent != queue[0] || queue[0] == "" {
				continue
			}
			tags = append(tags, s.Tag)
			if !seen[s.Digest] {
				seen[s.Digest] = true
				queue = append(queue, s.Digest)
			}
		}
	}
	return tags
}

// ancestors are the tags, or digests, of what the snapshot was made from, the
// oldest first.
func ancestors(snap snapshot.Snapshot, all []snapshot.Snapshot) []string {
	byDigest := make(map[string]snapshot.Snapshot, len(all))
	for _, s := range all {
		byDigest[s.Digest] = s
	}
	names := []string{}
	for parent := snap.Manifest.Parent; parent != "" && len(names) <= len(all); parent = byDigest[parent].Manifest.Parent {
		name := byDigest[parent].Tag
		if name == "" {
			name = parent
		}
		names = append(names, name)
	}
	slices.Reverse(names)
	return names
}

// GetSnapshotInfo answers GET /v1/snapshots/{tag}/info.
func (s *server) GetSnapshotInfo(_ context.Context, r wire.GetSnapshotInfoRequestObject) (wire.GetSnapshotInfoResponseObject, error) {
	snap, err := s.Snapshots.Resolve(r.Tag)
	if err != nil {
		return nil, err
	}
	names, err := s.imageNames()
	if err != nil {
		return nil, err
	}
	all, err := s.Snapshots.List()
	if err != nil {
		return nil, err
	}
	physical, err := allocated(snap.MemoryPath())
	if err != nil {
		return nil, fmt.Errorf("measure snapshot %s: %w", r.Tag, err)
	}
	m, parents := snap.Manifest, ancestors(snap, all)
	d := wire.SnapshotDetail{
		Tag: snap.Tag, Dir: snap.Dir(), Digest: snap.Digest, CreatedAtUnix: snap.CreatedAt.Unix(),
		MemoryLogicalBytes: m.Memory.Size, MemoryPhysicalBytes: physical, VmstateBytes: m.Device.Size,
		ParentContentHash: m.Parent, ChainDepth: len(parents), Ancestors: parents, Dependents: list(dependents(snap.Digest, all)),
		Image: names[m.Image], ImageDigest: m.Image, Engine: m.Engine, EngineVersion: m.EngineVersion,
		MemoryMiB: m.Machine.MemoryMiB, VCPUs: m.Machine.VCPUs, Warmup: list(m.Warmup), Languages: list(m.Languages),
		BootMS: snap.BootMS, SnapshotMS: snap.SnapshotMS, Warning: snap.Warning,
		Sandboxes: s.sandboxesOf(snap), Pool: s.poolOf(r.Tag),
	}
	if len(parents) > 0 {
		d.ParentTag = parents[len(parents)-1]
	}
	return wire.GetSnapshotInfo200JSONResponse(d), nil
}

func (s *server) sandboxesOf(snap snapshot.Snapshot) []string {
	ids := []string{}
	for _, b := range s.Sandboxes.List() {
		if b.SnapshotDigest == snap.Digest {
			ids = append(ids, b.ID)
		}
	}
	return ids
}

// CollectSnapshots answers POST /v1/snapshots/gc.
func (s *server) CollectSnapshots(ctx context.Context, _ wire.CollectSnapshotsRequestObject) (wire.CollectSnapshotsResponseObject, error) {
	freed, err := s.Snapshots.GC(ctx, false)
	if err != nil {
		return nil, err
	}
	images, err := s.collectImages(ctx)
	return wire.CollectSnapshots200JSONResponse{
		Removed: list(slices.Concat(freed.Objects, freed.Leftovers)), FreedBytes: freed.Bytes + images,
	}, err
}

// CheckSnapshots answers POST /v1/snapshots/check.
func (s *server) CheckSnapshots(ctx context.Context, _ wire.CheckSnapshotsRequestObject) (wire.CheckSnapshotsResponseObject, error) {
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return s.check(ctx) }}, nil
	}
	report, err := s.check(ctx)
	return wire.CheckSnapshots200JSONResponse(report), err
}

func (s *server) check(ctx context.Context) (wire.CheckReport, error) {
	snaps, err := s.Snapshots.List()
	if err != nil {
		return wire.CheckReport{}, err
	}
	problems, err := s.Snapshots.Check(ctx)
	report := wire.CheckReport{OK: len(problems) == 0, Checked: len(snaps), Problems: []wire.CheckProblem{}}
	for _, p := range problems {
		report.Problems = append(report.Problems, wire.CheckProblem{Snapshot: p.Object, Problem: p.Text})
	}
	return report, err
}

// GetPool answers GET /v1/snapshots/{tag}/pool.
func (s *server) GetPool(_ context.Context, r wire.GetPoolRequestObject) (wire.GetPoolResponseObject, error) {
	_, err := s.Snapshots.Resolve(r.Tag)
	return wire.GetPool200JSONResponse(s.poolOf(r.Tag)), err
}

// SetPool answers PUT /v1/snapshots/{tag}/pool.
func (s *server) SetPool(ctx context.Context, r wire.SetPoolRequestObject) (wire.SetPoolResponseObject, error) {
	if r.Body.Size == nil || *r.Body.Size < 0 || *r.Body.Size > maxPool {
		return nil, fmt.Errorf("%w: size must be 0 to %d", errdef.ErrInvalid, maxPool)
	}
	err := s.Sandboxes.SetPool(ctx, r.Tag, *r.Body.Size)
	return wire.SetPool200JSONResponse(s.poolOf(r.Tag)), err
}

func (s *server) poolOf(ref string) wire.Pool {
	ready, want := s.Sandboxes.Pool(ref)
	return wire.Pool{Ready: ready, Size: want}
}

// imageNames are the names of images by their digests.
func (s *server) imageNames() (map[string]string, error) {
	images, err := s.Images.List()
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(images))
	for _, i := range images {
		names[i.Digest] = i.Name
	}
	return names, nil
}

func (s *server) snapshotOf(snap snapshot.Snapshot, names map[string]string) wire.Snapshot {
	m, pool := snap.Manifest, s.poolOf(snap.Tag)
	out := wire.Snapshot{
		Tag: snap.Tag, Dir: snap.Dir(), CreatedAtUnix: max(snap.CreatedAt.Unix(), 0), BranchedFrom: snap.BranchedFrom,
		Status: wire.SnapshotStatus(snap.Status), Bootable: snap.Status == snapshot.StatusReady,
		Digest: snap.Digest, Image: names[m.Image], ImageDigest: m.Image, Engine: m.Engine,
		MemoryMiB: m.Machine.MemoryMiB, VCPUs: m.Machine.VCPUs, PauseMS: snap.SnapshotMS, Pool: &pool,
	}
	out.Warning = snap.Warning
	if snap.Problem != "" {
		out.Warning = "snapshot is not bootable: " + snap.Problem
	}
	if physical, err := allocated(snap.MemoryPath()); err == nil { // else it is being written, or damaged
		out.MemoryPhysicalBytes = physical
	}
	return out
}

// allocated is what a file takes on disk.
func allocated(path string) (int64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512, nil
	}
	return info.Size(), nil
}
