//go:build vm

package bench_test

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmtest"
)

// openFirecracker opens a daemon on Firecracker. Where there is none, or no KVM,
// nothing is tested, and the test says so.
func openFirecracker(t *testing.T) *daemon.Daemon {
	t.Helper()
	const how = "make test-kvm FIRECRACKER=/path TINE_BENCH_ROUNDS=1 runs this, also where there is no KVM"
	if name, _ := vmtest.NamedEngine(); name != firecracker.Name || os.Getenv("FIRECRACKER") == "" {
		t.Skipf("NOT TESTED: TINE_TEST_ENGINE is not firecracker, or FIRECRACKER does not name one; %s", how)
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("NOT TESTED: %v; %s", err, how)
	}
	_ = kvm.Close() // only looked for
	d := open(t)
	t.Cleanup(func() { checkClean(t, d) })
	return d
}

// rounds is how often each thing is measured: once, or TINE_BENCH_ROUNDS times,
// for those who want to see the table.
func rounds(t *testing.T) int {
	t.Helper()
	text := os.Getenv("TINE_BENCH_ROUNDS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("TINE_BENCH_ROUNDS: %v", err)
	}
	return n
}

func forks(n int) []int {
	if n > 1 {
		return []int{1, 4, 10}
	}
	return []int{2}
}

// told is the test's context, which says what is being measured: it can take long.
func told(t *testing.T) context.Context {
	t.Helper()
	begin := time.Now()
	return progress.With(t.Context(), func(e progress.Event) {
		t.Logf("%4.0f s: %s %d of %d", time.Since(begin).Seconds(), e.Message, e.Done, e.Total)
	})
}

// show prints the tables.
func show(t *testing.T, res *bench.Result) {
	t.Helper()
	var out strings.Builder
	if err := res.Write(&out, false); err != nil {
		t.Error(err)
	}
	t.Logf("\n%s", out.String())
}

func TestBenchFirecracker(t *testing.T) {
	d, n := openFirecracker(t), rounds(t)
	res, err := bench.Measure(told(t), d, bench.Options{Snapshot: vmtest.SnapshotTag, Forks: forks(n), Rounds: n, Floor: true})
	if err != nil {
		t.Fatal(err)
	}
	show(t, res)
	checkResult(t, res, firecracker.Name, n, forks(n))
	if len(res.NotMeasured) == 0 {
		t.Error("it does not say that deterministic runs are not measured")
	}
	_, err = bench.Measure(t.Context(), d, bench.Options{Snapshot: vmtest.SnapshotTag, Rounds: n, Deterministic: true})
	if err == nil || !strings.Contains(err.Error(), "no deterministic machines") {
		t.Errorf("deterministic runs: %v", err)
	}
}

// TestBenchFirecrackerBranches measures branches of guests that are as small as
// they get, and the ways to save them.
func TestBenchFirecrackerBranches(t *testing.T) {
	d, n := openFirecracker(t), rounds(t)
	res, err := bench.Measure(told(t), d, bench.Options{
		Snapshot: vmtest.SnapshotTag, Rounds: n, Branch: true, Memory: []int{256}, Dirty: []int{0, 20}, Depths: []int{0},
	})
	if err != nil {
		t.Fatal(err)
	}
	show(t, res)
	// As of TestBranches, with depth 0 alone; four ways, three of which write memory.
	if want := 3*3*5 + 2*2 + 3 + 1 + 4 + 3; len(res.Branches) != want {
		t.Errorf("%d rows, want %d", len(res.Branches), want)
	}
	for _, row := range res.Branches {
		if row.Warning == "" && row.Tine.Samples == 0 {
			t.Errorf("row %+v", row)
		}
		if row.Warning != "" {
			t.Errorf("%s, %s: %s", row.Case, row.Mode, row.Warning)
		}
	}
}
