package block

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

func open(t testing.TB, dir string) *Registry {
	t.Helper()
	r, err := Open(t.Context(), Config{Dir: dir, Known: everyone})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() }) // a test may have closed it
	return r
}

func file(name, version string, more ...string) []byte {
	return fmt.Appendf(nil, "format = 1\nname = %q\nversion = %q\nauthor = \"tine\"\nauthor_key = \"author\"\nminimum_trust_level = \"Zero\"\n%s\n[run]\nimage = \"base\"\ncommand = [\"cat\"]\n",
		name, version, strings.Join(more, "\n"))
}

func add(t testing.TB, r *Registry, data []byte) Entry {
	t.Helper()
	e, err := r.Add(AddRequest{File: data, Level: Three, Publisher: "token:admin", PublisherKey: "publisher"})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	if _, err := r.Add(AddRequest{File: file("a", "1.0.0"), Level: Two}); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("add at level Two: %v", err)
	}
	one := add(t, r, file("a", "1.0.0"))
	ten := add(t, r, file("a", "1.10.0"))
	two := add(t, r, file("a", "1.2.0"))
	other := add(t, r, file("b", "1.0.0"))
	if again := add(t, r, file("a", "1.0.0")); again.AddedAt != one.AddedAt {
		t.Errorf("added again: %+v", again)
	}
	if _, err := r.Add(AddRequest{File: file("a", "1.0.0", "# new"), Level: Three}); !errors.Is(err, errdef.ErrExists) || errdef.Hint(err) == "" {
		t.Errorf("other content: %v", err)
	}
	for name, want := range map[string]Ref{"a": ten.Ref, "a@1.0.0": one.Ref, two.Ref.String(): two.Ref, "b": other.Ref} {
		if e, err := r.Get(name); err != nil || e.Ref != want {
			t.Errorf("%s: %s, %v", name, e.Ref, err)
		}
	}
	for _, name := range []string{"c", "a@3.0.0", "a@1.0.0#" + two.Ref.Digest} {
		if _, err := r.Get(name); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"", "../a", "a@../1.0.0", "../a@1.0.0", "a@1.0.0#x", "a/b"} {
		if _, err := r.Get(name); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	data, err := r.File(one.Ref)
	if err != nil || !bytes.Equal(data, file("a", "1.0.0")) {
		t.Errorf("%q, %v", data, err)
	}
	if _, err = Open(t.Context(), Config{Dir: dir}); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("opened twice: %v", err)
	}
	before := r.List()
	if err = r.Close(); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir)
	if diff := cmp.Diff(before, r.List(), cmp.AllowUnexported(Range{}), cmp.Comparer(func(a, b *Moment) bool { return a == nil && b == nil })); diff != "" {
		t.Error(diff)
	}
	if err = r.Remove("a@1.2.0", Two); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("remove at level Two: %v", err)
	}
	if err = r.Remove("a@1.2.0", Three); err != nil {
		t.Error(err)
	}
	if err = r.Remove("a@1.2.0", Three); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if len(r.List()) != 3 {
		t.Errorf("%+v", r.List())
	}
}

func TestRegistryComposition(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir())
	part := add(t, r, bytes.Replace(file("part", "1.0.0"), []byte(`"Zero"`), []byte(`"One"`), 1))
	whole := file("whole", "1.0.0", `composed_of = ["`+part.Ref.String()+`"]`)
	if _, err := r.Add(AddRequest{File: whole, Level: Three}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("asks for less than its part: %v", err)
	}
	whole = bytes.Replace(whole, []byte(`"Zero"`), []byte(`"One"`), 1)
	e := add(t, r, whole)
	if err := r.Remove("part", Three); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("a part was removed: %v", err)
	}
	if _, err := r.AddStatement(e.Ref.Digest, statement("k", "rec", Verified)); err != nil {
		t.Fatal(err)
	}
	forge, err := r.Forge(e)
	if err != nil || forge.TrustScore.String() != "0.2065" || forge.Author != "tine" {
		t.Errorf("%+v, %v", forge, err)
	}
	if len(forge.ComposedOf) != 1 || forge.ComposedOf[0] != part.ID() || forge.ID == part.ID() || forge.Validate() != nil {
		t.Errorf("%+v", forge)
	}
	missing := file("other", "1.0.0", `composed_of = ["none@1.0.0#`+digestOf("x")+`"]`)
	if _, err := r.Add(AddRequest{File: missing, Level: Three}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("of a part that is not there: %v", err)
	}
}

