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
