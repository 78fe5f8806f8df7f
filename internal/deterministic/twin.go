package deterministic

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// twinPrefix begins the tags of twins. What follows is of the digest of the
// snapshot that it is the twin of, so later runs find it.
const (
	twinPrefix = "twin-"
	twinDigits = 40 // enough of a digest
)

// TwinTag is the tag of a snapshot's twin.
func TwinTag(digest string) string {
	digits := strings.TrimPrefix(digest, "sha256:")
	return twinPrefix + digits[:min(twinDigits, len(digits))]
}

// TwinSource is the beginning of the digest of the snapshot that a twin stands
// for, by the twin's tag; "" for a tag that is no twin's.
func TwinSource(tag string) string {
	digits, ok := strings.CutPrefix(tag, twinPrefix)
	if !ok || TwinTag(digits) != tag || len(digits) < twinDigits || strings.Trim(digits, "0123456789abcdef") != "" {
		return ""
	}
	return "sha256:" + digits
}

// Twin returns the deterministic snapshot that stands for one: itself, if it is
// deterministic, and else one of the same image and warm-up, in a machine of
// the same memory. That is made the first time that it is asked for; who asks
// meanwhile waits for it. It is errdef.ErrUnsupported for a snapshot that was
// taken of a sandbox: what was done in there nobody can do again.
func (r *Runner) Twin(ctx context.Context, ref string) (snapshot.Snapshot, error) {
	done, err := r.begin()
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer done()
	snap, pin, err := r.pin(ref)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	twin, err := r.twin(ctx, snap)
	if err = errors.Join(err, pin.Close()); err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("deterministic twin of %s: %w", ref, err)
	}
	return twin, nil
}

func (r *Runner) twin(ctx context.Context, snap snapshot.Snapshot) (_ snapshot.Snapshot, err error) {
	m := snap.Manifest
	switch {
	case m.Machine.Deterministic:
		return snap, nil
	case m.Parent != "" || snap.BranchedFrom != "":
		err = fmt.Errorf("%w: it was taken of a sandbox, and cannot be made again", errdef.ErrUnsupported)
		return snapshot.Snapshot{}, errdef.WithHint(err, "take a snapshot that was created from an image")
	}
	tag := TwinTag(snap.Digest)
	if twin, ok := r.knownTwin(tag, m); ok {
		return twin, nil
	}
	lock, err := durable.Lock(ctx, filepath.Join(r.cfg.Dir, tag+".lock"))
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()
	if twin, ok := r.knownTwin(tag, m); ok { // who had the lock has made it
		return twin, nil
	}
	img, err := r.cfg.Images.Get(m.Image)
	if err != nil {
		return snapshot.Snapshot{}, fmt.Errorf("%w: its image: %s", errdef.ErrConflict, err.Error())
	}
	return r.store(ctx, tag, true, true, template{r: r, img: img, shape: twinShape(m.Machine), lines: m.Warmup})
}

func twinShape(m vmm.Machine) vmm.Machine {
	return vmm.Machine{MemoryMiB: m.MemoryMiB, VCPUs: 1, Deterministic: true, ClockShift: DefaultShift}
}

// knownTwin finds a twin that was made before, by this engine.
func (r *Runner) knownTwin(tag string, m snapshot.Manifest) (snapshot.Snapshot, bool) {
	twin, err := r.cfg.Snapshots.Resolve(tag)
	if err != nil {
		return snapshot.Snapshot{}, false // it is made anew
	}
	t := twin.Manifest
	good := t.Machine == twinShape(m.Machine) && t.Image == m.Image && twin.RestorableBy(r.cfg.Engine) == nil
	return twin, good
}

// Comparison is what came of making a snapshot again.
type Comparison struct {
	Snapshot snapshot.Snapshot
	// Memory and Device are the files as they came out this time.
	Memory, Device snapshot.File
}

// SameMemory reports whether the memory came out the same.
func (c *Comparison) SameMemory() bool { return c.Memory == c.Snapshot.Manifest.Memory }

// SameDevice reports whether the state of the devices did, the processor's and
// the clock's among it. On a busy host the clock may be a tick further, which
// runs in any one snapshot do not see; see qemu's haltExactly.
func (c *Comparison) SameDevice() bool { return c.Device == c.Snapshot.Manifest.Device }

// Remake makes a deterministic snapshot again, of the same image and warm-up,
// and compares. Nothing is kept of it.
func (r *Runner) Remake(ctx context.Context, ref string) (_ Comparison, err error) {
	done, err := r.begin()
	if err != nil {
		return Comparison{}, err
	}
	defer done()
	o, err := r.origin(ctx, ref)
	if err != nil {
		return Comparison{}, fmt.Errorf("make %s again: %w", ref, err)
	}
	defer func() { err = errors.Join(err, o.pin.Close()) }()
	c := Comparison{Snapshot: o.snap}
	if c.Memory, c.Device, err = r.remake(ctx, o.snap); err != nil {
		return Comparison{}, fmt.Errorf("make %s again: %w", ref, err)
	}
	return c, nil
}
