package cli

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// Deps are the verbs that run a daemon or its parts in this process. All report
// progress to the context's progress.Func.
type Deps struct {
	// Serve runs the daemon until ctx ends, which is no error.
	Serve func(ctx context.Context, opts ServeOptions) error
	// Local starts a daemon for this process only, and returns a client of it
	// and a function that ends it with everything it has running.
	Local func(ctx context.Context, opts HostOptions) (*client.Client, func(context.Context) error, error)
	// Demo does the main job once and writes what it saw.
	Demo func(ctx context.Context, opts DemoOptions) error
	// Bench measures and writes what it measured.
	Bench func(ctx context.Context, opts BenchOptions) error
	// Tokens are the named tokens of a state directory.
	Tokens TokenDeps
	// Doctor examines this host.
	Doctor func(ctx context.Context, opts HostOptions) ([]client.Check, error)
}

// HostOptions say where a daemon keeps its state and how it runs machines.
type HostOptions struct {
	StateDir string
	// Engine is "auto" or an engine's name.
	Engine string
	// Firecracker is its path or name in $PATH, or "" for firecracker. CPUTemplate
	// is what its guests see of the processor: a name or a file, or "" for all.
	Firecracker, CPUTemplate string
	// Isolation says how sandboxes are kept from the host and the network.
	Isolation IsolationOptions
	// Log receives log lines; nil discards them.
	Log io.Writer
}

// IsolationOptions say how sandboxes are kept from the host and the network.
type IsolationOptions struct {
	// RequireJail refuses to run with less than a whole jail.
	RequireJail bool
	// NetPrivate are the private networks that callers may open to sandboxes, and
	// NetResolvers the name servers; none means the host's.
	NetPrivate, NetResolvers []string
	// TotalMemoryMiB is what all machines together may have; 0: nine tenths of
	// the host's memory.
	TotalMemoryMiB int
	// MaxNetworks is how many sandboxes may have a network; 0 is the default.
	MaxNetworks int
}

// ServeOptions say how to run the daemon.
type ServeOptions struct {
	HostOptions
	// Socket is the path of the unix socket; "" means StateDir/tine.sock.
	Socket string
	// Listen is a TCP address, or "" for none.
	Listen string
	// Auth says who is let in, and Audit what is remembered of it.
	Auth  AuthOptions
	Audit AuditOptions
	// Pool says how many warm forks to keep, by snapshot tag.
	Pool map[string]int
	// MaxSandboxes is how many there may be; 0 is the daemon's default.
	MaxSandboxes int
	// Branches is how many branches may be taken or written at once; 0 is the
	// daemon's default.
	Branches int
	// KeepBranches is how many branches that nobody named are kept of each
	// sandbox; 0: all.
	KeepBranches int
	// ForgeSnapshot is what sandboxes of Forge's gateway are forked from; ""
	// lets the daemon choose.
	ForgeSnapshot string
	// Verbose logs every request; LogFormat is text or json.
	Verbose   bool
	LogFormat string
	// DrainTime is how long requests may go on when the daemon is told to stop,
	// and OnStop what then becomes of sandboxes: leave, suspend or remove.
	DrainTime time.Duration
	OnStop    string
	// MaxBody bounds a JSON body; HeaderTime, BodyTime and IdleTime how long a
	// client may take; MaxStreams how many exec streams are open. 0 is the
	// daemon's default.
	MaxBody                        int64
	HeaderTime, BodyTime, IdleTime time.Duration
	MaxStreams                     int
	// Ready, when set, is called once the daemon answers, with the addresses
	// it answers on.
	Ready func(addresses []string)
}

// TokenDeps change and list the named tokens of a state directory. They need no
// daemon.
type TokenDeps struct {
	// Create makes a token of what t says, and returns it as it is kept, and the
	// token itself.
	Create func(ctx context.Context, stateDir string, t Token) (made Token, secret string, err error)
	List   func(stateDir string) ([]Token, error)
	Remove func(ctx context.Context, stateDir, name string) error
}

// Token is what is known of a named token.
type Token struct {
	Name  string `json:"name"`
	Scope string `json:"scope"`
	// MaxSandboxes is 0 where there is no bound.
	MaxSandboxes int `json:"max_sandboxes,omitempty"`
	// MaxMemoryMiB and MaxCPUs bound what the limits of its sandboxes come to.
	MaxMemoryMiB int       `json:"max_memory_mib,omitempty"`
	MaxCPUs      float64   `json:"max_cpus,omitempty"`
	Sign         bool      `json:"sign,omitempty"`
	CreatedAt    time.Time `json:"created_at"`
}

// AuthOptions say who is let in.
type AuthOptions struct {
	// TokenFile has one token that may do everything; "" for none.
	TokenFile string
	// TLSCert and TLSKey are for TCP; ClientCA signs clients' certificates, and
	// ClientScope is what those may do.
	TLSCert, TLSKey, ClientCA, ClientScope string
	// Plain allows an exposed address without TLS.
	Plain bool
	// Share has tokens of scope fork use each other's sandboxes.
	Share bool
	// SignWindow is how old a signed request may be; 0 is the daemon's default.
	SignWindow time.Duration
	// Rate and Burst bound the requests of one token; 0 is no bound.
	Rate  float64
	Burst int
}

// DemoOptions say how to run the demo.
type DemoOptions struct {
	HostOptions
	// N is how many sandboxes to fork.
	N int
	// Out receives the result, as JSON if JSON is set.
	Out  io.Writer
	JSON bool
}

// BenchOptions say what to measure.
type BenchOptions struct {
	HostOptions
	// Snapshot is the tag to fork from.
	Snapshot string
	// Forks are the sizes of the parallel forks to measure.
	Forks []int
	// Rounds is how often to repeat each measurement.
	Rounds int
	// Floor measures bare QEMU beside it.
	Floor bool
	// Branch measures branches instead, of guests with so much Memory, in MiB.
	Branch bool
	Memory []int
	// Deterministic measures deterministic runs instead.
	Deterministic bool
	// Isolate measures what the jail and networks cost instead.
	Isolate bool
	// Out receives the result, as JSON if JSON is set.
	Out  io.Writer
	JSON bool
}

func missing(what string) error {
	return fmt.Errorf("%w: this build has no %s", errdef.ErrUnsupported, what)
}

func (a *app) hostOptions() HostOptions {
	return HostOptions{
		StateDir: a.stateDir(), Engine: a.flags.engine, Firecracker: a.firecracker(), CPUTemplate: a.flags.cpuTemplate,
		Isolation: a.flags.isolation,
	}
}
