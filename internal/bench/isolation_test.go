package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func TestDifferences(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct{ a, b, want []float64 }{
		"none":       {},
		"same":       {[]float64{3, 5}, []float64{1, 6}, []float64{2, -1}},
		"one_longer": {[]float64{3, 5}, []float64{1}, []float64{2}},
	} {
		if diff := cmp.Diff(tt.want, differences(tt.a, tt.b)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestParseSamples(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		text string
		want []float64
	}{
		"some":      {"0.5\n12\n", []float64{0.5, 12}},
		"one":       {"3.25", []float64{3.25}},
		"nothing":   {"\n", nil},
		"words":     {"1 two", nil},
		"negative":  {"-1", nil},
		"zero":      {"0", nil},
		"infinite":  {"inf", nil},
		"no_number": {"nan", nil},
	} {
		got, err := parseSamples(tt.text)
		if (err == nil) != (tt.want != nil) || err != nil && !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("%s: error %v", name, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestParts(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		opts Options
		want int
	}{{Options{}, 0}, {Options{Branch: true}, 1}, {Options{Isolation: &Isolation{}}, 1}, {Options{Deterministic: true, Isolation: &Isolation{}}, 2}} {
		if got := tt.opts.parts(); got != tt.want {
			t.Errorf("%+v: %d parts", tt.opts, got)
		}
	}
	if got := (&Options{Forks: []int{1, 50, 10}}).crowdSize(); got != 50 {
		t.Errorf("%d networks at once", got)
	}
	if got := (&Options{}).crowdSize(); got != 0 {
		t.Errorf("%d networks at once when no forks are asked for", got)
	}
}

// TestByTurns: the sides take turns, and the first turn does not count.
func TestByTurns(t *testing.T) {
	t.Parallel()
	w := &ward{}
	var order []string
	count := 0.0
	side := func(name string) measured {
		return func(context.Context) (float64, error) {
			order = append(order, name)
			count++
			return count, nil
		}
	}
	got, err := w.byTurns(t.Context(), "test", 2, side("A"), side("B"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][]float64{{3, 5}, {4, 6}}, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"A", "B", "A", "B", "A", "B"}, order); diff != "" {
		t.Error(diff)
	}
	if _, err = w.byTurns(t.Context(), "test", 1, func(context.Context) (float64, error) { return 0, errDeaf }); !errors.Is(err, errDeaf) {
		t.Errorf("a side that fails: %v", err)
	}
}

// TestTry: a part that fails is a row, unless the bench was told to stop.
func TestTry(t *testing.T) {
	t.Parallel()
	w := &ward{result: &Result{}}
	fails := func(context.Context) error { return errDeaf }
	if err := w.try(t.Context(), "part", fails); err != nil {
		t.Error(err)
	}
	if len(w.result.Isolation) != 1 || w.result.Isolation[0].Error != errDeaf.Error() || w.result.Isolation[0].Step != "part" {
		t.Errorf("%+v", w.result.Isolation)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.try(ctx, "part", fails); !errors.Is(err, errDeaf) {
		t.Errorf("canceled: %v", err)
	}
	if len(w.result.Isolation) != 1 {
		t.Errorf("canceled: %+v", w.result.Isolation)
	}
}

// twoCrowds are two rounds of three forks, one of which failed, and beside them
// forks without a network.
func twoCrowds() [][]*crowd {
	of := func(stages ...stage) *crowd { return &crowd{stages: stages} }
	whole := stage{times: []float64{10, 30, 20}}
	return [][]*crowd{
		{of(whole, whole, stage{times: []float64{40, 50}, err: errDeaf}), of(whole, whole, stage{times: []float64{40, 50, 60}})},
		{of(whole, whole, whole), of(whole, whole, whole)},
	}
}

// sampleIsolation is a result with a row of every kind.
func sampleIsolation(t *testing.T) *Result {
	t.Helper()
	r := sample()
	r.Rows, r.Parallel = []Row{}, []Parallel{}
	w := &wires{ward: &ward{result: r}}
	head := IsolationRow{Row: Row{Step: string(coldFork), Point: Exec, Unit: Milliseconds}, FloorIs: "the same engine without a jail"}
	w.add(head, []float64{100, 110, 104}, []float64{98, 112, 100})
	head.Step, head.FloorIs, head.Note = "the jail adds to: fork", "", "differences within a turn"
	w.add(head, differences([]float64{100, 110, 104}, []float64{98, 112, 100}), nil, atMostOf(jailLimit, Milliseconds))
	for at, what := range crowdStages() {
		w.addStage(3, at, what, twoCrowds())
	}
	w.add(IsolationRow{Row: Row{Step: "stream", Unit: MiBPerSecond}, Note: worldNote, Error: "no floor: deaf"}, []float64{30}, nil)
	if err := w.try(t.Context(), "proxy", func(context.Context) error { return errDeaf }); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestIsolationGoldenFiles(t *testing.T) {
	t.Parallel()
	for name, asJSON := range map[string]bool{"isolation.txt": false, "isolation.json": true} {
		var out bytes.Buffer
		if err := sampleIsolation(t).Write(&out, asJSON); err != nil {
			t.Fatal(err)
		}
		if asJSON {
			text := bytes.Clone(out.Bytes())
			out.Reset()
			if err := json.Indent(&out, text, "", "  "); err != nil {
				t.Fatal(err)
			}
		}
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, out.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), out.String()); diff != "" {
			t.Errorf("%s (-want +got; go test -update writes it):\n%s", name, diff)
		}
	}
}

// TestAll: one round in which a fork is missing is a target missed.
func TestAll(t *testing.T) {
	t.Parallel()
	got := map[string]string{}
	for _, row := range sampleIsolation(t).Isolation {
		if row.Unit == Sandboxes {
			got[row.Step] = fmt.Sprint(targetCell(row.Targets), "; ", row.Error)
		}
	}
	want := map[string]string{
		"3 networks at once: came up":          "3 of 3: met (3); ",
		"3 networks at once: first exec":       "3 of 3: met (3); ",
		"3 networks at once: reached a server": "3 of 3: NOT MET (2); deaf",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
