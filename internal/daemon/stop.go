package daemon

import (
	"context"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/workspace"
)

// HTTPLimits bound what one client may do to the interface. A field that is
// zero has its default.
type HTTPLimits struct {
	// Body is the most bytes of a JSON body.
	Body int64
	// HeaderTime bounds how long the head of a request may take, BodyTime a
	// JSON body, or a pause in a file; IdleTime how long a connection may wait
	// for its next request.
	HeaderTime, BodyTime, IdleTime time.Duration
	// Streams is how many exec streams may be open.
	Streams int
}

const (
	defaultHeaderTime = 10 * time.Second
	defaultIdleTime   = 2 * time.Minute
	defaultDrainTime  = 10 * time.Second
	// settleTime bounds the whole of Settle.
	settleTime = 5 * time.Minute
)

// OnStop says what becomes of sandboxes when their daemon is told to stop.
type OnStop string

// The choices. Removing spares the sandboxes of workspaces, which are
// suspended: a workspace is a promise to keep them.
const (
	Leave   OnStop = "leave"   // they run on, and the next daemon adopts them
	Suspend OnStop = "suspend" // their memory goes to the disk; use resumes them
	Remove  OnStop = "remove"
)

// Settle does with the sandboxes what Config.OnStop says. It is for between
// Serve and Close. A sandbox that resists is logged and left: it runs on.
func (d *Daemon) Settle(ctx context.Context) {
	_ = d.ports.Close() // it never fails; who came by a published port would resume what is suspended here
	if d.cfg.Ephemeral || d.cfg.OnStop == Leave || d.cfg.OnStop == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(max(2, runtime.NumCPU())) // each writes a memory to the disk
	for _, info := range d.Sandboxes.List() {
		group.Go(func() error {
			if err := d.settle(ctx, info); err != nil {
				d.log.WarnContext(ctx, "sandbox left as it is", "sandbox", info.ID, "on_stop", string(d.cfg.OnStop), "error", err)
			}
			return nil
		})
	}
	_ = group.Wait() // each has said how it went
}

func (d *Daemon) settle(ctx context.Context, info sandbox.Info) error {
	_, kept := info.Labels[workspace.Label]
	switch {
	case d.cfg.OnStop == Remove && !kept:
		return d.Sandboxes.Kill(ctx, info.ID)
	case info.State == sandbox.Running:
		_, err := d.Sandboxes.Suspend(ctx, info.ID)
		return err
	}
	return nil
}
