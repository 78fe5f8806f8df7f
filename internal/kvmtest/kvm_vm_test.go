//go:build vm

package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// The engines that the outer guest can run.
const (
	qemuKVM     = "qemu-kvm"
	firecracker = "firecracker"
)

// monitors are the variables that name programs for the engine firecracker, and
// where the outer guest has them.
func monitors() map[string]string {
	return map[string]string{"FIRECRACKER": "/usr/local/bin/firecracker", "JAILER": "/usr/local/bin/jailer"}
}

// TestMain says at the very end which engines ran, and which did not.
func TestMain(m *testing.M) {
	code := m.Run()
	for _, line := range verdicts {
		fmt.Println(line)
	}
	os.Exit(code)
}

// verdicts is what TestMain tells: it has no other way to learn it.
var verdicts []string //nolint:gochecknoglobals // see above

// TestKVM boots an outer guest that has a /dev/kvm, and in it runs the tests of
// the engines that need one. It fails unless each of them has run and passed.
func TestKVM(t *testing.T) {
	suites, missing := chosen(t)
	defer func() {
		verdicts = append(verdicts, missing...)
	}()
	programs, init := build(t, suites), firstProcess(t)
	p := newPlan(t, suites, programs)
	results, closed := outer(t, p, init, makeDisk(t, p, init, programs))
	if !closed {
		t.Error("the outer guest ended before its plan did")
	}
	verdicts = judge(t, p, results)
}

// judge checks that each job of the plan has run each of its tests.
func judge(t *testing.T, p plan, results map[int]result) (all []string) {
	t.Helper()
	passed, parts, bad := map[string]int{}, map[string]int{}, map[string]bool{}
	for i, j := range p.Jobs {
		r, ran := results[i]
		if !ran {
			t.Errorf("%s, engine %s: has not ended", j.Package, j.Engine)
			bad[j.Engine] = true
			continue
		}
		t.Logf("%s, engine %s: %d tests with %d parts passed in %.0f s", j.Package, j.Engine, len(r.Passed), r.Parts, r.Seconds)
		if r.Error != "" || len(r.Failed) > 0 {
			t.Errorf("%s, engine %s: %s; failed: %q", j.Package, j.Engine, cmp.Or(r.Error, "status 0"), r.Failed)
			bad[j.Engine] = true
		}
		for _, name := range j.Tests {
			if !slices.Contains(r.Passed, name) {
				t.Errorf("%s, engine %s: %s has not passed", j.Package, j.Engine, name)
				bad[j.Engine] = true
			}
		}
		passed[j.Engine] += len(r.Passed)
		parts[j.Engine] += r.Parts
	}
	for _, engine := range []string{qemuKVM, firecracker} {
		switch {
		case bad[engine]:
			all = append(all, "FAILED: "+engine)
		case passed[engine] > 0:
			all = append(all, fmt.Sprintf("RAN: %s: %d tests with %d parts passed", engine, passed[engine], parts[engine]))
		}
	}
	return all
}

// newPlan is what the outer guest is to run of the suites.
func newPlan(t *testing.T, suites []suite, programs map[string]string) plan {
	t.Helper()
	p := plan{Nonce: nonce(t)}
	for _, s := range suites {
		tests := s.tests
		if tests == nil || !testing.Short() {
			tests = s.all(t, programs[s.pkg])
		}
		if len(tests) == 0 {
			t.Fatalf("%s has no tests for %s", s.pkg, s.engine)
		}
		p.Jobs = append(p.Jobs, job{
			Engine: s.engine, Package: s.pkg, Program: filepath.Join("/tests", filepath.Base(programs[s.pkg])),
			Dir: filepath.Join(repository, s.pkg), Tests: tests, Env: s.env(), Seconds: cmp.Or(s.seconds, 600),
		})
	}
	return p
}

// env is the environment of a suite's tests.
func (s suite) env() []string {
	env := []string{"TINE_TEST_ENGINE=" + s.engine}
	if s.engine == firecracker {
		for name, path := range monitors() {
			if os.Getenv(name) != "" {
				env = append(env, name+"="+path)
			}
		}
		env = append(env, benchRounds+"="+os.Getenv(benchRounds))
	}
	return env
}

// all are the tests of the suite's program but for those that are left out.
func (s suite) all(t *testing.T, program string) []string {
	t.Helper()
	out := command(t, program, "-test.list=.")
	var names []string
	for name := range strings.FieldsSeq(out) {
		if strings.HasPrefix(name, "Test") && !slices.Contains(s.without, name) && (s.only == nil || slices.Contains(s.only, name)) {
			names = append(names, name)
		}
	}
	return names
}
