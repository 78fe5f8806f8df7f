package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/wire"
)

// bounded reports whether who makes ctx's request sees and uses only what is its
// own: whoever has scope fork. An admin does everything anyway, and scope read
// is for watching all of it, and cannot use any.
func (s *server) bounded(ctx context.Context) bool { return isBounded(ctx, s.ShareSandboxes) }

func isBounded(ctx context.Context, share bool) bool {
	id := auth.From(ctx)
	return !share && !id.Ambient && id.Scope == auth.Fork
}

// seesSnapshot reports whether who makes ctx's request sees a snapshot.
func (s *server) seesSnapshot(ctx context.Context, snap snapshot.Snapshot) bool {
	return !s.bounded(ctx) || snap.Owner == "" || snap.Owner == auth.From(ctx).Name
}

// visible are those of snaps that who makes ctx's request sees.
func (s *server) visible(ctx context.Context, snaps []snapshot.Snapshot) []snapshot.Snapshot {
	return slices.DeleteFunc(snaps, func(snap snapshot.Snapshot) bool { return !s.seesSnapshot(ctx, snap) })
}

// mayUse refuses a snapshot that is another token's, with the answer of one that
// is not there. Whatever else is the matter with it is for others to say.
func mayUse(ctx context.Context, snaps Snapshots, ref string, share bool) error {
	if !isBounded(ctx, share) {
		return nil
	}
	owners, err := ownersOf(snaps, ref)
	if err != nil {
		return err
	}
	if len(owners) > 0 && !slices.Contains(owners, "") && !slices.Contains(owners, auth.From(ctx).Name) {
		return fmt.Errorf("snapshot %s: %w", ref, errdef.ErrNotFound)
	}
	return nil
}

// ownersOf are the owners of a snapshot, by the tags that it has: a digest says
// nothing of them.
func ownersOf(snaps Snapshots, ref string) ([]string, error) {
	if !strings.HasPrefix(ref, "sha256:") {
		snap, err := snaps.Resolve(ref)
		if err != nil {
			return nil, nil //nolint:nilerr // see mayUse
		}
		return []string{snap.Owner}, nil
	}
	all, err := snaps.List()
	var owners []string
	for _, snap := range all {
		if snap.Digest == ref {
			owners = append(owners, snap.Owner)
		}
	}
	return owners, err
}

// sees reports whether who makes ctx's request sees a sandbox.
func (s *server) sees(ctx context.Context, box sandbox.Info) bool {
	return !s.bounded(ctx) || box.Labels[TokenLabel] == auth.From(ctx).Name
}

// boxes are the sandboxes that who makes ctx's request sees.
func (s *server) boxes(ctx context.Context) []sandbox.Info {
	all := s.Sandboxes.List()
	if !s.bounded(ctx) {
		return all
	}
	return slices.DeleteFunc(slices.Clone(all), func(box sandbox.Info) bool { return !s.sees(ctx, box) })
}

// own refuses a route that is for somebody else's sandbox or workspace, with the
// answer of one that is not there.
func (s *server) own(r *http.Request, pattern string) error {
	if !s.bounded(r.Context()) {
		return nil
	}
	_, route, _ := strings.Cut(pattern, " ")
	name := objectIn(pattern, r.URL.EscapedPath())
	switch {
	case name == "":
		return nil
	case under(route, "/v1/sandboxes"), under(route, "/v1/sandbox"):
		return s.ownSandbox(r.Context(), name)
	case under(route, "/v1/snapshots"):
		return mayUse(r.Context(), s.Snapshots, name, s.ShareSandboxes)
	case under(route, "/v1/workspaces") && s.Workspaces != nil:
		w, err := s.Workspaces.Get(name)
		if err == nil && !s.sees(r.Context(), w.Sandbox) {
			err = fmt.Errorf("workspace %s %w", name, errdef.ErrNotFound)
		}
		return err
	}
	return nil
}

func (s *server) ownSandbox(ctx context.Context, id string) error {
	box, err := s.Sandboxes.Get(id)
	if err == nil && !s.sees(ctx, box) {
		err = fmt.Errorf("sandbox %s: %w", id, errdef.ErrNotFound)
	}
	return err
}

// ownNodes is ownSandbox for names that may be sandboxes', or snapshots'.
func (s *server) ownNodes(ctx context.Context, names ...string) error {
	if !s.bounded(ctx) {
		return nil
	}
	for _, name := range names {
		err := s.ownSandbox(ctx, name)
		if _, there := s.Sandboxes.Get(name); there != nil && errors.Is(there, errdef.ErrNotFound) {
			err = mayUse(ctx, s.Snapshots, name, s.ShareSandboxes) // it is no sandbox
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// seen remembers whose sandboxes are, for a client that follows events: of one
// that is gone nobody can be asked.
type seen struct {
	s   *server
	ctx context.Context // of the request
	ids map[string]bool
}

// newSeen knows what is there now.
func (s *server) newSeen(ctx context.Context) *seen {
	v := &seen{s: s, ctx: ctx, ids: map[string]bool{}}
	for _, box := range s.boxes(ctx) {
		v.ids[box.ID] = true
	}
	return v
}

// tells reports whether an event is for the client.
func (v *seen) tells(e sandbox.Event) bool {
	if e.Sandbox == "" || !v.s.bounded(v.ctx) {
		return true
	}
	if !v.ids[e.Sandbox] {
		box, err := v.s.Sandboxes.Get(e.Sandbox)
		if err != nil || !v.s.sees(v.ctx, box) {
			return false
		}
		v.ids[e.Sandbox] = true
	}
	if wire.EventType(e.Type) == wire.EventTypeRemoved {
		delete(v.ids, e.Sandbox)
	}
	return true
}
