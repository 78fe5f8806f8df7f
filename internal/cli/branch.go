package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// maxSecret bounds a secret's file.
const maxSecret = 64 << 10

func (a *app) branchCommand() *cobra.Command {
	var req client.BranchRequest
	var live bool
	cmd := &cobra.Command{
		Use:   "branch ID",
		Short: "Take a snapshot of a sandbox, which goes on",
		Long: `Branch takes a snapshot of a sandbox as it is at this instant: its memory,
processes and files. The sandbox goes on, and can be branched again at any time.

  live   pauses it for some milliseconds, and reads its memory while it goes on
  diff   pauses it for as long as it takes to copy what it has changed
  full   makes a snapshot that needs no other; it takes the longest

Where the host does not allow live, it is diff, and a warning says so.`,
		Example: `  tine branch sb-k3v7xq2m4tza --tag before-upgrade
  tine branch sb-k3v7xq2m4tza -n 4
  tine branch sb-k3v7xq2m4tza --tag big --no-wait`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeSandboxes),
	}
	f := cmd.Flags()
	f.StringVar(&req.Tag, "tag", "", "the new snapshot's tag (default one is made up, and prune may remove it)")
	f.StringVar(&req.Mode, "mode", client.ModeLive, "how to take the memory: live, diff or full")
	f.BoolVar(&live, "live", false, "the same as --mode live")
	f.BoolVar(&req.NoWait, "no-wait", false, "return as soon as the sandbox goes on; the snapshot is listed as writing until it is ready")
	f.IntVarP(&req.N, "number", "n", 0, "fork so many sandboxes from it at once")
	f.BoolVar(&req.Replace, "replace", false, "move the tag if it exists")
	cmd.MarkFlagsMutuallyExclusive("mode", "live")
	cmd.MarkFlagsMutuallyExclusive("no-wait", "number")
	a.completeFlag(cmd, "mode", cobra.FixedCompletions([]cobra.Completion{client.ModeLive, client.ModeDiff, client.ModeFull}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = a.verb(func(ctx context.Context, args []string) error {
		return a.withClient(ctx, func(c *client.Client) error { return a.branch(ctx, c, args[0], req) })
	})
	return cmd
}

func (a *app) branch(ctx context.Context, c *client.Client, id string, req client.BranchRequest) error {
	news := a.newNews()
	snap, err := c.Branch(ctx, id, req, news.report)
	news.close()
	if err != nil {
		return err
	}
	if snap.Warning != "" && !a.flags.json {
		a.notef("tine: warning: %s", snap.Warning)
	}
	if a.flags.json || len(snap.Sandboxes) == 0 {
		return a.print(snap, branchTable(snap))
	}
	if !a.flags.quiet {
		err = a.print(snap, branchTable(snap))
	}
	return errors.Join(err, a.print(snap, sandboxTable(snap.Sandboxes...)))
}

func branchTable(s client.Snapshot) table {
	t := table{header: []string{"TAG", "DIGEST", "STATUS", "MODE", "PAUSE MS", "ON DISK", "DEPTH"}}
	t.add(s.Tag, dash(short(s.Digest)), string(s.Status), dash(s.Mode), fmt.Sprint(s.PauseMS), mib(s.MemoryPhysicalBytes), fmt.Sprint(s.ChainDepth))
	return t
}

// dash stands for what is not known.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) rollbackCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rollback ID NODE",
		Short: "Put a sandbox back to a node of its tree",
		Long: `Rollback puts a sandbox back, in place, to a snapshot in its tree, by tag or
digest: its memory, processes and files are as they were. It keeps its id. What
it did since is lost, unless it was branched.`,
		Example: `  tine branch sb-k3v7xq2m4tza --tag before
  tine rollback sb-k3v7xq2m4tza before`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeEach(a.completeSandboxes, a.completeSnapshots),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				b, err := c.Rollback(ctx, args[0], args[1])
				if err != nil {
					return err
				}
				return a.print(b, sandboxTable(b))
			})
		}),
	}
}

