package block

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

const examples = "../../examples/blocks"

// full is a file with everything in it.
const full = `format = 1
name = "full"
version = "1.2.3"
description = "Everything."
author = "tine"
cognitive_load = "High"
minimum_trust_level = "Two"
id = "3f0e2c9a-51d8-4b1e-9c57-0a4be2a3c001"
nix_derivation = "ywi5ib7yrjba3k3b26yfnbx7gappr3dg"
author_key = "ed25519:abc"
composed_of = ["part@1.0.0#sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]

[[provides]]
name = "everything"
version = "1.0.0"

[[requires]]
name = "git-cli"
version = ">= 2.39"

[[requires]]
name = "rustc"
version = "^1.82"
kind = "Build"

[run]
image = "base"
warmup = ["true"]
command = ["sh", "-c", "cat"]
env = ["A=b=c"]
cwd = "/tmp"
stdin = "hello"
seed = 7
start = "2026-03-01T12:00:00+01:00"
collect = ["/tmp/out"]
canonical = ["pids", "tmp"]
canonical_files = ["timestamps"]

[run.limits]
virtual = "10s"
wall = "1m30s"
output = 4096

[[run.files]]
path = "/tmp/a"
mode = 0o755
text = "a"

[[run.files]]
path = "/tmp/b"
base64 = "AAE="
`

func TestDecode(t *testing.T) {
	t.Parallel()
	s, err := Decode([]byte(full), nil)
	if err != nil {
		t.Fatal(err)
	}
	in, err := s.Run.Input(nil)
	if err != nil {
		t.Fatal(err)
	}
	want := record.Input{
		Argv: []string{"sh", "-c", "cat"}, Env: []string{"A=b=c"}, Cwd: "/tmp", Stdin: []byte("hello"), Collect: []string{"/tmp/out"},
		Seed: 7, Start: time.Date(2026, 3, 1, 11, 0, 0, 0, time.UTC),
		Files:  []record.File{{Path: "/tmp/a", Mode: 0o755, Data: []byte("a")}, {Path: "/tmp/b", Mode: 0o644, Data: []byte{0, 1}}},
		Limits: record.Limits{Virtual: 10 * time.Second, Wall: 90 * time.Second, Output: 4096},
	}
	if diff := cmp.Diff(want, in); diff != "" {
		t.Error(diff)
	}
	if in, err = s.Run.Input([]byte{}); err != nil || in.Stdin == nil || len(in.Stdin) != 0 {
		t.Errorf("an empty input: %q, %v", in.Stdin, err)
	}
	if err = s.Manifest().Validate(); err != nil {
		t.Error(err)
	}
	if s.Requires[0].Kind != Runtime || s.Requires[1].Kind != Build || s.MinimumTrustLevel != Two {
		t.Errorf("%+v", s)
	}
	wantRoundTrip(t, s)
}

func wantRoundTrip(t testing.TB, s Spec) {
	t.Helper()
	data, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	again, err := Decode(data, nil)
	if err != nil {
		t.Fatalf("%v of\n%s", err, data)
	}
	twice, err := again.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(data), string(twice)); diff != "" {
		t.Error(diff)
	}
}

