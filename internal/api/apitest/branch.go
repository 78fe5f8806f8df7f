package apitest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
)

// branching is a branch whose caller was let go: it waits for Settle.
type branching struct {
	state sandbox.BranchState
	box   string
	stage *snapshot.Stage
}

// Branch writes a small snapshot: a page that no other has, on what the
// sandbox is after.
func (b *Backend) Branch(ctx context.Context, id string, req sandbox.BranchRequest) (snapshot.Snapshot, error) {
	info, err := b.Get(id)
	if err = errors.Join(err, b.failure("branch")); err != nil {
		return snapshot.Snapshot{}, err
	}
	b.mu.Lock()
	b.branches++
	n := b.branches
	b.mu.Unlock()
	facts := snapshot.Facts{BranchedFrom: id, Owner: req.Owner, Mode: string(req.Mode), PauseMS: 1.5, Follows: info.Head}
	if req.Tag == "" {
		req.Tag, facts.Auto = fmt.Sprintf("branch-%s-%d", id, n), true
	}
	stage := b.store.Stage
	if req.Replace {
		stage = b.store.StageReplace
	}
	st, err := stage(ctx, req.Tag)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	b.ForgetBranch(req.Tag)
	progress.Report(ctx, "branch", "writing memory")
	if req.NoWait {
		state := sandbox.BranchState{Tag: req.Tag, Sandbox: id, Owner: req.Owner, PauseMS: facts.PauseMS, At: time.Now()}
		b.mu.Lock()
		b.pending[req.Tag] = &branching{state: state, box: id, stage: st}
		b.mu.Unlock()
		return snapshot.Snapshot{Tag: req.Tag, Status: snapshot.StatusWriting, Facts: facts}, nil
	}
	snap, err := b.write(ctx, st, info, facts, n)
	return snap, errors.Join(err, st.Abort())
}

func (b *Backend) write(ctx context.Context, st *snapshot.Stage, info sandbox.Info, facts snapshot.Facts, n int) (snapshot.Snapshot, error) {
	m := snapshot.Manifest{Engine: "fake", EngineVersion: "1", Machine: info.Machine, Image: imageDigest}
	page := make([]byte, guestmem.PageSize)
	copy(page, fmt.Sprintf("branch %d of %s", n, info.ID))
	err := os.WriteFile(st.DevicePath(), []byte("device"), 0o600)
	if sandbox.Mode(facts.Mode) == sandbox.Full {
		memory := make([]byte, m.Machine.MemoryMiB<<20)
		copy(memory, page)
		err = errors.Join(err, os.WriteFile(st.MemoryPath(), memory, 0o600))
	} else {
		m.Parent = info.Head
		facts.DiffMS, facts.DiffLogicalBytes, facts.DiffPhysicalBytes = 1, int64(len(page)), 2*int64(len(page))
		err = errors.Join(err, writeLayer(st.LayerPath(), page, int64(m.Machine.MemoryMiB)<<20))
	}
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	snap, err := st.Commit(ctx, m, facts)
	if err == nil {
		b.update(info.ID, func(i *sandbox.Info) { i.Head = snap.Digest; i.Branches++ })
	}
	return snap, err
}

func writeLayer(path string, page []byte, memory int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w, err := guestmem.NewWriter(f, memory)
	if err == nil {
		err = w.Write(0, page)
	}
	if err == nil {
		_, err = w.Close()
	}
	return errors.Join(err, f.Close())
}

