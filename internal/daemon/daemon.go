// Package daemon puts the stores, the sandboxes and the interface together in
// one process, and serves them.
//
// A daemon in its plain form owns its state directory: a lock sees to it that
// there is only one, and sandboxes outlive it to be adopted by the next. In
// its ephemeral form it shares the images and snapshots of the directory with
// whoever else is there, and takes its sandboxes with it when it ends.
package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/metrics"
	"github.com/tinevm/tine/internal/publish"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

// Config is what a daemon is made of.
type Config struct {
	StateDir string
	Engine   vmm.Engine
	// Agent is the path of the guest agent that new images get.
	Agent string
	// KeepBranches is how many branches that nobody named are kept of each
	// sandbox; zero: all.
	KeepBranches int
	// Twin is the command line of this program as the helper of live branches;
	// nil: there are none.
	Twin []string
	// Ephemeral sandboxes die with this process.
	Ephemeral bool
	// Limits bound what callers can ask for; zero fields mean the defaults.
	Limits sandbox.Limits
	// Net bounds what sandboxes may reach.
	Net sandbox.NetConfig
	// ForgeSnapshot is what Forge's gateway forks from; "" lets it choose.
	ForgeSnapshot string
	// Version is what GET /version answers.
	Version string
	// Doctor examines the host for GET /v1/doctor; nil for none.
	Doctor func(context.Context) []wire.DoctorCheck
	// Logger may be nil.
	Logger *slog.Logger
	// Auth says who may come in, beside the tokens of the state directory; TLS
	// what TCP listeners show and ask for. An ephemeral daemon asks nobody.
	Auth auth.Config
	TLS  auth.TLSFiles
	// ShareSandboxes has tokens of scope fork use each other's sandboxes.
	ShareSandboxes bool
	// Audit says what is remembered of who did what.
	Audit AuditConfig
	// HTTP bounds what clients may do to the interface; zero fields mean the
	// defaults.
	HTTP HTTPLimits
	// DrainTime is how long requests under way may go on once the daemon is
	// told to stop; zero means 10 s.
	DrainTime time.Duration
	// OnStop is what becomes of sandboxes then; "" leaves them. Ephemeral ones
	// end anyway.
	OnStop OnStop
}

// Daemon is a running daemon. Its parts are safe for concurrent use.
type Daemon struct {
	Images    *image.Store
	Snapshots *snapshot.Store
	Sandboxes *sandbox.Manager
	Runner    *deterministic.Runner

	cfg     Config
	log     *slog.Logger
	handler http.Handler
	events  *sandbox.Events
	ports   *publish.Ports

	attestor   *attest.Attestor
	workspaces *workspace.Store // nil when ephemeral
	lock       *os.File         // nil when ephemeral
	guard      *auth.Guard      // nil when ephemeral
	certs      *auth.Certificates
	witness    *witness // nil when nothing is remembered
	sweeping   sync.Mutex
}

// Open opens the state directory and takes over the sandboxes that it finds
// there. It returns errdef.ErrConflict when another daemon runs on it.
func Open(ctx context.Context, cfg Config) (_ *Daemon, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	d := &Daemon{cfg: cfg, log: cfg.Logger}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	if d.cfg.StateDir, err = MakeStateDir(cfg.StateDir); err != nil {
		return nil, err
	}
	d.log = slog.New(api.WithRequestIDs(d.log.Handler()))
	counts := metrics.New(cfg.Version)
	d.ports = publish.New(d.log)
	u.Add(d.ports.Close)
	d.events = api.NewEvents(api.Observe(counts, d.ports))
	if !cfg.Ephemeral {
		if d.lock, err = lock(d.cfg.StateDir); err != nil {
			return nil, err
		}
		u.Add(d.lock.Close)
		if err = d.openAuth(); err != nil {
			return nil, err
		}
	}
	if err = d.openAudit(ctx); err != nil {
		return nil, err
	}
	u.Add(func() error { return d.witness.close(ctx) })
	if d.Images, err = image.Open(image.Config{Dir: d.path("images"), Agent: cfg.Agent, Logger: d.log}); err != nil {
		return nil, err
	}
	if d.Snapshots, err = snapshot.Open(d.path("snapshots"), d.log); err != nil {
		return nil, err
	}
	d.Sandboxes, err = sandbox.NewManager(ctx, sandbox.Config{
		Dir: d.path("sandboxes"), Engine: cfg.Engine, Snapshots: d.Snapshots, Images: d.Images,
		KeepBranches: cfg.KeepBranches, Freezer: guestmem.Freezer{Command: cfg.Twin}, Logger: d.log, Events: d.events, Ephemeral: cfg.Ephemeral, Limits: cfg.Limits, Net: cfg.Net,
	})
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return d.Sandboxes.Close(ctx) })
	boxes := api.Own(d.Sandboxes, d.guard, d.Snapshots, cfg.ShareSandboxes)
	if err = d.openAttestor(boxes); err != nil {
		return nil, err
	}
	u.Add(d.closeAttestor)
	if !cfg.Ephemeral {
		// What machines left that ended while nobody looked.
		if err = d.sweep(ctx); err != nil {
			d.log.WarnContext(ctx, "leftovers of machines not removed", "error", err)
		}
	}
	face := api.Config{
		Sandboxes: boxes, Auth: d.guard, ShareSandboxes: cfg.ShareSandboxes, Snapshots: d.Snapshots, Images: d.Images, Attestor: d.attestor,
		Audit: d.witness.auditLog(), AuditReads: cfg.Audit.Reads,
		Metrics: counts, Events: d.events, Load: d.Sandboxes.Load, Ports: d.ports,
		Doctor: cfg.Doctor, ForgeSnapshot: cfg.ForgeSnapshot, Version: cfg.Version, Logger: d.log,
		MaxBody: cfg.HTTP.Body, BodyTime: cfg.HTTP.BodyTime, MaxStreams: cfg.HTTP.Streams, StateDir: d.cfg.StateDir,
	}
	if !cfg.Ephemeral { // workspaces are for longer than that
		if d.workspaces, err = workspace.Open(ctx, d.path("workspaces"), boxes, d.log); err != nil {
			return nil, err
		}
		face.Workspaces, face.Sweep = d.workspaces, d.sweep
	}
	d.handler = api.New(face)
	return d, nil
}

