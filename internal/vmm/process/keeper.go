package process

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmm"
)

// Keeper is where the processes of one engine live. It is safe for concurrent use.
type Keeper struct {
	// Engine is the name of the engine, for handles, and Monitor what its processes
	// are called in errors.
	Engine, Monitor string
	// Jail is where processes are, nil for no jail. Close closes it.
	Jail *jail.Jail
	// Logger is not nil.
	Logger *slog.Logger
}

// Caps adds what the jail has to the abilities of an engine.
func (k *Keeper) Caps(caps vmm.Caps) vmm.Caps {
	if k.Jail == nil {
		caps.JailLacks = []string{"everything: monitors run as the daemon's user"}
		return caps
	}
	level := k.Jail.Level()
	caps.Jail, caps.Net, caps.JailLacks = true, level.NoLink == nil, level.Missing
	caps.Limits = vmm.LimitSupport{Memory: level.Groups.Memory, CPU: level.Groups.CPU, PIDs: level.Groups.PIDs, IO: level.Groups.IO}
	return caps
}

// FirstFile is the descriptor that the first of Launch.Files has in the process.
func (k *Keeper) FirstFile() int {
	if k.Jail != nil {
		return jail.FirstFile
	}
	return 3 // behind the standard streams
}

// TakeCell takes a cell for a machine, with a network if it has a card. Without a
// jail there is none, and no network.
func (k *Keeper) TakeCell(ctx context.Context, net bool) (*jail.Cell, error) {
	switch {
	case k.Jail == nil && !net:
		return nil, nil
	case k.Jail == nil:
		return nil, noNetwork(errors.New("a machine without a jail"))
	case net && k.Jail.Level().NoLink != nil:
		return nil, noNetwork(k.Jail.Level().NoLink)
	}
	return k.Jail.Take(ctx, net)
}

func noNetwork(why error) error {
	return errdef.WithHint(fmt.Errorf("%w: a network card: %w", errdef.ErrUnsupported, why), "tine doctor says what this host lacks for it")
}

// Adopt takes over the process that an earlier daemon has left behind, and returns
// errdef.ErrNotFound when it is not there any more.
func (k *Keeper) Adopt(handle vmm.Handle, hooks Hooks) (*Process, error) {
	boot, err := linux.BootID()
	if err != nil {
		return nil, err
	}
	if handle.Engine != k.Engine || handle.BootID != boot {
		return nil, fmt.Errorf("%w: machine in %s", errdef.ErrNotFound, handle.Dir)
	}
	found, err := linux.OpenProcess(handle.PID, handle.StartTime)
	if err != nil {
		return nil, fmt.Errorf("adopt machine in %s: %w", handle.Dir, err)
	}
	release := func() {}
	if k.Jail != nil && len(handle.Link) > 0 {
		release = k.Jail.Adopt()
	}
	return k.watch(handle, &adopted{p: found, release: release}, k.group(handle), hooks), nil
}

// group finds the control group of a process that an earlier daemon started.
func (k *Keeper) group(handle vmm.Handle) *cgroup.Group {
	if k.Jail == nil || handle.Group == "" {
		return nil
	}
	group, err := k.Jail.Group(handle.PID, handle.Group)
	if err != nil {
		k.Logger.Warn("control group of a machine is not there", "group", handle.Group, "error", err)
		return nil
	}
	return group
}

// Sweep removes the control groups of processes that are no more.
func (k *Keeper) Sweep(ctx context.Context) error {
	if k.Jail == nil {
		return nil
	}
	return k.Jail.Sweep(ctx)
}

// Close ends the launchers that wait for work.
func (k *Keeper) Close() error {
	if k.Jail == nil {
		return nil
	}
	return k.Jail.Close()
}

// adopted is a process that an earlier daemon started.
type adopted struct {
	p       *linux.Process
	release func() // called when it has ended

	mu   sync.Mutex // no signal is sent through a descriptor that is closed
	over bool
}

// errUnwatched stands in for the exit status, which only a parent is told.
var errUnwatched = errors.New("it was started by an earlier daemon, so its exit status is not known")

func (a *adopted) wait() error {
	err := a.p.Wait(context.Background())
	a.release()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over = true
	return errors.Join(errUnwatched, err, a.p.Close())
}

func (a *adopted) kill() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return os.ErrProcessDone
	}
	return a.p.Signal(unix.SIGKILL)
}
