package audit

import (
	"cmp"
	"context"
	"sync"
	"time"
)

// Trail is what the log is to say of one request. It is safe for concurrent
// use.
type Trail struct {
	log *Log

	mu    sync.Mutex
	rec   Record
	began bool
}

type trailKey struct{}

// WithTrail starts the trail of a request, with what is known of it when it
// arrives: RequestID, Remote, Method, Path, UA.
func (l *Log) WithTrail(ctx context.Context, rec Record) (context.Context, *Trail) {
	rec.Actor = Actor(ctx)
	t := &Trail{log: l, rec: rec}
	return context.WithValue(ctx, trailKey{}, t), t
}

func trailOf(ctx context.Context) *Trail {
	t, _ := ctx.Value(trailKey{}).(*Trail)
	return t
}

func (t *Trail) setActor(who string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rec.Actor = who
}

// Made notes the names of what the request of ctx has made.
func Made(ctx context.Context, objects ...string) {
	if t := trailOf(ctx); t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.rec.Made = append(t.rec.Made, objects...)
	}
}

// Failed notes the code of the error that the request of ctx is answered with.
func Failed(ctx context.Context, code string) {
	if t := trailOf(ctx); t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.rec.Code = code
	}
}

// Content notes the digest of what the request of ctx has sent, when that is
// only known at its end.
func Content(ctx context.Context, digest string) {
	if t := trailOf(ctx); t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.rec.Digest = digest
	}
}

// Begin writes the intent of the request of ctx. An error means that the act
// must not happen. Without a log it does nothing.
func Begin(ctx context.Context, action, route, object, digest string) error {
	t := trailOf(ctx)
	if t == nil {
		return nil
	}
	t.mu.Lock()
	t.rec.Action, t.rec.Route, t.rec.Object, t.rec.Digest = action, route, object, digest
	t.rec.Actor = Actor(ctx)
	intent := t.intentLocked()
	t.mu.Unlock()
	seq, err := t.log.Append(ctx, intent)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rec.Intent, t.began = seq, true
	return nil
}

// Command writes that content, a command, is about to be run in the request of
// ctx, whose intent did not know it yet. An error means that it must not run.
func Command(ctx context.Context, content []byte) error {
	t := trailOf(ctx)
	if t == nil {
		return nil
	}
	t.mu.Lock()
	t.rec.Digest = Digest(content)
	intent := t.intentLocked()
	began := t.began
	t.mu.Unlock()
	if !began {
		return nil
	}
	_, err := t.log.Append(ctx, intent)
	return err
}

// intentLocked is the line of an intent: what only consumers of forkd's log
// need is in that of the outcome.
func (t *Trail) intentLocked() Record {
	r := t.rec
	r.Phase, r.Path, r.UA, r.Made, r.Code = Intent, "", "", nil, ""
	return r
}

// End writes how the request has ended, if it was begun. Where it was not, it
// reports false, and the caller may write what Rest returns.
func (t *Trail) End(ctx context.Context, status int, took time.Duration) (bool, error) {
	r, began := t.Rest(status, took)
	if !began {
		return false, nil
	}
	return true, t.log.Keep(ctx, r)
}

// Rest is the line of a request that has ended, and whether it was begun.
func (t *Trail) Rest(status int, took time.Duration) (Record, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := t.rec
	r.Phase, r.Status, r.LatencyUS, r.Result = Outcome, status, max(1, took.Microseconds()), OK
	r.UA = cmp.Or(r.UA, "-") // consumers of forkd's log expect one
	if status >= 400 || r.Code != "" {
		r.Result = Error
	}
	return r, t.began
}
