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

func (a *app) snapshotCommand() *cobra.Command {
	return noun("snapshot", "Create, list and remove snapshots",
		a.snapshotCreate(), a.snapshotLs(), a.snapshotInfo(), a.snapshotRm(), a.snapshotCheck(), a.snapshotGC(), a.snapshotPool(),
		a.snapshotCompact(), a.snapshotFlatten(), a.snapshotPrune(), a.snapshotVerify())
}

func (a *app) snapshotCreate() *cobra.Command {
	var req client.CreateSnapshotRequest
	var shift int
	var allow ruleFlags
	var cmd *cobra.Command
	cmd = &cobra.Command{
		Use:   "create TAG",
		Short: "Boot an image, warm it up and freeze it",
		Example: `  tine snapshot create py --image py
  tine snapshot create ml --image py --memory 1024 --import numpy,pandas --warmup 'python3 -c 0'
  tine snapshot create web --image py --net --warmup 'python3 -c "import ssl"'
  tine snapshot create deps --image py --net --allow '*.example.com:443' --warmup 'fetch-models'
  tine snapshot create same --image py --deterministic --warmup 'python3 -c 0'`,
		Args: cobra.ExactArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			req.Tag = args[0]
			if req.Image == "" {
				req.Image = req.Tag
			}
			if cmd.Flags().Changed("clock-shift") {
				req.ClockShift = &shift
			}
			rules, err := allow.read()
			if err != nil {
				return err
			}
			if len(rules) > 0 {
				req.NetAllow = client.EgressRules(rules...)
			}
			return a.withClient(ctx, func(c *client.Client) error {
				news := a.newNews()
				snap, err := c.CreateSnapshot(ctx, req, news.report)
				news.close()
				if err != nil {
					return err
				}
				return a.print(snap, snapshotTable(snap))
			})
		}),
	}
	f := cmd.Flags()
	f.StringVar(&req.Image, "image", "", "image to boot, by name or digest (default TAG)")
	f.IntVar(&req.MemoryMiB, "memory", 0, "the machine's memory in `MiB` (default the daemon's)")
	f.IntVar(&req.DiskMiB, "disk", 0, "give it a scratch disk of so many `MiB`, which what is written goes to (default none: it stays in memory)")
	f.BoolVar(&req.Net, "net", false, "give it, and all its forks, a network card (default none: no network but loopback)")
	allow.add(cmd, "let the warm-up")
	f.IntVar(&req.VCPUs, "cpus", 0, "the machine's processors (default the daemon's)")
	f.StringArrayVar(&req.Warmup, "warmup", nil, "shell `command` to run before freezing; may be repeated")
	f.StringSliceVar(&req.Imports, "import", nil, "`modules` for the warm interpreter to load")
	f.BoolVar(&req.Replace, "replace", false, "move the tag if it exists")
	f.BoolVar(&req.Deterministic, "deterministic", false, "make it for tine run --deterministic: making it again gives the same bytes")
	f.IntVar(&shift, "clock-shift", 2, "an instruction takes 2 to this power `ns` of a deterministic guest's time: 0 to 10")
	a.completeFlag(cmd, "image", a.completeImages)
	return cmd
}

func snapshotTable(snaps ...client.Snapshot) table {
	t := table{header: []string{"TAG", "DIGEST", "STATUS", "IMAGE", "MEMORY", "ON DISK", "DEPTH", "POOL", "AGE", "NOTE"}}
	for _, s := range snaps {
		pool := "-"
		if s.Pool != nil && s.Pool.Size > 0 {
			pool = fmt.Sprintf("%d/%d", s.Pool.Ready, s.Pool.Size)
		}
		memory, onDisk := "-", "-" // while it is being written
		if s.Status == client.SnapshotReady {
			memory, onDisk = fmt.Sprintf("%d MiB", s.MemoryMiB), mib(s.MemoryPhysicalBytes)
		}
		t.add(s.Tag, dash(short(s.Digest)), string(s.Status), dash(s.Image), memory, onDisk, strconv.Itoa(s.ChainDepth), pool, age(s.CreatedAtUnix), noteOf(s))
	}
	return t
}

// noteOf is what distinguishes a snapshot from most others.
func noteOf(s client.Snapshot) string {
	if s.Net {
		return "network card"
	}
	return kindOf(s.Deterministic, s.TwinOf)
}

// kindOf marks what is not for forks.
func kindOf(deterministic bool, twinOf string) string {
	switch {
	case twinOf != "":
		return "twin of " + twinOf
	case deterministic:
		return "deterministic"
	}
	return ""
}

func (a *app) snapshotLs() *cobra.Command {
	return lister(a, "List snapshots", (*client.Client).Snapshots, snapshotTable)
}

func (a *app) snapshotInfo() *cobra.Command {
	return &cobra.Command{
		Use:               "info TAG",
		Short:             "Describe a snapshot",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSnapshots,
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				d, err := c.Snapshot(ctx, args[0])
				if err != nil {
					return err
				}
				return a.print(d, detailTable(d))
			})
		}),
	}
}

