package api_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// firecrackerEnv names a real Firecracker.
const firecrackerEnv = "TINE_FIRECRACKER"

// firecracker starts a real one, and returns where it listens and when it ends.
func firecracker(t *testing.T) (socket string, died <-chan struct{}) {
	t.Helper()
	program := os.Getenv(firecrackerEnv)
	if program == "" {
		t.Skipf("NOT TRIED with a real Firecracker: %s does not name one", firecrackerEnv)
	}
	socket = filepath.Join(t.TempDir(), "s")
	// Its own filter is for the C library and compiler of its official builds.
	cmd := exec.Command(program, "--api-sock", socket, "--no-seccomp")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
	})
	return socket, ended
}

func realClient(t *testing.T) (*api.Client, <-chan struct{}) {
	t.Helper()
	socket, died := firecracker(t)
	c, err := api.Dial(bounded(t), socket, died)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, died
}

// All that a Firecracker does without running a guest.
func TestFirecracker(t *testing.T) {
	t.Parallel()
	c, _ := realClient(t)
	ctx := bounded(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	since := func(f api.Feature) error { // nil, or what the client is to say
		if !c.Version().Has(f) {
			return errdef.ErrUnsupported
		}
		return nil
	}
	steps := []struct {
		name string
		err  error
		want error
	}{
		{"pause", c.Pause(ctx), errdef.ErrConflict},
		{"resume", c.Resume(ctx), errdef.ErrConflict},
		{"flush metrics", c.FlushMetrics(ctx), errdef.ErrConflict},
		{"snapshot", c.CreateSnapshot(ctx, api.Snapshot{Type: api.Diff, State: "s", Mem: "m"}), errdef.ErrConflict},
		{"move drive", c.MoveDrive(ctx, "a", file), errdef.ErrConflict},
		{"logger", c.PutLogger(ctx, api.Logger{Path: file, Level: "Debug"}), nil},
		{"logger, level", c.PutLogger(ctx, api.Logger{Level: "x"}), errdef.ErrInvalid},
		{"metrics", c.PutMetrics(ctx, file), nil},
		{"serial", c.PutSerial(ctx, file), since(api.SerialConfig)},
		{"machine", c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 2, MemMiB: 64, TrackDirtyPages: true, HugePages: api.HugePages2M}), nil},
		{"machine, CPUs", c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 33, MemMiB: 64}), errdef.ErrInvalid},
		{"machine, memory", c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 1, MemMiB: -1}), errdef.ErrInvalid},
		{"CPU", c.PutCPUConfig(ctx, []byte(`{"cpuid_modifiers":[]}`)), nil},
		{"CPU, field", c.PutCPUConfig(ctx, []byte(`{"x":[]}`)), errdef.ErrUnsupported},
		{"boot source", c.PutBootSource(ctx, api.BootSource{Kernel: file, Args: "quiet"}), nil},
		{"drive", c.PutDrive(ctx, api.Drive{ID: "a", Path: file, Cache: api.CacheWriteback, Engine: api.EngineSync}), nil},
		{"pmem", c.PutPmem(ctx, api.Pmem{ID: "b", Path: file, ReadOnly: true, Root: true}), since(api.PmemDevices)},
		{"vsock", c.PutVsock(ctx, api.Vsock{CID: 3, Path: filepath.Join(dir, "v")}), nil},
		{"entropy", c.PutEntropy(ctx), nil},
		{"load", c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m", TrackDirtyPages: true}), errdef.ErrConflict},
	}
	for _, s := range steps {
		if !errors.Is(s.err, s.want) {
			t.Errorf("%s: %v", s.name, s.err)
		}
	}
	m, err := c.MachineConfig(ctx)
	if want := (api.MachineConfig{VCPUs: 2, MemMiB: 64, TrackDirtyPages: true, HugePages: api.HugePages2M}); err != nil || m != want {
		t.Errorf("%+v, %v", m, err)
	}
	v, err := c.VMConfig(ctx)
	if err != nil || v.BootSource.Kernel != file || len(v.Drives) != 1 || v.Drives[0].Path != file || v.Vsock.CID != 3 || v.Entropy == nil {
		t.Errorf("%+v, %v", v, err)
	}
	i, err := c.Instance(ctx)
	if err != nil || i.State != api.NotStarted || i.Version != c.Version().String() {
		t.Errorf("%+v, %v", i, err)
	}
	if err = c.Start(ctx); err == nil {
		t.Error("it booted what is no kernel")
	}
}

// A load that fails ends the process, after the answer.
func TestFirecrackerEndsWhenItCannotLoad(t *testing.T) {
	t.Parallel()
	c, died := realClient(t)
	load := api.Load{State: filepath.Join(t.TempDir(), "none"), Mem: "m", TrackDirtyPages: true, Resume: true}
	if c.Version().Has(api.NetworkOverrides) {
		load.Networks = []api.NetworkOverride{{ID: "a", Tap: "b"}}
	}
	if c.Version().Has(api.VsockOverride) {
		load.Vsock = "v"
	}
	load.ClockRealtime = c.Version().Has(api.ClockRealtime)
	if err := fatal(c.LoadSnapshot(bounded(t), load)); err != nil {
		t.Errorf("got %v", err)
	}
	<-died
	if _, err := c.Instance(bounded(t)); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("got %v", err)
	}
}

func TestFirecrackerHasTenConnections(t *testing.T) {
	t.Parallel()
	socket, died := firecracker(t)
	c, err := api.Dial(bounded(t), socket, died)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for range 9 {
		conn, dialErr := net.Dial("unix", socket)
		if dialErr != nil {
			t.Fatal(dialErr)
		}
		defer conn.Close()
	}
	if _, err = api.Dial(bounded(t), socket, died); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("the 11th connection: %v", err)
	}
	if _, err = c.Instance(bounded(t)); err != nil {
		t.Errorf("the first one: %v", err)
	}
}
