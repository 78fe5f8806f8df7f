package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// newHand is the hand by which machines of the plot are saved; nil where that is
// for the engine to do. A monitor other than Firecracker is given a file to write
// to, and does no more than that.
func newHand(ctx context.Context, p *plot) (*bareFirecracker, error) {
	if p.d.Sandboxes.Engine.Name() != "firecracker" {
		return nil, nil
	}
	m, reason, err := learn(ctx, &tine{subject: p.subject, dirs: p.dirs})
	if err != nil {
		return nil, err
	}
	hand, ok := m.(*bareFirecracker)
	if !ok {
		return nil, fmt.Errorf("%w: no floor: %s", errdef.ErrUnsupported, reason)
	}
	return hand, nil
}

func newStill(ctx context.Context, p *plot) (still, error) {
	if p.hand != nil {
		return newHandStill(ctx, p.hand)
	}
	return newEngineStill(ctx, p)
}

// engineStill is a paused machine of the engine's, which saves it.
type engineStill struct {
	dir string
	vm  vmm.VM
}

func newEngineStill(ctx context.Context, p *plot) (_ *engineStill, err error) {
	s := &engineStill{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(ctx))
		}
	}()
	if s.dir, err = p.dirs.make(); err != nil {
		return nil, err
	}
	s.vm, err = p.d.Sandboxes.Engine.Restore(ctx, vmm.RestoreSpec{
		Common: vmm.Common{ID: "bench", Dir: s.dir, Machine: p.snap.Manifest.Machine, Root: p.img.RootPath(), DieWithParent: true},
		Memory: p.snap.MemoryPath(), Device: p.snap.DevicePath(),
	})
	if err != nil {
		return nil, err
	}
	return s, s.vm.Pause(ctx)
}

func (s *engineStill) save(ctx context.Context) (time.Duration, error) {
	path := filepath.Join(s.dir, deviceFile)
	begin := time.Now()
	err := s.vm.SaveDevice(ctx, path)
	took := time.Since(begin)
	return took, errors.Join(err, removeIfExists(path))
}

func (s *engineStill) close(ctx context.Context) error {
	var errs []error
	if s.vm != nil {
		errs = append(errs, s.vm.Kill(ctx))
	}
	if s.dir != "" {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// handStill is a machine that is paused, saved and resumed by hand. Nobody speaks
// to its guest.
type handStill struct {
	p *process
	g *firecrackerGrip
}

func newHandStill(ctx context.Context, hand *bareFirecracker) (_ *handStill, err error) {
	p, err := hand.load(ctx, false)
	if err != nil {
		return nil, err
	}
	s := &handStill{p: p, g: p.grip.(*firecrackerGrip)}
	if err = s.g.client.Pause(ctx); err != nil {
		return nil, errors.Join(err, p.end(ctx))
	}
	return s, nil
}

// save is how long the machine stands still: from the request to pause until it
// runs on.
func (s *handStill) save(ctx context.Context) (took time.Duration, err error) {
	if err = s.g.client.Resume(ctx); err != nil {
		return 0, err
	}
	begin := time.Now()
	err = s.g.client.Pause(ctx)
	if err == nil {
		err = s.g.saveDevice(ctx)
	}
	if err == nil {
		err = s.g.client.Resume(ctx)
	}
	took = time.Since(begin)
	if err == nil {
		err = s.g.client.Pause(ctx)
	}
	return took, errors.Join(err, s.g.forget())
}

func (s *handStill) close(ctx context.Context) error { return s.p.end(ctx) }
