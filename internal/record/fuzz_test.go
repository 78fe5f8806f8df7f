package record

import (
	"bytes"
	"encoding/pem"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

// What is read is in its one form: it is written as it was.
func FuzzEnvelope(f *testing.F) {
	e, _ := testEnvelope(f)
	f.Add(e.Bytes)
	f.Add([]byte(`{"payloadType":"application/vnd.in-toto+json","payload":"e30=","signatures":[{"keyid":"","sig":""}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := Parse(data)
		if err != nil {
			if errdef.Code(err) == "internal" {
				t.Fatal(err)
			}
			return
		}
		if !bytes.Equal(got.Bytes, bytes.TrimSuffix(data, []byte("\n"))) || Digest(got.payload) != got.Digest {
			t.Fatalf("%q became %q", data, got.Bytes)
		}
	})
}

func FuzzStatement(f *testing.F) {
	e, _ := testEnvelope(f)
	f.Add(e.payload)
	f.Add(bytes.Replace(e.payload, []byte("/v1"), []byte("/v2"), 2))
	f.Fuzz(func(t *testing.T, payload []byte) {
		r, err := decodeStatement(payload)
		if err != nil {
			if errdef.Code(err) == "internal" {
				t.Fatal(err)
			}
			return
		}
		if again, encErr := encodeStatement(r); encErr != nil || !bytes.Equal(again, payload) {
			t.Fatalf("%q became %q, %v", payload, again, encErr)
		}
	})
}

// A bundle that is read is whole, and is written again.
func FuzzBundle(f *testing.F) {
	data, e := testBundle(f)
	f.Add(data)
	f.Add(e.Bytes)
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := ReadBundle(bytes.NewReader(data))
		if err != nil || !b.Whole() {
			return
		}
		var out bytes.Buffer
		if err = WriteBundle(&out, b.Envelope, *b.Key, b); err != nil {
			t.Fatal(err)
		}
		if _, err = ReadBundle(&out); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzKey(f *testing.F) {
	f.Add(testKey().Public().PEM())
	f.Add(pem.EncodeToMemory(&pem.Block{Type: privateBlock, Bytes: []byte("key")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := parseKey(data); err != nil && errdef.Code(err) != "invalid" {
			t.Fatal(err)
		}
		key, err := ParsePublic(data)
		if err != nil {
			return
		}
		if again, err := ParsePublic(key.PEM()); err != nil || again.ID() != key.ID() {
			t.Fatalf("%v", err)
		}
	})
}
