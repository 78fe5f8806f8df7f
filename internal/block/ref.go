package block

import (
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// Ref names one block of a registry: NAME@VERSION, and with a digest one file of
// it: NAME@VERSION#sha256:HEX.
type Ref struct {
	Name    string
	Version SemVer
	Digest  string // may be empty
}

// String is what ParseRef reads.
func (r Ref) String() string {
	text := r.Name + "@" + r.Version.String()
	if r.Digest != "" {
		text += "#" + r.Digest
	}
	return text
}

// ParseRef reads NAME@VERSION and NAME@VERSION#DIGEST.
func ParseRef(text string) (Ref, error) {
	name, rest, ok := strings.Cut(text, "@")
	if !ok {
		return Ref{}, fmt.Errorf("%w: block %.80q: want NAME@VERSION", errdef.ErrInvalid, text)
	}
	if err := CheckName(name); err != nil {
		return Ref{}, err
	}
	number, digest, pinned := strings.Cut(rest, "#")
	if pinned && !digestRE.MatchString(digest) {
		return Ref{}, fmt.Errorf("%w: block %s: digest %.80q: want sha256: and 64 hexadecimal digits", errdef.ErrInvalid, name, digest)
	}
	v, err := ParseSemVer(number)
	if err != nil {
		return Ref{}, err
	}
	return Ref{name, v, digest}, nil
}

// MarshalText writes String.
func (r Ref) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what ParseRef reads.
func (r *Ref) UnmarshalText(text []byte) error {
	v, err := ParseRef(string(text))
	if err == nil {
		*r = v
	}
	return err
}
