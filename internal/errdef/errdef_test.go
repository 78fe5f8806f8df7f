package errdef

import (
	"errors"
	"fmt"
	"testing"
)

func TestCodeRoundTrip(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, c := range categories {
		wrapped := fmt.Errorf("fork snapshot py: %w", WithHint(fmt.Errorf("%w: more", c.err), "do this"))
		code := Code(wrapped)
		if code != c.code || seen[code] {
			t.Errorf("code of %v is %q", c.err, code)
		}
		seen[code] = true
		if !errors.Is(FromCode(code), c.err) {
			t.Errorf("FromCode(%q) = %v", code, FromCode(code))
		}
		far := Remote(code, wrapped.Error())
		if far.Error() != wrapped.Error() || !errors.Is(far, c.err) || Code(far) != code {
			t.Errorf("remote: %v, code %q", far, Code(far))
		}
	}
}

func TestCodeOfNoCategory(t *testing.T) {
	t.Parallel()
	if got := Code(errors.New("odd")); got != "internal" {
		t.Errorf("got %q", got)
	}
	for _, code := range []string{"internal", "", "from_the_future"} {
		if got := FromCode(code); got != nil {
			t.Errorf("FromCode(%q) = %v", code, got)
		}
		if err := Remote(code, "message"); err.Error() != "message" || Code(err) != "internal" {
			t.Errorf("Remote(%q) = %v, code %q", code, err, Code(err))
		}
	}
}

func TestHint(t *testing.T) {
	t.Parallel()
	inner := WithHint(fmt.Errorf("%w: snapshot py", ErrConflict), "inner")
	tests := map[string]struct {
		err  error
		hint string
	}{
		"none":      {ErrConflict, ""},
		"nil":       {nil, ""},
		"direct":    {inner, "inner"},
		"wrapped":   {fmt.Errorf("remove: %w", inner), "inner"},
		"joined":    {errors.Join(errors.New("other"), inner), "inner"},
		"outermost": {WithHint(fmt.Errorf("remove: %w", inner), "outer"), "outer"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if got := Hint(tt.err); got != tt.hint {
				t.Errorf("got %q, want %q", got, tt.hint)
			}
		})
	}
	if inner.Error() != "conflict: snapshot py" || !errors.Is(inner, ErrConflict) {
		t.Errorf("the hint changed the error: %v", inner)
	}
	if WithHint(nil, "hint") != nil {
		t.Error("a hint made an error of nil")
	}
}
