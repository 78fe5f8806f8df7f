package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/wire"
)

const (
	eventStream = "text/event-stream"
	// keepEvents is how many events there are to look back to.
	keepEvents = 4096
	// maxFollowers is how many clients may follow the events.
	maxFollowers = 64
	// eventBatch is how many events are taken from the ring at once.
	eventBatch = 256
)

// NewEvents returns the Events of a daemon, observed by observe.
func NewEvents(observe func(sandbox.Event)) *sandbox.Events {
	return sandbox.NewEvents(keepEvents, observe)
}

// telling tells of snapshots that are made and removed at the store itself.
type telling struct {
	Snapshots
	events *sandbox.Events
}

// Remove removes a tag, and tells of it.
func (t telling) Remove(ctx context.Context, tag string) error {
	err := t.Snapshots.Remove(ctx, tag)
	if err == nil {
		t.events.Add(sandbox.SnapshotRemoved, "", sandbox.EventData{Snapshot: tag})
	}
	return err
}

// Compact makes a snapshot, and tells of it.
func (t telling) Compact(ctx context.Context, ref, to string) (snapshot.Snapshot, error) {
	snap, err := t.Snapshots.Compact(ctx, ref, to)
	if err == nil {
		t.events.Add(sandbox.SnapshotCreated, "", sandbox.EventData{Snapshot: snap.Tag, Digest: snap.Digest})
	}
	return snap, err
}

// Prune removes tags, and tells of each.
func (t telling) Prune(ctx context.Context, p snapshot.PrunePolicy) ([]string, snapshot.Freed, error) {
	tags, freed, err := t.Snapshots.Prune(ctx, p)
	for _, tag := range tags {
		if !p.DryRun {
			t.events.Add(sandbox.SnapshotRemoved, "", sandbox.EventData{Snapshot: tag})
		}
	}
	return tags, freed, err
}

// noHead keeps those out who would wait for the end of the events with no way
// to see them.
func noHead(next wire.StrictHandlerFunc, operation string) wire.StrictHandlerFunc {
	if operation != "FollowEvents" {
		return next
	}
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, request any) (any, error) {
		if r.Method == http.MethodHead {
			w.Header().Set("Allow", http.MethodGet)
			return nil, refuse("method_not_allowed", "HEAD is not allowed on "+r.URL.Path)
		}
		return next(ctx, w, r, request)
	}
}

// FollowEvents answers GET /v1/events.
func (s *server) FollowEvents(ctx context.Context, r wire.FollowEventsRequestObject) (wire.FollowEventsResponseObject, error) {
	f := following{ctx: ctx, s: s, lines: wantsLines(ctx), seq: s.Events.Last(), seen: s.newSeen(ctx)}
	id := r.Params.LastEventID
	if id == "" {
		id = r.Params.After
	}
	if id == "" {
		return f, nil
	}
	epoch, seq, err := parseEventID(id)
	switch {
	case err != nil:
		return nil, err
	case epoch != s.Events.Epoch(): // an earlier daemon's: all of this one's are new
		f.seq, f.gap = 0, true
	case seq > f.seq:
		return nil, fmt.Errorf("%w: there was no event %q yet", errdef.ErrInvalid, id)
	default:
		f.seq = seq
	}
	return f, nil
}

// parseEventID reads what eventID wrote.
func parseEventID(id string) (epoch string, seq uint64, err error) {
	epoch, number, ok := strings.Cut(id, "-")
	seq, numErr := strconv.ParseUint(number, 10, 63)
	if !ok || numErr != nil || !goodRequestID(epoch) {
		return "", 0, fmt.Errorf("%w: %q is no event's id", errdef.ErrInvalid, id[:min(len(id), maxRequestID)])
	}
	return epoch, seq, nil
}

func eventID(epoch string, seq uint64) string { return epoch + "-" + strconv.FormatUint(seq, 10) }

// following is an answer that goes on until its client leaves, or cannot keep
// up.
type following struct {
	ctx   context.Context
	s     *server
	lines bool
	seq   uint64 // of the last event that the client knows
	gap   bool   // it has missed some already
	seen  *seen
}

