package sandbox

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
)

// Branch makes a snapshot of a sandbox as it is at one instant. The sandbox
// runs on, with its connections; the branch has none. When Branch fails the
// sandbox runs on too, and there is nothing of the snapshot.
//
// It returns errdef.ErrExists for a tag that is taken, errdef.ErrConflict for
// one that is being written and for a sandbox that is dead, and
// errdef.ErrUnavailable when Limits.Branches are under way.
func (m *Manager) Branch(ctx context.Context, id string, req BranchRequest) (snapshot.Snapshot, error) {
	snap, err := m.branch(ctx, id, req)
	if err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("branch sandbox %s: %w", id, err)
	}
	return snap, nil
}

func (m *Manager) branch(ctx context.Context, id string, req BranchRequest) (_ snapshot.Snapshot, err error) {
	b, err := m.find(id)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	auto := req.Tag == ""
	if auto {
		req.Tag = madeUpTag(id)
	}
	if req.Mode = cmp.Or(req.Mode, Live); !slices.Contains([]Mode{Full, Diff, Live}, req.Mode) {
		return snapshot.Snapshot{}, fmt.Errorf("%w: mode %q: it is full, diff or live", errdef.ErrInvalid, req.Mode)
	}
	w := &branching{m: m, b: b, req: req, auto: auto}
	if err = w.begin(ctx); err != nil {
		return snapshot.Snapshot{}, err
	}
	if err = w.take(ctx); err != nil {
		return snapshot.Snapshot{}, errors.Join(err, w.end())
	}
	if !req.NoWait || w.c == nil {
		return w.finish(w.ctx)
	}
	early := snapshot.Snapshot{Tag: req.Tag, Status: snapshot.StatusWriting, Facts: w.c.facts}
	early.Mode, early.CreatedAt = string(w.c.mode), w.at
	m.setBranch(BranchState{Tag: req.Tag, Sandbox: id, Owner: req.Owner, PauseMS: early.PauseMS, At: w.at})
	go w.background() // begin has counted it among the calls that Close waits for
	return early, nil
}

// madeUpTag is a tag for a branch of the sandbox that nobody named.
func madeUpTag(id string) string {
	var b [2]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	return fmt.Sprintf("branch-%s-%d-%s", id, time.Now().Unix(), hex.EncodeToString(b[:]))
}

// branching is one branch from the claim of its tag to its end, which may come
// after its caller was let go.
type branching struct {
	m     *Manager
	b     *box
	req   BranchRequest
	auto  bool // its tag was made up
	at    time.Time
	ctx   context.Context // the caller's while there is one, and the Manager's
	done  func()
	stage *snapshot.Stage
	c     *capture          // nil when the sandbox is suspended
	held  snapshot.Snapshot // what it is suspended in
}

// begin takes a place among the branches and claims the tag.
func (w *branching) begin(ctx context.Context) (err error) {
	caller := ctx
	if w.req.NoWait {
		caller = context.WithoutCancel(ctx)
	}
	if w.ctx, w.done, err = w.m.begin(caller); err != nil {
		return err
	}
	select {
	case w.m.branchSlots <- struct{}{}:
	default:
		w.done()
		err = fmt.Errorf("%w: %d branches are under way, which is the limit", errdef.ErrUnavailable, cap(w.m.branchSlots))
		return errdef.WithHint(err, "try again shortly, or raise --branch-concurrency")
	}
	claim := w.m.Snapshots.Stage
	if w.req.Replace {
		claim = w.m.Snapshots.StageReplace
	}
	if w.stage, err = claim(w.ctx, w.req.Tag); err != nil {
		return errors.Join(err, w.end())
	}
	w.m.forget(w.req.Tag)
	w.at = time.Now()
	return nil
}

// end gives back what the branch holds.
func (w *branching) end() error {
	var errs []error
	if w.c != nil {
		errs = append(errs, w.c.close())
	}
	if w.stage != nil {
		errs = append(errs, w.stage.Abort())
	}
	<-w.m.branchSlots
	w.done()
	return errors.Join(errs...)
}

// take takes the instant. The sandbox's turn is needed for no longer than that.
func (w *branching) take(ctx context.Context) error {
	ctx, cancel := join(ctx, w.b.ctx)
	defer cancel()
	release, err := w.b.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if w.b.ctx.Err() != nil {
		return context.Cause(w.b.ctx)
	}
	b := w.b
	b.mu.Lock()
	vm, r := b.vm, b.record
	b.mu.Unlock()
	if r.State == Suspended {
		w.held, err = w.m.Snapshots.Held(b.id)
		return err
	}
	progress.Report(ctx, "branch", "preparing")
	w.c = w.m.newCapture(vm, w.stage, w.req.Mode)
	w.c.limits = r.Limits
	w.c.facts.BranchedFrom, w.c.facts.Auto, w.c.facts.Owner = b.id, w.auto, w.req.Owner
	if err = w.c.prepare(r.Origin, r.Head); err != nil {
		return err
	}
	if err = w.c.arm(ctx); err != nil {
		return err
	}
	b.quiesce(ctx)
	if err = w.c.instant(ctx); err != nil {
		return cause(vm, err)
	}
	if err = w.c.keepDisk(ctx); err != nil {
		return err
	}
	b.stepClock(ctx)
	progress.Report(ctx, "branch", fmt.Sprintf("the sandbox was paused for %.1f ms", w.c.facts.PauseMS))
	return nil
}

// tellTime bounds what a branch asks of the agent: one that takes longer is not
// waited for.
const tellTime = 100 * time.Millisecond

