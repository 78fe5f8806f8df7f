//go:build vm

package bench_test

import (
	"context"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmtest"
)

// firecrackerTag is a snapshot that is there for one test.
const firecrackerTag = "bench-subject"

// openFirecracker opens a daemon on Firecracker, with a snapshot. Where there is
// no Firecracker or no KVM nothing is tested, and the test says so.
func openFirecracker(t *testing.T) *daemon.Daemon {
	t.Helper()
	binary := os.Getenv("FIRECRACKER")
	if binary == "" {
		t.Skip("NOT TESTED: FIRECRACKER does not name a Firecracker; make test-kvm FIRECRACKER=/path runs this where there is no KVM")
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("NOT TESTED: %v; make test-kvm FIRECRACKER=/path runs this where there is no KVM", err)
	}
	_ = kvm.Close() // only looked for
	engine, err := firecracker.New(t.Context(), firecracker.Config{Binary: binary, Jail: vmtest.Jail(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if closeErr := engine.Close(); closeErr != nil {
			t.Error(closeErr)
		}
	})
	img := vmtest.Image(t)
	d, err := daemon.Open(t.Context(), daemon.Config{
		StateDir: vmtest.StateDir(t), Engine: engine, Agent: vmtest.Program(t, "tine-agent"), Ephemeral: true,
		Twin: []string{vmtest.Program(t, "tine"), "role", "twin"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if closeErr := d.Close(context.Background()); closeErr != nil { //nolint:usetesting // t.Context has ended
			t.Error(closeErr)
		}
	})
	_, err = d.Sandboxes.CreateSnapshot(t.Context(), sandbox.SnapshotRequest{
		Tag: firecrackerTag, Image: img.Digest, Imports: vmtest.Imports(), Replace: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if removeErr := d.Snapshots.Remove(context.Background(), firecrackerTag); removeErr != nil { //nolint:usetesting // t.Context has ended
			t.Error(removeErr)
		}
		checkClean(t, d)
	})
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
	res, err := bench.Measure(t.Context(), d, bench.Options{Snapshot: firecrackerTag, Forks: forks(n), Rounds: n, Floor: true})
	if err != nil {
		t.Fatal(err)
	}
	show(t, res)
	checkResult(t, res, firecracker.Name, n, forks(n))
	if len(res.NotMeasured) == 0 {
		t.Error("it does not say that deterministic runs are not measured")
	}
	_, err = bench.Measure(t.Context(), d, bench.Options{Snapshot: firecrackerTag, Rounds: n, Deterministic: true})
	if err == nil || !strings.Contains(err.Error(), "no deterministic machines") {
		t.Errorf("deterministic runs: %v", err)
	}
}

// TestBenchFirecrackerBranches measures branches of guests that are as small as
// they get, and the ways to save them.
func TestBenchFirecrackerBranches(t *testing.T) {
	d, n := openFirecracker(t), rounds(t)
	res, err := bench.Measure(t.Context(), d, bench.Options{
		Snapshot: firecrackerTag, Rounds: n, Branch: true, Memory: []int{256}, Dirty: []int{0, 20}, Depths: []int{0},
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
