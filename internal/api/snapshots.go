package api

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

// maxPool is the largest pool.
const maxPool = 1000

// ListSnapshots answers GET /v1/snapshots.
func (s *server) ListSnapshots(ctx context.Context, r wire.ListSnapshotsRequestObject) (wire.ListSnapshotsResponseObject, error) {
	snaps, err := s.snapshots()
	if err != nil {
		return nil, err
	}
	snaps = s.visible(ctx, snaps)
	images, err := s.imageNames()
	if err != nil {
		return nil, err
	}
	known := newNames(images, snaps)
	by := snapshotOrder()
	snaps, next, err := by.cut(snaps, r.Params.Limit, r.Params.After)
	if err != nil {
		return nil, err
	}
	out := make([]wire.Snapshot, 0, len(snaps))
	for _, snap := range snaps {
		out = append(out, s.snapshotOf(snap, known))
	}
	return page[wire.Snapshot]{items: out, path: by.path, limit: r.Params.Limit, next: next}, nil
}

// snapshots lists each tag once: those of the store, and branches that the
// store does not know, or knows less of.
func (s *server) snapshots() ([]snapshot.Snapshot, error) {
	branches := s.Sandboxes.Branches() // first: what is ready by the next line is listed as that
	snaps, err := s.Snapshots.List()
	if err != nil {
		return nil, err
	}
	for _, b := range branches {
		i := slices.IndexFunc(snaps, func(snap snapshot.Snapshot) bool { return snap.Tag == b.Tag })
		switch {
		case i < 0:
			snaps = append(snaps, branchOf(b))
		case snaps[i].Status == snapshot.StatusWriting && b.Err == nil:
			snaps[i] = branchOf(b)
		}
	}
	slices.SortFunc(snaps, func(a, b snapshot.Snapshot) int { return strings.Compare(a.Tag, b.Tag) })
	return snaps, nil
}

// branchOf is the snapshot that a branch is to become.
func branchOf(b sandbox.BranchState) snapshot.Snapshot {
	snap := snapshot.Snapshot{
		Tag: b.Tag, Status: snapshot.StatusWriting,
		Facts: snapshot.Facts{CreatedAt: b.At, BranchedFrom: b.Sandbox, Owner: b.Owner, PauseMS: b.PauseMS},
	}
	if b.Err != nil {
		snap.Status, snap.Problem = snapshot.StatusFailed, b.Err.Error()
	}
	return snap
}

// notReady is err, which says that there is no such snapshot, or what is the
// matter with one that is not there yet.
func (s *server) notReady(tag string, err error) error {
	snaps, listErr := s.snapshots()
	if listErr != nil {
		return errors.Join(err, listErr)
	}
	for _, snap := range snaps {
		switch {
		case snap.Tag != tag:
		case snap.Status == snapshot.StatusWriting:
			return errdef.WithHint(fmt.Errorf("%w: snapshot `%s` is not bootable: status=Writing", errdef.ErrConflict, tag), "wait until it is ready")
		case snap.Status == snapshot.StatusFailed:
			return errdef.WithHint(fmt.Errorf("%w: snapshot `%s` is not bootable: status=Failed; %s", errdef.ErrConflict, tag, snap.Problem),
				"remove it, or use the tag again")
		}
	}
	return err
}

