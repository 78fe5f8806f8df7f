// Package api serves Tine's native interface, the one that api/openapi.yaml
// describes: it turns requests into calls of the domain, and what comes back
// into answers.
//
// Every failure, whoever finds it, is answered in JSON by one table from
// errdef's categories to statuses. It keeps no state, and knows no engine.
package api

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"time"

	"github.com/tinevm/tine/internal/api/forge"
	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/metrics"
	"github.com/tinevm/tine/internal/publish"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

const (
	// defaultMaxBody bounds a JSON body.
	defaultMaxBody = 2 << 20
	// defaultBodyTime bounds the time that a client takes to send one.
	defaultBodyTime = 30 * time.Second
	// defaultMaxStreams bounds how many exec streams, tunnels and proxied requests
	// are open.
	defaultMaxStreams = 1024
	// defaultMaxOutput bounds what a buffered command may write.
	defaultMaxOutput = 16 << 20
	// defaultMaxFile bounds a file that is written.
	defaultMaxFile = 4 << 30
)

// Config is what the interface serves.
type Config struct {
	Sandboxes Sandboxes
	Snapshots Snapshots
	Images    Images
	// Attestor runs commands for the record, and verifies records; nil: there
	// are no records.
	Attestor *attest.Attestor
	// Workspaces is nil where the daemon ends with a command: there is nothing
	// to come back to.
	Workspaces Workspaces
	// Doctor examines the host; nil means that there is nothing to say.
	Doctor func(context.Context) []wire.DoctorCheck
	// ForgeSnapshot is what Forge's gateway forks from; see forge.Config.
	ForgeSnapshot string
	// Auth says who may come in; nil asks nobody. Sandboxes should be Own's.
	Auth *auth.Guard
	// ShareSandboxes lets whoever has scope fork see and use what others of that
	// scope have made.
	ShareSandboxes bool
	// Audit remembers acts, and refuses those that it cannot; nil: nobody does.
	// AuditReads has it remember all other requests too.
	Audit      *audit.Log
	AuditReads bool
	// Version is the daemon's.
	Version string
	// Logger gets internal errors, and at debug level every request; nil
	// discards them.
	Logger *slog.Logger
	// MaxOutput and MaxFile bound the output of a buffered command and a file
	// that is written; zero means 16 MiB and 4 GiB.
	MaxOutput, MaxFile int64
	// MaxBody bounds a JSON body, BodyTime how long a client may take to send
	// one, and how long it may pause in a file; MaxStreams is how many exec
	// streams, tunnels and proxied requests may be open. Zero means 2 MiB, 30 s and 1024.
	MaxBody    int64
	BodyTime   time.Duration
	MaxStreams int
	// Metrics counts what is asked for; nil: nobody but GET /metrics sees it.
	Metrics *metrics.Metrics
	// Events are what GET /v1/events tells; nil: there are none.
	Events *sandbox.Events
	// Load says how busy the sandboxes' manager is, for GET /metrics; nil: it is
	// not known.
	Load func() sandbox.Load
	// Ports are the sandboxes' ports that are published on this host. They belong
	// to the caller, who has Observe end those of sandboxes that are gone. Nil:
	// none can be.
	Ports *publish.Ports
	// Sweep removes what machines that ended have left on the host; nil: nobody
	// may ask for that. Calls of it must not be in each other's way.
	Sweep func(context.Context) error
	// StateDir is a path that errors do not tell over the network.
	StateDir string
}

// Sandboxes is what the interface asks of a sandbox.Manager.
type Sandboxes interface {
	Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error)
	Get(id string) (sandbox.Info, error)
	List() []sandbox.Info
	Kill(ctx context.Context, id string) error
	With(ctx context.Context, id string, f func(context.Context, *guest.Client) error) error
	CreateSnapshot(ctx context.Context, req sandbox.SnapshotRequest) (snapshot.Snapshot, error)
	SetPool(ctx context.Context, ref string, n int) error
	Pool(ref string) (ready, want int)
	Memory(id string) (private, shared int64, err error)
	Usage(id string) (vmm.Usage, error)
	Limit(ctx context.Context, id string, asked vmm.Limits) (sandbox.Info, error)
	LimitsOf(asked vmm.Limits, shape vmm.Machine) vmm.Limits
	NetState(id string) (sandbox.NetState, error)
	EditNet(ctx context.Context, id string, edit func(egress.Rules) (egress.Rules, error)) (sandbox.NetState, error)
	Branch(ctx context.Context, id string, req sandbox.BranchRequest) (snapshot.Snapshot, error)
	Branches() []sandbox.BranchState
	ForgetBranch(tag string) bool
	Rollback(ctx context.Context, id, node string) (sandbox.Info, error)
	Suspend(ctx context.Context, id string) (sandbox.Info, error)
	Resume(ctx context.Context, id string) (sandbox.Info, error)
	Diff(ctx context.Context, a, b string) (sandbox.DiffResult, error)
	Promote(ctx context.Context, from, tag string) (snapshot.Snapshot, error)
}

