package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// forkFlags are the flags of the verbs that fork.
func (a *app) forkFlags(cmd *cobra.Command, req *client.ForkRequest) {
	f := cmd.Flags()
	f.StringVarP(&req.Snapshot, "snapshot", "s", "", "snapshot to fork, by tag or digest")
	f.DurationVar(&req.IdleTTL, "idle-ttl", 0, "remove a sandbox that is unused for so long (default never)")
	f.DurationVar(&req.Lifetime, "lifetime", 0, "remove a sandbox when it is so old (default never)")
	f.StringToStringVarP(&req.Labels, "label", "l", nil, "keep `KEY=VALUE` with the sandbox; may be repeated")
	f.Bool("pool", true, "take warm forks where some are parked")
	_ = cmd.MarkFlagRequired("snapshot") // the flag was added above
	a.completeFlag(cmd, "snapshot", a.completeSnapshots)
}

// coldOf reads what --pool says.
func coldOf(cmd *cobra.Command) bool {
	pool, err := cmd.Flags().GetBool("pool")
	return err == nil && !pool
}

func (a *app) forkCommand() *cobra.Command {
	var req client.ForkRequest
	var secrets []string
	var limits limitFlags
	var reach netFlags
	cmd := &cobra.Command{
		Use:   "fork --snapshot TAG",
		Short: "Fork sandboxes from a snapshot",
		Example: `  tine fork --snapshot py -n 10
  id=$(tine fork -q --snapshot py --lifetime 10m)
  tine fork --snapshot py --idle-ttl 5m --idle-suspend
  tine fork --snapshot py --secret TOKEN=@token.txt --secret HOME_KEY
  tine fork --snapshot py --memory-limit 512 --cpus 0.5
  tine fork --snapshot web --allow api.example.com --allow '*.example.org:443' --inspect
  tine fork --snapshot web --allow api.example.com --egress-secret API_TOKEN:api.example.com:Authorization:Bearer`,
		Args: cobra.NoArgs,
	}
	a.forkFlags(cmd, &req)
	secretFlags(cmd, &secrets)
	limits.add(cmd)
	reach.add(cmd)
	cmd.Flags().IntVarP(&req.N, "number", "n", 1, "how many")
	cmd.Flags().BoolVar(&req.IdleSuspend, "idle-suspend", false, "suspend a sandbox after --idle-ttl, rather than remove it")
	cmd.Flags().BoolVar(&req.KeepSecrets, "keep-secrets", false, "forks of the sandboxes have their secrets too")
	cmd.Flags().BoolVar(&req.Partial, "partial", false, "keep what was made although others failed")
	cmd.RunE = a.verb(func(ctx context.Context, _ []string) error {
		req.Cold = coldOf(cmd)
		if req.N < 1 {
			return fmt.Errorf("%w: -n must be at least 1", errdef.ErrInvalid)
		}
		if req.IdleSuspend && req.IdleTTL == 0 {
			return fmt.Errorf("%w: --idle-suspend needs --idle-ttl", errdef.ErrInvalid)
		}
		var err error
		if req.Secrets, err = a.readSecrets(secrets); err != nil {
			return err
		}
		if err = errors.Join(limits.ask(&req), a.askNet(cmd, reach, &req)); err != nil {
			return err
		}
		return a.withClient(ctx, func(c *client.Client) error { return a.fork(ctx, c, req) })
	})
	return cmd
}

func (a *app) fork(ctx context.Context, c *client.Client, req client.ForkRequest) error {
	boxes, err := c.Fork(ctx, req)
	if err != nil {
		return err
	}
	var failed []error
	made := boxes[:0:0]
	for _, b := range boxes {
		if b.ID == "" {
			failed = append(failed, &client.Error{Code: b.Code, Message: b.Error, Hint: b.Hint})
			continue
		}
		made = append(made, b)
	}
	return errors.Join(append([]error{a.print(boxes, sandboxTable(made...))}, failed...)...)
}

func sandboxTable(boxes ...client.Sandbox) table {
	t := table{header: []string{"ID", "SNAPSHOT", "STATE", "PID", "FORK MS", "POOL", "AGE"}}
	for _, b := range boxes {
		pid, pool := "-", "-"
		if b.PID != nil {
			pid = strconv.Itoa(*b.PID)
		}
		if b.FromPool {
			pool = "warm"
		}
		state := string(b.State)
		if b.Reason != "" {
			state += " (" + b.Reason + ")"
		}
		t.add(b.ID, b.SnapshotTag, state, pid, millis(b.ForkMS), pool, age(b.CreatedAtUnix))
	}
	return t
}

func (a *app) lsCommand() *cobra.Command {
	return lister(a, "List sandboxes", (*client.Client).Sandboxes, sandboxTable)
}

func (a *app) rmCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "rm ID... | --all",
		Short: "Remove sandboxes",
		Args: func(cmd *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return errors.New("rm needs sandbox ids, or --all alone")
			}
			return nil
		},
		ValidArgsFunction: a.completeSandboxes,
		RunE: a.verb(func(ctx context.Context, ids []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				if all {
					boxes, err := c.Sandboxes(ctx)
					if err != nil {
						return err
					}
					for _, b := range boxes {
						ids = append(ids, b.ID)
					}
				}
				return a.removeAll(ids, func(id string) error { return c.RemoveSandbox(ctx, id) })
			})
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "remove all sandboxes")
	return cmd
}

// removeAll removes each of names, whatever becomes of the others, and prints
// those that are gone.
func (a *app) removeAll(names []string, remove func(string) error) error {
	var t table
	var failed []error
	gone := []string{}
	for _, name := range names {
		if err := remove(name); err != nil {
			failed = append(failed, err)
			continue
		}
		t.add(name)
		gone = append(gone, name)
	}
	if len(gone) == 0 && !a.flags.json {
		return errors.Join(failed...)
	}
	value := struct {
		Removed []string `json:"removed"`
	}{gone}
	return errors.Join(append(failed, a.print(value, t))...)
}

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "ps ID",
		Short:             "List the processes started in a sandbox",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeSandboxes,
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				processes, err := c.Processes(ctx, args[0])
				if err != nil {
					return err
				}
				t := table{header: []string{"PID", "STATE", "COMMAND"}}
				for _, p := range processes {
					state := "running"
					if !p.Running {
						state = "exited"
					}
					t.add(strconv.Itoa(p.PID), state, strings.Join(p.Args, " "))
				}
				return a.print(processes, t)
			})
		}),
	}
}
