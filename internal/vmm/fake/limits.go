package fake

import (
	"context"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// Sweep does nothing: a fake machine leaves nothing on its host.
func (e *Engine) Sweep(context.Context) error { return nil }

// Close does nothing: the engine keeps nothing ready.
func (e *Engine) Close() error { return nil }

// SetLimits remembers the limits; nothing enforces them.
func (m *machine) SetLimits(l vmm.Limits) error {
	if m.gone() {
		return errGone
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limits = l
	return nil
}

// Usage is what a test has set by SetUsage.
func (m *machine) Usage() (vmm.Usage, error) {
	if m.gone() {
		return vmm.Usage{}, errGone
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.usage, nil
}

// Limits are those of the machine whose directory is dir.
func (e *Engine) Limits(dir string) (vmm.Limits, error) {
	m, err := e.find(dir)
	if err != nil {
		return vmm.Limits{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.limits, nil
}

// SetUsage is what the machine whose directory is dir takes from now on.
func (e *Engine) SetUsage(dir string, u vmm.Usage) error {
	m, err := e.find(dir)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.usage = u
	return nil
}

func (e *Engine) find(dir string) (*machine, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	m := e.running[dir]
	if m == nil {
		return nil, fmt.Errorf("%w: machine in %s", errdef.ErrNotFound, dir)
	}
	return m, nil
}
