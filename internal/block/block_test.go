package block

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func forgeBlocks(t testing.TB) []json.RawMessage {
	t.Helper()
	var raw []json.RawMessage
	if err := json.Unmarshal(read(t, "testdata/forge_blocks.json"), &raw); err != nil {
		t.Fatal(err)
	}
	return raw
}

// Forge's own examples are read, and written as they were.
func TestForgeBlocks(t *testing.T) {
	t.Parallel()
	for _, want := range forgeBlocks(t) {
		var b Block
		if err := json.Unmarshal(want, &b); err != nil {
			t.Fatal(err)
		}
		got, err := marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("block %s: %s", b.Manifest.Name, diff)
		}
	}
}

func TestDecodeBlockRefuses(t *testing.T) {
	t.Parallel()
	good := string(forgeBlocks(t)[1])
	for _, c := range []struct{ name, old, now, want string }{
		{"score", `"trust_score":0.85`, `"trust_score":7.5`, "invalid trust score 7.5: must be in [0.0, 1.0]"},
		{"score-below", `"trust_score":0.85`, `"trust_score":-0.25`, "invalid trust score -0.25: must be in [0.0, 1.0]"},
		{"score-text", `"trust_score":0.85`, `"trust_score":"0.5"`, "invalid: trust score: want a number"},
		{"score-null", `"trust_score":0.85`, `"trust_score":null`, "invalid: block has no trust_score"},
		{"id", `"id":"3f0e`, `"id":"3g0e`, "invalid block id: it has what is no hexadecimal digit"},
		{"no-id", `"id":"`, `"ID":"`, "invalid: block has no id"},
		{"name", `"name":"rust-dev-env"`, `"name":"it's"`, "manifest validation failed for field 'name': \"it's\": " + nameRule},
		{"path", `"name":"rust-dev-env"`, `"name":"../x"`, "manifest validation failed for field 'name': \"../x\": " + nameRule},
		{"version", `"major":1`, `"major":-1`, "invalid: version: major: a JSON number -1 does not belong here"},
		{"version-missing", `"major":1,`, ``, "invalid: version has no major"},
		{"range", `">= 2.40"`, `">= two"`, `invalid: version range ">= two": "two" is not a number without leading zeros`},
		{"kind", `"Runtime"`, `"Sometimes"`, `manifest validation failed for field 'kind': "Sometimes" is not Runtime or Build`},
		{"load", `"Medium"`, `"medium"`, `manifest validation failed for field 'cognitive_load': "medium" is not Low, Medium or High`},
		{"level", `"One"`, `"Four"`, `invalid: trust level "Four" is not Zero, One, Two or Three`},
		{"level-number", `"One"`, `1`, "invalid: manifest: minimum_trust_level: a JSON number does not belong here"},
		{"derivation", `"3b26`, `"eeee`, `manifest validation failed for field 'nix_derivation': "eeeeyfnbx7gappr3dgywi5ib7yrjba3k" is not 32 digits of Nix's base 32`},
		{"part-of-itself", `null`, `["3f0e2c9a-51d8-4b1e-9c57-0a4be2a3c002"]`, "manifest validation failed for field 'composed_of': the block is part of itself"},
		{"null-part", `null`, `[null]`, "invalid block id: it is null"},
		{"provides-twice", `"name":"cargo"`, `"name":"rustc"`, "manifest validation failed for field 'provides': rustc is there twice"},
		{"field-twice", `"author":`, `"id":"x","author":`, `invalid: block: "id" is there twice`},
		{"list", good, `[]`, "invalid: block: it is not an object"},
		{"null", good, `null`, "invalid: block: it is not an object"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var b Block
			err := json.Unmarshal([]byte(strings.Replace(good, c.old, c.now, 1)), &b)
			if err == nil || err.Error() != c.want || !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
		})
	}
	var b Block
	if err := json.Unmarshal([]byte(strings.Replace(good, `"author"`, `"later":1,"author"`, 1)), &b); err != nil {
		t.Errorf("an unknown field: %v", err)
	}
}

func TestTrustScore(t *testing.T) {
	t.Parallel()
	for v, want := range map[float64]string{
		-0.001: "-0.001", 1.5: "1.5", 7: "7", math.Inf(1): "inf", math.Inf(-1): "-inf", math.NaN(): "NaN", 1e21: "1000000000000000000000",
	} {
		if _, err := NewTrustScore(v); err == nil || err.Error() != "invalid trust score "+want+": must be in [0.0, 1.0]" {
			t.Errorf("%v: %v", v, err)
		}
	}
	for v, want := range map[float64]string{0: "0.0000", 0.5: "0.5000", 1: "1.0000", 0.12345: "0.1235"} {
		s, err := NewTrustScore(v)
		if err != nil || s.String() != want || s.Value() != v {
			t.Errorf("%v: %s, %v", v, s, err)
		}
	}
}

