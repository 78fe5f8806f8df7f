package block

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// SemVer is a version of three numbers. Its JSON is an object of them, its text
// 1.2.3.
type SemVer struct {
	Major uint32 `json:"major"`
	Minor uint32 `json:"minor"`
	Patch uint32 `json:"patch"`
}

// ParseSemVer reads three numbers with dots between them. A block's version has
// no pre-release part and no build part.
func ParseSemVer(text string) (SemVer, error) {
	parts := strings.Split(text, ".")
	var numbers [3]uint32
	if len(parts) != len(numbers) {
		return SemVer{}, fmt.Errorf("%w: version %.80q: want three numbers, as in 1.2.3", errdef.ErrInvalid, text)
	}
	for i, part := range parts {
		n, err := parseNumber(part)
		if err != nil || n > math.MaxUint32 {
			return SemVer{}, fmt.Errorf("%w: version %.80q: %.80q is not a number from 0 to %d without leading zeros", errdef.ErrInvalid, text, part, uint32(math.MaxUint32))
		}
		numbers[i] = uint32(n)
	}
	return SemVer{numbers[0], numbers[1], numbers[2]}, nil
}

// parseNumber reads digits without a leading zero.
func parseNumber(text string) (uint64, error) {
	n, err := strconv.ParseUint(text, 10, 64)
	if err == nil && strconv.FormatUint(n, 10) != text {
		err = fmt.Errorf("%w: number %.80q", errdef.ErrInvalid, text)
	}
	return n, err
}

// String is 1.2.3.
func (v SemVer) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

// Compare orders versions.
func (v SemVer) Compare(w SemVer) int {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch))
}

// MarshalJSON writes the object.
func (v SemVer) MarshalJSON() ([]byte, error) {
	type plain SemVer
	return json.Marshal(plain(v))
}

// UnmarshalJSON reads the object.
func (v *SemVer) UnmarshalJSON(data []byte) error {
	var w SemVer
	err := decodeObject(data, "version", fields{"major": &w.Major, "minor": &w.Minor, "patch": &w.Patch}, nil)
	if err == nil {
		*v = w
	}
	return err
}

// MarshalText writes 1.2.3.
func (v SemVer) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText reads 1.2.3.
func (v *SemVer) UnmarshalText(text []byte) error {
	w, err := ParseSemVer(string(text))
	if err == nil {
		*v = w
	}
	return err
}