// Snapshots is what the interface asks of a snapshot.Store.
type Snapshots interface {
	List() ([]snapshot.Snapshot, error)
	Resolve(ref string) (snapshot.Snapshot, error)
	Remove(ctx context.Context, tag string) error
	GC(ctx context.Context, dryRun bool) (snapshot.Freed, error)
	Check(ctx context.Context) ([]snapshot.Problem, error)
	Chain(snap snapshot.Snapshot) ([]snapshot.Snapshot, error)
	Base(snap snapshot.Snapshot) (snapshot.Base, error)
	Dependents(digest string) ([]string, error)
	Compact(ctx context.Context, ref, to string) (snapshot.Snapshot, error)
	Flatten(ctx context.Context, snap snapshot.Snapshot) error
	Prune(ctx context.Context, p snapshot.PrunePolicy) ([]string, snapshot.Freed, error)
}

// Workspaces is what the interface asks of a workspace.Store.
type Workspaces interface {
	Create(ctx context.Context, req workspace.CreateRequest) (workspace.Workspace, error)
	Get(name string) (workspace.Workspace, error)
	List() ([]workspace.Workspace, error)
	Suspend(ctx context.Context, name string) (workspace.Workspace, error)
	Resume(ctx context.Context, name string) (workspace.Workspace, error)
	Delete(ctx context.Context, name string) error
}

// Images is what the interface asks of an image.Store.
type Images interface {
	Build(ctx context.Context, req image.BuildRequest) (img image.Image, hit bool, err error)
	Get(ref string) (image.Image, error)
	List() ([]image.Image, error)
	Remove(name string) error
	GC(ctx context.Context, keep func(digest string) bool) (freed int64, err error)
}

type server struct {
	Config
	logger    *slog.Logger
	maxOutput int64
	maxFile   int64
	concealer *concealer
	sample    lastSample
	keys      *keys
	followers chan struct{} // a token for each client that follows the events
	streams   chan struct{} // a token for each stream that is open
	runs      chan struct{} // a token for each run and verification
	large     chan struct{} // a token for each large body
	checks    chan struct{} // a token for a check of the records
}

// New returns the handler that serves cfg.
func New(cfg Config) http.Handler {
	s := &server{Config: cfg, logger: cfg.Logger, maxOutput: cfg.MaxOutput, maxFile: cfg.MaxFile}
	if s.logger == nil {
		s.logger = slog.New(slog.DiscardHandler)
	}
	if s.maxOutput == 0 {
		s.maxOutput = defaultMaxOutput
	}
	if s.maxFile == 0 {
		s.maxFile = defaultMaxFile
	}
	s.MaxBody = cmp.Or(s.MaxBody, defaultMaxBody)
	s.BodyTime = cmp.Or(s.BodyTime, defaultBodyTime)
	s.streams = make(chan struct{}, cmp.Or(s.MaxStreams, defaultMaxStreams))
	s.runs, s.large, s.checks = make(chan struct{}, maxRuns), make(chan struct{}, maxLarge), make(chan struct{}, 1)
	s.concealer = newConcealer(cfg.StateDir)
	s.see()
	s.remember()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/sandboxes/{id}/exec/stream", s.stream)
	mux.HandleFunc(tunnelPattern, s.tunnel)
	mux.HandleFunc(runPattern, s.createRun)
	mux.HandleFunc(verifyPattern, s.verify)
	forge.Mount(mux, forge.Config{
		Sandboxes: s.Sandboxes, Snapshots: s.Snapshots, Snapshot: s.ForgeSnapshot,
		MaxBody: s.MaxBody, MaxOutput: s.maxOutput, Fail: s.fail,
	})
	strict := wire.NewStrictHandlerWithOptions(s, []wire.StrictMiddlewareFunc{noteAccept, noHead, s.timed}, wire.StrictHTTPServerOptions{
		RequestErrorHandlerFunc:  s.failRequest,
		ResponseErrorHandlerFunc: s.fail,
	})
	wire.HandlerWithOptions(strict, wire.StdHTTPServerOptions{BaseRouter: mux, ErrorHandlerFunc: s.failRequest})
	return s.outermost(s.audited(s.admit(s.known(s.sameOrigin(s.route(mux))))))
}
