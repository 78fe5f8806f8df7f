// Package apitest is a daemon without machines, for tests of whatever speaks
// the native interface: the real handlers and the real agent, in this process,
// and a real snapshot store; only machines and images are pretended.
package apitest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/api"
	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/metrics"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/publish"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/wire"
	"github.com/tinevm/tine/internal/workspace"
)

// imageDigest is the digest of the image py, which every Backend has.
const imageDigest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

const (
	version = "0.0.0-test"
	// eventsKept is few, so that tests can have more.
	eventsKept = 64
)

// Backend has an image py, a snapshot py and no sandbox.
type Backend struct {
	// Fail, when set, may return an error for the operation it is given, such
	// as "fork" or "kill". It must be set before requests are made.
	Fail func(op string) error
	// Most is how many sandboxes there may be; 0 is no limit.
	Most int
	// Host is what the snapshots say that it makes from now on.
	Host *vmm.Host
	// KeepImage says what images were to be kept when unused ones were last
	// collected.
	KeepImage func(digest string) bool
	// Events are what has happened to sandboxes.
	Events *sandbox.Events
	// Metrics are what the interface has counted.
	Metrics *metrics.Metrics
	// Ports are the ports that are published.
	Ports *publish.Ports

	tb         testing.TB
	dir        string
	store      *snapshot.Store
	workspaces *workspace.Store
	attestor   *attest.Attestor
	drift      int // of runs
	mu         sync.Mutex
	seq        int
	branches   int
	boxes      map[string]*box
	order      []string
	images     map[string]image.Image
	pools      map[string]int
	warmup     *sandbox.Net          // of the last template
	pending    map[string]*branching // by tag
}

// New returns a Backend that ends with the test.
func New(tb testing.TB) *Backend {
	tb.Helper()
	b := &Backend{
		tb: tb, dir: tb.TempDir(), boxes: map[string]*box{}, images: map[string]image.Image{}, pools: map[string]int{},
		pending: map[string]*branching{}, Metrics: metrics.New(version), Ports: publish.New(nil),
	}
	b.Events = sandbox.NewEvents(eventsKept, api.Observe(b.Metrics, b.Ports))
	store, err := snapshot.Open(filepath.Join(b.dir, "snapshots"), nil)
	if err != nil {
		tb.Fatal(err)
	}
	b.store = store
	b.images["py"] = newImage("py", "debian:bookworm+python3")
	if _, err = b.CreateSnapshot(tb.Context(), sandbox.SnapshotRequest{Tag: "py", Image: "py"}); err != nil {
		tb.Fatal(err)
	}
	if b.workspaces, err = workspace.Open(tb.Context(), filepath.Join(b.dir, "workspaces"), b, nil); err != nil {
		tb.Fatal(err)
	}
	b.attestor = b.newAttestor()
	tb.Cleanup(b.close)
	return b
}

// Config is the interface's with this backend behind it.
func (b *Backend) Config() api.Config {
	return api.Config{
		Sandboxes: b, Snapshots: b.store, Images: images{b}, Workspaces: b.workspaces, Version: version,
		Events: b.Events, Metrics: b.Metrics, Load: b.load, Attestor: b.attestor, Ports: b.Ports,
		Logger: slog.New(slog.NewTextHandler(b.tb.Output(), nil)), MaxOutput: 64 << 10, MaxFile: 1 << 20,
		Doctor: func(context.Context) []wire.DoctorCheck {
			return []wire.DoctorCheck{{Name: "kvm", Status: wire.DoctorCheckStatusWarn, Detail: "no /dev/kvm", Hint: "none is needed"}}
		},
	}
}

func (b *Backend) close() {
	for _, info := range b.List() {
		_ = b.remove(info.ID) // it was listed
	}
	for _, p := range b.pending {
		_ = p.stage.Abort() // the directory goes with the test
	}
	_ = b.Ports.Close()      // it never fails
	_ = b.workspaces.Close() // the directory goes, too
	_ = b.attestor.Close()   // and this
}

func (b *Backend) failure(op string) error {
	if b.Fail == nil {
		return nil
	}
	return b.Fail(op)
}

// box is a sandbox: an agent that runs here instead of in a machine.
type box struct {
	info   sandbox.Info
	net    sandbox.NetState
	agent  *agent.Agent
	client *guest.Client
	work   sync.WaitGroup
}

func newBox(ctx context.Context, info sandbox.Info, dir string) (*box, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	x := &box{info: info, agent: agent.New(agent.Config{Fake: agent.NewFake(dir)})}
	host, far := net.Pipe()
	x.work.Go(func() {
		_ = x.agent.Serve(context.WithoutCancel(ctx), far) // it ends when the pipe does
		_ = far.Close()
	})
	client, err := guest.Dial(ctx, host)
	if err != nil {
		x.close()
		return nil, err
	}
	x.client = client
	return x, nil
}