func (a *app) promoteCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "promote FROM TAG",
		Short: "Point a tag at a node, whatever it pointed at before",
		Long: `Promote points TAG at FROM: a snapshot, by tag or digest, or a sandbox, which is
branched first. What TAG pointed at before stays as long as something needs it.`,
		Example: `  tine promote sb-k3v7xq2m4tza py
  tine promote attempt-3 best`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeEach(a.completeNodes, a.completeSnapshots),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.longSnapshot(ctx, func(c *client.Client, report func(client.Progress)) (client.Snapshot, error) {
				return c.Promote(ctx, args[0], args[1], report)
			})
		}),
	}
}

// longSnapshot does work that takes long and ends with a snapshot.
func (a *app) longSnapshot(ctx context.Context, work func(*client.Client, func(client.Progress)) (client.Snapshot, error)) error {
	return a.withClient(ctx, func(c *client.Client) error {
		news := a.newNews()
		snap, err := work(c, news.report)
		news.close()
		if err != nil {
			return err
		}
		return a.print(snap, snapshotTable(snap))
	})
}

func (a *app) suspendCommand() *cobra.Command {
	return a.eachSandbox(&cobra.Command{
		Use:   "suspend ID...",
		Short: "Write sandboxes' memory to disk and end their machines",
		Long: `Suspend writes the memory of sandboxes to disk and ends their machines. They
keep their ids. Whatever uses one resumes it, and so does tine resume.`,
		Example: `  tine suspend sb-k3v7xq2m4tza
  tine exec sb-k3v7xq2m4tza -- uptime     # resumes it`,
	}, (*client.Client).Suspend)
}

func (a *app) resumeCommand() *cobra.Command {
	return a.eachSandbox(&cobra.Command{
		Use:     "resume ID...",
		Short:   "Let suspended sandboxes run again",
		Example: `  tine resume sb-k3v7xq2m4tza`,
	}, (*client.Client).Resume)
}

// eachSandbox completes a verb that does one thing to each of its sandboxes,
// whatever becomes of the others, and prints those that it has done it to.
func (a *app) eachSandbox(cmd *cobra.Command, do func(*client.Client, context.Context, string) (client.Sandbox, error)) *cobra.Command {
	cmd.Args = cobra.MinimumNArgs(1)
	cmd.ValidArgsFunction = a.completeSandboxes
	cmd.RunE = a.verb(func(ctx context.Context, ids []string) error {
		return a.withClient(ctx, func(c *client.Client) error {
			var failed []error
			done := []client.Sandbox{}
			for _, id := range ids {
				b, err := do(c, ctx, id)
				if err != nil {
					failed = append(failed, err)
					continue
				}
				done = append(done, b)
			}
			if len(done) == 0 && !a.flags.json {
				return errors.Join(failed...)
			}
			return errors.Join(append(failed, a.print(done, sandboxTable(done...)))...)
		})
	})
	return cmd
}

// secretFlags are the flags of the verbs that give secrets to a sandbox.
func secretFlags(cmd *cobra.Command, secrets *[]string) {
	cmd.Flags().StringArrayVar(secrets, "secret", nil,
		"a file in /run/tine/secrets: `NAME=VALUE`, NAME=@FILE, or NAME alone for that variable of the environment; may be repeated")
}

// readSecrets reads what the --secret flags say.
func (a *app) readSecrets(flags []string) (map[string]string, error) {
	secrets := make(map[string]string, len(flags))
	for _, flag := range flags {
		name, value, found := strings.Cut(flag, "=")
		if name == "" {
			return nil, fmt.Errorf("%w: --secret needs a name", errdef.ErrInvalid) // the value is not for terminals
		}
		path, isFile := strings.CutPrefix(value, "@")
		switch {
		case isFile:
			content, err := readSecret(path)
			if err != nil {
				return nil, fmt.Errorf("%w: --secret %s: %w", errdef.ErrInvalid, name, err)
			}
			value = content
		case !found:
			if value = a.Getenv(name); value == "" {
				return nil, fmt.Errorf("%w: --secret %s: there is no such variable in the environment", errdef.ErrInvalid, name)
			}
		}
		secrets[name] = value
	}
	return secrets, nil
}

func readSecret(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err == nil && len(data) > maxSecret {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxSecret)
	}
	return string(data), err
}
