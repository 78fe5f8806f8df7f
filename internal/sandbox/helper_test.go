package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/fake"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// Properties of machines are slow to check; -rapid.checks=N asks for more.
	if checks := flag.Lookup("rapid.checks"); checks != nil && checks.Value.String() == checks.DefValue {
		_ = checks.Value.Set("20") // it is a number
	}
	goleak.VerifyTestMain(m)
}

// world is what Managers are made on: a state directory, an image py and an
// engine whose steps can be made to fail.
type world struct {
	dir    string
	engine *faulty
	images *image.Store
	snaps  *snapshot.Store
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), engine: &faulty{Engine: fake.New()}}
	putImage(t, filepath.Join(w.dir, "images"), "py", image.Manifest{Version: 1, Source: "test"})
	var err error
	if w.images, err = image.Open(image.Config{Dir: filepath.Join(w.dir, "images")}); err != nil {
		t.Fatal(err)
	}
	if w.snaps, err = snapshot.Open(filepath.Join(w.dir, "snapshots"), nil); err != nil {
		t.Fatal(err)
	}
	return w
}

// putImage writes an image of empty files, by docs/formats/image.md.
func putImage(t testing.TB, dir, name string, m image.Manifest) {
	t.Helper()
	put := func(data []byte, names ...string) {
		path := filepath.Join(append([]string{dir}, names...)...)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	hexOf := func(data []byte) string {
		sum := sha256.Sum256(data)
		return hex.EncodeToString(sum[:])
	}
	for _, b := range []*image.Blob{&m.Root, &m.Kernel, &m.Initrd} {
		put(nil, "blobs", "sha256", hexOf(nil))
		b.Digest = "sha256:" + hexOf(nil)
	}
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	put(data, "manifests", hexOf(data)+".json")
	put([]byte("sha256:"+hexOf(data)+"\n"), "names", name)
}

// manager makes a Manager that is closed at the test's end.
func (w *world) manager(t testing.TB, change ...func(*Config)) *Manager {
	t.Helper()
	cfg := Config{
		Dir: filepath.Join(w.dir, "sandboxes"), Engine: w.engine, Snapshots: w.snaps, Images: w.images,
		Machine: vmm.Machine{MemoryMiB: 64, VCPUs: 1}, Ephemeral: true,
		Limits: Limits{Identity: 10 * time.Second, Boot: 10 * time.Second, Warmup: 10 * time.Second},
	}
	for _, f := range change {
		f(&cfg)
	}
	m, err := NewManager(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeManager(t, m) })
	return m
}

func lasting(cfg *Config) { cfg.Ephemeral = false }

func closeManager(t testing.TB, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := m.Close(ctx); err != nil {
		t.Errorf("Close: %v", err)
	}
}

// template makes the snapshot py, with a file in it.
func (w *world) template(t testing.TB, m *Manager) snapshot.Snapshot {
	t.Helper()
	snap, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py", Warmup: []string{"echo warm > state"}})
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

// fork makes n sandboxes, all of which must succeed.
func fork(t testing.TB, m *Manager, n int, change ...func(*ForkRequest)) []string {
	t.Helper()
	req := ForkRequest{Snapshot: "py", N: n}
	for _, f := range change {
		f(&req)
	}
	results, err := m.Fork(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, n)
	for i, r := range results {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		ids[i] = r.Sandbox.ID
	}
	return ids
}

func ping(t testing.TB, m *Manager, id string) {
	t.Helper()
	if err := tryPing(t.Context(), m, id); err != nil {
		t.Errorf("ping: %v", err)
	}
}

func tryPing(ctx context.Context, m *Manager, id string) error {
	return m.With(ctx, id, func(ctx context.Context, c *guest.Client) error {
		_, err := c.Ping(ctx)
		return err
	})
}

// sh runs a command line in a sandbox.
func sh(t testing.TB, m *Manager, id, line string) string {
	t.Helper()
	var res guest.Result
	err := m.With(t.Context(), id, func(ctx context.Context, c *guest.Client) (err error) {
		res, err = c.Run(ctx, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", line}}, nil, 1<<20)
		return err
	})
	if err != nil || res.Exit.Code != 0 {
		t.Fatalf("%s: %v, exit %+v: %s", line, err, res.Exit, res.Stderr)
	}
	return strings.TrimSpace(string(res.Stdout))
}

// seatOf is the directory of a sandbox's first machine.
func seatOf(m *Manager, id string) string { return filepath.Join(m.dir(id), firstSeat) }

// eventually waits until cond holds.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	late := time.NewTimer(20 * time.Second)
	defer late.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-late.C:
			t.Fatalf("in vain waited for: %s", what)
		}
	}
}

// nothing checks that no sandbox is left: no directory, no place taken, no
// machine, and no pin on the snapshot.
func (w *world) nothing(t testing.TB, m *Manager) {
	t.Helper()
	m.mu.Lock()
	held, boxes := m.held, len(m.boxes)
	m.mu.Unlock()
	if held != 0 || boxes != 0 {
		t.Errorf("%d places taken, %d sandboxes listed", held, boxes)
	}
	for _, dir := range []string{m.Dir, filepath.Join(w.dir, "snapshots", "staging")} {
		if left := names(t, dir); len(left) > 0 {
			t.Errorf("left in %s: %v", dir, left)
		}
	}
	if n := w.engine.alive(); n != 0 {
		t.Errorf("%d machines left", n)
	}
	if _, err := w.snaps.Resolve("py"); err == nil {
		// A process that another test starts has our files for an instant.
		eventually(t, "the snapshot to be free", func() bool { return w.snaps.Remove(t.Context(), "py") == nil })
	}
}

