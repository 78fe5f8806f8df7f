//go:build vm

package workspace_test

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmtest"
	"github.com/tinevm/tine/internal/workspace"
)

// daemon is what a daemon has open.
type daemon struct {
	boxes *sandbox.Manager
	store *workspace.Store
}

func start(t *testing.T, dir string) *daemon {
	t.Helper()
	// A store of its own: a daemon gives up what is held for sandboxes that it
	// does not know.
	snapshots, err := snapshot.Open(filepath.Join(dir, "n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := sandbox.NewManager(t.Context(), sandbox.Config{
		Dir: filepath.Join(dir, "s"), Engine: vmtest.Engine(t), Snapshots: snapshots, Images: vmtest.Images(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	s, err := workspace.Open(t.Context(), filepath.Join(dir, "w"), m, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &daemon{m, s}
}

func (d *daemon) stop(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	if err := d.boxes.Close(ctx); err != nil {
		t.Error(err)
	}
	if err := d.store.Close(); err != nil {
		t.Error(err)
	}
}

// TestWorkspaceOfAMachine: what was in a workspace's memory is there when it
// is resumed, by another daemon too.
func TestWorkspaceOfAMachine(t *testing.T) {
	t.Parallel()
	dir, ctx := t.TempDir(), t.Context()
	d := start(t, dir)
	snap, err := d.boxes.CreateSnapshot(ctx, sandbox.SnapshotRequest{
		Tag: "py", Image: vmtest.Image(t).Digest, Machine: vmm.Machine{MemoryMiB: 256, VCPUs: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	w, err := d.store.Create(ctx, workspace.CreateRequest{Name: "w", Snapshot: snap.Tag, MemoryLimitMiB: 512})
	if err != nil {
		t.Fatal(err)
	}
	eval := func(code string) string {
		t.Helper()
		var out string
		withErr := d.boxes.With(ctx, w.SandboxID, func(ctx context.Context, g *guest.Client) error {
			result, evalErr := g.Eval(ctx, guest.EvalRequest{Code: code, Timeout: 30 * time.Second})
			out = result.Value
			return evalErr
		})
		if withErr != nil {
			t.Error(withErr)
		}
		return strings.TrimSpace(out)
	}
	eval("kept = 41")
	if w, err = d.store.Suspend(ctx, "w"); err != nil || w.Status != workspace.Suspended || w.Sandbox.PID != 0 {
		t.Errorf("suspend: %+v, %v", w, err)
	}
	d.stop(t)

	d = start(t, dir)
	defer d.stop(t)
	if w, err = d.store.Get("w"); err != nil || w.Status != workspace.Suspended {
		t.Errorf("after a restart: %+v, %v", w, err)
	}
	if w, err = d.store.Resume(ctx, "w"); err != nil || w.Status != workspace.Running || w.Sandbox.MemoryLimitMiB != 512 {
		t.Errorf("resume: %+v, %v", w, err)
	}
	if got := eval("kept + 1"); got != "42" {
		t.Errorf("memory says %q", got)
	}
	if err = d.store.Delete(ctx, "w"); err != nil {
		t.Error(err)
	}
	if boxes := d.boxes.List(); len(boxes) != 0 {
		t.Errorf("sandboxes are left: %+v", boxes)
	}
}
