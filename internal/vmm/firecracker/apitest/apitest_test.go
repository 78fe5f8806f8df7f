package apitest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// mainEnv makes this test binary a Firecracker of that version.
const mainEnv = "TINE_TEST_APITEST_VERSION"

func TestMain(m *testing.M) {
	if version := os.Getenv(mainEnv); version != "" {
		syscall.Exit(Main(os.Args[1:], Config{Version: version, Guest: echo}, os.Stdout, os.Stderr))
	}
	goleak.VerifyTestMain(m)
}

// echo is a guest that answers on port 1024.
func echo(port uint32) func(net.Conn) {
	if port != 1024 {
		return nil
	}
	return func(conn net.Conn) { _, _ = io.Copy(conn, conn) }
}

func client(t *testing.T, cfg Config) (*Server, *api.Client) {
	t.Helper()
	s, socket := New(t, cfg)
	c, err := api.Dial(bounded(t), socket, s.Done())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return s, c
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// boot starts a machine of 16 MiB with a vsock device at dir/v.
func boot(t *testing.T, c *api.Client, dir string) {
	t.Helper()
	ctx := bounded(t)
	kernel := filepath.Join(dir, "kernel")
	if err := os.WriteFile(kernel, []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 1, MemMiB: 16}),
		c.PutBootSource(ctx, api.BootSource{Kernel: kernel}),
		c.PutDrive(ctx, api.Drive{ID: "disk", Path: kernel}),
		c.PutVsock(ctx, api.Vsock{CID: 3, Path: filepath.Join(dir, "v")}),
		c.Start(ctx),
	); err != nil {
		t.Fatal(err)
	}
}

// refused wants an error with these words.
func refused(t *testing.T, what string, err error, words string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("%s: got %v, want %q", what, err, words)
	}
}

func TestAfterStart(t *testing.T) {
	t.Parallel()
	const late = "not supported after starting"
	for version, hotplugged := range map[string]string{"1.15.0": late, "1.16.1": "PCI is not enabled"} {
		s, c := client(t, Config{Version: version})
		dir := t.TempDir()
		boot(t, c, dir)
		ctx := bounded(t)
		if s.State() != api.Running {
			t.Errorf("it is %s", s.State())
		}
		kernel := filepath.Join(dir, "kernel")
		for what, err := range map[string]error{
			"start":   c.Start(ctx),
			"machine": c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 1, MemMiB: 16}),
			"boot":    c.PutBootSource(ctx, api.BootSource{Kernel: kernel}),
			"cpu":     c.PutCPUConfig(ctx, []byte("{}")),
			"vsock":   c.PutVsock(ctx, api.Vsock{CID: 3, Path: "x"}),
			"entropy": c.PutEntropy(ctx),
			"logger":  c.PutLogger(ctx, api.Logger{}),
			"metrics": c.PutMetrics(ctx, "x"),
			"serial":  c.PutSerial(ctx, "x"),
			"load":    c.LoadSnapshot(ctx, api.Load{State: "x", Mem: "y"}),
		} {
			refused(t, what, err, late)
		}
		refused(t, "drive", c.PutDrive(ctx, api.Drive{ID: "b", Path: kernel}), hotplugged)
		refused(t, "pmem", c.PutPmem(ctx, api.Pmem{ID: "b", Path: kernel}), hotplugged)
		refused(t, "network", c.PutNetworkInterface(ctx, api.NetworkInterface{ID: "b", Tap: "t"}), hotplugged)
		refused(t, "move to nothing", c.MoveDrive(ctx, "disk", filepath.Join(dir, "none")), "No such file")
		refused(t, "move what is not there", c.MoveDrive(ctx, "none", kernel), "Device not found")
		if err := errors.Join(c.MoveDrive(ctx, "disk", kernel), c.FlushMetrics(ctx)); err != nil {
			t.Error(err)
		}
	}
}

