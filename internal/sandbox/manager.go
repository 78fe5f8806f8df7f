// Package sandbox runs sandboxes: it forks them from snapshots, keeps the
// record that outlives a daemon, and ends them when their time is up.
//
// It orchestrates and nothing more. Machines belong to vmm, what is said to a
// guest to guest, snapshots and images to their stores. Its invariants: a
// sandbox is handed out only after its guest has confirmed that it is unlike
// its siblings; whatever a failed step acquired is given back; and at every
// moment there is enough on disk for another process to find every machine.
// docs/formats/sandbox.md describes what is there.
package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// Limits bound what callers can ask for. A field that is zero has its default.
type Limits struct {
	// Sandboxes is how many may exist at once, parked ones included.
	Sandboxes int
	// Fork is the largest ForkRequest.N.
	Fork int
	// Starts is how many machines come up at the same time.
	Starts int
	// Branches is how many branches are taken or written at the same time.
	Branches int
	// Boot bounds the boot of a template, warm-up apart; Identity bounds the
	// time from a restore to its guest's confirmation.
	Boot, Identity time.Duration
	// Warmup bounds each warm-up command.
	Warmup time.Duration
}

// DefaultLimits are those of a small host.
func DefaultLimits() Limits {
	return Limits{
		Sandboxes: 1024,
		Fork:      1000,
		Starts:    max(2, runtime.NumCPU()), // more would all be late
		Branches:  4,
		Boot:      2 * time.Minute,
		Identity:  time.Minute,
		Warmup:    5 * time.Minute,
	}
}

// Config is what a Manager works with.
type Config struct {
	// Dir holds one directory for each sandbox. Sockets lie in it, so its path
	// has to be short.
	Dir       string
	Engine    vmm.Engine
	Snapshots *snapshot.Store
	Images    *image.Store
	// KeepBranches is how many branches that nobody named are kept of each
	// sandbox; zero: all.
	KeepBranches int
	// Freezer makes the copy-on-write twins of live branches. Without a command
	// there are none.
	Freezer guestmem.Freezer
	// Events are told what happens to sandboxes and snapshots; nil: nobody is.
	Events *Events
	// Logger may be nil.
	Logger *slog.Logger
	Limits Limits
	// Net bounds what sandboxes may reach.
	Net NetConfig
	// Machine is the shape of templates that do not ask for one; zero fields
	// are 256 MiB and one CPU.
	Machine vmm.Machine
	// Ephemeral sandboxes die with this process. Otherwise they outlive it,
	// and the next Manager on Dir adopts them; there must be only one such
	// Manager at a time.
	Ephemeral bool
}

// withDefaults fills in what cfg leaves open.
func (cfg Config) withDefaults() (Config, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	l, d := &cfg.Limits, DefaultLimits()
	l.Sandboxes, l.Fork = cmp.Or(l.Sandboxes, d.Sandboxes), cmp.Or(l.Fork, d.Fork)
	l.Starts = max(cmp.Or(l.Starts, d.Starts), 1)
	l.Branches = max(cmp.Or(l.Branches, d.Branches), 1)
	l.Boot, l.Identity = cmp.Or(l.Boot, d.Boot), cmp.Or(l.Identity, d.Identity)
	l.Warmup = cmp.Or(l.Warmup, d.Warmup)
	cfg.Machine.MemoryMiB = cmp.Or(cfg.Machine.MemoryMiB, 256)
	cfg.Machine.VCPUs = cmp.Or(cfg.Machine.VCPUs, 1)
	dir, err := filepath.Abs(cfg.Dir) // records and machines outlive our working directory
	if err != nil {
		return cfg, fmt.Errorf("sandbox directory %s: %w", cfg.Dir, err)
	}
	cfg.Dir = dir
	return cfg, nil
}

// Manager runs the sandboxes of one engine. It is safe for concurrent use.
type Manager struct {
	Config

	self        process         // the owner of ephemeral sandboxes
	starts      chan struct{}   // a token for each machine that is coming up
	branchSlots chan struct{}   // a token for each branch that is under way
	ctx         context.Context // ends when Close begins
	stop        context.CancelCauseFunc
	calls       sync.WaitGroup // what begin has let in, and the fillers of pools
	lives       sync.WaitGroup // of sandboxes
	outlets     outlets

	// mu may be held while a box's own is taken, never the other way round.
	mu       sync.Mutex
	boxes    map[string]*box
	pools    map[string]*pool       // by snapshot digest
	held     int                    // sandboxes being made or there
	branches map[string]BranchState // by tag: under way, and failed with nobody told
	warmth   map[string]int64       // by digest: how many bytes of layers forks have copied
}

var errClosed = fmt.Errorf("%w: the daemon is stopping", errdef.ErrUnavailable)

// NewManager makes a Manager and takes over what an earlier one left in
// cfg.Dir: it adopts the machines that still run and clears away the rest.
func NewManager(ctx context.Context, cfg Config) (*Manager, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err = os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make sandbox directory: %w", err)
	}
	m := &Manager{
		Config:      cfg,
		starts:      make(chan struct{}, cfg.Limits.Starts),
		branchSlots: make(chan struct{}, cfg.Limits.Branches),
		boxes:       map[string]*box{},
		pools:       map[string]*pool{},

		branches: map[string]BranchState{},
		warmth:   map[string]int64{},
	}
	if m.self, err = thisProcess(); err != nil {
		return nil, err
	}
	m.ctx, m.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	if err = m.recover(ctx); err != nil {
		return nil, errors.Join(err, m.Close(ctx))
	}
	return m, nil
}

