package client

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"strconv"

	"github.com/tinevm/tine/internal/wire"
)

// FileInfo is what is known of a file in a sandbox.
type FileInfo = wire.FileInfo

// The types of file.
const (
	TypeFile    = wire.FileInfoTypeFile
	TypeDir     = wire.FileInfoTypeDir
	TypeSymlink = wire.FileInfoTypeSymlink
	TypeOther   = wire.FileInfoTypeOther
)

// ReadFile opens a file for reading. The caller closes it.
func (c *Client) ReadFile(ctx context.Context, id, path string) (io.ReadCloser, error) {
	resp, err := c.send(ctx, request{method: http.MethodGet, path: box(id, "files"), query: pathQuery(path)})
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// WriteFile writes what r has to a file, making it and its directories where
// they are missing. mode is that of a new file; 0 means 0644.
func (c *Client) WriteFile(ctx context.Context, id, path string, mode fs.FileMode, r io.Reader) error {
	query := pathQuery(path)
	if mode != 0 {
		query.Set("mode", octal(mode))
	}
	resp, err := c.send(ctx, request{
		method: http.MethodPut, path: box(id, "files"), query: query, body: r,
		header: http.Header{"Content-Type": {"application/octet-stream"}},
	})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Stat describes a file.
func (c *Client) Stat(ctx context.Context, id, path string) (FileInfo, error) {
	return get[FileInfo](ctx, c, box(id, "files", "stat"), pathQuery(path))
}

// List lists what is in a directory, depth levels down.
func (c *Client) List(ctx context.Context, id, path string, depth int) ([]FileInfo, error) {
	query := pathQuery(path)
	query.Set("depth", itoa(depth))
	return get[[]FileInfo](ctx, c, box(id, "files", "list"), query)
}

// Mkdir makes a directory and those above it. mode 0 means 0755.
func (c *Client) Mkdir(ctx context.Context, id, path string, mode fs.FileMode) error {
	req := wire.MkdirRequest{Path: path}
	if mode != 0 {
		req.Mode = octal(mode)
	}
	return c.call(ctx, http.MethodPost, box(id, "files", "mkdir"), nil, req, nil)
}

// Move renames a file or a directory.
func (c *Client) Move(ctx context.Context, id, from, to string) error {
	return c.call(ctx, http.MethodPost, box(id, "files", "move"), nil, wire.MoveRequest{From: from, To: to}, nil)
}

// Remove removes a file or, with recursive, a directory and all that is in it.
func (c *Client) Remove(ctx context.Context, id, path string, recursive bool) error {
	query := pathQuery(path)
	query.Set("recursive", strconv.FormatBool(recursive))
	return c.call(ctx, http.MethodDelete, box(id, "files"), query, nil, nil)
}

func pathQuery(path string) url.Values { return url.Values{"path": {path}} }

func octal(mode fs.FileMode) string { return fmt.Sprintf("%04o", mode.Perm()) }

func itoa(n int) string { return strconv.Itoa(n) }
