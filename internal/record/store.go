package record

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

const defaultMaxBytes = 32 << 30

// Config says where a store is and how much it takes.
type Config struct {
	// Dir is made when it is missing.
	Dir string
	// MaxBytes bounds the contents of all records; zero means 32 GiB. Nothing is
	// ever removed to stay below it: more is refused.
	MaxBytes int64
	// Logger is told of a chain that is not as it was left; it may be nil.
	Logger *slog.Logger

	// Tests have other clocks, and disks that fail.
	now   func() time.Time
	write func(path string, data []byte) error
}

// Store keeps records and signs them. It is safe for concurrent use.
type Store struct {
	cfg   Config
	key   *Key
	blobs blobs
	lock  *os.File

	mu sync.Mutex
	// places are the records, in the order of their numbers; ids finds them.
	places []place
	// next is the place in the chain of the next record.
	next Chain
	// stale: a write has failed, and what is on disk has to be looked at.
	stale, closed bool
	usage         Usage
}

// Usage is how much a store holds. Contents are shared by the records that have
// the same, and none is ever removed.
type Usage struct {
	Records      int64 `json:"records"`
	Contents     int64 `json:"contents"`
	ContentBytes int64 `json:"content_bytes"`
	MaxBytes     int64 `json:"max_bytes"`
}

// Open opens the store in cfg.Dir, or begins one and makes its key. It returns
// errdef.ErrConflict when another process has it open, errdef.ErrDenied when the
// key's permissions are loose, and refuses a store that has records and lacks
// its key or its head: with a new one, what is missing would never be found.
func Open(ctx context.Context, cfg Config) (_ *Store, err error) {
	if cfg.Dir == "" || cfg.MaxBytes < 0 {
		return nil, fmt.Errorf("%w: records in %q of at most %d bytes", errdef.ErrInvalid, cfg.Dir, cfg.MaxBytes)
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = defaultMaxBytes
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.now == nil {
		cfg.now = time.Now
	}
	if cfg.write == nil {
		cfg.write = func(path string, data []byte) error { return durable.WriteFile(path, data, 0o600) }
	}
	for _, name := range []string{"", chainDir, blobDir, keyDir} {
		if err = os.MkdirAll(filepath.Join(cfg.Dir, name), 0o700); err != nil {
			return nil, fmt.Errorf("make directory of records: %w", err)
		}
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	lock, err := durable.TryLock(filepath.Join(cfg.Dir, lockName), false)
	if err != nil {
		return nil, fmt.Errorf("open records: %w", err)
	}
	u.Add(func() error { return durable.Unlock(lock) })
	s := &Store{cfg: cfg, lock: lock, blobs: blobs{filepath.Join(cfg.Dir, blobDir)}}
	if err = errors.Join(s.blobs.make(), durable.RemoveTemp(cfg.Dir), durable.RemoveTemp(filepath.Join(cfg.Dir, chainDir)),
		durable.RemoveTemp(filepath.Join(cfg.Dir, keyDir)), s.blobs.removeTemp()); err != nil {
		return nil, err
	}
	if err = s.open(ctx); err != nil {
		return nil, fmt.Errorf("open records: %w", err)
	}
	return s, nil
}

// Close gives the store up for another process.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return durable.Unlock(s.lock)
}

// Public is the key that the store's records are verified with.
func (s *Store) Public() Public { return s.key.Public() }

// Usage says how much there is.
func (s *Store) Usage() Usage {
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.usage
	u.Records, u.MaxBytes = int64(len(s.places)), s.cfg.MaxBytes
	return u
}

// Append records a run, signed, and with its contents: when it returns nil all
// of it survives a power cut. What cannot be recorded is errdef.ErrInvalid; a
// store that is full, or its disk, errdef.ErrExhausted. When it fails for
// another reason the record may be there all the same.
func (s *Store) Append(ctx context.Context, d Draft) (Envelope, error) {
	r, contents, err := d.build()
	if err != nil {
		return Envelope{}, err
	}
	if err = s.keep(ctx, contents); err != nil {
		return Envelope{}, fmt.Errorf("record run: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e, err := s.appendLocked(r)
	if err != nil {
		return Envelope{}, fmt.Errorf("record run: %w", err)
	}
	return e, nil
}

// keep writes contents; a record that names them comes after them.
func (s *Store) keep(ctx context.Context, contents map[string][]byte) error {
	var size int64
	for _, data := range contents {
		size += int64(len(data))
	}
	s.mu.Lock()
	have, closed := s.usage.ContentBytes, s.closed
	s.mu.Unlock()
	if closed {
		return fmt.Errorf("%w: the store of records is closed", errdef.ErrUnavailable)
	}
	if have+size > s.cfg.MaxBytes {
		return errdef.WithHint(fmt.Errorf("%w: the contents of records take %d bytes of %d", errdef.ErrExhausted, have, s.cfg.MaxBytes),
			"stop the daemon and move its directory of records away, whole: records are never removed")
	}
	files, bytes, err := s.blobs.put(ctx, contents)
	s.mu.Lock()
	s.usage.Contents += files
	s.usage.ContentBytes += bytes
	s.mu.Unlock()
	return err
}

func (s *Store) appendLocked(r Record) (Envelope, error) {
	if s.closed {
		return Envelope{}, fmt.Errorf("%w: the store of records is closed", errdef.ErrUnavailable)
	}
	if s.stale {
		if err := s.recover(); err != nil {
			return Envelope{}, err
		}
	}
	r.ID, r.Chain, r.KeyID = newID(), s.next, s.key.Public().ID()
	r.Created = s.cfg.now().Round(0).UTC()
	e, err := sign(r, s.key)
	if err != nil {
		return Envelope{}, err
	}
	p := place{r.Chain.Seq, r.ID}
	s.stale = true
	if err = s.cfg.write(filepath.Join(s.cfg.Dir, chainDir, p.name()), append(slices.Clip(e.Bytes), '\n')); err != nil {
		return Envelope{}, err
	}
	if err = writeHead(s.cfg.Dir, head{p.seq, e.Digest}, s.key); err != nil {
		return Envelope{}, err
	}
	s.stale = false
	s.places = append(s.places, p)
	s.next = Chain{p.seq + 1, e.Digest}
	return e, nil
}

// minPrefix is how much of an id finds a record.
const minPrefix = 4

// Get returns the record whose id is or begins with prefix: errdef.ErrNotFound
// when there is none, errdef.ErrConflict when there are several.
func (s *Store) Get(prefix string) (Envelope, error) {
	p, err := s.find(strings.ToLower(prefix))
	if err != nil {
		return Envelope{}, err
	}
	return readPlace(s.cfg.Dir, p)
}

func (s *Store) find(prefix string) (place, error) {
	if len(prefix) < minPrefix || len(prefix) > len("00000000-0000-0000-0000-000000000000") {
		return place{}, fmt.Errorf("%w: %.80q is no record's id, nor %d characters or more of one", errdef.ErrInvalid, prefix, minPrefix)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var found []place
	for _, p := range s.places {
		if strings.HasPrefix(p.id, prefix) {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 0:
		return place{}, fmt.Errorf("%w: record %s", errdef.ErrNotFound, prefix)
	case 1:
		return found[0], nil
	}
	return place{}, fmt.Errorf("%w: %d records begin with %s", errdef.ErrConflict, len(found), prefix)
}

// Blob returns a content, as Source says.
func (s *Store) Blob(b Blob) ([]byte, error) { return s.blobs.Blob(b) }
