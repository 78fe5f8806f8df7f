package sandbox

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/vmm"
)

func TestTemplate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	manifest := image.Manifest{Version: 1, Source: "test", Warmup: []string{"echo from the image >> state"}}
	python, err := exec.LookPath("python3")
	if err == nil {
		manifest.Interpreters = []image.Interpreter{{Name: "python", Argv: []string{python}}}
		manifest.Imports = []string{"json"}
	}
	putImage(t, filepath.Join(w.dir, "images"), "warm", manifest)
	m := w.manager(t)
	snap, err := m.CreateSnapshot(t.Context(), SnapshotRequest{
		Tag: "py", Image: "warm", Machine: vmm.Machine{MemoryMiB: 96}, Warmup: []string{"echo from the request >> state"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(vmm.Machine{MemoryMiB: 96, VCPUs: 1}, snap.Manifest.Machine); diff != "" {
		t.Errorf("shape (-want +got):\n%s", diff)
	}
	if python != "" && (len(snap.Manifest.Languages) != 1 || len(snap.Manifest.Warmup) != 3) {
		t.Errorf("manifest %+v", snap.Manifest)
	}
	id := fork(t, m, 1)[0]
	if got := sh(t, m, id, "cat state"); got != "from the image\nfrom the request" {
		t.Errorf("the warm-up left %q", got)
	}
	if _, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py"}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("second time: %v, want ErrExists", err)
	}
	killAll(t, m)
	w.nothing(t, m)
}

// TestTemplateWithNetworkCard: all that is made of it has one, and nothing else.
func TestTemplateWithNetworkCard(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	snap, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "net", Image: "py", Machine: vmm.Machine{Net: true}})
	if err != nil {
		t.Fatal(err)
	}
	want := m.Machine
	want.Net = true
	if diff := cmp.Diff(want, snap.Manifest.Machine); diff != "" {
		t.Errorf("shape (-want +got):\n%s", diff)
	}
	for tag, net := range map[string]bool{"net": true, "py": false} {
		made, err := m.Fork(t.Context(), ForkRequest{Snapshot: tag, N: 1})
		if err != nil {
			t.Fatal(err)
		}
		if got := made[0].Sandbox.Machine.Net; got != net {
			t.Errorf("a fork of %s has a network card: %v", tag, got)
		}
		branch, err := m.Branch(t.Context(), made[0].Sandbox.ID, BranchRequest{Tag: "branch-" + tag, Mode: Diff})
		if err != nil || branch.Manifest.Machine.Net != net {
			t.Errorf("a branch of it: %+v, %v", branch.Manifest.Machine, err)
		}
	}
	killAll(t, m)
	w.nothing(t, m)
}

func TestNoTemplateWithNetworkCard(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		change func(*world, *Config)
		want   error
		hint   string
	}{
		"engine":        {func(w *world, _ *Config) { w.engine.netless = true }, errdef.ErrUnsupported, "make it without --net"},
		"deterministic": {func(_ *world, c *Config) { c.Machine.Deterministic = true }, errdef.ErrInvalid, ""},
	} {
		w := newWorld(t)
		m := w.manager(t, func(c *Config) { tt.change(w, c) })
		_, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "net", Image: "py", Machine: vmm.Machine{Net: true}})
		if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "network card") || !strings.Contains(errdef.Hint(err), tt.hint) {
			t.Errorf("%s: %v, hint %q", name, err, errdef.Hint(err))
		}
		w.nothing(t, m)
	}
}

func TestBadTemplate(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		req  SnapshotRequest
		want error
		text string
	}{
		"no-image":  {SnapshotRequest{Tag: "new", Image: "nope"}, errdef.ErrNotFound, "nope"},
		"bad-tag":   {SnapshotRequest{Tag: "../new", Image: "py"}, errdef.ErrInvalid, "../new"},
		"bad-shape": {SnapshotRequest{Tag: "new", Image: "py", Machine: vmm.Machine{VCPUs: 1000}}, errdef.ErrInvalid, "1000"},
		"no-room":   {SnapshotRequest{Tag: "new", Image: "py", Machine: vmm.Machine{MemoryMiB: 1 << 30}}, errdef.ErrExhausted, "MiB are free"},
		"failing-warm-up": {
			SnapshotRequest{Tag: "new", Image: "py", Warmup: []string{"echo useful; yes no | head -c 2000 >&2; echo no module named x >&2; exit 3"}},
			errdef.ErrInvalid, "exit status 3: ",
		},
		"loud-warm-up": {
			SnapshotRequest{Tag: "new", Image: "py", Warmup: []string{"yes"}},
			errdef.ErrInvalid, "output",
		},
		"slow-warm-up": {
			SnapshotRequest{Tag: "new", Image: "py", Warmup: []string{"exec sleep 100"}},
			errdef.ErrTimeout, "sleep 100",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t, func(c *Config) {
				if name == "slow-warm-up" {
					c.Limits.Warmup = 1
				}
			})
			_, err := m.CreateSnapshot(t.Context(), tt.req)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("CreateSnapshot: %v, want %v and %q", err, tt.want, tt.text)
			}
			if name == "failing-warm-up" && !strings.HasSuffix(err.Error(), "no module named x") {
				t.Errorf("the error does not end as stderr does: %v", err)
			}
			w.nothing(t, m)
		})
	}
}

// TestImageRemovedMeanwhile: there is no snapshot that nobody can fork.
func TestImageRemovedMeanwhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.engine.onStep(failOnce("freeze", 1, func(ctx context.Context) error {
		_, err := w.images.GC(ctx, nil)
		return errors.Join(w.images.Remove("py"), err)
	}))
	// Its name alone may go.
	if _, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py"}); err != nil {
		t.Fatal(err)
	}
	w.engine.onStep(failOnce("freeze", 1, func(ctx context.Context) error {
		_, err := w.images.GC(ctx, nil)
		return err
	}))
	snap, err := w.snaps.Resolve("py")
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "other", Image: snap.Manifest.Image})
	if !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("CreateSnapshot: %v, want ErrConflict", err)
	}
	w.nothing(t, m)
}

func TestCanceledTemplate(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"start", "dial", "say", "freeze"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			m := w.manager(t)
			ctx, cancel := context.WithCancel(t.Context())
			w.engine.onStep(failOnce(step, 1, func(ctx context.Context) error {
				cancel()
				return hang(ctx)
			}))
			_, err := m.CreateSnapshot(ctx, SnapshotRequest{Tag: "py", Image: "py", Warmup: []string{"true"}})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("CreateSnapshot: %v, want context.Canceled", err)
			}
			w.nothing(t, m)
		})
	}
}

// TestTemplateDies: the reason is told.
func TestTemplateDies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.engine.onStep(failOnce("say", 2, func(context.Context) error {
		for _, name := range names(t, m.Dir) {
			go w.engine.Crash(seatOf(m, name), errors.New("killed by a test"))
		}
		return nil
	}))
	_, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "py", Image: "py", Warmup: []string{"exec sleep 10"}})
	if err == nil || !strings.Contains(err.Error(), "warm-up") {
		t.Errorf("CreateSnapshot: %v", err)
	}
	w.nothing(t, m)
}

// TestWithKeepsErrors: what a caller's function returns comes back as it is.
func TestWithKeepsErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	id := fork(t, m, 1)[0]
	err := m.With(t.Context(), id, func(context.Context, *guest.Client) error { return errInjected })
	if !errors.Is(err, errInjected) || err.Error() != errInjected.Error() {
		t.Errorf("With: %v", err)
	}
}
