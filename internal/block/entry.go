package block

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Entry is a block and where it comes from.
type Entry struct {
	// Ref has the digest of the file.
	Ref  Ref
	Spec Spec
	// AddedAt is zero for a block that is not in a registry.
	AddedAt time.Time
	// Publisher is who added it, PublisherKey the id of their key, if they
	// have one.
	Publisher    string
	PublisherKey string
}

// NewEntry reads the file of a block that need not be in a registry; rule is as
// for Decode.
func NewEntry(file []byte, rule func(name string) error) (Entry, error) {
	s, err := Decode(file, rule)
	if err != nil {
		return Entry{}, err
	}
	return Entry{Ref: Ref{s.Name, s.Version, Digest(file)}, Spec: s}, nil
}

// ID is the block's id: the one that its file has, or one made of its digest.
func (e Entry) ID() ID {
	if id, err := ParseUUID(e.Spec.ID); err == nil {
		return ID{id}
	}
	return ID{UUIDOf(e.Ref.Digest)}
}

// Forge is the block in the form that Forge exchanges. ids are those of the
// blocks that it is made of.
func (e Entry) Forge(score TrustScore, ids map[Ref]ID) Block {
	b := Block{
		ID: e.ID(), Manifest: e.Spec.Manifest(), TrustScore: score, Author: e.Spec.Author,
		NixDerivation: e.Spec.NixDerivation, CreatedAt: e.AddedAt, UpdatedAt: e.AddedAt,
	}
	for _, ref := range e.Spec.ComposedOf {
		id, ok := ids[ref]
		if !ok {
			id = ID{UUIDOf(ref.Digest)}
		}
		b.ComposedOf = append(b.ComposedOf, id)
	}
	return b
}

// provides is the version of a capability that the block provides.
func (e Entry) provides(capability string) (SemVer, bool) {
	for _, p := range e.Spec.Provides {
		if p.Name == capability {
			return p.Version, true
		}
	}
	return SemVer{}, false
}

// entryFile is the content of entry.json: docs/formats/block.md.
type entryFile struct {
	Version      int       `json:"version"`
	Block        Ref       `json:"block"`
	AddedAt      time.Time `json:"added_at"`
	Publisher    string    `json:"publisher"`
	PublisherKey string    `json:"publisher_key,omitempty"`
}

func (e Entry) encode() ([]byte, error) {
	data, err := json.MarshalIndent(entryFile{format, e.Ref, e.AddedAt.UTC(), e.Publisher, e.PublisherKey}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode entry of block %s: %w", e.Ref, err)
	}
	return append(data, '\n'), nil
}

// errDamaged is in the category errdef.ErrUnavailable.
var errDamaged = fmt.Errorf("%w: it is damaged", errdef.ErrUnavailable)

// decodeEntry puts together what the two files of a block say. A rule of
// canonicalisation was checked when the block was added.
func decodeEntry(about, file []byte) (Entry, error) {
	e, err := NewEntry(file, nil)
	if err != nil {
		return Entry{}, fmt.Errorf("%w: %w", errDamaged, err)
	}
	var f entryFile
	d := json.NewDecoder(bytes.NewReader(about))
	d.DisallowUnknownFields()
	err = d.Decode(&f)
	if err == nil && d.More() {
		err = errors.New("something follows it")
	}
	if err == nil && f.Version > format {
		return Entry{}, fmt.Errorf("%w: entry.json of version %d", errdef.ErrUnsupported, f.Version)
	}
	if err == nil && (f.Version != format || f.Block != e.Ref) {
		err = fmt.Errorf("version %d, of %s, and the file is %s", f.Version, f.Block, e.Ref)
	}
	if err != nil {
		return Entry{}, fmt.Errorf("%w: entry.json: %w", errDamaged, err)
	}
	e.AddedAt, e.Publisher, e.PublisherKey = f.AddedAt, f.Publisher, f.PublisherKey
	return e, nil
}
