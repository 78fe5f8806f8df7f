package record

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const vectorFile = "../../api/vectors/record.json"

// vectors are for other implementations: docs/formats/record.md says what each
// is. Binary values are hexadecimal.
type vectors struct {
	Version   int               `json:"version"`
	PublicKey string            `json:"public_key"`
	KeyID     string            `json:"key_id"`
	Inputs    []inputVector     `json:"inputs"`
	Outputs   []outputVector    `json:"outputs"`
	Rules     []canonicalVector `json:"rules"`
	Records   []recordVector    `json:"records"`
}

type inputVector struct {
	Name     string `json:"name"`
	Snapshot string `json:"snapshot"`
	// Input has its contents in base64, as encoding/json writes them, and its
	// seed as text.
	Input    Input  `json:"input"`
	SeedText string `json:"seed"`
	PreImage string `json:"pre_image"`
	Tine     string `json:"tine-v1"`
	Forge    string `json:"forge-v1"`
}

type outputVector struct {
	Name     string `json:"name"`
	Output   Output `json:"output"`
	PreImage string `json:"pre_image"`
	Tine     string `json:"tine-v1"`
	Forge    string `json:"forge-v1"`
}

type canonicalVector struct {
	Rule  string    `json:"rule"`
	Start time.Time `json:"start"`
	In    string    `json:"in"`
	Out   string    `json:"out"`
}

type recordVector struct {
	Name     string          `json:"name"`
	Envelope json.RawMessage `json:"envelope"`
	Digest   string          `json:"digest"`
	PAE      string          `json:"pae"`
	Finding  string          `json:"finding"`
}

// Run with -update to write them anew.
var update = flag.Bool("update", false, "write the vectors")

func TestVectors(t *testing.T) {
	t.Parallel()
	v := makeVectors(t)
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(vectorFile, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(string(read(t, vectorFile)), b.String()); diff != "" {
		t.Errorf("the vectors are not what this code makes (-update writes them):\n%s", diff)
	}
	for _, r := range v.Records {
		var compact bytes.Buffer
		if err := json.Compact(&compact, r.Envelope); err != nil {
			t.Fatal(err)
		}
		got := ""
		if verdict := Verify(compact.Bytes(), testTrust(), nil); len(verdict.Findings) > 0 {
			got = verdict.Findings[0].Kind
		}
		if got != r.Finding {
			t.Errorf("%s: %q, want %q", r.Name, got, r.Finding)
		}
	}
}

func makeVectors(t *testing.T) vectors {
	t.Helper()
	d, zero := testDraft(), time.Unix(0, 0).UTC()
	public := testKey().Public()
	v := vectors{Version: 1, PublicKey: string(public.PEM()), KeyID: public.ID()}
	for _, in := range []inputVector{
		{Name: "every field", Snapshot: d.Environment.Snapshot, Input: d.Input},
		{Name: "as little as there can be", Snapshot: d.Environment.Snapshot, Input: Input{Argv: []string{"true"}, Start: zero}},
		{Name: "one argument that is two in the next", Snapshot: "", Input: Input{Argv: []string{"ab"}, Start: zero}},
		{Name: "two arguments", Snapshot: "", Input: Input{Argv: []string{"a", "b"}, Start: zero}},
		{Name: "a normal run: no seed, no start", Snapshot: d.Environment.Snapshot, Input: Input{Argv: []string{"date"}}},
	} {
		var b bytes.Buffer
		frameInput(&b, in.Snapshot, in.Input)
		in.PreImage, in.Tine, in.Forge = hex.EncodeToString(b.Bytes()), HashInput(in.Snapshot, in.Input), ForgeHash(in.Input.Stdin, nil)
		in.SeedText = jsonSeed(in.Input)
		v.Inputs = append(v.Inputs, in)
	}
	for _, out := range []outputVector{
		{Name: "every field", Output: d.Output},
		{Name: "nothing", Output: Output{}},
		{Name: "ab and c", Output: Output{Stdout: []byte("ab"), Stderr: []byte("c")}},
		{Name: "a and bc: the same in forge-v1", Output: Output{Stdout: []byte("a"), Stderr: []byte("bc")}},
		{Name: "git-env", Output: Output{Stdout: []byte("git-env\n")}},
		{Name: "ended by a signal", Output: Output{Exit: -1, Signal: "SIGKILL", Failure: "timed out", Virtual: 10 * time.Second}},
	} {
		var b bytes.Buffer
		frameOutput(&b, out.Output)
		out.PreImage, out.Tine, out.Forge = hex.EncodeToString(b.Bytes()), HashOutput(out.Output), ForgeHash(out.Output.Stdout, out.Output.Stderr)
		v.Outputs = append(v.Outputs, out)
	}
	for _, r := range rules {
		in := "b 2026-11-21T12:00:01Z 1795262400 took 0.12s \x1b[1mx\x1b[0m \nNov 21 12:00:00 a[7]: /tmp/tmp.a1/f pid 12 0x7ffd1234 f81d4fae-7dec-11d0-a765-00a0c91e6bf6"
		v.Rules = append(v.Rules, canonicalVector{r.name, testStart(), in, string(r.apply([]byte(in), testStart()))})
	}
	e, _ := testEnvelope(t)
	bad := e.Record
	bad.User = "token:mallory"
	forged, err := sign(bad, testKey())
	if err != nil {
		t.Fatal(err)
	}
	swapped := bytes.Replace(forged.Bytes, forgedSignature(forged), forgedSignature(e), 1)
	v.Records = []recordVector{
		{"good", e.Bytes, e.Digest, hex.EncodeToString(PAE(payloadType, e.payload)), ""},
		{"another user under the same signature", swapped, forged.Digest, hex.EncodeToString(PAE(payloadType, forged.payload)), BadSignature},
	}
	return v
}

// forgedSignature is the end of an envelope: its signatures.
func forgedSignature(e Envelope) []byte {
	return e.Bytes[bytes.Index(e.Bytes, []byte(`"signatures"`)):]
}

func jsonSeed(in Input) string {
	text, err := json.Marshal(struct {
		Seed uint64 `json:",string"`
	}{in.Seed})
	if err != nil {
		return ""
	}
	return string(bytes.Trim(text, `{}"Sed:`))
}
