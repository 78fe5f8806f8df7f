package block

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	lockFile    = "lock"
	blocksDir   = "blocks"
	evidenceDir = "evidence"
	entryName   = "entry.json"
	// stagePrefix and gonePrefix begin the names of directories that are being
	// made and removed; no block's name begins with a dot.
	stagePrefix = ".stage-"
	gonePrefix  = ".gone-"
	// maxBlocks bounds a registry: all of its entries are in memory.
	maxBlocks = 4096
	maxAbout  = 64 << 10
)

// Config says where a registry is and what it goes by.
type Config struct {
	// Dir is made when it is missing.
	Dir string
	// Rule is as for Decode.
	Rule func(name string) error
	// Known says whose keys a trust score counts as different verifiers; nil:
	// nobody's.
	Known func(key string) bool
	// Logger may be nil.
	Logger *slog.Logger
}

// Registry keeps blocks and the evidence of them. Its methods are safe for
// concurrent use; one process has it open.
type Registry struct {
	dir    string
	rule   func(name string) error
	known  func(key string) bool
	logger *slog.Logger
	lock   *os.File

	mu      sync.Mutex
	entries map[string]Entry // by NAME@VERSION
}

// Open opens the registry in c.Dir and finishes what a killed process had begun.
// It returns errdef.ErrConflict while another process has it open. A block that
// cannot be read is set aside.
func Open(ctx context.Context, c Config) (*Registry, error) {
	r := &Registry{dir: c.Dir, rule: c.Rule, known: c.Known, logger: c.Logger, entries: map[string]Entry{}}
	if r.logger == nil {
		r.logger = slog.New(slog.DiscardHandler)
	}
	if r.known == nil {
		r.known = func(string) bool { return false }
	}
	for _, dir := range []string{blocksDir, evidenceDir} {
		path := filepath.Join(c.Dir, dir)
		if err := os.MkdirAll(path, 0o700); err != nil {
			return nil, fmt.Errorf("open blocks: %w", durable.Describe("make", path, err))
		}
	}
	var err error
	if r.lock, err = durable.TryLock(filepath.Join(c.Dir, lockFile), false); err != nil {
		return nil, fmt.Errorf("open blocks: %w", err)
	}
	if err = r.load(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open blocks: %w", err), r.Close())
	}
	return r, nil
}

// Close lets another process open the registry.
func (r *Registry) Close() error { return durable.Unlock(r.lock) }

// load reads all entries, and removes what was half made or half removed.
func (r *Registry) load(ctx context.Context) error {
	dir := filepath.Join(r.dir, blocksDir)
	found, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, f := range found {
		name := f.Name()
		if strings.HasPrefix(name, stagePrefix) || strings.HasPrefix(name, gonePrefix) {
			if err = os.RemoveAll(filepath.Join(dir, name)); err != nil {
				return err
			}
			continue
		}
		ref, notOne := ParseRef(name)
		if notOne != nil || ref.String() != name || ref.Digest != "" || !f.IsDir() {
			continue
		}
		e, err := r.read(ref)
		if errors.Is(err, errDamaged) {
			err = r.setAside(ctx, ref, err)
		} else if err == nil {
			r.entries[name] = e
		}
		if err != nil {
			r.logger.WarnContext(ctx, "block not loaded", slog.String("block", name), slog.Any("error", err))
		}
	}
	return nil
}

func (r *Registry) setAside(ctx context.Context, ref Ref, why error) error {
	aside, err := durable.SetAside(r.path(ref), time.Now())
	if err != nil {
		return errors.Join(why, err)
	}
	r.logger.WarnContext(ctx, "block set aside: it cannot be read", slog.String("block", ref.String()),
		slog.String("path", aside), slog.Any("error", why))
	return nil
}

// path is where a block's name becomes a path, and the only place. It is for
// names that CheckName has seen; a path of any other is of nothing.
func (r *Registry) path(ref Ref) string {
	if CheckName(ref.Name) != nil {
		return filepath.Join(r.dir, blocksDir, gonePrefix)
	}
	return filepath.Join(r.dir, blocksDir, key(ref))
}

