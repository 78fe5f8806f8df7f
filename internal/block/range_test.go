package block

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// Cargo's published rules, each with what is just inside and just outside.
func TestRange(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ text, in, out string }{
		// A caret allows what does not change the first number that is not zero.
		{"^1.2.3", "1.2.3 1.2.4 1.3.0 1.99.0", "1.2.2 2.0.0 0.9.0"},
		{"^1.2", "1.2.0 1.9.9", "1.1.9 2.0.0"},
		{"^1", "1.0.0 1.9.9", "0.9.9 2.0.0"},
		{"^0.2.3", "0.2.3 0.2.9", "0.2.2 0.3.0 1.0.0"},
		{"^0.2", "0.2.0 0.2.9", "0.1.9 0.3.0"},
		{"^0.0.3", "0.0.3", "0.0.2 0.0.4 0.1.0"},
		{"^0.0", "0.0.0 0.0.9", "0.1.0"},
		{"^0", "0.0.0 0.9.9", "1.0.0"},
		{"^0.0.0", "0.0.0", "0.0.1"},
		// A bare version is a caret.
		{"1.2.3", "1.2.3 1.9.0", "1.2.2 2.0.0"},
		{"0.2", "0.2.7", "0.3.0"},
		// A tilde allows patches, or minors where only the major is given.
		{"~1.2.3", "1.2.3 1.2.9", "1.2.2 1.3.0"},
		{"~1.2", "1.2.0 1.2.9", "1.1.9 1.3.0"},
		{"~1", "1.0.0 1.9.9", "0.9.9 2.0.0"},
		{"~0", "0.0.0 0.9.9", "1.0.0"},
		// Wildcards.
		{"*", "0.0.0 1.2.3 9.9.9", ""},
		{" * ", "0.0.0", ""},
		{"1.*", "1.0.0 1.9.9", "0.9.9 2.0.0"},
		{"1.2.*", "1.2.0 1.2.9", "1.1.9 1.3.0"},
		{"0.*", "0.0.0 0.9.9", "1.0.0"},
		{"1.x", "1.5.0", "2.0.0"},
		{"1.*.*", "1.5.0", "2.0.0"},
		// Comparisons. What was not written is anything.
		{"=1.2.3", "1.2.3", "1.2.2 1.2.4"},
		{"=1.2", "1.2.0 1.2.9", "1.1.9 1.3.0"},
		{"=1", "1.0.0 1.9.9", "2.0.0"},
		{">1.2.3", "1.2.4 2.0.0", "1.2.3 1.2.2"},
		{">1.2", "1.3.0 2.0.0", "1.2.0 1.2.9"},
		{">1", "2.0.0", "1.9.9"},
		{">=1.2.3", "1.2.3 3.0.0", "1.2.2"},
		{">= 2.40", "2.40.0 2.43.0 3.0.0", "2.39.9"},
		{">=1", "1.0.0 2.0.0", "0.9.9"},
		{"<1.2.3", "1.2.2 0.0.0", "1.2.3"},
		{"<1.2", "1.1.9", "1.2.0 1.2.9"},
		{"<=1.2.3", "1.2.3 1.2.2", "1.2.4"},
		{"<=1.2", "1.2.9 1.1.0", "1.3.0"},
		{"<=1", "1.9.9", "2.0.0"},
		// A comma is an "and".
		{">= 1.2, < 1.5", "1.2.0 1.4.9", "1.1.9 1.5.0"},
		{">=1.2.3,<1.2.5,>=1.2.4", "1.2.4", "1.2.3 1.2.5"},
		{"^1, ^2", "", "1.0.0 2.0.0"},
		// A pre-release comes before its version; no version of ours is one.
		{">1.0.0-alpha", "1.0.0 1.0.1", "0.9.9"},
		{">=1.0.0-alpha.1", "1.0.0", "0.9.9"},
		{"<1.0.0-alpha", "0.9.9", "1.0.0"},
		{"<=1.0.0-alpha", "0.9.9", "1.0.0"},
		{"=1.0.0-alpha", "", "1.0.0 0.9.9"},
		{"^1.2.3-rc.1", "1.2.3 1.3.0", "1.2.2 2.0.0"},
		{"~1.2.3-rc.1", "1.2.3 1.2.4", "1.2.2 1.3.0"},
		// Build parts mean nothing.
		{"=1.2.3+build.05", "1.2.3", "1.2.4"},
		{"^ 1.93", "1.93.0", "1.92.0"},
	} {
		r, err := ParseRange(c.text)
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		for in, list := range map[bool]string{true: c.in, false: c.out} {
			for v := range strings.FieldsSeq(list) {
				version, err := ParseSemVer(v)
				if err != nil || r.Contains(version) != in {
					t.Errorf("%s contains %s: not %v, %v", c.text, v, in, err)
				}
			}
		}
	}
}

