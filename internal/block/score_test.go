package block

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func everyone(string) bool { return true }

// say makes evidence of words: KEY says a record of signer s is verified;
// KEY!N that N runs mismatched; KEY+ and KEY- are audits, KEY^ one that lifts.
func say(words string) []Evidence {
	var list []Evidence
	for w := range strings.FieldsSeq(words) {
		e := Evidence{V: 1, Seq: len(list) + 1, At: Moment(time.Unix(0, 0).UTC()), Block: digestOf("b"), Kind: KindStatement, Verdict: Verified, Runs: 1, Signer: "s"}
		e.Record = fmt.Sprintf("r%d", len(list))
		audit := func(verdict string, lift bool) {
			e.Kind, e.Verdict, e.Runs, e.Signer, e.Record, e.Lift = KindAudit, verdict, 0, "", "", lift
		}
		key, runs, mismatch := strings.Cut(w, "!")
		switch {
		case mismatch:
			e.Verdict, e.Record = Mismatch, "r"
			_, _ = fmt.Sscan(runs, &e.Runs)
		case strings.HasSuffix(w, "+"):
			audit(Passed, false)
		case strings.HasSuffix(w, "-"):
			audit(Rejected, false)
		case strings.HasSuffix(w, "^"):
			audit(Passed, true)
		}
		e.Key = strings.TrimRight(key, "+-^")
		list = append(list, e)
	}
	return list
}

func digestOf(text string) string { return Digest([]byte(text)) }

func keys(n int, each string) string {
	var words []string
	for i := range n {
		words = append(words, strings.ReplaceAll(each, "K", fmt.Sprintf("k%d", i)))
	}
	return strings.Join(words, " ")
}

// The examples of docs/blocks.md.
func TestScore(t *testing.T) {
	t.Parallel()
	page := string(read(t, "../../docs/blocks.md"))
	for _, c := range []struct {
		what, words  string
		agree, other float64
		score        string
		status       string
	}{
		{"nothing", "", 0, 0, "0.0000", Unproven},
		{"the author, once", "own", 0.25, 0, "0.0611", Scored},
		{"the author, 1,000 times", strings.Repeat("own ", 1000), 0.4375, 0, "0.1022", Scored},
		{"one key, once", "k", 1, 0, "0.2065", Scored},
		{"one key, 1,000 times", strings.Repeat("k ", 1000), 1.75, 0, "0.3129", Scored},
		{"1,000 unknown keys", strings.ReplaceAll(keys(1000, "K"), "k", "unknown"), 0.875, 0, "0.1855", Scored},
		{"3 keys, once each", keys(3, "K"), 3, 0, "0.4384", Scored},
		{"3 keys, 3 times each", keys(3, "K K K"), 5.25, 0, "0.5774", Scored},
		{"10 keys, 3 times each", keys(10, "K K K"), 17.5, 0, "0.8199", Scored},
		{"30 keys, 3 times each", keys(30, "K K K"), 52.5, 0, "0.9318", Scored},
		{"3 audits passed", "a+ b+ c+", 6, 0, "0.6096", Scored},
		{"10 audits passed", keys(10, "K+"), 6, 0, "0.6096", Scored},
		{"10 keys, 3 times each, 3 audits passed", keys(10, "K K K") + " a+ b+ c+", 23.5, 0, "0.8594", Scored},
		{"10 keys, 3 times each, an audit rejects", keys(10, "K K K") + " a-", 17.5, 2, "0.6926", Disputed},
		{"10 keys, 3 times each, one mismatch that is not reproduced", keys(10, "K K K") + " x!1", 17.5, 1, "0.7481", Disputed},
		{"10 keys, 3 times each, a mismatch in 2 runs", keys(10, "K K K") + " x!2", 17.5, 1, "0.0000", Quarantined},
		{"the same, lifted by an audit", keys(10, "K K K") + " x!2 a^", 19.5, 1, "0.7686", Disputed},
		{"a mismatch that two keys have seen once", "x!1 y!1", 0, 2, "0.0000", Quarantined},
	} {
		known := func(key string) bool { return !strings.HasPrefix(key, "unknown") }
		got := Score(say(c.words), Policy{Known: known, Own: []string{"", "own"}})
		if got.For != c.agree || got.Against != c.other || got.Score.String() != c.score || got.Status != c.status {
			t.Errorf("%s: %v for, %v against, %s, %s", c.what, got.For, got.Against, got.Score, got.Status)
		}
		row := fmt.Sprintf("| %s | %v | %v | %s | %s |", c.what, c.agree, c.other, c.score, c.status)
		if !strings.Contains(page, row) {
			t.Errorf("docs/blocks.md has not the row\n%s", row)
		}
	}
}