// CreateSnapshot answers POST /v1/snapshots.
func (s *server) CreateSnapshot(ctx context.Context, r wire.CreateSnapshotRequestObject) (wire.CreateSnapshotResponseObject, error) {
	if err := s.checkCreateSnapshot(*r.Body); err != nil {
		return nil, err
	}
	req := sandbox.SnapshotRequest{
		Tag: r.Body.Tag, Image: r.Body.Image, Warmup: r.Body.Warmup, Imports: r.Body.Imports, Replace: r.Body.Replace,
		Machine: vmm.Machine{MemoryMiB: r.Body.MemoryMiB, VCPUs: r.Body.VCPUs, DiskMiB: r.Body.DiskMiB, Net: r.Body.Net},
	}
	if r.Body.Net {
		allow, err := rulesOf(r.Body.NetAllow)
		if err != nil {
			return nil, err
		}
		req.Net = &sandbox.Net{Rules: egress.Rules{Allow: allow}}
	}
	create := func(ctx context.Context) (wire.Snapshot, error) {
		if err := s.ofRootfs(ctx, *r.Body, &req); err != nil {
			return wire.Snapshot{}, err
		}
		create := s.Sandboxes.CreateSnapshot
		if r.Body.Deterministic {
			create = func(ctx context.Context, req sandbox.SnapshotRequest) (snapshot.Snapshot, error) {
				return s.buildDeterministic(ctx, *r.Body, req)
			}
		}
		snap, err := create(ctx, req)
		if errors.Is(err, errdef.ErrExists) {
			return wire.Snapshot{}, withStatus(err, http.StatusBadRequest) // what forkd's clients expect
		} else if err != nil {
			return wire.Snapshot{}, err
		}
		out, err := s.describe(snap)
		out.Warning = notServed(*r.Body, out.Warning)
		return out, err
	}
	if wantsLines(ctx) {
		return lines{ctx, func(ctx context.Context) (any, error) { return create(ctx) }}, nil
	}
	snap, err := create(ctx)
	return wire.CreateSnapshot201JSONResponse(snap), err
}

func (s *server) checkCreateSnapshot(b wire.CreateSnapshotRequest) error {
	if err := snapshot.CheckTag(b.Tag); err != nil {
		return err
	}
	if err := checkRootfs(b); err != nil {
		return err
	}
	switch {
	case b.BootWaitSecs < 0 || b.BootWaitSecs > maxBootWait:
		return fmt.Errorf("%w: boot_wait_secs must be ≤ %d", errdef.ErrInvalid, maxBootWait)
	case b.Image == "" && b.Rootfs == "":
		return fmt.Errorf("%w: image is missing", errdef.ErrInvalid)
	case b.MemoryMiB < 0 || b.VCPUs < 0 || b.DiskMiB < 0:
		return fmt.Errorf("%w: memory_mib, vcpus and disk_mib must not be negative", errdef.ErrInvalid)
	case len(b.NetAllow) > 0 && !b.Net:
		return errdef.WithHint(fmt.Errorf("%w: net_allow is for snapshots with a network card", errdef.ErrInvalid), `add "net": true (--net)`)
	}
	if err := s.checkDeterministic(b); err != nil {
		return err
	}
	return s.checkFree(b)
}

// DeleteSnapshot answers DELETE /v1/snapshots/{tag}.
func (s *server) DeleteSnapshot(ctx context.Context, r wire.DeleteSnapshotRequestObject) (wire.DeleteSnapshotResponseObject, error) {
	if err := snapshot.CheckTag(r.Tag); err != nil {
		return nil, err
	}
	if r.Params.Cascade && r.Params.Force {
		return nil, fmt.Errorf("%w: force and cascade are mutually exclusive — choose one", errdef.ErrInvalid)
	}
	snap, err := s.Snapshots.Resolve(r.Tag)
	if errors.Is(err, errdef.ErrNotFound) {
		return wire.DeleteSnapshot204Response{}, s.forget(r.Tag, err)
	}
	if err != nil && !errors.Is(err, errdef.ErrUnavailable) { // what is damaged can be removed
		return nil, err
	}
	if !r.Params.Force {
		if err := s.clear(ctx, snap, r.Params.Cascade); err != nil {
			return nil, err
		}
	}
	return wire.DeleteSnapshot204Response{}, s.Snapshots.Remove(ctx, r.Tag)
}

// forget removes a branch that came to nothing.
func (s *server) forget(tag string, missing error) error {
	if s.Sandboxes.ForgetBranch(tag) {
		return nil
	}
	return s.notReady(tag, missing)
}

// clear removes what was made from a snapshot that is to be removed, the last
// first, or fails if there is anything.
func (s *server) clear(ctx context.Context, snap snapshot.Snapshot, cascade bool) error {
	if snap.Digest == "" { // too damaged to have anything made from it
		return nil
	}
	tags, err := s.Snapshots.Dependents(snap.Digest)
	if err != nil {
		return err
	}
	if !cascade && len(tags) > 0 {
		if again, listErr := s.hasOtherTag(snap); listErr != nil || again {
			return listErr // if it has, it loses a name and no more
		}
		return errdef.WithHint(fmt.Errorf("%w: snapshot `%s` is the parent of %d chained snapshot(s): [%s]; rerun with `?cascade=true` "+
			"to delete the whole subtree, or `?force=true` to remove its tag alone (the children keep working)",
			errdef.ErrConflict, snap.Tag, len(tags), strings.Join(tags, ", ")),
			"tine snapshot rm --cascade, or --force, "+snap.Tag)
	}
	for _, tag := range slices.Backward(tags) {
		if err := s.Snapshots.Remove(ctx, tag); err != nil {
			return err
		}
	}
	return nil
}

