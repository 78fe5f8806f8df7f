package sandbox

import "context"

// flatten makes a snapshot that is layered as quick to fork as one that is not.
func (m *Manager) flatten(ctx context.Context, ref string) error {
	snap, pin, err := m.pin(ref)
	if err != nil {
		return err
	}
	defer func() { _ = pin.Close() }() // only read
	if snap.Depth == 0 {
		return nil
	}
	return m.Snapshots.Flatten(ctx, snap)
}

// hot is how often a layered snapshot is forked before it is worth a flat
// image: the disk of one against the copying of its layers into each fork.
const hot = 2

// heat counts forks of a layered snapshot, and flattens it in the background
// when it is hot.
func (m *Manager) heat(o *origin, forks int) {
	if len(o.base.Layers) == 0 {
		return
	}
	digest := o.snap.Digest
	m.mu.Lock()
	before := m.warmth[digest]
	m.warmth[digest] = before + forks
	m.mu.Unlock()
	if before >= hot || before+forks < hot {
		return
	}
	ctx, done, err := m.begin(context.WithoutCancel(m.ctx))
	if err != nil {
		return // the Manager is closing
	}
	go func() {
		defer done()
		err := m.flatten(ctx, digest)
		if err != nil && ctx.Err() == nil {
			m.Logger.WarnContext(ctx, "snapshot not flattened", "snapshot", digest, "error", err)
		}
		m.mu.Lock()
		delete(m.warmth, digest)
		m.mu.Unlock()
	}()
}
