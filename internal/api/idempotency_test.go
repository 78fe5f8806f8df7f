package api_test

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/api/apitest"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/wire"
)

func parseTime(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func keyed(key string) http.Header { return http.Header{"Idempotency-Key": {key}} }

func TestIdempotency(t *testing.T) {
	t.Parallel()
	url, b := server(t)
	for _, tt := range []struct{ name, path, body, other string }{
		{"sandboxes", "/v1/sandboxes", `{"snapshot_tag":"py"}`, `{"snapshot_tag":"py","n":2}`},
		{"branch", "/v1/sandboxes/sb-1/branch", ``, `{"mode":"diff"}`},
		{"snapshots", "/v1/snapshots", `{"tag":"a","image":"py"}`, `{"tag":"b","image":"py"}`},
		{"workspaces", "/v1/workspaces", `{"name":"a","snapshot_tag":"py"}`, `{"name":"b","snapshot_tag":"py"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			key := keyed("key-" + tt.name)
			key.Set("Accept", "application/x-ndjson")
			first := sendWith(t, "POST", url+tt.path, key, tt.body)
			again := sendWith(t, "POST", url+tt.path, key, tt.body)
			if first.status != http.StatusCreated || first.header.Get("Idempotent-Replayed") != "" {
				t.Fatalf("first: %d %s", first.status, first.body)
			}
			if diff := cmp.Diff(first.body, again.body); diff != "" || again.status != first.status || again.header.Get("Idempotent-Replayed") != "true" {
				t.Errorf("again: %d (-first +again):\n%s", again.status, diff)
			}
			if first.header.Get("X-Request-Id") == again.header.Get("X-Request-Id") {
				t.Error("two requests have one id")
			}
			other := sendWith(t, "POST", url+tt.path, key, tt.other)
			if got := decode[wire.Error](t, other.body); other.status != http.StatusUnprocessableEntity || got.Code != "key_reused" {
				t.Errorf("other: %d %s", other.status, other.body)
			}
		})
	}
	t.Cleanup(func() {
		if n := len(b.List()); n != 3 { // the server's, one forked here, and the workspace's
			t.Errorf("%d sandboxes", n)
		}
	})
}

func TestIdempotencyKeys(t *testing.T) {
	t.Parallel()
	url, _ := server(t)
	for _, key := range []string{strings.Repeat("k", 256), "a b", "ä"} {
		if a := sendWith(t, "POST", url+"/v1/sandboxes", keyed(key), `{"snapshot_tag":"py"}`); a.status != http.StatusBadRequest {
			t.Errorf("key %q: %d %s", key, a.status, a.body)
		}
	}
	for range 2 { // a key means nothing elsewhere
		if a := sendWith(t, "POST", url+"/v1/sandboxes/sb-1/ping", keyed("k"), ""); a.status != http.StatusOK || a.header.Get("Idempotent-Replayed") != "" {
			t.Errorf("ping: %d %s", a.status, a.body)
		}
	}
}

// TestIdempotentFailure sees that what has failed can be tried again.
func TestIdempotentFailure(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	var calls atomic.Int32
	b.Fail = func(op string) error {
		if op == "fork" && calls.Add(1) == 1 {
			return errdef.ErrExhausted
		}
		if op == "fork" && calls.Load() == 2 {
			panic("boom")
		}
		return nil
	}
	url := b.Serve(spec).URL
	for i, want := range []int{http.StatusTooManyRequests, http.StatusInternalServerError, http.StatusCreated, http.StatusCreated} {
		if a := sendWith(t, "POST", url+"/v1/sandboxes", keyed("k"), `{"snapshot_tag":"py"}`); a.status != want {
			t.Errorf("try %d: %d %s", i, a.status, a.body)
		}
	}
	if n := len(b.List()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
}

// TestIdempotentAtOnce has the same request come from many clients while the
// first is under way.
func TestIdempotentAtOnce(t *testing.T) {
	t.Parallel()
	b := apitest.New(t)
	under := make(chan struct{})
	b.Fail = func(op string) error {
		if op == "fork" {
			<-under
		}
		return nil
	}
	url := b.Serve(spec).URL
	answers := make([]answer, 8)
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() { answers[i] = sendWith(t, "POST", url+"/v1/sandboxes", keyed("k"), `{"snapshot_tag":"py"}`) })
	}
	time.Sleep(50 * time.Millisecond)
	close(under)
	wg.Wait()
	for _, a := range answers {
		if a.status != http.StatusCreated || a.body != answers[0].body {
			t.Errorf("%d %s", a.status, a.body)
		}
	}
	if n := len(b.List()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
}
