package block

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
)

// TrustLevel is how far a caller is trusted. Levels are ordered.
type TrustLevel uint8

// The levels. Each may do what those below it may.
const (
	// Zero may run blocks, and compositions of them, that others have approved.
	Zero TrustLevel = iota
	// One may swap single blocks in an approved composition.
	One
	// Two may compose blocks, and run what nobody has approved.
	Two
	// Three may publish and remove blocks, and audit them.
	Three
)

var levelNames = []string{"Zero", "One", "Two", "Three"}

// String is the level's name.
func (l TrustLevel) String() string {
	if !l.valid() {
		return fmt.Sprintf("TrustLevel(%d)", uint8(l))
	}
	return levelNames[l]
}

func (l TrustLevel) valid() bool { return int(l) < len(levelNames) }

// ParseTrustLevel reads a level's name.
func ParseTrustLevel(text string) (TrustLevel, error) {
	i := slices.Index(levelNames, text)
	if i < 0 {
		return 0, fmt.Errorf("%w: trust level %.80q is not Zero, One, Two or Three", errdef.ErrInvalid, text)
	}
	return TrustLevel(i), nil
}

// MarshalText writes the name.
func (l TrustLevel) MarshalText() ([]byte, error) {
	if !l.valid() {
		return nil, fmt.Errorf("%w: %s", errdef.ErrInvalid, l)
	}
	return []byte(l.String()), nil
}

// UnmarshalText reads the name.
func (l *TrustLevel) UnmarshalText(text []byte) error {
	v, err := ParseTrustLevel(string(text))
	if err == nil {
		*l = v
	}
	return err
}

// Action is what a caller wants to do with a block.
type Action string

// The actions that a level is asked for.
const (
	// ActRun runs a block that is in the registry.
	ActRun Action = "run"
	// ActSwap puts a block in the place of another in a composition.
	ActSwap Action = "swap"
	// ActCompose makes a composition, or runs a block that is not in the
	// registry.
	ActCompose Action = "compose"
	// ActPublish adds a block to the registry, or removes one.
	ActPublish Action = "publish"
	// ActAudit judges a block, and may lift its quarantine.
	ActAudit Action = "audit"
)

// Needs is the level that act takes on a block of that minimum.
func Needs(act Action, minimum TrustLevel) TrustLevel {
	switch act {
	case ActRun:
		return minimum
	case ActSwap:
		return max(One, minimum)
	case ActCompose:
		return max(Two, minimum)
	case ActPublish, ActAudit:
		return Three
	default:
		return Three
	}
}

// Allow returns errdef.ErrDenied, and says which level is needed, unless a
// caller of that level may do act to the block name.
func Allow(level TrustLevel, act Action, name string, minimum TrustLevel) error {
	needed := Needs(act, minimum)
	if level.valid() && level >= needed {
		return nil
	}
	return fmt.Errorf("%w: %s block %s: it needs trust level %s, the caller has %s", errdef.ErrDenied, act, name, needed, level)
}

// TrustScore is a number from 0 to 1. Its zero value is that of a block of which
// nothing is known.
type TrustScore struct{ value float64 }

// NewTrustScore refuses what is not from 0 to 1.
func NewTrustScore(v float64) (TrustScore, error) {
	if math.IsNaN(v) || v < 0 || v > 1 {
		return TrustScore{}, trustScoreError(v)
	}
	return TrustScore{v}, nil
}

// Value is the number.
func (s TrustScore) Value() float64 { return s.value }

// String has four decimals.
func (s TrustScore) String() string { return fmt.Sprintf("%.4f", s.value) }

// Equal reports whether two scores are the same number.
func (s TrustScore) Equal(other TrustScore) bool { return s.value == other.value }

// MarshalJSON writes the number.
func (s TrustScore) MarshalJSON() ([]byte, error) { return json.Marshal(s.value) }

// UnmarshalJSON reads a number and refuses what is not from 0 to 1.
func (s *TrustScore) UnmarshalJSON(data []byte) error {
	var number *float64
	if err := json.Unmarshal(data, &number); err != nil || number == nil {
		return fmt.Errorf("%w: trust score: want a number", errdef.ErrInvalid)
	}
	v, err := NewTrustScore(*number)
	if err == nil {
		*s = v
	}
	return err
}
