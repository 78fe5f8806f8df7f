package block

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// maxSteps bounds the search of Resolve.
const maxSteps = 10_000

// ResolveOptions say which requirements count.
type ResolveOptions struct {
	// Build takes those of kind Build too, of every block that is reached.
	Build bool
}

// Resolution is a choice of blocks in which each requirement is met.
type Resolution struct {
	// Blocks has each block after those that it requires; the root is the last.
	Blocks []Entry
	// Met says which block meets which requirement, in the order of Blocks.
	Met []Met
}

// Met is a requirement and the block that meets it.
type Met struct {
	By         Ref // who requires
	Capability string
	Range      Range
	Kind       DependencyKind
	Provider   Ref
	Version    SemVer // of the capability
}

// CycleError says that blocks require each other. It is in the category
// errdef.ErrConflict.
type CycleError struct {
	// Path begins and ends with the same block.
	Path []Ref
}

func (e *CycleError) Error() string {
	names := make([]string, len(e.Path))
	for i, r := range e.Path {
		names[i] = Ref{Name: r.Name, Version: r.Version}.String()
	}
	return "conflict: blocks require each other: " + strings.Join(names, " -> ")
}

// Unwrap gives the category.
func (e *CycleError) Unwrap() error { return errdef.ErrConflict }

// Resolve finds for each capability that root requires, and that the blocks
// chosen require, one block of the universe. Of several it prefers the highest
// version of the capability, then the first name, then the highest version of
// the block; it goes to the next where that leads to a conflict or a cycle. The
// order of the universe does not matter.
func Resolve(root Entry, universe []Entry, opts ResolveOptions) (Resolution, error) {
	s := &solver{opts: opts, providers: byCapability(universe)}
	start := choice{blocks: map[string]Entry{}, provider: map[string]Entry{}, edges: map[string][]string{}}
	if err := start.take(root); err != nil {
		return Resolution{}, err
	}
	done, err := s.solve(start, s.wants(root))
	if err != nil {
		return Resolution{}, fmt.Errorf("resolve block %s: %w", root.Ref, err)
	}
	return done.resolution(root), nil
}

// want is a requirement of a block.
type want struct {
	by   Entry
	need SpecRequire
}

func (w want) String() string {
	return fmt.Sprintf("block %s@%s wants %s", w.by.Ref.Name, w.by.Ref.Version, w.need.Version)
}

type solver struct {
	opts      ResolveOptions
	providers map[string][]Entry // by capability, best first
	steps     int
}

// byCapability lists for each capability who provides it, best first.
func byCapability(universe []Entry) map[string][]Entry {
	m := map[string][]Entry{}
	for _, e := range universe {
		for _, c := range e.Spec.Provides {
			m[c.Name] = append(m[c.Name], e)
		}
	}
	for name, list := range m {
		slices.SortStableFunc(list, func(a, b Entry) int {
			va, _ := a.provides(name)
			vb, _ := b.provides(name)
			return cmp.Or(vb.Compare(va), cmp.Compare(a.Ref.Name, b.Ref.Name), b.Ref.Version.Compare(a.Ref.Version),
				cmp.Compare(a.Ref.Digest, b.Ref.Digest))
		})
	}
	return m
}

func (s *solver) wants(e Entry) []want {
	var list []want
	for _, r := range e.Spec.Requires {
		if r.Kind == Runtime || s.opts.Build {
			list = append(list, want{e, r})
		}
	}
	return list
}

// solve meets the requirements that are open, one after the other. It returns
// the error that says most: the first that no other choice would have helped,
// or the first.
func (s *solver) solve(c choice, open []want) (choice, error) {
	if len(open) == 0 {
		return c, nil
	}
	if s.steps++; s.steps > maxSteps {
		return choice{}, fmt.Errorf("%w: no answer after %d steps", errdef.ErrExhausted, maxSteps)
	}
	w := open[0]
	if p, ok := c.provider[w.need.Name]; ok {
		next := c.clone()
		if err := s.meet(&next, w, p); err != nil {
			return choice{}, err
		}
		return s.solve(next, open[1:])
	}
	var first error
	for _, p := range s.providers[w.need.Name] {
		if v, _ := p.provides(w.need.Name); !w.need.Version.Contains(v) {
			continue
		}
		next := c.clone()
		err := next.take(p)
		if err == nil {
			err = s.meet(&next, w, p)
		}
		if err == nil {
			if next, err = s.solve(next, append(slices.Clone(open[1:]), s.wants(p)...)); err == nil {
				return next, nil
			}
		}
		if first == nil || isFinal(err) && !isFinal(first) {
			first = err
		}
	}
	if first == nil {
		first = s.unmet(w)
	}
	return choice{}, first
}

// finalError is one that no other choice would have helped.
type finalError struct{ error }

func (e finalError) Unwrap() error { return e.error }

func isFinal(err error) bool {
	_, ok := err.(finalError) //nolint:errorlint // solve passes on what it made itself, without wrapping it
	return ok
}