func TestHotplug(t *testing.T) {
	t.Parallel()
	_, c := client(t, Config{PCI: true})
	dir := t.TempDir()
	boot(t, c, dir)
	ctx := bounded(t)
	kernel := filepath.Join(dir, "kernel")
	if err := c.PutDrive(ctx, api.Drive{ID: "b", Path: kernel}); err != nil {
		t.Error(err)
	}
	refused(t, "twice", c.PutDrive(ctx, api.Drive{ID: "b", Path: kernel}), "Device ID in use")
	refused(t, "nothing", c.PutPmem(ctx, api.Pmem{ID: "b", Path: filepath.Join(dir, "none")}), "No such file")
}

func TestPmemIsOpenedAtStart(t *testing.T) {
	t.Parallel()
	_, c := client(t, Config{})
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx := bounded(t)
	if err := errors.Join(c.PutBootSource(ctx, api.BootSource{Kernel: empty}), c.PutPmem(ctx, api.Pmem{ID: "a", Path: filepath.Join(dir, "none")})); err != nil {
		t.Fatal(err)
	}
	refused(t, "no file", c.Start(ctx), "No such file")
	if err := c.PutPmem(ctx, api.Pmem{ID: "a", Path: empty}); err != nil {
		t.Fatal(err)
	}
	refused(t, "an empty file", c.Start(ctx), "size is 0")
}

func TestSnapshot(t *testing.T) {
	t.Parallel()
	var diffs []bool
	s, c := client(t, Config{Guest: echo, Dump: func(mem io.WriterAt, diff bool) error {
		diffs = append(diffs, diff)
		_, err := mem.WriteAt([]byte("memory"), 4096)
		return err
	}})
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	boot(t, c, dir)
	ctx := bounded(t)
	to := api.Snapshot{State: in("state"), Mem: in("mem")}
	refused(t, "while it runs", c.CreateSnapshot(ctx, to), "save/restore unavailable while running")
	if err := c.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	refused(t, "no place for the state", c.CreateSnapshot(ctx, api.Snapshot{State: in("no/state"), Mem: in("mem")}), "open on the snapshot backing file: No such file")
	refused(t, "no place for memory", c.CreateSnapshot(ctx, api.Snapshot{State: in("alone"), Mem: in("no/mem")}), "open on the memory backing file: No such file")
	refused(t, "memory to nowhere", c.CreateSnapshot(ctx, api.Snapshot{State: in("alone"), Mem: os.DevNull}), "truncate on the memory backing file: Invalid argument")
	if _, err := os.Stat(in("alone")); err != nil {
		t.Errorf("the state comes first, and stays: %v", err)
	}
	if err := errors.Join(c.CreateSnapshot(ctx, to), c.CreateSnapshot(ctx, api.Snapshot{Type: api.Diff, State: in("state"), Mem: in("mem")})); err != nil {
		t.Fatal(err)
	}
	memory, err := os.ReadFile(in("mem"))
	if err != nil || len(memory) != 16<<20 || string(memory[4096:4102]) != "memory" {
		t.Errorf("%d bytes, %v", len(memory), err)
	}
	if fmt.Sprint(diffs) != "[false true]" || s.State() != api.Paused {
		t.Errorf("%v, it is %s", diffs, s.State())
	}
	if err = os.WriteFile(in("short"), memory[:1<<20], 0o600); err != nil {
		t.Fatal(err)
	}

	state, err := os.ReadFile(in("state"))
	if err != nil {
		t.Fatal(err)
	}
	state[len(state)-20] = ' ' // and not the newline that it was
	if err = os.WriteFile(in("spoilt"), state, 0o600); err != nil {
		t.Fatal(err)
	}

	load := api.Load{State: in("state"), Mem: in("mem"), Vsock: in("w"), Resume: true}
	for what, tt := range map[string]struct {
		version string
		change  func(*api.Load)
		words   string
	}{
		"another format":     {"1.15.0", func(l *api.Load) { l.Vsock = "" }, "Invalid data version: 10.0.0"},
		"no state":           {"", func(l *api.Load) { l.State = in("none") }, "Failed to open snapshot file: No such file"},
		"no device state":    {"", func(l *api.Load) { l.State = in("kernel") }, "too short"},
		"garbage":            {"", func(l *api.Load) { l.State = in("mem") }, "bitcode error"},
		"a bit flipped":      {"", func(l *api.Load) { l.State = in("spoilt") }, "CRC64 validation failed"},
		"no memory":          {"", func(l *api.Load) { l.Mem = in("none") }, "Failed to load guest memory: No such file"},
		"too little memory":  {"", func(l *api.Load) { l.Mem = in("short") }, "Failed to restore guest memory"},
		"a socket in use":    {"", func(l *api.Load) { l.Vsock = "" }, "Address in use"},
		"a card that is not": {"", func(l *api.Load) { l.Networks = []api.NetworkOverride{{ID: "x", Tap: "t"}} }, "Unknown Network Device"},
	} {
		other, c := client(t, Config{Version: tt.version})
		l := load
		tt.change(&l)
		refused(t, what, c.LoadSnapshot(ctx, l), tt.words)
		<-other.Done()
	}

	kvm := in("kvm")
	other, otherClient := client(t, Config{KVM: kvm})
	refused(t, "no KVM", otherClient.LoadSnapshot(ctx, api.Load{State: in("state"), Mem: in("mem"), Vsock: in("v2")}), "Error creating KVM object: No such file")
	<-other.Done()

	fork, forkClient := client(t, Config{Guest: echo, KVM: os.DevNull})
	if err = forkClient.LoadSnapshot(ctx, load); err != nil {
		t.Fatal(err)
	}
	if fork.State() != api.Running {
		t.Errorf("it is %s", fork.State())
	}
	ping(t, in("w"))
}

