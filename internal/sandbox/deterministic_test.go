package sandbox

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/snapshot"
)

// putDeterministic stores a snapshot like another, of a deterministic machine.
func (w *world) putDeterministic(t testing.TB, tag string, like snapshot.Snapshot) snapshot.Snapshot {
	t.Helper()
	st, err := w.snaps.Stage(t.Context(), tag)
	if err != nil {
		t.Fatal(err)
	}
	m := like.Manifest
	m.Machine.Deterministic, m.Machine.ClockShift, m.Machine.DiskMiB = true, 2, 0
	m.Memory, m.Device = snapshot.File{}, snapshot.File{}
	if err = errors.Join(os.WriteFile(st.MemoryPath(), make([]byte, m.Machine.MemoryMiB<<20), 0o600),
		os.WriteFile(st.DevicePath(), []byte("device"), 0o600)); err != nil {
		t.Fatal(err)
	}
	snap, err := st.Commit(t.Context(), m, snapshot.Facts{})
	if err = errors.Join(err, st.Abort()); err != nil {
		t.Fatal(err)
	}
	return snap
}

// TestDeterministicHasNoForks: what would fork one is refused, and says what to
// do instead. What only moves it goes on.
func TestDeterministicHasNoForks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	py := w.template(t, m)
	same := w.putDeterministic(t, "same", py)
	id := fork(t, m, 1)[0]
	for name, try := range map[string]func() error{
		"fork":      func() error { _, err := m.Fork(t.Context(), ForkRequest{Snapshot: "same", N: 1}); return err },
		"by digest": func() error { _, err := m.Fork(t.Context(), ForkRequest{Snapshot: same.Digest, N: 1}); return err },
		"pool":      func() error { return m.SetPool(t.Context(), "same", 1) },
		"can fork":  func() error { return m.CanFork(t.Context(), "same") },
		"roll back": func() error { _, err := m.Rollback(t.Context(), id, "same"); return err },
		"diff":      func() error { _, err := m.Diff(t.Context(), "py", "same"); return err },
	} {
		err := try()
		if !errors.Is(err, errdef.ErrConflict) || !strings.Contains(errdef.Hint(err), "tine run --deterministic --snapshot same") {
			if name != "by digest" || !errors.Is(err, errdef.ErrConflict) {
				t.Errorf("%s: %v, hint %q", name, err, errdef.Hint(err))
			}
		}
	}
	if out, err := m.Get(id); err != nil || out.State != Running {
		t.Errorf("%+v, %v", out, err)
	}
	if snap, err := m.Promote(t.Context(), "same", "best"); err != nil || snap.Digest != same.Digest {
		t.Errorf("promote: %v", err)
	}
	if snap, err := w.snaps.Compact(t.Context(), "same", "whole"); err != nil || snap.Digest != same.Digest {
		t.Errorf("compact: %s is not %s: %v", snap.Digest, same.Digest, err)
	}
	if err := w.snaps.Flatten(t.Context(), same); err != nil {
		t.Errorf("flatten: %v", err)
	}
	for _, tag := range []string{"same", "best", "whole"} {
		if err := w.snaps.Remove(t.Context(), tag); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
}