// meet notes that p meets w, if it does.
func (s *solver) meet(c *choice, w want, p Entry) error {
	c.met = append(slices.Clip(c.met), metBy{w, p})
	if v, _ := p.provides(w.need.Name); !w.need.Version.Contains(v) {
		return s.conflict(*c, w.need.Name, p)
	}
	from, to := w.by.Ref.String(), p.Ref.String()
	if path := c.path(to, from); path != nil {
		return &CycleError{append([]Ref{w.by.Ref}, path...)}
	}
	c.edges[from] = append(slices.Clip(c.edges[from]), to)
	return nil
}

// conflict says who wants what of a capability.
func (s *solver) conflict(c choice, capability string, chosen Entry) error {
	var wants []want
	var words []string
	for _, m := range c.met {
		if m.want.need.Name == capability {
			wants = append(wants, m.want)
			words = append(words, m.want.String())
		}
	}
	var versions []string
	for _, p := range s.providers[capability] {
		v, _ := p.provides(capability)
		if !slices.ContainsFunc(wants, func(w want) bool { return !w.need.Version.Contains(v) }) {
			chosenVersion, _ := chosen.provides(capability)
			return fmt.Errorf("%w: capability %s: %s, and block %s@%s provides %s", errdef.ErrConflict, capability,
				strings.Join(words, ", "), chosen.Ref.Name, chosen.Ref.Version, chosenVersion)
		}
		versions = append(versions, v.String())
	}
	if len(versions) == 0 { // the root itself
		v, _ := chosen.provides(capability)
		versions = []string{v.String()}
	}
	return finalError{fmt.Errorf("%w: capability %s: %s: no version that is provided (%s) is in all of these", errdef.ErrConflict, capability,
		strings.Join(words, ", "), strings.Join(slices.Compact(versions), ", "))}
}

func (s *solver) unmet(w want) error {
	var versions []string
	for _, p := range s.providers[w.need.Name] {
		v, _ := p.provides(w.need.Name)
		versions = append(versions, v.String())
	}
	if len(versions) == 0 {
		return finalError{fmt.Errorf("%w: capability %s: %s: no block provides it", errdef.ErrNotFound, w.need.Name, w)}
	}
	return finalError{fmt.Errorf("%w: capability %s: %s: there are only %s", errdef.ErrNotFound, w.need.Name, w,
		strings.Join(slices.Compact(versions), ", "))}
}

type metBy struct {
	want     want
	provider Entry
}

// choice is what has been chosen so far.
type choice struct {
	blocks   map[string]Entry // by name
	provider map[string]Entry // by capability
	edges    map[string][]string
	met      []metBy
}

func (c choice) clone() choice {
	return choice{maps.Clone(c.blocks), maps.Clone(c.provider), maps.Clone(c.edges), c.met}
}

// take adds a block, with all that it provides.
func (c *choice) take(e Entry) error {
	if other, ok := c.blocks[e.Ref.Name]; ok && other.Ref != e.Ref {
		return fmt.Errorf("%w: block %s in two versions: %s and %s", errdef.ErrConflict, e.Ref.Name, other.Ref.Version, e.Ref.Version)
	}
	c.blocks[e.Ref.Name] = e
	for _, p := range e.Spec.Provides {
		other, ok := c.provider[p.Name]
		if !ok {
			c.provider[p.Name] = e
			continue
		}
		if v, _ := other.provides(p.Name); v != p.Version {
			return fmt.Errorf("%w: capability %s: block %s@%s provides %s, block %s@%s provides %s", errdef.ErrConflict, p.Name,
				other.Ref.Name, other.Ref.Version, v, e.Ref.Name, e.Ref.Version, p.Version)
		}
	}
	return nil
}

// path returns the blocks from one to another along what they require, or nil.
func (c choice) path(from, to string) []Ref {
	seen := map[string]bool{}
	var walk func(at string) []string
	walk = func(at string) []string {
		if at == to {
			return []string{at}
		}
		if seen[at] {
			return nil
		}
		seen[at] = true
		for _, next := range c.edges[at] {
			if rest := walk(next); rest != nil {
				return append([]string{at}, rest...)
			}
		}
		return nil
	}
	names := walk(from)
	if names == nil {
		return nil
	}
	byRef := map[string]Ref{}
	for _, e := range c.blocks {
		byRef[e.Ref.String()] = e.Ref
	}
	refs := make([]Ref, len(names))
	for i, n := range names {
		refs[i] = byRef[n]
	}
	return refs
}

// resolution orders what was chosen.
func (c choice) resolution(root Entry) Resolution {
	var r Resolution
	byRef := map[string]Entry{}
	for _, e := range c.blocks {
		byRef[e.Ref.String()] = e
	}
	seen := map[string]bool{}
	var visit func(ref string)
	visit = func(ref string) {
		if seen[ref] {
			return
		}
		seen[ref] = true
		for _, next := range c.edges[ref] {
			visit(next)
		}
		r.Blocks = append(r.Blocks, byRef[ref])
		for _, m := range c.met {
			if m.want.by.Ref.String() != ref {
				continue
			}
			v, _ := m.provider.provides(m.want.need.Name)
			r.Met = append(r.Met, Met{m.want.by.Ref, m.want.need.Name, m.want.need.Version, m.want.need.Kind, m.provider.Ref, v})
		}
	}
	visit(root.Ref.String())
	return r
}