// hasOtherTag reports whether a snapshot has another tag than this.
func (s *server) hasOtherTag(snap snapshot.Snapshot) (bool, error) {
	all, err := s.Snapshots.List()
	return slices.ContainsFunc(all, func(other snapshot.Snapshot) bool {
		return other.Digest == snap.Digest && other.Tag != snap.Tag
	}), err
}

// GetSnapshotInfo answers GET /v1/snapshots/{tag}/info.
func (s *server) GetSnapshotInfo(ctx context.Context, r wire.GetSnapshotInfoRequestObject) (wire.GetSnapshotInfoResponseObject, error) {
	snap, err := s.Snapshots.Resolve(r.Tag)
	if errors.Is(err, errdef.ErrNotFound) {
		err = s.notReady(r.Tag, err)
	}
	if err != nil {
		return nil, err
	}
	known, err := s.names()
	if err != nil {
		return nil, err
	}
	m, snapOut := snap.Manifest, s.snapshotOf(snap, known)
	d := wire.SnapshotDetail{
		Tag: snap.Tag, Dir: snap.Dir(), Digest: snap.Digest, CreatedAtUnix: snapOut.CreatedAtUnix, CreatedAt: snapOut.CreatedAt,
		MemoryLogicalBytes: int64(m.Machine.MemoryMiB) << 20, MemoryPhysicalBytes: snapOut.MemoryPhysicalBytes, VmstateBytes: m.Device.Size,
		ParentContentHash: m.Parent, ParentTag: snapOut.ParentTag, Follows: snap.Follows, Auto: snap.Auto,
		BranchedFrom: snap.BranchedFrom, Mode: snap.Mode, PauseMS: snapOut.PauseMS, DiffMS: snap.DiffMS,
		DiffPhysicalBytes: snap.DiffPhysicalBytes, DiffLogicalBytes: snap.DiffLogicalBytes,
		Image: snapOut.Image, ImageDigest: m.Image, Engine: m.Engine, EngineVersion: m.EngineVersion, Host: hostOf(m.Host),
		MemoryMiB: m.Machine.MemoryMiB, DiskMiB: m.Machine.DiskMiB, Net: m.Machine.Net, VCPUs: m.Machine.VCPUs, Warmup: list(m.Warmup), Languages: list(m.Languages),
		BootMS: snap.BootMS, SnapshotMS: snap.SnapshotMS, Warning: snapOut.Warning,
		Sandboxes: s.sandboxesOf(ctx, snap), Pool: *snapOut.Pool,
		Deterministic: snapOut.Deterministic, ClockShift: snapOut.ClockShift, TwinOf: snapOut.TwinOf,
	}
	if err = s.relate(&d, snap, known.tags); err != nil {
		return nil, err
	}
	return wire.GetSnapshotInfo200JSONResponse(d), nil
}

func hostOf(h *vmm.Host) *wire.SnapshotHost {
	if h == nil {
		return nil
	}
	c := h.CPU
	cpu := wire.CPU{Vendor: c.Vendor, Family: c.Family, Model: c.Model, Stepping: c.Stepping, Name: c.Name, Flags: c.Flags}
	return &wire.SnapshotHost{CPU: cpu, Template: h.Template, Kernel: h.Kernel}
}

// relate adds what a snapshot has to do with others.
func (s *server) relate(d *wire.SnapshotDetail, snap snapshot.Snapshot, tags map[string]string) error {
	chain, err := s.Snapshots.Chain(snap)
	if err != nil {
		return err
	}
	dependents, err := s.Snapshots.Dependents(snap.Digest)
	if err != nil {
		return err
	}
	d.Dependents, d.Ancestors, d.ChainDepth = list(dependents), []string{}, len(chain)-1
	for _, a := range chain[:len(chain)-1] {
		d.Ancestors = append(d.Ancestors, cmp.Or(tags[a.Digest], a.Digest))
	}
	if path := s.memoryPath(snap); path == snap.FlatPath() {
		d.Flat = true
		if physical, sizeErr := allocated(path); sizeErr == nil { // else it is gone again
			d.FlatPhysicalBytes = physical
		}
	}
	return nil
}

