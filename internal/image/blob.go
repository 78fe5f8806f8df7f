package image

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/tinevm/tine/internal/durable"
)

// putBlob stores what write writes. scratch is a directory of the caller's
// own, on the store's filesystem.
func (s *Store) putBlob(scratch string, write func(io.Writer) error) (Blob, error) {
	f, err := os.CreateTemp(scratch, "blob-")
	if err != nil {
		return Blob{}, fmt.Errorf("store blob: %w", err)
	}
	buf := bufio.NewWriterSize(f, 1<<20)
	if err = write(buf); err == nil {
		err = buf.Flush()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return Blob{}, err
	}
	return s.adoptBlob(f.Name())
}

// adoptBlob moves a complete file of a scratch directory to where its content
// says. A blob that is there already stays: machines may have it mapped.
func (s *Store) adoptBlob(path string) (Blob, error) {
	b, err := hashFile(path)
	if err != nil {
		return Blob{}, fmt.Errorf("store blob: %w", err)
	}
	if s.hasBlob(b) {
		return b, nil
	}
	if err = durable.SyncFile(path); err != nil {
		return Blob{}, fmt.Errorf("store blob: %w", err)
	}
	if err = os.Rename(path, s.blobPath(b)); err != nil {
		return Blob{}, fmt.Errorf("store blob: %w", err)
	}
	return b, durable.SyncDir(s.path(blobDir))
}

// hasBlob says whether b is stored. Content is not read again: a blob gets its
// name only once it is complete and on disk.
func (s *Store) hasBlob(b Blob) bool {
	if _, err := hexOf(b.Digest); err != nil {
		return false
	}
	info, err := os.Lstat(s.blobPath(b))
	return err == nil && info.Mode().IsRegular() && info.Size() == b.Size
}

func (s *Store) hasBlobs(blobs []Blob) bool {
	for _, b := range blobs {
		if !s.hasBlob(b) {
			return false
		}
	}
	return true
}

func hashFile(path string) (Blob, error) {
	f, err := os.Open(path)
	if err != nil {
		return Blob{}, err
	}
	defer func() { _ = f.Close() }() // only read
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return Blob{}, fmt.Errorf("hash %s: %w", filepath.Base(path), err)
	}
	return Blob{Digest: "sha256:" + hex.EncodeToString(h.Sum(nil)), Size: n}, nil
}

// padFile makes the file's size a multiple of align.
func padFile(path string, align int64) error {
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("pad %s: %w", filepath.Base(path), err)
	}
	size := (info.Size() + align - 1) / align * align
	if err = os.Truncate(path, size); err != nil {
		return fmt.Errorf("pad %s: %w", filepath.Base(path), err)
	}
	return nil
}