func TestRangeRefuses(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"", " ", ",", "1,", ",1", "1,,2", "*, 1", "1, *", ">=*", "=*", "^*", "*.1", "1.*.3", "1.2.3.4", "1.2.*.4", "01.2", "1.02", "1.2.03",
		">=1 <2", ">=1 || <2", "1 - 2", "!=1", "==1", "=>1", "~>1", ">", "> =1", "v1", "1.", ".1", "1..2", "a", "1.a", "-1", "+1", "1-alpha",
		"1.2-alpha", "1.2.3-", "1.2.3-01", "1.2.3-a..b", "1.2.3-a_b", "1.2.3+", "1.2.3+a_b", "18446744073709551616", "1\t", "1\n", "１",
		strings.TrimSuffix(strings.Repeat("1,", 33), ","),
	} {
		if r, err := ParseRange(text); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v, %v", text, r, err)
		}
	}
	if (Range{}).Contains(SemVer{1, 0, 0}) {
		t.Error("the zero range holds something")
	}
}

func TestSemVer(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "1", "1.2", "1.2.3.4", "01.2.3", "1.2.3-a", "1.2.3+b", "1.2.4294967296", "-1.2.3", "1.2.x", " 1.2.3", "v1.2.3"} {
		if v, err := ParseSemVer(text); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v, %v", text, v, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		v, w := drawVersion(t, "v"), drawVersion(t, "w")
		back, err := ParseSemVer(v.String())
		data, jsonErr := json.Marshal(v)
		var again SemVer
		if err = errors.Join(err, jsonErr, json.Unmarshal(data, &again)); err != nil || back != v || again != v {
			t.Fatalf("%s, %s: %v", v, data, err)
		}
		if v.Compare(w) != -w.Compare(v) || (v.Compare(w) == 0) != (v == w) {
			t.Fatalf("%s and %s", v, w)
		}
	})
}

func drawVersion(t *rapid.T, name string) SemVer {
	part := rapid.Uint32Range(0, 4)
	return SemVer{part.Draw(t, name+"-major"), part.Draw(t, name+"-minor"), part.Draw(t, name+"-patch")}
}

// The laws that tie the signs to each other.
func TestRangeLaws(t *testing.T) {
	t.Parallel()
	holds := func(t *rapid.T, text string, v SemVer) bool {
		r, err := ParseRange(text)
		if err != nil {
			t.Fatal(err)
		}
		return r.Contains(v)
	}
	rapid.Check(t, func(t *rapid.T) {
		v, w := drawVersion(t, "v"), drawVersion(t, "w")
		at := w.String()
		order := v.Compare(w)
		for op, want := range map[string]bool{
			"=": order == 0, ">": order > 0, ">=": order >= 0, "<": order < 0, "<=": order <= 0,
		} {
			if holds(t, op+at, v) != want {
				t.Fatalf("%s%s, %s: not %v", op, at, v, want)
			}
		}
		if holds(t, at, v) != holds(t, "^"+at, v) {
			t.Fatalf("a bare %s is no caret for %s", at, v)
		}
		if holds(t, "~"+at, v) && w.Major > 0 && !holds(t, "^"+at, v) {
			t.Fatalf("~%s holds %s and ^%s does not", at, v, at)
		}
		if holds(t, ">="+at+", <="+at, v) != (v == w) {
			t.Fatalf("both sides of %s hold %s", at, v)
		}
	})
}

func FuzzRange(f *testing.F) {
	for _, seed := range []string{">= 2.40", "^1.93", "~0.2.3-rc.1+b", "1.*", "*", ">=1, <2"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRange(text)
		if err != nil {
			return
		}
		if r.String() != text {
			t.Fatalf("%q became %q", text, r)
		}
		r.Contains(SemVer{1, 2, 3})
	})
}
