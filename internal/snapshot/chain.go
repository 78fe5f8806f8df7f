package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
)

// MaxDepth is how many layers may stand on a whole image.
const MaxDepth = 64

// Base is what a fork maps, and what is then filled in.
type Base struct {
	// Digest is the snapshot whose whole memory Path is: the fork's own, or the
	// nearest one below it that has one.
	Digest string
	Path   string
	// Layers are the files of those above it, oldest first.
	Layers []string
}

// Chain returns the snapshots that the memory of snap is made of: a whole one
// first, snap last. It returns errdef.ErrUnavailable when one is missing or
// damaged, as far as that shows without reading it all.
func (s *Store) Chain(snap Snapshot) ([]Snapshot, error) {
	chain, err := s.chain(snap, nil)
	if err != nil {
		return nil, damaged(snap.ref(), err)
	}
	return chain, nil
}

// known remembers the manifests that were read, while a list is made.
type known map[string]Manifest

// chain does not say what its error is about.
func (s *Store) chain(snap Snapshot, seen known) ([]Snapshot, error) {
	chain := []Snapshot{snap}
	for top := snap.Manifest; top.Layered(); {
		if len(chain) > MaxDepth {
			return nil, tooDeep()
		}
		digest := top.Parent
		if slices.ContainsFunc(chain, func(c Snapshot) bool { return c.Digest == digest }) {
			return nil, fmt.Errorf("%w: parent %s leads back to itself", errdef.ErrInvalid, digest)
		}
		m, err := s.parent(digest, seen)
		if err != nil {
			return nil, err
		}
		if err = top.fits(&m); err != nil {
			return nil, err
		}
		chain = append(chain, Snapshot{Digest: digest, Status: StatusReady, Manifest: m, dir: s.objectPath(digest)})
		top = m
	}
	slices.Reverse(chain)
	for i := range chain {
		chain[i].Depth = i
	}
	return chain, nil
}

func (s *Store) parent(digest string, seen known) (Manifest, error) {
	m, ok := seen[digest]
	if ok {
		return m, nil
	}
	m, err := s.readObject(digest)
	if errors.Is(err, errdef.ErrNotFound) {
		return Manifest{}, fmt.Errorf("parent %s is missing: %w", digest, errdef.ErrNotFound)
	}
	if err != nil {
		return Manifest{}, fmt.Errorf("parent: %w", err)
	}
	if seen != nil {
		seen[digest] = m
	}
	return m, nil
}

func tooDeep() error {
	return errdef.WithHint(fmt.Errorf("%w: more than %d layers on one image", errdef.ErrExhausted, MaxDepth),
		"make a whole snapshot of it with tine snapshot compact, and go on from that")
}

// fits fails unless the layer can stand on the parent: their device states are
// of one engine and host, and their machines have one shape.
func (m *Manifest) fits(parent *Manifest) error {
	switch {
	case m.Engine != parent.Engine || m.EngineVersion != parent.EngineVersion:
		return fmt.Errorf("%w: engine %s %s, its parent's is %s %s", errdef.ErrInvalid,
			m.Engine, m.EngineVersion, parent.Engine, parent.EngineVersion)
	case !sameHost(m.Host, parent.Host):
		return fmt.Errorf("%w: host %s, its parent's is %s", errdef.ErrInvalid, hostName(m.Host), hostName(parent.Host))
	case m.Machine != parent.Machine:
		return fmt.Errorf("%w: machine %+v, its parent's is %+v", errdef.ErrInvalid, m.Machine, parent.Machine)
	case m.Image != parent.Image:
		return fmt.Errorf("%w: image %s, its parent's is %s", errdef.ErrInvalid, m.Image, parent.Image)
	}
	return nil
}

// Image opens the memory of snap, made of the whole image at the root of its
// chain and the layers above, and of no flat one. Close it.
func (s *Store) Image(snap Snapshot) (*guestmem.Image, error) {
	chain, err := s.Chain(snap)
	if err != nil {
		return nil, err
	}
	img, err := openImage(chain)
	if err != nil {
		return nil, fmt.Errorf("memory of snapshot %s: %w", snap.ref(), err)
	}
	return img, nil
}

func openImage(chain []Snapshot) (*guestmem.Image, error) {
	return guestmem.OpenImage(chain[0].MemoryPath(), layerPaths(chain[1:])...)
}

