package api

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/metrics"
	"github.com/tinevm/tine/internal/sandbox"
)

func FuzzEventID(f *testing.F) {
	for _, seed := range []string{"abc-1", "abc-0", "-1", "abc-", "a-b-1", "abc-18446744073709551615", "a b-1", "", "abc-+1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, id string) {
		epoch, seq, err := parseEventID(id)
		if err != nil {
			return
		}
		again, number, err := parseEventID(eventID(epoch, seq))
		if err != nil || again != epoch || number != seq {
			t.Errorf("%q is %q and %d, and then %q and %d: %v", id, epoch, seq, again, number, err)
		}
	})
}

func FuzzRequestID(f *testing.F) {
	for _, seed := range []string{"a", "A-._9", "", "a b", "a\nb", strings.Repeat("x", 65), "ä"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if goodRequestID(id) && (len(id) > maxRequestID || strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' })) {
			t.Errorf("%q is no good id", id)
		}
	})
}

// TestKeysAreBounded sees that what is remembered stays small, and is the
// latest.
func TestKeysAreBounded(t *testing.T) {
	t.Parallel()
	const most, size = 10, 100
	for name, tt := range map[string]struct{ keys, bytes, left int }{
		"keys":  {most, 1 << 20, most},
		"bytes": {1000, 5 * size, 6}, // the last may go over
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKeys(tt.keys, tt.bytes)
			calls := 0
			next := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				calls++
				_, _ = fmt.Fprintf(w, "%0*d", size, calls) // a recorder takes all
			})
			ask := func(i int) string {
				key := digest(sha256.Sum256(fmt.Append(nil, i)))
				w := httptest.NewRecorder()
				if err := k.serve(next, w, httptest.NewRequestWithContext(t.Context(), "POST", "/", nil), key, key); err != nil {
					t.Fatal(err)
				}
				return w.Body.String()
			}
			last := ""
			for i := range 50 {
				last = ask(i)
			}
			if n := len(k.byKey); n > tt.left || n != k.order.Len() || k.bytes != n*size {
				t.Errorf("%d keys, %d in order, %d bytes", n, k.order.Len(), k.bytes)
			}
			if ask(49) != last {
				t.Error("the last answer was forgotten")
			}
			if ask(0); calls != 51 {
				t.Errorf("%d calls: the first answer was not forgotten", calls)
			}
		})
	}
}

func TestKeysGrowOld(t *testing.T) {
	t.Parallel()
	k := newKeys(10, 1<<20)
	key := digest{1}
	entry, first := k.claim(key, key)
	if !first {
		t.Fatal("an empty memory knows a key")
	}
	k.settle(entry, &keptAnswer{status: http.StatusCreated, over: true})
	if _, first = k.claim(key, key); first {
		t.Error("a new key was forgotten")
	}
	entry.at = time.Now().Add(-keyAge)
	if _, first = k.claim(key, key); !first {
		t.Error("an old key was remembered")
	}
}

// stalled is a client that takes nothing until it is let.
type stalled struct {
	*httptest.ResponseRecorder
	began chan struct{}
	gate  chan struct{}
	once  sync.Once
}

// Write waits from the second time on: the first is the greeting.
func (s *stalled) Write(b []byte) (int, error) {
	if s.Body.Len() > 0 {
		s.once.Do(func() { close(s.began) })
		<-s.gate
	}
	return s.ResponseRecorder.Write(b)
}

// TestSlowFollower sees that one who does not keep up is cut off, and holds up
// nobody.
func TestSlowFollower(t *testing.T) {
	t.Parallel()
	events := sandbox.NewEvents(4, nil)
	s := &server{Config: Config{Events: events, Metrics: metrics.New("")}, followers: make(chan struct{}, 1)}
	w := &stalled{ResponseRecorder: httptest.NewRecorder(), began: make(chan struct{}), gate: make(chan struct{})}
	over := make(chan error, 1)
	events.Add(sandbox.Resumed, "sb-1", sandbox.EventData{})
	watch := &seen{s: s, ctx: t.Context()}
	go func() {
		over <- following{ctx: t.Context(), s: s, lines: true, seen: watch}.VisitFollowEventsResponse(w)
	}()
	<-w.began
	for range 100 {
		events.Add(sandbox.Resumed, "sb-1", sandbox.EventData{})
	}
	close(w.gate)
	if err := <-over; err != nil {
		t.Error(err)
	}
	if n := strings.Count(w.Body.String(), `"seq":`); n != 1 {
		t.Errorf("%d events: %s", n, w.Body.String())
	}
	if len(s.followers) != 0 {
		t.Error("its place was not given back")
	}
}
