package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
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
	release, err := o.guard.Reserve(id, max(req.N, 1), func() int { return o.count(id.Name) })
	if err != nil {
		return nil, err
	}
	defer release()
	return o.Sandboxes.Fork(ctx, req)
}

// count is how many sandboxes a token has.
func (o *owned) count(name string) int {
	n := 0
	for _, box := range o.List() {
		if box.Labels[TokenLabel] == name {
			n++
		}
	}
	return n
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