// VisitFollowEventsResponse writes events as they come.
func (f following) VisitFollowEventsResponse(w http.ResponseWriter) error {
	select {
	case f.s.followers <- struct{}{}:
		defer func() { <-f.s.followers }()
	default:
		return fmt.Errorf("%w: %d clients follow the events, which is the limit", errdef.ErrUnavailable, cap(f.s.followers))
	}
	f.s.Metrics.StreamOpened()
	defer f.s.Metrics.StreamClosed()
	out := newEventWriter(w, f.lines)
	if err := out.comment(); err != nil { // so that the client knows that it is let in
		return err
	}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	for first := true; ; first = false {
		events, lost, more, open := f.s.Events.After(f.seq, eventBatch)
		if lost && !first {
			return nil // it is too slow, and will see the gap when it comes again
		}
		if err := f.write(out, events, lost || (first && f.gap)); err != nil || !open {
			return err
		}
		if len(events) == eventBatch {
			continue
		}
		select {
		case <-more:
		case <-beat.C:
			if err := out.comment(); err != nil {
				return err
			}
		case <-f.ctx.Done():
			return nil
		}
	}
}

func (f *following) write(out *eventWriter, events []sandbox.Event, gap bool) error {
	epoch := f.s.Events.Epoch()
	if gap {
		if len(events) > 0 {
			f.seq = events[0].Seq - 1
		}
		now := time.Now()
		if err := out.event("gap", eventID(epoch, f.seq), wire.Event{
			ID: eventID(epoch, f.seq), Seq: int64(f.seq), Type: wire.EventTypeGap, At: rfc3339(now), AtUnixMS: now.UnixMilli(),
		}); err != nil {
			return err
		}
	}
	for _, e := range events {
		if f.seq = e.Seq; !f.seen.tells(e) {
			continue
		}
		event := eventOf(f.ctx, epoch, e)
		if err := out.event(string(event.Type), event.ID, event); err != nil {
			return err
		}
	}
	return nil
}

func eventOf(ctx context.Context, epoch string, e sandbox.Event) wire.Event {
	out := wire.Event{
		ID: eventID(epoch, e.Seq), Seq: int64(e.Seq), Type: wire.EventType(e.Type), At: rfc3339(e.At), AtUnixMS: e.At.UnixMilli(),
		Sandbox: e.Sandbox,
	}
	if d := e.Data; d != (sandbox.EventData{}) {
		out.Data = &wire.EventData{
			Snapshot: d.Snapshot, Digest: d.Digest, Mode: d.Mode, Reason: conceal(ctx, d.Reason), FromPool: d.FromPool,
			Adopted: d.Adopted, PauseMS: d.PauseMS, TookMS: d.TookMS,
		}
	}
	return out
}

// eventWriter writes server-sent events, or lines of JSON, each flushed. It is
// safe for concurrent use; after a write has failed it writes no more.
type eventWriter struct {
	lines bool

	mu    sync.Mutex
	w     http.ResponseWriter
	flush *http.ResponseController
	any   bool
	err   error
}

func newEventWriter(w http.ResponseWriter, lines bool) *eventWriter {
	return &eventWriter{w: w, flush: http.NewResponseController(w), lines: lines}
}

func (e *eventWriter) begun() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.any
}

// event writes v. The name and the id are only for server-sent events; the id
// may be "".
func (e *eventWriter) event(name, id string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if e.lines {
		return e.write(string(data) + "\n")
	}
	text := "event: " + name + "\ndata: " + string(data) + "\n\n"
	if id != "" {
		text = "id: " + id + "\n" + text
	}
	return e.write(text)
}

// comment only shows that the connection lives.
func (e *eventWriter) comment() error {
	if e.lines {
		return e.write("\n")
	}
	return e.write(":\n\n")
}

func (e *eventWriter) write(text string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.err != nil {
		return e.err
	}
	if !e.any {
		e.begin()
	}
	// A writer without deadlines is a test's: it does not stall.
	_ = e.flush.SetWriteDeadline(time.Now().Add(lineTimeout))
	defer func() { _ = e.flush.SetWriteDeadline(time.Time{}) }()
	_, err := e.w.Write([]byte(text))
	if err == nil {
		err = e.flush.Flush()
	}
	if err != nil {
		e.err = fmt.Errorf("%w: the client does not read: %w", errdef.ErrTimeout, err)
	}
	return e.err
}

func (e *eventWriter) begin() {
	e.any = true
	noteStream(e.w)
	h := e.w.Header()
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no") // or a proxy would keep events back
	h.Set("Content-Type", eventStream)
	if e.lines {
		h.Set("Content-Type", ndjson)
	}
}
