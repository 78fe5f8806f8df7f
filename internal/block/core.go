package block

import (
	"fmt"
	"math"
	"strconv"

	"github.com/tinevm/tine/internal/errdef"
)

// CoreError is one of the errors of Forge's domain, with its text. It is in the
// category errdef.ErrInvalid.
type CoreError struct{ text string }

func (e *CoreError) Error() string { return e.text }

// Unwrap gives the category.
func (e *CoreError) Unwrap() error { return errdef.ErrInvalid }

func trustScoreError(v float64) error {
	return &CoreError{fmt.Sprintf("invalid trust score %s: must be in [0.0, 1.0]", formatFloat(v))}
}

func idError(what, reason string) error {
	return &CoreError{fmt.Sprintf("invalid %s id: %s", what, reason)}
}

func manifestError(field, format string, args ...any) error {
	return &CoreError{fmt.Sprintf("manifest validation failed for field '%s': %s", field, fmt.Sprintf(format, args...))}
}

// formatFloat writes a number as Forge's texts do: without an exponent.
func formatFloat(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "inf"
	case math.IsInf(v, -1):
		return "-inf"
	default:
		return strconv.FormatFloat(v, 'f', -1, 64)
	}
}
