package auth

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// The headers of a signed request. docs/formats/signing.md describes them.
const (
	headerToken     = "Tine-Token"
	headerTimestamp = "Tine-Timestamp"
	headerNonce     = "Tine-Nonce"
	headerDigest    = "Tine-Content-Sha256"
	headerSignature = "Tine-Signature"
	// signVersion is the first line of what is signed.
	signVersion = "tine-sign-1"
	// maxAhead is how far the clock of who signs may be ahead of ours.
	maxAhead = 30 * time.Second
	// maxNonces is how many requests can be told from their replays at once.
	maxNonces = 65536
)

// isSigned reports whether r claims to be signed.
func isSigned(r *http.Request) bool { _, ok := r.Header[headerSignature]; return ok }

// signed is the signature of a request.
type signed struct {
	token, nonce string
	at           time.Time
	digest, mac  []byte
}

// parseSigned reads the headers, and refuses all that has two readings.
func parseSigned(r *http.Request) (signed, error) {
	var values [5]string
	for i, name := range []string{headerToken, headerTimestamp, headerNonce, headerDigest, headerSignature} {
		v := r.Header[name]
		if len(v) != 1 {
			return signed{}, malformed("needs one header " + name)
		}
		values[i] = v[0]
	}
	s := signed{token: values[0], nonce: values[2]}
	seconds, err := strconv.ParseInt(values[1], 10, 64)
	if err != nil || strconv.FormatInt(seconds, 10) != values[1] || seconds < 0 || seconds > 1<<40 {
		return signed{}, malformed(headerTimestamp + " is not in seconds")
	}
	s.at = time.Unix(seconds, 0)
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{16,64}$`).MatchString(s.nonce) {
		return signed{}, malformed(headerNonce + " has not 16 to 64 of A-Za-z0-9_-")
	}
	if s.digest = lowerHex(values[3]); s.digest == nil {
		return signed{}, malformed(headerDigest + " is not a SHA-256 in lower-case hexadecimal")
	}
	if s.mac = lowerHex(values[4]); s.mac == nil {
		return signed{}, malformed(headerSignature + " is not a SHA-256 in lower-case hexadecimal")
	}
	switch {
	case r.Header["Authorization"] != nil:
		return signed{}, malformed("has an Authorization header too")
	case !strings.HasPrefix(r.RequestURI, "/"):
		return signed{}, malformed("is for a proxy")
	}
	return s, nil
}

func malformed(what string) error {
	return unauthenticated("invalid signature: the request "+what, "see docs/formats/signing.md")
}

// lowerHex decodes a SHA-256, or returns nil.
func lowerHex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != sha256.Size || strings.ToLower(s) != s {
		return nil
	}
	return b
}

// message is what is signed. None of its parts but the query can hold a
// newline, and a request line cannot.
func (s signed) message(method, target string) string {
	path, query, _ := strings.Cut(target, "?")
	return strings.Join([]string{
		signVersion, s.token, method, path, query, hex.EncodeToString(s.digest), strconv.FormatInt(s.at.Unix(), 10), s.nonce,
	}, "\n")
}

func mac(key []byte, message string) []byte {
	h := hmac.New(sha256.New, key)
	_, _ = io.WriteString(h, message) // a hash takes everything
	return h.Sum(nil)
}

// verify finds whose signature r has, and sees to it that its body is verified.
// A token that is not known takes as long as one that is.
func (g *Guard) verify(r *http.Request, tokens []token) (Identity, error) {
	s, err := parseSigned(r)
	if err != nil {
		return Identity{}, err
	}
	var key [sha256.Size]byte
	var id Identity
	known := 0
	for _, t := range tokens {
		if t.sign && t.Name == s.token {
			key, id, known = t.hash, t.Identity, 1
		}
	}
	good := hmac.Equal(mac(key[:], s.message(r.Method, r.RequestURI)), s.mac)
	if known&boolInt(good) == 0 {
		return Identity{}, unauthenticated("invalid signature", "the token may have been removed, or the request changed on its way")
	}
	if r.Body == nil {
		r.Body = http.NoBody
	}
	r.Body = &verifiedBody{body: r.Body, hash: sha256.New(), want: s.digest}
	return id, nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// spend lets a request whose signature is good come in, once.
func (g *Guard) spend(r *http.Request, id Identity) error {
	s, err := parseSigned(r)
	if err != nil {
		return err
	}
	return g.nonces.spend(id.Name, s.nonce, s.at, g.now())
}

// verifiedBody is a body that ends with an error if it is not what was signed.
type verifiedBody struct {
	body io.ReadCloser
	hash hash.Hash
	want []byte
}

func (b *verifiedBody) Read(p []byte) (int, error) {
	n, err := b.body.Read(p)
	_, _ = b.hash.Write(p[:n]) // a hash takes everything
	if err == io.EOF && subtle.ConstantTimeCompare(b.hash.Sum(nil), b.want) == 0 {
		return n, unauthenticated("invalid signature: the body is not what was signed", "sign the SHA-256 of the bytes that are sent")
	}
	return n, err
}

func (b *verifiedBody) Close() error { return b.body.Close() }

// nonceCache knows the signed requests that have come in, for as long as they
// would be let in again. It rather refuses a request than to forget one.
type nonceCache struct {
	window time.Duration
	max    int

	mu sync.Mutex
	// floor is the earliest moment of signing that is accepted. It only grows:
	// what was forgotten stays refused when the clock is set back.
	floor time.Time
	// floors are the same, by token, for what daemons before this one let in.
	floors map[string]time.Time
	lasts  *lasts
	// seen has the moment of signing of each.
	seen  map[string]time.Time
	swept time.Time
}

// newNonceCache begins with what the daemons before have kept in lasts, which
// is damaged if they cannot tell.
func newNonceCache(window time.Duration, start time.Time, lasts *lasts, damaged bool) *nonceCache {
	c := &nonceCache{window: window, max: maxNonces, floor: start.Truncate(time.Second), lasts: lasts, seen: map[string]time.Time{}}
	c.floors = lasts.floors()
	if damaged { // then all that can have come in is refused
		c.floor = c.floor.Add(maxAhead + time.Second)
	}
	return c
}

// spend notes that the request came in, or says why it may not.
func (c *nonceCache) spend(token, nonce string, at, now time.Time) error {
	key := token + " " + nonce
	c.mu.Lock()
	defer c.mu.Unlock()
	if oldest := now.Add(-c.window); oldest.After(c.floor) {
		c.floor = oldest
	}
	switch _, again := c.seen[key]; {
	case at.Before(c.floor), at.Before(c.floors[token]):
		return unauthenticated("invalid signature: the request was signed too long ago",
			"sign each request anew, also after the daemon has started again; see that both clocks are right, and were not set back")
	case at.After(now.Add(min(maxAhead, c.window))):
		return unauthenticated("invalid signature: the request was signed in the future", "see that both clocks are right")
	case again:
		return unauthenticated("invalid signature: the request has come in before", "sign each request anew, with a nonce of its own")
	}
	if len(c.seen) >= c.max {
		c.sweep(now)
	}
	if len(c.seen) >= c.max {
		return errdef.WithHint(fmt.Errorf("%w: too many signed requests at once to tell them from replays", errdef.ErrUnavailable),
			"wait, or have the daemon's --sign-window made shorter")
	}
	if err := c.lasts.note(token, at); err != nil {
		return err
	}
	c.seen[key] = at
	return nil
}

// sweep forgets what would be refused for its age. It reads everything, so it
// is done at most once a second.
func (c *nonceCache) sweep(now time.Time) {
	if since := now.Sub(c.swept); since >= 0 && since < time.Second {
		return
	}
	c.swept = now
	for key, at := range c.seen {
		if at.Before(c.floor) {
			delete(c.seen, key)
		}
	}
}
