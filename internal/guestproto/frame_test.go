package guestproto_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/guestproto"
)

// readAll returns the good frames of a byte stream and the number of bad ones.
func readAll(t interface{ Fatalf(string, ...any) }, r io.Reader) (good []guestproto.Frame, bad int) {
	frames := guestproto.NewReader(r)
	for {
		f, err := frames.Next()
		switch {
		case err == nil:
			f.Payload = bytes.Clone(f.Payload)
			good = append(good, f)
		case errors.Is(err, guestproto.ErrBadFrame):
			bad++
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return good, bad
		default:
			t.Fatalf("next: %v", err)
		}
	}
}

func anyFrame() *rapid.Generator[guestproto.Frame] {
	return rapid.Custom(func(t *rapid.T) guestproto.Frame {
		return guestproto.Frame{
			Type:    guestproto.FrameType(rapid.IntRange(1, 255).Draw(t, "type")),
			Stream:  rapid.Uint32().Draw(t, "stream"),
			Payload: rapid.OneOf(rapid.SliceOfN(rapid.Byte(), 0, 600), rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 255}), 0, 600)).Draw(t, "payload"),
		}
	})
}

func TestFrameRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		want := rapid.SliceOfN(anyFrame(), 1, 5).Draw(t, "frames")
		var wire []byte
		for _, f := range want {
			cut := rapid.IntRange(0, len(f.Payload)).Draw(t, "cut")
			wire = guestproto.AppendFrame(wire, f.Type, f.Stream, f.Payload[:cut], f.Payload[cut:])
		}
		got, bad := readAll(t, iotest.OneByteReader(bytes.NewReader(wire)))
		if diff := cmp.Diff(want, got); diff != "" || bad != 0 {
			t.Fatalf("%d bad frames, frames differ:\n%s", bad, diff)
		}
	})
}

func TestLargestFrame(t *testing.T) {
	t.Parallel()
	for name, fill := range map[string]byte{"zeros": 0, "ones": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			payload := bytes.Repeat([]byte{fill}, guestproto.MaxPayload)
			wire := guestproto.AppendFrame(nil, guestproto.TypeData, 1<<32-1, payload)
			if bytes.IndexByte(wire, 0) != len(wire)-1 {
				t.Error("a zero byte before the end")
			}
			got, bad := readAll(t, bytes.NewReader(append(wire, wire...)))
			if bad != 0 || len(got) != 2 || !bytes.Equal(got[1].Payload, payload) {
				t.Errorf("%d frames, %d bad", len(got), bad)
			}
			one := guestproto.AppendFrame(nil, guestproto.TypeData, 1, bytes.Repeat([]byte{fill}, guestproto.MaxData+1))
			if len(one) > 32<<10 {
				t.Errorf("a Data frame takes %d bytes, more than one write of the virtio console", len(one))
			}
		})
	}
}

func TestResynchronise(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		garbage := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "garbage")
		whole := guestproto.AppendFrame(nil, guestproto.TypeData, 7, rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "old"))
		cut := whole[:rapid.IntRange(0, len(whole)).Draw(t, "cut")]
		hello := guestproto.Encode(&guestproto.Hello{Version: 1, Nonce: make([]byte, guestproto.NonceSize)})
		wire := append(append(bytes.Clone(garbage), cut...), 0, 0)
		wire = guestproto.AppendFrame(wire, guestproto.TypeHello, 0, hello)
		got, _ := readAll(t, bytes.NewReader(wire))
		if len(got) == 0 {
			t.Fatalf("the preamble was not found")
		}
		last := got[len(got)-1]
		if last.Type != guestproto.TypeHello || !bytes.Equal(last.Payload, hello) {
			t.Fatalf("last frame is %+v", last)
		}
	})
}

func TestCutFrameIsBad(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		f := anyFrame().Draw(t, "frame")
		whole := guestproto.AppendFrame(nil, f.Type, f.Stream, f.Payload)
		cut := rapid.IntRange(1, len(whole)-2).Draw(t, "cut")
		good, bad := readAll(t, bytes.NewReader(append(bytes.Clone(whole[:cut]), 0)))
		if len(good) != 0 || bad != 1 {
			t.Fatalf("%d of %d bytes: %d good and %d bad frames", cut, len(whole), len(good), bad)
		}
	})
}

func TestOversizedFrameIsSkipped(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"little": guestproto.MaxPayload + 500, "much": 1 << 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			wire := append(bytes.Repeat([]byte{9}, size), 0)
			wire = guestproto.AppendFrame(wire, guestproto.TypeEnd, 3, []byte("after"))
			good, bad := readAll(t, bytes.NewReader(wire))
			if bad != 1 || len(good) != 1 || string(good[0].Payload) != "after" {
				t.Errorf("%d bad, good: %+v", bad, good)
			}
		})
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte{0, 0, 1, 2, 3})
	f.Add(guestproto.AppendFrame(nil, guestproto.TypeData, 1, []byte("hello\x00world")))
	f.Add(append(bytes.Repeat([]byte{255}, 40000), 0))
	f.Fuzz(func(t *testing.T, wire []byte) {
		good, _ := readAll(t, bytes.NewReader(wire))
		for _, fr := range good {
			if len(fr.Payload) > guestproto.MaxPayload {
				t.Fatalf("payload of %d bytes", len(fr.Payload))
			}
			again, bad := readAll(t, bytes.NewReader(guestproto.AppendFrame(nil, fr.Type, fr.Stream, fr.Payload)))
			if bad != 0 || cmp.Diff([]guestproto.Frame{fr}, again) != "" {
				t.Fatalf("frame %+v does not survive a round trip", fr)
			}
		}
	})
}

