package deterministic

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// BuildRequest asks for a deterministic snapshot.
type BuildRequest struct {
	Tag string
	// Image is an image's name or digest.
	Image string
	// Warmup are shell commands, and Imports Python modules, that run in the
	// machine before it is frozen, after those that the image asks for: what
	// runs were warmed up for start quicker.
	Warmup, Imports []string
	// MemoryMiB is the machine's memory; 0 is the runner's default.
	MemoryMiB int
	// ClockShift is vmm.Machine.ClockShift; nil is DefaultShift.
	ClockShift *int
	// Replace allows that there is a snapshot of that tag.
	Replace bool
}

// Build boots an image, warms it up and freezes it where it waits for a job.
func (r *Runner) Build(ctx context.Context, req BuildRequest) (snapshot.Snapshot, error) {
	done, err := r.begin()
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer done()
	snap, err := r.build(ctx, req, false)
	if err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("create deterministic snapshot %s: %w", req.Tag, err)
	}
	return snap, nil
}

func (r *Runner) build(ctx context.Context, req BuildRequest, auto bool) (snapshot.Snapshot, error) {
	img, err := r.cfg.Images.Get(req.Image)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	lines := slices.Concat(img.Manifest.Warmup, req.Warmup)
	if imports := slices.Concat(img.Manifest.Imports, req.Imports); len(imports) > 0 {
		lines = append(lines, importLine+strings.Join(imports, ", "))
	}
	shape := vmm.Machine{MemoryMiB: r.cfg.Machine.MemoryMiB, VCPUs: 1, Deterministic: true, ClockShift: DefaultShift}
	if req.MemoryMiB != 0 {
		shape.MemoryMiB = req.MemoryMiB
	}
	if req.ClockShift != nil {
		shape.ClockShift = *req.ClockShift
	}
	return r.store(ctx, req.Tag, req.Replace, auto, template{r: r, img: img, shape: shape, lines: lines})
}

// store makes a template and commits it under a tag.
func (r *Runner) store(ctx context.Context, tag string, replace, auto bool, t template) (_ snapshot.Snapshot, err error) {
	begin := r.cfg.Snapshots.Stage
	if replace {
		begin = r.cfg.Snapshots.StageReplace
	}
	stage, err := begin(ctx, tag)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer func() { err = errors.Join(err, stage.Abort()) }()
	facts, err := t.make(ctx, stage.MemoryPath(), stage.DevicePath())
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	if _, err = r.cfg.Images.Get(t.img.Digest); err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("%w: its image was removed meanwhile: %s", errdef.ErrConflict, err.Error())
	}
	facts.Auto = auto
	return stage.Commit(ctx, t.manifest(), facts)
}

// template is a machine on its way to become a snapshot. All that the snapshot
// is made of is in its first fields.
type template struct {
	r     *Runner
	img   image.Image
	shape vmm.Machine
	lines []string // of the manifest's warm-up

	vm   vmm.VM
	talk talk
}

func (t *template) manifest() snapshot.Manifest {
	return snapshot.Manifest{
		Engine: t.r.cfg.Engine.Name(), EngineVersion: t.r.cfg.Engine.Version(), Host: t.r.cfg.Engine.Caps().Host, Machine: t.shape,
		Image: t.img.Digest, Warmup: t.lines,
	}
}

// make leaves the memory and the device state of the frozen template in files
// that are not there yet. Its machine is gone when it returns.
func (t *template) make(ctx context.Context, memory, device string) (facts snapshot.Facts, err error) {
	if err = snapshot.CheckRoom(filepath.Dir(memory), t.shape); err != nil {
		return snapshot.Facts{}, err
	}
	if err = t.r.slots.Acquire(ctx, 1); err != nil {
		return snapshot.Facts{}, fmt.Errorf("wait for other machines: %w", context.Cause(ctx))
	}
	defer t.r.slots.Release(1)
	place, err := t.r.newSeat()
	if err != nil {
		return snapshot.Facts{}, err
	}
	defer func() { err = errors.Join(err, place.remove()) }()
	began := time.Now()
	if err = t.boot(ctx, place.dir, memory); err != nil {
		return snapshot.Facts{}, err
	}
	defer func() { err = errors.Join(err, kill(ctx, t.vm)) }()
	if err = t.greet(ctx); err != nil {
		return snapshot.Facts{}, vmm.Explain(ctx, t.vm, err)
	}
	for _, argv := range t.warmup() {
		if err = t.warm(ctx, argv); err != nil {
			return snapshot.Facts{}, err
		}
	}
	facts.BootMS = time.Since(began).Milliseconds()
	progress.Report(ctx, "freeze", "freezing the template")
	freezing := time.Now()
	if err = t.talk.put(guestproto.Letter{Kind: guestproto.LetterFreeze}); err != nil {
		return snapshot.Facts{}, err
	}
	if err = t.vm.Freeze(ctx, device); err != nil {
		return snapshot.Facts{}, err
	}
	facts.SnapshotMS = time.Since(freezing).Milliseconds()
	return facts, nil
}

