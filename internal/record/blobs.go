package record

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// blobs are the contents of a store, in files named by their digests. What is
// empty has no file.
type blobs struct{ dir string }

// path is where a digest's content lies. It is the one place where a digest
// becomes a path.
func (s blobs) path(digest string) (string, error) {
	if err := checkDigest(digest); err != nil {
		return "", err
	}
	name := strings.TrimPrefix(digest, digestPrefix)
	return filepath.Join(s.dir, name[:2], name[2:]), nil
}

// make makes the directories of contents, so that none has to be made, and
// synced, for a content.
func (s blobs) make() error {
	for i := range 256 {
		if err := os.MkdirAll(filepath.Join(s.dir, fmt.Sprintf("%02x", i)), 0o700); err != nil {
			return fmt.Errorf("make directory of contents: %w", err)
		}
	}
	return durable.SyncDir(s.dir)
}

// put writes the contents that are not there, and returns how many and how many
// bytes that were.
func (s blobs) put(ctx context.Context, contents map[string][]byte) (files, bytes int64, err error) {
	for _, digest := range slices.Sorted(maps.Keys(contents)) {
		if ctx.Err() != nil {
			return files, bytes, context.Cause(ctx)
		}
		data := contents[digest]
		written, err := s.putOne(digest, data)
		if err != nil {
			return files, bytes, err
		}
		if written {
			files, bytes = files+1, bytes+int64(len(data))
		}
	}
	return files, bytes, nil
}

func (s blobs) putOne(digest string, data []byte) (written bool, err error) {
	if len(data) == 0 {
		return false, nil
	}
	path, err := s.path(digest)
	if err != nil {
		return false, err
	}
	switch _, err = s.Blob(Blob{digest, int64(len(data))}); {
	case err == nil: // whoever has put it there may not have come to the end of that
		return false, durable.SyncDir(filepath.Dir(path))
	case errors.Is(err, errdef.ErrNotFound):
		return true, durable.WriteFile(path, data, 0o600)
	case errors.Is(err, errdef.ErrConflict): // it was damaged, and here it is again
		return false, durable.WriteFile(path, data, 0o600)
	}
	return false, err
}

// Blob returns a content, and errdef.ErrNotFound when it is not there. One that
// is not what its name says is errdef.ErrConflict.
func (s blobs) Blob(b Blob) ([]byte, error) {
	if b.Size == 0 && b.Digest == Digest(nil) {
		return nil, nil
	}
	path, err := s.path(b.Digest)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: content %s", errdef.ErrNotFound, b.Digest)
	}
	if err != nil {
		return nil, fmt.Errorf("read content: %w", err)
	}
	defer f.Close() //nolint:errcheck // it was only read
	return readBlob(f, b)
}

// readBlob reads what should be b, and no more of it than b has.
func readBlob(from io.Reader, b Blob) ([]byte, error) {
	if b.Size < 0 || b.Size > MaxBlob {
		return nil, invalid("content of %d bytes, at most %d", b.Size, MaxBlob)
	}
	data, err := io.ReadAll(io.LimitReader(from, b.Size+1))
	if err != nil {
		return nil, fmt.Errorf("read content: %w", err)
	}
	if int64(len(data)) != b.Size || Digest(data) != b.Digest {
		return nil, fmt.Errorf("%w: content %s of %d bytes is something else now", errdef.ErrConflict, b.Digest, b.Size)
	}
	return data, nil
}

// measure counts what is there.
func (s blobs) measure() (files, bytes int64, err error) {
	err = filepath.WalkDir(s.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || !s.isBlob(path) {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		files, bytes = files+1, bytes+info.Size()
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("measure contents: %w", err)
	}
	return files, bytes, nil
}

func (s blobs) isBlob(path string) bool {
	raw, err := hex.DecodeString(filepath.Base(filepath.Dir(path)) + filepath.Base(path))
	return err == nil && len(raw) == 32
}

// removeTemp removes what killed writers have left.
func (s blobs) removeTemp() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("read directory of contents: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, durable.RemoveTemp(filepath.Join(s.dir, e.Name())))
		}
	}
	return err
}
