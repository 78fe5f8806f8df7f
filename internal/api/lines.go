package api

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/wire"
)

const (
	ndjson = "application/x-ndjson"
	// lineTimeout is how long a client may take to accept a line of progress.
	lineTimeout = 10 * time.Second
)

type (
	wantsLinesKey  struct{}
	wantsEventsKey struct{}
)

// noteAccept leaves for handlers, which do not see the request's headers,
// whether its client wants lines of progress.
func noteAccept(next wire.StrictHandlerFunc, _ string) wire.StrictHandlerFunc {
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, request any) (any, error) {
		if strings.Contains(r.Header.Get("Accept"), ndjson) {
			ctx = context.WithValue(ctx, wantsLinesKey{}, true)
		}
		if strings.Contains(r.Header.Get("Accept"), eventStream) {
			ctx = context.WithValue(ctx, wantsEventsKey{}, true)
		}
		return next(ctx, w, r, request)
	}
}

func wantsEvents(ctx context.Context) bool {
	wants, _ := ctx.Value(wantsEventsKey{}).(bool)
	return wants
}

func wantsLines(ctx context.Context) bool {
	wants, _ := ctx.Value(wantsLinesKey{}).(bool)
	return wants
}

// lines is an answer that does its work while it is written, a line for each
// piece of news and the last for the outcome. Work that fails before it had
// any news answers like any other failure.
type lines struct {
	ctx  context.Context
	work func(context.Context) (any, error)
}

// VisitBuildImageResponse makes lines an answer to buildImage.
func (l lines) VisitBuildImageResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitCreateSnapshotResponse makes lines an answer to createSnapshot.
func (l lines) VisitCreateSnapshotResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitCheckSnapshotsResponse makes lines an answer to checkSnapshots.
func (l lines) VisitCheckSnapshotsResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitBranchSandboxResponse makes lines an answer to branchSandbox.
func (l lines) VisitBranchSandboxResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitCompactSnapshotResponse makes lines an answer to compactSnapshot.
func (l lines) VisitCompactSnapshotResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitFlattenSnapshotResponse makes lines an answer to flattenSnapshot.
func (l lines) VisitFlattenSnapshotResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitPromoteSnapshotResponse makes lines an answer to promoteSnapshot.
func (l lines) VisitPromoteSnapshotResponse(w http.ResponseWriter) error { return l.visit(w) }

// VisitVerifySnapshotResponse makes lines an answer to verifySnapshot.
func (l lines) VisitVerifySnapshotResponse(w http.ResponseWriter) error { return l.visit(w) }

func (l lines) visit(w http.ResponseWriter) error {
	return writeLines(l.ctx, w, func(ctx context.Context, _ *lineWriter) (any, error) { return l.work(ctx) })
}

// writeLines is what lines do. Work may write lines of its own, and must not
// when it has returned.
func writeLines(ctx context.Context, w http.ResponseWriter, work func(context.Context, *lineWriter) (any, error)) error {
	out := &lineWriter{w: w, flush: http.NewResponseController(w), patience: lineTimeout}
	result, err := work(progress.With(ctx, out.report), out)
	if err != nil && !out.begun() {
		return err
	}
	if err != nil {
		_, body := answerTo(ctx, err)
		noteFailure(w, body.Code)
		return out.write(wire.ProgressLine{Error: body.Error, Code: body.Code, Hint: body.Hint})
	}
	data, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return out.write(wire.ProgressLine{Result: data})
}

// lineWriter writes one JSON value a line, each flushed. It is safe for
// concurrent use; after a write has failed it writes no more.
type lineWriter struct {
	w        http.ResponseWriter
	flush    *http.ResponseController
	patience time.Duration // how long a client may take to accept a line

	mu  sync.Mutex
	any bool
	err error
}

func (l *lineWriter) begun() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.any
}

func (l *lineWriter) report(e progress.Event) {
	_ = l.write(wire.ProgressLine{Progress: &wire.ProgressEvent{
		Step: e.Step, Message: e.Message, Done: e.Done, Total: e.Total,
	}}) // kept in l.err, and returned by the last line's write
}

func (l *lineWriter) write(line wire.ProgressLine) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return l.err
	}
	if !l.any {
		l.any = true
		l.w.Header().Set("Content-Type", ndjson)
	}
	// A writer without deadlines is a test's: it does not stall.
	_ = l.flush.SetWriteDeadline(time.Now().Add(l.patience))
	defer func() { _ = l.flush.SetWriteDeadline(time.Time{}) }()
	if l.err = json.NewEncoder(l.w).Encode(line); l.err == nil {
		l.err = l.flush.Flush()
	}
	return l.err
}
