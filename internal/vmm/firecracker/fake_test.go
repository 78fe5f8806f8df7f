package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/relink"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/apitest"
)

// Under a name that begins with fakePrefix, this test binary is the Firecracker
// of a version, which is the rest of the name: "1.16.1", or "1.16.1+hangs" for
// one that begins badly. Requests go wrong as the machine's id says: one that
// ends in "-die-3" has it die when it gets steps[3].
const fakePrefix = "firecracker-fake-"

// launcherEnv is what the jail sets for its launcher.
const launcherEnv = "TINE_LAUNCHER"

func TestMain(m *testing.M) {
	if os.Getenv(launcherEnv) != "" {
		if err := jail.Serve(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if rest, ok := strings.CutPrefix(filepath.Base(os.Args[0]), fakePrefix); ok {
		version, behaviour, _ := strings.Cut(rest, "+")
		syscall.Exit(fakeFirecracker(version, behaviour)) // os.Exit would have the race detector wait a second
	}
	flag.Parse()
	os.Exit(m.Run())
}

func fakeFirecracker(version, behaviour string) int {
	asked := slices.Contains(os.Args, "--version")
	switch {
	case behaviour == "mute" && asked, behaviour == "hangs" && !asked:
		time.Sleep(time.Hour)
	case behaviour == "silent" && asked:
		return 0
	case behaviour == "odd" && asked:
		fmt.Println("Firecracker at its best")
		return 0
	case behaviour == "talks" && asked:
		for {
			fmt.Println(strings.Repeat("x", 1<<16))
		}
	case behaviour == "leaves" && asked:
		return 3
	case behaviour == "dies" && !asked:
		fmt.Fprintln(os.Stderr, "no luck today")
		return 1
	case behaviour == "other" && !asked:
		version = "1.15.0"
	}
	id := ""
	if i := slices.Index(os.Args, "--id"); i >= 0 {
		id = os.Args[i+1]
	}
	cfg := apitest.Config{Version: version, Guest: echoAgent(), Seen: tell, KVM: os.DevNull, Faults: faultsOf(id)}
	if dir, err := os.Getwd(); err == nil && dir == jail.RunDir {
		cfg.KVM = kvmDevice
	}
	return apitest.Main(os.Args[1:], cfg, os.Stdout, os.Stderr)
}

// tell writes a request to the console.
func tell(r apitest.Request) {
	line, err := json.Marshal(r)
	if err == nil {
		fmt.Printf("%s\n", line)
	}
}

// told are the requests in a console.
func told(t *testing.T, vm vmm.VM) (requests []string) {
	t.Helper()
	text, err := vm.(*machine).Console(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text) {
		var r apitest.Request
		if json.Unmarshal([]byte(line), &r) == nil {
			requests = append(requests, strings.TrimSpace(r.Method+" "+r.Path+" "+r.Body))
		}
	}
	return requests
}

// echoAgent is the agent's end of streams, with an agent that says what it hears.
func echoAgent() func(port uint32) func(net.Conn) {
	conns := make(acceptor)
	hosts := relink.Listen(conns, relink.Grace)
	go func() {
		for {
			stream, err := hosts.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(stream, stream) }()
		}
	}()
	return func(port uint32) func(net.Conn) {
		if port != agentPort {
			return nil
		}
		return func(conn net.Conn) {
			h := &held{Conn: conn, closed: make(chan struct{})}
			conns <- h
			<-h.closed
		}
	}
}

type acceptor chan io.ReadWriteCloser

func (a acceptor) Accept() (io.ReadWriteCloser, error) { return <-a, nil }
func (a acceptor) Close() error                        { return nil }

// held is a connection of which it is known when it was closed.
type held struct {
	net.Conn
	once   sync.Once
	closed chan struct{}
}

func (h *held) Close() error {
	h.once.Do(func() { close(h.closed) })
	return h.Conn.Close()
}

// steps are the requests that can go wrong.
var steps = []string{
	"GET /version", "PUT /machine-config", "PUT /boot-source", "PUT /pmem/root", "PUT /drives/disk", "PUT /vsock", "PUT /entropy",
	"PUT /actions", "PUT /snapshot/load", "PUT /snapshot/create", "PATCH /vm", "GET /",
}

// noMemory is what Firecracker says of a memory file that it cannot make.
const noMemory = "Create snapshot error: Cannot perform open on the memory backing file: No such file or directory (os error 2)"

// faults are the ways in which a request can go wrong.
func faults() map[string]apitest.Fault {
	trap := func(make func() error) apitest.Fault {
		return func(s *apitest.Server, conn net.Conn) bool {
			_ = make() // the jail lets it make only files
			return apitest.Refuse(400, noMemory)(s, conn)
		}
	}
	secret := func(name string) func() error { return func() error { return os.Symlink("/etc/passwd", name) } }
	return map[string]apitest.Fault{
		"die":    apitest.Die,
		"hang":   apitest.Hang,
		"hangup": apitest.HangUp,
		"refuse": apitest.Refuse(400, "no luck today"),
		// As a disk that is full when the state has been written.
		"stuffed": func(s *apitest.Server, conn net.Conn) bool {
			_ = os.WriteFile(stateFile, make([]byte, 4096), 0o600)
			return apitest.Refuse(400, "Create snapshot error: Cannot perform dump on the memory backing file: No space left on device (os error 28)")(s, conn)
		},
		"garbage":   apitest.Say("no HTTP at all\r\n\r\n"),
		"flood":     apitest.Flood("HTTP/1.1 200 \r\nContent-Length: 10737418240\r\n\r\n"),
		"floodhead": apitest.Flood("HTTP/1.1 200 "),
		// Of a snapshot that is made.
		"done": func(_ *apitest.Server, conn net.Conn) bool {
			_, err := io.WriteString(conn, "HTTP/1.1 204 \r\n\r\n")
			return err == nil
		},
		"nothing":   trap(func() error { return nil }),
		"link":      trap(secret(stateFile)),
		"pipe":      trap(func() error { return unix.Mkfifo(stateFile, 0o600) }),
		"directory": trap(func() error { return os.Mkdir(stateFile, 0o700) }),
		"junk":      trap(func() error { return os.WriteFile(stateFile, []byte(strings.Repeat("x", 4097)), 0o600) }),
		"empty":     trap(func() error { return os.WriteFile(stateFile, nil, 0o600) }),
		"huge": trap(func() error {
			f, err := os.OpenFile(stateFile, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
			if err == nil {
				err = errors.Join(f.Truncate(12<<20), f.Close())
			}
			return err
		}),
	}
}

// faultsOf reads the end of an id.
func faultsOf(id string) map[string]apitest.Fault {
	words := strings.Split(id, "-")
	if len(words) < 2 {
		return nil
	}
	step, err := strconv.Atoi(words[len(words)-1])
	fault, ok := faults()[words[len(words)-2]]
	if err != nil || !ok || step >= len(steps) {
		return nil
	}
	return map[string]apitest.Fault{steps[step]: fault}
}

// failing is the id of a machine whose Firecracker has a fault at a request.
func failing(t *testing.T, fault, step string) string {
	t.Helper()
	i := slices.Index(steps, step)
	if _, ok := faults()[fault]; !ok || i < 0 {
		t.Fatalf("no fault %s at %s", fault, step)
	}
	return fmt.Sprintf("m-%s-%d", fault, i)
}

// shortDir is a directory for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "fc") //nolint:usetesting // a path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// fakeConfig is a Firecracker that is this test binary.
func fakeConfig(t *testing.T, name string) Config {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(shortDir(t), fakePrefix+name)
	if err = os.Symlink(self, binary); err != nil {
		t.Fatal(err)
	}
	return Config{Binary: binary, kvm: os.DevNull, answer: time.Minute} // it is a slow day
}

func openEngine(t *testing.T, cfg Config) *Engine {
	t.Helper()
	e, err := New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

func fakeEngine(t *testing.T, name string) *Engine {
	t.Helper()
	return openEngine(t, fakeConfig(t, name))
}

// jailed has the engine run machines in a jail.
func jailed(t *testing.T, cfg Config) Config {
	t.Helper()
	if max, err := os.ReadFile("/proc/sys/user/max_user_namespaces"); os.Geteuid() != 0 && (err != nil || strings.TrimSpace(string(max)) == "0") {
		t.Skipf("NOT TESTED: not root, and no user namespaces: %s %v", max, err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cfg.Jail = &jail.Config{
		Command: []string{self}, Dir: filepath.Join(dir, "jail"), UIDs: filepath.Join(dir, "uids"),
		NoGroups: errors.New("a test"),
	}
	return cfg
}

// modes runs a test with a Firecracker in no jail, and with one in a jail.
func modes(t *testing.T, name string, test func(t *testing.T, e *Engine)) {
	t.Run("free", func(t *testing.T) { test(t, fakeEngine(t, name)) })
	t.Run("jailed", func(t *testing.T) { test(t, openEngine(t, jailed(t, fakeConfig(t, name)))) })
}

const mib = 1 << 20

func writeFile(t *testing.T, path string, size int64) string {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// common is a machine of 64 MiB.
func common(t *testing.T, id string) vmm.Common {
	t.Helper()
	return vmm.Common{
		ID: id, Dir: shortDir(t), Machine: vmm.Machine{MemoryMiB: 64, VCPUs: 1}, DieWithParent: true,
		Root: writeFile(t, filepath.Join(t.TempDir(), "root"), 2*mib),
	}
}

// toBoot is a machine to boot, with a file for its memory.
func toBoot(t *testing.T, id string) vmm.StartSpec {
	t.Helper()
	dir := t.TempDir()
	return vmm.StartSpec{
		Common: common(t, id), Memory: filepath.Join(dir, "memory"),
		Boot: vmm.Boot{Kernel: writeFile(t, filepath.Join(dir, "kernel"), 1), Initrd: writeFile(t, filepath.Join(dir, "initrd"), 1)},
	}
}

// withDisk gives a machine a scratch disk of 16 MiB.
func withDisk(t *testing.T, spec vmm.StartSpec) vmm.StartSpec {
	t.Helper()
	spec.Machine.DiskMiB = vmm.MinDiskMiB
	spec.Disk = writeFile(t, filepath.Join(t.TempDir(), "disk"), vmm.MinDiskMiB*mib)
	return spec
}

func killAtEnd(t *testing.T, vm vmm.VM) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() {
		if err := vm.Kill(ctx); err != nil {
			t.Error(err)
		}
	})
}

func start(t *testing.T, e *Engine, spec vmm.StartSpec) vmm.VM {
	t.Helper()
	vm, err := e.Start(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	killAtEnd(t, vm)
	return vm
}

func restore(t *testing.T, e *Engine, spec vmm.RestoreSpec) vmm.VM {
	t.Helper()
	vm, err := e.Restore(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	killAtEnd(t, vm)
	return vm
}

// frozen is what to restore of a machine that was booted and frozen.
func frozen(t *testing.T, e *Engine, spec vmm.StartSpec) vmm.RestoreSpec {
	t.Helper()
	vm := start(t, e, spec)
	device := filepath.Join(t.TempDir(), "device")
	if err := errors.Join(vm.Freeze(t.Context(), device), vm.Kill(t.Context())); err != nil {
		t.Fatal(err)
	}
	r := vmm.RestoreSpec{Common: spec.Common, Memory: spec.Memory, Device: device}
	if spec.Disk != "" {
		r.Disk = []string{spec.Disk}
	}
	return r
}

// again is the same machine once more, with a directory of its own.
func again(t *testing.T, spec vmm.RestoreSpec, id string) vmm.RestoreSpec {
	t.Helper()
	spec.ID, spec.Dir = id, shortDir(t)
	return spec
}

// say says something to the agent, and hears it.
func say(t *testing.T, stream io.ReadWriter, text string) {
	t.Helper()
	if _, err := io.WriteString(stream, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(stream, got); err != nil || string(got) != text {
		t.Fatalf("heard %q, %v", got, err)
	}
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// entries are what is in a directory.
func entries(t *testing.T, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	try(t, err)
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}