func detailTable(d client.SnapshotDetail) table {
	var t table
	t.add("tag", d.Tag)
	t.add("digest", d.Digest)
	t.add("image", strings.TrimSpace(d.Image+" "+short(d.ImageDigest)))
	t.add("engine", d.Engine+" "+d.EngineVersion)
	if d.Host != nil {
		t.add("host", hostLine(*d.Host))
	}
	machine := fmt.Sprintf("%d MiB, %d CPU", d.MemoryMiB, d.VCPUs)
	if d.DiskMiB > 0 {
		machine += fmt.Sprintf(", disk of %d MiB", d.DiskMiB)
	}
	if d.Net {
		machine += ", network card"
	}
	t.add("machine", machine)
	if d.Deterministic {
		t.add("deterministic", fmt.Sprintf("yes, clock shift %d", d.ClockShift))
	}
	if d.TwinOf != "" {
		t.add("twin of", d.TwinOf)
	}
	t.add("memory", fmt.Sprintf("%s, %s on disk", mib(d.MemoryLogicalBytes), mib(d.MemoryPhysicalBytes)))
	t.add("device state", mib(d.VmstateBytes))
	if d.Mode != "" {
		t.add("branch", fmt.Sprintf("of %s, %s, paused for %d ms", d.BranchedFrom, d.Mode, d.PauseMS))
	}
	if d.ChainDepth > 0 {
		t.add("layers", fmt.Sprintf("%d, on %s", d.ChainDepth, strings.Join(d.Ancestors, " ")))
	}
	if d.Flat {
		t.add("flat", mib(d.FlatPhysicalBytes)+" on disk")
	}
	if len(d.Dependents) > 0 {
		t.add("dependents", strings.Join(d.Dependents, " "))
	}
	t.add("warm-up", strings.Join(d.Warmup, "; "))
	t.add("languages", strings.Join(d.Languages, " "))
	t.add("pool", fmt.Sprintf("%d/%d", d.Pool.Ready, d.Pool.Size))
	t.add("sandboxes", strings.Join(d.Sandboxes, " "))
	t.add("age", age(d.CreatedAtUnix))
	t.add("directory", d.Dir)
	return t
}

// hostLine names what another host must be like to fork the snapshot.
func hostLine(h client.SnapshotHost) string {
	c := h.CPU
	cpu := fmt.Sprintf("%s family %d model %d stepping %d", c.Vendor, c.Family, c.Model, c.Stepping)
	switch {
	case h.Template != "":
		cpu = fmt.Sprintf("CPU template %s on %s", h.Template, c.Vendor)
	case c.Name != "":
		cpu = fmt.Sprintf("%s (%s)", c.Name, cpu)
	}
	return cpu + ", Linux " + h.Kernel
}

func (a *app) snapshotRm() *cobra.Command {
	var opts client.RemoveSnapshotOptions
	cmd := &cobra.Command{
		Use:               "rm TAG...",
		Short:             "Remove snapshots",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeSnapshots,
		RunE: a.verb(func(ctx context.Context, tags []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.removeAll(tags, func(tag string) error { return c.RemoveSnapshot(ctx, tag, opts) })
			})
		}),
	}
	cmd.Flags().BoolVar(&opts.Cascade, "cascade", false, "remove the snapshots made from it as well")
	cmd.Flags().BoolVar(&opts.Force, "force", false, "remove its tag alone although others were made from it: they go on working")
	cmd.MarkFlagsMutuallyExclusive("cascade", "force")
	return cmd
}

func (a *app) snapshotCheck() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Read every snapshot again and compare it with its digest",
		Args:  cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				news := a.newNews()
				report, err := c.CheckSnapshots(ctx, news.report)
				news.close()
				if err != nil {
					return err
				}
				return a.printCheckReport(report)
			})
		}),
	}
}

func (a *app) printCheckReport(report client.CheckReport) error {
	var t table
	for _, p := range report.Problems {
		t.add(p.Snapshot, p.Problem)
	}
	if report.OK {
		t.add(fmt.Sprintf("%d snapshots are as they were written", report.Checked))
	}
	if err := a.print(report, t); err != nil {
		return err
	}
	if !report.OK {
		return fmt.Errorf("%d problems in %d snapshots", len(report.Problems), report.Checked)
	}
	return nil
}

func (a *app) snapshotVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify TAG",
		Short: "Make a deterministic snapshot again and compare",
		Long: `Verify makes a deterministic snapshot again, of the same image and warm-up, and
compares the memory, byte for byte. That takes as long as making it did, and
nothing is kept of it. The state of the devices is compared too, and told: its
clock may be a tick further on a busy host, which no run in a snapshot sees.

It exits with 0 when it comes out the same, 1 when it does not, and 4 when that
cannot be found out: the image is gone, or this is another version of the engine.`,
		Example: `  tine snapshot verify same
  tine snapshot verify same --json`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeSnapshots),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				news := a.newNews()
				v, err := c.VerifySnapshot(ctx, args[0], news.report)
				news.close()
				if err != nil {
					return err
				}
				return a.printRemade(v)
			})
		}),
	}
}

