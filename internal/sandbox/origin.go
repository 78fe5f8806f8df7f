package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
)

// origin is what machines from one snapshot have in common. Until it is closed
// the snapshot cannot be removed; each machine inherits that.
type origin struct {
	snap snapshot.Snapshot
	base snapshot.Base // what they map
	root string        // path of the root image
	pins []*os.File    // of the snapshot, and of what they map

	layers *guestmem.Image // what the mapped image lacks, or nil
}

func (o *origin) close() error {
	var errs []error
	if o.layers != nil {
		errs = append(errs, o.layers.Close())
	}
	for _, pin := range o.pins {
		errs = append(errs, pin.Close())
	}
	return errors.Join(errs...)
}

// fill writes into a machine's memory what the image that it maps lacks.
func (o *origin) fill(ctx context.Context, s guestmem.Space) error {
	if o.layers == nil {
		return nil
	}
	return s.Fill(ctx, o.layers)
}

// origin finds and pins a snapshot and checks that this engine can restore it.
func (m *Manager) origin(ctx context.Context, ref string) (*origin, error) {
	snap, pin, err := m.pin(ref)
	if err != nil {
		return nil, err
	}
	return m.originOf(ctx, snap, pin)
}

// originOf is origin of a snapshot that is pinned. It owns the pin.
func (m *Manager) originOf(ctx context.Context, snap snapshot.Snapshot, pin *os.File) (_ *origin, err error) {
	o := &origin{snap: snap, pins: []*os.File{pin}}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	u.Add(o.close)
	if err = m.fits(o); err != nil {
		return nil, err
	}
	if err = m.Snapshots.Verify(ctx, snap); err != nil {
		return nil, err
	}
	if o.base, err = m.Snapshots.Base(snap); err != nil {
		return nil, err
	}
	if o.base.Digest != snap.Digest {
		// A snapshot keeps its ancestors, but not the flat image of one.
		_, pin, pinErr := m.pin(o.base.Digest)
		if pinErr != nil {
			return nil, fmt.Errorf("%w: snapshot %s: %s", errdef.ErrUnavailable, snap.Digest, pinErr.Error())
		}
		o.pins = append(o.pins, pin)
	}
	if len(o.base.Layers) > 0 {
		if o.layers, err = guestmem.OpenImage(o.base.Path, o.base.Layers...); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// fits checks that this engine can restore the snapshot, and finds its image.
func (m *Manager) fits(o *origin) error {
	man, ref := o.snap.Manifest, o.snap.Tag
	if ref == "" {
		ref = o.snap.Digest
	}
	if man.Machine.Deterministic {
		err := fmt.Errorf("%w: snapshot %s is deterministic, and has no forks", errdef.ErrConflict, ref)
		return errdef.WithHint(err, "run commands in it: tine run --deterministic --snapshot "+ref+" -- COMMAND")
	}
	if err := o.snap.RestorableBy(m.Engine); err != nil {
		return err
	}
	img, err := m.Images.Get(man.Image)
	if err == nil {
		o.root = img.RootPath()
		_, err = os.Stat(o.root)
	}
	if err != nil {
		// Not its category: what is missing is not what the caller asked for.
		return fmt.Errorf("%w: snapshot %s: its image: %s", errdef.ErrConflict, ref, err.Error())
	}
	return nil
}

// pin finds a snapshot and keeps it from being removed. When it goes between
// the two, its tag may have been given to another.
func (m *Manager) pin(ref string) (snapshot.Snapshot, *os.File, error) {
	const tries = 3
	for try := 1; ; try++ {
		snap, err := m.Snapshots.Resolve(ref)
		if err != nil {
			return snap, nil, err
		}
		pin, err := m.Snapshots.Pin(snap)
		if err == nil || !errors.Is(err, errdef.ErrNotFound) || try == tries {
			return snap, pin, err
		}
	}
}