// tell asks something of the agent, for one who has the turn.
func (b *box) tell(ctx context.Context, what func(*guest.Client, context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, tellTime, errNoAnswer)
	defer cancel()
	c, err := b.talk(ctx)
	if err != nil {
		return err
	}
	return what(c, ctx)
}

// quiesce has the agent note which interpreters are at rest, which makes forks
// of the branch quicker. A guest that does not answer is branched as it is.
func (b *box) quiesce(ctx context.Context) {
	err := b.tell(ctx, (*guest.Client).Quiesce)
	if err != nil {
		b.m.Logger.DebugContext(ctx, "branched without the agent's help", "sandbox", b.id, "error", err)
	}
}

// stepClock makes up for the pause: the guest's clock stood still in it. A guest
// that does not answer is left behind.
func (b *box) stepClock(ctx context.Context) {
	err := b.tell(ctx, (*guest.Client).SetClock)
	if err != nil {
		b.m.Logger.DebugContext(ctx, "clock not stepped after a branch", "sandbox", b.id, "error", err)
	}
}

// finish writes the branch and commits it.
func (w *branching) finish(ctx context.Context) (snap snapshot.Snapshot, err error) {
	defer func() { w.tell(snap, err) }()
	defer func() { err = errors.Join(err, w.end()) }()
	if w.c == nil {
		return w.copyHeld(ctx)
	}
	progress.Report(ctx, "branch", "writing")
	if err = w.c.write(ctx); err != nil {
		return snapshot.Snapshot{}, err
	}
	if snap, err = w.stage.Commit(ctx, w.c.manifest(), w.c.facts); err != nil {
		return snapshot.Snapshot{}, err
	}
	w.b.branched(snap.Digest)
	if w.auto {
		w.m.prune(ctx)
	}
	return snap, nil
}

// prune removes the branches that are too many of those that nobody named.
func (m *Manager) prune(ctx context.Context) {
	if m.KeepBranches <= 0 {
		return
	}
	removed, _, err := m.Snapshots.Prune(ctx, snapshot.PrunePolicy{KeepLast: m.KeepBranches})
	if err != nil { // the branch is there; the next one prunes again
		m.Logger.WarnContext(ctx, "branches not pruned", "error", err)
	}
	for _, tag := range removed {
		m.Logger.InfoContext(ctx, "branch pruned", "snapshot", tag)
		m.Events.Add(SnapshotRemoved, "", EventData{Snapshot: tag})
	}
}

// copyHeld gives what the sandbox is suspended in the tag.
func (w *branching) copyHeld(ctx context.Context) (snapshot.Snapshot, error) {
	if err := w.stage.Abort(); err != nil { // Retag claims the tag anew
		return snapshot.Snapshot{}, err
	}
	w.held.Auto, w.held.BranchedFrom, w.held.Owner = w.auto, w.b.id, w.req.Owner
	snap, err := w.m.Snapshots.Retag(ctx, w.req.Tag, w.held, w.req.Replace)
	if err == nil {
		w.b.branched(snap.Digest)
	}
	return snap, err
}

// branched notes that the sandbox is after a new node of the tree now.
func (b *box) branched(digest string) {
	b.mu.Lock()
	b.record.Head = digest
	b.record.Branches++
	err := b.saveLocked()
	b.mu.Unlock()
	if err != nil { // the branch is there; only its place in the tree is not remembered
		b.m.Logger.Warn("branch not recorded", "sandbox", b.id, "snapshot", digest, "error", err)
	}
}

// background finishes a branch that nobody waits for.
func (w *branching) background() {
	tag := w.req.Tag
	_, err := w.finish(w.ctx)
	if err == nil {
		w.m.forget(tag)
		return
	}
	w.m.Logger.Warn("branch failed", "sandbox", w.b.id, "snapshot", tag, "error", err)
	w.m.setBranch(BranchState{Tag: tag, Sandbox: w.b.id, Owner: w.req.Owner, At: w.at, Err: err})
}

// maxFailures bounds how many failed branches are remembered.
const maxFailures = 256

func (m *Manager) setBranch(state BranchState) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.branches) >= maxFailures {
		for tag, old := range m.branches {
			if old.Err != nil {
				delete(m.branches, tag)
				break
			}
		}
	}
	m.branches[state.Tag] = state
}

func (m *Manager) forget(tag string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.branches, tag)
}

// Branches are those that are being written with nobody waiting for them, and
// those that failed so, until their tag is used again or they are forgotten.
func (m *Manager) Branches() []BranchState {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.SortedFunc(maps.Values(m.branches), func(a, b BranchState) int { return strings.Compare(a.Tag, b.Tag) })
}

// ForgetBranch forgets a branch that failed, and reports whether there was one.
func (m *Manager) ForgetBranch(tag string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	state, ok := m.branches[tag]
	if ok = ok && state.Err != nil; ok {
		delete(m.branches, tag)
	}
	return ok
}

// Promote points a tag at a snapshot, whatever it pointed at before, or at a
// sandbox as it is now.
func (m *Manager) Promote(ctx context.Context, from, tag string) (snapshot.Snapshot, error) {
	if isID(from) {
		return m.Branch(ctx, from, BranchRequest{Tag: tag, Replace: true})
	}
	ctx, done, err := m.begin(ctx)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer done()
	snap, pin, err := m.pin(from)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer func() { _ = pin.Close() }() // only read
	if err = m.Snapshots.Verify(ctx, snap); err != nil {
		return snapshot.Snapshot{}, err
	}
	return m.promoted(m.Snapshots.Retag(ctx, tag, snap, true))
}
