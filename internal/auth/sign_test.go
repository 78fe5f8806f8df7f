package auth

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

// vectors is api/vectors/signing.json.
type vectors struct {
	Token     string `json:"token"`
	TokenName string `json:"token_name"`
	Key       string `json:"key"`
	Vectors   []struct {
		Name          string `json:"name"`
		Method        string `json:"method"`
		Target        string `json:"target"`
		Body          string `json:"body"`
		Timestamp     int64  `json:"timestamp"`
		Nonce         string `json:"nonce"`
		ContentSHA256 string `json:"content_sha256"`
		StringToSign  string `json:"string_to_sign"`
		Signature     string `json:"signature"`
	} `json:"vectors"`
}

func readVectors(t *testing.T) vectors {
	t.Helper()
	data, err := os.ReadFile("../../api/vectors/signing.json")
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err = json.Unmarshal(data, &v); err != nil || len(v.Vectors) == 0 {
		t.Fatalf("%d vectors, %v", len(v.Vectors), err)
	}
	return v
}

func TestVectors(t *testing.T) {
	t.Parallel()
	all := readVectors(t)
	key := sha256.Sum256([]byte(all.Token))
	if hex.EncodeToString(key[:]) != all.Key {
		t.Errorf("key %x", key)
	}
	for _, v := range all.Vectors {
		g := open(t, Config{Now: func() time.Time { return time.Unix(v.Timestamp, 0) }})
		g.tokens, g.required = []token{{Identity: Identity{Name: all.TokenName, Scope: Admin}, hash: key, sign: true}}, true
		r := httptest.NewRequest(v.Method, v.Target, strings.NewReader(v.Body))
		setSigned(r, all.TokenName, v.Timestamp, v.Nonce, v.ContentSHA256, v.Signature)
		s, err := parseSigned(r)
		if err != nil {
			t.Errorf("%s: %v", v.Name, err)
			continue
		}
		if got := s.message(r.Method, r.RequestURI); got != v.StringToSign {
			t.Errorf("%s: signs %q", v.Name, got)
		}
		if _, err = g.Admit(r); err != nil {
			t.Errorf("%s: %v", v.Name, err)
		}
		if body, err := io.ReadAll(r.Body); err != nil || string(body) != v.Body {
			t.Errorf("%s: body %q, %v", v.Name, body, err)
		}
	}
}

func setSigned(r *http.Request, name string, at int64, nonce, digest, signature string) {
	r.Header.Set(headerToken, name)
	r.Header.Set(headerTimestamp, strconv.FormatInt(at, 10))
	r.Header.Set(headerNonce, nonce)
	r.Header.Set(headerDigest, digest)
	r.Header.Set(headerSignature, signature)
}

const testNonce = "0123456789abcdef"

// signed makes a request and signs it.
func signedRequest(secret, name, nonce string, at time.Time, body string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/v1/sandboxes?a=b", strings.NewReader(body))
	digest, key := sha256.Sum256([]byte(body)), sha256.Sum256([]byte(secret))
	s := signed{token: name, nonce: nonce, at: at, digest: digest[:]}
	setSigned(r, name, at.Unix(), nonce, hex.EncodeToString(digest[:]),
		hex.EncodeToString(mac(key[:], s.message(r.Method, r.RequestURI))))
	return r
}

// signer is a guard with a token that signs.
func signer(t *testing.T, c *clock, window time.Duration) (*Guard, string) {
	t.Helper()
	store := StorePath(t.TempDir())
	secret := create(t, store, Record{Name: "deploy", Scope: Fork, Sign: true})
	return open(t, Config{Store: store, Now: c.Now, Window: window}), secret
}

