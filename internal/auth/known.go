package auth

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/tinevm/tine/internal/errdef"
)

// Known is what can be told of a credential to whoever may not use it.
type Known struct {
	// Digest changes whenever anything of the credential does, and does not
	// help to guess it.
	Digest string
	// About says in words what it may do.
	About string
}

// Known returns the credentials that are accepted now, by name: those of the
// store and that of the token file. It reports false when they could not be
// read, so that nobody knows what there is.
func (g *Guard) Known() (map[string]Known, bool) {
	g.refresh()
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known, g.known != nil
}

// noteKnown is called with mu held, after a reading of what is accepted.
func (g *Guard) noteKnown(records []Record, err error) {
	if err != nil {
		return // what was known before is still what is accepted
	}
	known := map[string]Known{}
	for _, r := range records {
		known[r.Name] = r.known()
	}
	for _, t := range g.fileToken {
		known[t.Name] = Known{Digest: digest(t.hash[:]), About: "the token of the token file"}
	}
	g.known = known
}

func (r Record) known() Known {
	data, _ := json.Marshal(r) // what was read as JSON can be written
	about := "scope " + string(r.Scope)
	if r.MaxSandboxes > 0 {
		about += ", at most " + strconv.Itoa(r.MaxSandboxes) + " sandboxes"
	}
	if r.MaxMemoryMiB > 0 {
		about += ", at most " + strconv.Itoa(r.MaxMemoryMiB) + " MiB of memory"
	}
	if r.MaxCPUs > 0 {
		about += ", at most " + strconv.FormatFloat(r.MaxCPUs, 'f', -1, 64) + " cores"
	}
	if r.Sign {
		about += ", signs"
	}
	return Known{Digest: digest(data), About: about}
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Create is Create, of this guard's store. The token is good at once.
func (g *Guard) Create(ctx context.Context, r Record) (Record, string, error) {
	if err := g.hasStore(); err != nil {
		return Record{}, "", err
	}
	made, secret, err := Create(ctx, g.cfg.Store, r)
	if err == nil {
		g.Reload()
	}
	return made, secret, err
}

// Remove is Remove, of this guard's store. The token is refused at once.
func (g *Guard) Remove(ctx context.Context, name string) error {
	if err := g.hasStore(); err != nil {
		return err
	}
	err := Remove(ctx, g.cfg.Store, name)
	if err == nil {
		g.Reload()
	}
	return err
}

// List is List, of this guard's store.
func (g *Guard) List() ([]Record, error) {
	if err := g.hasStore(); err != nil {
		return nil, err
	}
	return List(g.cfg.Store)
}

// hasStore: a daemon that asks nobody who they are, and so has no guard, has no
// store either.
func (g *Guard) hasStore() error {
	if g == nil || g.cfg.Store == "" {
		return fmt.Errorf("%w: this daemon has no named tokens", errdef.ErrUnsupported)
	}
	return nil
}
