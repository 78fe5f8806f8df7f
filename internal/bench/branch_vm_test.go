//go:build vm

package bench_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/vmtest"
)

// TestBranches measures branches of guests that are as small as they get.
func TestBranches(t *testing.T) {
	d := open(t)
	t.Cleanup(func() { checkClean(t, d) })
	var out bytes.Buffer
	err := bench.Run(t.Context(), d, bench.Options{
		Snapshot: vmtest.SnapshotTag, Rounds: 1, Out: &out, JSON: true,
		Branch: true, Memory: []int{256}, Dirty: []int{20}, Depths: []int{0, 2},
	})
	if err != nil {
		t.Fatal(err)
	}
	var res bench.Result
	if err := json.Unmarshal(out.Bytes(), &res); err != nil {
		t.Fatalf("%v in %s", err, out.Bytes())
	}
	// Two guests in three modes; two modes in a row; rollback, suspend and
	// resume; a fork at depth 0 and two at depth 2.
	if want := 2*3*5 + 2*2 + 3 + 3; len(res.Branches) != want {
		t.Errorf("%d rows, want %d", len(res.Branches), want)
	}
	for _, row := range res.Branches {
		alone := row.Case == "depth 0" || row.Mode == "full" && row.Step == "size on disk"
		if !full(&row.Tine) || !alone && (!full(row.Floor) || row.Ratio == 0) || row.Unit == "" || row.MemoryMiB != 256 {
			t.Errorf("row %+v, floor %+v", row, row.Floor)
		}
		if row.Warning != "" {
			t.Errorf("%s, %s: %s", row.Case, row.Mode, row.Warning)
		}
		t.Logf("%s; %s; %s: %.2f (%.2f), %s", row.Case, row.Mode, row.Step, row.Tine.Median, row.Ratio, strings.TrimSpace(row.Unit))
	}
}
