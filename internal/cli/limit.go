package cli

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// limitFlags are the flags that say what a sandbox may take of its host.
type limitFlags struct {
	memory int64
	cpus   float64
	pids   int
	io     string
}

func (l *limitFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Int64Var(&l.memory, "memory-limit", 0, "end a sandbox that has more than so many `MiB` of the host's memory, its monitor included (default the machine's memory and 192)")
	f.Float64Var(&l.cpus, "cpus", 0, "let it use so many `cores`: 0.5 is half of one (default its processors and a half)")
	f.IntVar(&l.pids, "pids-limit", 0, "let its monitor have so many `threads`, at least 16 (default 128)")
	f.StringVar(&l.io, "io-limit", "", "let it read so many `BYTES` from disk in a second, and write as many, as in 10M (default no limit)")
}

// ask puts the flags into a request. What is negative is the daemon's to refuse.
func (l *limitFlags) ask(req *client.ForkRequest) error {
	bytes, err := parseBytes("io-limit", l.io)
	req.MemoryLimitMiB, req.CPULimit, req.PIDsLimit, req.IOLimitBytes = l.memory, l.cpus, l.pids, bytes
	return errors.Join(err, l.check())
}

// check refuses what JSON cannot say.
func (l *limitFlags) check() error {
	if math.IsNaN(l.cpus) || math.IsInf(l.cpus, 0) {
		return fmt.Errorf("%w: --cpus %v", errdef.ErrInvalid, l.cpus)
	}
	return nil
}

// parseBytes reads a number of bytes, with K, M, G or T for powers of 1024.
func parseBytes(flag, text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	digits, shift := text, 0
	if i := strings.IndexByte("KMGT", strings.ToUpper(text)[len(text)-1]); i >= 0 {
		digits, shift = text[:len(text)-1], 10*(i+1)
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%w: --%s %q is no number of bytes as in 4096, 64K or 10M", errdef.ErrInvalid, flag, text)
	}
	return n << shift, nil
}

func (a *app) limitCommand() *cobra.Command {
	var limits limitFlags
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "limit SANDBOX [--memory-limit MIB] [--cpus N] [--pids-limit N] [--io-limit BYTES]",
		Short: "Change what a sandbox may take of its host",
		Long: `Limit changes what a sandbox may take, at once, and for machines that it has
later. What is not said stays as it is; 0 is what a sandbox has that asked for
nothing. A limit that the daemon's host cannot enforce is refused: tine doctor
shows which it can.`,
		Example: `  tine limit sb-1 --cpus 0.5
  tine limit sb-1 --memory-limit 1024 --io-limit 10M
  tine limit sb-1 --cpus 0`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeEach(a.completeSandboxes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			change, err := limits.change(cmd)
			if err != nil {
				return err
			}
			return a.withClient(ctx, func(c *client.Client) error {
				box, err := c.Limit(ctx, args[0], change)
				if err != nil {
					return err
				}
				return a.print(box, limitTable(box))
			})
		}),
	}
	limits.add(cmd)
	return cmd
}

// change is what the flags of cmd ask for.
func (l *limitFlags) change(cmd *cobra.Command) (change client.LimitChange, err error) {
	given := cmd.Flags().Changed
	if given("memory-limit") {
		change.MemoryMiB = &l.memory
	}
	if given("cpus") {
		change.CPUs = &l.cpus
	}
	if given("pids-limit") {
		change.PIDs = &l.pids
	}
	if given("io-limit") {
		bytes, parseErr := parseBytes("io-limit", l.io)
		change.IOBytes, err = &bytes, parseErr
	}
	if change == (client.LimitChange{}) {
		err = fmt.Errorf("%w: limit needs one of --memory-limit, --cpus, --pids-limit and --io-limit", errdef.ErrInvalid)
	}
	return change, errors.Join(err, l.check())
}

