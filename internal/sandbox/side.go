package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// side is one of the two that Diff compares.
type side struct {
	origin  snapshot.Snapshot
	image   *guestmem.Image
	own     *guestmem.Copy // pages of a sandbox's own; nil for a snapshot
	private map[uint64]bool
	box     *box
	client  *guest.Client
	changes map[string]guest.Change
	u       undo.Stack
}

func (s *side) close() error { return s.u.Close() }

// side opens a sandbox or a snapshot.
func (m *Manager) side(ctx context.Context, ref string) (_ *side, err error) {
	s := &side{private: map[uint64]bool{}}
	defer func() { err = s.u.Run(err) }()
	if isID(ref) {
		err = s.ofSandbox(ctx, m, ref)
	} else {
		err = s.ofSnapshot(ctx, m, ref)
	}
	if err != nil {
		return nil, err
	}
	if s.client, err = s.box.session(ctx); err != nil {
		return nil, err
	}
	if s.image, err = m.Snapshots.Image(s.origin); err != nil {
		return nil, err
	}
	s.u.Add(s.image.Close)
	return s, nil
}

// ofSnapshot forks one, to be looked at by nobody else.
func (s *side) ofSnapshot(ctx context.Context, m *Manager, ref string) error {
	o, err := m.origin(ctx, ref)
	if err != nil {
		return err
	}
	s.u.Add(o.close)
	s.origin = o.snap
	if err = m.hold(1); err != nil {
		return err
	}
	leave, err := m.enter(ctx)
	if err != nil {
		m.drop()
		return err
	}
	defer leave()
	if s.box, err = m.bring(ctx, o, secrets{}, vmm.Limits{}); err != nil {
		return err
	}
	s.u.Add(func() error { return s.box.order(context.WithoutCancel(ctx), end) })
	return nil
}

// ofSandbox copies the memory of one at an instant.
func (s *side) ofSandbox(ctx context.Context, m *Manager, id string) error {
	b, err := m.find(id)
	if err != nil {
		return err
	}
	unuse, err := b.use()
	if err != nil {
		return err
	}
	s.u.Add(func() error { unuse(); return nil })
	s.box = b
	if _, err = b.session(ctx); err != nil { // it may have to be resumed
		return err
	}
	release, err := b.take(ctx)
	if err != nil {
		return err
	}
	defer release()
	b.mu.Lock()
	digest := b.record.Origin
	b.mu.Unlock()
	var pin *os.File
	if s.origin, pin, err = m.pin(digest); err != nil {
		return err
	}
	s.u.Add(pin.Close)
	return s.copy(ctx, b)
}

func (s *side) copy(ctx context.Context, b *box) (err error) {
	vm := b.machine()
	if vm == nil {
		return context.Cause(b.ctx)
	}
	space, err := vm.Memory()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, runOn(ctx, vm)) }()
	if err = vm.Pause(ctx); err != nil {
		return err
	}
	if s.own, err = space.Copy(ctx); err != nil {
		return err
	}
	s.u.Add(s.own.Close)
	return s.own.Private(func(first, count uint64) bool {
		for page := first; page < first+count; page++ {
			s.private[page] = true
		}
		return true
	})
}

func (s *side) comparable(other *side) error {
	a, b := s.origin.Manifest, other.origin.Manifest
	if a.Image != b.Image || a.Machine != b.Machine {
		return fmt.Errorf("%w: they are not of one image and shape", errdef.ErrInvalid)
	}
	return nil
}

// read reads pages as the side has them.
func (s *side) read(p []byte, first uint64) error {
	if _, err := s.image.ReadAt(p, int64(first)*guestmem.PageSize); err != nil {
		return err
	}
	for i := range uint64(len(p) / guestmem.PageSize) {
		if !s.private[first+i] {
			continue
		}
		at := i * guestmem.PageSize
		if _, err := s.own.ReadAt(p[at:at+guestmem.PageSize], int64(first+i)*guestmem.PageSize); err != nil {
			return err
		}
	}
	return nil
}