// TestTampered changes each part of a request that was signed.
func TestTampered(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, 0)
	bearer := create(t, g.cfg.Store, Record{Name: "ci", Scope: Admin})
	g.Reload()
	for name, tamper := range map[string]func(r *http.Request){
		"method":          func(r *http.Request) { r.Method = http.MethodPut },
		"path":            func(r *http.Request) { r.RequestURI = "/v1/sandboxez?a=b" },
		"query":           func(r *http.Request) { r.RequestURI = "/v1/sandboxes?a=c" },
		"no_query":        func(r *http.Request) { r.RequestURI = "/v1/sandboxes" },
		"query_to_path":   func(r *http.Request) { r.RequestURI = "/v1/sandboxes\na=b" },
		"proxy":           func(r *http.Request) { r.RequestURI = "http://x/v1/sandboxes?a=b" },
		"timestamp":       func(r *http.Request) { r.Header.Set(headerTimestamp, strconv.FormatInt(c.Now().Unix()+1, 10)) },
		"timestamp_form":  func(r *http.Request) { r.Header.Set(headerTimestamp, "0"+r.Header.Get(headerTimestamp)) },
		"timestamp_sign":  func(r *http.Request) { r.Header.Set(headerTimestamp, "-1") },
		"timestamp_large": func(r *http.Request) { r.Header.Set(headerTimestamp, "9223372036854775807") },
		"nonce":           func(r *http.Request) { r.Header.Set(headerNonce, "0123456789abcdeF") },
		"nonce_short":     func(r *http.Request) { r.Header.Set(headerNonce, "0123456789abcde") },
		"nonce_newline":   func(r *http.Request) { r.Header.Set(headerNonce, "0123456789abcdef\n") },
		"digest":          func(r *http.Request) { r.Header.Set(headerDigest, strings.Repeat("0", 64)) },
		"digest_case":     func(r *http.Request) { r.Header.Set(headerDigest, strings.ToUpper(r.Header.Get(headerDigest))) },
		"signature":       func(r *http.Request) { r.Header.Set(headerSignature, strings.Repeat("0", 64)) },
		"signature_short": func(r *http.Request) { r.Header.Set(headerSignature, r.Header.Get(headerSignature)[:62]) },
		"signature_empty": func(r *http.Request) { r.Header.Set(headerSignature, "") },
		"signature_twice": func(r *http.Request) { r.Header.Add(headerSignature, r.Header.Get(headerSignature)) },
		"no_nonce":        func(r *http.Request) { r.Header.Del(headerNonce) },
		"token":           func(r *http.Request) { r.Header.Set(headerToken, "ci") },
		"token_unknown":   func(r *http.Request) { r.Header.Set(headerToken, "nobody") },
		"with_bearer":     func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+bearer) },
	} {
		r := signedRequest(secret, "deploy", testNonce, c.Now(), "body")
		tamper(r)
		id, err := g.Admit(r)
		if _, ok := errors.AsType[*Unauthenticated](err); !ok || id != (Identity{}) || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %+v, %v", name, id, err)
		}
	}
	if id, err := g.Admit(signedRequest(secret, "deploy", testNonce, c.Now(), "body")); err != nil || id.Name != "deploy" {
		t.Errorf("untampered: %+v, %v", id, err) // so no attempt has spent its nonce
	}
	// A token that is sent has no signature: its hash alone must not let in.
	forged := signedRequest(bearer, "ci", testNonce, c.Now(), "")
	if _, err := g.Admit(forged); err == nil {
		t.Error("a token that is sent has signed a request")
	}
}

// TestSignedBody: the digest is of what is read, however it is read.
func TestSignedBody(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, 0)
	n := 0
	for sent, want := range map[string]bool{"body": true, "bodz": false, "bod": false, "body ": false, "": false} {
		for _, size := range []int{1, 3, 4, 4096} {
			n++
			r := signedRequest(secret, "deploy", fmt.Sprintf("%s%04d", testNonce, n), c.Now(), "body")
			r.Body = io.NopCloser(strings.NewReader(sent))
			if _, err := g.Admit(r); err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			_, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{r.Body}, make([]byte, size))
			if _, bad := errors.AsType[*Unauthenticated](err); bad == want || got.String() != sent {
				t.Errorf("%q by %d: %q, %v", sent, size, got.String(), err)
			}
		}
	}
}

