package api

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

// retryAfter is how many seconds a caller who met a limit is told to wait.
const retryAfter = 1

// statusOf is the one table from an error's code to an HTTP status.
func statusOf(code string) int {
	switch code {
	case "not_found":
		return http.StatusNotFound
	case "exists", "conflict":
		return http.StatusConflict
	case "invalid":
		return http.StatusBadRequest
	case "denied":
		return http.StatusForbidden
	case "exhausted":
		return http.StatusTooManyRequests
	case "unavailable":
		return http.StatusServiceUnavailable
	case "unsupported":
		return http.StatusNotImplemented
	case "timeout":
		return http.StatusGatewayTimeout
	case "method_not_allowed":
		return http.StatusMethodNotAllowed
	case "too_large":
		return http.StatusRequestEntityTooLarge
	case "unsupported_media_type":
		return http.StatusUnsupportedMediaType
	}
	return http.StatusInternalServerError
}

// refusal is an error that only HTTP knows: its code is in no category of
// errdef, or its status is not the one of its category.
type refusal struct {
	error
	code   string
	status int
}

func (r *refusal) Unwrap() error { return r.error }

// refuse makes a refusal with a code of HTTP's own.
func refuse(code, message string) error {
	return &refusal{error: errors.New(message), code: code, status: statusOf(code)}
}

// withStatus gives err, which may be nil, another status than its category's.
func withStatus(err error, status int) error {
	if err == nil {
		return nil
	}
	return &refusal{error: err, code: errdef.Code(err), status: status}
}

// answerFor is the status and the body that tell a client of err.
func answerFor(err error) (int, wire.Error) {
	body := wire.Error{Error: err.Error(), Code: errdef.Code(err), Hint: errdef.Hint(err)}
	if tooLarge, ok := errors.AsType[*http.MaxBytesError](err); ok {
		body.Code = "too_large"
		body.Error = "the body is larger than " + strconv.FormatInt(tooLarge.Limit, 10) + " bytes"
	}
	if who, ok := errors.AsType[*auth.Unauthenticated](err); ok {
		body.Error, body.Code = who.Error(), errdef.Code(who)
		return http.StatusUnauthorized, body
	}
	if r, ok := errors.AsType[*refusal](err); ok {
		body.Code = r.code
		return r.status, body
	}
	return statusOf(body.Code), body
}

// note logs err if it is internal. Handlers return their errors, so this is
// the only place where it is logged.
func (s *server) note(r *http.Request, err error) {
	if err == nil || r.Context().Err() != nil {
		return
	}
	if status, _ := answerFor(err); status != http.StatusInternalServerError {
		return
	}
	s.logger.LogAttrs(r.Context(), slog.LevelError, "request failed", about(r), slog.String("method", r.Method),
		slog.String("path", r.URL.Path), slog.Any("error", err))
}

// failRequest answers a request that could not be decoded.
func (s *server) failRequest(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, io.EOF) {
		err = errors.New("a JSON body is required")
	}
	s.fail(w, r, invalid(err))
}

// fail answers with err, and logs it if it is internal.
func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	s.note(r, err)
	answer(r.Context(), w, err)
}

// waitFor is how many seconds a caller who met err is told to wait.
func waitFor(err error) int {
	if limited, ok := errors.AsType[*auth.LimitedError](err); ok {
		return max(1, int(math.Ceil(limited.After.Seconds())))
	}
	return retryAfter
}

func answer(ctx context.Context, w http.ResponseWriter, err error) {
	status, body := answerTo(ctx, err)
	noteFailure(w, body.Code)
	if rec, ok := w.(*recorder); ok && rec.status != 0 {
		// The answer had begun: cut the connection, lest a part passes for the whole.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0)) // a hijacked one is cut already
		return
	}
	h := w.Header()
	body.RequestID = h.Get(requestIDHeader)
	h.Set("Content-Type", "application/json")
	h.Del("Content-Length")
	if status == http.StatusTooManyRequests {
		h.Set("Retry-After", strconv.Itoa(waitFor(err)))
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client went away: nobody is left to tell
}
