package bench

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
	"github.com/tinevm/tine/internal/vmm/firecracker/apitest"
)

// TestMain makes this program a Firecracker, as far as the stand-in is one, when
// it is started like one. Bare monitors have no environment to tell it by.
func TestMain(m *testing.M) {
	if slices.Contains(os.Args, "--api-sock") {
		os.Exit(apitest.Main(os.Args[1:], apitest.Config{}, os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

func recipeOf(argv ...string) recipe {
	return recipe{argv: argv, socket: "api.sock", config: api.VMConfig{
		BootSource:    api.BootSource{Kernel: "kernel", Initrd: "initrd", Args: "quiet"},
		MachineConfig: api.MachineConfig{VCPUs: 1, MemMiB: 16},
		Pmem:          []api.Pmem{{ID: "root", Path: "root", ReadOnly: true}},
		Vsock:         &api.Vsock{CID: 3, Path: "agent.sock"},
		Entropy:       &struct{}{},
	}}
}

func TestNewRecipe(t *testing.T) {
	t.Parallel()
	r, err := newRecipe([]string{"/bin/fc", "--id", "tine-sb-1", "--api-sock", "api.sock"})
	if err != nil || r.socket != "api.sock" {
		t.Errorf("%+v, %v", r, err)
	}
	if got := r.named("x"); !slices.Equal(got, []string{"/bin/fc", "--id", "x", "--api-sock", "api.sock"}) || r.argv[2] != "tine-sb-1" {
		t.Errorf("named: %q, and it was %q", got, r.argv)
	}
	for name, argv := range map[string][]string{
		"none": {"/bin/fc"}, "no_value": {"/bin/fc", "--api-sock"}, "elsewhere": {"/bin/fc", "--api-sock", "/run/api.sock"},
		"above": {"/bin/fc", "--api-sock", ".."}, "empty": {},
	} {
		if _, err := newRecipe(argv); !errors.Is(err, errStrange) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

func TestRecipeThatCannotBeRepeated(t *testing.T) {
	t.Parallel()
	if err := recipeOf().check(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*api.VMConfig){
		"card":       func(c *api.VMConfig) { c.NetworkInterfaces = []api.NetworkInterface{{ID: "net"}} },
		"no_root":    func(c *api.VMConfig) { c.Pmem = nil },
		"disk_too":   func(c *api.VMConfig) { c.Drives = []api.Drive{{ID: "disk", Path: "disk"}} },
		"writable":   func(c *api.VMConfig) { c.Pmem[0].ReadOnly = false },
		"no_vsock":   func(c *api.VMConfig) { c.Vsock = nil },
		"no_entropy": func(c *api.VMConfig) { c.Entropy = nil },
		"absolute":   func(c *api.VMConfig) { c.BootSource.Kernel = "/kernel" },
		"below":      func(c *api.VMConfig) { c.Pmem[0].Path = "a/root" },
		"no_name":    func(c *api.VMConfig) { c.BootSource.Initrd = "" },
	} {
		r := recipeOf()
		spoil(&r.config)
		if err := r.check(); !errors.Is(err, errStrange) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// standIn is Firecracker by hand, with the stand-in in its place.
func standIn(t *testing.T) *bareFirecracker {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name string, size int64) string {
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(name), 0o600), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return &bareFirecracker{
		dirs: &dirs{root: t.TempDir()}, recipe: recipeOf(self, "--id", "x", "--api-sock", "api.sock", "--level", "Error"),
		files: files{kernel: file("kernel", 4096), initrd: file("initrd", 4096), root: file("root", 2<<20)},
	}
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func endLater(t *testing.T, p *process) {
	t.Helper()
	t.Cleanup(func() {
		if err := p.end(context.Background()); err != nil { //nolint:usetesting // t.Context has ended
			t.Error(err)
		}
		if _, err := os.Stat(p.dir); !os.IsNotExist(err) {
			t.Errorf("its directory is still there: %v", err)
		}
	})
}

func TestFirecrackerByHand(t *testing.T) {
	t.Parallel()
	ctx, b := bounded(t), standIn(t)
	template, err := b.boot(ctx, true)
	if err != nil {
		t.Fatal(err)
	}
	endLater(t, template)
	if err = template.freeze(ctx); err != nil {
		t.Fatal(err)
	}
	b.files.device, b.files.memory = filepath.Join(template.dir, savedState), filepath.Join(template.dir, savedMemory)
	fork, err := b.restore(ctx)
	if err != nil {
		t.Fatal(err)
	}
	endLater(t, fork)
	for range 2 {
		if err = errors.Join(fork.park(ctx), fork.resume(ctx)); err != nil {
			t.Error(err)
		}
	}
	if _, err = os.Stat(filepath.Join(fork.dir, savedState)); !os.IsNotExist(err) {
		t.Errorf("parking has left device state: %v", err)
	}
	s, err := newHandStill(ctx, b)
	if err != nil {
		t.Fatal(err)
	}
	endLater(t, s.p)
	for range 2 {
		if took, saveErr := s.save(ctx); saveErr != nil || took <= 0 {
			t.Errorf("saved in %v: %v", took, saveErr)
		}
	}
}

func TestFirecrackerThatDiesIsNoFork(t *testing.T) {
	t.Parallel()
	ctx, b := bounded(t), standIn(t)
	b.files.device, b.files.memory = b.files.kernel, b.files.kernel // it loads neither
	if _, err := b.restore(ctx); err == nil {
		t.Error("it has loaded what is no snapshot")
	}
	b.recipe.argv[0] = "/bin/false"
	if _, err := b.restore(ctx); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a program that ends at once: %v", err)
	}
	if left, err := os.ReadDir(b.dirs.root); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestWayThatDoesNotFit(t *testing.T) {
	t.Parallel()
	w := way{name: "x", where: t.TempDir()}
	if err := w.fits(0); err != nil {
		t.Error(err)
	}
	if err := w.fits(maxMemory << 10); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("error %v", err)
	}
}