// TestReplay: a request comes in once, whatever the clock does.
func TestReplay(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, time.Minute)
	first := c.Now()
	admit := func(nonce string, at time.Time) error {
		_, err := g.Admit(signedRequest(secret, "deploy", nonce, at, ""))
		return err
	}
	refused := func(what, nonce string, at time.Time) {
		t.Helper()
		if _, ok := errors.AsType[*Unauthenticated](admit(nonce, at)); !ok {
			t.Errorf("%s was let in", what)
		}
	}
	if err := admit(testNonce, first); err != nil {
		t.Fatal(err)
	}
	refused("a replay", testNonce, first)
	refused("what was signed before the daemon started", "before-the-start", first.Add(-time.Second))
	refused("what is far in the future", "from-the-future-", first.Add(maxAhead+time.Second))
	if err := admit("a-little-ahead--", first.Add(maxAhead)); err != nil {
		t.Error(err)
	}
	refused("a replay with another time", testNonce, first.Add(time.Second))

	c.add(time.Minute)
	refused("a replay at the window's end", testNonce, first)
	c.add(time.Second)
	refused("what is too old", "something-new---", first)
	c.add(time.Hour)
	if err := admit("an-hour-later---", c.Now()); err != nil {
		t.Error(err)
	}
	g.nonces.sweep(c.Now())
	if len(g.nonces.seen) != 1 {
		t.Errorf("%d are remembered, all but one for no use", len(g.nonces.seen))
	}
	c.add(-time.Hour - 30*time.Second)
	refused("a replay after the clock was set back", testNonce, first)
	refused("a replay of another", "a-little-ahead--", first.Add(maxAhead))
	c.add(time.Hour + time.Minute)
	if err := admit("a-new-one-------", c.Now()); err != nil {
		t.Errorf("once the clock is right again: %v", err)
	}
}

// TestReplayLaw: no clock, no order and no restart lets the same request in
// twice.
func TestReplayLaw(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	runs := 0
	rapid.Check(t, func(t *rapid.T) {
		now := time.Unix(1795300000, 0)
		runs++
		path := filepath.Join(dir, strconv.Itoa(runs))
		start := func() *nonceCache {
			kept, err := openLasts(path)
			if err != nil {
				t.Fatal(err)
			}
			return newNonceCache(time.Minute, now, kept, false)
		}
		c := start()
		most := rapid.IntRange(1, 8).Draw(t, "max")
		in := map[string]bool{}
		for range rapid.IntRange(1, 40).Draw(t, "requests") {
			now = now.Add(time.Duration(rapid.IntRange(-200, 200).Draw(t, "step")) * time.Second)
			if rapid.IntRange(0, 4).Draw(t, "restart") == 0 {
				c = start()
			}
			c.max = most
			at := time.Unix(1795300000+int64(rapid.IntRange(-100, 400).Draw(t, "at")), 0)
			token := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "token")
			key := fmt.Sprint(rapid.IntRange(0, 9).Draw(t, "nonce"), at.Unix())
			if c.spend(token, key, at, now) != nil {
				continue
			}
			if in[token+key] {
				t.Fatalf("%s came in twice", key)
			}
			in[token+key] = true
			if len(c.seen) > c.max {
				t.Fatalf("%d of %d", len(c.seen), c.max)
			}
		}
	})
}

