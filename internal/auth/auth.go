// Package auth decides who may come in, as whom, and how often: bearer tokens,
// signed requests, client certificates, and the peers of a unix socket.
//
// Nothing secret is compared but as a SHA-256, in constant time, and nothing
// secret is in what the package returns or logs. It knows no route: a caller
// asks it who a request is from, and decides what that identity may do.
package auth

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Scope is what an identity may do: each includes the ones before it.
type Scope string

// The scopes, from the least.
const (
	// Read sees what there is, and nothing that is in a guest.
	Read Scope = "read"
	// Fork makes and uses sandboxes, too.
	Fork Scope = "fork"
	// Admin does everything.
	Admin Scope = "admin"
)

// ParseScope returns the scope of that name.
func ParseScope(name string) (Scope, error) {
	if rank(Scope(name)) == 0 {
		return "", fmt.Errorf("%w: scope %q is not read, fork or admin", errdef.ErrInvalid, name)
	}
	return Scope(name), nil
}

func rank(s Scope) int {
	switch s {
	case Read:
		return 1
	case Fork:
		return 2
	case Admin:
		return 3
	}
	return 0
}

// Includes reports whether whoever has s may do what needs other.
func (s Scope) Includes(other Scope) bool { return rank(other) > 0 && rank(s) >= rank(other) }

// Identity is who makes a request.
type Identity struct {
	// Name is a token's name, "token-file", "cert:" and a common name, "uid:"
	// and a number, or "local".
	Name  string
	Scope Scope
	// Max bounds what it may have at once; a field that is zero is no bound.
	Max Share
	// Ambient says that it has shown nothing: it is trusted for where it is.
	Ambient bool
}

// Share is a part of the host: how many sandboxes, and what their limits come to.
type Share struct {
	Sandboxes int
	MemoryMiB int
	CPUMillis int // thousandths of a core
}

// Plus returns both together.
func (s Share) Plus(other Share) Share {
	return Share{s.Sandboxes + other.Sandboxes, s.MemoryMiB + other.MemoryMiB, s.CPUMillis + other.CPUMillis}
}

// Times returns n of s.
func (s Share) Times(n int) Share { return Share{n * s.Sandboxes, n * s.MemoryMiB, n * s.CPUMillis} }

// Unauthenticated says that nobody knows who makes a request.
type Unauthenticated struct{ message string }

// Error says why.
func (e *Unauthenticated) Error() string { return e.message }

// Unwrap returns the category.
func (e *Unauthenticated) Unwrap() error { return errdef.ErrDenied }

func unauthenticated(message, hint string) error {
	return errdef.WithHint(&Unauthenticated{message}, hint)
}

// LimitedError says that an identity makes requests too quickly.
type LimitedError struct {
	Name string
	// After is when the next one is due.
	After time.Duration
}

// Error says so.
func (e *LimitedError) Error() string { return "exhausted: too many requests from " + e.Name }

// Unwrap returns the category.
func (e *LimitedError) Unwrap() error { return errdef.ErrExhausted }

// DefaultWindow is how old a signed request may be.
const DefaultWindow = 5 * time.Minute