func TestUUID(t *testing.T) {
	t.Parallel()
	const canonical = "67e55044-10b1-426f-9247-bb680e5fe0c8"
	for _, text := range []string{
		canonical, "67e5504410b1426f9247bb680e5fe0c8", "{" + canonical + "}", "urn:uuid:" + canonical, strings.ToUpper(canonical),
	} {
		if u, err := ParseUUID(text); err != nil || u.String() != canonical {
			t.Errorf("%s: %s, %v", text, u, err)
		}
	}
	for _, text := range []string{
		"", "67e5504410b1426f9247bb680e5fe0c", "67e5504410b1-426f-9247-bb680e5fe0c8aa", "{" + canonical, canonical + "}", "(" + canonical + ")",
		"urn:uuid:67e5504410b1426f9247bb680e5fe0c8", "URN:UUID:" + canonical, "{67e5504410b1426f9247bb680e5fe0c8}", canonical + " ",
		"67e55044-10b1-426f-9247-bb680e5fe0cg", "67e55044_10b1_426f_9247_bb680e5fe0c8",
	} {
		if u, err := ParseUUID(text); err == nil {
			t.Errorf("%q: %s", text, u)
		}
	}
	var id ID
	if err := id.UnmarshalText([]byte("x")); err == nil || err.Error() != "invalid block id: want 32 hexadecimal digits, alone or in groups of 8-4-4-4-12" {
		t.Errorf("block id: %v", err)
	}
	if a, b := NewUUID(), NewUUID(); a == b || a.String()[14] != '4' || !strings.ContainsRune("89ab", rune(a.String()[19])) {
		t.Errorf("random: %s, %s", a, b)
	}
	if a := UUIDOf("a"); a != UUIDOf("a") || a == UUIDOf("b") || a.String()[14] != '8' {
		t.Errorf("of a name: %s", a)
	}
}

// The vectors of Forge's hash.
func TestForgeHash(t *testing.T) {
	t.Parallel()
	var all []byte
	for b := range 256 {
		all = append(all, byte(b))
	}
	for _, c := range []struct{ stdout, stderr, want string }{
		{"", "", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		{"git-env\n", "", "3ceeb51d137868b2babb0b1c7ab153cc493b6e2b68e69507afbb416888344da0"},
		{"out", "err", "0db14a89d67977799dff485cc6419361e26b4b775037de1377bcf57e2efcf45f"},
		{"hello stdout\n", "hello stderr\n", "41f0e76d9c3ca48806b17f31dc3aedf5da27868cd6bc6e402f109f5917789018"},
		{string(all), "", "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"},
		{"x", "xx", "cd2eb0837c9b4c962c22d2ff8b5441b7b45805887f051d39bf133b583baf6860"},
		{"xx", "x", "cd2eb0837c9b4c962c22d2ff8b5441b7b45805887f051d39bf133b583baf6860"},
	} {
		if got := ForgeHash([]byte(c.stdout), []byte(c.stderr)).String(); got != c.want {
			t.Errorf("%q %q: %s", c.stdout, c.stderr, got)
		}
	}
}

func TestContentHash(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		h := ContentHash(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "hash"))
		array, err := json.Marshal(h)
		if err != nil || array[0] != '[' {
			t.Fatalf("%s, %v", array, err)
		}
		text, err := json.Marshal(HexHash(h))
		if err != nil || string(text) != `"`+h.String()+`"` {
			t.Fatalf("%s, %v", text, err)
		}
		for _, form := range [][]byte{array, text} {
			var one ContentHash
			var two HexHash
			if err = errors.Join(json.Unmarshal(form, &one), json.Unmarshal(form, &two)); err != nil || one != h || ContentHash(two) != h {
				t.Fatalf("%s: %v", form, err)
			}
		}
	})
	zeros := strings.TrimSuffix(strings.Repeat("0,", 31), ",")
	for _, bad := range []string{
		"[" + zeros + "]", "[" + zeros + ",256]", "[" + zeros + ",-1]", "[" + zeros + ",0.5]", "[" + zeros + ",null]", "[" + zeros + ",0,0]",
		`"` + strings.Repeat("A", 64) + `"`, `"` + strings.Repeat("a", 63) + `"`, `""`, "null", "{}", `"AAAA"`,
	} {
		var h ContentHash
		if err := json.Unmarshal([]byte(bad), &h); err == nil && bad != "null" || err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

func TestExecutionStatus(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]ExecutionStatus{
		`"Pending"`: {Word: Pending}, `"Running"`: {Word: Running}, `"Succeeded"`: {Word: Succeeded},
		`{"Failed":{"reason":"out of memory"}}`: {Failed, "out of memory"}, `{"Failed":{"reason":""}}`: {Word: Failed},
	} {
		var s ExecutionStatus
		if err := json.Unmarshal([]byte(text), &s); err != nil || s != want {
			t.Errorf("%s: %+v, %v", text, s, err)
		}
		if back, err := json.Marshal(s); err != nil || string(back) != text {
			t.Errorf("%s became %s, %v", text, back, err)
		}
	}
	for _, bad := range []string{
		`"Failed"`, `"Done"`, `{"Succeeded":{}}`, `{"Failed":{}}`, `{"Failed":{"reason":1}}`, `{"Failed":null}`, `{}`, `1`, `null`,
		`{"Failed":{"reason":"x"},"Pending":{}}`,
	} {
		var s ExecutionStatus
		if err := s.UnmarshalJSON([]byte(bad)); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %+v, %v", bad, s, err)
		}
	}
	for _, c := range []struct {
		out  record.Output
		want ExecutionStatus
	}{
		{record.Output{}, ExecutionStatus{Word: Succeeded}},
		{record.Output{Exit: 3}, ExecutionStatus{Failed, "exit code 3"}},
		{record.Output{Exit: -1, Signal: "SIGSEGV"}, ExecutionStatus{Failed, "killed by SIGSEGV"}},
		{record.Output{Exit: -1, Signal: "SIGKILL", Failure: "timed out"}, ExecutionStatus{Failed, "timed out"}},
	} {
		if got := StatusOf(c.out); got != c.want {
			t.Errorf("%+v: %+v", c.out, got)
		}
	}
}