// Settle ends a branch whose caller was let go: it fails with failure, or
// becomes a snapshot.
func (b *Backend) Settle(tag string, failure error) {
	b.tb.Helper()
	b.mu.Lock()
	p, n := b.pending[tag], b.branches
	b.mu.Unlock()
	if p == nil {
		b.tb.Fatalf("no branch %s", tag)
	}
	if failure == nil {
		info, err := b.Get(p.box)
		if err == nil {
			_, err = b.write(b.tb.Context(), p.stage, info, snapshot.Facts{BranchedFrom: p.box, Mode: "live", PauseMS: p.state.PauseMS, Follows: info.Head}, n)
		}
		if err != nil {
			b.tb.Fatal(err)
		}
	}
	if err := p.stage.Abort(); err != nil {
		b.tb.Fatal(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if p.state.Err = failure; failure == nil {
		delete(b.pending, tag)
	}
}

// Branches lists the branches that are being written, or have failed.
func (b *Backend) Branches() []sandbox.BranchState {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []sandbox.BranchState
	for _, p := range b.pending {
		out = append(out, p.state)
	}
	return out
}

// ForgetBranch forgets a branch that has failed.
func (b *Backend) ForgetBranch(tag string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.pending[tag]
	if p == nil || p.state.Err == nil {
		return false
	}
	delete(b.pending, tag)
	return true
}

// update changes what is known of a sandbox.
func (b *Backend) update(id string, change func(*sandbox.Info)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if x, ok := b.boxes[id]; ok {
		change(&x.info)
	}
}

// Rollback only notes where the sandbox is then.
func (b *Backend) Rollback(_ context.Context, id, node string) (sandbox.Info, error) {
	info, err := b.Get(id)
	if err = errors.Join(err, b.failure("rollback")); err != nil {
		return info, err
	}
	snap, err := b.store.Resolve(node)
	if err != nil {
		return info, err
	}
	b.update(id, func(i *sandbox.Info) { i.Head, i.State = snap.Digest, sandbox.Running })
	return b.Get(id)
}

// Suspend only notes that the sandbox is suspended.
func (b *Backend) Suspend(_ context.Context, id string) (sandbox.Info, error) {
	return b.turn(id, "suspend", sandbox.Suspended)
}

// Resume only notes that the sandbox runs.
func (b *Backend) Resume(_ context.Context, id string) (sandbox.Info, error) {
	return b.turn(id, "resume", sandbox.Running)
}

func (b *Backend) turn(id, op string, state sandbox.State) (sandbox.Info, error) {
	_, err := b.find(id)
	if err = errors.Join(err, b.failure(op)); err != nil {
		return sandbox.Info{}, err
	}
	b.update(id, func(i *sandbox.Info) {
		if i.State != sandbox.Dead {
			i.State = state
		}
	})
	return b.Get(id)
}

// Lose has a sandbox's machine end by itself.
func (b *Backend) Lose(id string) {
	b.update(id, func(i *sandbox.Info) { i.State, i.Reason = sandbox.Dead, "it was lost" })
}

// nodeOf is what a snapshot or a sandbox is in the tree.
func (b *Backend) nodeOf(ref string) (snapshot.Snapshot, error) {
	if info, err := b.Get(ref); err == nil {
		return b.store.Resolve(cmp.Or(info.Head, info.SnapshotDigest))
	}
	return b.store.Resolve(ref)
}

// Diff makes up how two nodes differ, if they do.
func (b *Backend) Diff(_ context.Context, from, to string) (sandbox.DiffResult, error) {
	d := sandbox.DiffResult{A: from, B: to, TotalPages: 256}
	x, err := b.nodeOf(from)
	y, yErr := b.nodeOf(to)
	if err = errors.Join(err, yErr, b.failure("diff")); err != nil || x.Digest == y.Digest {
		return d, err
	}
	d.Pages = 1
	d.Files = []sandbox.DiffEntry{
		{Path: "/srv/new", Change: "added", After: 5},
		{Path: "/srv/old", Change: "removed", Before: 7},
		{Path: "/srv/same", Change: "changed", What: "content", Before: 1, After: 2},
	}
	return d, nil
}

// Promote points a tag at a node.
func (b *Backend) Promote(ctx context.Context, from, tag string) (snapshot.Snapshot, error) {
	var snap snapshot.Snapshot
	_, err := b.Get(from)
	if err == nil {
		snap, err = b.Branch(ctx, from, sandbox.BranchRequest{Mode: sandbox.Live})
	} else if errors.Is(err, errdef.ErrNotFound) {
		snap, err = b.store.Resolve(from)
	}
	if err != nil {
		return snap, err
	}
	return b.store.Retag(ctx, tag, snap, true)
}
