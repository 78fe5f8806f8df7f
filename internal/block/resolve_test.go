package block

import (
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// entry makes a block of a line: NAME@VERSION, what it provides as
// +CAPABILITY@VERSION, and what it requires as CAPABILITY:RANGE, with a ! before
// it for what is needed to build.
func entry(t testing.TB, line string) Entry {
	t.Helper()
	words := strings.Fields(line)
	ref, err := ParseRef(words[0])
	if err != nil {
		t.Fatal(err)
	}
	ref.Digest = Digest([]byte(line))
	s := Spec{
		Format: format, Name: ref.Name, Version: ref.Version, Author: "tine", CognitiveLoad: Low,
		Run: Run{Image: "base", Command: []string{"true"}},
	}
	for _, w := range words[1:] {
		if given, ok := strings.CutPrefix(w, "+"); ok {
			p, err := ParseRef(given)
			if err != nil {
				t.Fatal(err)
			}
			s.Provides = append(s.Provides, SpecProvide{p.Name, p.Version})
			continue
		}
		kind := Runtime
		if rest, ok := strings.CutPrefix(w, "!"); ok {
			kind, w = Build, rest
		}
		name, text, _ := strings.Cut(w, ":")
		r, err := ParseRange(text)
		if err != nil {
			t.Fatal(err)
		}
		s.Requires = append(s.Requires, SpecRequire{name, r, kind})
	}
	return Entry{Ref: ref, Spec: s}
}

func entries(t testing.TB, lines ...string) []Entry {
	t.Helper()
	var all []Entry
	for _, line := range lines {
		all = append(all, entry(t, line))
	}
	return all
}

func names(r Resolution) string {
	var words []string
	for _, e := range r.Blocks {
		words = append(words, key(e.Ref))
	}
	return strings.Join(words, " ")
}

func TestResolve(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		opts ResolveOptions
		all  []string // the first is the root
		want string   // the blocks in order, or the error
	}{
		{"nothing", ResolveOptions{}, []string{"a@1.0.0"}, "a@1.0.0"},
		{"chain", ResolveOptions{}, []string{"a@1.0.0 b:1", "b1@1.0.0 +b@1.0.0 c:1", "c1@1.0.0 +c@1.0.0"}, "c1@1.0.0 b1@1.0.0 a@1.0.0"},
		{"highest", ResolveOptions{}, []string{"a@1.0.0 b:1", "x@1.0.0 +b@1.2.0", "y@1.0.0 +b@1.3.0", "z@1.0.0 +b@2.0.0"}, "y@1.0.0 a@1.0.0"},
		{"tie-by-name", ResolveOptions{}, []string{"a@1.0.0 b:1", "y@9.0.0 +b@1.0.0", "x@1.0.0 +b@1.0.0"}, "x@1.0.0 a@1.0.0"},
		{"tie-by-version", ResolveOptions{}, []string{"a@1.0.0 b:1", "x@1.0.0 +b@1.0.0", "x@1.1.0 +b@1.0.0"}, "x@1.1.0 a@1.0.0"},
		{"build-left-out", ResolveOptions{}, []string{"a@1.0.0 !b:1"}, "a@1.0.0"},
		{"build", ResolveOptions{Build: true}, []string{"a@1.0.0 !b:1", "x@1.0.0 +b@1.0.0"}, "x@1.0.0 a@1.0.0"},
		{"build-missing", ResolveOptions{Build: true}, []string{"a@1.0.0 !b:1"}, "resolve block a@1.0.0#DIGEST: not found: capability b: block a@1.0.0 wants 1: no block provides it"},
		{"shared", ResolveOptions{}, []string{"a@1.0.0 b:1 c:1", "b1@1.0.0 +b@1.0.0 d:>=1", "c1@1.0.0 +c@1.0.0 d:>=1", "d1@1.0.0 +d@1.0.0", "d2@1.0.0 +d@2.0.0"}, "d2@1.0.0 b1@1.0.0 c1@1.0.0 a@1.0.0"},
		{"goes-back", ResolveOptions{}, []string{"a@1.0.0 b:1 c:1", "b1@1.0.0 +b@1.0.0 d:>=1", "c1@1.0.0 +c@1.0.0 d:1", "d1@1.0.0 +d@1.0.0", "d2@1.0.0 +d@2.0.0"}, "d1@1.0.0 b1@1.0.0 c1@1.0.0 a@1.0.0"},
		{"goes-round-a-cycle", ResolveOptions{}, []string{"a@1.0.0 b:1 +a@1.0.0", "x@1.0.0 +b@1.1.0 a:1", "y@1.0.0 +b@1.0.0"}, "y@1.0.0 a@1.0.0"},
		{"one-block-for-two", ResolveOptions{}, []string{"a@1.0.0 b:1 c:1", "x@1.0.0 +b@1.0.0 +c@1.0.0"}, "x@1.0.0 a@1.0.0"},
		{"unmet", ResolveOptions{}, []string{"a@1.0.0 b:2", "x@1.0.0 +b@1.0.0", "y@1.0.0 +b@1.5.0"}, "resolve block a@1.0.0#DIGEST: not found: capability b: block a@1.0.0 wants 2: there are only 1.5.0, 1.0.0"},
		{
			"conflict",
			ResolveOptions{},
			[]string{"a@1.0.0 b:1 c:1", "b1@1.0.0 +b@1.0.0 d:2", "c1@1.0.0 +c@1.0.0 d:1", "d1@1.0.0 +d@1.0.0", "d2@1.0.0 +d@2.0.0"},
			"resolve block a@1.0.0#DIGEST: conflict: capability d: block b1@1.0.0 wants 2, block c1@1.0.0 wants 1: no version that is provided (2.0.0, 1.0.0) is in all of these",
		},
		{
			"two-versions-of-a-capability",
			ResolveOptions{},
			[]string{"a@1.0.0 b:1 c:1", "x@1.0.0 +b@1.0.0 +d@1.0.0", "y@1.0.0 +c@1.0.0 +d@2.0.0"},
			"resolve block a@1.0.0#DIGEST: conflict: capability d: block x@1.0.0 provides 1.0.0, block y@1.0.0 provides 2.0.0",
		},
		{
			"two-versions-of-a-block",
			ResolveOptions{},
			[]string{"a@1.0.0 b:1 c:1", "x@1.0.0 +b@1.0.0", "x@2.0.0 +c@1.0.0"},
			"resolve block a@1.0.0#DIGEST: conflict: block x in two versions: 1.0.0 and 2.0.0",
		},
		{"needs-itself", ResolveOptions{}, []string{"a@1.0.0 b:1 +b@1.0.0"}, "resolve block a@1.0.0#DIGEST: conflict: blocks require each other: a@1.0.0 -> a@1.0.0"},
		{
			"cycle",
			ResolveOptions{},
			[]string{"a@1.0.0 b:1", "x@1.0.0 +b@1.0.0 c:1", "y@1.0.0 +c@1.0.0 d:1", "z@1.0.0 +d@1.0.0 b:1"},
			"resolve block a@1.0.0#DIGEST: conflict: blocks require each other: z@1.0.0 -> x@1.0.0 -> y@1.0.0 -> z@1.0.0",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			all := entries(t, c.all...)
			for range 5 {
				r, err := Resolve(all[0], all[1:], c.opts)
				got := names(r)
				if err != nil {
					got = strings.Replace(err.Error(), all[0].Ref.Digest, "DIGEST", 1)
					if !errors.Is(err, errdef.ErrConflict) && !errors.Is(err, errdef.ErrNotFound) {
						t.Errorf("no category: %v", err)
					}
				}
				if got != c.want {
					t.Fatalf("got  %s\nwant %s", got, c.want)
				}
				rand.Shuffle(len(all)-1, func(i, j int) { all[i+1], all[j+1] = all[j+1], all[i+1] })
			}
		})
	}
}

