// Package cli is the tine command: it turns a command line into calls to a
// daemon, and answers into text or JSON.
//
// Standard output carries the answer and nothing else; progress, notes and
// errors go to standard error. It assembles no daemon itself: what needs one in
// this process is handed in as Deps. docs/cli.md describes it to its users.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// Environment is all that a command sees of the world.
type Environment struct {
	// Args is the command line without the program's name.
	Args   []string
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	// Getenv reads an environment variable.
	Getenv func(string) string
	// Version is this program's.
	Version string
	// Deps are the parts of the program that the cli does not know.
	Deps Deps
}

// app is one run of the program.
type app struct {
	Environment
	flags globals
	// started: the command line was understood and its verb runs. Errors
	// before that are about usage.
	started bool
}

// globals are the flags that every verb has.
type globals struct {
	json     bool
	quiet    bool
	local    bool
	url      string
	socket   string
	stateDir string
	engine   string

	firecracker, cpuTemplate string

	isolation IsolationOptions

	tokenFile, caFile, certFile, keyFile string
}

// Run runs the command that env names and returns its exit code. ctx ends when
// the user interrupts it.
func Run(ctx context.Context, env Environment) int {
	a := &app{Environment: env}
	root := a.rootCommand() //nolint:contextcheck // commands are given theirs by ExecuteContext
	root.SetArgs(env.Args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	err := root.ExecuteContext(ctx)
	code := a.exitCode(ctx, err)
	a.printError(ctx, err)
	return code
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "tine",
		Short: "Fork microVMs",
		Long: `Tine forks microVMs. A template boots once, warms up and is frozen as a
snapshot; every sandbox after that is a fork of it: a virtual machine of its
own, ready in milliseconds.

Verbs talk to a daemon, which they find by --url, --socket, $TINE_URL or the
socket in the state directory. With --local they start one for themselves.`,
		Example: `  tine serve &
  tine fork --snapshot py -n 3
  tine run --snapshot py -- python3 -c 'print(6*7)'
  tine run --local --snapshot py -it -- bash`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	f := root.PersistentFlags()
	f.BoolVar(&a.flags.json, "json", false, "print JSON")
	f.BoolVarP(&a.flags.quiet, "quiet", "q", false, "print only names, and no progress")
	f.BoolVar(&a.flags.local, "local", false, "start a daemon in this process, for this command only")
	f.StringVar(&a.flags.url, "url", "", "daemon's address (default $TINE_URL)")
	f.StringVar(&a.flags.socket, "socket", "", "daemon's unix socket (default STATE-DIR/tine.sock)")
	f.StringVar(&a.flags.stateDir, "state-dir", "", "where images, snapshots and sandboxes are (default $TINE_STATE_DIR, /var/lib/tine or ~/.local/state/tine)")
	a.engineFlags(root)
	f.BoolVar(&a.flags.isolation.RequireJail, "require-jail", false, "with a daemon in this process: refuse to run with less than a whole jail (tine doctor shows what there is)")
	f.StringVar(&a.flags.tokenFile, "token-file", "", "`FILE` with a token: what serve demands, what other verbs show (default $TINE_TOKEN or $TINE_TOKEN_FILE)")
	f.StringVar(&a.flags.caFile, "ca-file", "", "PEM `FILE` of who signs the daemon's certificate (default $TINE_CA_FILE)")
	f.StringVar(&a.flags.certFile, "cert-file", "", "PEM `FILE` of the certificate to show the daemon (default $TINE_CERT_FILE)")
	f.StringVar(&a.flags.keyFile, "key-file", "", "PEM `FILE` of its key (default $TINE_KEY_FILE)")
	root.MarkFlagsMutuallyExclusive("url", "socket", "local")
	root.AddCommand(
		a.demoCommand(), a.serveCommand(), a.tokenCommand(), a.auditCommand(), a.eventsCommand(), a.imageCommand(), a.snapshotCommand(), a.blockCommand(),
		a.forkCommand(), a.lsCommand(), a.execCommand(), a.runCommand(), a.evalCommand(), a.psCommand(), a.portCommand(), a.netCommand(), a.statsCommand(), a.limitCommand(),
		a.verifyCommand(), a.recordCommand(),
		a.branchCommand(), a.treeCommand(), a.rollbackCommand(), a.diffCommand(), a.promoteCommand(),
		a.suspendCommand(), a.resumeCommand(), a.workspaceCommand(), a.cpCommand(), a.rmCommand(), a.doctorCommand(), a.benchCommand(), a.versionCommand(),
	)
	return root
}

// verb makes a cobra function of f, and notes that the command line was good.
func (a *app) verb(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		a.started = true
		return f(cmd.Context(), args)
	}
}

// noun makes a command that only has others: by itself it is bad usage.
func noun(use, short string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use:   use,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fmt.Errorf("%s needs a command: see %s --help", cmd.CommandPath(), cmd.CommandPath())
		},
	}
	cmd.AddCommand(verbs...)
	return cmd
}

// Exit codes. What a guest's command ended with is passed on as it is.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitDenied      = 5
	exitUnreachable = 6
	exitTimeout     = 124
	exitNotExec     = 126
	exitNoCommand   = 127
	exitSignal      = 128
	exitInterrupted = 130
)

// guestExit is the error of a verb whose guest command ended with code.
type guestExit struct{ code int }

func (e *guestExit) Error() string { return fmt.Sprintf("exit code %d", e.code) }

// exitCode is the one table from an error to an exit code.
func (a *app) exitCode(ctx context.Context, err error) int {
	if err == nil {
		return exitOK
	}
	if guest, ok := errors.AsType[*guestExit](err); ok {
		return guest.code
	}
	if ctx.Err() != nil {
		return exitInterrupted
	}
	if _, ok := errors.AsType[*client.UnreachableError](err); ok {
		return exitUnreachable
	}
	switch {
	case !a.started, errors.Is(err, errdef.ErrInvalid):
		return exitUsage
	case errors.Is(err, errdef.ErrNotFound):
		return exitNotFound
	case errors.Is(err, errdef.ErrExists), errors.Is(err, errdef.ErrConflict):
		return exitConflict
	case errors.Is(err, errdef.ErrDenied):
		return exitDenied
	}
	return exitError
}

// printError tells the user what went wrong and what to do about it.
func (a *app) printError(ctx context.Context, err error) {
	if _, ok := errors.AsType[*guestExit](err); err == nil || ok {
		return
	}
	message, code, hint := err.Error(), errdef.Code(err), errdef.Hint(err)
	if remote, ok := errors.AsType[*client.Error](err); ok {
		code, hint = remote.Code, remote.Hint
	}
	if _, ok := errors.AsType[*client.UnreachableError](err); ok && hint == "" {
		hint = "run `tine serve`, or use --local"
	}
	if ctx.Err() != nil {
		message, hint = "interrupted", ""
	}
	if a.flags.json {
		_ = json.NewEncoder(a.Stderr).Encode(struct { // nobody is left to tell
			Error string `json:"error"`
			Code  string `json:"code"`
			Hint  string `json:"hint,omitempty"`
		}{message, code, hint})
		return
	}
	a.notef("tine: %s", message)
	if hint != "" {
		a.notef("hint: %s", hint)
	}
}

// notef writes a line for a person to standard error.
func (a *app) notef(format string, args ...any) {
	_, _ = fmt.Fprintf(a.Stderr, format+"\n", args...) // nobody is left to tell
}

// detached is a context for cleaning up after ctx has ended.
func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
}
