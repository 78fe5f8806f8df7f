package api

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/wire"
)

const (
	maxPath  = 4096
	maxDepth = 64
)

// checkPath returns ErrInvalid unless p is an absolute path. Where it leads is
// the guest's affair.
func checkPath(p string) error {
	if !path.IsAbs(p) || len(p) > maxPath || strings.ContainsRune(p, 0) {
		return fmt.Errorf("%w: path %q is not an absolute path", errdef.ErrInvalid, p)
	}
	return nil
}

// parseMode reads permission bits in octal; "" is 0, which is the default.
func parseMode(s string) (uint32, error) {
	if s == "" {
		return 0, nil
	}
	bits, err := strconv.ParseUint(s, 8, 12)
	if err != nil {
		return 0, fmt.Errorf("%w: mode %q is not octal", errdef.ErrInvalid, s)
	}
	return uint32(bits), nil
}

// onFile runs f with a session to the sandbox's agent if path is one.
func (s *server) onFile(ctx context.Context, id, path string, f func(context.Context, *guest.Client) error) error {
	if err := checkPath(path); err != nil {
		return err
	}
	return s.Sandboxes.With(ctx, id, f)
}

// ReadFile answers GET /v1/sandboxes/{id}/files.
func (s *server) ReadFile(ctx context.Context, r wire.ReadFileRequestObject) (wire.ReadFileResponseObject, error) {
	return fileContent(func(w http.ResponseWriter) error {
		return s.onFile(ctx, r.ID, r.Params.Path, func(ctx context.Context, g *guest.Client) error {
			f, err := g.ReadFile(ctx, r.Params.Path, guest.ReadOptions{})
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }() //nolint:contextcheck // a file knows its own; it was only read
			w.Header().Set("Content-Type", "application/octet-stream")
			w.WriteHeader(http.StatusOK) // what fails from here on cuts the answer short
			_, err = io.Copy(w, f)
			return err
		})
	}), nil
}

// fileContent is an answer that reads the file while it is written.
type fileContent func(w http.ResponseWriter) error

// VisitReadFileResponse makes fileContent an answer to readFile.
func (f fileContent) VisitReadFileResponse(w http.ResponseWriter) error { return f(w) }

// WriteFile answers PUT /v1/sandboxes/{id}/files.
func (s *server) WriteFile(ctx context.Context, r wire.WriteFileRequestObject) (wire.WriteFileResponseObject, error) {
	mode, err := parseMode(r.Params.Mode)
	if err != nil {
		return nil, err
	}
	err = s.onFile(ctx, r.ID, r.Params.Path, func(ctx context.Context, g *guest.Client) error {
		_, werr := g.WriteFile(ctx, r.Params.Path, guest.WriteOptions{Mode: mode, Parents: true}, r.Body)
		return werr
	})
	return wire.WriteFile204Response{}, err
}

// RemoveFile answers DELETE /v1/sandboxes/{id}/files.
func (s *server) RemoveFile(ctx context.Context, r wire.RemoveFileRequestObject) (wire.RemoveFileResponseObject, error) {
	return wire.RemoveFile204Response{}, s.onFile(ctx, r.ID, r.Params.Path, func(ctx context.Context, g *guest.Client) error {
		return g.Remove(ctx, r.Params.Path, "", r.Params.Recursive)
	})
}

// StatFile answers GET /v1/sandboxes/{id}/files/stat.
func (s *server) StatFile(ctx context.Context, r wire.StatFileRequestObject) (wire.StatFileResponseObject, error) {
	var entry guest.Entry
	err := s.onFile(ctx, r.ID, r.Params.Path, func(ctx context.Context, g *guest.Client) (err error) {
		entry, err = g.Stat(ctx, r.Params.Path, "")
		return err
	})
	return wire.StatFile200JSONResponse(fileInfo(entry)), err
}

// ListFiles answers GET /v1/sandboxes/{id}/files/list.
func (s *server) ListFiles(ctx context.Context, r wire.ListFilesRequestObject) (wire.ListFilesResponseObject, error) {
	depth := r.Params.Depth
	if depth == 0 {
		depth = 1
	}
	if depth < 1 || depth > maxDepth {
		return nil, fmt.Errorf("%w: depth must be 1 to %d", errdef.ErrInvalid, maxDepth)
	}
	out := wire.ListFiles200JSONResponse{}
	err := s.onFile(ctx, r.ID, r.Params.Path, func(ctx context.Context, g *guest.Client) error {
		entries, truncated, err := g.List(ctx, r.Params.Path, guest.ListOptions{Depth: depth})
		if truncated {
			err = errdef.WithHint(fmt.Errorf("%w: %s has more than %d entries", errdef.ErrExhausted, r.Params.Path, len(entries)),
				"list its directories one by one")
		}
		for _, e := range entries {
			out = append(out, fileInfo(e))
		}
		return err
	})
	return out, err
}

// MakeDirectory answers POST /v1/sandboxes/{id}/files/mkdir.
func (s *server) MakeDirectory(ctx context.Context, r wire.MakeDirectoryRequestObject) (wire.MakeDirectoryResponseObject, error) {
	mode, err := parseMode(r.Body.Mode)
	if err != nil {
		return nil, err
	}
	err = s.onFile(ctx, r.ID, r.Body.Path, func(ctx context.Context, g *guest.Client) error {
		return g.Mkdir(ctx, r.Body.Path, guest.MkdirOptions{Mode: mode, Parents: true})
	})
	return wire.MakeDirectory204Response{}, err
}

// MoveFile answers POST /v1/sandboxes/{id}/files/move.
func (s *server) MoveFile(ctx context.Context, r wire.MoveFileRequestObject) (wire.MoveFileResponseObject, error) {
	if err := checkPath(r.Body.To); err != nil {
		return nil, err
	}
	return wire.MoveFile204Response{}, s.onFile(ctx, r.ID, r.Body.From, func(ctx context.Context, g *guest.Client) error {
		return g.Move(ctx, r.Body.From, r.Body.To, "")
	})
}

func fileInfo(e guest.Entry) wire.FileInfo {
	return wire.FileInfo{
		Path: e.Path, Name: e.Name, Type: fileType(e.Type), Size: e.Size, Mode: fmt.Sprintf("%04o", e.Mode&0o7777),
		ModifiedAtUnixMS: e.MTime / int64(time.Millisecond), UID: int(e.UID), GID: int(e.GID), Target: e.Target,
	}
}

func fileType(t guestproto.FileType) wire.FileInfoType {
	switch t {
	case guestproto.TypeFile:
		return wire.FileInfoTypeFile
	case guestproto.TypeDirectory:
		return wire.FileInfoTypeDir
	case guestproto.TypeSymlink:
		return wire.FileInfoTypeSymlink
	}
	return wire.FileInfoTypeOther
}
