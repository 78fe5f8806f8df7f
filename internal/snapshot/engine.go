package snapshot

import (
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// RestorableBy returns nil if the engine, on this host, reads the snapshot's
// device state. Otherwise it says why not, with a hint: errdef.ErrConflict for
// another engine's, and errdef.ErrUnsupported for another host's. It looks at
// the manifest only. Nothing else decides which snapshots an engine is given.
func (s Snapshot) RestorableBy(engine vmm.Engine) error {
	m := s.Manifest
	if m.Engine != engine.Name() || m.EngineVersion != engine.Version() {
		err := fmt.Errorf("%w: snapshot %s was made by %s %s, this is %s %s", errdef.ErrConflict, s.ref(),
			m.Engine, m.EngineVersion, engine.Name(), engine.Version())
		return errdef.WithHint(err, "make it again: tine snapshot create --replace "+s.ref())
	}
	here := engine.Caps().Host
	if here == nil {
		return nil // it depends on none
	}
	if m.Host == nil {
		err := fmt.Errorf("%w: snapshot %s cannot be used: it does not say which CPU and kernel it was made on", errdef.ErrUnsupported, s.ref())
		return errdef.WithHint(err, "make it again: tine snapshot create --replace "+s.ref())
	}
	if err := here.Accepts(*m.Host); err != nil {
		return fmt.Errorf("snapshot %s cannot be used on this host: %w", s.ref(), err)
	}
	return nil
}

func sameHost(a, b *vmm.Host) bool {
	if a == nil || b == nil {
		return a == b
	}
	return *a == *b
}

func hostName(h *vmm.Host) string {
	if h == nil {
		return "not said"
	}
	return h.String()
}
