package block

import (
	"errors"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// maxComparators is how many a range may list, as in Cargo.
const maxComparators = 32

// Range is a set of versions, written as Cargo writes requirements. It keeps the
// text it was read from; the zero Range has none and no version is in it. Ranges
// of equal text are equal.
type Range struct{ text string }

// comparator is one condition of a range. A part that was not written, or was a
// wildcard, is missing: parts says how many there are.
type comparator struct {
	op    string // "=", ">", ">=", "<", "<=", "~", "^"
	parts int
	v     [3]uint64
	// pre: there is a pre-release part, so it means a moment before v. No
	// version of a block has one.
	pre bool
}

// ParseRange reads what Cargo reads as a version requirement: conditions with
// commas between them, all of which must hold. A bare version is a caret; parts
// may be left out or be *.
func ParseRange(text string) (Range, error) {
	if _, err := comparators(text); err != nil {
		return Range{}, fmt.Errorf("%w: version range %.80q: %w", errdef.ErrInvalid, text, err)
	}
	return Range{text}, nil
}

// String is the text.
func (r Range) String() string { return r.text }

// Contains reports whether v is in r.
func (r Range) Contains(v SemVer) bool {
	list, err := comparators(r.text)
	if err != nil {
		return false
	}
	for _, c := range list {
		if !c.contains(v) {
			return false
		}
	}
	return true
}

// and is the range of what is in both.
func (r Range) and(other Range) (Range, error) {
	switch {
	case r == other || isWildcard(strings.Trim(other.text, " ")):
		return r, nil
	case isWildcard(strings.Trim(r.text, " ")):
		return other, nil
	default:
		return ParseRange(r.text + ", " + other.text)
	}
}

// MarshalText writes the text.
func (r Range) MarshalText() ([]byte, error) { return []byte(r.text), nil }

// UnmarshalText reads a range.
func (r *Range) UnmarshalText(text []byte) error {
	v, err := ParseRange(string(text))
	if err == nil {
		*r = v
	}
	return err
}

// comparators parses a range; the range of everything has none.
func comparators(text string) ([]comparator, error) {
	text = strings.Trim(text, " ")
	if isWildcard(text) {
		return nil, nil
	}
	pieces := strings.Split(text, ",")
	if len(pieces) > maxComparators {
		return nil, fmt.Errorf("%d conditions: at most %d", len(pieces), maxComparators)
	}
	var list []comparator
	for _, piece := range pieces {
		c, err := parseComparator(strings.Trim(piece, " "))
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

func isWildcard(part string) bool { return part == "*" || part == "x" || part == "X" }

func parseComparator(text string) (comparator, error) {
	c := comparator{op: "^"}
	rest := text
	for _, op := range []string{">=", "<=", ">", "<", "=", "~", "^"} {
		if after, ok := strings.CutPrefix(text, op); ok {
			c.op, rest = op, strings.TrimLeft(after, " ")
			break
		}
	}
	if rest == "" {
		return c, errors.New("a version is missing")
	}
	numbers, build, hasBuild := strings.Cut(rest, "+")
	numbers, pre, hasPre := strings.Cut(numbers, "-")
	parts := strings.Split(numbers, ".")
	if len(parts) > len(c.v) {
		return c, fmt.Errorf("%q has more than three parts", rest)
	}
	wild := false
	for i, part := range parts {
		switch {
		case isWildcard(part) && i == 0:
			return c, fmt.Errorf("%s must stand alone", part)
		case isWildcard(part):
			wild = true
			continue
		case wild:
			return c, fmt.Errorf("%q has a number after a wildcard", rest)
		}
		n, err := parseNumber(part)
		if err != nil {
			return c, fmt.Errorf("%.80q is not a number without leading zeros", part)
		}
		c.v[i], c.parts = n, i+1
	}
	if wild && c.op == "^" && rest == text {
		// Without a sign 1.2.* is what begins so, while ^1.2 goes on to 2.
		c.op = "="
	}
	c.pre = hasPre
	return c, checkSuffixes(rest, c.parts, pre, hasPre, build, hasBuild)
}

// checkSuffixes accepts what may follow a version's three numbers.
func checkSuffixes(text string, parts int, pre string, hasPre bool, build string, hasBuild bool) error {
	if (hasPre || hasBuild) && parts < 3 {
		return fmt.Errorf("%q: a pre-release or build part wants three numbers before it", text)
	}
	if hasPre && !identifiers(pre, true) || hasBuild && !identifiers(build, false) {
		return fmt.Errorf("%q: what follows the numbers is not letters, digits and dashes between dots", text)
	}
	return nil
}

// identifiers reports whether text is identifiers with dots between them. Those
// of a pre-release have no leading zeros when they are numbers.
func identifiers(text string, pre bool) bool {
	for id := range strings.SplitSeq(text, ".") {
		numeric := id != ""
		for _, r := range []byte(id) {
			digit := r >= '0' && r <= '9'
			numeric = numeric && digit
			if !digit && r != '-' && (r|0x20 < 'a' || r|0x20 > 'z') {
				return false
			}
		}
		if id == "" || pre && numeric && len(id) > 1 && id[0] == '0' {
			return false
		}
	}
	return true
}

// contains tells whether v meets c. Since no v has a pre-release part, a version
// that is equal in its three numbers to one that has is after it.
func (c comparator) contains(v SemVer) bool {
	at := [3]uint64{uint64(v.Major), uint64(v.Minor), uint64(v.Patch)}
	order := c.compare(at)
	switch c.op {
	case "=":
		return order == 0
	case ">":
		return order > 0
	case ">=":
		return order >= 0
	case "<":
		return order < 0
	case "<=":
		return order <= 0
	case "~":
		return order >= 0 && c.agrees(at, min(2, c.parts))
	default:
		return order >= 0 && c.agrees(at, c.caret())
	}
}

// compare orders a version and the versions that c writes: 0 is one of them.
func (c comparator) compare(at [3]uint64) int {
	for i := range c.parts {
		if at[i] != c.v[i] {
			if at[i] > c.v[i] {
				return 1
			}
			return -1
		}
	}
	if c.pre {
		return 1
	}
	return 0
}

// agrees reports whether the first n parts are the same.
func (c comparator) agrees(at [3]uint64, n int) bool {
	for i := range n {
		if at[i] != c.v[i] {
			return false
		}
	}
	return true
}

// caret is how many parts a compatible version shares: up to the first that is
// not zero, of those written.
func (c comparator) caret() int {
	for i := range c.parts {
		if c.v[i] != 0 {
			return i + 1
		}
	}
	return c.parts
}
