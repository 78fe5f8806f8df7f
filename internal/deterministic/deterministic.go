// Package deterministic runs commands so that the outcome is a function of the
// snapshot and the input, and of nothing else: neither of the host, nor of its
// load, nor of the hour.
//
// Its snapshots are of deterministic machines (vmm.Machine.Deterministic),
// frozen at a rendezvous: the guest's agent has stopped the machine itself and
// waits for a job in the mailbox. Such a snapshot can be made again from the
// same image and warm-up, byte for byte, so it is itself checked by making it
// again. A run restores it, puts the job into the mailbox, and lets it go from
// letter to letter until the job is done. Nothing but answers to what the guest
// has asked for enters it, and its clock stands still meanwhile.
//
// It trusts nothing that a guest has put into the mailbox. It knows nothing of
// sandboxes, and does not sign or keep what it finds out: see package record.
// docs/deterministic.md has what is promised, and the numbers.
package deterministic

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// DefaultShift is the clock shift of snapshots for which none was asked: with
// it a guest's clock goes about as fast as the work that it does here.
const DefaultShift = 2

// Config is what a Runner needs.
type Config struct {
	// Dir is a directory of its own, which it creates when it is missing. Its
	// path must be short: see vmm.Common.
	Dir string
	// Engine must have vmm.Caps.Deterministic; a Runner of one that has not
	// refuses everything with errdef.ErrUnsupported.
	Engine    vmm.Engine
	Snapshots *snapshot.Store
	Images    *image.Store
	// Machine is the shape of new snapshots where nothing else is asked for.
	// Zero fields have defaults.
	Machine vmm.Machine
	// Parallel is how many machines run at once; others wait. 0 is the number
	// of processors.
	Parallel int
	// BootTime bounds the boot of a template, and WarmupTime each of its
	// warm-up commands, by the host's clock. Zero fields have defaults.
	BootTime, WarmupTime time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

const (
	defaultMemoryMiB  = 256
	defaultBootTime   = 2 * time.Minute
	defaultWarmupTime = 10 * time.Minute
)

// Runner makes deterministic snapshots and runs commands in them. It is safe
// for concurrent use, and several processes may use one directory.
type Runner struct {
	cfg   Config
	log   *slog.Logger
	slots *semaphore.Weighted

	mu     sync.Mutex
	closed bool
	work   sync.WaitGroup
}

// New returns a runner, and removes what dead ones left in its directory.
func New(cfg Config) (*Runner, error) {
	if cfg.Dir == "" || cfg.Engine == nil || cfg.Snapshots == nil || cfg.Images == nil {
		return nil, fmt.Errorf("%w: deterministic runner: its configuration is incomplete", errdef.ErrInvalid)
	}
	cfg.setDefaults()
	r := &Runner{cfg: cfg, log: cfg.Logger, slots: semaphore.NewWeighted(int64(cfg.Parallel))}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("deterministic runner: %w", err)
	}
	if err := r.sweep(); err != nil {
		return nil, fmt.Errorf("deterministic runner: %w", err)
	}
	return r, nil
}

func (c *Config) setDefaults() {
	if c.Parallel <= 0 {
		c.Parallel = runtime.NumCPU()
	}
	if c.Machine.MemoryMiB == 0 {
		c.Machine.MemoryMiB = defaultMemoryMiB
	}
	if c.BootTime <= 0 {
		c.BootTime = defaultBootTime
	}
	if c.WarmupTime <= 0 {
		c.WarmupTime = defaultWarmupTime
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Close refuses new work and waits for what there is.
func (r *Runner) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.work.Wait()
}

// begin takes a place among those that work, and gives it back by done.
func (r *Runner) begin() (done func(), err error) {
	if !r.cfg.Engine.Caps().Deterministic {
		err = fmt.Errorf("%w: engine %s has no deterministic machines", errdef.ErrUnsupported, r.cfg.Engine.Name())
		return nil, errdef.WithHint(err, "QEMU's software emulation has: --engine qemu-tcg")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, fmt.Errorf("%w: the deterministic runner is stopping", errdef.ErrUnavailable)
	}
	r.work.Add(1)
	return r.work.Done, nil
}

const seatPrefix = "m-"

// seat is a directory for one machine, locked for as long as this process, or
// the machine, is there.
type seat struct {
	dir  string
	lock *os.File
}

func (r *Runner) newSeat() (seat, error) {
	dir, err := os.MkdirTemp(r.cfg.Dir, seatPrefix)
	if err != nil {
		return seat{}, err
	}
	lock, err := lockSeat(dir)
	if err != nil {
		return seat{}, errors.Join(err, os.RemoveAll(dir))
	}
	return seat{dir: dir, lock: lock}, nil
}

func lockSeat(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err = durable.TryLockFile(f, false); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (s seat) remove() error { return errors.Join(os.RemoveAll(s.dir), durable.Unlock(s.lock)) }

// sweep removes the seats that nobody holds.
func (r *Runner) sweep() error {
	entries, err := os.ReadDir(r.cfg.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), seatPrefix) {
			continue
		}
		dir := filepath.Join(r.cfg.Dir, e.Name())
		lock, err := lockSeat(dir)
		if errors.Is(err, errdef.ErrConflict) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err = (seat{dir: dir, lock: lock}).remove(); err != nil {
			return err
		}
	}
	return nil
}

// kill ends a machine, whatever has become of ctx.
func kill(ctx context.Context, vm vmm.VM) error {
	const patience = 10 * time.Second
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	return vm.Kill(ctx)
}
