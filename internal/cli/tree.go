package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

func (a *app) treeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tree",
		Short: "Draw the tree of snapshots and the sandboxes at its nodes",
		Long: `Tree draws every snapshot under the one that it came after, with what it takes
on disk itself and the sandboxes that came from it and were not branched since.
A snapshot that only others need has no tag.`,
		Args: cobra.NoArgs,
		RunE: a.verb(func(ctx context.Context, _ []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				tree, err := c.Tree(ctx)
				if err != nil {
					return err
				}
				return a.print(tree, treeTable(tree, a.flags.quiet))
			})
		}),
	}
}

// drawing is a tree that is being drawn, a row for each node.
type drawing struct {
	children map[string][]client.Node // by the parent's digest
	drawn    map[string]bool
	plain    bool // names without lines
	table    table
}

// treeTable draws a tree. With plain it only lists names, for --quiet.
func treeTable(tree client.Tree, plain bool) table {
	known := map[string]bool{}
	for _, n := range tree.Nodes {
		known[n.Digest] = true
	}
	d := drawing{
		children: map[string][]client.Node{}, drawn: map[string]bool{}, plain: plain,
		table: table{header: []string{"NODE", "DIGEST", "ON DISK", "DEPTH", "AGE", "SANDBOXES"}},
	}
	var roots []client.Node
	for _, n := range tree.Nodes {
		if known[n.Parent] {
			d.children[n.Parent] = append(d.children[n.Parent], n)
		} else {
			roots = append(roots, n)
		}
	}
	for _, n := range append(roots, tree.Nodes...) { // all, should some lead back to themselves
		d.draw(n, "", "")
	}
	return d.table
}

// draw adds a node and those under it. The node's own line begins with first,
// those below with rest.
func (d *drawing) draw(n client.Node, first, rest string) {
	if d.drawn[n.Digest] {
		return
	}
	d.drawn[n.Digest] = true
	name := strings.Join(n.Tags, ", ")
	if name == "" {
		name = "(" + short(n.Digest) + ")"
	}
	if d.plain {
		name, first = n.Tag, ""
		if name == "" {
			name = n.Digest
		}
	}
	if kind := kindOf(n.Deterministic, n.TwinOf); kind != "" && !d.plain {
		name += " [" + kind + "]"
	}
	d.table.add(first+name, short(n.Digest), mib(n.DiskBytes), fmt.Sprint(n.ChainDepth), age(n.CreatedAtUnix), strings.Join(n.Sandboxes, " "))
	under := d.children[n.Digest]
	for i, child := range under {
		if i == len(under)-1 {
			d.draw(child, rest+"└── ", rest+"    ")
		} else {
			d.draw(child, rest+"├── ", rest+"│   ")
		}
	}
}

func (a *app) diffCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "diff A B",
		Short: "Say in what two nodes differ",
		Long: `Diff lists the files that were added (A), removed (D) or changed (M) from one
node to another, and says how much of their memory differs. Each is a snapshot,
by tag or digest, or a sandbox as it is now.`,
		Example: `  tine diff py sb-k3v7xq2m4tza
  tine diff before after --json`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: a.completeEach(a.completeNodes, a.completeNodes),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				d, err := c.Diff(ctx, args[0], args[1])
				if err != nil {
					return err
				}
				return a.printDiff(d)
			})
		}),
	}
}

func (a *app) printDiff(d client.Diff) error {
	var t table
	for _, f := range d.Files {
		if a.flags.quiet {
			t.add(f.Path)
			continue
		}
		switch f.Change {
		case "added":
			t.add("A", f.Path, fmt.Sprintf("%d bytes", f.After))
		case "removed":
			t.add("D", f.Path, fmt.Sprintf("%d bytes", f.Before))
		default:
			t.add("M", f.Path, strings.TrimSpace(fmt.Sprintf("%s %s", f.What, sizes(f.Before, f.After))))
		}
	}
	if err := a.print(d, t); err != nil || a.flags.json || a.flags.quiet {
		return err
	}
	more := ""
	if d.Truncated {
		more = " or more"
	}
	return a.printf("%d files%s differ, and %d of %d pages of memory\n", len(d.Files), more, d.Pages, d.TotalPages)
}

func sizes(before, after int64) string {
	if before == after {
		return ""
	}
	return fmt.Sprintf("%d → %d bytes", before, after)
}