// maxStateDir leaves room for the sockets below the state directory: their
// paths hold 107 bytes at most, and end in /sandboxes/sb-0123456789ab/0/agent.sock.
const maxStateDir = 107 - len("/sandboxes/sb-0123456789ab/0/agent.sock")

// MakeStateDir makes a state directory, unless it is there, and returns its
// absolute path. Open does so too; whoever needs it before calls this.
func MakeStateDir(path string) (string, error) {
	dir, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if len(dir) > maxStateDir {
		err = fmt.Errorf("%w: state directory %s: its path is longer than %d bytes, so sockets in it have no address", errdef.ErrInvalid, dir, maxStateDir)
		return "", errdef.WithHint(err, "choose a shorter --state-dir")
	}
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return "", errdef.WithHint(fmt.Errorf("make state directory: %w", err), "choose another --state-dir, or run as root")
	}
	return dir, nil
}

func (d *Daemon) path(name string) string { return filepath.Join(d.cfg.StateDir, name) }

// sweep clears away what machines have left that are no more. Calls take turns.
func (d *Daemon) sweep(ctx context.Context) error {
	d.sweeping.Lock()
	defer d.sweeping.Unlock()
	return d.cfg.Engine.Sweep(ctx)
}

func lock(stateDir string) (*os.File, error) {
	f, err := durable.TryLock(filepath.Join(stateDir, "daemon.lock"), false)
	if errors.Is(err, errdef.ErrConflict) {
		err = fmt.Errorf("%w: a daemon runs on %s already", errdef.ErrConflict, stateDir)
		return nil, errdef.WithHint(err, "use that one (tine ls), or choose another --state-dir")
	}
	if err != nil {
		return nil, fmt.Errorf("lock state directory: %w", err)
	}
	return f, nil
}

// Close ends the daemon. Unless it is ephemeral its sandboxes run on.
func (d *Daemon) Close(ctx context.Context) error {
	err := d.ports.Close() // before the sandboxes, which they use
	if d.workspaces != nil {
		err = errors.Join(err, d.workspaces.Close())
	}
	err = errors.Join(err, d.closeAttestor(), d.Sandboxes.Close(ctx), d.witness.close(ctx))
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

// Serve answers on the listeners until ctx ends, and closes them.
func (d *Daemon) Serve(ctx context.Context, listeners ...net.Listener) error {
	base, cancelRequests := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancelRequests(nil)
	srv := &http.Server{
		Handler:           d.handler,
		ReadHeaderTimeout: cmp.Or(d.cfg.HTTP.HeaderTime, defaultHeaderTime),
		IdleTimeout:       cmp.Or(d.cfg.HTTP.IdleTime, defaultIdleTime),
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelDebug),
		BaseContext:       func(ln net.Listener) context.Context { return placed(base, ln) },
		ConnContext:       auth.Connected,
	}
	srv.RegisterOnShutdown(d.events.Close) // or those who follow them would be waited for
	group, ctx := errgroup.WithContext(ctx)
	for _, ln := range listeners {
		group.Go(func() error {
			if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
			}
			return nil
		})
	}
	group.Go(func() error {
		<-ctx.Done()
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), cmp.Or(d.cfg.DrainTime, defaultDrainTime))
		defer cancel()
		err := srv.Shutdown(late)
		cancelRequests(errStopping)
		if errors.Is(err, context.DeadlineExceeded) {
			return srv.Close()
		}
		return err
	})
	return group.Wait()
}

var errStopping = fmt.Errorf("%w: the daemon is stopping", errdef.ErrUnavailable)
