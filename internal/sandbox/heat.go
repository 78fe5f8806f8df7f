package sandbox

import (
	"context"
	"errors"

	"github.com/tinevm/tine/internal/linux"
)

// flatten makes a snapshot that is layered as quick to fork as one that is not.
func (m *Manager) flatten(ctx context.Context, ref string) (err error) {
	snap, pin, err := m.pin(ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pin.Close()) }()
	if snap.Depth == 0 {
		return nil
	}
	return m.Snapshots.Flatten(ctx, snap)
}

// heat counts what forks of a layered snapshot copy of its layers. When that is
// as much as a flat image would take, one is made in the background: so the
// two together never cost more than twice what was best.
func (m *Manager) heat(ctx context.Context, o *origin, forks int) error {
	if len(o.base.Layers) == 0 {
		return nil
	}
	var copied int64
	for _, layer := range o.base.Layers {
		size, err := linux.DiskUse(layer)
		if err != nil {
			return err
		}
		copied += size * int64(forks)
	}
	enough, err := linux.DiskUse(o.base.Path)
	if err != nil {
		return err
	}
	digest := o.snap.Digest
	m.mu.Lock()
	before := m.warmth[digest]
	m.warmth[digest] = before + copied
	m.mu.Unlock()
	if before < enough && before+copied >= enough {
		m.flattenSoon(ctx, digest)
	}
	return nil
}

// flattenSoon flattens a snapshot in the background.
func (m *Manager) flattenSoon(ctx context.Context, digest string) {
	ctx, done, err := m.begin(context.WithoutCancel(ctx))
	if err != nil {
		return // the Manager is closing
	}
	go func() {
		defer done()
		if err := m.flatten(ctx, digest); err != nil && ctx.Err() == nil {
			m.Logger.WarnContext(ctx, "snapshot not flattened", "snapshot", digest, "error", err)
		}
		m.mu.Lock()
		delete(m.warmth, digest)
		m.mu.Unlock()
	}()
}
