//go:build vm

package bench_test

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/vmtest"
)

// open opens a daemon on the state that has the shared snapshot.
func open(t *testing.T) *daemon.Daemon {
	t.Helper()
	vmtest.Snapshot(t)
	d, err := daemon.Open(t.Context(), daemon.Config{
		StateDir: vmtest.StateDir(t), Engine: vmtest.Engine(t), Agent: vmtest.Program(t, "tine-agent"), Ephemeral: true,
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
	return d
}

func TestRun(t *testing.T) {
	d := open(t)
	t.Cleanup(func() { checkClean(t, d) })
	t.Run("measures_everything", func(t *testing.T) {
		var out bytes.Buffer
		err := bench.Run(t.Context(), d, bench.Options{
			Snapshot: vmtest.SnapshotTag, Forks: []int{2}, Rounds: 1, Floor: true, Out: &out, JSON: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		var res bench.Result
		if err := json.Unmarshal(out.Bytes(), &res); err != nil {
			t.Fatalf("%v in %s", err, out.Bytes())
		}
		checkResult(t, &res, d.Sandboxes.Engine.Name(), 1, []int{2})
	})
	t.Run("leaves_nothing_when_canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		news := progress.With(ctx, func(e progress.Event) {
			if strings.Contains(e.Message, "from the pool to ping") {
				cancel()
			}
		})
		err := bench.Run(news, d, bench.Options{Snapshot: vmtest.SnapshotTag, Forks: []int{2}, Rounds: 1, Floor: true, Out: t.Output()})
		if err == nil || ctx.Err() == nil {
			t.Errorf("canceled: error %v", err)
		}
		checkClean(t, d)
	})
}

// checkResult checks that every field is there. What the numbers are is not
// for a test to judge.
func checkResult(t *testing.T, res *bench.Result, engine string, rounds int, forks []int) {
	t.Helper()
	if res.Version != bench.Version || res.Digest == "" || res.Engine != engine || res.EngineVersion == "" ||
		res.Machine.MemoryMiB == 0 || res.CPUs == 0 || res.Rounds != rounds || res.At.IsZero() || res.NoFloor != "" {
		t.Errorf("head: %+v", res)
	}
	if len(res.Rows) != 3*3+3+2+2+2 {
		t.Errorf("%d rows", len(res.Rows))
	}
	for _, row := range res.Rows {
		if !full(&row.Tine) || row.Unit == "" {
			t.Errorf("row %+v", row)
		}
		alone := strings.Contains(row.Step, "commit") || strings.Contains(row.Step, "size")
		if !alone && (!full(row.Floor) || row.Ratio == 0) {
			t.Errorf("row %s %s: floor %+v, ratio %v", row.Step, row.Point, row.Floor, row.Ratio)
		}
	}
	if len(res.Parallel) != 2*len(forks) {
		t.Errorf("%d parallel rows", len(res.Parallel))
	}
	for i, p := range res.Parallel {
		for _, g := range []*bench.Group{&p.Tine, p.Floor} {
			if n := forks[i/2]; p.Forks != n || g == nil || g.Answered != n || !full(&g.Wall) || !full(&g.Each) || g.Error != "" {
				t.Errorf("%d forks, %s: %+v", p.Forks, p.Point, g)
			}
		}
	}
}

func full(s *bench.Summary) bool {
	return s != nil && s.Samples > 0 && s.Min > 0 && s.Min <= s.Median && s.Median <= s.P95
}

// checkClean checks that no machine, file or snapshot of the bench is left.
func checkClean(t *testing.T, d *daemon.Daemon) {
	t.Helper()
	state := filepath.Dir(d.Sandboxes.Dir)
	for _, pattern := range []string{"bench-*", "snapshots/staging/bench-*"} {
		left, err := filepath.Glob(filepath.Join(state, pattern))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v %v", left, err)
		}
	}
	list, err := d.Snapshots.List()
	if err != nil {
		t.Error(err)
	}
	for _, s := range list {
		if strings.HasPrefix(s.Tag, "bench-") {
			t.Errorf("snapshot left behind: %s", s.Tag)
		}
	}
	if left := d.Sandboxes.List(); len(left) > 0 {
		t.Errorf("sandboxes left behind: %v", left)
	}
	if ready, want := d.Sandboxes.Pool(vmtest.SnapshotTag); ready != 0 || want != 0 {
		t.Errorf("pool left behind: %d of %d", ready, want)
	}
	checkProcesses(t)
}

// checkProcesses looks for children of this process, but for launchers, which
// wait for machines to come.
func checkProcesses(t *testing.T) {
	t.Helper()
	children, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range children {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // the thread has ended
		}
		for pid := range strings.FieldsSeq(string(text)) {
			line, err := os.ReadFile("/proc/" + pid + "/cmdline")
			if err == nil && !bytes.HasSuffix(line, []byte("\x00role\x00launch\x00")) {
				t.Errorf("child process left behind: %s %q", pid, line)
			}
		}
	}
}
