package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

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
the state directory, to its owner, and on a TCP address. One that other hosts
can reach needs TLS, and --token-file, --tls-client-ca or a named token (tine
token create). SIGHUP reads tokens and certificates again; a change of their
files does too.`,
		Example: `  tine serve
  tine serve --listen 127.0.0.1:9000 --pool py=5
  tine serve --listen ''            # only the socket
  tine serve --engine firecracker --firecracker /opt/firecracker --cpu-template T2S
  tine serve --listen :8889 --token-file /etc/tine/token --tls-cert cert.pem --tls-key key.pem`,
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
			if err = checkLimits(opts); err != nil {
				return err
			}
			return a.serve(ctx, opts)
		}),
	}
	a.guardFlags(cmd, &opts.Auth)
	auditFlags(cmd, &opts.Audit)
	f := cmd.Flags()
	f.StringVar(&opts.Listen, "listen", "127.0.0.1:8889", "TCP address to answer on, or none if empty")
	f.StringArrayVar(&pools, "pool", nil, "keep warm forks parked: `TAG=N`; may be repeated")
	f.IntVar(&opts.MaxSandboxes, "max-sandboxes", 0, "refuse more sandboxes than `N`, parked ones included (default 1024)")
	isolation := &a.flags.isolation
	f.StringArrayVar(&isolation.NetPrivate, "net-private", nil, "let sandboxes be given rules for the private network `CIDR`; may be repeated (default none)")
	f.StringArrayVar(&isolation.NetResolvers, "net-resolver", nil, "name server `ADDRESS[:PORT]` for sandboxes; may be repeated (default the host's)")
	f.IntVar(&isolation.TotalMemoryMiB, "total-memory", 0, "let all machines together have `MIB` of memory (default nine tenths of the host's)")
	f.IntVar(&isolation.MaxNetworks, "max-networks", 0, "refuse more than `N` sandboxes with a network card (default 4096)")
	f.IntVar(&opts.Branches, "branch-concurrency", 0, "take or write at most `N` branches at once (default 4)")
	f.IntVar(&opts.KeepBranches, "keep-branches", 0, "keep the last `N` branches without a name of each sandbox (default all)")
	f.DurationVar(&opts.DrainTime, "drain-time", 10*time.Second, "when stopped, let requests go on for so long")
	f.StringVar(&opts.OnStop, "on-stop", "leave", "when stopped, `leave|suspend|remove` sandboxes")
	f.Int64Var(&opts.MaxBody, "max-body", 2<<20, "refuse JSON bodies of more `bytes`")
	f.IntVar(&opts.MaxStreams, "max-streams", 1024, "refuse more than `N` exec streams at once")
	f.DurationVar(&opts.HeaderTime, "header-timeout", 10*time.Second, "how long the head of a request may take")
	f.DurationVar(&opts.BodyTime, "read-timeout", 30*time.Second, "how long a JSON body may take, or a pause in a file")
	f.DurationVar(&opts.IdleTime, "idle-timeout", 2*time.Minute, "how long a connection may wait for its next request")
	f.StringVar(&opts.ForgeSnapshot, "forge-snapshot", "", "`TAG` that Forge's gateway forks from (default py, or the only one)")
	f.BoolVarP(&opts.Verbose, "verbose", "v", false, "log every request")
	f.StringVar(&opts.LogFormat, "log-format", "text", "write the log as `text|json`")
	return cmd
}

// checkLimits sees that what was asked for can be: a limit of nothing would
// mean the default.
func checkLimits(o ServeOptions) error {
	switch {
	case o.OnStop != "leave" && o.OnStop != "suspend" && o.OnStop != "remove":
		return fmt.Errorf("%w: --on-stop %q is none of leave, suspend and remove", errdef.ErrInvalid, o.OnStop)
	case o.LogFormat != "text" && o.LogFormat != "json":
		return fmt.Errorf("%w: --log-format %q is neither text nor json", errdef.ErrInvalid, o.LogFormat)
	case o.DrainTime <= 0 || o.HeaderTime <= 0 || o.BodyTime <= 0 || o.IdleTime <= 0:
		return fmt.Errorf("%w: a time must be more than 0", errdef.ErrInvalid)
	case o.MaxBody <= 0 || o.MaxStreams <= 0:
		return fmt.Errorf("%w: --max-body and --max-streams must be at least 1", errdef.ErrInvalid)
	}
	return nil
}

func (a *app) serve(ctx context.Context, opts ServeOptions) error {
	if a.Deps.Serve == nil {
		return missing("daemon")
	}
	opts.HostOptions = a.hostOptions()
	opts.Log = a.Stderr
	opts.Socket = a.flags.socket
	opts.Auth.TokenFile = a.flags.tokenFile
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
guests with little and with much to copy; that takes some ten minutes.

With --deterministic it measures deterministic runs, beside normal forks that
run the same, and the verification of their records.

With --isolation it measures what the jail, networks and the proxy cost, beside
the same without them; the largest of --forks is how many networks there are at
once.`,
		Example: `  tine bench
  tine bench --forks 1,10 --rounds 3 --json
  tine bench --branch --memory 512
  tine bench --deterministic
  tine bench --isolation --rounds 15`,
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
	f.BoolVar(&opts.Deterministic, "deterministic", false, "measure deterministic runs instead of forks")
	f.BoolVar(&opts.Isolate, "isolation", false, "measure the jail and networks instead of forks")
	f.IntSliceVar(&opts.Memory, "memory", nil, "memory of the guests that are branched, in `MiB` (default 512,2048)")
	return cmd
}

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "doctor",
		Short: "Examine this host",
		Long: `Doctor says which engines and tools this host has, and what to do about what is
missing. It exits with 1 if something is. With --engine it looks for that one.`,
		Example: `  tine doctor
  tine doctor --json
  tine doctor --engine firecracker --firecracker /opt/firecracker`,
		Args: cobra.NoArgs,
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
