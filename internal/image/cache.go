package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// storeLock is shared by all builds, and held alone by GC.
const storeLock = "store"

// artifact is a cached step of a build: what it made, and from which blobs.
type artifact interface {
	blobs() []Blob
}

// cacheKey is the hex digest of everything that determines an artifact.
func cacheKey(parts ...any) (string, error) {
	data, err := json.Marshal(append([]any{manifestVersion}, parts...))
	if err != nil {
		return "", fmt.Errorf("make cache key: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

// cached returns the artifact kind/key, and makes it with build when it is
// missing or a refresh is wanted. However many ask at once, one builds and the
// others wait for it. build gets a scratch directory, removed afterwards.
func cached[T artifact](ctx context.Context, s *Store, kind, key string, refresh bool, build func(ctx context.Context, scratch string) (T, error)) (art T, hit bool, err error) {
	entry := s.path(kind, key)
	if art, hit = load[T](s, entry); hit && !refresh {
		return art, true, nil
	}
	scratch, release, err := s.scratch(ctx, kind+"-"+key)
	if err != nil {
		return art, false, err
	}
	defer func() { err = errors.Join(err, release()) }()
	if art, hit = load[T](s, entry); hit && !refresh {
		return art, true, nil
	}
	if art, err = build(ctx, scratch); err != nil {
		return art, false, err
	}
	return art, false, save(entry, art)
}

// scratch makes an empty staging directory, over what a dead builder has left.
// Until release removes it, it and the lock of its name are the caller's.
func (s *Store) scratch(ctx context.Context, name string) (dir string, release func() error, err error) {
	lock, err := durable.Lock(ctx, s.path(lockDir, name))
	if err != nil {
		return "", nil, err
	}
	dir = s.path(stagingDir, name)
	release = func() error { return errors.Join(os.RemoveAll(dir), durable.Unlock(lock)) }
	if err = os.RemoveAll(dir); err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		return "", nil, fmt.Errorf("make staging: %w", errors.Join(err, release()))
	}
	return dir, release, nil
}

// load reads a cache entry whose blobs are all there. An entry that cannot be
// read is a miss: building anew mends it.
func load[T artifact](s *Store, entry string) (T, bool) {
	var art T
	data, err := readSmall(entry)
	if err != nil {
		return art, false
	}
	if err = json.Unmarshal(data, &art); err != nil {
		s.log.Warn("image cache entry is damaged", "path", entry, "error", err)
		return art, false
	}
	return art, s.hasBlobs(art.blobs())
}

func save(entry string, art artifact) error {
	data, err := json.Marshal(art)
	if err != nil {
		return fmt.Errorf("encode cache entry: %w", err)
	}
	return durable.WriteFile(entry, data, 0o600)
}

// removeLeftovers removes the staging directories whose builders are dead,
// which is to say those that nobody holds the lock of.
func (s *Store) removeLeftovers() error {
	entries, err := os.ReadDir(s.path(stagingDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if rmErr := s.removeLeftover(e.Name()); rmErr != nil {
			// A tool of the dead builder may still write there. The next build
			// or the next Open has another go.
			s.log.Warn("leftover of an image build stays", "name", e.Name(), "error", rmErr)
		}
	}
	for _, d := range []string{manifestDir, nameDir, rootDir, kernelDir} {
		if err = durable.RemoveTemp(s.path(d)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) removeLeftover(name string) (err error) {
	lock, err := durable.TryLock(s.path(lockDir, name), false)
	if errors.Is(err, errdef.ErrConflict) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()
	err = os.RemoveAll(s.path(stagingDir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// lockShared keeps GC away until the file is given to durable.Unlock.
func (s *Store) lockShared(ctx context.Context) (*os.File, error) {
	const pause = 20 * time.Millisecond // flock itself cannot be called off
	for {
		f, err := durable.TryLock(s.path(lockDir, storeLock), true)
		if !errors.Is(err, errdef.ErrConflict) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for image garbage collection: %w", context.Cause(ctx))
		case <-time.After(pause):
		}
	}
}
