package api

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
)

const (
	// TokenLabel is the label of a sandbox that names the token it was made
	// with: what it has is counted by it.
	TokenLabel = "tine.token"
	// reservedLabels begins the labels that callers cannot set.
	reservedLabels = "tine."
)

// secretParameters are what people call a token that they put into a URL, where
// every proxy and every history keeps it.
const secretParameters = " token access_token auth_token bearer api_key apikey secret authorization "

// admit lets in who may come in, and notes who it is. What a request shows is
// looked at before anything else of it, its host and its origin too: whoever
// shows something is no browser that a page has sent here.
func (s *server) admit(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := checkQuery(r); err != nil {
			s.fail(w, r, err)
			return
		}
		if s.Auth == nil || isOpen(r) {
			next.ServeHTTP(w, r)
			return
		}
		id, err := s.Auth.Admit(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r.WithContext(auth.With(r.Context(), id)))
	})
}

// isOpen reports whether r is for the one route that is open to everybody, as
// it is written in the request.
func isOpen(r *http.Request) bool {
	escaped := r.URL.EscapedPath()
	return escaped == "/healthz" || escaped == "/healthz/"
}

func checkQuery(r *http.Request) error {
	for name := range r.URL.Query() {
		if !strings.Contains(secretParameters, " "+strings.ToLower(name)+" ") {
			continue
		}
		return errdef.WithHint(fmt.Errorf("%w: a token does not belong into the query, as %s", errdef.ErrInvalid, strings.ToLower(name)),
			"send Authorization: Bearer TOKEN, and replace a token that was sent so")
	}
	return nil
}

// authorize reports whether who makes the request may use the route.
func authorize(ctx context.Context, pattern string) error {
	id := auth.From(ctx)
	need := scopeOf(pattern)
	if id.Scope.Includes(need) {
		return nil
	}
	return errdef.WithHint(fmt.Errorf("%w: %s has scope %s, and this needs %s", errdef.ErrDenied, id.Name, id.Scope, need),
		"use a token with that scope: tine token create NAME --scope "+string(need))
}

// mayReplace sees that only an admin moves a tag that others fork from.
func mayReplace(ctx context.Context, b wire.BranchRequest) error {
	if id := auth.From(ctx); b.Replace && !id.Scope.Includes(auth.Admin) {
		return fmt.Errorf("%w: %s has scope %s, and replace needs %s", errdef.ErrDenied, id.Name, id.Scope, auth.Admin)
	}
	return nil
}

// scopeOf is what a route needs: admin, unless a rule says that less will do.
func scopeOf(pattern string) auth.Scope {
	method, route, _ := strings.Cut(pattern, " ")
	switch {
	case under(route, "/v1/runs"), under(route, "/v1/verify"), pattern == bundlePattern:
		return auth.Fork
	case under(route, "/v1/blocks") && strings.HasSuffix(route, "/run"): // and the trust level that the block asks for
		return auth.Fork
	case under(route, "/v1/sandbox"): // Forge's gateway: all of it is for guests
		return auth.Fork
	case under(route, "/v1/sandboxes"), under(route, "/v1/workspaces"):
		if method == http.MethodGet && !inGuest(route) {
			return auth.Read
		}
		return auth.Fork
	case method != http.MethodGet, under(route, "/v1/audit"), under(route, "/v1/tokens"):
		return auth.Admin
	case under(route, "/v1/diff"):
		return auth.Fork // it tells the names of files
	}
	return auth.Read
}

// under reports whether route is root or below it.
func under(route, root string) bool { return route == root || strings.HasPrefix(route, root+"/") }

// inGuest reports whether a sandbox's route shows what its guest holds: files,
// the command lines of processes, and what listens on its ports.
func inGuest(route string) bool {
	rest, _ := strings.CutPrefix(route, "/v1/sandboxes/{id}/")
	part, _, _ := strings.Cut(rest, "/")
	return part == "files" || part == "processes" || part == "exec" || part == "ports"
}

// Own returns boxes, where what is forked belongs to the token that asked for
// it: it has the token's name as a label, and a place within its bound. What a
// token of scope fork branches is for it alone to fork, unless they share. It
// is for all who fork on behalf of callers.
func Own(boxes Sandboxes, guard *auth.Guard, snaps Snapshots, share bool) Sandboxes {
	if guard == nil {
		return boxes
	}
	return &owned{boxes, guard, snaps, share}
}

type owned struct {
	Sandboxes
	guard *auth.Guard
	snaps Snapshots
	share bool
}

