package auth

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

const (
	// storeVersion is the version of the format.
	storeVersion = 1
	// maxStore and maxTokens bound the store: each bearer is compared with all.
	maxStore  = 1 << 20
	maxTokens = 256
	// maxCap is the largest bound on sandboxes that a token may have.
	maxCap = 1 << 20
	// maxMemory and maxCPUs are the largest bounds on what their limits come to.
	maxMemory = 1 << 30
	maxCPUs   = 1 << 20
	// bearerPrefix and signPrefix begin the two kinds of token, so that whoever
	// has one knows what to do with it.
	bearerPrefix = "tine_"
	signPrefix   = "tinesign_"
)

// Record is what is kept of a named token: not the token.
type Record struct {
	Name  string `json:"name"`
	Scope Scope  `json:"scope"`
	// SHA256 is the token's, in lower-case hex. Of a token that signs it is the
	// key.
	SHA256 string `json:"sha256"`
	// MaxSandboxes is 0 where there is no bound.
	MaxSandboxes int `json:"max_sandboxes,omitempty"`
	// MaxMemoryMiB and MaxCPUs bound what the limits of its sandboxes come to; 0
	// is no bound.
	MaxMemoryMiB int     `json:"max_memory_mib,omitempty"`
	MaxCPUs      float64 `json:"max_cpus,omitempty"`
	// Sign says that the token is never sent: it signs requests.
	Sign      bool      `json:"sign,omitempty"`
	CreatedAt time.Time `json:"created_at"`
}

func (r Record) token() token {
	t := token{Identity: Identity{Name: r.Name, Scope: r.Scope, Max: r.max()}, sign: r.Sign}
	_, _ = hex.Decode(t.hash[:], []byte(r.SHA256)) // decodeRecords has checked it
	return t
}

func (r Record) max() Share {
	return Share{Sandboxes: r.MaxSandboxes, MemoryMiB: r.MaxMemoryMiB, CPUMillis: int(math.Round(1000 * r.MaxCPUs))}
}

// StorePath is where the named tokens of a state directory are.
func StorePath(stateDir string) string { return filepath.Join(stateDir, "tokens.json") }

// Create makes a named token of what r says, of the hash and the time aside, and
// returns the token: it is nowhere else. A daemon that runs knows it within a
// second.
func Create(ctx context.Context, path string, r Record) (_ Record, secret string, err error) {
	raw := make([]byte, sha256.Size)
	_, _ = rand.Read(raw) // it never fails
	prefix := bearerPrefix
	if r.Sign {
		prefix = signPrefix
	}
	secret = prefix + r.Name + "_" + strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(raw))
	hash := sha256.Sum256([]byte(secret))
	r.SHA256, r.CreatedAt = hex.EncodeToString(hash[:]), time.Now().UTC().Truncate(time.Second)
	if err = r.check(); err != nil {
		return Record{}, "", err
	}
	err = change(ctx, path, func(records []Record) ([]Record, error) {
		if slices.ContainsFunc(records, func(other Record) bool { return other.Name == r.Name }) {
			return nil, fmt.Errorf("%w: token %s", errdef.ErrExists, r.Name)
		}
		if len(records) == maxTokens {
			return nil, fmt.Errorf("%w: there are %d tokens already", errdef.ErrExhausted, maxTokens)
		}
		return append(records, r), nil
	})
	if err != nil {
		return Record{}, "", err
	}
	return r, secret, nil
}

// Remove removes a named token: a daemon that runs refuses it within a second.
// What it has made stays.
func Remove(ctx context.Context, path, name string) error {
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) { // nor is a directory made for it
		return fmt.Errorf("%w: token %s", errdef.ErrNotFound, name)
	}
	return change(ctx, path, func(records []Record) ([]Record, error) {
		rest := slices.DeleteFunc(records, func(r Record) bool { return r.Name == name })
		if len(rest) == len(records) {
			return nil, fmt.Errorf("%w: token %s", errdef.ErrNotFound, name)
		}
		return rest, nil
	})
}