// ping says something to the guest, and is answered.
func ping(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := api.DialGuest(bounded(t), path, 1024)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	say(t, conn)
	return conn
}

func say(t *testing.T, conn net.Conn) {
	t.Helper()
	if _, err := io.WriteString(conn, "ping"); err != nil {
		t.Fatal(err)
	}
	var back [4]byte
	if _, err := io.ReadFull(conn, back[:]); err != nil || string(back[:]) != "ping" {
		t.Fatalf("%q, %v", back, err)
	}
}

func TestVsock(t *testing.T) {
	t.Parallel()
	_, c := client(t, Config{Guest: echo})
	dir := t.TempDir()
	path := filepath.Join(dir, "v")
	boot(t, c, dir)
	conn := ping(t, path)
	if _, err := api.DialGuest(bounded(t), path, 7); err == nil {
		t.Error("somebody listens on port 7")
	}
	ctx := bounded(t)
	if err := c.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 30*time.Millisecond)
	defer cancel()
	if _, err := api.DialGuest(short, path, 1024); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while it is paused: %v", err)
	}
	if err := c.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	say(t, conn) // a pause is not noticed
	if err := errors.Join(
		c.Pause(ctx), c.CreateSnapshot(ctx, api.Snapshot{State: filepath.Join(dir, "s"), Mem: filepath.Join(dir, "m")}), c.Resume(ctx),
	); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a connection lived through a snapshot")
	}
	ping(t, path)
}

func TestFaults(t *testing.T) {
	t.Parallel()
	s, c := client(t, Config{})
	ctx := bounded(t)
	s.Fault("GET", "/", Refuse(500, "no"))
	_, err := c.Instance(ctx)
	refused(t, "refuse", err, "status 500: no")
	s.Fault("GET", "/", nil)
	if _, err = c.Instance(ctx); err != nil {
		t.Error(err)
	}
	s.Exit(7)
	<-s.Done()
	_, err = c.Instance(ctx)
	refused(t, "exit", err, "unavailable")
	last := s.Requests()
	if len(last) != 3 || last[1] != (Request{"GET", "/", ""}) {
		t.Errorf("it remembers %v", last)
	}
}

