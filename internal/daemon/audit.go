package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/sandbox"
)

// AuditConfig says what the daemon remembers of who did what. An ephemeral
// daemon remembers nothing.
type AuditConfig struct {
	// Off: it remembers nothing either.
	Off bool
	// Dir is the log's directory; "" means audit, in the state directory.
	Dir string
	// Sync says when the disk is waited for; "" is audit.SyncInterval.
	Sync audit.Sync
	// Reads has requests that change nothing remembered, too.
	Reads bool
}

// eventBatch is how many events are taken at once.
const eventBatch = 64

// lookTime is how often there is a look for more, once nobody is told of it:
// the events end with the server, and what is still done then is remembered.
const lookTime = 500 * time.Millisecond

// witness is the audit log of a daemon, and the goroutine that writes into it
// what happens without a request. A nil *witness does nothing.
type witness struct {
	log    *audit.Log
	events *sandbox.Events
	tokens *tokenWatch
	stop   context.CancelFunc
	done   chan struct{}
	logger *slog.Logger
}

// openAudit opens the log. It comes before the sandboxes, so that their
// recovery is remembered.
func (d *Daemon) openAudit(ctx context.Context) error {
	cfg := d.cfg.Audit
	if d.cfg.Ephemeral || cfg.Off {
		return nil
	}
	dir := cfg.Dir
	if dir == "" {
		dir = d.path("audit")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	log, err := audit.Open(audit.Config{Dir: dir, Sync: cfg.Sync, Logger: d.log})
	if err != nil {
		return err
	}
	if err = log.Event(ctx, "daemon.start", "", "version "+d.cfg.Version); err != nil {
		return errors.Join(err, log.Close())
	}
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	w := &witness{
		log: log, events: d.events, tokens: openTokenWatch(d.guard, d.path("tokens.told"), d.log),
		stop: stop, done: make(chan struct{}), logger: d.log,
	}
	w.tellTokens(ctx) // before anybody comes in with one
	go func() {
		defer close(w.done)
		w.follow(ctx)
	}()
	d.witness = w
	return nil
}

// auditLog is what the interface writes to, or nil.
func (w *witness) auditLog() *audit.Log {
	if w == nil {
		return nil
	}
	return w.log
}

// follow writes what happens until ctx ends, and what had happened by then.
func (w *witness) follow(ctx context.Context) {
	tick := time.NewTicker(lookTime)
	defer tick.Stop()
	for seq := uint64(0); ; {
		events, gap, more, open := w.events.After(seq, eventBatch)
		if gap {
			w.write(ctx, "log.gap", "", "events came too fast: some are not here")
		}
		for _, e := range events {
			seq = e.Seq
			if e.Type != sandbox.Started { // Created says it already
				w.write(ctx, actionOf(e), objectOf(e), e.Data.Reason)
			}
		}
		if len(events) > 0 {
			continue
		}
		w.tellTokens(ctx)
		if ctx.Err() != nil {
			return
		}
		if !open {
			more = nil
		}
		select {
		case <-ctx.Done():
		case <-more:
		case <-tick.C:
		}
	}
}

func (w *witness) write(ctx context.Context, action, object, why string) {
	if err := w.log.Event(ctx, action, object, why); err != nil {
		w.logger.ErrorContext(ctx, "event is not in the audit log", slog.String("action", action), slog.Any("error", err))
	}
}

func actionOf(e sandbox.Event) string {
	if ofSnapshot(e) {
		return string(e.Type)
	}
	return "sandbox." + string(e.Type)
}

func objectOf(e sandbox.Event) string {
	if ofSnapshot(e) {
		return cmp.Or(e.Data.Snapshot, e.Data.Digest)
	}
	return e.Sandbox
}

func ofSnapshot(e sandbox.Event) bool {
	return e.Type == sandbox.SnapshotCreated || e.Type == sandbox.SnapshotRemoved
}

// reloaded writes that credentials were read again on demand.
func (w *witness) reloaded() {
	if w != nil {
		w.write(context.Background(), "daemon.reload", "", "")
	}
}

// close writes what there still is to write.
func (w *witness) close(ctx context.Context) error {
	if w == nil {
		return nil
	}
	w.stop()
	<-w.done
	return errors.Join(w.log.Event(ctx, "daemon.stop", "", ""), w.log.Close())
}
