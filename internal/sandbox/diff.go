package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
)

// Diff says how two nodes differ: snapshots, by tag or digest, or sandboxes as
// they are now. To look at the files of a snapshot it forks it. Both must be of
// one image and of one shape.
func (m *Manager) Diff(ctx context.Context, a, b string) (_ DiffResult, err error) {
	ctx, done, err := m.begin(ctx)
	if err != nil {
		return DiffResult{}, err
	}
	defer done()
	var sides [2]*side
	for i, ref := range []string{a, b} {
		progress.Report(ctx, "diff", "looking at "+ref)
		if sides[i], err = m.side(ctx, ref); err != nil {
			return DiffResult{}, fmt.Errorf("diff: %s: %w", ref, err)
		}
		defer func() { err = errors.Join(err, sides[i].close()) }()
	}
	if err = sides[0].comparable(sides[1]); err != nil {
		return DiffResult{}, fmt.Errorf("diff %s and %s: %w", a, b, err)
	}
	d := DiffResult{A: a, B: b, Files: []DiffEntry{}}
	if err = d.files(ctx, sides); err == nil {
		err = d.pages(ctx, sides)
	}
	if err != nil {
		return DiffResult{}, fmt.Errorf("diff %s and %s: %w", a, b, err)
	}
	return d, nil
}

// side is one of the two that Diff compares.
type side struct {
	origin  snapshot.Snapshot
	image   *guestmem.Image
	own     *guestmem.Copy // pages of a sandbox's own; nil for a snapshot
	private map[uint64]bool
	box     *box
	client  *guest.Client
	changes map[string]guest.Change
	u       undo.Stack
}

func (s *side) close() error { return s.u.Close() }

// side opens a sandbox or a snapshot.
func (m *Manager) side(ctx context.Context, ref string) (_ *side, err error) {
	s := &side{private: map[uint64]bool{}}
	defer func() { err = s.u.Run(err) }()
	if isID(ref) {
		err = s.ofSandbox(ctx, m, ref)
	} else {
		err = s.ofSnapshot(ctx, m, ref)
	}
	if err != nil {
		return nil, err
	}
	if s.client, err = s.box.session(ctx); err != nil {
		return nil, err
	}
	if s.image, err = m.Snapshots.Image(s.origin); err != nil {
		return nil, err
	}
	s.u.Add(s.image.Close)
	return s, nil
}

// ofSnapshot forks one, to be looked at by nobody else.
func (s *side) ofSnapshot(ctx context.Context, m *Manager, ref string) error {
	o, err := m.origin(ctx, ref)
	if err != nil {
		return err
	}
	s.u.Add(o.close)
	s.origin = o.snap
	if err = m.hold(1); err != nil {
		return err
	}
	leave, err := m.enter(ctx)
	if err != nil {
		m.drop()
		return err
	}
	defer leave()
	if s.box, err = m.bring(ctx, o, secrets{}); err != nil {
		return err
	}
	s.u.Add(func() error { return s.box.order(context.WithoutCancel(ctx), end) })
	return nil
}

// ofSandbox copies the memory of one at an instant.
func (s *side) ofSandbox(ctx context.Context, m *Manager, id string) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	unuse, err := b.use()
	if err != nil {
		return err
	}
	s.u.Add(func() error { unuse(); return nil })
	s.box = b
	if _, err = b.session(ctx); err != nil { // it may have to be resumed
		return err
	}
	release, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	if s.origin, _, err = m.origins(b, &s.u); err != nil {
		return err
	}
	return s.copy(ctx, b)
}

// origins finds and pins what a sandbox's machine was raised from.
func (m *Manager) origins(b *box, u *undo.Stack) (snap snapshot.Snapshot, digest string, err error) {
	b.mu.Lock()
	digest = b.record.Origin
	b.mu.Unlock()
	snap, pin, err := m.pin(digest)
	if err == nil {
		u.Add(pin.Close)
	}
	return snap, digest, err
}

func (s *side) copy(ctx context.Context, b *box) (err error) {
	vm := b.machine()
	if vm == nil {
		return context.Cause(b.ctx)
	}
	space, err := vm.Memory()
	if err != nil {
		return err
	}
	defer func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTime)
		defer cancel()
		err = errors.Join(err, vm.Resume(late))
	}()
	if err = vm.Pause(ctx); err != nil {
		return err
	}
	if s.own, err = space.Copy(ctx); err != nil {
		return err
	}
	s.u.Add(s.own.Close)
	return s.own.Private(func(first, count uint64) bool {
		for page := first; page < first+count; page++ {
			s.private[page] = true
		}
		return true
	})
}

func (s *side) comparable(other *side) error {
	a, b := s.origin.Manifest, other.origin.Manifest
	if a.Image != b.Image || a.Machine != b.Machine {
		return fmt.Errorf("%w: they are not of one image and shape", errdef.ErrInvalid)
	}
	return nil
}

