package block

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	// FileName is what a block's file is called in its directory.
	FileName = "block.toml"
	// MaxFile bounds a block's file.
	MaxFile = 1 << 20
	// format is the version of the file's format.
	format = 1
)

// Spec is a block as its file has it: docs/formats/block.md.
type Spec struct {
	Format            int           `toml:"format"`
	Name              string        `toml:"name"`
	Version           SemVer        `toml:"version"`
	Description       string        `toml:"description"`
	Author            string        `toml:"author"`
	CognitiveLoad     CognitiveLoad `toml:"cognitive_load"`
	MinimumTrustLevel TrustLevel    `toml:"minimum_trust_level"`
	// ID is made of the file's digest where it is empty.
	ID            string `toml:"id,omitempty"`
	NixDerivation string `toml:"nix_derivation,omitempty"`
	// AuthorKey is the id of the key whose own re-runs say little.
	AuthorKey string `toml:"author_key,omitempty"`
	// ComposedOf pins the blocks that this one is made of: Ref.String.
	ComposedOf []Ref         `toml:"composed_of,omitempty"`
	Provides   []SpecProvide `toml:"provides,omitempty"`
	Requires   []SpecRequire `toml:"requires,omitempty"`
	Run        Run           `toml:"run"`
}

// SpecProvide is a capability in a block's file.
type SpecProvide struct {
	Name    string `toml:"name"`
	Version SemVer `toml:"version"`
}

// SpecRequire is a dependency in a block's file.
type SpecRequire struct {
	Name    string `toml:"name"`
	Version Range  `toml:"version"`
	// Kind is Runtime where it is empty.
	Kind DependencyKind `toml:"kind,omitempty"`
}

// Run says what a block runs on, and what it runs.
type Run struct {
	// One of these three says what it runs on: a source as image build takes it,
	// the name or digest of an image, or the tag or digest of a snapshot.
	Source   string `toml:"source,omitempty"`
	Image    string `toml:"image,omitempty"`
	Snapshot string `toml:"snapshot,omitempty"`
	// Warmup are shell commands that run before the machine is frozen. A
	// snapshot has had its own.
	Warmup  []string `toml:"warmup,omitempty"`
	Command []string `toml:"command"`
	Env     []string `toml:"env,omitempty"`
	Cwd     string   `toml:"cwd,omitempty"`
	// Stdin is what a run reads that is given no input.
	Stdin string `toml:"stdin,omitempty"`
	Seed  uint64 `toml:"seed,omitempty"`
	// Start is the guest's clock; DefaultStart where it is nil.
	Start *Moment `toml:"start,omitempty"`
	// Collect are files to read when the command has ended.
	Collect []string `toml:"collect,omitempty"`
	// Canonical are the rules that stdout and stderr are compared under,
	// CanonicalFiles those for collected files.
	Canonical      []string  `toml:"canonical,omitempty"`
	CanonicalFiles []string  `toml:"canonical_files,omitempty"`
	Limits         RunLimits `toml:"limits,omitempty"`
	Files          []RunFile `toml:"files,omitempty"`
}

// RunLimits end a run that goes too far; zero is the runner's default.
type RunLimits struct {
	Virtual Span  `toml:"virtual,omitempty"`
	Wall    Span  `toml:"wall,omitempty"`
	Output  int64 `toml:"output,omitempty"` // bytes
}

// RunFile is a file that is written before the command starts. Its content is
// Text, or Base64 for what is no text.
type RunFile struct {
	Path   string `toml:"path"`
	Mode   uint32 `toml:"mode,omitempty"`
	Text   string `toml:"text,omitempty"`
	Base64 string `toml:"base64,omitempty"`
}

// DefaultStart is the guest's clock for a block that names none: what a block
// puts out must not depend on when it runs.
func DefaultStart() time.Time { return time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC) }

// Span is a time.Duration whose text is as time.ParseDuration has it.
type Span time.Duration

// MarshalText writes it.
func (s Span) MarshalText() ([]byte, error) { return []byte(time.Duration(s).String()), nil }

// UnmarshalText refuses what is not longer than nothing, or longer than a day.
func (s *Span) UnmarshalText(text []byte) error {
	d, err := time.ParseDuration(string(text))
	if err != nil || d <= 0 || d > 24*time.Hour {
		return fmt.Errorf("%w: duration %.80q: want more than 0 and at most 24h, as in 1m30s", errdef.ErrInvalid, text)
	}
	*s = Span(d)
	return nil
}

// Moment is a time that names its offset from UTC: what a block runs at must not
// depend on the host's time zone. Its text is RFC 3339's, between quotes.
type Moment time.Time

// MarshalText writes it in UTC.
func (m Moment) MarshalText() ([]byte, error) {
	return []byte(time.Time(m).UTC().Format(time.RFC3339Nano)), nil
}

// UnmarshalText refuses times that the guest's clock does not tell.
func (m *Moment) UnmarshalText(text []byte) error {
	t, err := time.Parse(time.RFC3339Nano, string(text))
	if err != nil || t.Unix() < 0 || t.UTC().Year() > 2200 {
		return fmt.Errorf("%w: time %.80q: want RFC 3339 between 1970 and 2200, as in 2026-01-01T00:00:00Z", errdef.ErrInvalid, text)
	}
	*m = Moment(t)
	return nil
}

