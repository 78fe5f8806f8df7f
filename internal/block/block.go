// Package block keeps units of work that have a name and a version, and what is
// known of how far each can be trusted.
//
// A Block is a file: what it provides and requires, what it runs on, and the
// command. A registry keeps blocks side by side; requirements are resolved to
// one provider of each capability, the same one every time. A trust level says
// who may run, swap, compose and publish. A trust score is a function of
// evidence, which lists what each piece of it weighs; one reproducible mismatch
// makes it zero. What is decoded is valid, or it is an error.
//
// The package starts no machine: it makes the input of a run and hands it to an
// Executor. It checks no signature of evidence either: its caller has.
// docs/blocks.md explains blocks, docs/formats/block.md describes the files.
package block

import (
	"slices"
	"time"
)

// The words of a Dependency's kind.
const (
	// Runtime is needed whenever the block runs.
	Runtime DependencyKind = "Runtime"
	// Build is needed to make what the block runs on.
	Build DependencyKind = "Build"
)

// The words of a CognitiveLoad: what it takes to use a block.
const (
	Low    CognitiveLoad = "Low"
	Medium CognitiveLoad = "Medium"
	High   CognitiveLoad = "High"
)

// DependencyKind says when a dependency is needed.
type DependencyKind string

// CognitiveLoad says what a person must know to use a block.
type CognitiveLoad string

// Block is a block in the form that Forge exchanges.
type Block struct {
	ID       ID       `json:"id"`
	Manifest Manifest `json:"manifest"`
	// ComposedOf is nil for a block that is not made of others.
	ComposedOf []ID       `json:"composed_of"`
	TrustScore TrustScore `json:"trust_score"`
	Author     string     `json:"author"`
	// NixDerivation is the hash of the derivation that made the block; empty
	// when Nix did not.
	NixDerivation string    `json:"nix_derivation"`
	CreatedAt     time.Time `json:"created_at"`
	UpdatedAt     time.Time `json:"updated_at"`
}

// Manifest says what a block is and what it needs.
type Manifest struct {
	Name              string        `json:"name"`
	Version           SemVer        `json:"version"`
	Description       string        `json:"description"`
	Requires          []Dependency  `json:"requires"`
	Provides          []Capability  `json:"provides"`
	CognitiveLoad     CognitiveLoad `json:"cognitive_load"`
	MinimumTrustLevel TrustLevel    `json:"minimum_trust_level"`
}

// Dependency is a capability that a block needs, from whichever block provides
// it.
type Dependency struct {
	Name       string         `json:"name"`
	VersionReq Range          `json:"version_req"`
	Kind       DependencyKind `json:"kind"`
}

// Capability is what a block gives to others.
type Capability struct {
	Name    string `json:"name"`
	Version SemVer `json:"version"`
}

// UnmarshalJSON reads a block and validates it.
func (b *Block) UnmarshalJSON(data []byte) error {
	var v Block
	var parts []*ID // to tell null from an id
	err := decodeObject(data, "block", fields{
		"id": &v.ID, "manifest": &v.Manifest, "trust_score": &v.TrustScore, "author": &v.Author,
		"nix_derivation": &v.NixDerivation, "created_at": &v.CreatedAt, "updated_at": &v.UpdatedAt,
	}, fields{"composed_of": &parts})
	if parts != nil {
		v.ComposedOf = make([]ID, len(parts))
	}
	for i, id := range parts {
		if id == nil {
			return idError("block", "it is null")
		}
		v.ComposedOf[i] = *id
	}
	if err == nil {
		err = v.Validate()
	}
	if err == nil {
		*b = v
	}
	return err
}

// MarshalJSON writes times as Forge does, in UTC.
func (b Block) MarshalJSON() ([]byte, error) {
	type plain Block
	b.CreatedAt, b.UpdatedAt = b.CreatedAt.UTC(), b.UpdatedAt.UTC()
	return marshal(plain(b))
}

// Validate finds what is wrong with b.
func (b Block) Validate() error {
	if err := b.Manifest.Validate(); err != nil {
		return err
	}
	if err := checkText("author", b.Author, maxAuthor); err != nil {
		return err
	}
	if err := checkDerivation(b.NixDerivation); err != nil {
		return err
	}
	for i, id := range b.ComposedOf {
		if id == b.ID {
			return manifestError("composed_of", "the block is part of itself")
		}
		if slices.Contains(b.ComposedOf[:i], id) {
			return manifestError("composed_of", "%s is there twice", id)
		}
	}
	return nil
}

// UnmarshalJSON reads a manifest and validates it.
func (m *Manifest) UnmarshalJSON(data []byte) error {
	var v Manifest
	err := decodeObject(data, "manifest", fields{
		"name": &v.Name, "version": &v.Version, "description": &v.Description, "requires": &v.Requires, "provides": &v.Provides,
		"cognitive_load": &v.CognitiveLoad, "minimum_trust_level": &v.MinimumTrustLevel,
	}, nil)
	if err == nil {
		err = v.Validate()
	}
	if err == nil {
		*m = v
	}
	return err
}

// MarshalJSON writes lists that are nil as empty ones: Forge reads no null
// there.
func (m Manifest) MarshalJSON() ([]byte, error) {
	type plain Manifest
	if m.Requires == nil {
		m.Requires = []Dependency{}
	}
	if m.Provides == nil {
		m.Provides = []Capability{}
	}
	return marshal(plain(m))
}

// UnmarshalJSON reads a dependency; its manifest validates it.
func (d *Dependency) UnmarshalJSON(data []byte) error {
	var v Dependency
	err := decodeObject(data, "dependency", fields{"name": &v.Name, "version_req": &v.VersionReq, "kind": &v.Kind}, nil)
	if err == nil {
		*d = v
	}
	return err
}

// UnmarshalJSON reads a capability; its manifest validates it.
func (c *Capability) UnmarshalJSON(data []byte) error {
	var v Capability
	err := decodeObject(data, "capability", fields{"name": &v.Name, "version": &v.Version}, nil)
	if err == nil {
		*c = v
	}
	return err
}

// UnmarshalText accepts the two kinds.
func (k *DependencyKind) UnmarshalText(text []byte) error {
	v := DependencyKind(text)
	if v != Runtime && v != Build {
		return manifestError("kind", "%q is not Runtime or Build", text)
	}
	*k = v
	return nil
}

// UnmarshalText accepts the three loads.
func (l *CognitiveLoad) UnmarshalText(text []byte) error {
	v := CognitiveLoad(text)
	if v.rank() < 0 {
		return manifestError("cognitive_load", "%q is not Low, Medium or High", text)
	}
	*l = v
	return nil
}

// rank orders loads; it is -1 for what is none.
func (l CognitiveLoad) rank() int { return slices.Index([]CognitiveLoad{Low, Medium, High}, l) }