// Close ends the Manager: calls under way fail, and it waits for them. Then
// parked forks end, and the sandboxes too when they are ephemeral; the others
// run on. ctx bounds the wait for the end of each machine.
func (m *Manager) Close(ctx context.Context) error {
	m.mu.Lock() // so that no call begins after calls.Wait
	m.stop(errClosed)
	m.mu.Unlock()
	m.calls.Wait()
	boxes := m.all()
	errs := make([]error, len(boxes))
	var wg sync.WaitGroup
	for i, b := range boxes {
		wg.Go(func() {
			if m.Ephemeral || !b.listed() {
				errs[i] = b.order(ctx, end)
			}
			errs[i] = errors.Join(errs[i], b.order(context.WithoutCancel(ctx), leave))
		})
	}
	wg.Wait()
	m.lives.Wait()
	return errors.Join(errs...)
}

// begin lets a call in, unless the Manager is closing. The context that it
// returns ends with the Manager too; the caller must call done.
func (m *Manager) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return nil, nil, errClosed
	}
	m.calls.Add(1)
	ctx, cancel := join(ctx, m.ctx)
	return ctx, func() { cancel(); m.calls.Done() }, nil
}

// join returns a context of ctx that ends with other too, with its cause.
func join(ctx, other context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(other, func() { cancel(context.Cause(other)) })
	return ctx, func() { stop(); cancel(nil) }
}

// Get returns what is known of a sandbox.
func (m *Manager) Get(id string) (Info, error) {
	b, err := m.find(id)
	if err != nil {
		return Info{}, err
	}
	return b.info(), nil
}

// List returns all sandboxes, oldest first.
func (m *Manager) List() []Info {
	boxes := m.all()
	list := make([]Info, 0, len(boxes))
	for _, b := range boxes {
		if b.listed() {
			list = append(list, b.info())
		}
	}
	slices.SortFunc(list, func(a, b Info) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), strings.Compare(a.ID, b.ID))
	})
	return list
}

// Kill ends a sandbox and removes it. When that fails the sandbox is still
// there, for another try.
func (m *Manager) Kill(ctx context.Context, id string) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	return b.order(ctx, end)
}

// With runs f with a session to the sandbox's agent. While f runs the sandbox
// is not idle. All callers share one session; one that broke is replaced. The
// context that f is given ends with the sandbox too.
func (m *Manager) With(ctx context.Context, id string, f func(context.Context, *guest.Client) error) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	unuse, err := b.use()
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", id, err)
	}
	defer unuse()
	ctx, cancel := join(ctx, b.ctx)
	defer cancel()
	c, err := b.session(ctx)
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", id, err)
	}
	if err = f(ctx, c); err != nil && c.Err() != nil {
		return b.explain(err)
	}
	return err
}

// Memory says what a sandbox costs its host just now, in bytes: what vanishes
// with it, and page cache that others use too.
func (m *Manager) Memory(id string) (private, shared int64, err error) {
	b, err := m.find(id)
	if err != nil {
		return 0, 0, err
	}
	if b.ctx.Err() != nil { // its pid may be another process by now
		return 0, 0, fmt.Errorf("sandbox %s: %w", id, context.Cause(b.ctx))
	}
	vm := b.machine()
	if vm == nil {
		return 0, 0, nil
	}
	use, err := linux.MemoryUse(vm.PID())
	if err != nil {
		return 0, 0, fmt.Errorf("sandbox %s: %w", id, err)
	}
	return use.Private, use.Shared, nil
}

func (m *Manager) find(id string) (*box, error) {
	m.mu.Lock()
	b, ok := m.boxes[id]
	m.mu.Unlock()
	switch {
	case m.ctx.Err() != nil:
		return nil, fmt.Errorf("sandbox %s: %w", id, errClosed)
	case !ok || !b.listed():
		return nil, fmt.Errorf("sandbox %s: %w", id, errdef.ErrNotFound)
	}
	return b, nil
}

// all returns the boxes that there are, parked ones too.
func (m *Manager) all() []*box {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Values(m.boxes))
}

// hold takes n places for sandboxes; drop gives one back.
func (m *Manager) hold(n int) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.holdLocked(n)
}

func (m *Manager) holdLocked(n int) error {
	if m.held+n > m.Limits.Sandboxes {
		err := fmt.Errorf("%w: %d of %d sandboxes exist, %d more asked for", errdef.ErrExhausted, m.held, m.Limits.Sandboxes, n)
		return errdef.WithHint(err, "remove some with tine rm, or raise --max-sandboxes")
	}
	m.held += n
	return nil
}

func (m *Manager) drop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held--
}

// admit lists a sandbox that has a place and starts its life.
func (m *Manager) admit(b *box) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ctx.Err() != nil {
		return errClosed
	}
	m.boxes[b.id] = b
	m.lives.Go(b.live)
	return nil
}

// remove ends the listing of a sandbox and gives its place back.
func (m *Manager) remove(b *box) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.boxes, b.id)
	m.held--
}

// enter lets at most Limits.Starts machines come up at once.
func (m *Manager) enter(ctx context.Context) (leave func(), err error) {
	select {
	case m.starts <- struct{}{}:
		return func() { <-m.starts }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (m *Manager) dir(id string) string { return filepath.Join(m.Dir, id) }