// What a killed process left is finished or removed; what is damaged is set
// aside and takes nothing else with it.
func TestRegistryRecovers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	for _, name := range []string{"good", "cut", "changed", "no-entry", "later"} {
		add(t, r, file(name, "1.0.0"))
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	blocks := filepath.Join(dir, blocksDir)
	path := func(parts ...string) string { return filepath.Join(append([]string{blocks}, parts...)...) }
	later := bytes.Replace(read(t, path("later@1.0.0", entryName)), []byte(`"version": 1`), []byte(`"version": 2`), 1)
	for _, err := range []error{
		os.WriteFile(path("cut@1.0.0", FileName), []byte("format = 1\nname"), 0o600),
		os.WriteFile(path("changed@1.0.0", FileName), file("changed", "1.0.0", "# changed"), 0o600),
		os.Remove(path("no-entry@1.0.0", entryName)),
		os.WriteFile(path("later@1.0.0", entryName), later, 0o600),
		os.MkdirAll(path(stagePrefix+"1"), 0o700),
		os.MkdirAll(path(gonePrefix+"1", FileName), 0o700),
		os.WriteFile(path("note"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	r = open(t, dir)
	if list := r.List(); len(list) != 1 || list[0].Ref.Name != "good" {
		t.Errorf("%+v", list)
	}
	found, err := os.ReadDir(blocks)
	if err != nil {
		t.Fatal(err)
	}
	aside := 0
	for _, f := range found {
		if durable.IsAside(f.Name()) {
			aside++
		}
		if strings.HasPrefix(f.Name(), ".") {
			t.Errorf("%s is left", f.Name())
		}
	}
	if aside != 3 {
		t.Errorf("%d set aside", aside)
	}
	add(t, r, file("cut", "1.0.0"))
	if _, err = r.Add(AddRequest{File: file("later", "1.0.0"), Level: Three}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("one of a later version was replaced: %v", err)
	}
}

func statement(key, record, verdict string) Statement {
	return Statement{Verifier: key, Record: record, Signer: "signer", Verdict: verdict, At: time.Unix(1_800_000_000, 5)}
}

func TestEvidence(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	e := add(t, r, file("a", "1.0.0"))
	digest := e.Ref.Digest
	for i, key := range []string{"k1", "k2", "author", "publisher"} {
		got, err := r.AddStatement(digest, statement(key, "rec", Verified))
		if err != nil || got.Seq != i+1 {
			t.Fatalf("%+v, %v", got, err)
		}
	}
	if again, err := r.AddStatement(digest, statement("k2", "rec", Verified)); err != nil || again.Seq != 2 {
		t.Errorf("said twice: %+v, %v", again, err)
	}
	trust, err := r.Trust(digest)
	if err != nil || trust.Status != Scored || trust.For != 2.5 || len(trust.Evidence) != 4 {
		t.Errorf("%+v, %v", trust, err)
	}
	s := statement("k3", "rec", Mismatch)
	s.Runs = 3
	if _, err = r.AddStatement(digest, s); err != nil {
		t.Fatal(err)
	}
	audit := Audit{Auditor: "admin", Verdict: Passed, Note: "a host with bad memory", Lift: true, At: time.Unix(1_800_000_001, 0)}
	if _, err = r.AddAudit(digest, Two, audit); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("audit at level Two: %v", err)
	}
	// Removing and adding does not clear a name, nor does another process.
	if err = errors.Join(r.Remove("a", Three), r.Close()); err != nil {
		t.Fatal(err)
	}
	r = open(t, dir)
	if _, err = r.Trust(digest); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("trust of what is not there: %v", err)
	}
	add(t, r, file("a", "1.0.0"))
	if trust, err = r.Trust(digest); err != nil || trust.Status != Quarantined || trust.Score.Value() != 0 {
		t.Errorf("%+v, %v", trust, err)
	}
	if _, err = r.AddAudit(digest, Three, audit); err != nil {
		t.Fatal(err)
	}
	if trust, err = r.Trust(digest); err != nil || trust.Status != Disputed || trust.Score.Value() == 0 {
		t.Errorf("%+v, %v", trust, err)
	}
}

func TestEvidenceRefuses(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir())
	digest := add(t, r, file("a", "1.0.0")).Ref.Digest
	for name, change := range map[string]func(*Statement){
		"verdict": func(s *Statement) { s.Verdict = "cannot compare" },
		"audit":   func(s *Statement) { s.Verdict = Passed },
		"key":     func(s *Statement) { s.Verifier = "?" },
		"no-key":  func(s *Statement) { s.Verifier = "" },
		"signer":  func(s *Statement) { s.Signer = "a b" },
		"record":  func(s *Statement) { s.Record = "a\nb" },
		"long":    func(s *Statement) { s.Record = strings.Repeat("r", 129) },
		"runs":    func(s *Statement) { s.Runs = 1001 },
		"time":    func(s *Statement) { s.At = time.Time{} },
	} {
		s := statement("k", "rec", Verified)
		change(&s)
		if _, err := r.AddStatement(digest, s); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	at := time.Unix(1, 0)
	for name, a := range map[string]Audit{
		"verdict": {Auditor: "a", Verdict: Verified, At: at}, "note": {Auditor: "a", Verdict: Passed, Note: "a\nb", At: at},
		"long": {Auditor: "a", Verdict: Passed, Note: strings.Repeat("n", 1025), At: at}, "lift": {Auditor: "a", Verdict: Rejected, Lift: true, At: at},
	} {
		if _, err := r.AddAudit(digest, Three, a); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := r.AddStatement(digestOf("none"), statement("k", "rec", Verified)); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("of a block that is not there: %v", err)
	}
}

// One key cannot fill a block's evidence, and agreement cannot keep a mismatch
// out.
func TestEvidenceIsBounded(t *testing.T) {
	t.Parallel()
	var log evidenceLog
	for i := range maxAgreeing {
		log.lines = append(log.lines, Evidence{Key: fmt.Sprintf("k%d", i/maxPerKey), Verdict: Verified, Kind: KindStatement})
	}
	for _, c := range []struct {
		e    Evidence
		room error
	}{
		{Evidence{Key: "new", Kind: KindAudit, Verdict: Passed}, errdef.ErrExhausted},
		{Evidence{Key: "new", Kind: KindAudit, Verdict: Passed, Lift: true}, nil},
		{Evidence{Key: "new", Kind: KindAudit, Verdict: Rejected}, nil},
		{Evidence{Key: "new", Kind: KindStatement, Verdict: Verified}, errWeightless},
		{Evidence{Key: "k0", Kind: KindStatement, Verdict: Mismatch}, nil},
		{Evidence{Key: "new", Kind: KindStatement, Verdict: Mismatch}, nil},
	} {
		if err := log.room(c.e); !errors.Is(err, c.room) {
			t.Errorf("%+v: %v", c.e, err)
		}
	}
	log.lines = log.lines[:maxPerKey]
	if err := log.room(Evidence{Key: "k0", Kind: KindStatement, Verdict: Verified}); !errors.Is(err, errWeightless) {
		t.Errorf("one key: %v", err)
	}
	// A key that has reported many mismatches is still heard when one of them is
	// reproducible.
	log.lines = nil
	for i := range maxPerKey {
		log.lines = append(log.lines, Evidence{Key: "k", Kind: KindStatement, Verdict: Mismatch, Record: fmt.Sprintf("r%d", i), Runs: 1})
	}
	again := Evidence{Key: "k", Kind: KindStatement, Verdict: Mismatch, Record: "r0", Runs: 1}
	if err := log.room(again); err != nil {
		t.Errorf("the second run: %v", err)
	}
	log.lines = append(log.lines, again)
	if err := log.room(again); !errors.Is(err, errWeightless) {
		t.Errorf("the third: %v", err)
	}
	log.lines = append(log.lines, Evidence{Key: "a", Kind: KindAudit, Verdict: Passed, Lift: true})
	if err := log.room(again); err != nil {
		t.Errorf("after it was lifted: %v", err)
	}
	r := open(t, t.TempDir())
	digest := add(t, r, file("a", "1.0.0")).Ref.Digest
	for i := range maxPerKey + 3 {
		e, err := r.AddStatement(digest, statement("k", fmt.Sprintf("rec%d", i), Verified))
		if kept := e.Seq != 0; err != nil || kept != (i < maxPerKey) {
			t.Fatalf("statement %d: %+v, %v", i, e, err)
		}
	}
}

// Whatever is cut off the end of the file, what was kept before is there and
// more can be added; and any byte that is changed is found.
func TestEvidenceSurvives(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	r := open(t, dir)
	digest := add(t, r, file("a", "1.0.0")).Ref.Digest
	const lines = 4
	for i := range lines {
		if _, err := r.AddStatement(digest, statement(fmt.Sprintf("k%d", i), "rec", Verified)); err != nil {
			t.Fatal(err)
		}
	}
	path := r.logPath(digest)
	whole := read(t, path)
	lastLine := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	rapid.Check(t, func(rt *rapid.T) {
		cut := rapid.IntRange(lastLine, len(whole)-1).Draw(rt, "cut")
		tail := rapid.SampledFrom([]string{"", "\x00\x00\x00", "{\"v\""}).Draw(rt, "tail")
		if err := os.WriteFile(path, append(bytes.Clone(whole[:cut]), tail...), 0o600); err != nil {
			rt.Fatal(err)
		}
		trust, err := r.Trust(digest)
		if err != nil || len(trust.Evidence) != lines-1 {
			rt.Fatalf("cut at %d: %d pieces, %v", cut, len(trust.Evidence), err)
		}
		e, err := r.AddStatement(digest, statement("k3", "rec", Verified))
		if err != nil || e.Seq != lines {
			rt.Fatalf("%+v, %v", e, err)
		}
		if diff := cmp.Diff(whole, read(t, path)); diff != "" {
			rt.Fatal(diff)
		}
	})
	rapid.Check(t, func(rt *rapid.T) {
		// A change of the last line that leaves it in form has nothing after it
		// that could tell: see docs/formats/block.md.
		at := rapid.IntRange(0, lastLine-1).Draw(rt, "at")
		bent := bytes.Clone(whole)
		bent[at] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
		if err := os.WriteFile(path, bent, 0o600); err != nil {
			rt.Fatal(err)
		}
		if trust, err := r.Trust(digest); err == nil {
			rt.Fatalf("byte %d: %+v", at, trust)
		}
		if _, err := r.AddStatement(digest, statement("k9", "rec", Verified)); !errors.Is(err, errdef.ErrUnavailable) && !errors.Is(err, errdef.ErrUnsupported) {
			rt.Fatalf("byte %d: %v", at, err)
		}
	})
}

func FuzzEvidence(f *testing.F) {
	var b []byte
	prev := ""
	for _, e := range say("k x!2 a+ a^") {
		e.Prev = prev
		line, err := encodeLine(e)
		if err != nil {
			f.Fatal(err)
		}
		prev = hashLine(line)
		b = append(append(b, line...), '\n')
	}
	if _, err := decodeLog(b, digestOf("b")); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Fuzz(func(t *testing.T, data []byte) {
		log, err := decodeLog(data, digestOf("b"))
		if err != nil {
			if !errors.Is(err, errdef.ErrUnavailable) && !errors.Is(err, errdef.ErrUnsupported) {
				t.Fatalf("no category: %v", err)
			}
			return
		}
		if log.size > int64(len(data)) {
			t.Fatalf("%d bytes of %d", log.size, len(data))
		}
		if got := Score(log.lines, Policy{}); got.Score.Value() < 0 || got.Score.Value() > 1 {
			t.Fatalf("%+v", got)
		}
	})
}

func FuzzEntry(f *testing.F) {
	block := file("a", "1.0.0")
	e, err := NewEntry(block, nil)
	if err != nil {
		f.Fatal(err)
	}
	e.AddedAt, e.Publisher = time.Unix(1_800_000_000, 0), "token:admin"
	about, err := e.encode()
	if err != nil {
		f.Fatal(err)
	}
	if _, err = decodeEntry(about, block); err != nil {
		f.Fatal(err)
	}
	f.Add(about)
	f.Fuzz(func(t *testing.T, about []byte) {
		got, err := decodeEntry(about, block)
		if err == nil && got.Ref != e.Ref {
			t.Fatalf("%+v", got)
		}
	})
}
