package relink

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"testing"
)

// vector is what an end says, for other implementations.
type vector struct {
	Name string `json:"name"`
	Wire string `json:"wire"`
}

func vectors() map[string][]byte {
	id := [IDSize]byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	return map[string][]byte{
		"hello of a new stream":                          hello{want: wantNew, id: id}.encode(),
		"hello that resumes, 70000 received, 65536 read": hello{want: wantResume, id: id, place: place{70000, 65536}}.encode(),
		"answer yes to a new stream":                     answer{said: saidYes}.encode(),
		"answer yes, 5 received, 3 read":                 answer{said: saidYes, place: place{5, 3}}.encode(),
		"answer unknown":                                 answer{said: saidUnknown}.encode(),
		"answer to another version":                      answer{said: saidVersion}.encode(),
		"data tine":                                      appendData(nil, []byte("tine")),
		"ack 65536":                                      appendAck(nil, 65536),
		"bye":                                            appendBye(nil),
	}
}

func TestVectors(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var list []vector
	if err = json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	ours := vectors()
	for _, v := range list {
		if got := hex.EncodeToString(ours[v.Name]); got != v.Wire {
			t.Errorf("%s: %s, want %s", v.Name, got, v.Wire)
		}
	}
	if len(list) != len(ours) {
		t.Errorf("%d vectors, want %d", len(list), len(ours))
	}
}

func TestGreetingsComeBack(t *testing.T) {
	t.Parallel()
	want := hello{want: wantResume, id: [IDSize]byte{1, 15: 2}, place: place{1 << 60, 7}}
	if got, err := parseHello(want.encode()); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := parseAnswer(answer{said: saidYes, place: want.place}.encode()); err != nil || got != want.place {
		t.Errorf("%+v, %v", got, err)
	}
}

// decode puts together what a decoder finds.
func decode(d *decoder, wire []byte) (again []byte, err error) {
	for len(wire) > 0 {
		f, n, err := d.next(wire)
		if n < 1 || n > len(wire) {
			return nil, errors.New("it has not moved on")
		}
		if err != nil {
			return again, err
		}
		wire = wire[n:]
		switch f.kind {
		case kindData:
			again = append(append(again, 'd'), f.data...)
		case kindAck:
			again = appendAck(again, f.read)
		case kindBye:
			again = appendBye(again)
		}
	}
	return again, nil
}

// However a connection is cut into reads, the frames are the same.
func FuzzDecoder(f *testing.F) {
	for _, wire := range vectors() {
		f.Add(wire, uint8(3))
	}
	f.Add(append(appendAck(appendData(nil, []byte("some data")), 12), 3), uint8(2))
	f.Fuzz(func(t *testing.T, wire []byte, step uint8) {
		var whole, pieces decoder
		want, werr := decode(&whole, wire)
		var got []byte
		var err error
		for rest := range slices.Chunk(wire, max(int(step), 1)) {
			if err == nil {
				var more []byte
				more, err = decode(&pieces, rest)
				got = append(got, more...)
			}
		}
		if strip(got) != strip(want) || (err == nil) != (werr == nil) {
			t.Errorf("%x (%v), want %x (%v)", got, err, want, werr)
		}
		if werr == nil && whole.left > MaxData || whole.have > maxHead {
			t.Errorf("%+v", whole)
		}
		checkGreetings(t, wire)
	})
}

// strip leaves out where data was cut.
func strip(b []byte) string { return string(bytes.ReplaceAll(b, []byte{'d'}, nil)) }

func checkGreetings(t *testing.T, wire []byte) {
	if len(wire) >= helloSize {
		if h, err := parseHello(wire[:helloSize]); err == nil && !bytes.Equal(h.encode(), wire[:helloSize]) {
			t.Errorf("hello %x became %x", wire[:helloSize], h.encode())
		}
	}
	if len(wire) >= answerSize {
		p, err := parseAnswer(wire[:answerSize])
		if again := (answer{said: saidYes, place: p}).encode(); err == nil && !bytes.Equal(again, wire[:answerSize]) {
			t.Errorf("answer %x became %x", wire[:answerSize], again)
		}
	}
}