func (x *box) close() {
	if x.client != nil {
		_ = x.client.Close() // it never fails
	}
	x.work.Wait()
	x.agent.Close()
}

// Fork makes sandboxes. Failures for "fork 1" and so on are those of one child.
func (b *Backend) Fork(ctx context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error) {
	snap, err := b.store.Resolve(req.Snapshot)
	if err = errors.Join(err, b.failure("fork"), checkSecrets(req.Secrets)); err != nil {
		return nil, err
	}
	if err = checkNet(req.Net, snap.Manifest.Machine); err != nil {
		return nil, err
	}
	if b.Most > 0 && len(b.List())+req.N > b.Most {
		return nil, fmt.Errorf("%w: at most %d sandboxes", errdef.ErrExhausted, b.Most)
	}
	results := make([]sandbox.ForkResult, req.N)
	for i := range results {
		results[i].Index = i
		if results[i].Err = b.failure(fmt.Sprintf("fork %d", i)); results[i].Err == nil {
			results[i].Sandbox, results[i].Err = b.fork(ctx, snap, req)
		}
	}
	return results, nil
}

func (b *Backend) fork(ctx context.Context, snap snapshot.Snapshot, req sandbox.ForkRequest) (sandbox.Info, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq++
	id := fmt.Sprintf("sb-%d", b.seq)
	info := sandbox.Info{
		ID: id, SnapshotTag: snap.Tag, SnapshotDigest: snap.Digest, State: sandbox.Running, Engine: "fake",
		Machine: snap.Manifest.Machine, PID: 1000 + b.seq, CreatedAt: time.Now(), LastActive: time.Now(), IdleTTL: req.IdleTTL,
		IdleSuspend: req.IdleSuspend, Head: snap.Digest,
		Labels: req.Labels, ForkMS: 1.5, FromPool: !req.NoPool && b.pools[snap.Tag] > 0, MemoryLimitMiB: req.Limits.MemoryMiB,
		Limits: b.LimitsOf(req.Limits, snap.Manifest.Machine),
	}
	if req.Lifetime > 0 {
		info.ExpiresAt = info.CreatedAt.Add(req.Lifetime)
	}
	x, err := newBox(ctx, info, filepath.Join(b.dir, id))
	if err != nil {
		return sandbox.Info{}, err
	}
	if req.Net != nil {
		x.net.Net = *req.Net
	}
	b.boxes[id] = x
	b.order = append(b.order, id)
	b.Events.Add(sandbox.Created, id, sandbox.EventData{Snapshot: snap.Tag, Digest: snap.Digest, TookMS: info.ForkMS, FromPool: info.FromPool})
	return info, nil
}

func checkSecrets(secrets map[string]string) error {
	var all []guest.Secret
	for name, value := range secrets {
		all = append(all, guest.Secret{Name: name, Value: []byte(value)})
	}
	return guest.CheckSecrets(all)
}

func (b *Backend) find(id string) (*box, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	x, ok := b.boxes[id]
	if !ok {
		return nil, fmt.Errorf("sandbox %s: %w", id, errdef.ErrNotFound)
	}
	return x, nil
}

