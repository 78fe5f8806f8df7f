package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"

	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// errRecipe: Firecracker runs a machine that no hand knows to repeat.
var errRecipe = fmt.Errorf("%w: Firecracker's machine", errStrange)

// recipe is how a Firecracker of Tine's was started, and what it says of its
// machine. All names in it are seen from the working directory.
type recipe struct {
	argv   []string
	socket string // of its interface
	config api.VMConfig
}

// learnFirecracker boots a machine through Tine and asks it what it is.
func learnFirecracker(ctx context.Context, t *tine) (_ monitor, err error) {
	switch m, host := t.snap.Manifest.Machine, t.d.Sandboxes.Engine.Caps().Host; {
	case m.Net:
		return nil, fmt.Errorf("%w: a network card", errRecipe)
	case m.DiskMiB > 0:
		return nil, fmt.Errorf("%w: a scratch disk", errRecipe)
	case host != nil && host.Template != "":
		return nil, fmt.Errorf("%w: a CPU template", errRecipe)
	}
	b, err := t.startVM(ctx, "")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.end(ctx)) }()
	argv, err := argsOf(ctx, b.vm.PID())
	if err != nil {
		return nil, err
	}
	r, err := newRecipe(argv)
	if err != nil {
		return nil, err
	}
	if r.config, err = askConfig(ctx, b.vm.Handle(), r.socket); err != nil {
		return nil, err
	}
	return &bareFirecracker{dirs: t.dirs, recipe: r, files: files{
		kernel: t.img.KernelPath(), initrd: t.img.InitrdPath(), root: t.img.RootPath(),
		device: t.snap.DevicePath(), memory: t.snap.MemoryPath(),
	}}, r.check()
}

// newRecipe finds the name of the socket in a command line.
func newRecipe(argv []string) (recipe, error) {
	i := slices.Index(argv, "--api-sock")
	if i < 1 || i+1 >= len(argv) || !local(argv[i+1]) {
		return recipe{}, fmt.Errorf("%w: no socket of its own", errRecipe)
	}
	return recipe{argv: argv, socket: argv[i+1]}, nil
}

// local is true of the name of a file in the working directory.
func local(name string) bool {
	return name != "" && name == filepath.Base(name) && filepath.IsLocal(name)
}

// askConfig asks a Firecracker of Tine's what its machine is, by a connection
// beside the engine's.
func askConfig(ctx context.Context, h vmm.Handle, socket string) (_ api.VMConfig, err error) {
	dial := func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(h.Dir, socket))
	}
	if h.Jailed {
		dir, openErr := jail.OpenDir(h.PID, h.StartTime)
		if openErr != nil {
			return api.VMConfig{}, openErr
		}
		defer func() { err = errors.Join(err, dir.Close()) }()
		dial = func(ctx context.Context) (net.Conn, error) { return dir.Dial(ctx, socket) }
	}
	client, err := api.New(ctx, dial, nil)
	if err != nil {
		return api.VMConfig{}, err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	return client.VMConfig(ctx)
}

// check refuses what the harness would leave out, or would not know by its name.
func (r recipe) check() error {
	c := r.config
	switch {
	case len(c.NetworkInterfaces) > 0:
		return fmt.Errorf("%w: a network card", errRecipe)
	case len(c.Pmem)+len(c.Drives) != 1:
		return fmt.Errorf("%w: %d devices of persistent memory and %d disks", errRecipe, len(c.Pmem), len(c.Drives))
	case len(c.Pmem) == 1 && !c.Pmem[0].ReadOnly || len(c.Drives) == 1 && !c.Drives[0].ReadOnly:
		return fmt.Errorf("%w: a root that can be written", errRecipe)
	case c.Vsock == nil || c.Entropy == nil:
		return fmt.Errorf("%w: no vsock, or no source of entropy", errRecipe)
	}
	for _, name := range []string{c.BootSource.Kernel, c.BootSource.Initrd, r.root(), c.Vsock.Path} {
		if !local(name) {
			return fmt.Errorf("%w: a file %q", errRecipe, name)
		}
	}
	return nil
}

// root is the name of the root image.
func (r recipe) root() string {
	if len(r.config.Pmem) > 0 {
		return r.config.Pmem[0].Path
	}
	return r.config.Drives[0].Path
}

// named returns the command line with another id.
func (r recipe) named(id string) []string {
	argv := slices.Clone(r.argv)
	if i := slices.Index(argv, "--id"); i >= 0 && i+1 < len(argv) {
		argv[i+1] = id
	}
	return argv
}

// boot makes a machine of the recipe and lets it run.
func (r recipe) boot(ctx context.Context, client *api.Client) error {
	c := r.config
	steps := []func() error{
		func() error { return client.PutMachineConfig(ctx, c.MachineConfig) },
		func() error { return client.PutBootSource(ctx, c.BootSource) },
	}
	for _, d := range c.Pmem {
		steps = append(steps, func() error { return client.PutPmem(ctx, d) })
	}
	for _, d := range c.Drives {
		steps = append(steps, func() error { return client.PutDrive(ctx, d) })
	}
	steps = append(steps,
		func() error { return client.PutVsock(ctx, *c.Vsock) },
		func() error { return client.PutEntropy(ctx) },
		func() error { return client.Start(ctx) },
	)
	for _, do := range steps {
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}
