package guestproto_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/guestproto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// wire hands frames to the other side at once, and counts them.
type wire struct {
	mu   sync.Mutex
	peer *guestproto.Session
	sent []guestproto.Frame
}

func (w *wire) WriteFrame(_ context.Context, t guestproto.FrameType, stream uint32, parts ...[]byte) error {
	f := guestproto.Frame{Type: t, Stream: stream, Payload: bytes.Join(parts, nil)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent = append(w.sent, f)
	if w.peer == nil {
		return nil
	}
	return w.peer.Deliver(f)
}

// pair returns a host and an agent that are joined.
func pair(accept func(*guestproto.Stream, []byte)) (host, agent *guestproto.Session) {
	toAgent, toHost := &wire{}, &wire{}
	host = guestproto.NewHost(toAgent)
	agent = guestproto.NewAgent(toHost, accept)
	toAgent.peer, toHost.peer = agent, host
	return host, agent
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestExchange(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	for name, size := range map[string]int{"short": 10, "long": 100_000, "longest": guestproto.MaxRequest - 16} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var work sync.WaitGroup
			host, _ := pair(func(st *guestproto.Stream, first []byte) {
				first = bytes.Clone(first)
				work.Go(func() {
					body, err := st.Request(ctx, first)
					if err != nil {
						t.Error(err)
					}
					_ = st.End(ctx, &guestproto.Started{PID: len(body)})
				})
			})
			req := &guestproto.EvalRequest{Line: make([]byte, size)}
			st, err := host.Open(ctx, guestproto.VerbEval, req, true)
			if err != nil {
				t.Fatal(err)
			}
			c, err := st.Recv(ctx)
			if err != nil || !c.Final {
				t.Fatalf("chunk %+v, %v", c, err)
			}
			var m guestproto.Started
			if err = guestproto.Decode(c.Data, &m); err != nil || m.PID != len(guestproto.Encode(req)) {
				t.Errorf("agent saw %d bytes, %v", m.PID, err)
			}
			if _, err = st.Recv(ctx); !errors.Is(err, io.EOF) {
				t.Errorf("after the end: %v", err)
			}
			work.Wait()
		})
	}
}

func TestFlowControl(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	want := make([]byte, 3*guestproto.Window)
	_, _ = rand.NewChaCha8([32]byte{}).Read(want)
	var sent sync.WaitGroup
	host, _ := pair(func(st *guestproto.Stream, _ []byte) {
		sent.Go(func() {
			if _, err := st.Send(ctx, guestproto.ChanStdout, want); err != nil {
				t.Error(err)
			}
			_ = st.End(ctx, nil)
		})
	})
	st, err := host.Open(ctx, guestproto.VerbRead, &guestproto.Empty{}, true)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		c, err := st.Recv(ctx)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, c.Data...)
	}
	sent.Wait()
	if !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, want %d", len(got), len(want))
	}
}

func TestSenderBlocksWithoutCredit(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"large-frames": guestproto.MaxData, "empty-frames": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out := &wire{}
			host := guestproto.NewHost(out)
			st, err := host.Open(within(t), guestproto.VerbWrite, &guestproto.Empty{}, false)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			total := 0
			for total < 2*guestproto.Window {
				n, err := st.Send(ctx, guestproto.ChanStdin, make([]byte, size))
				if err != nil {
					total += n
					break
				}
				total += n + guestproto.FrameCost
			}
			if total > guestproto.Window || total < guestproto.Window/2 {
				t.Errorf("%d bytes went out on a window of %d", total, guestproto.Window)
			}
		})
	}
}

// busy is a link that takes no data until it is told to.
type busy struct {
	wire
	free bool
}

func (b *busy) WriteFrame(ctx context.Context, t guestproto.FrameType, stream uint32, parts ...[]byte) error {
	if t == guestproto.TypeData && !b.free {
		return context.DeadlineExceeded
	}
	return b.wire.WriteFrame(ctx, t, stream, parts...)
}

// TestCreditOfWhatWasNotSent: data that the link did not take costs nothing.
func TestCreditOfWhatWasNotSent(t *testing.T) {
	t.Parallel()
	var link busy
	st, err := guestproto.NewHost(&link).Open(within(t), guestproto.VerbDial, &guestproto.DialRequest{Port: 1}, false)
	if err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, guestproto.MaxData)
	for range 100 { // many times the window
		if n, serr := st.Send(within(t), guestproto.ChanStdin, piece); n != 0 || !errors.Is(serr, context.DeadlineExceeded) {
			t.Fatalf("%d sent, %v", n, serr)
		}
	}
	link.free = true
	if _, err = st.Send(within(t), guestproto.ChanStdin, piece); err != nil {
		t.Error(err)
	}
}

