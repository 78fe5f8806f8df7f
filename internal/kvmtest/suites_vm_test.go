//go:build vm

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// suite is a package's tests with an engine.
type suite struct {
	engine, pkg string
	tests       []string // those of the short form; nil: all
	only        []string // those of the long form; nil: all
	without     []string // but for these
}

// chosen are the suites to run, and what is to be told of engines that have none.
func chosen(t *testing.T) (suites []suite, missing []string) {
	t.Helper()
	suites = []suite{
		{engine: qemuKVM, pkg: "internal/engines", tests: []string{"TestChooseHere"}, only: []string{"TestProbeKVM", "TestChooseHere"}},
		{engine: qemuKVM, pkg: "internal/vmm/qemu", tests: []string{"TestEngine"}},
		{engine: qemuKVM, pkg: "cmd/tine", tests: []string{"TestBranchDailyPath"}, only: []string{"TestDoctor", "TestDailyPath", "TestBranchDailyPath", "TestDemo"}},
	}
	if os.Getenv("FIRECRACKER") == "" {
		return suites, append(missing, "NOT RUN: firecracker: FIRECRACKER is not set")
	}
	probes := []string{"TestFirecrackerProbe", "TestFirecrackerProbeTells", "TestChooseHere"}
	return append(suites,
		suite{engine: firecracker, pkg: "internal/engines", tests: probes, only: probes},
		suite{engine: firecracker, pkg: "internal/vmm/firecracker"},
		suite{engine: firecracker, pkg: "cmd/tine", tests: []string{"TestBranchDailyPath"}, only: []string{"TestDoctor", "TestDailyPath", "TestBranchDailyPath", "TestDemo"}},
	), missing
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
