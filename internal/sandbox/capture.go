package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// capture is a sandbox on its way to become a snapshot: first the instant, in
// which the machine is paused, then the writing, which needs the machine no
// more. It is not safe for concurrent use.
type capture struct {
	m     *Manager
	vm    vmm.VM
	stage *snapshot.Stage
	mode  Mode
	facts snapshot.Facts

	limits vmm.Limits // of the machine

	origin snapshot.Snapshot // what the machine was raised from
	parent snapshot.Snapshot // what the layer is relative to; of Full only what it follows
	images map[string]*guestmem.Image
	space  guestmem.Space
	u      undo.Stack // of all that close gives back

	twin   *guestmem.Pending     // for Live: ready to be made
	room   *guestmem.Reservation // for Diff and Full: room for a copy
	source guestmem.Source       // the memory of the instant
	disk   []string              // the files of the disk of the instant
	memory undo.Stack            // of what source holds
}

// close gives back all but the stage.
func (c *capture) close() error { return errors.Join(c.memory.Close(), c.u.Close()) }

func (m *Manager) newCapture(vm vmm.VM, stage *snapshot.Stage, mode Mode) *capture {
	return &capture{m: m, vm: vm, stage: stage, mode: mode, images: map[string]*guestmem.Image{}}
}

// maxLineage is how deep branches of branches get by themselves. From there on
// they are relative to what their sandbox was forked from, or stand alone, so
// that there is no end to how often a sandbox can be branched.
const maxLineage = 32

// prepare does all that can be done while the machine still runs.
func (c *capture) prepare(originDigest, head string) (err error) {
	if c.space, err = c.vm.Memory(); err != nil {
		return err
	}
	if c.origin, err = c.hold(originDigest); err != nil {
		return fmt.Errorf("%w: what it was forked from: %s", errdef.ErrUnavailable, err.Error())
	}
	c.choose(head)
	if err = c.open(c.origin); err != nil {
		return err
	}
	if c.mode != Full {
		if err = c.open(c.parent); err != nil {
			return err
		}
	}
	return c.checkDisk()
}

// arm makes ready for the instant whatever takes time.
func (c *capture) arm(ctx context.Context) (err error) {
	if err = c.vm.PrepareDisk(ctx); err != nil { // the instant takes longer, no more
		c.m.Logger.WarnContext(ctx, "scratch disk not prepared for a branch", "error", err)
	}
	if c.mode == Live {
		if err = c.lift(); err != nil {
			return err
		}
		c.twin, err = c.m.Freezer.Prepare(ctx, c.space)
		if err == nil {
			c.memory.Add(c.twin.Close)
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		c.noTwin(err)
	}
	if c.room, err = c.space.Reserve(ctx); err == nil {
		c.memory.Add(c.room.Close)
	}
	return err
}

// lift gives the machine room for a second copy of what it writes while its twin
// is read: the kernel counts both against its limit. It is taken away again when
// the twin is gone.
func (c *capture) lift() error {
	if c.limits.MemoryMiB == 0 {
		return nil
	}
	more := c.limits
	more.MemoryMiB += c.origin.Manifest.Machine.MemoryMiB
	if err := c.vm.SetLimits(more); err != nil {
		return err
	}
	c.memory.Add(func() error {
		select {
		case <-c.vm.Done(): // and its limits with it
			return nil
		default:
			return c.vm.SetLimits(c.limits)
		}
	})
	return nil
}

// hold finds a snapshot and keeps it until close.
func (c *capture) hold(digest string) (snapshot.Snapshot, error) {
	snap, pin, err := c.m.pin(digest)
	if err == nil {
		c.u.Add(pin.Close)
	}
	return snap, err
}

// choose decides what the layer is relative to: the sandbox's last branch,
// unless that is gone or deep already.
func (c *capture) choose(head string) {
	c.parent, c.facts.Follows = c.origin, c.origin.Digest
	if head != "" && head != c.origin.Digest {
		snap, err := c.hold(head)
		if err == nil {
			c.facts.Follows = head
		}
		if err == nil && c.m.related(snap, c.origin) {
			c.parent = snap
		}
	}
	if c.parent.Depth >= maxLineage {
		c.parent = c.origin
	}
	if c.parent.Depth >= snapshot.MaxDepth {
		c.mode = Full
	}
}

// related reports whether the chains of two snapshots have one root, so that
// one can be told by how it differs from the other.
func (m *Manager) related(a, b snapshot.Snapshot) bool {
	chainA, errA := m.Snapshots.Chain(a)
	chainB, errB := m.Snapshots.Chain(b)
	return errA == nil && errB == nil && chainA[0].Digest == chainB[0].Digest
}

// open opens the image of a snapshot.
func (c *capture) open(snap snapshot.Snapshot) error {
	if c.images[snap.Digest] != nil {
		return nil
	}
	img, err := c.m.Snapshots.Image(snap)
	if err != nil {
		return err
	}
	c.u.Add(img.Close)
	c.images[snap.Digest] = img
	return nil
}

// checkDisk checks that the disk can take what is to be written, as far as can
// be told before the instant.
func (c *capture) checkDisk() error {
	need := int64(0)
	err := c.space.Private(func(_, count uint64) bool {
		need += int64(count) * guestmem.PageSize
		return true
	})
	if err != nil {
		return err
	}
	if c.mode == Full {
		use, useErr := linux.DiskUse(c.origin.MemoryPath())
		if useErr == nil { // else it is layered, and Flatten or the disk will tell
			need += use
		}
	}
	free, err := linux.FreeSpace(c.stage.Dir())
	if err != nil {
		return err
	}
	if free < need {
		err = fmt.Errorf("%w: %d MiB are free where snapshots are kept, and the branch may need %d", errdef.ErrExhausted, free>>20, need>>20)
		return errdef.WithHint(err, "free some space: tine snapshot gc, tine snapshot prune")
	}
	return nil
}

// noTwin makes do without one, and says so.
func (c *capture) noTwin(why error) {
	c.mode = Diff
	c.facts.Warning = "taken in mode diff, as this host allows no live branch: " + why.Error()
}

// resumeTime bounds the resume of a machine, whatever became of the branch.
const resumeTime = 10 * time.Second

// runOn lets a machine run again that was paused, also when ctx has ended.
func runOn(ctx context.Context, vm vmm.VM) error {
	late, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTime)
	defer cancel()
	return vm.Resume(late)
}