// Get describes a sandbox.
func (b *Backend) Get(id string) (sandbox.Info, error) {
	x, err := b.find(id)
	if err != nil {
		return sandbox.Info{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return x.info, nil
}

// List lists the sandboxes, oldest first.
func (b *Backend) List() []sandbox.Info {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []sandbox.Info
	for _, id := range b.order {
		if x, ok := b.boxes[id]; ok {
			out = append(out, x.info)
		}
	}
	return out
}

// Kill removes a sandbox.
func (b *Backend) Kill(_ context.Context, id string) error {
	if err := b.failure("kill"); err != nil {
		return err
	}
	return b.remove(id)
}

func (b *Backend) remove(id string) error {
	x, err := b.find(id)
	if err != nil {
		return err
	}
	b.mu.Lock()
	delete(b.boxes, id)
	b.mu.Unlock()
	b.Events.Add(sandbox.Removed, id, sandbox.EventData{})
	x.close()
	return nil
}

// With runs f with the session to a sandbox's agent, and resumes the sandbox.
func (b *Backend) With(ctx context.Context, id string, f func(context.Context, *guest.Client) error) error {
	x, err := b.find(id)
	if err = errors.Join(err, b.failure("with")); err != nil {
		return err
	}
	b.update(id, func(i *sandbox.Info) {
		if i.State == sandbox.Suspended {
			i.State = sandbox.Running
		}
	})
	return f(ctx, x.client)
}

// CreateSnapshot writes a snapshot of a machine that never ran.
func (b *Backend) CreateSnapshot(ctx context.Context, req sandbox.SnapshotRequest) (snap snapshot.Snapshot, err error) {
	if _, err = (images{b}).Get(req.Image); err != nil {
		return snap, err
	}
	if err = checkNet(req.Net, req.Machine); err != nil {
		return snap, err
	}
	b.mu.Lock()
	b.warmup = req.Net
	b.mu.Unlock()
	progress.Report(ctx, "boot", "booting the template")
	if err = b.failure("boot"); err != nil {
		return snap, err
	}
	progress.ReportAmount(ctx, "freeze", "writing memory", 1, 2)
	return b.writeSnapshot(ctx, req.Tag, req.Replace, snapshot.Manifest{
		Engine: "fake", EngineVersion: "1", Machine: vmm.Machine{MemoryMiB: 1, VCPUs: 1, Net: req.Machine.Net}, Image: imageDigest, Warmup: req.Warmup,
		Languages: []string{"python"}, Host: b.Host,
	})
}

// writeSnapshot gives a tag to a machine of which all memory is zero.
func (b *Backend) writeSnapshot(ctx context.Context, tag string, replace bool, m snapshot.Manifest) (snap snapshot.Snapshot, err error) {
	stage := b.store.Stage
	if replace {
		stage = b.store.StageReplace
	}
	st, err := stage(ctx, tag)
	if err != nil {
		return snap, err
	}
	defer func() { err = errors.Join(err, st.Abort()) }()
	if err = errors.Join(os.WriteFile(st.MemoryPath(), make([]byte, m.Machine.MemoryMiB<<20), 0o600),
		os.WriteFile(st.DevicePath(), []byte("device of "+tag), 0o600)); err != nil {
		return snap, err
	}
	return st.Commit(ctx, m, snapshot.Facts{BootMS: 5, SnapshotMS: 1})
}

// SetPool notes the size of a pool, which is then full.
func (b *Backend) SetPool(_ context.Context, ref string, n int) error {
	if _, err := b.store.Resolve(ref); err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pools[ref] = n
	return nil
}

// Pool says how large a pool is.
func (b *Backend) Pool(ref string) (ready, want int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pools[ref], b.pools[ref]
}

// load makes numbers up.
func (b *Backend) load() sandbox.Load {
	b.mu.Lock()
	defer b.mu.Unlock()
	load := sandbox.Load{BranchCap: 4}
	for tag, n := range b.pools {
		load.Pools = append(load.Pools, sandbox.PoolLoad{Snapshot: tag, Ready: n, Want: n})
	}
	return load
}

// Memory makes numbers up.
func (b *Backend) Memory(id string) (private, shared int64, err error) {
	_, err = b.find(id)
	return 20 << 20, 100 << 20, err
}

// images is a Backend's image store.
type images struct{ b *Backend }

func newImage(name, source string) image.Image {
	return image.Image{
		Name: name, Digest: imageDigest, CreatedAt: time.Now(),
		Manifest: image.Manifest{Version: 1, Source: source, KernelVersion: "6.1.0", Root: image.Blob{Size: 1 << 20}},
	}
}

// Build pretends to build an image.
func (i images) Build(ctx context.Context, req image.BuildRequest) (image.Image, bool, error) {
	progress.Report(ctx, "root", "unpacking packages")
	if err := i.b.failure("build"); err != nil {
		return image.Image{}, false, err
	}
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	_, hit := i.b.images[req.Name]
	i.b.images[req.Name] = newImage(req.Name, req.Source)
	return i.b.images[req.Name], hit, nil
}

// Get finds an image by name or digest.
func (i images) Get(ref string) (image.Image, error) {
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	for name, img := range i.b.images {
		if ref == name || ref == img.Digest {
			return img, nil
		}
	}
	return image.Image{}, fmt.Errorf("%w: image %s", errdef.ErrNotFound, ref)
}

// List lists the images.
func (i images) List() ([]image.Image, error) {
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	var out []image.Image
	for _, img := range i.b.images {
		out = append(out, img)
	}
	return out, i.b.failure("images")
}

// GC only notes what it is to keep.
func (i images) GC(_ context.Context, keep func(digest string) bool) (int64, error) {
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	i.b.KeepImage = keep
	return 0, i.b.failure("collect")
}

// Remove removes an image.
func (i images) Remove(name string) error {
	if _, err := i.Get(name); err != nil {
		return err
	}
	i.b.mu.Lock()
	defer i.b.mu.Unlock()
	delete(i.b.images, name)
	return nil
}
