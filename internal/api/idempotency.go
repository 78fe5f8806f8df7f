package api

import (
	"bytes"
	linked "container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	idempotencyHeader = "Idempotency-Key"
	// maxKey bounds a key.
	maxKey = 255
	// keyAge is how long a key is remembered, maxKeys how many are, and
	// maxKept how many bytes of answers.
	keyAge  = 24 * time.Hour
	maxKeys = 10_000
	maxKept = 64 << 20
)

// takesKeys are the routes that a key makes idempotent.
func takesKeys(pattern string) bool {
	return slices.Contains([]string{
		"POST /v1/sandboxes", "POST /v1/sandboxes/{id}/branch", "POST /v1/snapshots", "POST /v1/workspaces",
	}, pattern)
}

// once answers a request that has a key of an earlier one as that was answered.
// Its body must have been read. Only what has succeeded is remembered: what
// failed has made nothing, and may be tried again.
func (s *server) once(next http.Handler, pattern string) http.Handler {
	if !takesKeys(pattern) {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key := r.Header.Get(idempotencyHeader)
		if key == "" {
			next.ServeHTTP(w, r)
			return
		}
		if err := checkKey(key); err != nil {
			s.fail(w, r, err)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			s.fail(w, r, fmt.Errorf("%w: read the body: %w", errdef.ErrInvalid, err))
			return
		}
		r = r.Clone(r.Context())
		r.Body = io.NopCloser(bytes.NewReader(body))
		r.Header.Del("Accept") // progress cannot be told twice
		if err = s.keys.serve(next, w, r, keyOf(r, key), digestOf(r, body)); err != nil {
			s.fail(w, r, err)
		}
	})
}

// checkKey refuses what cannot be a key.
func checkKey(key string) error {
	bad := func(r rune) bool { return r <= ' ' || r > '~' }
	if len(key) > maxKey || strings.ContainsFunc(key, bad) {
		return fmt.Errorf("%w: %s must be 1 to %d visible characters", errdef.ErrInvalid, idempotencyHeader, maxKey)
	}
	return nil
}

type digest [sha256.Size]byte

// keyOf is a key of one caller; another's is another key.
func keyOf(r *http.Request, key string) digest {
	return sha256.Sum256([]byte(auth.From(r.Context()).Name + "\x00" + key))
}

// digestOf is what a request asks for.
func digestOf(r *http.Request, body []byte) digest {
	h := sha256.New()
	_, _ = fmt.Fprintf(h, "%s\x00%s\x00%s\x00", r.Method, r.URL.EscapedPath(), r.URL.RawQuery) // a hash takes all
	_, _ = h.Write(body)
	return digest(h.Sum(nil))
}

// keys remembers answers by key. It is safe for concurrent use.
type keys struct {
	maxKeys, maxBytes int

	mu    sync.Mutex
	byKey map[digest]*linked.Element // of kept
	order *linked.List               // of *kept, oldest first
	bytes int
}

// kept is a request with a key, and its answer once there is one.
type kept struct {
	key, asked digest
	at         time.Time
	done       chan struct{} // closed when the first has been answered
	answer     *keptAnswer   // nil when it failed, and then the key is forgotten
}

func newKeys(maxKeys, maxBytes int) *keys {
	return &keys{maxKeys: maxKeys, maxBytes: maxBytes, byKey: map[digest]*linked.Element{}, order: linked.New()}
}

var errKeyReused = errors.New("the Idempotency-Key was used for another request")

// serve answers from memory, or has next answer and remembers that.
func (k *keys) serve(next http.Handler, w http.ResponseWriter, r *http.Request, key, asked digest) error {
	for {
		entry, first := k.claim(key, asked)
		if entry.asked != asked {
			return &refusal{error: errKeyReused, code: "key_reused", status: http.StatusUnprocessableEntity}
		}
		if first {
			k.run(next, w, r, entry)
			return nil
		}
		select {
		case <-entry.done:
		case <-r.Context().Done():
			return context.Cause(r.Context())
		}
		if entry.answer != nil {
			entry.answer.replay(w)
			return nil
		}
	}
}

// claim returns the entry of a key, and whether it is new and so the caller's
// to answer.
func (k *keys) claim(key, asked digest) (_ *kept, first bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sweepLocked()
	if element, ok := k.byKey[key]; ok {
		return keptIn(element), false
	}
	entry := &kept{key: key, asked: asked, at: time.Now(), done: make(chan struct{})}
	k.byKey[key] = k.order.PushBack(entry)
	return entry, true
}

func keptIn(element *linked.Element) *kept {
	entry, _ := element.Value.(*kept) // order holds nothing else
	return entry
}

// sweepLocked forgets what is too old and, oldest first, what is too much. What
// is under way is not forgotten: the limits of requests bound it.
func (k *keys) sweepLocked() {
	for element := k.order.Front(); element != nil; {
		entry, following := keptIn(element), element.Next()
		tooMany := len(k.byKey) >= k.maxKeys || k.bytes > k.maxBytes
		if !tooMany && time.Since(entry.at) < keyAge {
			return
		}
		select {
		case <-entry.done:
			k.forgetLocked(element)
		default:
		}
		element = following
	}
}

func (k *keys) forgetLocked(element *linked.Element) {
	entry := keptIn(element)
	k.order.Remove(element)
	delete(k.byKey, entry.key)
	if entry.answer != nil {
		k.bytes -= len(entry.answer.body)
	}
}

// run has next answer, and remembers a success. A panic passes through. Nobody
// waits for the client to take the answer.
func (k *keys) run(next http.Handler, w http.ResponseWriter, r *http.Request, entry *kept) {
	buffer := &keptAnswer{header: w.Header().Clone(), to: w}
	func() {
		defer k.settle(entry, buffer)
		next.ServeHTTP(buffer, r)
		buffer.over = true
	}()
	buffer.send(w)
}

// settle ends the wait of those with the same key.
func (k *keys) settle(entry *kept, answer *keptAnswer) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if answer.over && answer.status/100 == 2 {
		answer.to = nil
		entry.answer = answer
		k.bytes += len(answer.body)
	} else if element, ok := k.byKey[entry.key]; ok {
		k.forgetLocked(element)
	}
	close(entry.done)
}

// keptAnswer is an answer that is written to memory first.
type keptAnswer struct {
	header http.Header
	status int
	body   []byte
	over   bool // the handler has returned
	to     http.ResponseWriter
}

// Header is the answer's.
func (a *keptAnswer) Header() http.Header { return a.header }

// WriteHeader notes the status.
func (a *keptAnswer) WriteHeader(status int) {
	if a.status == 0 {
		a.status = status
	}
}

// Write notes the body. What handlers answer is bounded by what they were
// asked for.
func (a *keptAnswer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body = append(a.body, b...)
	return len(b), nil
}

// Unwrap is where the answer goes.
func (a *keptAnswer) Unwrap() http.ResponseWriter { return a.to }

// send writes the answer to the one who asked first.
func (a *keptAnswer) send(w http.ResponseWriter) {
	maps.Copy(w.Header(), a.header)
	if a.status != 0 {
		w.WriteHeader(a.status)
	}
	_, _ = w.Write(a.body) // the client went away: nobody is left to tell
}

// replay writes it to one who asks again, whose request has a name of its own.
func (a *keptAnswer) replay(w http.ResponseWriter) {
	h := w.Header()
	for name, values := range a.header {
		if name != requestIDHeader {
			h[name] = slices.Clone(values)
		}
	}
	h.Set("Idempotent-Replayed", "true")
	w.WriteHeader(a.status)
	_, _ = w.Write(a.body) // as above
}