// vector is one line of testdata/vectors.json, for implementations in any
// language: the payload as hex, and the frame as it is on the wire.
type vector struct {
	Name    string `json:"name"`
	Type    uint8  `json:"type"`
	Stream  uint32 `json:"stream"`
	Payload string `json:"payload"`
	Wire    string `json:"wire"`
}

func TestVectors(t *testing.T) {
	t.Parallel()
	nonce := []byte("0123456789abcdef")
	frame := func(name string, ft guestproto.FrameType, stream uint32, payload []byte) vector {
		return vector{
			Name: name, Type: uint8(ft), Stream: stream, Payload: hex.EncodeToString(payload),
			Wire: hex.EncodeToString(guestproto.AppendFrame(nil, ft, stream, payload)),
		}
	}
	message := func(name string, ft guestproto.FrameType, stream uint32, head []byte, m guestproto.Message) vector {
		return frame(name, ft, stream, guestproto.Append(head, m))
	}
	got := []vector{
		message("hello", guestproto.TypeHello, 0, nil, &guestproto.Hello{Version: 1, Nonce: nonce}),
		message("hello-ack", guestproto.TypeHelloAck, 0, nil, &guestproto.HelloAck{Version: 1, Nonce: nonce, Agent: "0.1.0"}),
		message("open-ping", guestproto.TypeOpen, 1, []byte{byte(guestproto.VerbPing), guestproto.FlagEnd}, &guestproto.Empty{}),
		message("pong", guestproto.TypeEnd, 1, []byte{0}, &guestproto.Pong{Agent: "0.1.0", PID: 1, Uptime: 5, Generation: "g"}),
		message("open-exec", guestproto.TypeOpen, 300, []byte{byte(guestproto.VerbExec), 0},
			&guestproto.ExecRequest{Argv: []string{"sh", "-c", "exit 3"}, Env: []string{"A=1"}, Dir: "/", Timeout: 1e9}),
		message("exit", guestproto.TypeEnd, 300, []byte{0}, &guestproto.Exit{Code: -1, Signal: 9, TimedOut: true, Duration: 1000}),
		message("open-identity", guestproto.TypeOpen, 1, []byte{byte(guestproto.VerbIdentity), guestproto.FlagEnd}, &guestproto.Identity{
			Entropy: nonce, Clock: 5, Hostname: "h", MachineID: "m", BootID: "b", Generation: "g", Deadline: 7,
			Secrets: []guestproto.Secret{{Name: "TOKEN", Value: []byte("x\x00y")}}, KeepSecrets: true,
		}),
		message("identity-done", guestproto.TypeEnd, 1, []byte{0}, &guestproto.IdentityDone{Generation: "g", Secrets: 1, Signaled: 2}),
		message("open-changes", guestproto.TypeOpen, 3, []byte{byte(guestproto.VerbChanges), guestproto.FlagEnd}, &guestproto.ChangesRequest{}),
		message("changes", guestproto.TypeData, 3, []byte{0}, &guestproto.Changes{Changes: []guestproto.Change{
			{Path: "/a", Kind: guestproto.ChangeFile, Mode: 0o644, UID: 1, GID: 2, Size: 3, MTime: 4, Hash: bytes.Repeat([]byte{9}, 32)},
			{Path: "/b", Kind: guestproto.ChangeDeleted},
			{Path: "/c", Kind: guestproto.ChangeDirectory, Mode: 0o755, Opaque: true},
			{Path: "/d", Kind: guestproto.ChangeSymlink, Target: "/a"},
		}}),
		message("changes-done", guestproto.TypeEnd, 3, []byte{0}, &guestproto.ChangesDone{Truncated: true}),
		message("open-dial", guestproto.TypeOpen, 4, []byte{byte(guestproto.VerbDial), 0}, &guestproto.DialRequest{Port: 8080}),
		message("dialed", guestproto.TypeData, 4, []byte{0}, &guestproto.Empty{}),
		frame("dial-half-close", guestproto.TypeData, 4, []byte{2}),
		message("dial-over", guestproto.TypeEnd, 4, []byte{0}, &guestproto.Empty{}),
		message("reset", guestproto.TypeReset, 2, nil, &guestproto.Reset{Code: "not_found", Message: "no such file"}),
		frame("credit", guestproto.TypeCredit, 2, []byte{0x80, 0x80, 0x04}),
		frame("end", guestproto.TypeEnd, 2, nil),
		frame("data-zeros", guestproto.TypeData, 2, []byte{2, 0, 0, 0}),
		frame("data-254", guestproto.TypeData, 2, bytes.Repeat([]byte{2}, 254)),
		frame("data-600", guestproto.TypeData, 2, bytes.Repeat([]byte{2}, 600)),
	}
	const file = "testdata/vectors.json"
	if os.Getenv("UPDATE_VECTORS") != "" {
		text, err := json.MarshalIndent(got, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err = os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var want []vector
	if err = json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("vectors differ; if the format is meant to change, set UPDATE_VECTORS=1:\n%s", diff)
	}
}