// instant pauses the machine, takes device state and memory, and resumes it,
// whatever happens. A machine that was paused before stays so.
func (c *capture) instant(ctx context.Context) (err error) {
	paused, err := c.vm.Paused(ctx)
	if err != nil {
		return err
	}
	start := time.Now()
	if !paused {
		defer func() {
			err = errors.Join(err, runOn(ctx, c.vm))
			c.facts.PauseMS = float64(time.Since(start).Microseconds()) / 1000
		}()
		if err = c.vm.Pause(ctx); err != nil {
			return err
		}
	}
	if err = c.devices(ctx); err != nil {
		return err
	}
	return c.freeze(ctx)
}

// devices takes the disk and the state of the devices of a paused machine.
func (c *capture) devices(ctx context.Context) (err error) {
	if c.disk, err = c.vm.FreezeDisk(ctx); err != nil {
		return err
	}
	return c.vm.SaveDevice(ctx, c.stage.DevicePath())
}

// keepDisk puts the disk of the instant into the stage. Its files stay where
// they are only as long as the sandbox's turn.
func (c *capture) keepDisk(ctx context.Context) error {
	if len(c.disk) == 0 {
		return nil
	}
	return c.stage.LinkDisk(ctx, c.disk)
}

// freeze makes source the memory of this instant.
func (c *capture) freeze(ctx context.Context) error {
	if c.mode == Live {
		twin, err := c.twin.Freeze(ctx)
		if err == nil {
			c.source = twin
			c.memory.Add(twin.Close)
			return nil
		}
		if ctx.Err() != nil || errors.Is(err, errdef.ErrNotFound) { // the machine is gone
			return err
		}
		c.noTwin(err)
	}
	begin := time.Now()
	memory, err := c.copy(ctx)
	if err != nil {
		return err
	}
	c.facts.DiffMS = time.Since(begin).Milliseconds()
	c.source = memory
	c.memory.Add(memory.Close)
	return nil
}

// copy copies what the machine has of its own, into the room for it if there
// is some.
func (c *capture) copy(ctx context.Context) (*guestmem.Copy, error) {
	if c.room != nil {
		return c.room.Copy(ctx)
	}
	return c.space.Copy(ctx)
}

// write writes the memory of the instant into the stage.
func (c *capture) write(ctx context.Context) error {
	begin := time.Now()
	path, save := c.stage.LayerPath(), c.layer
	if c.mode == Full {
		path, save = c.stage.MemoryPath(), c.whole
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	// A twin whose helper was killed was not read to its end: Close says so.
	if err = errors.Join(save(ctx, f), f.Close(), c.memory.Close()); err != nil {
		return err
	}
	if c.mode == Live {
		c.facts.DiffMS = time.Since(begin).Milliseconds()
	}
	c.facts.Mode = string(c.mode)
	c.facts.DiffLogicalBytes = c.images[c.origin.Digest].Size()
	c.facts.DiffPhysicalBytes, err = linux.DiskUse(path)
	return err
}

func (c *capture) layer(ctx context.Context, f *os.File) error {
	origin, parent := c.images[c.origin.Digest], c.images[c.parent.Digest]
	w, err := guestmem.NewWriter(f, origin.Size())
	if err != nil {
		return err
	}
	if err = guestmem.Save(ctx, c.source, origin, parent, w); err != nil {
		return err
	}
	_, err = w.Close()
	return err
}

func (c *capture) whole(ctx context.Context, f *os.File) error {
	return guestmem.SaveWhole(ctx, c.source, c.images[c.origin.Digest], f)
}

// manifest is what the origin's says, but for the memory.
func (c *capture) manifest() snapshot.Manifest {
	of := c.origin.Manifest
	man := snapshot.Manifest{
		Engine: of.Engine, EngineVersion: of.EngineVersion, Host: of.Host, Machine: of.Machine,
		Image: of.Image, Warmup: of.Warmup, Languages: of.Languages,
	}
	if c.mode != Full {
		man.Parent = c.parent.Digest
	}
	return man
}
