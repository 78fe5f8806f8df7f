package api

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net/http"
	"strings"
	"time"
)

const (
	requestIDHeader = "X-Request-Id"
	// maxRequestID bounds an id that a caller chose.
	maxRequestID = 64
)

// nameRequest is the id that r's caller chose, if it is a good one, or one that
// is made up.
func nameRequest(r *http.Request) string {
	if id := r.Header.Get(requestIDHeader); goodRequestID(id) {
		return id
	}
	return rand.Text()[:16]
}

// goodRequestID reports whether an id can stand in a log and a header.
func goodRequestID(id string) bool {
	const good = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	return id != "" && len(id) <= maxRequestID && strings.Trim(id, good) == ""
}

// WithRequestIDs returns a handler that adds the id of the request to whatever
// is logged with its context, wherever that happens.
func WithRequestIDs(next slog.Handler) slog.Handler {
	if _, ok := next.(requestIDs); ok {
		return next
	}
	return requestIDs{next}
}

type requestIDs struct{ slog.Handler }

// Handle adds the id, if there is one.
func (h requestIDs) Handle(ctx context.Context, record slog.Record) error {
	if id := requestID(ctx); id != "" {
		record = record.Clone()
		record.AddAttrs(slog.String("request_id", id))
	}
	return h.Handler.Handle(ctx, record)
}

// WithAttrs keeps adding it.
func (h requestIDs) WithAttrs(attrs []slog.Attr) slog.Handler {
	return requestIDs{h.Handler.WithAttrs(attrs)}
}

// WithGroup keeps adding it.
func (h requestIDs) WithGroup(name string) slog.Handler {
	return requestIDs{h.Handler.WithGroup(name)}
}

// about names the sandbox that a request is about, if there is one.
func about(r *http.Request) slog.Attr {
	if id := sandboxIn(r.URL.Path); id != "" {
		return slog.String("sandbox", id)
	}
	return slog.Attr{} // which handlers leave out
}

// sandboxIn is the id of the sandbox that a request is about, or "".
func sandboxIn(path string) string {
	rest, ok := strings.CutPrefix(path, "/v1/sandboxes/")
	if !ok {
		return ""
	}
	id, _, _ := strings.Cut(rest, "/")
	return id[:min(len(id), maxRequestID)]
}

// rfc3339 is t for a reader, or "" where it is not known.
func rfc3339(t time.Time) string {
	if t.IsZero() || t.Unix() < 0 {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z07:00")
}
