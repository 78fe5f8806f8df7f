package cli

import (
	"context"
	"fmt"
	"io"

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
	// Doctor examines this host.
	Doctor func(ctx context.Context, opts HostOptions) ([]client.Check, error)
}

// HostOptions say where a daemon keeps its state and how it runs machines.
type HostOptions struct {
	StateDir string
	// Engine is "auto" or an engine's name.
	Engine string
	// Log receives log lines; nil discards them.
	Log io.Writer
}

// ServeOptions say how to run the daemon.
type ServeOptions struct {
	HostOptions
	// Socket is the path of the unix socket; "" means StateDir/tine.sock.
	Socket string
	// Listen is a TCP address, or "" for none.
	Listen string
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
	// Verbose logs every request.
	Verbose bool
	// Ready, when set, is called once the daemon answers, with the addresses
	// it answers on.
	Ready func(addresses []string)
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
	// Out receives the result, as JSON if JSON is set.
	Out  io.Writer
	JSON bool
}

func missing(what string) error {
	return fmt.Errorf("%w: this build has no %s", errdef.ErrUnsupported, what)
}

func (a *app) hostOptions() HostOptions {
	return HostOptions{StateDir: a.stateDir(), Engine: a.flags.engine}
}