// The texts that a person gets who writes a block.
func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	rule := func(name string) error {
		if name != "pids" && name != "tmp" && name != "timestamps" {
			return fmt.Errorf("%w: there is no such rule", errdef.ErrNotFound)
		}
		return nil
	}
	const field = "manifest validation failed for field "
	for _, c := range []struct{ name, old, now, want string }{
		{"unknown-key", "author = ", "writer = ", `invalid: line 5: unknown key "writer"`},
		{"unknown-in-run", "seed = 7", "sede = 7", `invalid: line 33: unknown key "run.sede"`},
		{"unknown-table", "[run.limits]", "[run.limit]", `invalid: line 39: unknown key "run.limit"`},
		{"capitals", "seed = 7", "Seed = 7", `invalid: line 33: unknown key "Seed"`},
		{"twice", "seed = 7", "seed = 7\nseed = 8", `invalid: line 34: seed: key seed is already defined`},
		{"syntax", "seed = 7", "seed = ", "invalid: line 33: unexpected character U+000A at start of value"},
		{"type", `name = "full"`, "name = 3", "invalid: line 2: name: a TOML integer does not belong here"},
		{"no-format", "format = 1\n", "", field + "'format': it is missing: want format = 1"},
		{"format-0", "format = 1", "format = 0", field + "'format': 0: want 1"},
		{"later-format", "format = 1", "format = 2\nnew = 1", "unsupported: format 2: this version of tine reads 1"},
		{"name", `name = "full"`, `name = "../full"`, field + `'name': "../full": ` + nameRule},
		{"no-name", `name = "full"`, ``, field + `'name': "": ` + nameRule},
		{"version", `"1.2.3"`, `"1.2"`, `invalid: line 3: version: version "1.2": want three numbers, as in 1.2.3`},
		{"no-version", `version = "1.2.3"`, ``, field + "'version': it is missing, or 0.0.0"},
		{"no-author", `author = "tine"`, ``, field + "'author': it is missing"},
		{"control", `"Everything."`, `"Every\u001bthing."`, field + "'description': a control character at byte 5"},
		{"level", `"Two"`, `"2"`, `invalid: line 7: minimum_trust_level: trust level "2" is not Zero, One, Two or Three`},
		{"no-level", `minimum_trust_level = "Two"`, ``, field + "'minimum_trust_level': it is missing"},
		{"load", `"High"`, `"Huge"`, field + `'cognitive_load': "Huge" is not Low, Medium or High`},
		{"id", `"3f0e2c9a-`, `"3f0e2c9a`, "invalid block id: want 32 hexadecimal digits, alone or in groups of 8-4-4-4-12"},
		{"derivation", `"ywi5`, `"ywio`, field + `'nix_derivation': "ywioib7yrjba3k3b26yfnbx7gappr3dg" is not 32 digits of Nix's base 32`},
		{"author-key", `"ed25519:abc"`, `"?"`, field + `'author_key': "?" is not the id of a key`},
		{"part", `#sha256:`, `#sha512:`, `invalid: line 11: composed_of: block part: digest "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855": want sha256: and 64 hexadecimal digits`},
		{"unpinned", `#sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855`, ``, field + "'composed_of': part@1.0.0 has no digest"},
		{"range", `">= 2.39"`, `">= two"`, `invalid: line 19: requires.version: version range ">= two": "two" is not a number without leading zeros`},
		{"no-range", `version = ">= 2.39"`, ``, field + "'requires': git-cli has no version range"},
		{"kind", `"Build"`, `"Test"`, field + `'requires': rustc: kind "Test" is not Runtime or Build`},
		{"no-target", `image = "base"`, ``, field + "'run': it says not what it runs on: want source, image or snapshot"},
		{"two-targets", `image = "base"`, "image = \"base\"\nsnapshot = \"py\"", field + "'run': it has image and snapshot: want one of them"},
		{"image", `image = "base"`, `image = "../base"`, field + `'run.image': "../base" is not a name or a digest`},
		{"warm-snapshot", `image = "base"`, `snapshot = "py"`, field + "'run.warmup': a snapshot has had its own"},
		{"no-command", `command = ["sh", "-c", "cat"]`, `command = []`, field + "'run.command': it is missing"},
		{"command-text", `["sh", "-c", "cat"]`, `"cat"`, "invalid: line 29: run.command: a TOML string does not belong here"},
		{"zero-byte", `"cat"]`, `"\u0000"]`, field + "'run.command': number 3 holds a zero byte or is not UTF-8"},
		{"env", `"A=b=c"`, `"1A=secret"`, field + `'run.env': "1A": want NAME=VALUE`},
		{"cwd", `cwd = "/tmp"`, `cwd = "tmp"`, field + `'run.cwd': "tmp": want an absolute path without . and ..`},
		{"seed", "seed = 7", "seed = -7", "invalid: line 33: run.seed: negative integer value -7 cannot be stored in uint64"},
		{"start", `"2026-03-01T12:00:00+01:00"`, `"2026-03-01"`, `invalid: line 34: run.start: time "2026-03-01": want RFC 3339 between 1970 and 2200, as in 2026-01-01T00:00:00Z`},
		{"start-bare", `"2026-03-01T12:00:00+01:00"`, `2026-03-01T12:00:00`, "invalid: line 34: run.start: a TOML local datetime does not belong here: write times between quotes"},
		{"virtual", `"10s"`, `"10"`, `invalid: line 40: run.limits.virtual: duration "10": want more than 0 and at most 24h, as in 1m30s`},
		{"virtual-0", `"10s"`, `"0s"`, `invalid: line 40: run.limits.virtual: duration "0s": want more than 0 and at most 24h, as in 1m30s`},
		{"output", "output = 4096", "output = -1", field + "'run.limits.output': -1 bytes: want up to 268435456"},
		{"collect", `["/tmp/out"]`, `["/tmp/../out"]`, field + `'run.collect': "/tmp/../out": want an absolute path without . and ..`},
		{"rule", `"pids"`, `"dates"`, field + "'run.canonical': dates: not found: there is no such rule"},
		{"rule-name", `"pids"`, `"PIDs"`, field + `'run.canonical': "PIDs" is not the name of a rule`},
		{"file-rule", `"timestamps"`, `"dates"`, field + "'run.canonical_files': dates: not found: there is no such rule"},
		{"rule-twice", `"pids"`, `"tmp"`, field + "'run.canonical': tmp is there twice"},
		{"file-twice", `"/tmp/b"`, `"/tmp/a"`, field + "'run.files': /tmp/a is there twice"},
		{"file-mode", "0o755", "0o100755", field + "'run.files': /tmp/a: mode 0100755 has more than permissions"},
		{"file-both", `text = "a"`, "text = \"a\"\nbase64 = \"AA==\"", field + "'run.files': /tmp/a has both text and base64"},
		{"file-base64", `"AAE="`, `"AAE"`, field + "'run.files': /tmp/b: it is not base64"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if !strings.Contains(full, c.old) {
				t.Fatalf("the file has no %s", c.old)
			}
			_, err := Decode([]byte(strings.Replace(full, c.old, c.now, 1)), rule)
			want := "block.toml: " + c.want
			if err == nil || err.Error() != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
			if !errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrUnsupported) {
				t.Errorf("no category: %v", err)
			}
		})
	}
	if _, err := Decode(make([]byte, MaxFile+1), nil); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a large one: %v", err)
	}
}

// The examples are blocks, and what they require is among them.
func TestExamples(t *testing.T) {
	t.Parallel()
	dirs, err := os.ReadDir(examples)
	if err != nil {
		t.Fatal(err)
	}
	var all []Entry
	for _, d := range dirs {
		e, err := NewEntry(read(t, filepath.Join(examples, d.Name(), FileName)), nil)
		if err != nil {
			t.Fatalf("%s: %v", d.Name(), err)
		}
		if e.Ref.Name != d.Name() {
			t.Errorf("%s is in %s", e.Ref, d.Name())
		}
		wantRoundTrip(t, e.Spec)
		all = append(all, e)
	}
	if len(all) < 3 {
		t.Fatalf("only %d examples", len(all))
	}
	for _, e := range all {
		if _, err := Resolve(e, all, ResolveOptions{Build: true}); err != nil {
			t.Error(err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(full))
	for _, name := range []string{"git-env", "commit-id", "word-count"} {
		f.Add(read(f, filepath.Join(examples, name, FileName)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Decode(data, nil)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrUnsupported) {
				t.Fatalf("no category: %v", err)
			}
			return
		}
		wantRoundTrip(t, s)
		if _, err = s.Run.Input(nil); err != nil {
			t.Fatal(err)
		}
	})
}