// List returns the named tokens, by name.
func List(path string) ([]Record, error) {
	records, err := readRecords(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	slices.SortFunc(records, func(a, b Record) int { return strings.Compare(a.Name, b.Name) })
	return records, err
}

// change replaces the store's content by what f makes of it. Processes take
// turns.
func change(ctx context.Context, path string, f func([]Record) ([]Record, error)) (err error) {
	if err = os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("change tokens: %w", err)
	}
	lock, err := durable.Lock(ctx, path+".lock")
	if err != nil {
		return fmt.Errorf("change tokens: %w", err)
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()
	records, err := List(path)
	if err != nil {
		return err
	}
	if records, err = f(records); err != nil {
		return err
	}
	data, err := encodeRecords(records)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o600)
}

func readRecords(path string) ([]Record, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("token store: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, errdef.WithHint(fmt.Errorf("%w: token store %s is open to others: mode %v", errdef.ErrDenied, path, info.Mode().Perm()),
			"chmod 600 "+path)
	}
	data, err := readBounded(path, maxStore)
	if err != nil {
		return nil, fmt.Errorf("token store: %w", err)
	}
	records, err := decodeRecords(data)
	if err != nil {
		return nil, fmt.Errorf("token store %s: %w", path, err)
	}
	return records, nil
}

// content is the store's file, which docs/formats/tokens.md describes.
type content struct {
	Version int      `json:"version"`
	Tokens  []Record `json:"tokens"`
}

func encodeRecords(records []Record) ([]byte, error) {
	if records == nil {
		records = []Record{}
	}
	data, err := json.MarshalIndent(content{Version: storeVersion, Tokens: records}, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode tokens: %w", err)
	}
	return append(data, '\n'), nil
}

// decodeRecords accepts only what encodeRecords can have written.
func decodeRecords(data []byte) ([]Record, error) {
	var c content
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if dec.More() {
		return nil, fmt.Errorf("%w: more than one value", errdef.ErrInvalid)
	}
	if c.Version != storeVersion {
		return nil, fmt.Errorf("%w: version %d of the token store; this program knows %d", errdef.ErrUnsupported, c.Version, storeVersion)
	}
	if len(c.Tokens) > maxTokens {
		return nil, fmt.Errorf("%w: %d tokens, %d allowed", errdef.ErrInvalid, len(c.Tokens), maxTokens)
	}
	names, hashes := map[string]bool{}, map[string]bool{}
	for _, r := range c.Tokens {
		if err := r.check(); err != nil {
			return nil, err
		}
		if names[r.Name] || hashes[r.SHA256] {
			return nil, fmt.Errorf("%w: token %s is there twice", errdef.ErrInvalid, r.Name)
		}
		names[r.Name], hashes[r.SHA256] = true, true
	}
	return c.Tokens, nil
}

func (r Record) check() error {
	if _, err := ParseScope(string(r.Scope)); err != nil {
		return err
	}
	switch {
	case !validName(r.Name):
		return errdef.WithHint(fmt.Errorf("%w: token name %q", errdef.ErrInvalid, r.Name),
			"a name has 1 to 32 of a-z, 0-9 and -, begins with a letter, and is not "+fileName)
	case !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(r.SHA256):
		return fmt.Errorf("%w: token %s: sha256 is not 64 hexadecimal digits", errdef.ErrInvalid, r.Name)
	case r.MaxSandboxes < 0 || r.MaxSandboxes > maxCap:
		return fmt.Errorf("%w: token %s: max_sandboxes %d is not 0 to %d", errdef.ErrInvalid, r.Name, r.MaxSandboxes, maxCap)
	case r.MaxMemoryMiB < 0 || r.MaxMemoryMiB > maxMemory:
		return fmt.Errorf("%w: token %s: max_memory_mib %d is not 0 to %d", errdef.ErrInvalid, r.Name, r.MaxMemoryMiB, maxMemory)
	case !(r.MaxCPUs == 0 || r.MaxCPUs >= 0.001 && r.MaxCPUs <= maxCPUs): // NaN neither
		return fmt.Errorf("%w: token %s: max_cpus %v is not 0, nor 0.001 to %d", errdef.ErrInvalid, r.Name, r.MaxCPUs, maxCPUs)
	}
	return nil
}

// validName: the names that are not a token's, such as local, and those with a
// colon, cannot be taken.
func validName(name string) bool {
	return regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`).MatchString(name) && name != fileName && name != "local"
}
