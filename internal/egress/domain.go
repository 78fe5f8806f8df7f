package egress

import (
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

const (
	maxName  = 253
	maxLabel = 63
)

// parseDomain returns the normal form of a rule's domain.
func parseDomain(text string) (string, error) {
	if text == "*" {
		return text, nil
	}
	rest, wild := strings.CutPrefix(text, "*.")
	name, err := parseName(rest)
	if err != nil {
		return "", err
	}
	if wild {
		return "*." + name, nil
	}
	return name, nil
}

// parseName returns the normal form of a host's name: in lower case, without a
// final dot. It is meant for names of rules and for those that guests send.
func parseName(text string) (string, error) {
	name := strings.TrimSuffix(text, ".")
	if name == "" || len(name) > maxName {
		return "", fmt.Errorf("%w: domain %.40q has a length that is not 1 to %d", errdef.ErrInvalid, text, maxName)
	}
	label := 0 // the length of the present label so far
	for i := range len(name) {
		c := name[i]
		switch {
		case c >= 0x80:
			return "", errdef.WithHint(fmt.Errorf("%w: domain %.80q is not ASCII", errdef.ErrInvalid, text),
				"write the name in punycode, as in xn--mnchen-3ya.example")
		case c == '.' && (label == 0 || name[i-1] == '-'), c == '-' && label == 0, !isNameByte(c), label == maxLabel && c != '.':
			return "", fmt.Errorf("%w: domain %.80q is no host name", errdef.ErrInvalid, text)
		case c == '.':
			label = 0
		default:
			label++
		}
	}
	last := name[strings.LastIndexByte(name, '.')+1:]
	if label == 0 || name[len(name)-1] == '-' || strings.Trim(last, "0123456789") == "" {
		return "", fmt.Errorf("%w: domain %.80q is no host name", errdef.ErrInvalid, text)
	}
	return strings.ToLower(name), nil
}

func isNameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.'
}

// domains finds what belongs to a name among patterns: names, "*." and a name,
// and "*".
type domains[T any] struct {
	exact map[string]T
	below map[string]T // by what follows "*."; "" is of "*"
}

func newDomains[T any]() domains[T] {
	return domains[T]{exact: map[string]T{}, below: map[string]T{}}
}

// entry is where the pattern's value is, and under which key.
func (d domains[T]) entry(pattern string) (in map[string]T, key string) {
	if pattern == "*" {
		return d.below, ""
	}
	if rest, ok := strings.CutPrefix(pattern, "*."); ok {
		return d.below, rest
	}
	return d.exact, pattern
}

// match calls f with the value of each pattern that name, in normal form,
// matches, the closest first, until f returns false.
func (d domains[T]) match(name string, f func(T) bool) {
	if v, ok := d.exact[name]; ok && !f(v) {
		return
	}
	for rest := name; rest != ""; {
		_, rest, _ = strings.Cut(rest, ".")
		if v, ok := d.below[rest]; ok && !f(v) {
			return
		}
	}
}