// key is what a block's directory is called.
func key(ref Ref) string { return Ref{Name: ref.Name, Version: ref.Version}.String() }

func (r *Registry) read(ref Ref) (Entry, error) {
	file, err := readBounded(filepath.Join(r.path(ref), FileName), MaxFile)
	if err != nil {
		return Entry{}, err
	}
	about, err := readBounded(filepath.Join(r.path(ref), entryName), maxAbout)
	if err != nil {
		return Entry{}, err
	}
	e, err := decodeEntry(about, file)
	if err == nil && key(e.Ref) != key(ref) {
		err = fmt.Errorf("%w: it is %s", errDamaged, e.Ref)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("read block %s: %w", key(ref), err)
	}
	return e, nil
}

// readBounded reads a file. One that is missing or too large is damage: they
// appear and go with their directory.
func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	_ = f.Close() // only read
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%w: %s has more than %d bytes", errDamaged, path, most)
	}
	return data, err
}

// AddRequest asks for a block to be added.
type AddRequest struct {
	File []byte
	// Level and Publisher are the caller's.
	Level     TrustLevel
	Publisher string
	// PublisherKey is the id of the publisher's key, if there is one: what it
	// says of the block weighs little.
	PublisherKey string
}

// Add puts a block into the registry. The caller must be at level Three. A file
// that is there already, byte for byte, is not added again; another file of the
// same name and version is errdef.ErrExists.
func (r *Registry) Add(req AddRequest) (Entry, error) {
	e, err := NewEntry(req.File, r.rule)
	if err != nil {
		return Entry{}, err
	}
	if err = Allow(req.Level, ActPublish, e.Ref.Name, e.Spec.MinimumTrustLevel); err != nil {
		return Entry{}, err
	}
	if req.PublisherKey != "" && !keyRE.MatchString(req.PublisherKey) {
		return Entry{}, fmt.Errorf("%w: publisher key %.80q is not the id of a key", errdef.ErrInvalid, req.PublisherKey)
	}
	e.AddedAt, e.Publisher, e.PublisherKey = time.Now().UTC(), req.Publisher, req.PublisherKey
	r.mu.Lock()
	defer r.mu.Unlock()
	if old, ok := r.entries[key(e.Ref)]; ok {
		if old.Ref != e.Ref {
			return Entry{}, errdef.WithHint(fmt.Errorf("%w: block %s, with other content", errdef.ErrExists, key(e.Ref)),
				"give the block another version")
		}
		return old, nil
	}
	if len(r.entries) >= maxBlocks {
		return Entry{}, fmt.Errorf("%w: add block %s: there are %d", errdef.ErrExhausted, key(e.Ref), maxBlocks)
	}
	if err = r.checkPartsLocked(e.Spec); err != nil {
		return Entry{}, err
	}
	if err = r.commit(e, req.File); err != nil {
		return Entry{}, fmt.Errorf("add block %s: %w", key(e.Ref), err)
	}
	r.entries[key(e.Ref)] = e
	return e, nil
}

// checkPartsLocked refuses a composition of blocks that are not there, or one
// that asks for less trust than its parts do.
func (r *Registry) checkPartsLocked(s Spec) error {
	for _, ref := range s.ComposedOf {
		part, ok := r.entries[key(ref)]
		if !ok || part.Ref != ref {
			return fmt.Errorf("%w: block %s: part %s", errdef.ErrNotFound, s.Name, ref)
		}
		if s.MinimumTrustLevel < part.Spec.MinimumTrustLevel {
			return fmt.Errorf("block %s: %w", s.Name, manifestError("minimum_trust_level", "%s, and part %s wants %s",
				s.MinimumTrustLevel, key(ref), part.Spec.MinimumTrustLevel))
		}
	}
	return nil
}

// commit brings an entry to the disk, whole or not at all.
func (r *Registry) commit(e Entry, file []byte) (err error) {
	about, err := e.encode()
	if err != nil {
		return err
	}
	stage, err := os.MkdirTemp(filepath.Join(r.dir, blocksDir), stagePrefix)
	if err != nil {
		return durable.Describe("stage", r.path(e.Ref), err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(stage))
		}
	}()
	for name, data := range map[string][]byte{FileName: file, entryName: about} {
		path := filepath.Join(stage, name)
		if err = os.WriteFile(path, data, 0o600); err != nil {
			return durable.Describe("write", path, err)
		}
	}
	return durable.CommitDir(stage, r.path(e.Ref))
}

