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

// Host is where the processes of one engine live. It is safe for concurrent use.
type Host struct {
	// Engine is the name of the engine, for handles, and Monitor what its processes
	// are called in errors.
	Engine, Monitor string
	// Jail is where processes are, nil for no jail. Close closes it.
	Jail *jail.Jail
	// Logger is not nil.
	Logger *slog.Logger
}

// Caps adds what the jail has to the abilities of an engine.
func (h *Host) Caps(caps vmm.Caps) vmm.Caps {
	if h.Jail == nil {
		caps.JailLacks = []string{"everything: monitors run as the daemon's user"}
		return caps
	}
	level := h.Jail.Level()
	caps.Jail, caps.Net, caps.JailLacks = true, level.NoLink == nil, level.Missing
	caps.Limits = vmm.LimitSupport{Memory: level.Groups.Memory, CPU: level.Groups.CPU, PIDs: level.Groups.PIDs, IO: level.Groups.IO}
	return caps
}

// FirstFile is the descriptor that the first of Launch.Files has in the process.
func (h *Host) FirstFile() int {
	if h.Jail != nil {
		return jail.FirstFile
	}
	return 3 // behind the standard streams
}

// TakeCell takes a cell for a machine, with a network if it has a card. Without a
// jail there is none, and no network.
func (h *Host) TakeCell(ctx context.Context, net bool) (*jail.Cell, error) {
	switch {
	case h.Jail == nil && !net:
		return nil, nil
	case h.Jail == nil:
		return nil, noNetwork(errors.New("a machine without a jail"))
	case net && h.Jail.Level().NoLink != nil:
		return nil, noNetwork(h.Jail.Level().NoLink)
	}
	return h.Jail.Take(ctx, net)
}

func noNetwork(why error) error {
	return errdef.WithHint(fmt.Errorf("%w: a network card: %w", errdef.ErrUnsupported, why), "tine doctor says what this host lacks for it")
}

// Adopt takes over the process that an earlier daemon has left behind, and returns
// errdef.ErrNotFound when it is not there any more.
func (h *Host) Adopt(handle vmm.Handle, hooks Hooks) (*Process, error) {
	boot, err := linux.BootID()
	if err != nil {
		return nil, err
	}
	if handle.Engine != h.Engine || handle.BootID != boot {
		return nil, fmt.Errorf("%w: machine in %s", errdef.ErrNotFound, handle.Dir)
	}
	found, err := linux.OpenProcess(handle.PID, handle.StartTime)
	if err != nil {
		return nil, fmt.Errorf("adopt machine in %s: %w", handle.Dir, err)
	}
	release := func() {}
	if h.Jail != nil && len(handle.Link) > 0 {
		release = h.Jail.Adopt()
	}
	return h.watch(handle, &adopted{p: found, release: release}, h.group(handle), hooks), nil
}

// group finds the control group of a process that an earlier daemon started.
func (h *Host) group(handle vmm.Handle) *cgroup.Group {
	if h.Jail == nil || handle.Group == "" {
		return nil
	}
	group, err := h.Jail.Group(handle.PID, handle.Group)
	if err != nil {
		h.Logger.Warn("control group of a machine is not there", "group", handle.Group, "error", err)
		return nil
	}
	return group
}

// Sweep removes the control groups of processes that are no more.
func (h *Host) Sweep(ctx context.Context) error {
	if h.Jail == nil {
		return nil
	}
	return h.Jail.Sweep(ctx)
}

// Close ends the launchers that wait for work.
func (h *Host) Close() error {
	if h.Jail == nil {
		return nil
	}
	return h.Jail.Close()
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