func TestPeerThatBreaksTheProtocol(t *testing.T) {
	t.Parallel()
	data := func(n int) []byte { return make([]byte, n+1) }
	for name, frames := range map[string][]guestproto.Frame{
		"more-than-window":   {{Type: 4, Stream: 1, Payload: data(guestproto.Window)}},
		"never-opened":       {{Type: 4, Stream: 9, Payload: data(1)}},
		"open-from-agent":    {{Type: 3, Stream: 2, Payload: []byte{1, 0}}},
		"no-channel":         {{Type: 4, Stream: 1}},
		"credit-too-much":    {{Type: 6, Stream: 1, Payload: []byte{1}}},
		"credit-malformed":   {{Type: 6, Stream: 1, Payload: []byte{0xff}}},
		"unknown-type":       {{Type: 99, Stream: 1}},
		"reset-malformed":    {{Type: 7, Stream: 1, Payload: []byte{200}}},
		"reset-too-long":     {{Type: 7, Stream: 1, Payload: guestproto.Encode(&guestproto.Reset{Message: strings.Repeat("x", 5000)})}},
		"hello-in-a-session": {{Type: 1, Stream: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			host := guestproto.NewHost(&wire{})
			if _, err := host.Open(within(t), guestproto.VerbPing, &guestproto.Empty{}, false); err != nil {
				t.Fatal(err)
			}
			var err error
			for _, f := range frames {
				err = host.Deliver(f)
			}
			if !errors.Is(err, guestproto.ErrProtocol) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestFramesOfEndedStreamsAreIgnored(t *testing.T) {
	t.Parallel()
	host := guestproto.NewHost(&wire{})
	st, err := host.Open(within(t), guestproto.VerbPing, &guestproto.Empty{}, true)
	if err != nil {
		t.Fatal(err)
	}
	st.Reset(guestproto.CodeCanceled, "no more")
	if err = host.Deliver(guestproto.Frame{Type: guestproto.TypeData, Stream: 1, Payload: []byte{0, 1}}); err != nil {
		t.Error(err)
	}
}

func TestResetReachesTheOtherSide(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	streams := make(chan *guestproto.Stream, 1)
	host, _ := pair(func(st *guestproto.Stream, _ []byte) { streams <- st })
	st, err := host.Open(ctx, guestproto.VerbExec, &guestproto.Empty{}, true)
	if err != nil {
		t.Fatal(err)
	}
	theirs := <-streams
	theirs.Reset("denied", strings.Repeat("m", 2*guestproto.MaxResetMessage))
	_, err = st.Recv(ctx)
	var reset *guestproto.ResetError
	if !errors.As(err, &reset) || reset.Code != "denied" || len(reset.Message) != guestproto.MaxResetMessage {
		t.Errorf("host got %v", err)
	}
	if _, err = st.Send(ctx, guestproto.ChanStdin, []byte("x")); !errors.As(err, &reset) {
		t.Errorf("send after reset: %v", err)
	}
}

func TestStreamLimit(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	host, agent := pair(func(*guestproto.Stream, []byte) {})
	for range guestproto.MaxStreams {
		if _, err := host.Open(ctx, guestproto.VerbExec, &guestproto.Empty{}, true); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := host.Open(ctx, guestproto.VerbExec, &guestproto.Empty{}, true); !errors.Is(err, guestproto.ErrTooManyStreams) {
		t.Errorf("host: %v", err)
	}
	if err := agent.Deliver(guestproto.Frame{Type: guestproto.TypeOpen, Stream: 999, Payload: []byte{1, 0}}); err != nil {
		t.Errorf("agent should refuse the stream only: %v", err)
	}
	host.Fail(guestproto.ErrSessionOver)
	if _, err := host.Open(ctx, guestproto.VerbExec, &guestproto.Empty{}, true); !errors.Is(err, guestproto.ErrSessionOver) {
		t.Errorf("after Fail: %v", err)
	}
}

func TestFailEndsStreams(t *testing.T) {
	t.Parallel()
	ctx := within(t)
	host, _ := pair(func(*guestproto.Stream, []byte) {})
	st, err := host.Open(ctx, guestproto.VerbExec, &guestproto.Empty{}, true)
	if err != nil {
		t.Fatal(err)
	}
	cause := errors.New("the link is cut")
	host.Fail(cause)
	host.Fail(errors.New("too late"))
	if _, err = st.Recv(ctx); !errors.Is(err, cause) {
		t.Errorf("recv: %v", err)
	}
	if !errors.Is(context.Cause(st.Context()), cause) {
		t.Errorf("cause: %v", context.Cause(st.Context()))
	}
}

func FuzzDeliver(f *testing.F) {
	f.Add([]byte{4, 1, 2, 0, 'x', 5, 1, 0, 7, 1, 0}, true)
	f.Add([]byte{3, 1, 2, 3, 0, 6, 1, 1, 5}, false)
	f.Fuzz(func(t *testing.T, script []byte, onHost bool) {
		s := guestproto.NewAgent(&wire{}, func(*guestproto.Stream, []byte) {})
		if onHost {
			s = guestproto.NewHost(&wire{})
			_, _ = s.Open(t.Context(), guestproto.VerbExec, &guestproto.Empty{}, false)
		}
		for len(script) >= 3 {
			n := min(int(script[2]), len(script)-3)
			_ = s.Deliver(guestproto.Frame{Type: guestproto.FrameType(script[0]), Stream: uint32(script[1]), Payload: script[3 : 3+n]})
			script = script[3+n:]
		}
	})
}

func BenchmarkFrame(b *testing.B) {
	payload := make([]byte, guestproto.MaxData)
	_, _ = rand.NewChaCha8([32]byte{}).Read(payload)
	b.SetBytes(int64(len(payload)))
	var buf []byte
	for b.Loop() {
		buf = guestproto.AppendFrame(buf[:0], guestproto.TypeData, 1, payload)
		if _, err := guestproto.NewReader(bytes.NewReader(buf)).Next(); err != nil {
			b.Fatal(err)
		}
	}
}