func (s *server) sandboxesOf(ctx context.Context, snap snapshot.Snapshot) []string {
	ids := []string{}
	for _, b := range s.boxes(ctx) {
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
		report.Problems = append(report.Problems, wire.CheckProblem{Snapshot: p.Object, Problem: conceal(ctx, p.Text)})
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

// names are what a person calls images and snapshots, by their digests.
type names struct {
	images, tags map[string]string
	twins        map[string]string // the tags of snapshots, by those of their twins
}

func newNames(images map[string]string, snaps []snapshot.Snapshot) names {
	tags := tagsOf(snaps)
	return names{images: images, tags: tags, twins: twinsOf(tags)}
}

func (s *server) names() (names, error) {
	images, err := s.imageNames()
	if err != nil {
		return names{}, err
	}
	snaps, err := s.Snapshots.List()
	return newNames(images, snaps), err
}

// tagsOf are the tags of snapshots by their digests. Of several the first
// stands for all.
func tagsOf(snaps []snapshot.Snapshot) map[string]string {
	tags := make(map[string]string, len(snaps))
	for _, snap := range slices.Backward(snaps) {
		if snap.Digest != "" {
			tags[snap.Digest] = snap.Tag
		}
	}
	return tags
}

// describe is snapshotOf for one snapshot.
func (s *server) describe(snap snapshot.Snapshot) (wire.Snapshot, error) {
	known, err := s.names()
	return s.snapshotOf(snap, known), err
}

func (s *server) snapshotOf(snap snapshot.Snapshot, known names) wire.Snapshot {
	m, pool := snap.Manifest, s.poolOf(snap.Tag)
	out := wire.Snapshot{
		Tag: snap.Tag, Dir: snap.Dir(), CreatedAtUnix: max(snap.CreatedAt.Unix(), 0), CreatedAt: rfc3339(snap.CreatedAt), BranchedFrom: snap.BranchedFrom,
		Status: wire.SnapshotStatus(snap.Status), Bootable: snap.Status == snapshot.StatusReady && !m.Machine.Deterministic,
		Deterministic: m.Machine.Deterministic, ClockShift: m.Machine.ClockShift, TwinOf: known.twinOf(snap),
		Digest: snap.Digest, Image: known.images[m.Image], ImageDigest: m.Image, Engine: m.Engine,
		MemoryMiB: m.Machine.MemoryMiB, DiskMiB: m.Machine.DiskMiB, Net: m.Machine.Net, VCPUs: m.Machine.VCPUs, Pool: &pool, Warning: snap.Warning,
		PauseMS: cmp.Or(int64(math.Ceil(snap.PauseMS)), snap.SnapshotMS), Mode: snap.Mode, Auto: snap.Auto,
		DiffMS: snap.DiffMS, DiffPhysicalBytes: snap.DiffPhysicalBytes, DiffLogicalBytes: snap.DiffLogicalBytes,
		ParentDigest: m.Parent, ParentTag: known.tags[m.Parent], ChainDepth: snap.Depth,
	}
	if snap.Problem != "" {
		out.Warning = "snapshot is not bootable: " + snap.Problem
	}
	if snap.Status != snapshot.StatusReady { // it has no file of which anything is known
		return out
	}
	if physical, err := allocated(ownMemory(snap)); err == nil { // else it is being removed
		out.MemoryPhysicalBytes = physical
	}
	return out
}

// ownMemory is the file of a snapshot's own pages.
func ownMemory(snap snapshot.Snapshot) string {
	if snap.Manifest.Layered() {
		return snap.LayerPath()
	}
	return snap.MemoryPath()
}

// memoryPath is the file of a snapshot's whole memory, where there is one, or
// of its layer.
func (s *server) memoryPath(snap snapshot.Snapshot) string {
	if base, err := s.Snapshots.Base(snap); err == nil && base.Digest == snap.Digest { // else its layer is all there is
		return base.Path
	}
	return ownMemory(snap)
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
