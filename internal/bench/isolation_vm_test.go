//go:build vm

package bench_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmtest"
)

// TestIsolation measures a little of everything.
func TestIsolation(t *testing.T) {
	d := open(t)
	t.Cleanup(func() { checkClean(t, d) })
	free, err := qemu.New(t.Context(), qemu.Config{Accel: qemu.TCG})
	if err != nil {
		t.Fatal(err)
	}
	in := *vmtest.Jail(t)
	in.Groups, in.NoGroups = cgroup.Open(cgroup.Config{Name: "tine-test-bench", Disk: vmtest.StateDir(t)})
	var out bytes.Buffer
	opts := bench.Options{
		Snapshot: vmtest.SnapshotTag, Forks: []int{2}, Rounds: 1, Out: &out, JSON: true,
		Isolation: &bench.Isolation{Unjailed: free, Jail: in},
	}
	if err = bench.Run(t.Context(), d, opts); err != nil {
		t.Fatal(err)
	}
	var res bench.Result
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		t.Fatalf("%v in %s", err, out.Bytes())
	}
	// Four pairs of a jail and none; three of cells, one of groups, two of
	// networks; three stages; three loads; the proxy.
	if want := 2*4 + 3 + 1 + 2 + 2*3 + 3 + 1; len(res.Isolation) != want {
		t.Errorf("%d rows, want %d", len(res.Isolation), want)
	}
	for _, row := range res.Isolation {
		if row.Error != "" || row.Tine.Samples == 0 || row.Unit == "" {
			t.Errorf("row %+v", row)
		}
		alone := strings.Contains(row.Step, "adds to")
		if !alone && (!full(&row.Tine) || !full(row.Floor) || row.Ratio == 0 || row.FloorIs == "") {
			t.Errorf("row %+v, floor %+v", row, row.Floor)
		}
		if row.Unit == bench.Sandboxes && row.Tine.Min != 2 {
			t.Errorf("%s: %v of 2", row.Step, row.Tine.Min)
		}
	}
	t.Run("leaves_nothing_when_canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		news := progress.With(ctx, func(e progress.Event) {
			if strings.Contains(e.Message, "stream of") { // both guests are there
				cancel()
			}
		})
		opts.Rounds, opts.Forks = 1, nil
		if err := bench.Run(news, d, opts); err == nil || ctx.Err() == nil {
			t.Errorf("canceled: error %v", err)
		}
		checkClean(t, d)
	})
}
