package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/relink"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// agentPort is where the agent listens on a guest's vsock.
const agentPort = 10789

// bareFirecracker is Firecracker by hand: with the command line that Tine uses,
// and the requests that make a machine as Tine's are.
type bareFirecracker struct {
	dirs   *dirs
	files  files
	recipe recipe
}

// files are the paths of what machines are made of.
type files struct{ kernel, initrd, root, device, memory string }

func (*bareFirecracker) name() string { return "Firecracker" }

// boot tells a Firecracker what its machine is, and lets it run. Every machine
// that was booted can be frozen.
func (b *bareFirecracker) boot(ctx context.Context, _ bool) (*process, error) {
	c := b.recipe.config
	return b.raised(ctx, map[string]string{
		c.BootSource.Kernel: b.files.kernel, c.BootSource.Initrd: b.files.initrd, b.recipe.root(): b.files.root,
	}, func(ctx context.Context, client *api.Client) error { return b.recipe.boot(ctx, client) })
}

// Names in the directory of a bare Firecracker, beside those of the recipe.
const (
	loadedState  = "load.device"
	loadedMemory = "load.memory"
	savedState   = "saved.device"
	savedMemory  = "saved.memory"
	// nowhere is a place where no file can be made.
	nowhere = "nowhere/memory"
)

// restore starts a fork and loads it.
func (b *bareFirecracker) restore(ctx context.Context) (*process, error) {
	return b.load(ctx, false)
}

// load is restore, with the pages tracked that the guest writes to or not.
func (b *bareFirecracker) load(ctx context.Context, tracked bool) (*process, error) {
	how := api.Load{State: loadedState, Mem: loadedMemory, Resume: true, TrackDirtyPages: tracked}
	return b.raised(ctx, map[string]string{
		loadedState: b.files.device, loadedMemory: b.files.memory, b.recipe.root(): b.files.root,
	}, func(ctx context.Context, client *api.Client) error { return client.LoadSnapshot(ctx, how) })
}

// raised starts a Firecracker in a directory with links to files, by their names
// in it, and tells it what to do.
func (b *bareFirecracker) raised(ctx context.Context, links map[string]string, tell func(context.Context, *api.Client) error) (_ *process, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	dir, err := b.dirs.make()
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return os.RemoveAll(dir) })
	for name, path := range links {
		if path, err = filepath.Abs(path); err == nil {
			err = os.Symlink(path, filepath.Join(dir, name))
		}
		if err != nil {
			return nil, err
		}
	}
	argv := b.recipe.named("tine-bench-floor")
	// Its end is process.end's business, not that of ctx.
	cmd := exec.CommandContext(context.WithoutCancel(ctx), argv[0], argv[1:]...)
	cmd.Dir = dir
	p, err := spawn(dir, cmd)
	if err != nil {
		return nil, err
	}
	u.Add(func() error { return p.end(ctx) })
	g := &firecrackerGrip{dir: dir, agent: b.recipe.config.Vsock.Path, gone: p.gone}
	if g.client, err = api.Dial(ctx, filepath.Join(dir, b.recipe.socket), p.gone); err != nil {
		return nil, p.explain(err)
	}
	p.grip = g
	return p, p.explain(tell(ctx, g.client))
}

// firecrackerGrip holds one Firecracker.
type firecrackerGrip struct {
	dir    string
	agent  string // the name of the socket of the guest's vsock
	gone   <-chan struct{}
	client *api.Client
	stream *relink.Stream // nil until it was dialled
	// reset: the guest will be told, when it runs, to drop the connections of its
	// vsock.
	reset bool
}

func (g *firecrackerGrip) dial(ctx context.Context) (_ io.ReadWriteCloser, err error) {
	g.stream, err = relink.Open(ctx, g.connect)
	if err != nil {
		return nil, err
	}
	return g.stream, nil
}

// connect tries once to get a connection to the agent.
func (g *firecrackerGrip) connect(ctx context.Context) (io.ReadWriteCloser, error) {
	conn, err := api.DialGuest(ctx, filepath.Join(g.dir, g.agent), agentPort)
	if err == nil {
		return conn, nil
	}
	select {
	case <-g.gone:
		return nil, fmt.Errorf("%w: %w", relink.ErrGone, err)
	default:
		return nil, err
	}
}

// park pauses the machine. A guest of 1.16 that has not been saved meanwhile may
// hear no more of its vsock afterwards, which is mended in what is to be 1.17; to
// save it now is not to do so when it is resumed.
func (g *firecrackerGrip) park(ctx context.Context) error {
	err := g.client.Pause(ctx)
	if v := g.client.Version(); err == nil && v.Major == 1 && v.Minor == 16 && v.Patch <= 1 {
		err = errors.Join(g.saveDevice(ctx), g.forget())
	}
	return err
}

func (g *firecrackerGrip) resume(ctx context.Context) error {
	if err := g.client.Resume(ctx); err != nil {
		return err
	}
	return g.reconnect(ctx)
}

// reconnect sees to the stream of a machine that runs again: the guest has dropped
// it without a word if the machine was saved.
func (g *firecrackerGrip) reconnect(ctx context.Context) error {
	if !g.reset || g.stream == nil {
		return nil
	}
	g.reset = false
	return g.stream.Reconnect(ctx)
}

// freeze pauses the machine and writes its memory and its device state.
func (g *firecrackerGrip) freeze(ctx context.Context) error {
	if err := g.client.Pause(ctx); err != nil {
		return err
	}
	return g.save(ctx, api.Snapshot{Type: api.Full, Mem: savedMemory})
}

// save writes a snapshot of a paused machine.
func (g *firecrackerGrip) save(ctx context.Context, s api.Snapshot) error {
	s.State, g.reset = savedState, true
	return g.client.CreateSnapshot(ctx, s)
}

// saveDevice has the machine's memory written where no file can be made, which is
// to have its device state and no more.
func (g *firecrackerGrip) saveDevice(ctx context.Context) error {
	err := g.save(ctx, api.Snapshot{Type: api.Full, Mem: nowhere})
	if err == nil {
		return fmt.Errorf("%w: Firecracker has found %s", errdef.ErrConflict, nowhere)
	}
	if refused, ok := errors.AsType[*api.Error](err); ok && strings.Contains(refused.Message, "open on the memory backing file") {
		return nil
	}
	return err
}

// forget removes what was saved.
func (g *firecrackerGrip) forget() error {
	return errors.Join(removeIfExists(filepath.Join(g.dir, savedState)), removeIfExists(filepath.Join(g.dir, savedMemory)))
}

func (g *firecrackerGrip) release() { _ = g.client.Close() } // it ended with the process