func TestResolveCycleHasPath(t *testing.T) {
	t.Parallel()
	all := entries(t, "a@1.0.0 b:1 +a@1.0.0", "x@1.0.0 +b@1.0.0 a:1")
	_, err := Resolve(all[0], all[1:], ResolveOptions{})
	cycle, ok := errors.AsType[*CycleError](err)
	if !ok || len(cycle.Path) != 3 || cycle.Path[0] != cycle.Path[2] {
		t.Errorf("%v: %+v", err, cycle)
	}
}

// An answer meets every requirement that counts, once, and has no cycle; and a
// search that has no answer ends.
func TestResolveLaws(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		capability := rapid.SampledFrom([]string{"p", "q", "r", "s"})
		number := rapid.SampledFrom([]string{"1.0.0", "1.1.0", "2.0.0"})
		ranges := rapid.SampledFrom([]string{"1", "2", ">=1", "*", "=1.0.0"})
		var all []Entry
		for i := range rapid.IntRange(1, 10).Draw(rt, "blocks") {
			line := string(rune('a'+i)) + "@1.0.0"
			given := map[string]bool{}
			for range rapid.IntRange(0, 2).Draw(rt, "provides") {
				if name := capability.Draw(rt, "provided"); !given[name] {
					line += " +" + name + "@" + number.Draw(rt, "version")
					given[name] = true
				}
			}
			for range rapid.IntRange(0, 2).Draw(rt, "requires") {
				line += " " + capability.Draw(rt, "required") + ":" + ranges.Draw(rt, "range")
			}
			all = append(all, entry(t, line))
		}
		r, err := Resolve(all[0], all[1:], ResolveOptions{})
		if err != nil {
			return
		}
		at := map[Ref]int{}
		given := map[string]SemVer{}
		for i, e := range r.Blocks {
			at[e.Ref] = i
			for _, p := range e.Spec.Provides {
				if v, ok := given[p.Name]; ok && v != p.Version {
					rt.Fatalf("%s in two versions: %s", p.Name, names(r))
				}
				given[p.Name] = p.Version
			}
		}
		wants := 0
		for _, e := range r.Blocks {
			wants += len(e.Spec.Requires)
		}
		for _, m := range r.Met {
			if at[m.Provider] >= at[m.By] || !m.Range.Contains(m.Version) || given[m.Capability] != m.Version {
				rt.Fatalf("%+v in %s", m, names(r))
			}
		}
		if wants != len(r.Met) || r.Blocks[len(r.Blocks)-1].Ref != all[0].Ref {
			rt.Fatalf("%d wanted, %d met in %s", wants, len(r.Met), names(r))
		}
	})
}

