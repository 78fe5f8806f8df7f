//go:build vm

package deterministic_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmtest"
)

// TestNumbers measures what docs/deterministic.md says: TINE_NUMBERS=1.
func TestNumbers(t *testing.T) {
	if os.Getenv("TINE_NUMBERS") == "" {
		t.Skip("it measures, by hand")
	}
	r := vmtest.Deterministic(t, 1)
	store, _ := vmtest.Snapshot(t)
	m, err := sandbox.NewManager(t.Context(), sandbox.Config{
		Dir: filepath.Join(vmtest.StateDir(t), "sandboxes"), Engine: vmtest.Engine(t), Snapshots: store, Images: vmtest.Images(t), Ephemeral: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Close(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	for _, shift := range []int{0, 2, 4} {
		began := time.Now()
		snap, err := r.Build(t.Context(), deterministic.BuildRequest{
			Tag: fmt.Sprintf("shift-%d", shift), Image: vmtest.Image(t).Digest, Imports: vmtest.Imports(), ClockShift: &shift, Replace: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("shift %d: build %s, of it boot and warm-up %d ms", shift, time.Since(began), snap.BootMS)
	}
	for name, argv := range map[string][]string{
		"true":   {"true"},
		"python": {"python3", "-c", "x = 1\nfor i in range(300000): x = x * 3 % 1000003\nprint(x)"},
		"shell":  {"sh", "-c", "i=0; while [ $i -lt 30 ]; do /bin/true; i=$((i+1)); done; echo $i"},
		"import": {"python3", "-c", "import json, os, random, ssl, time, uuid"},
	} {
		const rounds = 4
		best := map[string]time.Duration{}
		keep := func(what string, took time.Duration) {
			if old, ok := best[what]; !ok || took < old {
				best[what] = took
			}
		}
		for range rounds {
			began := time.Now()
			results, err := m.Fork(t.Context(), sandbox.ForkRequest{Snapshot: vmtest.SnapshotTag, N: 1})
			if err != nil || results[0].Err != nil {
				t.Fatal(err, results)
			}
			id := results[0].Sandbox.ID
			err = m.With(t.Context(), id, func(ctx context.Context, c *guest.Client) error {
				_, runErr := c.Run(ctx, guest.ExecSpec{Argv: argv}, nil, 1<<20)
				return runErr
			})
			if err != nil {
				t.Fatal(err)
			}
			keep("normal", time.Since(began))
			if err := m.Kill(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			for _, shift := range []int{0, 2, 4} {
				began := time.Now()
				out, err := r.Run(t.Context(), fmt.Sprintf("shift-%d", shift), record.Input{Argv: argv}, deterministic.Options{})
				if err != nil || out.Exit != 0 {
					t.Fatal(err, out)
				}
				keep(fmt.Sprintf("shift %d (%s virtual)", shift, out.Virtual.Round(time.Millisecond)), time.Since(began))
			}
		}
		for what, took := range best {
			t.Logf("%s: %s: %d ms, %.2f of normal", name, what, took.Milliseconds(), float64(took)/float64(best["normal"]))
		}
	}
}