// Config says who is let in. The zero value asks nobody who they are.
type Config struct {
	// TokenFile holds one token, which may do everything; "" for none.
	TokenFile string
	// Store is the path of the named tokens, which need not exist; "" for none.
	Store string
	// Signed is the path of what keeps signed requests from coming in again after
	// a restart, which need not exist; "" keeps nothing.
	Signed string
	// Certificates says that listeners verify client certificates, and
	// CertificateScope is what who has one may do; "" means Admin.
	Certificates     bool
	CertificateScope Scope
	// Window is how old a signed request may be; 0 means DefaultWindow.
	Window time.Duration
	// Rate is how many requests a second one identity may make, in the long
	// run; 0 is no bound. Burst is how many it may make at once; 0 means Rate,
	// and at least 1.
	Rate  float64
	Burst int
	// Logger is told of credentials that cannot be read; nil discards that.
	Logger *slog.Logger
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// Guard knows who may come in. It is safe for concurrent use.
type Guard struct {
	cfg    Config
	log    *slog.Logger
	now    func() time.Time
	nonces *nonceCache
	rates  *limiter

	mu        sync.Mutex
	file      watched
	store     watched
	checked   time.Time
	tokens    []token // those below; replaced, never changed
	fileToken []token
	named     []token
	known     map[string]Known // replaced, never changed; nil until all could be read
	required  bool             // stays once it is set
	pending   map[string]Share // what is being made, by identity
}

// token is one that is accepted.
type token struct {
	Identity
	hash [sha256.Size]byte
	sign bool
}

// Open reads the credentials. A token file that cannot be used is an error, so
// that nobody starts a daemon that is more open than was meant. A store that
// cannot be read lets nobody in by it, until it can.
func Open(cfg Config) (*Guard, error) {
	g := &Guard{
		cfg: cfg, log: cfg.Logger, now: cfg.Now, file: watched{path: cfg.TokenFile}, store: watched{path: cfg.Store},
		required: cfg.TokenFile != "" || cfg.Certificates, pending: map[string]Share{},
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	if g.now == nil {
		g.now = time.Now
	}
	switch {
	case g.cfg.Window < 0 || g.cfg.Window > 24*time.Hour:
		return nil, fmt.Errorf("%w: sign window %v is not within 24h", errdef.ErrInvalid, g.cfg.Window)
	case g.cfg.Rate < 0 || math.IsNaN(g.cfg.Rate) || g.cfg.Rate > 1e9:
		return nil, fmt.Errorf("%w: rate %v", errdef.ErrInvalid, g.cfg.Rate)
	case g.cfg.Burst < 0:
		return nil, fmt.Errorf("%w: burst %d", errdef.ErrInvalid, g.cfg.Burst)
	}
	if g.cfg.CertificateScope == "" {
		g.cfg.CertificateScope = Admin
	}
	if rank(g.cfg.CertificateScope) == 0 {
		return nil, fmt.Errorf("%w: scope of client certificates %q", errdef.ErrInvalid, cfg.CertificateScope)
	}
	if g.cfg.Window == 0 {
		g.cfg.Window = DefaultWindow
	}
	kept, err := openLasts(g.cfg.Signed)
	if err != nil {
		g.log.Error("signed requests are refused for half a minute: which came in before is not known", slog.Any("error", err))
	}
	g.nonces = newNonceCache(g.cfg.Window, g.now(), kept, err != nil)
	g.rates = newLimiter(cfg.Rate, cfg.Burst)
	if err := g.reload(true); err != nil {
		return nil, err
	}
	return g, nil
}

// Required reports whether whoever comes over TCP must show something. Once it
// is so it stays so for the life of g: whoever removes the last token does not
// open the door with that.
func (g *Guard) Required() bool {
	g.refresh()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.required
}

// Reload reads the credentials again, as it does by itself when their files
// have changed. What cannot be read leaves the credentials as they were; that
// is logged.
func (g *Guard) Reload() {
	_ = g.reload(false) // it has been logged
}

// recheck is how long a change of the credentials may go unnoticed.
const recheck = time.Second

// refresh reads again what has changed.
func (g *Guard) refresh() {
	g.mu.Lock()
	now := g.now()
	since := now.Sub(g.checked)
	due := since >= recheck || since < 0
	if due {
		g.checked = now
		due = g.file.changed() || g.store.changed()
	}
	g.mu.Unlock()
	if due {
		_ = g.reload(false) // it has been logged
	}
}

// reload reads the credentials. first makes a bad token file an error.
func (g *Guard) reload(first bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.readTokenFile(); err != nil {
		if first {
			return err
		}
		g.log.Error("token file not read: the token of before still holds", slog.Any("error", err))
	}
	if err := g.readStore(); err != nil {
		// Fail closed: there is a store, and nobody knows who is in it.
		g.required = true
		g.log.Error("token store not read: the tokens of before still hold", slog.Any("error", err))
	}
	g.tokens = slices.Concat(g.fileToken, g.named)
	g.required = g.required || len(g.tokens) > 0
	return nil
}

// readTokenFile is called with mu held.
func (g *Guard) readTokenFile() error {
	if g.file.path == "" {
		return nil
	}
	g.file.note()
	secret, err := ReadTokenFile(g.file.path)
	if err != nil {
		return err
	}
	g.fileToken = []token{{Identity: Identity{Name: fileName, Scope: Admin}, hash: sha256.Sum256([]byte(secret))}}
	return nil
}

// readStore is called with mu held.
func (g *Guard) readStore() error {
	if g.store.path == "" {
		g.noteKnown(nil, nil)
		return nil
	}
	g.store.note()
	records, err := List(g.store.path)
	g.noteKnown(records, err)
	if err != nil {
		return err
	}
	g.named = nil
	for _, r := range records {
		g.named = append(g.named, r.token())
	}
	return nil
}

// Admit says who r is from, or why it may not come in: an *Unauthenticated, a
// *LimitedError, or errdef.ErrUnavailable. The body of a signed request is
// verified while it is read: it ends with an *Unauthenticated instead of io.EOF
// if it is not what was signed.
func (g *Guard) Admit(r *http.Request) (Identity, error) {
	id, err := g.identify(r)
	if err != nil || id.Ambient {
		return id, err
	}
	if after := g.rates.take(id.Name, g.now()); after > 0 {
		return Identity{}, errdef.WithHint(&LimitedError{Name: id.Name, After: after}, "send fewer, or have the daemon's --rate raised")
	}
	if isSigned(r) {
		err = g.spend(r, id)
	}
	return id, err
}

// identify finds who r is from. What is shown goes before what is merely so.
func (g *Guard) identify(r *http.Request) (Identity, error) {
	g.refresh()
	g.mu.Lock()
	tokens, required := g.tokens, g.required
	g.mu.Unlock()
	from := originOf(r.Context())
	bearer, shown := r.Header["Authorization"]
	switch {
	case from.inside, !required && !from.exposed: // nobody is asked anything
		return ambient(from), nil
	case isSigned(r):
		return g.verify(r, tokens)
	case shown:
		return findBearer(bearer, tokens)
	case r.TLS != nil && len(r.TLS.VerifiedChains) > 0:
		return g.certified(r.TLS.VerifiedChains[0][0])
	case from.trusted():
		return ambient(from), nil
	}
	return Identity{}, unauthenticated("missing bearer token", "send Authorization: Bearer TOKEN; tine token create makes one")
}

func ambient(from origin) Identity {
	if from.unix {
		return Identity{Name: "uid:" + strconv.FormatUint(uint64(from.uid), 10), Scope: Admin, Ambient: true}
	}
	return Identity{Name: "local", Scope: Admin, Ambient: true}
}

// findBearer finds the token that the header shows. It looks at all of them, so
// that the time it takes says nothing.
func findBearer(headers []string, tokens []token) (Identity, error) {
	if len(headers) != 1 {
		return Identity{}, unauthenticated("invalid bearer token", "send one Authorization header")
	}
	scheme, secret, _ := strings.Cut(headers[0], " ")
	secret = strings.TrimSpace(secret)
	if !strings.EqualFold(scheme, "Bearer") || secret == "" {
		return Identity{}, unauthenticated("missing bearer token", "send Authorization: Bearer TOKEN; tine token create makes one")
	}
	hash, found := sha256.Sum256([]byte(secret)), -1
	for i := range tokens {
		found = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(hash[:], tokens[i].hash[:]), i, found)
	}
	if found < 0 {
		return Identity{}, unauthenticated("invalid bearer token", "it may have been removed: see tine token ls")
	}
	if tokens[found].sign {
		return Identity{}, unauthenticated("invalid bearer token", "this token signs requests and must not be sent: see docs/formats/signing.md")
	}
	return tokens[found].Identity, nil
}

// maxCommonName is X.520's.
const maxCommonName = 64

func (g *Guard) certified(cert *x509.Certificate) (Identity, error) {
	name := cert.Subject.CommonName
	if name == "" || len(name) > maxCommonName || strings.ContainsFunc(name, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return Identity{}, unauthenticated("client certificate without a usable name", "its subject needs a common name of at most 64 characters")
	}
	return Identity{Name: "cert:" + name, Scope: g.cfg.CertificateScope}, nil
}

// Reserve takes a share of what id may have, given what it has, until release is
// called: by then what was made of it is counted by have. It returns
// errdef.ErrExhausted when there is not so much left.
func (g *Guard) Reserve(id Identity, want Share, have func() Share) (release func(), err error) {
	if id.Max == (Share{}) {
		return func() {}, nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	// In this order: what is finished meanwhile counts twice, and never not at all.
	pending := g.pending[id.Name]
	if err = fits(id, want, pending.Plus(have())); err != nil {
		return nil, err
	}
	g.pending[id.Name] = pending.Plus(want)
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.pending[id.Name] = g.pending[id.Name].Plus(want.Times(-1)); g.pending[id.Name] == (Share{}) {
			delete(g.pending, id.Name)
		}
	}), nil
}