// List returns all blocks, by name and then version.
func (r *Registry) List() []Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]Entry, 0, len(r.entries))
	for _, e := range r.entries {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b Entry) int {
		return cmp.Or(cmp.Compare(a.Ref.Name, b.Ref.Name), a.Ref.Version.Compare(b.Ref.Version))
	})
	return list
}

// Get finds a block by NAME, of which it takes the highest version,
// NAME@VERSION, or NAME@VERSION#DIGEST.
func (r *Registry) Get(name string) (Entry, error) {
	if !strings.Contains(name, "@") {
		return r.highest(name)
	}
	ref, err := ParseRef(name)
	if err != nil {
		return Entry{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.entries[key(ref)]
	if !ok || ref.Digest != "" && ref.Digest != e.Ref.Digest {
		return Entry{}, fmt.Errorf("%w: block %s", errdef.ErrNotFound, name)
	}
	return e, nil
}

func (r *Registry) highest(name string) (Entry, error) {
	if err := CheckName(name); err != nil {
		return Entry{}, err
	}
	var best Entry
	for _, e := range r.List() {
		if e.Ref.Name == name {
			best = e // versions go up
		}
	}
	if best.Ref.Name == "" {
		return Entry{}, fmt.Errorf("%w: block %s", errdef.ErrNotFound, name)
	}
	return best, nil
}

// Forge is a block in the form that Forge exchanges, with its score.
func (r *Registry) Forge(e Entry) (Block, error) {
	trust, err := r.Trust(e.Ref.Digest)
	if err != nil {
		return Block{}, err
	}
	ids := map[Ref]ID{}
	for _, other := range r.List() {
		ids[other.Ref] = other.ID()
	}
	return e.Forge(trust.Score, ids), nil
}

// File returns the bytes of a block's file, which have the block's digest.
func (r *Registry) File(ref Ref) ([]byte, error) {
	e, err := r.Get(key(ref))
	if err != nil {
		return nil, err
	}
	data, err := readBounded(filepath.Join(r.path(e.Ref), FileName), MaxFile)
	if err == nil && Digest(data) != e.Ref.Digest {
		err = fmt.Errorf("%w: its digest is %s", errDamaged, Digest(data))
	}
	if err != nil {
		return nil, fmt.Errorf("read block %s: %w", key(ref), err)
	}
	return data, nil
}

// Remove takes a block out of the registry. The caller must be at level Three.
// A block that is part of another stays: errdef.ErrConflict. Evidence stays too,
// so that removing a block and adding it again does not clear its name.
func (r *Registry) Remove(name string, level TrustLevel) error {
	e, err := r.Get(name)
	if err != nil {
		return err
	}
	if err = Allow(level, ActPublish, e.Ref.Name, e.Spec.MinimumTrustLevel); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, other := range r.entries {
		if slices.Contains(other.Spec.ComposedOf, e.Ref) {
			return fmt.Errorf("%w: remove block %s: it is part of %s", errdef.ErrConflict, key(e.Ref), key(other.Ref))
		}
	}
	if now, ok := r.entries[key(e.Ref)]; !ok || now.Ref != e.Ref {
		return fmt.Errorf("%w: block %s", errdef.ErrNotFound, key(e.Ref))
	}
	gone, err := os.MkdirTemp(filepath.Join(r.dir, blocksDir), gonePrefix)
	if err == nil {
		err = os.Rename(r.path(e.Ref), filepath.Join(gone, FileName))
	}
	if err == nil {
		delete(r.entries, key(e.Ref))
		err = durable.SyncDir(filepath.Join(r.dir, blocksDir))
	}
	if gone != "" {
		err = errors.Join(err, os.RemoveAll(gone))
	}
	if err != nil {
		return fmt.Errorf("remove block %s: %w", key(e.Ref), err)
	}
	return nil
}
