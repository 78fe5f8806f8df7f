package guestproto_test

import (
	"errors"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/guestproto"
)

// all returns one zero value of every message.
func all() []guestproto.Message {
	return []guestproto.Message{
		&guestproto.Empty{}, &guestproto.Hello{}, &guestproto.HelloAck{}, &guestproto.Reset{}, &guestproto.Pong{},
		&guestproto.Identity{}, &guestproto.IdentityDone{}, &guestproto.ExecRequest{}, &guestproto.Started{},
		&guestproto.Exit{}, &guestproto.ProcessRequest{}, &guestproto.ProcessInfo{}, &guestproto.SignalRequest{},
		&guestproto.ResizeRequest{}, &guestproto.EvalRequest{}, &guestproto.EvalDone{}, &guestproto.WarmRequest{},
		&guestproto.WarmDone{}, &guestproto.Entry{}, &guestproto.Entries{}, &guestproto.ListDone{},
		&guestproto.Processes{}, &guestproto.PathRequest{}, &guestproto.ReadRequest{}, &guestproto.WriteRequest{},
		&guestproto.ListRequest{}, &guestproto.MkdirRequest{}, &guestproto.MoveRequest{}, &guestproto.RemoveRequest{},
		&guestproto.WatchRequest{}, &guestproto.Event{}, &guestproto.Events{},
		&guestproto.Secret{}, &guestproto.ChangesRequest{}, &guestproto.Change{}, &guestproto.Changes{}, &guestproto.ChangesDone{},
		&guestproto.Welcome{}, &guestproto.Job{}, &guestproto.JobFile{}, &guestproto.JobDone{}, &guestproto.JobCollected{},
		&guestproto.DialRequest{},
	}
}

func fresh(m guestproto.Message) guestproto.Message {
	return reflect.New(reflect.TypeOf(m).Elem()).Interface().(guestproto.Message)
}

// fill gives every field of v an arbitrary value, by reflection, so that a
// field which a message forgets to encode is found.
func fill(t *rapid.T, v reflect.Value) {
	switch v.Kind() {
	case reflect.Struct:
		for _, field := range v.Fields() {
			fill(t, field)
		}
	case reflect.String:
		v.SetString(rapid.String().Draw(t, "string"))
	case reflect.Bool:
		v.SetBool(rapid.Bool().Draw(t, "bool"))
	case reflect.Int, reflect.Int64:
		v.SetInt(rapid.Int64().Draw(t, "int"))
	case reflect.Uint8:
		v.SetUint(uint64(rapid.Uint8().Draw(t, "uint8")))
	case reflect.Uint32:
		v.SetUint(uint64(rapid.Uint32().Draw(t, "uint32")))
	case reflect.Slice:
		n := rapid.IntRange(0, 4).Draw(t, "length")
		s := reflect.MakeSlice(v.Type(), n, n)
		for i := range n {
			fill(t, s.Index(i))
		}
		v.Set(s)
	default:
		t.Fatalf("no generator for %s", v.Type())
	}
}

func TestMessageRoundTrip(t *testing.T) {
	t.Parallel()
	for _, m := range all() {
		t.Run(reflect.TypeOf(m).Elem().Name(), func(t *testing.T) {
			t.Parallel()
			rapid.Check(t, func(t *rapid.T) {
				want, got := fresh(m), fresh(m)
				fill(t, reflect.ValueOf(want).Elem())
				body := guestproto.Encode(want)
				if err := guestproto.Decode(body, got); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
					t.Fatal(diff)
				}
				if err := guestproto.Decode(append(body, "from a later version"...), fresh(m)); err != nil {
					t.Fatalf("fields of a later version: %v", err)
				}
			})
		})
	}
}

func TestOlderMessage(t *testing.T) {
	t.Parallel()
	// An older agent knew only Version and Nonce.
	var ack guestproto.HelloAck
	body := guestproto.Encode(&guestproto.Hello{Version: 1, Nonce: []byte("n")})
	if err := guestproto.Decode(body, &ack); err != nil || ack.Agent != "" || ack.Version != 1 {
		t.Errorf("got %+v, %v", ack, err)
	}
}

func TestMalformedMessage(t *testing.T) {
	t.Parallel()
	for name, body := range map[string][]byte{
		"endless-number": {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"long-string":    {2, 200, 'x'},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if err := guestproto.Decode(body, &guestproto.HelloAck{}); !errors.Is(err, guestproto.ErrProtocol) {
				t.Errorf("error is %v", err)
			}
		})
	}
	if err := guestproto.Decode([]byte{200, 1, 'x'}, &guestproto.ExecRequest{}); !errors.Is(err, guestproto.ErrProtocol) {
		t.Errorf("long list: error is %v", err)
	}
}

func FuzzMessages(f *testing.F) {
	for i, m := range all() {
		f.Add(uint8(i), guestproto.Encode(m))
	}
	f.Add(uint8(7), guestproto.Encode(&guestproto.ExecRequest{Argv: []string{"a", "b"}, Env: []string{"A=1"}, Rows: 9}))
	f.Add(uint8(19), guestproto.Encode(&guestproto.Entries{Entries: []guestproto.Entry{{Name: "x", Size: 5}, {Name: "y"}}}))
	f.Add(uint8(5), guestproto.Encode(&guestproto.Identity{Secrets: []guestproto.Secret{{Name: "x", Value: []byte("y")}, {}}, KeepSecrets: true}))
	f.Add(uint8(len(all())-1), guestproto.Encode(&guestproto.DialRequest{Port: guestproto.MaxPort}))
	f.Add(uint8(35), guestproto.Encode(&guestproto.Changes{Changes: []guestproto.Change{{Path: "/a", Hash: make([]byte, 32)}, {Path: "/b", Opaque: true}}}))
	f.Fuzz(func(t *testing.T, which uint8, body []byte) {
		kinds := all()
		m := kinds[int(which)%len(kinds)]
		if guestproto.Decode(body, m) != nil {
			return
		}
		again := fresh(m)
		if err := guestproto.Decode(guestproto.Encode(m), again); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(m, again, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
	})
}
