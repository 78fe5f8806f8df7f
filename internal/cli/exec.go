package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// execFlags are the flags of the verbs that run a command in a guest.
type execFlags struct {
	interactive bool
	terminal    bool
	background  bool
	env         []string
	dir         string
	user        string
	timeout     time.Duration
}

func (e *execFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the first argument is the guest's
	f.BoolVarP(&e.interactive, "interactive", "i", false, "pass standard input on")
	f.BoolVarP(&e.terminal, "tty", "t", false, "give the command a terminal")
	f.StringArrayVarP(&e.env, "env", "e", nil, "set `NAME=VALUE`; may be repeated")
	f.StringVarP(&e.dir, "workdir", "w", "", "working directory")
	f.StringVarP(&e.user, "user", "u", "", "user name or id")
	f.DurationVar(&e.timeout, "timeout", 0, "end the command after so long")
}

// environ turns NAME=VALUE into a map; a NAME alone is passed on from getenv.
func (e *execFlags) environ(getenv func(string) string) (map[string]string, error) {
	env := make(map[string]string, len(e.env))
	for _, pair := range e.env {
		name, value, found := strings.Cut(pair, "=")
		if name == "" {
			return nil, fmt.Errorf("%w: --env %q is not NAME=VALUE", errdef.ErrInvalid, pair)
		}
		if !found {
			value = getenv(name)
		}
		env[name] = value
	}
	return env, nil
}

func (a *app) execCommand() *cobra.Command {
	var flags execFlags
	cmd := &cobra.Command{
		Use:   "exec [-it] ID -- COMMAND...",
		Short: "Run a command in a sandbox",
		Long: `Exec runs a command in a sandbox and exits as it did: with its exit code, 128
plus the signal that ended it, 124 when it ran out of time, 126 or 127 when it
could not be started.

With --json the output is collected and printed when the command has ended.`,
		Example: `  tine exec sb-1 -- uname -a
  tine exec -it sb-1 -- bash
  tar c . | tine exec -i sb-1 -- tar x -C /srv`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: a.completeFirst(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.exec(ctx, c, args[0], dropDashes(args[1:]), flags)
			})
		}),
	}
	flags.add(cmd)
	cmd.Flags().BoolVarP(&flags.background, "detach", "d", false, "leave the command running and print its pid")
	return cmd
}

// dropDashes drops the -- that sets a guest's command apart.
func dropDashes(args []string) []string {
	if len(args) > 0 && args[0] == "--" {
		return args[1:]
	}
	return args
}

func (a *app) runCommand() *cobra.Command {
	var req client.ForkRequest
	var flags execFlags
	var rec recordFlags
	var secrets []string
	var limits limitFlags
	var reach netFlags
	cmd := &cobra.Command{
		Use:   "run --snapshot TAG [-it] -- COMMAND...",
		Short: "Fork a sandbox, run a command in it, remove it",
		Long: `Run exits as the command did: see tine exec --help.

With --deterministic the outcome is the same to the byte whenever and wherever
it is run: time, random numbers, process ids and scheduling are made of the
snapshot, the command and what --seed and --start say. It leaves a signed record
that anyone can check by running it again: see tine verify. Its standard input
(-i) is read to its end, up to 64 MiB, before it starts. With --recorded an
ordinary run is recorded; running that again proves less. Records keep arguments,
variables, input and output in the clear: they are no place for secrets.`,
		Example: `  tine run --snapshot py -- python3 -c 'print(6*7)'
  tine run --local --snapshot py -it -- bash
  tine run --snapshot web --allow example.com -- curl https://example.com/
  tine run --deterministic --seed 7 --record answer.tar --snapshot py -- python3 -c 'import random; print(random.random())'
  tine run --deterministic --file /in/a.csv=a.csv --collect /out/b.csv=b.csv --snapshot py -- convert /in/a.csv /out/b.csv`,
		Args: cobra.MinimumNArgs(1),
	}
	a.forkFlags(cmd, &req)
	secretFlags(cmd, &secrets)
	limits.add(cmd)
	reach.add(cmd)
	flags.add(cmd)
	rec.add(cmd)
	cmd.RunE = a.verb(func(ctx context.Context, args []string) error {
		req.Cold, req.N = coldOf(cmd), 1
		recorded, err := rec.on(cmd)
		if err != nil {
			return err
		}
		if recorded {
			return a.runRecorded(ctx, req.Snapshot, dropDashes(args), flags, rec)
		}
		if req.Secrets, err = a.readSecrets(secrets); err != nil {
			return err
		}
		if err = errors.Join(limits.ask(&req), a.askNet(cmd, reach, &req)); err != nil {
			return err
		}
		return a.withClient(ctx, func(c *client.Client) error {
			return a.run(ctx, c, req, dropDashes(args), flags)
		})
	})
	return cmd
}