func TestScoreSaysWhy(t *testing.T) {
	t.Parallel()
	again := say("k k")
	again[1].Record = again[0].Record
	self := say("s")
	for _, c := range []struct {
		what     string
		evidence []Evidence
		want     string // of the last piece
	}{
		{"first", say("k"), "1 "},
		{"second", say("k k"), "0.5 "},
		{"third", say("k k k"), "0.25 "},
		{"fourth", say("k k k k"), "0 the key has said enough"},
		{"again", again, "0 the same record again"},
		{"own", say("own"), "0.25 checks their own work"},
		{"signer", self, "0.25 checks their own work"},
		{"unknown", say("unknown"), "0.5 unknown key: all of them count as one"},
		{"reproduced", say("x!1 y!1"), "1 reproduced"},
		{"once", say("x!1"), "1 "},
		{"own-audit", say("own+"), "0 audits their own work"},
		{"fourth-audit", say("a+ b+ c+ d+"), "0 enough auditors"},
	} {
		known := func(key string) bool { return key != "unknown" }
		got := Score(c.evidence, Policy{Known: known, Own: []string{"own"}})
		last := got.Evidence[len(got.Evidence)-1]
		if have := fmt.Sprintf("%v %s", last.Weight, last.Why); have != c.want {
			t.Errorf("%s: %s", c.what, have)
		}
		if last.ID != fmt.Sprintf("%.12s-%d", strings.TrimPrefix(digestOf("b"), "sha256:"), len(c.evidence)) {
			t.Errorf("%s: id %s", c.what, last.ID)
		}
	}
	got := Score(say("x!2 a^ a-"), Policy{Known: everyone})
	if got.Evidence[0].Why != "lifted by an audit" || got.Evidence[1].Why != "replaced by a later audit" || got.Status != Disputed {
		t.Errorf("%+v", got)
	}
	if got = Score(say("x!2 a^ x!2"), Policy{Known: everyone}); got.Status != Quarantined {
		t.Errorf("a mismatch after it was lifted: %+v", got)
	}
}

func TestTrustJSON(t *testing.T) {
	t.Parallel()
	data, err := json.Marshal(Score(say("k a^"), Policy{Known: everyone}))
	digest := digestOf("b")
	id := strings.TrimPrefix(digest, "sha256:")[:12]
	want := `{"score":0.4384,"status":"scored","for":3,"against":0,"evidence":[` +
		`{"id":"` + id + `-1","v":1,"seq":1,"at":"1970-01-01T00:00:00Z","prev":"","block":"` + digest + `","kind":"statement","key":"k","verdict":"verified","record":"r0","signer":"s","runs":1,"weight":1},` +
		`{"id":"` + id + `-2","v":1,"seq":2,"at":"1970-01-01T00:00:00Z","prev":"","block":"` + digest + `","kind":"audit","key":"a","verdict":"passed","lift":true,"weight":2}]}`
	if err != nil || string(data) != want {
		t.Errorf("got  %s\nwant %s", data, want)
	}
}

func drawEvidence(t *rapid.T) []Evidence {
	word := rapid.SampledFrom([]string{"k1", "k2", "k3", "own", "unknown1", "unknown2", "x!1", "y!1", "y!3", "a+", "b+", "a-", "a^", "own^", "own+"})
	return say(strings.Join(rapid.SliceOfN(word, 0, 40).Draw(t, "evidence"), " "))
}

func TestScoreLaws(t *testing.T) {
	t.Parallel()
	policy := Policy{Known: func(key string) bool { return !strings.HasPrefix(key, "unknown") }, Own: []string{"own"}}
	rapid.Check(t, func(t *rapid.T) {
		evidence := drawEvidence(t)
		got := Score(evidence, policy)
		v := got.Score.Value()
		if v < 0 || v > 1 || fmt.Sprintf("%.4f", v) != got.Score.String() || len(got.Evidence) != len(evidence) {
			t.Fatalf("%+v", got)
		}
		sum := 0.0
		for _, w := range got.Evidence {
			sum += w.Weight
		}
		if sum != got.For+got.Against {
			t.Fatalf("the weights come to %v, not %v and %v", sum, got.For, got.Against)
		}
		if got.Status == Quarantined && v != 0 {
			t.Fatalf("quarantined with %v", v)
		}
		// A new key that agrees never takes trust away, and gives some where the
		// block is not in quarantine.
		more := append(evidence, say("new")...)
		after := Score(more, policy)
		if after.Score.Value() < v || after.For != got.For+1 {
			t.Fatalf("%v, and with a new key %v", v, after.Score)
		}
		// A reproducible mismatch dominates whatever there is.
		if after = Score(append(more, say("z!2")...), policy); after.Status != Quarantined || after.Score.Value() != 0 {
			t.Fatalf("%+v", after)
		}
		// Equal evidence has equal scores.
		if again := Score(evidence, policy); again.Score != got.Score || again.Status != got.Status {
			t.Fatal("another score")
		}
	})
}

// One key, one author, and any number of unknown keys, stay below their bounds
// whatever they say.
func TestScoreSybil(t *testing.T) {
	t.Parallel()
	policy := Policy{Known: func(key string) bool { return !strings.HasPrefix(key, "unknown") }, Own: []string{"own"}}
	for key, bound := range map[string]float64{"k": 0.3130, "own": 0.1023, "unknown": 0.1856} {
		rapid.Check(t, func(t *rapid.T) {
			var words []string
			for i := range rapid.IntRange(0, 200).Draw(t, "n") {
				if key == "unknown" {
					words = append(words, fmt.Sprintf("unknown%d", i))
				} else {
					words = append(words, key)
				}
			}
			if got := Score(say(strings.Join(words, " ")), policy); got.Score.Value() > bound {
				t.Fatalf("%s: %s", key, got.Score)
			}
		})
	}
	if got := Score(say(keys(1000, "K")), Policy{}); got.Score.Value() > 0.1856 {
		t.Errorf("1,000 keys where none is known: %s", got.Score)
	}
}