// files compares what the two hold beyond their image.
func (d *DiffResult) files(ctx context.Context, sides [2]*side) error {
	var paths []string
	for _, s := range sides {
		s.changes = map[string]guest.Change{}
		truncated, err := s.client.Changes(ctx, func(c guest.Change) error {
			s.changes[c.Path] = c
			paths = append(paths, c.Path)
			return nil
		})
		if err != nil {
			return err
		}
		d.Truncated = d.Truncated || truncated
	}
	slices.Sort(paths)
	for _, path := range slices.Compact(paths) {
		e, differs, err := sides[0].entry(ctx, path, sides[1])
		if err != nil {
			return err
		}
		if differs {
			d.Files = append(d.Files, e)
		}
	}
	return nil
}

// entry compares one path that at least one of the two has changed.
func (s *side) entry(ctx context.Context, path string, other *side) (DiffEntry, bool, error) {
	before, err := s.at(ctx, path)
	if err != nil {
		return DiffEntry{}, false, err
	}
	after, err := other.at(ctx, path)
	if err != nil {
		return DiffEntry{}, false, err
	}
	e := DiffEntry{Path: path, Before: before.Size, After: after.Size}
	switch gone, there := before.Kind == guestproto.ChangeDeleted, after.Kind != guestproto.ChangeDeleted; {
	case gone && there:
		e.Change = "added"
	case !gone && !there:
		e.Change = "removed"
	case gone:
		return e, false, nil
	default:
		e.Change, e.What = "changed", before.differs(after)
		return e, e.What != "", nil
	}
	return e, true, nil
}

// state is what is at a path.
type state struct {
	guest.Change
	unchanged bool // it is the image's
}

// at says what a side has at a path that one of the two has changed.
func (s *side) at(ctx context.Context, path string) (state, error) {
	if c, ok := s.changes[path]; ok {
		return state{Change: c}, nil
	}
	e, err := s.client.Stat(ctx, path, "")
	if errors.Is(err, errdef.ErrNotFound) {
		return state{Change: guest.Change{Kind: guestproto.ChangeDeleted}}, nil
	}
	// The image's own: nobody has hashed it.
	return state{guest.Change{
		Kind: kindOf(e), Mode: e.Mode, UID: e.UID, GID: e.GID, Size: e.Size, Target: e.Target,
	}, true}, err
}

func kindOf(e guest.Entry) guestproto.ChangeKind {
	switch e.Type {
	case guestproto.TypeFile:
		return guestproto.ChangeFile
	case guestproto.TypeDirectory:
		return guestproto.ChangeDirectory
	case guestproto.TypeSymlink:
		return guestproto.ChangeSymlink
	}
	return guestproto.ChangeOther
}

// differs says in what two states differ, or "". A file that only one of the
// two has changed has other content, or was written again.
func (x state) differs(y state) string {
	files := x.Kind == guestproto.ChangeFile && y.Kind == guestproto.ChangeFile
	switch {
	case x.Kind != y.Kind:
		return "kind"
	case files && (x.Size != y.Size || x.unchanged || y.unchanged || !bytes.Equal(x.Hash, y.Hash)):
		return "content"
	case x.Target != y.Target:
		return "target"
	case x.Mode != y.Mode:
		return "mode"
	case x.UID != y.UID || x.GID != y.GID:
		return "owner"
	}
	return ""
}

// comparePages is how many pages are compared at once.
const comparePages = 256

// pages counts the pages of memory that differ.
func (d *DiffResult) pages(ctx context.Context, sides [2]*side) error {
	total := sides[0].image.Size() / guestmem.PageSize
	d.TotalPages = total
	bufs := [2][]byte{make([]byte, comparePages*guestmem.PageSize), make([]byte, comparePages*guestmem.PageSize)}
	for first := int64(0); first < total; first += comparePages {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		count := min(comparePages, total-first)
		for i, s := range sides {
			if err := s.read(bufs[i][:count*guestmem.PageSize], uint64(first)); err != nil {
				return err
			}
		}
		for page := range count {
			at := page * guestmem.PageSize
			if !bytes.Equal(bufs[0][at:at+guestmem.PageSize], bufs[1][at:at+guestmem.PageSize]) {
				d.Pages++
			}
		}
	}
	return nil
}

// read reads pages as the side has them.
func (s *side) read(p []byte, first uint64) error {
	if _, err := s.image.ReadAt(p, int64(first)*guestmem.PageSize); err != nil {
		return err
	}
	for i := range uint64(len(p) / guestmem.PageSize) {
		if !s.private[first+i] {
			continue
		}
		at := i * guestmem.PageSize
		if _, err := s.own.ReadAt(p[at:at+guestmem.PageSize], int64(first+i)*guestmem.PageSize); err != nil {
			return err
		}
	}
	return nil
}
