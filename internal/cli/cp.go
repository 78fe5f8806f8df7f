package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/errdef"
)

// maxDepth is how deep a directory is copied out of a sandbox.
const maxDepth = 64

func (a *app) cpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "cp SOURCE DESTINATION",
		Short: "Copy files between this host and a sandbox",
		Long: `Cp copies a file, or a directory with all that is in it. One of the two is in a
sandbox: ID:PATH. A destination that is a directory receives the source under
its own name. Symbolic links and special files are left out, with a note.`,
		Example: `  tine cp script.py sb-1:/root/
  tine cp sb-1:/var/log ./logs`,
		Args: cobra.ExactArgs(2),
		RunE: a.verb(func(ctx context.Context, args []string) error {
			from, fromGuest := parseRemote(args[0])
			to, toGuest := parseRemote(args[1])
			if fromGuest == toGuest {
				return fmt.Errorf("%w: one of source and destination must be ID:PATH", errdef.ErrInvalid)
			}
			return a.withClient(ctx, func(c *client.Client) error {
				var result copied
				var err error
				if toGuest {
					err = a.copyIn(ctx, c, args[0], to, &result)
				} else {
					err = a.copyOut(ctx, c, from, args[1], &result)
				}
				if err != nil || !a.flags.json {
					return err
				}
				return a.printJSON(result)
			})
		}),
	}
}

// remote is a path in a sandbox.
type remote struct{ id, path string }

// copied counts what was copied.
type copied struct {
	Files   int      `json:"files"`
	Bytes   int64    `json:"bytes"`
	Skipped []string `json:"skipped"`
}

// parseRemote reads ID:PATH, which has its colon before any slash.
func parseRemote(s string) (remote, bool) {
	id, p, found := strings.Cut(s, ":")
	if !found || id == "" || strings.Contains(id, "/") {
		return remote{}, false
	}
	if !path.IsAbs(p) {
		p = "/" + p
	}
	return remote{id, p}, true
}

func (a *app) skip(result *copied, name string) {
	result.Skipped = append(result.Skipped, name)
	if !a.flags.quiet {
		a.notef("tine: %s is neither a file nor a directory: left out", name)
	}
}

// copyIn copies from this host into a sandbox.
func (a *app) copyIn(ctx context.Context, c *client.Client, from string, to remote, result *copied) error {
	target, err := guestTarget(ctx, c, to, filepath.Base(from))
	if err != nil {
		return err
	}
	return filepath.WalkDir(from, func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		dest := path.Join(target, filepath.ToSlash(rel))
		info, err := os.Stat(name)
		switch {
		case entry.Type()&fs.ModeSymlink != 0 && name != from:
			a.skip(result, name)
			return nil
		case err != nil:
			return err
		case info.IsDir():
			return c.Mkdir(ctx, to.id, dest, info.Mode())
		case !info.Mode().IsRegular():
			a.skip(result, name)
			return nil
		}
		return sendFile(ctx, c, name, remote{to.id, dest}, info, result)
	})
}

// guestTarget is where a source called base goes: into to if that is a
// directory.
func guestTarget(ctx context.Context, c *client.Client, to remote, base string) (string, error) {
	info, err := c.Stat(ctx, to.id, to.path)
	switch {
	case err == nil && info.Type == client.TypeDir:
		return path.Join(to.path, base), nil
	case err == nil:
		return to.path, nil
	case !errors.Is(err, errdef.ErrNotFound):
		return "", err
	case strings.HasSuffix(to.path, "/"):
		return path.Join(to.path, base), nil
	}
	// Either the path or the sandbox is not there; the copy tells which.
	return to.path, nil
}

func sendFile(ctx context.Context, c *client.Client, name string, to remote, info fs.FileInfo, result *copied) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := c.WriteFile(ctx, to.id, to.path, info.Mode(), f); err != nil {
		return fmt.Errorf("copy %s: %w", name, err)
	}
	result.Files++
	result.Bytes += info.Size()
	return nil
}

// copyOut copies from a sandbox to this host. What the guest says of its files
// is not trusted to stay below the destination: an os.Root sees to that.
func (a *app) copyOut(ctx context.Context, c *client.Client, from remote, to string, result *copied) error {
	info, err := c.Stat(ctx, from.id, from.path)
	if err != nil {
		return err
	}
	if local, serr := os.Stat(to); (serr == nil && local.IsDir()) || strings.HasSuffix(to, "/") {
		base := path.Base(path.Clean(from.path))
		if base == "/" {
			base = "."
		}
		to = filepath.Join(to, base)
	}
	if info.Type != client.TypeDir {
		return a.copyOutFile(ctx, c, remote{from.id, from.path}, to, info, result)
	}
	return a.copyOutDir(ctx, c, from, to, result)
}

func (a *app) copyOutFile(ctx context.Context, c *client.Client, from remote, to string, info client.FileInfo, result *copied) error {
	if info.Type == client.TypeOther {
		return fmt.Errorf("%w: %s is a special file", errdef.ErrInvalid, from.path)
	}
	root, err := openRoot(filepath.Dir(to))
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	return receiveFile(ctx, c, from, root, filepath.Base(to), info, result)
}

func (a *app) copyOutDir(ctx context.Context, c *client.Client, from remote, to string, result *copied) error {
	entries, err := c.List(ctx, from.id, from.path, maxDepth)
	if err != nil {
		return err
	}
	root, err := openRoot(to)
	if err != nil {
		return err
	}
	defer func() { _ = root.Close() }()
	for _, e := range entries {
		rel, err := filepath.Rel(path.Clean(from.path), e.Path)
		if err != nil || !filepath.IsLocal(rel) {
			return fmt.Errorf("the sandbox listed %q, which is not in %s", e.Path, from.path)
		}
		switch e.Type {
		case client.TypeDir:
			err = root.MkdirAll(rel, 0o755)
		case client.TypeFile:
			err = receiveFile(ctx, c, remote{from.id, e.Path}, root, rel, e, result)
		default:
			a.skip(result, e.Path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func openRoot(dir string) (*os.Root, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // a copy is made for the user to read, as cp makes it
		return nil, err
	}
	return os.OpenRoot(dir)
}

func receiveFile(ctx context.Context, c *client.Client, from remote, root *os.Root, rel string, info client.FileInfo, result *copied) error {
	mode := fs.FileMode(0o644)
	if bits, err := strconv.ParseUint(info.Mode, 8, 12); err == nil {
		mode = fs.FileMode(bits).Perm() | 0o600
	}
	r, err := c.ReadFile(ctx, from.id, from.path)
	if err != nil {
		return fmt.Errorf("copy %s: %w", from.path, err)
	}
	defer func() { _ = r.Close() }()
	f, err := root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, r)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("copy %s: %w", from.path, err)
	}
	result.Files++
	result.Bytes += n
	return nil
}
