package bench

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/vmm"
)

var update = flag.Bool("update", false, "write the golden files")

// sample is a result with a row of every kind.
func sample() *Result {
	r := &Result{
		Version: Version, At: time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC), Snapshot: "py", Digest: "sha256:00",
		Engine: "qemu-tcg", EngineVersion: "7.2.22", Machine: vmm.Machine{MemoryMiB: 256, VCPUs: 1}, CPUs: 2, Rounds: 3,
	}
	r.addRow(string(coldBoot), Ping, Milliseconds, [][]float64{{2000, 2100}, {2000}})
	r.addRow(string(coldFork), Ping, Milliseconds, [][]float64{{90, 100, 110}, {80, 90, 100}})
	r.addRow(string(coldFork), Exec, Milliseconds, [][]float64{{150}, {150}})
	r.addRow(string(poolFork), Ping, Milliseconds, [][]float64{{4}, {0.512}})
	r.addRow(string(poolFork), Eval, Milliseconds, [][]float64{{6}, {3}})
	r.addRow(stepShared, "", MiB, [][]float64{{38}, {19}})
	r.addRow(stepCommit, "", Milliseconds, [][]float64{{751}, nil})
	r.addRow(stepLogical, "", MiB, [][]float64{{256}})
	floor := sum([]*group{{times: []float64{90, 100}, wall: 100}})
	r.Parallel = []Parallel{
		{Forks: 2, Point: Ping, Tine: sum([]*group{{times: []float64{90, 105}, wall: 105}}), Floor: &floor, Ratio: 1.05},
		{Forks: 2, Point: Exec, Tine: sum([]*group{
			{times: []float64{200, 210}, wall: 210},
			{times: []float64{220}, wall: 230, err: os.ErrDeadlineExceeded},
		})},
	}
	r.judge()
	return r
}

func TestJudge(t *testing.T) {
	t.Parallel()
	got := map[string]string{}
	r := sample()
	for _, row := range r.Rows {
		got[row.Step+"/"+row.Point] = targetCell(row.Targets)
	}
	for _, p := range r.Parallel {
		got["parallel/"+p.Point] = targetCell(p.Targets)
	}
	want := map[string]string{
		"cold boot/ping":          "within 10% of the floor: met (1.02)",
		"fork/ping":               "within 10% of the floor: NOT MET (1.11); 20x faster than cold boot: met (20.5)",
		"fork/exec":               "within 10% of the floor: met (1)",
		"fork from the pool/ping": "within 10% of the floor: NOT MET (7.81); at most 5 ms: met (4)",
		"fork from the pool/eval": "within 10% of the floor: NOT MET (2); at most 5 ms: NOT MET (6)",
		stepShared + "/":          "-",
		stepCommit + "/":          "-",
		stepLogical + "/":         "-",
		"parallel/ping":           "within 10% of the floor: met (1.05); 2 of 2 answered: met (2)",
		"parallel/exec":           "2 of 2 answered: NOT MET (1)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if met, all := r.count(); met != 6 || all != 11 {
		t.Errorf("%d of %d targets met", met, all)
	}
}

func TestTable(t *testing.T) {
	t.Parallel()
	golden(t, "table.txt", sample(), false)
}

func TestTableWithoutFloor(t *testing.T) {
	t.Parallel()
	golden(t, "nofloor.txt", &Result{
		Snapshot: "py", Engine: "fake", EngineVersion: "1", Machine: vmm.Machine{MemoryMiB: 64, VCPUs: 1}, CPUs: 8,
		NoFloor: "there is no harness for fake",
		Rows:    []Row{{Step: string(coldBoot), Point: Ping, Unit: Milliseconds, Tine: Summary{Samples: 1, Min: 1, Median: 2, P95: 3}}},
	}, false)
}

func TestJSON(t *testing.T) {
	t.Parallel()
	golden(t, "result.json", sample(), true)
}

// golden compares what is written with a file in testdata.
func golden(t *testing.T, name string, r *Result, asJSON bool) {
	t.Helper()
	var out bytes.Buffer
	if err := r.Write(&out, asJSON); err != nil {
		t.Fatal(err)
	}
	if asJSON {
		raw := bytes.Clone(out.Bytes())
		out.Reset()
		if err := json.Indent(&out, raw, "", "  "); err != nil {
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
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(out.String(), "\n")); diff != "" {
		t.Error(diff)
	}
}