func (a *app) run(ctx context.Context, c *client.Client, req client.ForkRequest, args []string, flags execFlags) (err error) {
	boxes, err := c.Fork(ctx, req)
	if err != nil {
		return err
	}
	defer func() {
		after, cancel := detached(ctx)
		defer cancel()
		for _, b := range boxes {
			if rerr := c.RemoveSandbox(after, b.ID); rerr != nil {
				a.notef("tine: remove sandbox %s: %v", b.ID, rerr) // the command's own outcome goes first
			}
		}
	}()
	if len(boxes) != 1 {
		return fmt.Errorf("fork %s: %d sandboxes instead of one", req.Snapshot, len(boxes))
	}
	return a.exec(ctx, c, boxes[0].ID, args, flags)
}

func (a *app) exec(ctx context.Context, c *client.Client, id string, args []string, flags execFlags) error {
	if len(args) == 0 {
		return fmt.Errorf("%w: no command to run", errdef.ErrInvalid)
	}
	env, err := flags.environ(a.Getenv)
	if err != nil {
		return err
	}
	if a.flags.json && !flags.background {
		return a.execJSON(ctx, c, id, args, env, flags)
	}
	req := client.StreamRequest{
		Args: args, Env: env, Dir: flags.dir, User: flags.user, Timeout: flags.timeout,
		Stdin: flags.interactive, Background: flags.background,
	}
	if flags.terminal {
		return a.execTerminal(ctx, c, id, req)
	}
	s, err := c.ExecStream(ctx, id, req)
	if err != nil {
		return notStarted(a, err)
	}
	if flags.background {
		s.Close()
		return a.printPID(s.PID)
	}
	return a.follow(ctx, s, flags.interactive)
}

func (a *app) printPID(pid int) error {
	if a.flags.json {
		return a.printJSON(map[string]int{"pid": pid})
	}
	return a.printf("%d\n", pid)
}

// execJSON collects the output instead of streaming it.
func (a *app) execJSON(ctx context.Context, c *client.Client, id string, args []string, env map[string]string, flags execFlags) error {
	if flags.terminal {
		return fmt.Errorf("%w: --json and -t exclude each other", errdef.ErrInvalid)
	}
	req := client.ExecRequest{Args: args, Env: env, Dir: flags.dir, User: flags.user, Timeout: flags.timeout}
	if flags.interactive {
		stdin, err := io.ReadAll(io.LimitReader(a.Stdin, maxStdin+1))
		if err != nil {
			return fmt.Errorf("read stdin: %w", err)
		}
		if len(stdin) > maxStdin {
			return fmt.Errorf("%w: more than %d bytes of stdin with --json", errdef.ErrInvalid, maxStdin)
		}
		req.Stdin = string(stdin)
	}
	result, err := c.Exec(ctx, id, req)
	if err != nil {
		return err
	}
	if err := a.printJSON(result); err != nil {
		return err
	}
	return guestOutcome(client.Exit{Code: int(result.ExitCode), Signal: result.Signal, TimedOut: result.TimedOut})
}

// maxStdin bounds what --json can send at once.
const maxStdin = 1 << 20

// notStarted turns the failure to start a command, which comes within the
// stream, into the exit codes that shells use.
func notStarted(a *app, err error) error {
	remote, ok := errors.AsType[*client.Error](err)
	if !ok || remote.Status != 0 {
		return err
	}
	code := 0
	switch {
	case errors.Is(err, errdef.ErrNotFound):
		code = exitNoCommand
	case errors.Is(err, errdef.ErrDenied):
		code = exitNotExec
	default:
		return err
	}
	a.notef("tine: %s", remote.Message)
	return &guestExit{code: code}
}

