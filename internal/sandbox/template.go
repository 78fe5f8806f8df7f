package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// CreateSnapshot boots an image, warms it up, freezes it and stores it. When
// it replaces a snapshot that has a pool, the new one has that pool.
func (m *Manager) CreateSnapshot(ctx context.Context, req SnapshotRequest) (snapshot.Snapshot, error) {
	ctx, done, err := m.begin(ctx)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer done()
	began := time.Now()
	old, _ := m.Snapshots.Resolve(req.Tag) // there need not be one
	snap, err := m.createSnapshot(ctx, req)
	if err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("create snapshot %s: %w", req.Tag, err)
	}
	m.Events.madeTemplate(snap, began)
	if old.Digest != snap.Digest {
		if err = m.movePool(ctx, old.Digest, req.Tag); err != nil {
			m.Logger.WarnContext(ctx, "pool not moved to new snapshot", "snapshot", req.Tag, "error", err)
		}
	}
	return snap, nil
}

func (m *Manager) createSnapshot(ctx context.Context, req SnapshotRequest) (_ snapshot.Snapshot, err error) {
	img, err := m.Images.Get(req.Image)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	begin := m.Snapshots.Stage
	if req.Replace {
		begin = m.Snapshots.StageReplace
	}
	stage, err := begin(ctx, req.Tag)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer func() { err = errors.Join(err, stage.Abort()) }()
	t := &template{m: m, img: img, req: req, stage: stage, shape: m.shape(req.Machine)}
	if err = errors.Join(t.check(), snapshot.CheckRoom(t.stage.Dir(), t.shape)); err != nil {
		return snapshot.Snapshot{}, err
	}
	if err = t.make(ctx); err != nil {
		return snapshot.Snapshot{}, err
	}
	if _, err = m.Images.Get(img.Digest); err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("%w: its image was removed meanwhile: %s", errdef.ErrConflict, err.Error())
	}
	return stage.Commit(ctx, t.manifest(), t.facts)
}

func (m *Manager) shape(asked vmm.Machine) vmm.Machine {
	shape := m.Machine
	if asked.MemoryMiB != 0 {
		shape.MemoryMiB = asked.MemoryMiB
	}
	if asked.VCPUs != 0 {
		shape.VCPUs = asked.VCPUs
	}
	if asked.DiskMiB != 0 {
		shape.DiskMiB = asked.DiskMiB
	}
	if asked.Net {
		shape.Net = true
	}
	return shape
}

// template is a machine on its way to become a snapshot.
type template struct {
	m         *Manager
	img       image.Image
	req       SnapshotRequest
	stage     *snapshot.Stage
	shape     vmm.Machine
	vm        vmm.VM
	client    *guest.Client
	outlet    *outlet
	languages []string
	facts     snapshot.Facts
}

func (t *template) manifest() snapshot.Manifest {
	warmup := t.warmup()
	if imports := t.imports(); len(imports) > 0 {
		warmup = append(warmup, "import "+strings.Join(imports, ", "))
	}
	return snapshot.Manifest{
		Engine: t.m.Engine.Name(), EngineVersion: t.m.Engine.Version(), Host: t.m.Engine.Caps().Host, Machine: t.shape,
		Image: t.img.Digest, Warmup: warmup, Languages: t.languages,
	}
}

// The smallest and the largest scratch disk, in MiB.
const (
	minDisk = 16
	maxDisk = 1 << 20
)

func (t *template) check() error {
	if d := t.shape.DiskMiB; d != 0 && (d < minDisk || d > maxDisk) {
		return fmt.Errorf("%w: scratch disk of %d MiB: it must be %d to %d", errdef.ErrInvalid, d, minDisk, maxDisk)
	}
	switch {
	case t.shape.Net && t.shape.Deterministic:
		return fmt.Errorf("%w: a deterministic machine has no network card", errdef.ErrInvalid)
	case t.shape.Net && !t.m.Engine.Caps().Net:
		err := fmt.Errorf("%w: engine %s has no machines with a network card", errdef.ErrUnsupported, t.m.Engine.Name())
		return errdef.WithHint(err, "make it without --net, or run the daemon with another --engine")
	}
	_, err := t.m.checkNet(t.req.Net, t.shape)
	return err
}

func (t *template) warmup() []string {
	return slices.Concat(t.img.Manifest.Warmup, t.req.Warmup)
}

func (t *template) imports() []string {
	return slices.Concat(t.img.Manifest.Imports, t.req.Imports)
}

// make runs the template up to its frozen state. Its machine is gone when it
// returns, whichever way.
func (t *template) make(ctx context.Context) (err error) {
	if err = t.m.hold(1); err != nil {
		return err
	}
	defer t.m.drop()
	leave, err := t.m.enter(ctx)
	if err != nil {
		return err
	}
	defer leave()
	r := t.m.newRecord(newID())
	r.Machine, r.Owner = t.shape, t.m.self // half a template is of no use to anyone
	if err = r.create(t.m.Dir, t.m.self); err != nil {
		return err
	}
	// Its directory goes only after its machine, so that what could not be
	// ended is found again.
	defer func() {
		if err = errors.Join(err, t.kill()); t.vm == nil {
			err = errors.Join(err, os.RemoveAll(t.m.dir(r.ID)))
		}
	}()
	start := time.Now()
	if err = t.boot(ctx, r.ID); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.client.Close()) }()
	if err = t.warm(ctx); err != nil {
		return cause(t.vm, err)
	}
	t.facts.BootMS = time.Since(start).Milliseconds()
	return t.freeze(ctx)
}

