package sandbox

import (
	"errors"
	"fmt"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// inForce are the limits of a sandbox's machine.
func (w *world) inForce(t *testing.T, m *Manager, id string) vmm.Limits {
	t.Helper()
	b, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	limits, err := w.engine.Limits(b.machine().Handle().Dir)
	if err != nil {
		t.Fatal(err)
	}
	return limits
}

func TestLimits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	usual := vmm.Limits{MemoryMiB: 64 + monitorMiB, CPUMillis: 1000 + monitorCPU, PIDs: monitorPIDs}
	asked := vmm.Limits{MemoryMiB: 300, CPUMillis: 250, IOBytes: 1 << 20}
	want := vmm.Limits{MemoryMiB: 300, CPUMillis: 250, PIDs: monitorPIDs, IOBytes: 1 << 20}

	plain := fork(t, m, 1)[0]
	if got := w.inForce(t, m, plain); got != usual {
		t.Errorf("of a fork that asked for none: %+v, want %+v", got, usual)
	}
	limited := fork(t, m, 1, func(r *ForkRequest) { r.Limits = asked })[0]
	info, err := m.Get(limited)
	if err != nil || info.Limits != want || info.MemoryLimitMiB != 300 || w.inForce(t, m, limited) != want {
		t.Errorf("%+v, %v; in force %+v, want %+v", info.Limits, err, w.inForce(t, m, limited), want)
	}
	if info, err = m.Limit(t.Context(), limited, vmm.Limits{}); err != nil || info.Limits != usual || w.inForce(t, m, limited) != usual {
		t.Errorf("after a change: %+v, %v; in force %+v", info.Limits, err, w.inForce(t, m, limited))
	}
	if _, err = m.Limit(t.Context(), limited, asked); err != nil {
		t.Fatal(err)
	}
	// They are the sandbox's, whichever machine it has.
	if _, err = m.Suspend(t.Context(), limited); err != nil {
		t.Fatal(err)
	}
	if _, err = m.Resume(t.Context(), limited); err != nil || w.inForce(t, m, limited) != want {
		t.Errorf("of a sandbox that was suspended: %+v, %v", w.inForce(t, m, limited), err)
	}
}

func TestLimitsOfParkedForks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	if err := m.SetPool(t.Context(), "py", 1); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a parked fork", func() bool { ready, _ := m.Pool("py"); return ready == 1 })
	id := fork(t, m, 1, func(r *ForkRequest) { r.Limits = vmm.Limits{MemoryMiB: 400} })[0]
	info, err := m.Get(id)
	if err != nil || !info.FromPool || w.inForce(t, m, id).MemoryMiB != 400 {
		t.Errorf("from pool %v, %v, in force %+v", info.FromPool, err, w.inForce(t, m, id))
	}
}

func TestBadLimits(t *testing.T) {
	t.Parallel()
	for name, l := range map[string]vmm.Limits{
		"memory": {MemoryMiB: -1}, "cpu": {CPUMillis: -1}, "pids": {PIDs: -1}, "io": {IOBytes: -1}, "few-pids": {PIDs: minPIDs - 1},
	} {
		if err := checkLimits(l); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A machine that its own limit has killed is told apart from others, and takes
// none along.
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	events := NewEvents(100, nil)
	m := w.manager(t, func(c *Config) { c.Events = events })
	w.template(t, m)
	ids := fork(t, m, 2)
	w.engine.Crash(seatOf(m, ids[0]), fmt.Errorf("%w: %w", errdef.ErrExhausted, vmm.ErrOutOfMemory))
	eventually(t, "its death", func() bool { i, _ := m.Get(ids[0]); return i.State == Dead })
	info, err := m.Get(ids[0])
	if err != nil || !info.OutOfMemory {
		t.Errorf("%+v, %v", info, err)
	}
	if err := tryPing(t.Context(), m, ids[0]); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("use of it: %v", err)
	}
	ping(t, m, ids[1])
	seen := map[EventType]int{}
	all, _, _, _ := events.After(0, 100)
	for _, e := range all {
		seen[e.Type]++
	}
	if seen[OutOfMemory] != 1 || seen[Died] != 1 {
		t.Errorf("events: %v", seen)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	want := vmm.Usage{MemoryBytes: 5, PrivateBytes: 3, SharedBytes: 2, PIDs: 4}
	if err := w.engine.SetUsage(seatOf(m, id), want); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Usage(id); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if got, err := m.Usage(id); err != nil || got != (vmm.Usage{}) {
		t.Errorf("while it is suspended: %+v, %v", got, err)
	}
}