// guestOutcome is the error that makes this program exit as the guest's did.
func guestOutcome(e client.Exit) error {
	switch {
	case e.TimedOut:
		return &guestExit{code: exitTimeout}
	case e.Code < 0:
		return &guestExit{code: exitSignal - e.Code}
	case e.Code != 0:
		return &guestExit{code: e.Code}
	}
	return nil
}

// follow passes input and output between this process and a command.
func (a *app) follow(ctx context.Context, s *client.Stream, stdin bool) error {
	stop := func() {}
	if stdin {
		stop = a.pump(ctx, s)
	}
	exit, err := s.Wait(ctx, a.Stdout, a.Stderr)
	stop()
	if err != nil {
		return err
	}
	if exit.TimedOut {
		a.notef("tine: the command ran out of time")
	}
	return guestOutcome(exit)
}

// pump sends standard input to s until it ends or stop is called.
func (a *app) pump(ctx context.Context, s *client.Stream) (stop func()) {
	in, interrupt := interruptible(a.Stdin)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// The command may end without reading all of its input: no error.
		_ = s.SendStdin(ctx, in)
	}()
	return func() {
		interrupt()
		<-done
	}
}

// execTerminal joins this process's terminal and the command's.
func (a *app) execTerminal(ctx context.Context, c *client.Client, id string, req client.StreamRequest) error {
	in, ok := a.Stdin.(*os.File)
	if !ok {
		return errNoTerminal
	}
	tty, err := openTerminal(in)
	if err != nil {
		return err
	}
	size, err := tty.size()
	if err != nil {
		return err
	}
	req.Terminal = &size
	if term := a.Getenv("TERM"); term != "" && req.Env["TERM"] == "" {
		req.Env["TERM"] = term
	}
	s, err := c.ExecStream(ctx, id, req)
	if err != nil {
		return notStarted(a, err)
	}
	restore, err := tty.raw()
	if err != nil {
		s.Close()
		return err
	}
	unwatch := tty.onResize(func(size client.TerminalSize) {
		_ = s.Resize(ctx, size) // the stream's end says it better
	})
	err = a.follow(ctx, s, req.Stdin)
	unwatch()
	return errors.Join(err, restore())
}

func (a *app) evalCommand() *cobra.Command {
	var req client.EvalRequest
	cmd := &cobra.Command{
		Use:   "eval ID CODE",
		Short: "Run code in a sandbox's warm interpreter",
		Long: `Eval prints what the code prints and then the value of its last expression.
What it defines is there for the next call. CODE may be - for standard input.`,
		Example: `  tine eval sb-1 'x = 6'
  tine eval sb-1 'x * 7'
  tine eval sb-1 - < script.py`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeFirst(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			req.Code = args[1]
			if req.Code == "-" {
				code, err := io.ReadAll(io.LimitReader(a.Stdin, maxStdin))
				if err != nil {
					return fmt.Errorf("read stdin: %w", err)
				}
				req.Code = string(code)
			}
			return a.withClient(ctx, func(c *client.Client) error {
				result, err := c.Eval(ctx, args[0], req)
				if err != nil {
					return err
				}
				return a.printEval(result)
			})
		}),
	}
	cmd.Flags().StringVar(&req.Language, "language", "", "which interpreter (default the image's first)")
	cmd.Flags().DurationVar(&req.Timeout, "timeout", 0, "interrupt the code after so long (default 30s)")
	return cmd
}

func (a *app) printEval(r client.EvalResult) error {
	if a.flags.json {
		if err := a.printJSON(r); err != nil {
			return err
		}
	} else {
		a.errText(r.Stderr)
		text := r.Stdout
		if r.Result != nil {
			text += *r.Result + "\n"
		}
		if err := a.printf("%s", text); err != nil {
			return err
		}
		if r.Traceback != "" {
			a.errText(r.Traceback)
		} else if r.Error != nil {
			a.errText(*r.Error)
		}
	}
	if r.ExitCode != 0 {
		return &guestExit{code: int(r.ExitCode)}
	}
	return nil
}

// errText passes on what a guest wrote to its standard error.
func (a *app) errText(s string) {
	if s == "" {
		return
	}
	a.notef("%s", strings.TrimSuffix(s, "\n"))
}