func names(t testing.TB, dir string) (found []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		found = append(found, e.Name())
	}
	return found
}

// faulty is an engine whose steps ask before they are done: "start",
// "restore", "adopt", "dial", "resume", "pause", "save-device", "freeze", "kill", and "say"
// for each write to a guest.
type faulty struct {
	*fake.Engine
	netless bool

	mu      sync.Mutex
	ask     func(ctx context.Context, step string) error
	version string
	vms     []vmm.VM
}

// onStep has f called at each step; nil for no faults.
func (e *faulty) onStep(f func(ctx context.Context, step string) error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ask = f
}

func (e *faulty) step(ctx context.Context, step string) error {
	e.mu.Lock()
	ask := e.ask
	e.mu.Unlock()
	if ask == nil {
		return nil
	}
	return ask(ctx, step)
}

// alive counts the machines that have not ended.
func (e *faulty) alive() (n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, vm := range e.vms {
		select {
		case <-vm.Done():
		default:
			n++
		}
	}
	return n
}

// Caps are those of the fake, but for a network card where there is to be none.
func (e *faulty) Caps() vmm.Caps {
	caps := e.Engine.Caps()
	caps.Net = !e.netless
	return caps
}

func (e *faulty) Version() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.Engine.Version() + e.version
}

func (e *faulty) wrap(vm vmm.VM, err error) (vmm.VM, error) {
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.vms = append(e.vms, vm)
	return &faultyVM{vm, e}, nil
}

func (e *faulty) Start(ctx context.Context, spec vmm.StartSpec) (vmm.VM, error) {
	if err := e.step(ctx, "start"); err != nil {
		return nil, err
	}
	return e.wrap(e.Engine.Start(ctx, spec))
}

func (e *faulty) Restore(ctx context.Context, spec vmm.RestoreSpec) (vmm.VM, error) {
	if err := e.step(ctx, "restore"); err != nil {
		return nil, err
	}
	return e.wrap(e.Engine.Restore(ctx, spec))
}

func (e *faulty) Adopt(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	if err := e.step(ctx, "adopt"); err != nil {
		return nil, err
	}
	return e.wrap(e.Engine.Adopt(ctx, h))
}

type faultyVM struct {
	vmm.VM
	e *faulty
}

func (v *faultyVM) Dial(ctx context.Context) (io.ReadWriteCloser, error) {
	if err := v.e.step(ctx, "dial"); err != nil {
		return nil, err
	}
	rw, err := v.VM.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return &faultyLine{rw, v.e}, nil
}

func (v *faultyVM) Freeze(ctx context.Context, device string) error {
	if err := v.e.step(ctx, "freeze"); err != nil {
		return err
	}
	return v.VM.Freeze(ctx, device)
}

func (v *faultyVM) SaveDevice(ctx context.Context, device string) error {
	if err := v.e.step(ctx, "save-device"); err != nil {
		return err
	}
	return v.VM.SaveDevice(ctx, device)
}

func (v *faultyVM) Pause(ctx context.Context) error {
	if err := v.e.step(ctx, "pause"); err != nil {
		return err
	}
	return v.VM.Pause(ctx)
}

func (v *faultyVM) Resume(ctx context.Context) error {
	if err := v.e.step(ctx, "resume"); err != nil {
		return err
	}
	return v.VM.Resume(ctx)
}

func (v *faultyVM) Kill(ctx context.Context) error {
	if err := v.e.step(ctx, "kill"); err != nil {
		return err
	}
	return v.VM.Kill(ctx)
}

// faultyLine is the stream to a guest. A write that is told to wait until its
// call is over is lost instead: there is no ctx to wait for.
type faultyLine struct {
	io.ReadWriteCloser
	e *faulty
}

func (l *faultyLine) Write(p []byte) (int, error) {
	lost, cancel := context.WithCancel(context.Background())
	cancel()
	err := l.e.step(lost, "say")
	switch {
	case errors.Is(err, context.Canceled):
		return len(p), nil
	case err != nil:
		return 0, err
	}
	return l.ReadWriteCloser.Write(p)
}

// failOnce returns a fault for the nth time that step comes.
func failOnce(step string, nth int, fault func(context.Context) error) func(context.Context, string) error {
	var mu sync.Mutex
	seen := 0
	return func(ctx context.Context, s string) error {
		if s != step {
			return nil
		}
		mu.Lock()
		seen++
		now := seen == nth
		mu.Unlock()
		if !now {
			return nil
		}
		return fault(ctx)
	}
}

var errInjected = errors.New("injected")

func fail(context.Context) error { return errInjected }

// hang waits for the end of the call that it is in.
func hang(ctx context.Context) error {
	<-ctx.Done()
	return context.Cause(ctx)
}
