package record

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tinevm/tine/internal/errdef"
)

// testEnvelope is a record that has the same bytes whenever it is made.
func testEnvelope(t testing.TB) (Envelope, map[string][]byte) {
	t.Helper()
	r, contents, err := testDraft().build()
	if err != nil {
		t.Fatal(err)
	}
	r.ID, r.Chain = "3f0e8a52-6d0b-4c55-9d0f-0c1d2e3f4a5b", Chain{1, firstDigest}
	r.Created, r.KeyID = r.Started.Add(time.Minute), testKey().Public().ID()
	e, err := sign(r, testKey())
	if err != nil {
		t.Fatal(err)
	}
	return e, contents
}

func testTrust() Trust {
	return Trust{Keys: []Public{testKey().Public()}, Now: time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)}
}

// The example of DSSE's own protocol text.
func TestPAE(t *testing.T) {
	t.Parallel()
	got := string(PAE("http://example.com/HelloWorld", []byte("hello world")))
	if want := "DSSEv1 29 http://example.com/HelloWorld 11 hello world"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestStatement(t *testing.T) {
	t.Parallel()
	e, contents := testEnvelope(t)
	var s struct {
		Type          string `json:"_type"`
		PredicateType string `json:"predicateType"`
		Subject       []struct {
			Name   string
			Digest map[string]string
		}
		Predicate map[string]any
	}
	if err := json.Unmarshal(e.payload, &s); err != nil {
		t.Fatal(err)
	}
	if s.Type != StatementType || s.PredicateType != PredicateType || len(s.Subject) != 4 {
		t.Errorf("%+v", s)
	}
	named := map[string]string{"stdout": "one\ntwo\nthree\n", "file:/srv/b": "\x00\x01\x02\xff"}
	for _, sub := range s.Subject {
		if data, ok := named[sub.Name]; ok && digestPrefix+sub.Digest["sha256"] != Digest([]byte(data)) {
			t.Errorf("%+v", sub)
		}
		delete(named, sub.Name)
	}
	if len(named) > 0 || s.Subject[0].Digest["sha256"] != strings.TrimPrefix(e.Record.Hashes.Tine.Output, digestPrefix) {
		t.Errorf("%+v", s.Subject)
	}
	again, err := Parse(e.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e.Record, again.Record, cmpopts.EquateEmpty()); diff != "" {
		t.Error(diff)
	}
	source := &Bundle{contents: contents}
	in, inErr := LoadInput(again.Record, source)
	out, outErr := LoadOutput(again.Record, source)
	if err = errors.Join(inErr, outErr); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testDraft().Input, in) + cmp.Diff(testDraft().Output, out); diff != "" {
		t.Error(diff)
	}
}

// Any byte of an envelope that is another one is found.
func TestFlipAnyByteOfEnvelope(t *testing.T) {
	t.Parallel()
	e, _ := testEnvelope(t)
	if v := Verify(e.Bytes, testTrust(), nil); !v.OK {
		t.Fatalf("%+v", v)
	}
	for i := rand.IntN(12); i < len(e.Bytes); i += 12 { // all of them, in several runs
		bad := bytes.Clone(e.Bytes)
		bad[i] ^= 1 << (i % 8)
		if v := Verify(bad, testTrust(), nil); v.OK || len(v.Findings) == 0 {
			t.Fatalf("byte %d: %+v", i, v)
		}
	}
}