// Branch takes a snapshot for whoever ctx says is asking.
func (o *owned) Branch(ctx context.Context, id string, req sandbox.BranchRequest) (snapshot.Snapshot, error) {
	if isBounded(ctx, o.share) {
		req.Owner = auth.From(ctx).Name
	}
	return o.Sandboxes.Branch(ctx, id, req)
}

// Rollback rolls back to what whoever ctx says is asking may use.
func (o *owned) Rollback(ctx context.Context, id, node string) (sandbox.Info, error) {
	if err := mayUse(ctx, o.snaps, node, o.share); err != nil {
		return sandbox.Info{}, err
	}
	return o.Sandboxes.Rollback(ctx, id, node)
}

// Fork forks for whoever ctx says is asking.
func (o *owned) Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error) {
	if err := mayUse(ctx, o.snaps, req.Snapshot, o.share); err != nil {
		return nil, err
	}
	id := auth.From(ctx)
	if id.Ambient {
		return o.Sandboxes.Fork(ctx, req)
	}
	labels := map[string]string{TokenLabel: id.Name}
	for k, v := range req.Labels {
		if k != TokenLabel {
			labels[k] = v
		}
	}
	req.Labels = labels
	want, err := o.want(id, req)
	if err != nil {
		return nil, err
	}
	release, err := o.guard.Reserve(id, want, func() auth.Share { return shareOfToken(o.List(), id.Name, "") })
	if err != nil {
		return nil, err
	}
	defer release()
	return o.Sandboxes.Fork(ctx, req)
}

// want is the share that a fork takes of what id may have.
func (o *owned) want(id auth.Identity, req sandbox.ForkRequest) (auth.Share, error) {
	n := max(req.N, 1)
	if id.Max.MemoryMiB == 0 && id.Max.CPUMillis == 0 {
		return auth.Share{Sandboxes: n}, nil
	}
	snap, err := o.snaps.Resolve(req.Snapshot)
	if err != nil {
		return auth.Share{}, fmt.Errorf("fork %s: %w", req.Snapshot, err)
	}
	shape := snap.Manifest.Machine
	return shareOf(o.LimitsOf(req.Limits, shape), shape).Times(n), nil
}

// Limit limits a sandbox within what the token may have that it belongs to. Who
// has scope admin, and asks for another's, may exceed that.
func (o *owned) Limit(ctx context.Context, id string, asked vmm.Limits) (sandbox.Info, error) {
	box, err := o.Get(id)
	if err != nil {
		return sandbox.Info{}, err
	}
	who, owner := auth.From(ctx), box.Labels[TokenLabel]
	if who.Ambient || owner != who.Name && who.Scope.Includes(auth.Admin) {
		return o.Sandboxes.Limit(ctx, id, asked)
	}
	if owner != who.Name { // they share
		limit, _ := o.guard.Max(owner) // a token that is gone bounds nothing
		who = auth.Identity{Name: owner, Max: limit}
	}
	want := shareOf(o.LimitsOf(asked, box.Machine), box.Machine)
	want.Sandboxes = 0 // it is there
	release, err := o.guard.Reserve(who, want, func() auth.Share { return shareOfToken(o.List(), owner, id) })
	if err != nil {
		return sandbox.Info{}, err
	}
	defer release()
	return o.Sandboxes.Limit(ctx, id, asked)
}

// shareOf is what a sandbox counts as. Where the host does not limit it that is
// what its machine has.
func shareOf(l vmm.Limits, shape vmm.Machine) auth.Share {
	return auth.Share{Sandboxes: 1, MemoryMiB: cmp.Or(l.MemoryMiB, shape.MemoryMiB), CPUMillis: cmp.Or(l.CPUMillis, 1000*shape.VCPUs)}
}

// shareOfToken is what a token's sandboxes count as, the one of id except left
// out.
func shareOfToken(boxes []sandbox.Info, name, except string) (has auth.Share) {
	for _, box := range boxes {
		if box.Labels[TokenLabel] == name && box.ID != except {
			has = has.Plus(shareOf(box.Limits, box.Machine))
		}
	}
	return has
}

// checkLabels refuses labels that are ours.
func checkLabels(labels map[string]string) error {
	for k := range labels {
		if strings.HasPrefix(k, reservedLabels) {
			return fmt.Errorf("%w: label %q: names that begin with %s are reserved", errdef.ErrInvalid, k, reservedLabels)
		}
	}
	return nil
}
