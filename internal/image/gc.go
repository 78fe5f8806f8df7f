package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// GC removes the manifests that have no name and that keep does not want, and
// then all blobs and cache entries that no manifest is left to use. keep may be
// nil. It returns errdef.ErrConflict while a build is under way.
func (s *Store) GC(ctx context.Context, keep func(digest string) bool) (freed int64, err error) {
	lock, err := durable.TryLock(s.path(lockDir, storeLock), false)
	if err != nil {
		return 0, fmt.Errorf("collect unused images: %w", err)
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()
	used, err := s.removeManifests(ctx, keep)
	if err != nil {
		return 0, fmt.Errorf("collect unused images: %w", err)
	}
	if err = s.removeCached(used); err != nil {
		return 0, fmt.Errorf("collect unused images: %w", err)
	}
	if freed, err = s.removeBlobs(ctx, used); err != nil {
		return freed, fmt.Errorf("collect unused images: %w", err)
	}
	return freed, nil
}

// removeManifests removes the unwanted manifests and returns the digests of
// the blobs that the others use. A manifest that cannot be read stops it: its
// blobs are unknown.
func (s *Store) removeManifests(ctx context.Context, keep func(string) bool) (map[string]bool, error) {
	named, err := s.namedDigests()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.path(manifestDir))
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		digest := "sha256:" + strings.TrimSuffix(e.Name(), ".json")
		if !digestRE.MatchString(digest) {
			continue // a writer's temporary file
		}
		if !named[digest] && (keep == nil || !keep(digest)) {
			if err = os.Remove(s.path(manifestDir, e.Name())); err != nil {
				return nil, err
			}
			continue
		}
		img, loadErr := s.byDigest(digest)
		if loadErr != nil {
			return nil, loadErr
		}
		for _, b := range img.Manifest.blobs() {
			used[b.Digest] = true
		}
	}
	return used, durable.SyncDir(s.path(manifestDir))
}

func (s *Store) namedDigests() (map[string]bool, error) {
	entries, err := os.ReadDir(s.path(nameDir))
	if err != nil {
		return nil, err
	}
	named := map[string]bool{}
	for _, e := range entries {
		if checkName(e.Name()) != nil {
			continue // a writer's temporary file
		}
		digest, readErr := s.digestOfName(e.Name())
		if errors.Is(readErr, errdef.ErrNotFound) {
			continue // removed since ReadDir
		}
		if readErr != nil {
			return nil, readErr
		}
		named[digest] = true
	}
	return named, nil
}

// removeCached removes the cache entries whose main blob is of no use to any
// manifest. The packed modules of a used kernel are added to used.
func (s *Store) removeCached(used map[string]bool) error {
	kernels, err := filepath.Glob(s.path(kernelDir, "*"))
	if err != nil {
		return err
	}
	roots, err := filepath.Glob(s.path(rootDir, "*"))
	if err != nil {
		return err
	}
	for _, path := range append(kernels, roots...) {
		blobs := readCached(path)
		if len(blobs) == 0 || !used[blobs[0].Digest] {
			if err = os.Remove(path); err != nil {
				return err
			}
			continue
		}
		for _, b := range blobs {
			used[b.Digest] = true
		}
	}
	return errors.Join(durable.SyncDir(s.path(kernelDir)), durable.SyncDir(s.path(rootDir)))
}

// readCached returns the blobs of a cache entry of either kind, the main one
// first, or none when it cannot be read: then it is useless.
func readCached(path string) []Blob {
	data, err := readSmall(path)
	if err != nil {
		return nil
	}
	var either struct{ Root, Kernel, Modules Blob }
	if err = json.Unmarshal(data, &either); err != nil {
		return nil
	}
	if either.Root.Digest != "" {
		return []Blob{either.Root}
	}
	return []Blob{either.Kernel, either.Modules}
}

func (s *Store) removeBlobs(ctx context.Context, used map[string]bool) (freed int64, err error) {
	entries, err := os.ReadDir(s.path(blobDir))
	if err != nil {
		return 0, err
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return freed, context.Cause(ctx)
		}
		if used["sha256:"+e.Name()] {
			continue
		}
		info, statErr := e.Info()
		if statErr != nil {
			return freed, statErr
		}
		if err = os.Remove(s.path(blobDir, e.Name())); err != nil {
			return freed, err
		}
		freed += info.Size()
	}
	return freed, durable.SyncDir(s.path(blobDir))
}