func (a *app) printRemade(v client.SnapshotVerification) error {
	t := table{}
	t.add(string(v.Result), v.Tag, short(v.Digest))
	for _, p := range []struct {
		what string
		pair *client.DigestPair
	}{{"memory", v.Memory}, {"devices", v.Device}} {
		switch {
		case p.pair == nil:
		case p.pair.Same:
			t.add(p.what, "the same", short(p.pair.Was))
		default:
			t.add(p.what, "was "+short(p.pair.Was), "is "+short(p.pair.Is))
		}
	}
	if err := a.print(v, t); err != nil {
		return err
	}
	switch string(v.Result) {
	case client.Verified:
		return nil
	case client.Mismatch:
		return fmt.Errorf("snapshot %s does not come out the same", v.Tag)
	}
	return fmt.Errorf("%w: snapshot %s: %s", errdef.ErrConflict, v.Tag, strings.Join(v.Missing, "; "))
}

func (a *app) snapshotGC() *cobra.Command {
	return &cobra.Command{
		Use:   "gc",
		Short: "Remove what no tag and no sandbox uses",
		Args:  cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				report, err := c.CollectSnapshots(ctx)
				if err != nil {
					return err
				}
				var t table
				for _, digest := range report.Removed {
					t.add(digest)
				}
				if err := a.print(report, t); err != nil {
					return err
				}
				if !a.flags.quiet && !a.flags.json {
					a.notef("freed %s", mib(report.FreedBytes))
				}
				return nil
			})
		}),
	}
}

func (a *app) snapshotCompact() *cobra.Command {
	var to string
	cmd := &cobra.Command{
		Use:               "compact TAG --to NEW",
		Short:             "Make a snapshot that needs no other, of one that does",
		Long:              `Compact writes the whole memory of a snapshot of layers as a new snapshot. The old one stays.`,
		Example:           `  tine snapshot compact attempt-3 --to best`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeSnapshots),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.longSnapshot(ctx, func(c *client.Client, report func(client.Progress)) (client.Snapshot, error) {
				return c.Compact(ctx, args[0], to, report)
			})
		}),
	}
	cmd.Flags().StringVar(&to, "to", "", "the new snapshot's `TAG`")
	_ = cmd.MarkFlagRequired("to") // the flag was added above
	return cmd
}

func (a *app) snapshotFlatten() *cobra.Command {
	return &cobra.Command{
		Use:   "flatten TAG",
		Short: "Keep the whole memory of a snapshot of layers beside them",
		Long: `Flatten makes forks of a snapshot of layers as quick as those of one without, at
the price of disk. It stays the same snapshot.`,
		Example:           `  tine snapshot flatten attempt-3`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeSnapshots),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.longSnapshot(ctx, func(c *client.Client, report func(client.Progress)) (client.Snapshot, error) {
				return c.Flatten(ctx, args[0], report)
			})
		}),
	}
}

func (a *app) snapshotPrune() *cobra.Command {
	var keep int
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "prune --keep-last N",
		Short: "Remove old branches whose tags nobody chose",
		Long: `Prune removes, of each sandbox's branches whose tags nobody chose, all but the
newest N. Branches with a tag of somebody's choice stay, and so does what a
sandbox or another snapshot needs.`,
		Example: `  tine snapshot prune --keep-last 5 --dry-run`,
		Args:    cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				report, err := c.Prune(ctx, keep, dryRun)
				if err != nil {
					return err
				}
				return a.printPruned(report)
			})
		}),
	}
	cmd.Flags().IntVar(&keep, "keep-last", 0, "how many to keep of each sandbox's")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only say what would go")
	_ = cmd.MarkFlagRequired("keep-last") // the flag was added above
	return cmd
}

func (a *app) printPruned(report client.PruneReport) error {
	var t table
	for _, tag := range report.Removed {
		t.add(tag)
	}
	if err := a.print(report, t); err != nil || a.flags.quiet || a.flags.json {
		return err
	}
	if report.DryRun {
		a.notef("would free %s", mib(report.FreedBytes))
	} else {
		a.notef("freed %s", mib(report.FreedBytes))
	}
	return nil
}

func (a *app) snapshotPool() *cobra.Command {
	return &cobra.Command{
		Use:   "pool TAG [SIZE]",
		Short: "Show or set how many warm forks are kept parked",
		Example: `  tine snapshot pool py 5
  tine snapshot pool py 0`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: a.completeSnapshots,
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				pool, err := poolOf(ctx, c, args)
				if err != nil {
					return err
				}
				t := table{header: []string{"TAG", "READY", "SIZE"}}
				t.add(args[0], strconv.Itoa(pool.Ready), strconv.Itoa(pool.Size))
				return a.print(pool, t)
			})
		}),
	}
}

func poolOf(ctx context.Context, c *client.Client, args []string) (client.Pool, error) {
	if len(args) == 1 {
		return c.Pool(ctx, args[0])
	}
	size, err := strconv.Atoi(args[1])
	if err != nil {
		return client.Pool{}, fmt.Errorf("%w: pool size %q is not a number", errdef.ErrInvalid, args[1])
	}
	return c.SetPool(ctx, args[0], size)
}
