package guestproto_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/guestproto"
)

// letterBytes is a letter as it lies in the mailbox.
func letterBytes(l guestproto.Letter) []byte {
	head := make([]byte, guestproto.LetterHead)
	l.PutHead(head)
	return append(head, l.Body...)
}

func TestLetterComesBack(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := guestproto.Letter{
			Kind:   guestproto.LetterKind(rapid.Uint16().Draw(t, "kind")),
			Stream: rapid.Uint32().Draw(t, "stream"),
			Seq:    rapid.Uint64().Draw(t, "seq"),
			Last:   rapid.Bool().Draw(t, "last"),
			Body:   rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "body"),
		}
		data := letterBytes(want)
		got, size, err := guestproto.DecodeHead(data)
		if err != nil {
			t.Fatal(err)
		}
		got.Body = data[guestproto.LetterHead:][:size]
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestLetterRefused(t *testing.T) {
	t.Parallel()
	good := letterBytes(guestproto.Letter{Kind: guestproto.LetterGo})
	for name, change := range map[string]func(b []byte) []byte{
		"short":          func(b []byte) []byte { return b[:guestproto.LetterHead-1] },
		"magic":          func(b []byte) []byte { b[0] ^= 1; return b },
		"version":        func(b []byte) []byte { b[8] = 2; return b },
		"size":           func(b []byte) []byte { b[26] = 0x10; return b }, // 1 MiB
		"flags":          func(b []byte) []byte { b[28] = 2; return b },
		"what is unused": func(b []byte) []byte { b[63] = 1; return b },
	} {
		if l, _, err := guestproto.DecodeHead(change(bytes.Clone(good))); !errors.Is(err, guestproto.ErrProtocol) {
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}

// TestLetterVectors checks the vectors that other implementations use, too.
func TestLetterVectors(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/mailbox.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors struct {
		Letters []struct {
			Name   string `json:"name"`
			Kind   uint16 `json:"kind"`
			Stream uint32 `json:"stream"`
			Seq    uint64 `json:"seq"`
			Last   bool   `json:"last"`
			Body   string `json:"body"`
			Bytes  string `json:"bytes"`
		} `json:"letters"`
	}
	if err = json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors.Letters) == 0 {
		t.Fatal("no vectors")
	}
	for _, v := range vectors.Letters {
		body, err := hex.DecodeString(v.Body)
		if err != nil {
			t.Fatal(err)
		}
		got := letterBytes(guestproto.Letter{Kind: guestproto.LetterKind(v.Kind), Stream: v.Stream, Seq: v.Seq, Last: v.Last, Body: body})
		if hex.EncodeToString(got) != v.Bytes {
			t.Errorf("%s: %x", v.Name, got)
		}
	}
}

// TestJobVector: the body of the vector that is a job is what Encode makes.
func TestJobVector(t *testing.T) {
	t.Parallel()
	job := guestproto.Job{
		Argv: []string{"sh", "-c", "date"}, Env: []string{"A=1"}, Dir: "/tmp", Stdin: true,
		Files: []guestproto.JobFile{{Path: "/in", Mode: 0o644, Size: 5}}, Collect: []string{"/out"},
		Entropy: []byte{1, 2, 3, 4}, Clock: 1735689600000000000, Time: 1e9, Output: 1 << 20, CollectSize: 1 << 20,
	}
	data, err := os.ReadFile("testdata/mailbox.json")
	if err != nil {
		t.Fatal(err)
	}
	if body := hex.EncodeToString(guestproto.Encode(&job)); !bytes.Contains(data, []byte(`"`+body+`"`)) {
		t.Errorf("not among the vectors: %s", body)
	}
}

func FuzzMailbox(f *testing.F) {
	f.Add(letterBytes(guestproto.Letter{Kind: guestproto.LetterReady, Body: guestproto.Encode(&guestproto.Welcome{Agent: "1"})}))
	f.Add(letterBytes(guestproto.Letter{Kind: guestproto.LetterDone, Body: guestproto.Encode(&guestproto.JobDone{Files: []guestproto.JobCollected{{Size: 1}}})}))
	f.Add(letterBytes(guestproto.Letter{Kind: guestproto.LetterJob, Body: guestproto.Encode(&guestproto.Job{Argv: []string{"x"}})}))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, size, err := guestproto.DecodeHead(data)
		if err != nil {
			return
		}
		if size > guestproto.MaxLetter {
			t.Fatalf("a body of %d bytes", size)
		}
		again := letterBytes(guestproto.Letter{Kind: l.Kind, Stream: l.Stream, Seq: l.Seq, Last: l.Last, Body: make([]byte, size)})
		if !bytes.Equal(again[:guestproto.LetterHead], data[:guestproto.LetterHead]) {
			t.Fatalf("%x was read as %+v", data[:guestproto.LetterHead], l)
		}
		body := data[guestproto.LetterHead:]
		for _, m := range []guestproto.Message{&guestproto.Welcome{}, &guestproto.Job{}, &guestproto.JobDone{}, &guestproto.Reset{}} {
			_ = guestproto.Decode(body, m) // it returns
		}
	})
}