// kill ends the template's machine, if there is one.
func (t *template) kill() error {
	if t.vm == nil {
		return nil
	}
	t.outlet.close()
	err := t.m.kill(t.vm)
	if err == nil {
		t.vm = nil
	}
	return err
}

// boot starts the machine and waits for its agent.
func (t *template) boot(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.m.Limits.Boot, errNoAnswer)
	defer cancel()
	progress.Report(ctx, "boot", "booting the template")
	start := time.Now()
	common, err := t.m.common(id, firstSeat, t.shape, t.img.RootPath())
	if err != nil {
		return err
	}
	spec := vmm.StartSpec{
		Common: common,
		Boot:   vmm.Boot{Kernel: t.img.KernelPath(), Initrd: t.img.InitrdPath()},
		Memory: t.stage.MemoryPath(),
	}
	spec.DieWithParent = true
	spec.Limits = t.m.LimitsOf(vmm.Limits{}, t.shape)
	if t.shape.DiskMiB > 0 {
		spec.Disk = t.stage.DiskPath()
		if err = image.FormatDisk(ctx, spec.Disk, int64(t.shape.DiskMiB)<<20); err != nil {
			return err
		}
	}
	vm, err := t.m.Engine.Start(ctx, spec)
	if err != nil {
		return err
	}
	t.vm = vm
	if t.outlet, err = t.m.newOutlet(id, vm, t.shape, t.req.Net); err != nil {
		return err
	}
	first := guest.NewIdentity("tine", id)
	if t.client, err = introduce(ctx, vm, first); err != nil {
		return t.explain(ctx, err)
	}
	progress.Report(ctx, "boot", fmt.Sprintf("guest is up after %.1f s", time.Since(start).Seconds()))
	return nil
}

// explain adds how the machine ended, or what the guest's kernel said last, to why it did not come up.
func (t *template) explain(ctx context.Context, err error) error {
	select {
	case <-t.vm.Done():
		return cause(t.vm, err)
	case <-time.After(deathNotice):
	}
	return vmm.Explain(ctx, t.vm, err)
}

// warm starts the interpreters and runs the warm-up commands.
func (t *template) warm(ctx context.Context) error {
	for _, in := range t.img.Manifest.Interpreters {
		if err := t.warmInterpreter(ctx, in.Name); err != nil {
			return err
		}
		t.languages = append(t.languages, in.Name)
	}
	for _, line := range t.warmup() {
		progress.Report(ctx, "warm", "running "+line)
		if err := t.runWarmup(ctx, line); err != nil {
			return err
		}
	}
	return nil
}

func (t *template) warmInterpreter(ctx context.Context, name string) error {
	ctx, cancel := t.bound(ctx)
	defer cancel()
	progress.Report(ctx, "warm", "starting the warm "+name+" interpreter")
	if _, err := t.client.Warm(ctx, name, nil, t.imports()); err != nil {
		return fmt.Errorf("start the %s interpreter: %w", name, err)
	}
	return nil
}

// warmupGrace is how long after its own bound an agent may take to say that a
// command has passed it.
const warmupGrace = 15 * time.Second

// bound is for what the agent itself bounds, lest a guest that hangs hold us.
func (t *template) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, t.m.Limits.Warmup+warmupGrace, errNoAnswer)
}

// maxWarmupOutput is how much of a warm-up command's output is kept.
const maxWarmupOutput = 1 << 20

func (t *template) runWarmup(ctx context.Context, line string) error {
	ctx, cancel := t.bound(ctx)
	defer cancel()
	spec := guest.ExecSpec{Argv: []string{"/bin/sh", "-c", line}, Timeout: t.m.Limits.Warmup}
	res, err := t.client.Run(ctx, spec, nil, maxWarmupOutput)
	if err != nil {
		return fmt.Errorf("warm-up %q: %w", line, err)
	}
	if res.Truncated {
		return fmt.Errorf("%w: warm-up %q: more than %d bytes of output", errdef.ErrInvalid, line, maxWarmupOutput)
	}
	if res.Exit.TimedOut {
		return fmt.Errorf("%w: warm-up %q: not done after %s", errdef.ErrTimeout, line, t.m.Limits.Warmup)
	}
	if res.Exit.Code != 0 {
		tail := res.Stderr[max(0, len(res.Stderr)-500):]
		return fmt.Errorf("%w: warm-up %q: exit status %d: %s", errdef.ErrInvalid, line, res.Exit.Code, strings.TrimSpace(string(tail)))
	}
	return nil
}

// freeze leaves memory and device state in the stage.
func (t *template) freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.m.Limits.Boot, errNoAnswer)
	defer cancel()
	progress.Report(ctx, "freeze", "freezing the template")
	if err := t.client.Quiesce(ctx); err != nil {
		return cause(t.vm, err)
	}
	if err := t.client.Close(); err != nil {
		return err
	}
	start := time.Now()
	err := t.vm.Freeze(ctx, t.stage.DevicePath())
	t.facts.SnapshotMS = time.Since(start).Milliseconds()
	return err
}