func limitTable(b client.Sandbox) table {
	t := table{header: []string{"ID", "MEMORY", "CPUS", "PIDS", "IO PER SECOND"}}
	var l client.Limits
	if b.Limits != nil {
		l = *b.Limits
	}
	memory, pids, io := "-", "-", "-"
	if l.MemoryMiB > 0 {
		memory = strconv.Itoa(l.MemoryMiB) + " MiB"
	}
	if l.PIDs > 0 {
		pids = strconv.Itoa(l.PIDs)
	}
	if l.IOBytes > 0 {
		io = mib(l.IOBytes)
	}
	t.add(b.ID, memory, coresOf(l.CPUMillis), pids, io)
	return t
}

// coresOf writes thousandths of a core as cores.
func coresOf(millis int) string {
	if millis == 0 {
		return "-"
	}
	return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64)
}

// boxUsage is what stats says of one sandbox.
type boxUsage struct {
	ID string `json:"id"`
	client.Usage
	Limits *client.Limits `json:"limits,omitempty"`
}

func (a *app) statsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stats [SANDBOX...]",
		Short: "Show what sandboxes take of their host, once",
		Long: `Stats shows what each sandbox takes of its host, its monitor included, beside
what it may: memory, the part of it that vanishes with the sandbox, and the most
that it has been; processor time, and how long its limit has held it back; its
monitor's threads; and what it has read from disk and written. Without names it
shows all that run.`,
		Example: `  tine stats
  tine stats sb-1 sb-2 --json`,
		ValidArgsFunction: a.completeSandboxes,
		RunE: a.verb(func(ctx context.Context, ids []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				all, err := usages(ctx, c, ids)
				if err != nil {
					return err
				}
				return a.print(all, usageTable(all))
			})
		}),
	}
}

// usages asks for what the named sandboxes take, or all that run.
func usages(ctx context.Context, c *client.Client, ids []string) ([]boxUsage, error) {
	boxes, err := namedBoxes(ctx, c, ids)
	if err != nil {
		return nil, err
	}
	all := []boxUsage{}
	for _, b := range boxes {
		u, err := c.Usage(ctx, b.ID)
		if len(ids) == 0 && errors.Is(err, errdef.ErrNotFound) {
			continue // it has just ended
		}
		if err != nil {
			return nil, err
		}
		all = append(all, boxUsage{ID: b.ID, Usage: u, Limits: b.Limits})
	}
	return all, nil
}

func namedBoxes(ctx context.Context, c *client.Client, ids []string) (boxes []client.Sandbox, err error) {
	for _, id := range ids {
		b, boxErr := c.Sandbox(ctx, id)
		if boxErr != nil {
			return nil, boxErr
		}
		boxes = append(boxes, b)
	}
	if len(ids) > 0 {
		return boxes, nil
	}
	all, err := c.Sandboxes(ctx)
	for _, b := range all {
		if b.State == client.SandboxRunning {
			boxes = append(boxes, b)
		}
	}
	return boxes, err
}

func usageTable(all []boxUsage) table {
	t := table{header: []string{"ID", "MEMORY", "LIMIT", "PRIVATE", "PEAK", "CPU S", "THROTTLED S", "CPUS", "PIDS", "READ", "WRITTEN"}}
	for _, u := range all {
		var l client.Limits
		if u.Limits != nil {
			l = *u.Limits
		}
		limit := "-"
		if l.MemoryMiB > 0 {
			limit = fmt.Sprintf("%d MiB", l.MemoryMiB)
		}
		t.add(u.ID, mib(u.MemoryBytes), limit, mib(u.PrivateBytes), mib(u.PeakBytes), seconds(u.CPUSecs), seconds(u.ThrottledSecs),
			coresOf(l.CPUMillis), strconv.Itoa(u.PIDs), mib(u.ReadBytes), mib(u.WriteBytes))
	}
	return t
}

func seconds(s float64) string { return strconv.FormatFloat(s, 'f', 2, 64) }