func (t *template) boot(ctx context.Context, dir, memory string) (err error) {
	progress.Report(ctx, "boot", "booting the deterministic template")
	t.vm, err = t.r.cfg.Engine.Start(ctx, vmm.StartSpec{
		Common: vmm.Common{ID: filepath.Base(dir), Dir: dir, Machine: t.shape, Root: t.img.RootPath(), DieWithParent: true},
		Boot:   vmm.Boot{Kernel: t.img.KernelPath(), Initrd: t.img.InitrdPath()},
		Memory: memory,
	})
	return err
}

// greet waits for the agent's first letter.
func (t *template) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, t.r.cfg.BootTime, errNoAgent)
	defer cancel()
	box, err := t.vm.Mailbox()
	if err != nil {
		return err
	}
	t.talk = talk{vm: t.vm, box: box}
	if err = t.talk.listen(ctx); err != nil {
		return err
	}
	var hello guestproto.Welcome
	if err = guestproto.Decode(t.talk.last.Body, &hello); err != nil || t.talk.last.Kind != guestproto.LetterReady {
		return fmt.Errorf("%w: the guest's first letter is no welcome", guestproto.ErrProtocol)
	}
	return nil
}

var errNoAgent = fmt.Errorf("%w: the guest's agent has not come to the rendezvous", errdef.ErrTimeout)

// importLine begins the line of a manifest's warm-up that names modules.
const importLine = "import "

// warmup is what runs in the template: the interpreters that the image has, and
// then the lines. Nothing of an interpreter stays in memory: a run starts its
// own, whose random numbers are not those of the snapshot.
func (t *template) warmup() [][]string {
	var all [][]string
	var python []string
	for _, in := range t.img.Manifest.Interpreters {
		if in.Name == "python" {
			python = in.Argv
			all = append(all, slices.Concat(python, []string{"-c", "pass"}))
		}
	}
	for i, line := range t.lines {
		if python != nil && i == len(t.lines)-1 && strings.HasPrefix(line, importLine) {
			all = append(all, slices.Concat(python, []string{"-c", line}))
		} else {
			all = append(all, []string{"/bin/sh", "-c", line})
		}
	}
	return all
}

const (
	maxWarmupOutput = 1 << 20
	maxWarmupTime   = 24 * time.Hour // by the guest's clock; the host's bounds it sooner
)

func (t *template) warm(ctx context.Context, argv []string) error {
	what := argv[len(argv)-1]
	progress.Report(ctx, "warm", "running "+what)
	ctx, cancel := context.WithTimeoutCause(ctx, t.r.cfg.WarmupTime, fmt.Errorf("%w: not done after %s", errdef.ErrTimeout, t.r.cfg.WarmupTime))
	defer cancel()
	var said []byte
	j := &job{
		spec: guestproto.Job{Argv: argv, Time: maxWarmupTime, Output: maxWarmupOutput, Quiesce: true},
		take: func(_ uint32, data []byte) error { said = append(said, data...); return nil },
	}
	done, err := t.talk.run(ctx, j)
	if err != nil {
		return fmt.Errorf("warm-up %q: %w", what, err)
	}
	if done.End != guestproto.JobExited || done.Code != 0 {
		const shown = 500
		return fmt.Errorf("%w: warm-up %q: exit status %d %s: %s", errdef.ErrInvalid, what, done.Code, failure(done.End),
			strings.TrimSpace(string(said[max(0, len(said)-shown):])))
	}
	return nil
}

// remake makes the snapshot's template again, in files that are not kept, and
// returns what they would be in a manifest.
func (r *Runner) remake(ctx context.Context, snap snapshot.Snapshot) (memory, device snapshot.File, err error) {
	img, err := r.cfg.Images.Get(snap.Manifest.Image)
	if err != nil {
		return memory, device, fmt.Errorf("%w: its image: %s", errdef.ErrConflict, err.Error())
	}
	place, err := r.newSeat()
	if err != nil {
		return memory, device, err
	}
	defer func() { err = errors.Join(err, place.remove()) }()
	t := template{r: r, img: img, shape: snap.Manifest.Machine, lines: snap.Manifest.Warmup}
	memoryPath, devicePath := filepath.Join(place.dir, "memory"), filepath.Join(place.dir, "device")
	if _, err = t.make(ctx, memoryPath, devicePath); err != nil {
		return memory, device, err
	}
	if memory, err = digestFile(ctx, memoryPath); err != nil {
		return memory, device, err
	}
	device, err = digestFile(ctx, devicePath)
	return memory, device, err
}

func digestFile(ctx context.Context, path string) (snapshot.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return snapshot.File{}, err
	}
	defer func() { _ = f.Close() }() // only read
	st, err := f.Stat()
	if err != nil {
		return snapshot.File{}, err
	}
	sum, err := digest(ctx, f, st.Size())
	return snapshot.File{Digest: sum, Size: st.Size()}, err
}