// Any byte of what is signed that is another one is found, if not by its form
// then by the signature.
func TestFlipAnyByteOfPayload(t *testing.T) {
	t.Parallel()
	e, _ := testEnvelope(t)
	changed := 0
	for i := rand.IntN(24); i < len(e.payload); i += 24 {
		bad := bytes.Clone(e.payload)
		bad[i] ^= 1
		forged, err := json.Marshal(sealed{payloadType, base64.StdEncoding.EncodeToString(bad), []signature{{e.Record.KeyID, base64.StdEncoding.EncodeToString(e.signature)}}})
		if err != nil {
			t.Fatal(err)
		}
		v := Verify(forged, testTrust(), nil)
		if v.OK {
			t.Fatalf("byte %d: %+v", i, v)
		}
		if v.Envelope != nil && v.Findings[0].Kind == BadSignature {
			changed++
		}
	}
	if changed == 0 {
		t.Error("no change came as far as the signature")
	}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	e, contents := testEnvelope(t)
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	without := map[string][]byte{}
	for digest, data := range contents {
		if digest != e.Record.Output.Stdout.Digest {
			without[digest] = data
		}
	}
	wrong := map[string][]byte{}
	for digest := range contents {
		wrong[digest] = contents[e.Record.Output.Stdout.Digest]
	}
	reseal := func(from, to string) []byte {
		payload := strings.ReplaceAll(string(e.payload), from, to)
		data, sealErr := seal(payloadType, []byte(payload), testKey())
		if sealErr != nil {
			t.Fatal(sealErr)
		}
		return data
	}
	tests := map[string]struct {
		data  []byte
		trust func(*Trust)
		from  Source
		want  string
	}{
		"good":              {data: e.Bytes},
		"with-its-end":      {data: append(bytes.Clone(e.Bytes), '\n')},
		"with-contents":     {data: e.Bytes, from: &Bundle{contents: contents}},
		"missing-content":   {data: e.Bytes, from: &Bundle{contents: without}},
		"wrong-contents":    {data: e.Bytes, from: &Bundle{contents: wrong}, want: BadHash},
		"no-key":            {data: e.Bytes, trust: func(tr *Trust) { tr.Keys = nil }, want: UnknownKey},
		"another-key":       {data: e.Bytes, trust: func(tr *Trust) { tr.Keys = []Public{(&Key{other}).Public()} }, want: UnknownKey},
		"from-the-future":   {data: e.Bytes, trust: func(tr *Trust) { tr.Now = e.Record.Started.Add(-time.Hour) }, want: Future},
		"a-little-ahead":    {data: e.Bytes, trust: func(tr *Trust) { tr.Now = e.Record.Created.Add(-time.Minute) }},
		"another-version":   {data: reseal("ExecutionRecord/v1", "ExecutionRecord/v2"), want: Unsupported},
		"another-predicate": {data: reseal("https://tine.dev/ExecutionRecord/v1", "https://slsa.dev/provenance/v1"), want: Malformed},
		"another-statement": {data: reseal("in-toto.io/Statement/v1", "in-toto.io/Statement/v0.1"), want: Malformed},
		"unknown-field":     {data: reseal(`"mode":`, `"more":1,"mode":`), want: Malformed},
		"field-twice":       {data: reseal(`"mode":`, `"mode":"normal","mode":`), want: Malformed},
		"other-subject":     {data: reseal(`{"name":"stdout"`, `{"name":"stdin"`), want: Malformed},
		"unknown-mode":      {data: reseal(`"mode":"deterministic"`, `"mode":"magic"`), want: Malformed},
		"unknown-rule":      {data: reseal(`"pids"`, `"pidz"`), want: Malformed},
		"no-icount":         {data: reseal(`,"icount_shift":2`, ``), want: Malformed},
		"seed-as-number":    {data: reseal(`"9223372036854775815"`, `9223372036854775815`), want: Malformed},
		"another-zone":      {data: reseal(`2026-11-21T23:50:00.000000123Z`, `2026-11-21T23:50:00.000000123+00:00`), want: Malformed},
		"dirty-path":        {data: reseal(`/srv/b`, `/srv/../b`), want: Malformed},
		"not-collected":     {data: reseal(`["/srv/a","/srv/b"]`, `["/srv/a","/srv/c"]`), want: Malformed},
		"empty":             {data: nil, want: Malformed},
		"pretty":            {data: bytes.Replace(e.Bytes, []byte(`,"payload"`), []byte(`, "payload"`), 1), want: Malformed},
		"two-lines":         {data: append(bytes.Clone(e.Bytes), '\n', '\n'), want: Malformed},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			trust := testTrust()
			if tt.trust != nil {
				tt.trust(&trust)
			}
			v := Verify(tt.data, trust, tt.from)
			got := ""
			if len(v.Findings) > 0 {
				got = v.Findings[0].Kind
			}
			if got != tt.want || v.OK != (tt.want == "") {
				t.Errorf("ok %t: %+v, want %q", v.OK, v.Findings, tt.want)
			}
			if name == "missing-content" && len(v.Missing) != 1 {
				t.Errorf("missing: %v", v.Missing)
			}
		})
	}
}

