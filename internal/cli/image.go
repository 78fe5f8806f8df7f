package cli

import (
	"context"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
)

func (a *app) imageCommand() *cobra.Command {
	return noun("image", "Build, list and remove images", a.imageBuild(), a.imageLs(), a.imageRm())
}

func (a *app) imageBuild() *cobra.Command {
	var req client.BuildImageRequest
	cmd := &cobra.Command{
		Use:   "build NAME SOURCE",
		Short: "Build an image",
		Long: `Build makes an image of a source:

  debian:SUITE+PACKAGE+PACKAGE   Debian packages
  dir:PATH                       a directory
  ext4:PATH                      a file that holds an ext4 filesystem
  oci:PATH                       an OCI layout
  docker-archive:PATH            what docker save wrote
  docker:REF                     an image in a registry

Paths are on the daemon's host. Building what is built already takes no time.`,
		Example: `  tine image build py debian:bookworm+python3
  tine image build node docker:node:22-slim --warmup 'node -e 0'`,
		Args: cobra.ExactArgs(2),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			req.Name, req.Source = args[0], absolute(args[1])
			return a.withClient(ctx, func(c *client.Client) error {
				news := a.newNews()
				img, err := c.BuildImage(ctx, req, news.report)
				news.close()
				if err != nil {
					return err
				}
				return a.print(img, imageTable(img))
			})
		}),
	}
	f := cmd.Flags()
	f.StringArrayVar(&req.Warmup, "warmup", nil, "shell `command` to run before a snapshot is taken; may be repeated")
	f.StringSliceVar(&req.Imports, "import", nil, "`modules` for the warm interpreter to load")
	f.BoolVar(&req.Refresh, "refresh", false, "build again what is built")
	return cmd
}

// absolute makes a source's relative path absolute: the daemon is elsewhere.
func absolute(source string) string {
	kind, path, found := strings.Cut(source, ":")
	if !found {
		kind, path = "", source
	}
	if kind != "" && kind != "dir" && kind != "ext4" && kind != "oci" && kind != "docker-archive" {
		return source
	}
	abs, err := filepath.Abs(path)
	if err != nil || (!found && !strings.HasPrefix(path, ".") && !strings.HasPrefix(path, "/")) {
		return source
	}
	if !found {
		return abs
	}
	return kind + ":" + abs
}

func imageTable(images ...client.Image) table {
	t := table{header: []string{"NAME", "DIGEST", "SIZE", "KERNEL", "AGE", "SOURCE"}}
	for _, i := range images {
		t.add(i.Name, short(i.Digest), mib(i.SizeBytes), i.Kernel, age(i.CreatedAtUnix), i.Source)
	}
	return t
}

func (a *app) imageLs() *cobra.Command {
	return lister(a, "List images", (*client.Client).Images, imageTable)
}

func (a *app) imageRm() *cobra.Command {
	return &cobra.Command{
		Use:               "rm NAME...",
		Short:             "Remove images",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeImages,
		RunE: a.verb(func(ctx context.Context, names []string) error {
			return a.withClient(ctx, func(c *client.Client) error {
				return a.removeAll(names, func(name string) error { return c.RemoveImage(ctx, name) })
			})
		}),
	}
}