// TestReplayOverRestart: what came in does not come in again, whenever the
// daemon starts again, and whatever its clock says then.
func TestReplayOverRestart(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, time.Minute)
	cfg := g.cfg
	cfg.Signed = SignedPath(t.TempDir())
	open := func() {
		t.Helper()
		var err error
		if g, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
	}
	admit := func(nonce string, at time.Time) error {
		_, err := g.Admit(signedRequest(secret, "deploy", nonce, at, ""))
		return err
	}
	open()
	first, ahead := c.Now(), c.Now().Add(maxAhead)
	for nonce, at := range map[string]time.Time{"now-------------": first, "ahead-----------": ahead} {
		if err := admit(nonce, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []time.Duration{0, time.Second, -time.Hour, time.Hour + maxAhead - time.Second} {
		c.add(step)
		open()
		for nonce, at := range map[string]time.Time{"now-------------": first, "ahead-----------": ahead, "another---------": ahead} {
			if _, ok := errors.AsType[*Unauthenticated](admit(nonce, at)); !ok {
				t.Errorf("at %v: %s was let in", c.Now(), nonce)
			}
		}
	}
	if err := admit("later-----------", ahead.Add(time.Second)); err != nil {
		t.Errorf("what was signed later: %v", err)
	}
	// A file that cannot be read has all refused that can have come in.
	if err := os.WriteFile(cfg.Signed, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	open()
	if err := admit("damaged---------", c.Now().Add(maxAhead)); err == nil {
		t.Error("let in, though nobody knows what came in before")
	}
	c.add(maxAhead + 2*time.Second)
	if err := admit("mended----------", c.Now()); err != nil {
		t.Errorf("half a minute later: %v", err)
	}
	// What cannot be kept does not come in.
	cfg.Signed = filepath.Join(t.TempDir(), "gone", "signed.last")
	c.add(time.Hour)
	open()
	if err := admit("no-disk---------", c.Now()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("without a disk: %v", err)
	}
}

func TestReplayRace(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, 0)
	var in atomic.Int32
	var work sync.WaitGroup
	for range 64 {
		work.Go(func() {
			if _, err := g.Admit(signedRequest(secret, "deploy", testNonce, c.Now(), "")); err == nil {
				in.Add(1)
			}
		})
	}
	work.Wait()
	if in.Load() != 1 {
		t.Errorf("%d came in", in.Load())
	}
}

// TestFullCache: rather than to forget one that could come again, nobody new
// is let in.
func TestFullCache(t *testing.T) {
	t.Parallel()
	c := newClock()
	g, secret := signer(t, c, time.Minute)
	g.nonces.max = 10
	nonce := func(i int) string { return fmt.Sprintf("%s%04d", testNonce, i) }
	admit := func(i int, at time.Time) error {
		_, err := g.Admit(signedRequest(secret, "deploy", nonce(i), at, ""))
		return err
	}
	first := c.Now()
	for i := range 10 {
		if err := admit(i, first); err != nil {
			t.Fatal(err)
		}
	}
	if err := admit(10, first); !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) == "" {
		t.Errorf("the eleventh: %v", err)
	}
	if err := admit(3, first); errors.Is(err, errdef.ErrUnavailable) || err == nil {
		t.Errorf("a replay: %v", err)
	}
	c.add(time.Minute + 2*time.Second)
	if err := admit(10, c.Now()); err != nil {
		t.Errorf("when the others are too old: %v", err)
	}
	if err := admit(3, first); err == nil {
		t.Error("a replay of one that was forgotten")
	}
}

func FuzzParseSigned(f *testing.F) {
	f.Add("deploy", "1795300000", testNonce, strings.Repeat("0", 64), strings.Repeat("f", 64))
	f.Fuzz(func(t *testing.T, name, at, nonce, digest, signature string) {
		r := httptest.NewRequest(http.MethodGet, "/x", nil)
		for header, value := range map[string]string{
			headerToken: name, headerTimestamp: at, headerNonce: nonce, headerDigest: digest, headerSignature: signature,
		} {
			r.Header[header] = []string{value}
		}
		s, err := parseSigned(r)
		if err != nil {
			return
		}
		if strconv.FormatInt(s.at.Unix(), 10) != at || s.nonce != nonce || hex.EncodeToString(s.digest) != digest || hex.EncodeToString(s.mac) != signature {
			t.Errorf("%q %q %q %q became %+v", at, nonce, digest, signature, s)
		}
		// The token's name is only looked up: what it holds changes nothing else.
		if strings.Count(s.message("GET", "/x"), "\n") != 7+strings.Count(name, "\n") {
			t.Errorf("message %q", s.message("GET", "/x"))
		}
	})
}

func FuzzDecodeLasts(f *testing.F) {
	f.Add([]byte(`{"version":1,"last":{"deploy":1795300000}}`))
	f.Add([]byte(`{"version":1,"last":{}} {}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		at, err := decodeLasts(data)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Error(err)
			}
			return
		}
		for name, floor := range (&lasts{at: at}).floors() {
			if floor.Unix() != at[name]+1 {
				t.Errorf("%s: %v of %d", name, floor, at[name])
			}
		}
	})
}