// docs/records.md shows how to verify a record with openssl alone: so does this.
func TestOpenSSL(t *testing.T) {
	t.Parallel()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("there is no openssl")
	}
	dir := t.TempDir()
	s := openStore(t, dir)
	e := appendDraft(t, s, testDraft())
	pae, sig, public := filepath.Join(dir, "pae"), filepath.Join(dir, "sig"), filepath.Join(dir, "key.pub")
	write(t, pae, PAE(payloadType, e.payload))
	write(t, sig, e.signature)
	write(t, public, s.Public().PEM())
	verify := func() (string, error) {
		out, runErr := exec.Command(openssl, "pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", public, "-in", pae, "-sigfile", sig).CombinedOutput()
		return string(out), runErr
	}
	if out, runErr := verify(); runErr != nil || !strings.Contains(out, "Signature Verified Successfully") {
		t.Errorf("openssl: %s, %v", out, runErr)
	}
	write(t, pae, PAE(payloadType, append(bytes.Clone(e.payload), ' ')))
	if out, runErr := verify(); runErr == nil {
		t.Errorf("openssl verifies what was changed: %s", out)
	}
	out, err := exec.Command(openssl, "pkey", "-in", filepath.Join(dir, keyDir, keyName), "-pubout").Output()
	if err != nil || !bytes.Equal(out, s.Public().PEM()) {
		t.Errorf("openssl reads another key: %s, %v", out, err)
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "key")
	if _, err := LoadKey(dir); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no directory: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(dir); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no key: %v", err)
	}
	made := make(chan string)
	for range 4 { // all get the same
		go func() {
			key, err := makeKey(t.Context(), dir)
			if err != nil {
				t.Error(err)
				made <- ""
				return
			}
			made <- key.Public().ID()
		}()
	}
	first := <-made
	for range 3 {
		if id := <-made; id != first {
			t.Errorf("another key: %s, %s", id, first)
		}
	}
	key, err := LoadKey(dir)
	if err != nil || key.Public().ID() != first {
		t.Fatalf("%v", err)
	}
	public, err := ParsePublic(key.Public().PEM())
	if err != nil || public.ID() != first {
		t.Errorf("%v", err)
	}
}

func TestLooseKey(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		spoil func(dir, file string) error
		want  error
	}{
		"group-reads":    {func(_, file string) error { return os.Chmod(file, 0o640) }, errdef.ErrDenied},
		"all-read":       {func(_, file string) error { return os.Chmod(file, 0o604) }, errdef.ErrDenied},
		"others-write":   {func(_, file string) error { return os.Chmod(file, 0o602) }, errdef.ErrDenied},
		"directory-open": {func(dir, _ string) error { return os.Chmod(dir, 0o750) }, errdef.ErrDenied},
		"no-file":        {func(_, file string) error { return errors.Join(os.Remove(file), os.Mkdir(file, 0o700)) }, errdef.ErrDenied},
		"empty":          {func(_, file string) error { return os.WriteFile(file, nil, 0o600) }, errdef.ErrInvalid},
		"public":         {func(_, file string) error { return os.WriteFile(file, testKey().Public().PEM(), 0o600) }, errdef.ErrInvalid},
		"tight-is-good":  {func(_, file string) error { return os.Chmod(file, 0o400) }, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := openStore(t, dir)
			appendDraft(t, s, testDraft())
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			keys := filepath.Join(dir, keyDir)
			if err := tt.spoil(keys, filepath.Join(keys, keyName)); err != nil {
				t.Fatal(err)
			}
			again, err := Open(t.Context(), testConfig(dir))
			if !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
			if err == nil {
				err = again.Close()
			}
			if err != nil && errors.Is(err, errdef.ErrDenied) && name != "no-file" && !strings.Contains(errdef.Hint(err), "chmod") {
				t.Errorf("hint %q", errdef.Hint(err))
			}
		})
	}
	dir := t.TempDir()
	if err := os.Symlink("/etc/passwd", filepath.Join(dir, keyName)); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(dir); err == nil {
		t.Error("a key behind a link was read")
	}
}
