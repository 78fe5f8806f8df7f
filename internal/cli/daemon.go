package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

func (a *app) serveCommand() *cobra.Command {
	var opts ServeOptions
	var pools []string
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Serve runs the daemon until it is interrupted. It answers on a unix socket in
the state directory and on a TCP address, which must be a loopback one: there is
no authorisation yet.`,
		Example: `  tine serve
  tine serve --listen 127.0.0.1:9000 --pool py=5
  tine serve --listen ''            # only the socket`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			var err error
			if opts.Pool, err = parsePools(pools); err != nil {
				return err
			}
			if opts.KeepBranches < 0 {
				return fmt.Errorf("%w: --keep-branches %d", errdef.ErrInvalid, opts.KeepBranches)
			}
			if opts.Branches < 0 || (opts.Branches == 0 && cmd.Flags().Changed("branch-concurrency")) {
				return fmt.Errorf("%w: --branch-concurrency must be at least 1", errdef.ErrInvalid)
			}
			return a.serve(ctx, opts)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&opts.Listen, "listen", "127.0.0.1:8889", "TCP address to answer on, or none if empty")
	f.StringArrayVar(&pools, "pool", nil, "keep warm forks parked: `TAG=N`; may be repeated")
	f.IntVar(&opts.MaxSandboxes, "max-sandboxes", 0, "refuse more sandboxes than `N`, parked ones included (default 1024)")
	f.IntVar(&opts.Branches, "branch-concurrency", 0, "take or write at most `N` branches at once (default 4)")
	f.IntVar(&opts.KeepBranches, "keep-branches", 0, "keep the last `N` branches without a name of each sandbox (default all)")
	f.BoolVarP(&opts.Verbose, "verbose", "v", false, "log every request")
	return cmd
}

func (a *app) serve(ctx context.Context, opts ServeOptions) error {
	if a.Deps.Serve == nil {
		return missing("daemon")
	}
	opts.HostOptions = a.hostOptions()
	opts.Log = a.Stderr
	opts.Socket = a.flags.socket
	opts.Ready = func(addresses []string) {
		if !a.flags.quiet {
			a.notef("tine: serving on %s", strings.Join(addresses, " and "))
		}
	}
	news := a.newNews()
	defer news.close()
	return a.Deps.Serve(news.context(ctx), opts)
}

// parsePools reads TAG=N.
func parsePools(flags []string) (map[string]int, error) {
	pools := map[string]int{}
	for _, flag := range flags {
		tag, size, found := strings.Cut(flag, "=")
		n, err := strconv.Atoi(size)
		if !found || err != nil || n < 0 || tag == "" {
			return nil, fmt.Errorf("%w: --pool %q is not TAG=N", errdef.ErrInvalid, flag)
		}
		pools[tag] = n
	}
	return pools, nil
}

func (a *app) demoCommand() *cobra.Command {
	var n int
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Build an image, freeze it, and fork real machines from it",
		Args:  cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			if a.Deps.Demo == nil {
				return missing("demo")
			}
			news := a.newNews()
			defer news.close()
			return a.Deps.Demo(news.context(ctx), DemoOptions{HostOptions: a.hostOptions(), N: n, Out: a.Stdout, JSON: a.flags.json})
		}),
	}
	cmd.Flags().IntVarP(&n, "number", "n", 10, "how many sandboxes to fork")
	return cmd
}

func (a *app) benchCommand() *cobra.Command {
	var opts BenchOptions
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure forks on this host",
		Long: `Bench measures cold boots, forks and round trips in a daemon of its own, and
beside them the floor: the same steps done by hand with the bare monitor.

With --branch it measures branches, roll-backs and suspensions instead, of
guests with little and with much to copy; that takes some ten minutes.`,
		Example: `  tine bench
  tine bench --forks 1,10 --rounds 3 --json
  tine bench --branch --memory 512`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			if a.Deps.Bench == nil {
				return missing("bench")
			}
			opts.HostOptions, opts.Out, opts.JSON = a.hostOptions(), a.Stdout, a.flags.json
			news := a.newNews()
			defer news.close()
			return a.Deps.Bench(news.context(ctx), opts)
		}),
	}
	f := cmd.Flags()
	f.StringVarP(&opts.Snapshot, "snapshot", "s", "py", "snapshot to fork from")
	f.IntSliceVar(&opts.Forks, "forks", []int{1, 10, 50, 100}, "how many to fork in parallel")
	f.IntVar(&opts.Rounds, "rounds", 5, "how often to repeat each measurement")
	f.BoolVar(&opts.Floor, "floor", true, "measure the bare monitor beside it")
	f.BoolVar(&opts.Branch, "branch", false, "measure branches instead of forks")
	f.IntSliceVar(&opts.Memory, "memory", nil, "memory of the guests that are branched, in `MiB` (default 512,2048)")
	return cmd
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Examine this host",
		Long:  `Doctor says which engines and tools this host has, and what to do about what is missing. It exits with 1 if something is.`,
		Args:  cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			if a.Deps.Doctor == nil {
				return missing("doctor")
			}
			checks, err := a.Deps.Doctor(ctx, a.hostOptions())
			if err != nil {
				return err
			}
			return a.printChecks(checks)
		}),
	}
}

func (a *app) printChecks(checks []client.Check) error {
	var t table
	failed := 0
	for _, c := range checks {
		t.add(c.Name, string(c.Status), c.Detail)
		if c.Hint != "" {
			t.add("", "", "hint: "+c.Hint)
		}
		if c.Status == client.CheckFail {
			failed++
		}
	}
	err := a.print(checks, t)
	if err == nil && failed > 0 {
		err = fmt.Errorf("%d of %d checks failed", failed, len(checks))
	}
	return err
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print this program's version",
		Args:  cobra.NoArgs,
		RunE: a.verb(func(context.Context, []string) error {
			if a.flags.json {
				return a.printJSON(map[string]string{"version": a.Version})
			}
			return a.printf("tine %s\n", a.Version)
		}),
	}
}