func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	_, socket := New(t, Config{})
	for range maxConns {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	_, err := api.Dial(bounded(t), socket, nil)
	refused(t, "an 11th", err, "Too many open connections")
}

// The program is compared with what a real one was seen to do.
func TestProgram(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "s")
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		args    []string
		version string
		code    int
		words   string
	}{
		"version":           {[]string{"--version", "--nope"}, "1.13.2", 0, "Firecracker v1.13.2\n\n"},
		"snapshot version":  {[]string{"--snapshot-version"}, "1.16.1", 0, "v10.0.0\n"},
		"unknown":           {[]string{"--nope"}, "1.16.1", 153, `UnexpectedArgument("nope")`},
		"with an equals":    {[]string{"--enable-pci=1"}, "1.16.1", 153, `UnexpectedArgument("enable-pci=1")`},
		"no PCI yet":        {[]string{"--enable-pci"}, "1.12.1", 153, `UnexpectedArgument("enable-pci")`},
		"a word":            {[]string{"x"}, "1.16.1", 153, `UnexpectedArgument("x")`},
		"no value":          {[]string{"--api-sock"}, "1.16.1", 153, `MissingValue("api-sock")`},
		"twice":             {[]string{"--id", "a", "--id", "b"}, "1.16.1", 153, `DuplicateArgument("id")`},
		"no API, no config": {[]string{"--no-api"}, "1.16.1", 153, `MissingArgument("config-file")`},
		"a level":           {[]string{"--level", "x"}, "1.16.1", 152, `InvalidLogLevel`},
		"an ID":             {[]string{"--id", "a_b"}, "1.16.1", 134, `Invalid instance ID`},
		"a file":            {[]string{"--api-sock", file}, "1.16.1", 1, "FailedToBindSocket"},
		"no directory":      {[]string{"--api-sock", "/nonexistent/s"}, "1.16.1", 1, "os error 2"},
		"no log yet":        {[]string{"--log-path", socket + ".log"}, "1.13.2", 1, "os error 2"},
		"with a config":     {[]string{"--config-file", "x"}, "1.16.1", 1, "does not know"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			code := Main(tt.args, Config{Version: tt.version}, &out, &out)
			if code != tt.code || !strings.Contains(out.String(), tt.words) {
				t.Errorf("status %d, %s", code, out.String())
			}
		})
	}
}

// A process of its own, as an engine starts one.
func TestProcess(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	socket := filepath.Join(dir, "s")
	cmd := exec.Command(self, "--id", "vm-1", "--api-sock", socket, "--enable-pci", "--boot-timer", "--no-seccomp",
		"--log-path", filepath.Join(dir, "log"), "--level", "Debug", "--http-api-max-payload-size", "1000")
	cmd.Env = append(os.Environ(), mainEnv+"=1.16.1")
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	died := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(died)
	}()
	defer func() {
		_ = cmd.Process.Kill()
		<-died
	}()
	ctx := bounded(t)
	c, err := api.Dial(ctx, socket, died)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if i, instanceErr := c.Instance(ctx); instanceErr != nil || i.ID != "vm-1" {
		t.Errorf("%+v, %v", i, instanceErr)
	}
	refused(t, "too much", c.PutBootSource(ctx, api.BootSource{Args: strings.Repeat("x", 1000)}), "larger than the limit of 1000")
	refused(t, "no snapshot", c.LoadSnapshot(ctx, api.Load{State: "none", Mem: "none"}), "Failed to open snapshot file")
	<-died
	if code := cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("it ended with %d", code)
	}
	if _, err = os.Stat(socket); err != nil {
		t.Errorf("its socket: %v", err)
	}
}
