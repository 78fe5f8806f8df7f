package api

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/api/forge"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
)

const (
	// authFailure is the action of a request that was not let in.
	authFailure = "auth.failure"
	// maxFailures is how many of these a second get a line of their own: whoever
	// is not let in must not be able to fill the disk.
	maxFailures = 20
)

// audited starts the trail of each request, and writes how it ended: an act, or
// a request that was not let in, or with AuditReads any.
func (s *server) audited(next http.Handler) http.Handler {
	if s.Audit == nil {
		return next
	}
	var failures throttle
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, trail := s.Audit.WithTrail(r.Context(), audit.Record{
			RequestID: requestID(r.Context()), Remote: remoteOf(r), Method: r.Method, Path: r.URL.EscapedPath(), UA: r.UserAgent(),
		})
		start, over := time.Now(), false
		defer func() {
			status, code, route := statusIn(w, over)
			if code != "" {
				audit.Failed(ctx, code)
			}
			began, err := trail.End(ctx, status, time.Since(start))
			if !began {
				err = s.auditRest(ctx, trail, &failures, route, status, time.Since(start))
			}
			if err != nil {
				s.logger.ErrorContext(ctx, "outcome is not in the audit log", slog.Any("error", err))
			}
		}()
		next.ServeHTTP(w, r.WithContext(ctx))
		over = true
	})
}

// statusIn is what a request was answered with. Over says that its handler has
// returned, and not panicked.
func statusIn(w http.ResponseWriter, over bool) (status int, code, route string) {
	rec := recorderOf(w)
	switch {
	case !over:
		return http.StatusInternalServerError, "internal", ""
	case rec == nil:
		return http.StatusOK, "", ""
	}
	return cmp.Or(rec.status, http.StatusOK), rec.code, rec.route
}

// auditRest writes a line about a request that was no act, if it deserves one.
func (s *server) auditRest(ctx context.Context, trail *audit.Trail, failures *throttle, route string, status int, took time.Duration) error {
	r, _ := trail.Rest(status, took)
	r.Route = route
	switch {
	case status == http.StatusUnauthorized || status == http.StatusForbidden:
		more, ok := failures.pass(time.Now())
		if !ok {
			return nil
		}
		if r.Action = authFailure; more > 0 {
			r.Note = fmt.Sprintf("%d others before it have no line", more)
		}
	case s.AuditReads:
		r.Action, r.Object = actionOf(route), objectIn(route, r.Path)
	default:
		return nil
	}
	return s.Audit.Keep(ctx, r)
}

// throttle lets maxFailures pass in a second, and counts the others.
type throttle struct {
	mu     sync.Mutex
	second int64
	n      int
	more   int
}

// pass reports whether this one may pass, and how many before it might not.
func (t *throttle) pass(now time.Time) (more int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if second := now.Unix(); second != t.second {
		t.second, t.n = second, 0
	}
	if t.n++; t.n > maxFailures {
		t.more++
		return 0, false
	}
	more, t.more = t.more, 0
	return more, true
}

// known notes who makes the request, once that is known.
func (s *server) known(next http.Handler) http.Handler {
	if s.Audit == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(audit.WithActor(r.Context(), actorOf(auth.From(r.Context())))))
	})
}

func actorOf(id auth.Identity) string {
	if uid, isUser := strings.CutPrefix(id.Name, "uid:"); isUser && id.Ambient {
		return audit.User(uid)
	}
	if id.Ambient || strings.HasPrefix(id.Name, "cert:") {
		return id.Name
	}
	return audit.Token(id.Name)
}

// remoteOf is over what kind of connection a request came.
func remoteOf(r *http.Request) string {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	switch addr := addr.(type) {
	case nil:
		return ""
	case *net.TCPAddr:
		if addr.IP.IsLoopback() {
			return "loopback"
		}
		return "tcp"
	default:
		return addr.Network()
	}
}

// intended writes the intent of an act before next does it. It is behind all
// that may still refuse a request, and its body was read, unless that is a file.
func (s *server) intended(next http.Handler, pattern string) http.Handler {
	if s.Audit == nil || !isAct(pattern) {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		digest := ""
		var file *hashed
		if isFile(pattern) {
			file = &hashed{ReadCloser: r.Body, sum: sha256.New()}
			r.Body = file
		} else if pattern != proxyPattern { // a guest need not read all of that, or may take for ever
			body, err := wholeBody(r)
			if err != nil {
				s.fail(w, r, bodyError(err))
				return
			}
			if len(body) > 0 {
				digest = audit.Digest(body)
			}
		}
		if err := audit.Begin(r.Context(), actionOf(pattern), pattern, objectIn(pattern, r.URL.EscapedPath()), digest); err != nil {
			s.fail(w, r, err)
			return
		}
		next.ServeHTTP(w, r)
		if file != nil {
			audit.Content(r.Context(), file.digest())
		}
	})
}

// hashed is a file on its way to a guest.
type hashed struct {
	io.ReadCloser
	sum  hash.Hash
	over bool // all of it was read
}

// Read takes what it passes on into the digest.
func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.ReadCloser.Read(p)
	_, _ = h.sum.Write(p[:n]) // a hash takes all
	h.over = h.over || errors.Is(err, io.EOF)
	return n, err
}

