package bench

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
)

func TestBranchOptions(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		opts Options
		ok   bool
	}{
		"defaults":       {Options{}, true},
		"chosen":         {Options{Memory: []int{256}, Dirty: []int{0, 20}, Depths: []int{0, 2}}, true},
		"nothing":        {Options{Memory: []int{}, Dirty: []int{}, Depths: []int{}}, true},
		"memory":         {Options{Memory: []int{minMemory - 1}}, false},
		"much_memory":    {Options{Memory: []int{maxMemory + 1}}, false},
		"dirty":          {Options{Dirty: []int{-1}}, false},
		"depth":          {Options{Depths: []int{-1}}, false},
		"too_deep":       {Options{Depths: []int{maxDepth + 1}}, false},
		"too_many_cases": {Options{Depths: make([]int, maxCases+1)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := tt.opts.branches()
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("error %v", err)
			}
			if err == nil && (tt.opts.Memory == nil || tt.opts.Dirty == nil || tt.opts.Depths == nil) {
				t.Errorf("left open: %+v", tt.opts)
			}
		})
	}
}

func TestLoads(t *testing.T) {
	t.Parallel()
	for memory, want := range map[int]string{
		128:  "[idle]",
		256:  "[idle 20 MiB, still 20 MiB, being written]",
		512:  "[idle 20 MiB, still 200 MiB, still 200 MiB, being written]",
		2048: "[idle 20 MiB, still 200 MiB, still 1024 MiB, still 200 MiB, being written]",
	} {
		if got := fmt.Sprint(loads(memory, []int{200, 0, 1024, 20})); got != want {
			t.Errorf("%d MiB: %s, want %s", memory, got, want)
		}
	}
	if got := fewMiB(512, []int{0, 200, 20}); got != 20 {
		t.Errorf("%d MiB are few", got)
	}
	if got := fewMiB(128, defaultDirty()); got != 1 {
		t.Errorf("%d MiB are few where none fit", got)
	}
}

// sampleBranches is a result with a row of every kind.
func sampleBranches() *Result {
	r := sample()
	r.Rows, r.Parallel = []Row{}, []Parallel{}
	g := &grove{result: r}
	row := BranchRow{MemoryMiB: 512, Case: load{dirty: 200}.String(), Mode: string(sandbox.Live)}
	live := taken{pause: 9, gap: 12, total: 900, disk: 203, save: 2, copy: 60, write: 400, quiet: 6, dirtied: 200}
	g.addPauses(row, load{dirty: 200}, []taken{live, live})
	diff := live
	diff.pause, diff.disk, diff.warning = 90, 211, "taken in mode diff, as this host allows no live branch: no"
	row.Mode = string(sandbox.Diff)
	g.addPauses(row, load{dirty: 200}, []taken{diff})
	row.Mode = string(sandbox.Full)
	g.addPauses(row, load{dirty: 200}, []taken{live})
	row.Mode, row.Case = string(sandbox.Live), load{dirty: 1024}.String()
	g.addPauses(row, load{dirty: 1024}, []taken{live})
	g.addDepths(&plot{memory: 512}, []int{0, 8, 32}, [][]float64{{100}, {150}, {200}}, [][]float64{{0}, {112}, {120}})
	return r
}

func TestBranchTargets(t *testing.T) {
	t.Parallel()
	got := map[string]string{}
	r := sampleBranches()
	for _, row := range r.Branches {
		if len(row.Targets) > 0 {
			got[row.Case+"/"+row.Mode+"/"+row.Step] = targetCell(row.Targets)
		}
	}
	want := map[string]string{
		"200 MiB, still/live/pause":         "at most 10 ms and the engine's own: met (9)",
		"200 MiB, still/live/size on disk":  "at most 1.05x what was written to: met (1.01)",
		"200 MiB, still/diff/pause":         "at most 1.3x the floor: NOT MET (1.45)",
		"200 MiB, still/diff/size on disk":  "at most 1.05x what was written to: NOT MET (1.05)",
		"1024 MiB, still/live/size on disk": "at most 1.05x what was written to: met (1.01)",
		"depth 8, flattened//fork":          "at most 1.1x depth 0: NOT MET (1.12)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if met, all := r.count(); met != 3 || all != 6 {
		t.Errorf("%d of %d targets met", met, all)
	}
}

func TestBranchTable(t *testing.T) {
	t.Parallel()
	golden(t, "branches.txt", sampleBranches(), false)
}

func TestBranchJSON(t *testing.T) {
	t.Parallel()
	golden(t, "branches.json", sampleBranches(), true)
}

func TestIdealMemory(t *testing.T) {
	t.Parallel()
	f := &ideal{dir: t.TempDir()}
	for _, n := range []int64{0, 4096, 3<<20 + 4096, 1 << 20} {
		if _, err := f.copy(n); err != nil {
			t.Errorf("copy %d: %v", n, err)
		}
		if _, err := f.write(n); err != nil {
			t.Errorf("write %d: %v", n, err)
		}
	}
	if err := f.close(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestLongest(t *testing.T) {
	t.Parallel()
	asked := make(chan struct{}, 1)
	held := false
	got, err := longest(func() error {
		select {
		case asked <- struct{}{}:
		default:
			if !held {
				held = true
				time.Sleep(20 * time.Millisecond)
			}
		}
		return nil
	}, func() error { <-asked; return pass(t.Context(), 40*time.Millisecond) })
	if err != nil || got < 20 {
		t.Errorf("longest wait %v ms, error %v", got, err)
	}
	deaf := make(chan struct{})
	if _, err = longest(func() error { close(deaf); return errDeaf }, func() error { <-deaf; return nil }); !errors.Is(err, errDeaf) {
		t.Errorf("nobody answers: %v", err)
	}
	if _, err = longest(func() error { return nil }, func() error { return errdef.ErrExhausted }); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("the work fails: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err = pass(ended, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("time passes after the end: %v", err)
	}
}