func TestDuration(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		d := Duration(rapid.Int64Range(0, int64(9e18)).Draw(t, "ns"))
		data, err := json.Marshal(d)
		var back Duration
		if err = errors.Join(err, json.Unmarshal(data, &back)); err != nil || back != d {
			t.Fatalf("%s: %v, %v", data, back, err)
		}
	})
	for _, bad := range []string{`{"secs":0,"nanos":1000000000}`, `{"secs":9223372036854775807,"nanos":0}`, `{"secs":1}`, `{"secs":-1,"nanos":0}`, `5`} {
		var d Duration
		if err := json.Unmarshal([]byte(bad), &d); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	if data, err := json.Marshal(Duration(812345678)); string(data) != `{"secs":0,"nanos":812345678}` {
		t.Errorf("%s, %v", data, err)
	}
	if _, err := json.Marshal(Duration(-1)); err == nil {
		t.Error("a negative one was written")
	}
}

func TestForgeRecord(t *testing.T) {
	t.Parallel()
	block := ID{UUIDOf("block")}
	r := NewForgeRecord(Facts{
		RecordID: "rec-1", Block: block, User: "token:ci", Started: time.Date(2026, 2, 20, 11, 0, 0, 123456789, time.FixedZone("x", 3600)),
		Output: record.Output{Stdout: []byte("git-env\n"), Wall: 812345678}, Snapshot: "sha256:abc",
	})
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{
		`"input_hash":[227,176,196,66,152,252,28,20,154,251,244,200,153,111,185,36,39,174,65,228,100,155,147,76,164,149,153,27,120,82,184,85]`,
		`"output_hash":[60,238,181,29,`, `"started_at":"2026-02-20T10:00:00.123456789Z"`, `"duration":{"secs":0,"nanos":812345678}`,
		`"status":"Succeeded"`, `"block_id":"` + block.String() + `"`, `"user_id":"token:ci"`, `"vm_snapshot_id":"` + UUIDOf("sha256:abc").String() + `"`,
	} {
		if !strings.Contains(string(data), part) {
			t.Errorf("%s has no %s", data, part)
		}
	}
	var back ForgeRecord
	if err = json.Unmarshal(data, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(r, back); diff != "" {
		t.Error(diff)
	}
	id := NewUUID()
	if r = NewForgeRecord(Facts{RecordID: id.String()}); r.ID.UUID != id || r.VMSnapshotID != nil {
		t.Errorf("%+v", r)
	}
}

func FuzzBlockJSON(f *testing.F) {
	for _, b := range forgeBlocks(f) {
		f.Add([]byte(b))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var b Block
		if json.Unmarshal(data, &b) != nil {
			return
		}
		if err := b.Validate(); err != nil {
			t.Fatalf("what was read is not valid: %v", err)
		}
		once, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		var again Block
		if err = json.Unmarshal(once, &again); err != nil {
			t.Fatalf("%s: %v", once, err)
		}
	})
}