func layerPaths(chain []Snapshot) []string {
	var paths []string
	for _, snap := range chain {
		paths = append(paths, snap.LayerPath())
	}
	return paths
}

// Base returns what a fork of snap is to map. Pin snap first: as long as that
// holds, so do the files. Whether they are what they were is for Verify.
func (s *Store) Base(snap Snapshot) (Base, error) {
	chain, err := s.Chain(snap)
	if err != nil {
		return Base{}, err
	}
	for i, c := range slices.Backward(chain) {
		base := Base{Digest: c.Digest, Path: c.MemoryPath(), Layers: layerPaths(chain[i+1:])}
		if i == 0 {
			return base, nil
		}
		if c.flatHolds(chain[0].Manifest.Memory.Size) {
			base.Path = c.FlatPath()
			return base, nil
		}
	}
	return Base{}, fmt.Errorf("snapshot %s: an empty chain", snap.ref()) // there is a root always
}

// Dependents returns the tags of the snapshots that were made from the one of
// that digest, directly or not, each after the one it was made from.
func (s *Store) Dependents(digest string) ([]string, error) {
	parents, err := s.parents()
	if err != nil {
		return nil, err
	}
	roots, err := s.roots()
	if err != nil {
		return nil, err
	}
	var tags []string
	made := map[string]bool{digest: true}
	for level := []string{digest}; len(level) > 0; {
		level = childrenOf(level, parents, made)
		for _, child := range level {
			for _, r := range roots {
				if r.err == nil && !r.held && r.file.Digest == child {
					tags = append(tags, r.name)
				}
			}
		}
	}
	return tags, nil
}

// childrenOf returns those whose parent is one of these, and that are new.
func childrenOf(these []string, parents map[string]string, made map[string]bool) []string {
	var children []string
	for child, parent := range parents {
		if slices.Contains(these, parent) && !made[child] {
			made[child] = true
			children = append(children, child)
		}
	}
	slices.Sort(children)
	return children
}

// parents returns for each object whose manifest can be read the digest of its
// parent, which is "" when it has none. The rest of it may be damaged.
func (s *Store) parents() (map[string]string, error) {
	names, err := s.objects()
	if err != nil {
		return nil, err
	}
	parents := map[string]string{}
	for _, name := range names {
		if m, readErr := s.readManifest(digestPrefix + name); readErr == nil {
			parents[digestPrefix+name] = m.Parent
		}
	}
	return parents, nil
}

// Compact makes a whole snapshot under the new tag to of the snapshot that ref
// names: one with the same memory and device state, and no parent.
func (s *Store) Compact(ctx context.Context, ref, to string) (snap Snapshot, err error) {
	if ref == to {
		return Snapshot{}, fmt.Errorf("%w: compact snapshot %s onto itself", errdef.ErrInvalid, ref)
	}
	from, err := s.Resolve(ref)
	if err != nil {
		return Snapshot{}, err
	}
	st, err := s.Stage(ctx, to)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() { err = errors.Join(err, st.Abort()) }()
	pin, err := s.Pin(from)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() { _ = pin.Close() }() // only read
	if err = s.Verify(ctx, from); err != nil {
		return Snapshot{}, err
	}
	if err = s.compactInto(ctx, st, from); err != nil {
		return Snapshot{}, fmt.Errorf("compact snapshot %s: %w", from.ref(), err)
	}
	m := from.Manifest
	m.Layer, m.Parent = File{}, ""
	return st.Commit(ctx, m, Facts{BootMS: from.BootMS, BranchedFrom: "compact:" + from.ref(), Warning: from.Warning})
}

// compactInto fills the stage.
func (s *Store) compactInto(ctx context.Context, st *Stage, from Snapshot) error {
	chain, err := s.Chain(from)
	if err != nil {
		return err
	}
	if err = room(st.dir, chain); err != nil {
		return err
	}
	mem, err := s.files.create(st.MemoryPath())
	if err != nil {
		return err
	}
	if err = errors.Join(flatten(ctx, chain, mem), mem.Close()); err != nil {
		return err
	}
	if err = st.LinkDisk(ctx, from.DiskPaths()); err != nil {
		return err
	}
	return s.copyFile(ctx, from.DevicePath(), st.DevicePath())
}
