//go:build vm

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

// suite is a package's tests with an engine.
type suite struct {
	engine, pkg string
	only        []string // the tests; nil: all
	short       []string // those of the short form; none: it is left out there
	shortParts  string   // a regular expression of their parts in the short form
	seconds     int      // that it may take; 0: the usual
}

func (s suite) name() string { return s.engine + "-" + filepath.Base(s.pkg) }

// dir is where what is the suite's own is kept.
func (s suite) dir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(cacheDir(t), s.name())
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// benchRounds is the variable that has a bench of Firecracker run in the place of
// all else, for the tables that it prints, and benchSeconds how long it may take.
const (
	benchRounds  = "TINE_BENCH_ROUNDS"
	benchSeconds = 1100
)

// chosen are the suites to run, those that take longest first, and what is to be
// told of engines that have none.
func chosen(t *testing.T) (suites []suite, missing []string) {
	t.Helper()
	if os.Getenv(benchRounds) != "" {
		tests := []string{"TestBenchFirecracker", "TestBenchFirecrackerBranches"}
		return []suite{{engine: firecracker, pkg: "internal/bench", only: tests, short: tests, seconds: benchSeconds}}, nil
	}
	program := []string{"TestDoctor", "TestDailyPath", "TestBranchDailyPath", "TestDemo"}
	suites = []suite{
		{
			engine: qemuKVM, pkg: "internal/vmm/qemu",
			// Not TestDisk: in its many branches the guest has once stopped to answer.
			only: []string{"TestEngine", "TestConsole", "TestDiskInGuest", "TestBranch", "TestNet"}, short: []string{"TestEngine"},
			shortParts: "(forks-are-independent|branch-of-an-adopted-machine)",
		},
		{engine: qemuKVM, pkg: "cmd/tine", only: program},
		{engine: qemuKVM, pkg: "internal/engines", only: []string{"TestProbeKVM", "TestChooseHere"}, short: []string{"TestChooseHere"}},
	}
	switch {
	case os.Getenv("FIRECRACKER") == "":
		missing = append(missing, "NOT RUN: firecracker: FIRECRACKER is not set")
	case testing.Short():
		missing = append(missing, "NOT RUN: firecracker: the short form leaves it out")
	default:
		suites = append(suites,
			suite{engine: firecracker, pkg: "internal/vmm/firecracker", seconds: 1500},
			suite{engine: firecracker, pkg: "cmd/tine", only: program},
			suite{engine: firecracker, pkg: "internal/engines", only: []string{"TestFirecrackerProbe", "TestFirecrackerProbeTells", "TestChooseHere"}},
		)
	}
	if testing.Short() {
		suites = slices.DeleteFunc(suites, func(s suite) bool { return len(s.short) == 0 })
	}
	return suites, missing
}

// build makes the test programs of the suites' packages, and returns their paths.
func build(t *testing.T, suites []suite) map[string]string {
	t.Helper()
	dir := filepath.Join(cacheDir(t), "tests")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	programs := map[string]string{}
	args := []string{"test", "-tags", "vm", "-c", "-o", dir + "/"}
	for _, s := range suites {
		if programs[s.pkg] == "" {
			programs[s.pkg] = filepath.Join(dir, filepath.Base(s.pkg)+".test")
			args = append(args, "./"+s.pkg)
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", args...)
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build tests: %v\n%s", err, out)
	}
	return programs
}
