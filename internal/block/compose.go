package block

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
)

// Title is what a composition has of its own. The rest comes from its parts.
type Title struct {
	Name        string
	Version     SemVer
	Description string
	Author      string
	AuthorKey   string
}

// Compose makes one block of a resolution: it runs what the root runs, provides
// what any part provides, and asks for the trust level and the knowledge that
// the most demanding part asks for. What the resolution has left open, it
// requires. The caller must be at least at level Two.
func Compose(level TrustLevel, title Title, r Resolution) (Spec, error) {
	return compose(level, ActCompose, title, r)
}

// Swap makes the composition anew with the block by in the place of the part
// that has the name old. The parts are looked up in the universe, and there must
// be nothing among the requirements that they do not meet. The caller must be at
// least at level One.
func Swap(level TrustLevel, title Title, composite Spec, old string, by Entry, universe []Entry) (Spec, error) {
	var parts []Entry
	found := false
	for _, ref := range composite.ComposedOf {
		if ref.Name == old {
			parts, found = append(parts, by), true
			continue
		}
		i := slices.IndexFunc(universe, func(e Entry) bool { return e.Ref == ref })
		if i < 0 {
			return Spec{}, fmt.Errorf("%w: part %s of block %s", errdef.ErrNotFound, ref, composite.Name)
		}
		parts = append(parts, universe[i])
	}
	if !found {
		return Spec{}, fmt.Errorf("%w: part %s of block %s", errdef.ErrNotFound, old, composite.Name)
	}
	root := parts[len(parts)-1]
	r, err := Resolve(root, parts, ResolveOptions{})
	if err != nil {
		return Spec{}, fmt.Errorf("swap part %s of block %s: %w", old, composite.Name, err)
	}
	return compose(level, ActSwap, title, r)
}

func compose(level TrustLevel, act Action, title Title, r Resolution) (Spec, error) {
	if len(r.Blocks) == 0 {
		return Spec{}, fmt.Errorf("%w: compose block %s: of no blocks", errdef.ErrInvalid, title.Name)
	}
	root := r.Blocks[len(r.Blocks)-1]
	s := Spec{
		Format: format, Name: title.Name, Version: title.Version, Description: title.Description, Author: title.Author,
		AuthorKey: title.AuthorKey, CognitiveLoad: Low, Run: root.Spec.Run,
	}
	for _, e := range r.Blocks {
		s.ComposedOf = append(s.ComposedOf, e.Ref)
		s.MinimumTrustLevel = max(s.MinimumTrustLevel, e.Spec.MinimumTrustLevel)
		if e.Spec.CognitiveLoad.rank() > s.CognitiveLoad.rank() {
			s.CognitiveLoad = e.Spec.CognitiveLoad
		}
	}
	if err := Allow(level, act, title.Name, s.MinimumTrustLevel); err != nil {
		return Spec{}, err
	}
	var err error
	if s.Provides, err = union(r.Blocks); err != nil {
		return Spec{}, err
	}
	if s.Requires, err = leftOpen(r); err != nil {
		return Spec{}, err
	}
	if err = s.Validate(nil); err != nil {
		return Spec{}, fmt.Errorf("compose block %s: %w", title.Name, err)
	}
	return s, nil
}

// union is what the blocks provide together, by name.
func union(blocks []Entry) ([]SpecProvide, error) {
	var all []SpecProvide
	for _, e := range blocks {
		for _, p := range e.Spec.Provides {
			i := slices.IndexFunc(all, func(q SpecProvide) bool { return q.Name == p.Name })
			switch {
			case i < 0:
				all = append(all, p)
			case all[i] != p:
				return nil, fmt.Errorf("%w: capability %s is provided as %s and as %s", errdef.ErrConflict, p.Name, all[i].Version, p.Version)
			}
		}
	}
	slices.SortFunc(all, func(a, b SpecProvide) int { return cmp.Compare(a.Name, b.Name) })
	return all, nil
}

// leftOpen is what the blocks require and the resolution has not met, by name.
// Ranges of several blocks become one in which all of them hold.
func leftOpen(r Resolution) ([]SpecRequire, error) {
	var open []SpecRequire
	for _, e := range r.Blocks {
		for _, q := range e.Spec.Requires {
			met := slices.ContainsFunc(r.Met, func(m Met) bool {
				return m.By == e.Ref && m.Capability == q.Name && m.Kind == q.Kind
			})
			if met {
				continue
			}
			i := slices.IndexFunc(open, func(o SpecRequire) bool { return o.Name == q.Name && o.Kind == q.Kind })
			if i < 0 {
				open = append(open, q)
				continue
			}
			var err error
			if open[i].Version, err = open[i].Version.and(q.Version); err != nil {
				return nil, fmt.Errorf("capability %s: %w", q.Name, err)
			}
		}
	}
	slices.SortFunc(open, func(a, b SpecRequire) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
	})
	return open, nil
}
