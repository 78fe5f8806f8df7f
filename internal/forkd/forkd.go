// Package forkd is this program under the name of forkd, for forkd's Python
// SDK: its Sandbox class starts `forkd fork`, and talks to the guest's agent at
// an address that both know.
//
// It forks one sandbox through the daemon, answers for its agent at that
// address until it is told to end, and removes the sandbox then. It knows no
// other verb: the rest of forkd's surface is the daemon's.
package forkd

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// defaultTarget is where forkd's guests have their agent.
	defaultTarget = "10.42.0.2:8888"
	// removeTime is how long the sandbox may take to go. The SDK kills what has
	// not ended after five seconds.
	removeTime = 4 * time.Second
	// margin is how long after its time a sandbox is removed by the daemon,
	// should this process have been killed.
	margin = time.Minute
)

// Exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// Environment is all that the program sees of the world.
type Environment struct {
	// Args is the command line without the program's name.
	Args   []string
	Stdout io.Writer
	Stderr io.Writer
	// Getenv reads an environment variable.
	Getenv func(string) string
	// Connect makes a client of the daemon that tine's variables name.
	Connect func(getenv func(string) string) (*client.Client, error)
}

// Run runs the command line of env until ctx ends, which is no failure, and
// returns its exit code.
func Run(ctx context.Context, env Environment) int {
	opts, err := parse(env.Args)
	if errors.Is(err, flag.ErrHelp) {
		say(env.Stdout, usage)
		return exitOK
	}
	if err == nil {
		err = fork(ctx, env, opts)
	}
	if err == nil {
		return exitOK
	}
	say(env.Stderr, "forkd: %v\n", err)
	hint := errdef.Hint(err)
	if remote, ok := errors.AsType[*client.Error](err); ok {
		hint = remote.Hint
	}
	if _, ok := errors.AsType[*client.UnreachableError](err); ok && hint == "" {
		hint = "run `tine serve`, or set FORKD_URL"
	}
	if hint != "" {
		say(env.Stderr, "hint: %s\n", hint)
	}
	if errors.Is(err, errUsage) {
		return exitUsage
	}
	return exitError
}

// say writes for a person.
func say(w io.Writer, format string, args ...any) {
	_, _ = fmt.Fprintf(w, format, args...) // nobody is left to tell
}

const usage = `usage: forkd fork --tag TAG [-n 1] [--settle-secs SECONDS]

Forks a sandbox through Tine's daemon and answers for its agent at FORKD_TARGET
until it is told to end or the time is over; then the sandbox is removed.

This is tine under the name of forkd, for forkd's Python SDK. For everything
else there are tine and the daemon's HTTP interface.
`

// errUsage is a command line that is not understood.
var errUsage = fmt.Errorf("%w usage", errdef.ErrInvalid)

func misused(format string, args ...any) error {
	return errdef.WithHint(fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, args...)), "see forkd --help")
}

type options struct {
	tag    string
	settle time.Duration
}

func parse(args []string) (options, error) {
	if len(args) > 0 && (args[0] == "-h" || args[0] == "--help" || args[0] == "help") {
		return options{}, flag.ErrHelp
	}
	if len(args) == 0 || args[0] != "fork" {
		return options{}, misused("the only command is fork")
	}
	f := flag.NewFlagSet("fork", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	tag := f.String("tag", "", "")
	n := f.Int("n", 1, "")
	settle := f.Int64("settle-secs", 2, "")
	switch err := f.Parse(args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		return options{}, err
	case err != nil:
		return options{}, misused("%v", err)
	case f.NArg() > 0:
		return options{}, misused("%q is one argument too many", f.Arg(0))
	case *tag == "":
		return options{}, misused("--tag is missing")
	case *n != 1:
		return options{}, misused("-n %d: there is one address, and so one sandbox", *n)
	case *settle < 0 || *settle > maxSettle:
		return options{}, misused("--settle-secs %d is out of range", *settle)
	}
	return options{tag: *tag, settle: time.Duration(*settle) * time.Second}, nil
}

// maxSettle is a year, in seconds.
const maxSettle = 366 * 24 * 60 * 60

// fork makes the sandbox and serves it.
func fork(ctx context.Context, env Environment, opts options) (err error) {
	// Before the sandbox: what cannot be reached is not to be made.
	ln, err := listen(ctx, env.Getenv("FORKD_TARGET"))
	if err != nil {
		return err
	}
	defer ln.Close() //nolint:errcheck // it is closed by serve, or nobody uses it
	c, err := env.Connect(withForkds(env.Getenv))
	if err != nil {
		return err
	}
	defer c.Close()
	boxes, err := c.Fork(ctx, client.ForkRequest{Snapshot: opts.tag, Lifetime: opts.settle + margin})
	if err != nil {
		return err
	}
	id := boxes[0].ID
	defer func() {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTime)
		defer cancel()
		if gone := c.RemoveSandbox(late, id); !errors.Is(gone, errdef.ErrNotFound) { // it may have ended by itself
			err = errors.Join(err, gone)
		}
	}()
	say(env.Stdout, "sandbox %s answers on %s\n", id, ln.Addr())
	until, cancel := context.WithTimeout(ctx, opts.settle)
	defer cancel()
	return serve(until, ln, &agent{daemon: c, id: id})
}

// withForkds is getenv with the variables of forkd's clients in the place of
// those of tine's that are not set.
func withForkds(getenv func(string) string) func(string) string {
	return func(name string) string {
		value := getenv(name)
		switch {
		case name == "TINE_URL" && value == "":
			return getenv("FORKD_URL")
		case name == "TINE_TOKEN" && value == "" && getenv("TINE_TOKEN_FILE") == "":
			return getenv("FORKD_TOKEN")
		}
		return value
	}
}

// listen opens the address at which the SDK expects the agent. Whoever reaches
// it may do everything in the sandbox, so it must not be one that others can
// reach.
func listen(ctx context.Context, target string) (net.Listener, error) {
	if target == "" {
		target = defaultTarget
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return nil, misused("FORKD_TARGET %q: %v", target, err)
	}
	if ip, parseErr := netip.ParseAddr(host); host != "localhost" && target != defaultTarget && (parseErr != nil || !ip.IsLoopback()) {
		return nil, errdef.WithHint(fmt.Errorf("%w: refusing to answer on %s, which others may reach", errdef.ErrDenied, target),
			"set FORKD_TARGET to a loopback address, as 127.0.0.1:8888")
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", target)
	if err != nil {
		return nil, errdef.WithHint(fmt.Errorf("%w: answer on %s: %w", errdef.ErrUnavailable, target, err),
			"set FORKD_TARGET to a loopback address that is free, as 127.0.0.1:8888, here and where the SDK runs")
	}
	return ln, nil
}
