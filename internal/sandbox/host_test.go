package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

func amd() vmm.Host {
	cpu := vmm.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC", Flags: "sha256:" + strings.Repeat("a", 64)}
	return vmm.Host{CPU: cpu, Kernel: "6.1.112"}
}

// starts counts the machines that were brought up.
func (e *faulty) starts() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.vms)
}

// TestSnapshotsOfAnotherHost: nothing that a host cannot restore is brought up
// there, by whatever way; and all of it is on a host that can.
func TestSnapshotsOfAnotherHost(t *testing.T) {
	t.Parallel()
	changed := func(f func(*vmm.Host)) *vmm.Host {
		h := amd()
		f(&h)
		return &h
	}
	for name, tt := range map[string]struct {
		here *vmm.Host
		text string // "" where it can
	}{
		"same":     {changed(func(h *vmm.Host) { h.Kernel = "6.1.9" }), ""},
		"cpu":      {changed(func(h *vmm.Host) { h.CPU.Stepping = 1 }), "this host's CPU is AMD EPYC (AuthenticAMD family 25 model 1 stepping 1)"},
		"flags":    {changed(func(h *vmm.Host) { h.CPU.Flags = "sha256:" + strings.Repeat("b", 64) }), "other features"},
		"kernel":   {changed(func(h *vmm.Host) { h.Kernel = "6.18.44" }), "made under Linux 6.1.112, and this host runs Linux 6.18.44"},
		"template": {changed(func(h *vmm.Host) { h.Template = "T2A" }), "made with no CPU template"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			here := amd()
			w.engine.SetHost(&here)
			m := w.manager(t)
			made := []snapshot.Snapshot{w.template(t, m)}
			ids := fork(t, m, 2)
			for _, mode := range []Mode{Diff, Full} {
				made = append(made, branch(t, m, ids[0], BranchRequest{Tag: "b-" + string(mode), Mode: mode}))
			}
			if _, err := m.Suspend(t.Context(), ids[1]); err != nil {
				t.Fatal(err)
			}
			held, err := w.snaps.Held(ids[1])
			if err != nil {
				t.Fatal(err)
			}
			for _, snap := range append(made, held) {
				if diff := cmp.Diff(&here, snap.Manifest.Host); diff != "" {
					t.Errorf("the host of %s (-want +got):\n%s", snap.Tag, diff)
				}
			}
			w.engine.SetHost(tt.here)
			started := w.engine.starts()
			for way, try := range waysToRestore(m, ids) {
				err := try(t.Context())
				if tt.text == "" {
					if err != nil {
						t.Errorf("%s: %v", way, err)
					}
					continue
				}
				if !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(err.Error(), tt.text) || errdef.Hint(err) == "" {
					t.Errorf("%s: %v, hint %q", way, err, errdef.Hint(err))
				}
			}
			if n := w.engine.starts() - started; tt.text != "" && n != 0 {
				t.Errorf("%d machines were started", n)
			}
			if err := m.SetPool(t.Context(), "py", 0); err != nil {
				t.Error(err)
			}
			killAll(t, m)
			for _, tag := range []string{"b-diff", "b-full"} {
				eventually(t, "branch to be free", func() bool { return w.snaps.Remove(t.Context(), tag) == nil })
			}
			w.nothing(t, m)
		})
	}
}

// waysToRestore are all the ways in which a snapshot becomes a machine. Of the
// sandboxes the first runs, and the second is suspended.
func waysToRestore(m *Manager, ids []string) map[string]func(context.Context) error {
	forkOf := func(ref string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := m.Fork(ctx, ForkRequest{Snapshot: ref, N: 1})
			return err
		}
	}
	return map[string]func(context.Context) error{
		"can-fork":       func(ctx context.Context) error { return m.CanFork(ctx, "py") },
		"fork":           forkOf("py"),
		"fork-of-branch": forkOf("b-diff"),
		"fork-of-whole":  forkOf("b-full"),
		"pool":           func(ctx context.Context) error { return m.SetPool(ctx, "py", 1) },
		"rollback":       func(ctx context.Context) error { _, err := m.Rollback(ctx, ids[0], "b-diff"); return err },
		"diff":           func(ctx context.Context) error { _, err := m.Diff(ctx, "py", "b-diff"); return err },
		"resume":         func(ctx context.Context) error { _, err := m.Resume(ctx, ids[1]); return err },
		"use-of-a-suspended": func(ctx context.Context) error {
			return m.With(ctx, ids[1], func(context.Context, *guest.Client) error { return nil })
		},
	}
}

// TestRefusedSandboxesGoOn: what a host refuses changes nothing.
func TestRefusedSandboxesGoOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	here, there := amd(), amd()
	there.CPU.Model = 17
	w.engine.SetHost(&here)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	sh(t, m, id, "echo kept > note")
	w.engine.SetHost(&there)
	if _, err := m.Rollback(t.Context(), id, "py"); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("rollback: %v", err)
	}
	if got := sh(t, m, id, "cat note"); got != "kept" {
		t.Errorf("note %q", got)
	}
	// It was not made here: its branches are for where it came from.
	if b := branch(t, m, id, BranchRequest{Tag: "b", Mode: Diff}); *b.Manifest.Host != here {
		t.Errorf("host of a branch: %+v", b.Manifest.Host)
	}
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Resume(t.Context(), id); !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(errdef.Hint(err), "tine rm "+id) {
		t.Errorf("resume: %v, hint %q", err, errdef.Hint(err))
	}
	w.engine.SetHost(&here)
	if got := sh(t, m, id, "cat note"); got != "kept" { // it was suspended all the time
		t.Errorf("note %q", got)
	}
	killAll(t, m)
	eventually(t, "branch to be free", func() bool { return w.snaps.Remove(t.Context(), "b") == nil })
	w.nothing(t, m)
}

// TestSnapshotWithoutHost: one that does not say where it was made is for
// engines to which that is all the same.
func TestSnapshotWithoutHost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	if snap := w.template(t, m); snap.Manifest.Host != nil {
		t.Errorf("host %+v", snap.Manifest.Host)
	}
	here := amd()
	w.engine.SetHost(&here)
	err := m.CanFork(t.Context(), "py")
	if !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(err.Error(), "does not say") || errdef.Hint(err) == "" {
		t.Errorf("%v, hint %q", err, errdef.Hint(err))
	}
	w.engine.SetHost(nil)
	if err = m.CanFork(t.Context(), "py"); err != nil {
		t.Error(err)
	}
	w.nothing(t, m)
}

// TestGarbageHost: a manifest that is changed is damaged, whatever it then says.
func TestGarbageHost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	here := amd()
	w.engine.SetHost(&here)
	m := w.manager(t)
	snap := w.template(t, m)
	path := filepath.Join(snap.Dir(), "manifest.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	started := w.engine.starts()
	for name, with := range map[string]string{
		"another": "GenuineIntel", "huge": strings.Repeat("A", 1<<19), "escape": `\u001b[2J`, "none": "",
	} {
		bad := strings.Replace(string(good), "AuthenticAMD", with, 1)
		if err = os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err = m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1}); err == nil || len(err.Error()) > 1000 {
			t.Errorf("%s: %.1000v", name, err)
		}
	}
	if n := w.engine.starts() - started; n != 0 {
		t.Errorf("%d machines were started", n)
	}
	if err = os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	w.nothing(t, m)
}