// fits reports why id may not have want beside what it has, or nil.
func fits(id Identity, want, has Share) error {
	full := func(format string, args ...any) error {
		return fmt.Errorf("%w: token %s %s", errdef.ErrExhausted, id.Name, fmt.Sprintf(format, args...))
	}
	over := func(want, limit, has int) bool { return limit > 0 && want > 0 && want > limit-has }
	switch limit := id.Max; {
	case over(want.Sandboxes, limit.Sandboxes, has.Sandboxes):
		return errdef.WithHint(full("may have %d sandboxes, and has %d", limit.Sandboxes, has.Sandboxes), "remove some first")
	case over(want.MemoryMiB, limit.MemoryMiB, has.MemoryMiB):
		return errdef.WithHint(full("may have sandboxes with %d MiB of memory, has %d MiB and asks for %d MiB", limit.MemoryMiB, has.MemoryMiB, want.MemoryMiB),
			"ask for less with memory_limit_mib (--memory-limit), or remove some sandboxes first")
	case over(want.CPUMillis, limit.CPUMillis, has.CPUMillis):
		return errdef.WithHint(full("may have sandboxes with %s cores, has %s and asks for %s", cores(limit.CPUMillis), cores(has.CPUMillis), cores(want.CPUMillis)),
			"ask for less with cpu_limit (--cpus), or remove some sandboxes first")
	}
	return nil
}

// cores writes thousandths of a core as a number of cores.
func cores(millis int) string { return strconv.FormatFloat(float64(millis)/1000, 'f', -1, 64) }

// Max is what the named token may have, if there is one.
func (g *Guard) Max(name string) (limit Share, ok bool) {
	g.refresh()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, t := range g.named {
		if t.Name == name {
			return t.Max, true
		}
	}
	return Share{}, false
}

type identityKey struct{}

// With returns ctx with the identity of whoever is served.
func With(ctx context.Context, id Identity) context.Context {
	return context.WithValue(ctx, identityKey{}, id)
}

// From returns the identity that With has put into ctx; without one it is who
// is in this process.
func From(ctx context.Context) Identity {
	if id, ok := ctx.Value(identityKey{}).(Identity); ok {
		return id
	}
	return Identity{Name: "local", Scope: Admin, Ambient: true}
}