func TestResolveEnds(t *testing.T) {
	t.Parallel()
	root := "a@1.0.0"
	var lines []string
	for i := range 12 {
		c := string(rune('b' + i))
		root += " " + c + ":*"
		for j := range 8 {
			lines = append(lines, c+string(rune('0'+j))+"@1.0.0 +"+c+"@1.0."+string(rune('0'+j))+" none:1")
		}
	}
	all := entries(t, append([]string{root, "n@1.0.0 +none@2.0.0"}, lines...)...)
	if _, err := Resolve(all[0], all[1:], ResolveOptions{}); !errors.Is(err, errdef.ErrNotFound) && !errors.Is(err, errdef.ErrExhausted) {
		t.Error(err)
	}
}

func TestCompose(t *testing.T) {
	t.Parallel()
	all := entries(t, "app@1.0.0 +app@1.0.0 git:>=2 !rustc:^1.82", "git@2.0.0 +git@2.0.0 libc:* !rustc:>=1.80", "libc@1.0.0 +libc@1.0.0")
	all[0].Spec.MinimumTrustLevel, all[1].Spec.CognitiveLoad = One, High
	all[0].Spec.Run.Command = []string{"app"}
	r, err := Resolve(all[0], all[1:], ResolveOptions{})
	if err != nil {
		t.Fatal(err)
	}
	title := Title{Name: "stack", Version: SemVer{1, 0, 0}, Author: "tine"}
	if _, err = Compose(One, title, r); !errors.Is(err, errdef.ErrDenied) ||
		err.Error() != "denied: compose block stack: it needs trust level Two, the caller has One" {
		t.Errorf("at level One: %v", err)
	}
	s, err := Compose(Two, title, r)
	if err != nil {
		t.Fatal(err)
	}
	m := s.Manifest()
	if m.MinimumTrustLevel != One || m.CognitiveLoad != High || len(m.Provides) != 3 || s.Run.Command[0] != "app" {
		t.Errorf("%+v", s)
	}
	if len(m.Requires) != 1 || m.Requires[0].VersionReq.String() != ">=1.80, ^1.82" {
		t.Errorf("requires %+v", m.Requires)
	}
	if diff := cmp.Diff([]Ref{all[2].Ref, all[1].Ref, all[0].Ref}, s.ComposedOf); diff != "" {
		t.Error(diff)
	}
	wantRoundTrip(t, s)

	newer := entry(t, "git@2.1.0 +git@2.1.0")
	title.Version = SemVer{1, 1, 0}
	if _, err = Swap(Zero, title, s, "git", newer, all); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("swap at level Zero: %v", err)
	}
	swapped, err := Swap(One, title, s, "git", newer, all)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(swapped.ComposedOf, newer.Ref) || slices.Contains(swapped.ComposedOf, all[1].Ref) {
		t.Errorf("%+v", swapped.ComposedOf)
	}
	if _, err = Swap(One, title, s, "git", entry(t, "git@1.0.0 +git@1.0.0"), all); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("swap for one that is too old: %v", err)
	}
	if _, err = Swap(One, title, s, "none", newer, all); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("swap of what is not there: %v", err)
	}
}

func TestAllow(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		act    Action
		min    TrustLevel
		needed TrustLevel
	}{
		{ActRun, Zero, Zero},
		{ActRun, Two, Two},
		{ActSwap, Zero, One},
		{ActSwap, Two, Two},
		{ActCompose, Zero, Two},
		{ActCompose, Three, Three},
		{ActPublish, Zero, Three},
		{ActAudit, Zero, Three},
		{"other", Zero, Three},
	} {
		for level := Zero; level <= Three; level++ {
			err := Allow(level, c.act, "b", c.min)
			if allowed := err == nil; allowed != (level >= c.needed) || !allowed && !errors.Is(err, errdef.ErrDenied) {
				t.Errorf("%s at %s of a block for %s: %v", c.act, level, c.min, err)
			}
		}
	}
	if err := Allow(TrustLevel(9), ActRun, "b", Zero); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("a level that there is not: %v", err)
	}
}