// digest is that of the whole file, or "" where not all of it came.
func (h *hashed) digest() string {
	if !h.over {
		return ""
	}
	return "sha256:" + hex.EncodeToString(h.sum.Sum(nil))
}

// isFile reports whether a route's body is a file, which no memory holds.
func isFile(pattern string) bool {
	return pattern == "PUT /v1/sandboxes/{id}/files" || pattern == forge.UploadPattern
}

// isAct reports whether a route changes something, or shows or runs what is in
// a guest.
func isAct(pattern string) bool {
	switch pattern {
	case "POST /v1/sandboxes/{id}/ping":
		return false
	case "GET /v1/sandboxes/{id}/files", "GET /v1/sandboxes/{id}/exec/stream", "GET /v1/sandbox/{id}/download", bundlePattern, tunnelPattern:
		return true
	}
	return !strings.HasPrefix(pattern, "GET ") && !strings.HasPrefix(pattern, "HEAD ")
}

// actionOf names what a route does: a thing and a verb. They follow from the
// route, so that one which is new has a name too.
func actionOf(pattern string) string {
	switch pattern {
	case "GET /v1/sandboxes/{id}/exec/stream":
		return "sandbox.exec"
	case "GET /v1/sandboxes/{id}/files":
		return "sandbox.file.read"
	case "PUT /v1/sandboxes/{id}/files":
		return "sandbox.file.write"
	case "DELETE /v1/sandboxes/{id}/files":
		return "sandbox.file.delete"
	case proxyPattern:
		return "sandbox.port.ask"
	case tunnelPattern:
		return "sandbox.port.connect"
	case "POST /v1/sandboxes/{id}/ports":
		return "sandbox.port.publish"
	case "DELETE /v1/sandboxes/{id}/ports/{port}":
		return "sandbox.port.unpublish"
	case "PATCH /v1/sandboxes/{id}/limits":
		return "sandbox.limits.set"
	case "PATCH /v1/sandboxes/{id}/net":
		return "sandbox.net.change"
	case runPattern:
		return "run.create"
	case verifyPattern:
		return "record.verify"
	case bundlePattern:
		return "record.export"
	}
	method, route, _ := strings.Cut(pattern, " ")
	var words []string
	for part := range strings.SplitSeq(strings.TrimPrefix(route, "/v1"), "/") {
		if part != "" && !strings.HasPrefix(part, "{") {
			words = append(words, singular(part))
		}
	}
	if len(words) < 2 || method == http.MethodPut || method == http.MethodDelete {
		words = append(words, verbOf(method))
	}
	return strings.Join(words, ".")
}

func singular(word string) string {
	switch word {
	case "sandboxes":
		return "sandbox"
	case "processes":
		return "process"
	case "snapshots", "blocks", "audits", "images", "workspaces", "files", "tokens", "branches", "pools":
		return strings.TrimSuffix(strings.TrimSuffix(word, "s"), "branche")
	}
	return word
}

func verbOf(method string) string {
	switch method {
	case http.MethodPost:
		return "create"
	case http.MethodPut:
		return "set"
	case http.MethodDelete:
		return "delete"
	}
	return "get"
}

// objectIn is what a route's first wildcard stands for.
func objectIn(pattern, escapedPath string) string {
	_, route, _ := strings.Cut(pattern, " ")
	parts := strings.Split(escapedPath, "/")
	i := 0
	for part := range strings.SplitSeq(route, "/") {
		if strings.HasPrefix(part, "{") && i < len(parts) {
			if name, err := url.PathUnescape(parts[i]); err == nil {
				return name
			}
			return parts[i]
		}
		i++
	}
	return ""
}

// remember has what is made noted, whoever makes it.
func (s *server) remember() {
	if s.Audit != nil {
		s.Sandboxes = noting{s.Sandboxes}
	}
}

// noting notes what requests make.
type noting struct{ Sandboxes }

// Fork notes the sandboxes.
func (n noting) Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error) {
	forks, err := n.Sandboxes.Fork(ctx, req)
	for _, f := range forks {
		if f.Err == nil {
			audit.Made(ctx, f.Sandbox.ID)
		}
	}
	return forks, err
}

// CreateSnapshot notes the snapshot.
func (n noting) CreateSnapshot(ctx context.Context, req sandbox.SnapshotRequest) (snapshot.Snapshot, error) {
	return made(ctx)(n.Sandboxes.CreateSnapshot(ctx, req))
}

// Branch notes the branch.
func (n noting) Branch(ctx context.Context, id string, req sandbox.BranchRequest) (snapshot.Snapshot, error) {
	return made(ctx)(n.Sandboxes.Branch(ctx, id, req))
}

// Promote notes the snapshot.
func (n noting) Promote(ctx context.Context, from, tag string) (snapshot.Snapshot, error) {
	return made(ctx)(n.Sandboxes.Promote(ctx, from, tag))
}

func made(ctx context.Context) func(snapshot.Snapshot, error) (snapshot.Snapshot, error) {
	return func(snap snapshot.Snapshot, err error) (snapshot.Snapshot, error) {
		if err == nil {
			audit.Made(ctx, cmp.Or(snap.Tag, snap.Digest))
		}
		return snap, err
	}
}
