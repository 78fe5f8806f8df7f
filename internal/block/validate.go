package block

import (
	"fmt"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/tinevm/tine/internal/errdef"
)

// What a block may hold at most.
const (
	maxDescription = 4096
	maxAuthor      = 256
	maxListed      = 256 // requires, provides, composed_of
)

var (
	nameRE = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$`)
	// derivationRE has the alphabet of Nix, which leaves out e, o, t and u.
	derivationRE = regexp.MustCompile(`^[0-9abcdfghijklmnpqrsvwxyz]{32}$`)
)

// CheckName returns errdef.ErrInvalid unless name can be a block's or a
// capability's, and so part of a path.
func CheckName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%w: name %q: %s", errdef.ErrInvalid, name, nameRule)
	}
	return nil
}

const nameRule = "want a letter, digit or _ and then up to 63 of letters, digits, '.', '_', '-'"

// Validate finds what is wrong with m.
func (m Manifest) Validate() error {
	if !nameRE.MatchString(m.Name) {
		return manifestError("name", "%q: %s", m.Name, nameRule)
	}
	if err := checkText("description", m.Description, maxDescription); err != nil {
		return err
	}
	if m.CognitiveLoad.rank() < 0 {
		return manifestError("cognitive_load", "%q is not Low, Medium or High", m.CognitiveLoad)
	}
	if !m.MinimumTrustLevel.valid() {
		return manifestError("minimum_trust_level", "there is no level %d", m.MinimumTrustLevel)
	}
	if err := checkRequires(m.Requires); err != nil {
		return err
	}
	return checkProvides(m.Provides)
}

func checkRequires(requires []Dependency) error {
	if len(requires) > maxListed {
		return manifestError("requires", "%d of them: at most %d", len(requires), maxListed)
	}
	seen := map[Dependency]bool{}
	for _, d := range requires {
		if !nameRE.MatchString(d.Name) {
			return manifestError("requires", "%q: %s", d.Name, nameRule)
		}
		if d.VersionReq.text == "" {
			return manifestError("requires", "%s has no version range", d.Name)
		}
		if d.Kind != Runtime && d.Kind != Build {
			return manifestError("requires", "%s: kind %q is not Runtime or Build", d.Name, d.Kind)
		}
		key := Dependency{Name: d.Name, Kind: d.Kind}
		if seen[key] {
			return manifestError("requires", "%s is there twice as %s", d.Name, d.Kind)
		}
		seen[key] = true
	}
	return nil
}

func checkProvides(provides []Capability) error {
	if len(provides) > maxListed {
		return manifestError("provides", "%d of them: at most %d", len(provides), maxListed)
	}
	seen := map[string]bool{}
	for _, c := range provides {
		if !nameRE.MatchString(c.Name) {
			return manifestError("provides", "%q: %s", c.Name, nameRule)
		}
		if seen[c.Name] {
			return manifestError("provides", "%s is there twice", c.Name)
		}
		seen[c.Name] = true
	}
	return nil
}

// checkText accepts a text that a person can be shown in one line, and that may
// be empty.
func checkText(field, text string, most int) error {
	if len(text) > most {
		return manifestError(field, "%d bytes: at most %d", len(text), most)
	}
	if !utf8.ValidString(text) {
		return manifestError(field, "it is not UTF-8")
	}
	if i := strings.IndexFunc(text, unicode.IsControl); i >= 0 {
		return manifestError(field, "a control character at byte %d", i)
	}
	return nil
}

func checkDerivation(hash string) error {
	if hash != "" && !derivationRE.MatchString(hash) {
		return manifestError("nix_derivation", "%q is not 32 digits of Nix's base 32", hash)
	}
	return nil
}
