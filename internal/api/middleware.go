package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"path"
	"runtime/debug"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/api/forge"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
)

// recorder remembers the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int
	route  string // its pattern
	code   string // of its failure
	stream bool   // it lasts as long as its client wants it to
}

// WriteHeader notes the status and passes it on.
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write passes b on; the status is 200 if none was written before.
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController and WebSockets reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

type requestIDKey struct{}

func requestID(ctx context.Context) string {
	id, _ := ctx.Value(requestIDKey{}).(string)
	return id
}

// outermost names the request, logs it and survives a handler's panic.
func (s *server) outermost(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id := nameRequest(r)
		r = s.concealer.screen(r.WithContext(context.WithValue(r.Context(), requestIDKey{}, id)))
		w.Header().Set(requestIDHeader, id)
		s.limitBody(w, r)
		rec := &recorder{ResponseWriter: w}
		defer s.finish(rec, r, time.Now())
		next.ServeHTTP(rec, r)
	})
}

// finish is deferred: it logs the request, and answers where the handler has
// panicked.
func (s *server) finish(rec *recorder, r *http.Request, start time.Time) {
	ctx, id := r.Context(), requestID(r.Context())
	if p := recover(); p != nil {
		s.logger.ErrorContext(ctx, "handler panicked", slog.String("method", r.Method),
			slog.String("path", r.URL.Path), slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		answer(ctx, rec, errors.New("the daemon has a bug: see its log for request "+id))
	}
	took := time.Since(start)
	s.count(rec, r, took)
	s.logger.LogAttrs(ctx, slog.LevelDebug, "request", slog.String("method", r.Method), slog.String("path", r.URL.Path),
		about(r), slog.Int("status", rec.status), slog.Float64("took_ms", millis(took)))
}

// sameOrigin refuses what a browser sends here on behalf of somebody's page,
// also when the page's name has meanwhile come to mean this host: such a
// request names that host, while ours name an address or this machine.
func (s *server) sameOrigin(next http.Handler) http.Handler {
	guard := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Only who is trusted for where it is can be tricked into coming.
		ambient := auth.From(r.Context()).Ambient && r.TLS == nil && !isOpen(r)
		if ambient && !ownHost(r.Host) {
			s.fail(w, r, fmt.Errorf("%w: request for host %q", errdef.ErrDenied, r.Host))
			return
		}
		if err := guard.Check(r); err != nil {
			s.fail(w, r, fmt.Errorf("%w: request from another origin", errdef.ErrDenied))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// ownHost reports whether a Host header can only have meant this machine: an
// address, localhost, a name without a dot (as the client sends over a socket),
// or none.
func ownHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = hostport
	}
	host = strings.Trim(host, "[]")
	return net.ParseIP(host) != nil || !strings.Contains(host, ".")
}

// route hands r to mux, and answers in JSON where mux has no route for it.
func (s *server) route(mux *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		escaped := r.URL.EscapedPath()
		_, pattern := mux.Handler(r)
		next := http.Handler(mux)
		proxied := isProxied(escaped)
		if proxied {
			pattern, next = proxyPattern, http.HandlerFunc(s.proxy)
		}
		if pattern != "" && (proxied || path.Clean(escaped) == escaped) {
			if err := authorize(r.Context(), pattern); err != nil {
				s.fail(w, r, err)
				return
			}
			if err := s.own(r, pattern); err != nil {
				s.fail(w, r, err)
				return
			}
			noteRoute(w, pattern)
			s.checkBody(s.once(s.intended(next, pattern), pattern), pattern).ServeHTTP(w, r)
			return
		}
		probe := &probe{header: http.Header{}}
		mux.ServeHTTP(probe, r)
		if probe.status == http.StatusMethodNotAllowed {
			w.Header().Set("Allow", probe.header.Get("Allow"))
			s.fail(w, r, refuse("method_not_allowed", fmt.Sprintf("%s is not allowed on %s", r.Method, r.URL.Path)))
			return
		}
		s.fail(w, r, fmt.Errorf("%w: no route %s", errdef.ErrNotFound, r.URL.Path))
	})
}

// probe learns what a handler would say.
type probe struct {
	header http.Header
	status int
}

func (p *probe) Header() http.Header         { return p.header }
func (p *probe) Write(b []byte) (int, error) { return len(b), nil }
func (p *probe) WriteHeader(status int)      { p.status = status }

// checkBody bounds a body and, where it is JSON that is due, reads it and sees
// that it is. A request may always have an empty one: what is missing then is
// for its handler to say.
func (s *server) checkBody(next http.Handler, pattern string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if pattern == proxyPattern || strings.HasPrefix(pattern, "PUT ") && strings.HasSuffix(pattern, "/files") {
			r.Body = http.MaxBytesReader(w, s.patient(w, r.Body), s.maxFile)
			next.ServeHTTP(w, r)
			return
		}
		if pattern == forge.UploadPattern {
			r.Body = http.MaxBytesReader(w, s.patient(w, r.Body), forge.MaxUpload)
			next.ServeHTTP(w, r)
			return
		}
		if limit := largeLimit(pattern); limit > 0 {
			if err := s.serveLarge(next, w, r, limit); err != nil {
				s.fail(w, r, err)
			}
			return
		}
		body, err := s.readBody(w, r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if err := checkJSON(r.Header.Get("Content-Type"), body); err != nil {
			s.fail(w, r, err)
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

func checkJSON(contentType string, body []byte) error {
	if len(body) == 0 {
		return nil
	}
	if media, _, err := mime.ParseMediaType(contentType); err != nil || media != "application/json" {
		return refuse("unsupported_media_type", "the body's Content-Type must be application/json")
	}
	if !utf8.Valid(body) {
		return fmt.Errorf("%w: the body is not UTF-8", errdef.ErrInvalid)
	}
	if !json.Valid(body) { // which also bounds how deep it is
		return fmt.Errorf("%w: the body is not JSON", errdef.ErrInvalid)
	}
	return nil
}