// Decode reads a block's file and validates it. rule says whether a rule of
// canonicalisation exists; a nil one knows all of them. An error names the line
// or the field that is wrong.
func Decode(data []byte, rule func(name string) error) (Spec, error) {
	s, err := decodeSpec(data)
	if err == nil {
		err = s.Validate(rule)
	}
	if err != nil {
		return Spec{}, fmt.Errorf("%s: %w", FileName, err)
	}
	return s, nil
}

func decodeSpec(data []byte) (Spec, error) {
	if len(data) > MaxFile {
		return Spec{}, fmt.Errorf("%w: more than %d bytes", errdef.ErrInvalid, MaxFile)
	}
	if err := checkFormat(data); err != nil {
		return Spec{}, err
	}
	// The defaults of what a zero value does not mean.
	const noLevel = TrustLevel(255)
	s := Spec{CognitiveLoad: Low, MinimumTrustLevel: noLevel}
	d := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return Spec{}, atLine(err)
	}
	if err := checkKeys(data); err != nil {
		return Spec{}, err
	}
	if s.MinimumTrustLevel == noLevel {
		return Spec{}, manifestError("minimum_trust_level", "it is missing")
	}
	for i := range s.Requires {
		if s.Requires[i].Kind == "" {
			s.Requires[i].Kind = Runtime
		}
	}
	return s, nil
}

// checkFormat looks at the version first, so that a file of a later one is
// called that, and not wrong.
func checkFormat(data []byte) error {
	var head struct {
		Format *int `toml:"format"`
	}
	if err := toml.Unmarshal(data, &head); err != nil {
		return atLine(err)
	}
	switch {
	case head.Format == nil:
		return manifestError("format", "it is missing: want format = %d", format)
	case *head.Format > format:
		return fmt.Errorf("%w: format %d: this version of tine reads %d", errdef.ErrUnsupported, *head.Format, format)
	case *head.Format != format:
		return manifestError("format", "%d: want %d", *head.Format, format)
	}
	return nil
}

// atLine words an error of the decoder: the line, the key and what is wrong.
func atLine(err error) error {
	if missing, ok := errors.AsType[*toml.StrictMissingError](err); ok && len(missing.Errors) > 0 {
		first := missing.Errors[0]
		line, _ := first.Position()
		return fmt.Errorf("%w: line %d: unknown key %q", errdef.ErrInvalid, line, strings.Join(first.Key(), "."))
	}
	if wrong, ok := errors.AsType[*toml.DecodeError](err); ok {
		line, _ := wrong.Position()
		what := strings.TrimPrefix(strings.TrimPrefix(wrong.Error(), "toml: "), errdef.ErrInvalid.Error()+": ")
		if kind, ok := strings.CutPrefix(what, "cannot decode TOML "); ok {
			what = unwanted(kind)
		}
		if len(wrong.Key()) > 0 {
			what = strings.Join(wrong.Key(), ".") + ": " + what
		}
		return fmt.Errorf("%w: line %d: %s", errdef.ErrInvalid, line, what)
	}
	return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
}

// unwanted words that a value is of the wrong kind, without Go's names of types.
func unwanted(rest string) string {
	kind, _, _ := strings.Cut(rest, " into ")
	what := "a TOML " + kind + " does not belong here"
	if strings.Contains(kind, "date") {
		what += ": write times between quotes"
	}
	return what
}

// checkKeys refuses keys with capitals, which the decoder takes for those
// without.
func checkKeys(data []byte) error {
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		return atLine(err)
	}
	key := capital(tree)
	if key == "" {
		return nil
	}
	before, _, _ := bytes.Cut(data, []byte(key))
	return fmt.Errorf("%w: line %d: unknown key %q", errdef.ErrInvalid, 1+bytes.Count(before, []byte("\n")), key)
}

// capital finds a key that is not in lower case; the first by the alphabet.
func capital(node any) (found string) {
	note := func(key string) {
		if key != "" && (found == "" || key < found) {
			found = key
		}
	}
	switch v := node.(type) {
	case map[string]any:
		for key, inner := range v {
			if strings.ToLower(key) != key {
				note(key)
			}
			note(capital(inner))
		}
	case []any:
		for _, inner := range v {
			note(capital(inner))
		}
	}
	return found
}

// Encode writes s as a file that Decode reads.
func (s Spec) Encode() ([]byte, error) {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).SetIndentTables(false).Encode(s); err != nil {
		return nil, fmt.Errorf("encode block %s: %w", s.Name, err)
	}
	if b.Len() > MaxFile {
		return nil, fmt.Errorf("%w: encode block %s: more than %d bytes", errdef.ErrInvalid, s.Name, MaxFile)
	}
	return b.Bytes(), nil
}

// Digest names a block's file by its exact bytes: "sha256:" and 64 hexadecimal
// digits.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// Manifest is the part of s that says what it is and needs.
func (s Spec) Manifest() Manifest {
	m := Manifest{
		Name: s.Name, Version: s.Version, Description: s.Description,
		CognitiveLoad: s.CognitiveLoad, MinimumTrustLevel: s.MinimumTrustLevel,
	}
	for _, r := range s.Requires {
		m.Requires = append(m.Requires, Dependency{Name: r.Name, VersionReq: r.Version, Kind: r.Kind})
	}
	for _, p := range s.Provides {
		m.Provides = append(m.Provides, Capability(p))
	}
	return m
}
