// Package publish lets programs of this host connect to ports of guests, which
// have no network: it listens on loopback, and passes what comes on through a
// function that reaches the guest.
//
// Nothing of it is kept: what was published ends with the Ports, or before that
// with its owner.
package publish

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
)

// The bounds of publications.
const (
	// MaxOfOwner is how many ports one owner may have published.
	MaxOfOwner = 32
	// MaxTotal is how many there are in all.
	MaxTotal = 1024
	// MaxConns is how many connections one has at a time.
	MaxConns = 64
)

// minPort is the lowest port of this host that can be asked for: those below are
// for its own services, and a daemon that runs as root could take them.
const minPort = 1024

// Publication is a guest's port and where on this host it is.
type Publication struct {
	GuestPort int
	HostPort  int
	Address   string // "127.0.0.1:43121"
}

// Ports are the publications of one process. It is safe for concurrent use. The
// zero value is none: see New.
type Ports struct {
	logger *slog.Logger
	work   sync.WaitGroup // listeners that are ending

	mu     sync.Mutex
	open   map[key]*Listener
	closed bool
}

type key struct {
	owner string
	port  int // the guest's
}

// New returns Ports without a publication. The caller must Close it. logger may
// be nil.
func New(logger *slog.Logger) *Ports {
	return &Ports{logger: logger, open: map[key]*Listener{}}
}

// Publish listens on a port of this host, from 1024 on, or on a free one if
// hostPort is 0, for a port of a guest. Each guest port of an owner has one publication.
func (p *Ports) Publish(ctx context.Context, owner string, guestPort, hostPort int, connect Connect) (Publication, error) {
	if guestPort < 1 || guestPort > maxPort {
		return Publication{}, fmt.Errorf("%w: guest port %d is none of 1 to %d", errdef.ErrInvalid, guestPort, maxPort)
	}
	if hostPort != 0 && (hostPort < minPort || hostPort > maxPort) {
		return Publication{}, fmt.Errorf("%w: host port %d is neither 0 nor %d to %d", errdef.ErrInvalid, hostPort, minPort, maxPort)
	}
	k := key{owner, guestPort}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.roomLocked(k); err != nil {
		return Publication{}, err
	}
	l, err := Listen(ctx, hostPort, MaxConns, connect, p.logger)
	if err != nil {
		return Publication{}, err
	}
	p.open[k] = l
	return publicationOf(k, l), nil
}

func (p *Ports) roomLocked(k key) error {
	if p.closed {
		return fmt.Errorf("%w: publications are closed", errdef.ErrUnavailable)
	}
	if l, ok := p.open[k]; ok {
		return fmt.Errorf("port %d of %s: %w: it is published at %s", k.port, k.owner, errdef.ErrExists, l.Address())
	}
	if n := len(p.open); n >= MaxTotal {
		return fmt.Errorf("%w: %d ports are published", errdef.ErrExhausted, n)
	}
	if n := len(p.ofLocked(k.owner)); n >= MaxOfOwner {
		return fmt.Errorf("%w: %s has %d ports published", errdef.ErrExhausted, k.owner, n)
	}
	return nil
}

func (p *Ports) ofLocked(owner string) []Publication {
	all := []Publication{}
	for k, l := range p.open {
		if k.owner == owner {
			all = append(all, publicationOf(k, l))
		}
	}
	slices.SortFunc(all, func(a, b Publication) int { return cmp.Compare(a.GuestPort, b.GuestPort) })
	return all
}

func publicationOf(k key, l *Listener) Publication {
	return Publication{GuestPort: k.port, HostPort: l.Port(), Address: l.Address()}
}

// List lists the publications of an owner, by the guest's port.
func (p *Ports) List(owner string) []Publication {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ofLocked(owner)
}

// Remove ends a publication and its connections.
func (p *Ports) Remove(owner string, guestPort int) error {
	k := key{owner, guestPort}
	p.mu.Lock()
	l, ok := p.open[k]
	delete(p.open, k)
	p.mu.Unlock()
	if !ok {
		return fmt.Errorf("published port %d of %s: %w", guestPort, owner, errdef.ErrNotFound)
	}
	return l.Close()
}

// End ends all publications of an owner, and does not wait.
func (p *Ports) End(owner string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k, l := range p.open {
		if k.owner == owner {
			delete(p.open, k)
			l.End()
			p.work.Go(func() { _ = l.Close() }) // it never fails
		}
	}
}

// Close ends all publications, and waits until nothing of them is left.
func (p *Ports) Close() error {
	p.mu.Lock()
	p.closed = true
	open := p.open
	p.open = nil
	p.mu.Unlock()
	for _, l := range open {
		l.End()
	}
	for _, l := range open {
		_ = l.Close() // it never fails
	}
	p.work.Wait()
	return nil
}
