package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

// completer lists what a word on the command line could be.
type completer = func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective)

// complete asks the daemon, if there is one and it is quick.
func (a *app) complete(ctx context.Context, list func(context.Context, *client.Client) []string) ([]cobra.Completion, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := a.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	return list(ctx, c), cobra.ShellCompDirectiveNoFileComp
}

func (a *app) completeSandboxes(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (ids []string) {
		boxes, err := c.Sandboxes(ctx)
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, b := range boxes {
			ids = append(ids, cobra.CompletionWithDesc(b.ID, b.SnapshotTag))
		}
		return ids
	})
}

func (a *app) completeSnapshots(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (tags []string) {
		snaps, err := c.Snapshots(ctx)
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, s := range snaps {
			tags = append(tags, s.Tag)
		}
		return tags
	})
}

// completeNodes completes what a node can be named by, digests aside.
func (a *app) completeNodes(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	tags, _ := a.completeSnapshots(cmd, args, word)
	ids, directive := a.completeSandboxes(cmd, args, word)
	return append(tags, ids...), directive
}

func (a *app) completeWorkspaces(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (names []string) {
		all, err := c.Workspaces(ctx)
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, w := range all {
			names = append(names, cobra.CompletionWithDesc(w.Name, string(w.Status)))
		}
		return names
	})
}

func (a *app) completeImages(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	return a.complete(cmd.Context(), func(ctx context.Context, c *client.Client) (names []string) {
		images, err := c.Images(ctx)
		if err != nil {
			return nil // a shell has nowhere to show it
		}
		for _, i := range images {
			names = append(names, i.Name)
		}
		return names
	})
}

// completeFirst completes the first argument only.
func (a *app) completeFirst(f completer) completer {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		return f(cmd, args, word)
	}
}

// completeEach completes each argument in its own way.
func (a *app) completeEach(by ...completer) completer {
	return func(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(by) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return by[len(args)](cmd, args, word)
	}
}

// completeFlag completes a flag that cmd has.
func (a *app) completeFlag(cmd *cobra.Command, flag string, f completer) {
	_ = cmd.RegisterFlagCompletionFunc(flag, f) // it only fails for an unknown flag
}
