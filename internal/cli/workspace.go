package cli

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

func (a *app) workspaceCommand() *cobra.Command {
	cmd := noun("workspace", "Keep sandboxes under names, to suspend and resume them",
		a.workspaceCreate(), lister(a, "List workspaces", (*client.Client).Workspaces, workspaceTable), a.workspaceRm(),
		a.workspaceVerb("show", "Describe a workspace", (*client.Client).Workspace),
		a.workspaceVerb("suspend", "Suspend a workspace's sandbox", (*client.Client).SuspendWorkspace),
		a.workspaceVerb("resume", "Resume a workspace's sandbox", (*client.Client).ResumeWorkspace),
	)
	cmd.Example = `  tine workspace create mine --snapshot py
  tine workspace suspend mine
  tine workspace resume mine`
	return cmd
}

func workspaceTable(all ...client.Workspace) table {
	t := table{header: []string{"NAME", "SNAPSHOT", "STATUS", "SANDBOX", "AGE", "ACTIVE"}}
	for _, w := range all {
		t.add(w.Name, dash(w.SourceSnapshotTag), string(w.Status), dash(w.SandboxID), age(w.CreatedAtUnix), age(w.LastActiveUnix))
	}
	return t
}

func (a *app) workspaceCreate() *cobra.Command {
	var req client.CreateWorkspaceRequest
	var limit int64
	cmd := &cobra.Command{
		Use:   "create NAME --snapshot TAG",
		Short: "Fork a sandbox that has a name",
		Args:  cobra.ExactArgs(1),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			req.Name = args[0]
			if limit != 0 {
				req.MemoryLimitMiB = &limit
			}
			return a.withClient(ctx, func(c *client.Client) error {
				w, err := c.CreateWorkspace(ctx, req)
				if err != nil {
					return err
				}
				return a.print(w, workspaceTable(w))
			})
		}),
	}
	f := cmd.Flags()
	f.StringVarP(&req.SnapshotTag, "snapshot", "s", "", "snapshot to fork, by tag or digest")
	f.Int64Var(&limit, "memory-limit", 0, "keep a limit in `MiB` with the sandbox")
	_ = cmd.MarkFlagRequired("snapshot") // the flag was added above
	a.completeFlag(cmd, "snapshot", a.completeSnapshots)
	return cmd
}

// workspaceVerb is a verb that takes a workspace and answers with it.
func (a *app) workspaceVerb(use, short string, do func(*client.Client, context.Context, string) (client.Workspace, error)) *cobra.Command {
	return &cobra.Command{
		Use:               use + " NAME",
		Short:             short,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeFirst(a.completeWorkspaces),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				w, err := do(c, ctx, args[0])
				if err != nil {
					return err
				}
				return a.print(w, workspaceTable(w))
			})
		}),
	}
}

func (a *app) workspaceRm() *cobra.Command {
	return &cobra.Command{
		Use:               "rm NAME...",
		Short:             "Remove workspaces and their sandboxes",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeWorkspaces,
		RunE: a.verb(func(ctx context.Context, names []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.removeAll(names, func(name string) error { return c.RemoveWorkspace(ctx, name) })
			})
		}),
	}
}
