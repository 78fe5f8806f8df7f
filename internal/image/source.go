package image

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// source is where a root tree comes from.
type source interface {
	// identity is everything that determines the tree, as far as it can be
	// known without fetching it.
	identity(ctx context.Context) (string, error)
	// unpack puts the tree together. It may use the directory scratch.
	unpack(ctx context.Context, t *tree, scratch string) (RunConfig, error)
}

// defaultPath is the PATH of images that do not say.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// parseSource reads the syntax that docs/formats/image.md describes. What a
// source reads before it unpacks is within limits too.
func parseSource(text string, limits Limits) (source, error) {
	if text == "" || len(text) > maxText || strings.ContainsFunc(text, isControl) {
		return nil, sourceError(text)
	}
	if strings.HasPrefix(text, "/") || strings.HasPrefix(text, "./") || strings.HasPrefix(text, "../") {
		return newDirSource(text)
	}
	scheme, rest, _ := strings.Cut(text, ":")
	switch scheme {
	case "debian":
		return parseDebian(rest)
	case "dir":
		return newDirSource(rest)
	case "ext4":
		return newExt4Source(rest, limits)
	case "oci":
		return newLayoutSource(rest)
	case "docker-archive":
		return newArchiveSource(rest)
	case "docker":
		return newRegistrySource(rest)
	}
	if host, _, ok := strings.Cut(text, "/"); ok && (strings.ContainsAny(host, ".:") || host == "localhost") {
		return newRegistrySource(text)
	}
	return nil, sourceError(text)
}

func isControl(r rune) bool { return r < ' ' || r == 0x7f }

func sourceError(text string) error {
	err := fmt.Errorf("%w: image source %.200q", errdef.ErrInvalid, text)
	return errdef.WithHint(err, "use debian:SUITE+PACKAGE+PACKAGE, dir:PATH, ext4:PATH, oci:PATH, docker-archive:PATH or docker:REFERENCE")
}

// localPath makes a source's path absolute.
func localPath(kind, path string) (string, error) {
	if path == "" {
		return "", fmt.Errorf("%w: image source %s: no path", errdef.ErrInvalid, kind)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("image source %s: %w", kind, err)
	}
	return abs, nil
}
