//go:build vm

package main

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// The engines that an outer guest can run.
const (
	qemuKVM     = "qemu-kvm"
	firecracker = "firecracker"
)

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

// TestKVM boots an outer guest with a /dev/kvm for each suite, as many at a time
// as there are processors, and runs the suite in it. It fails unless each test of
// each has run and passed.
func TestKVM(t *testing.T) {
	suites, missing := chosen(t)
	programs := build(t, suites)
	init := firstProcess(t)
	img := boot(t, init)
	all := tallies{}
	t.Run("engines", func(t *testing.T) {
		for _, s := range suites {
			t.Run(s.name(), func(t *testing.T) {
				t.Parallel()
				p := s.plan(t, programs[s.pkg])
				disk := makeDisk(t, p, s, init, programs[s.pkg])
				r := outer(t, outerGuest{img: img, disk: disk, dir: s.dir(t)}, p.Nonce)
				judge(t, p, r)
				all.add(s.engine, r, !t.Failed())
			})
		}
	})
	verdicts = append(all.lines(suites), missing...)
}

// judge checks that each test of the plan has run and passed.
func judge(t *testing.T, p plan, r result) {
	t.Helper()
	t.Logf("%d tests with %d parts passed in %.0f s", len(r.Passed), r.Parts, r.Seconds)
	if r.Error != "" || len(r.Failed) > 0 {
		t.Errorf("%s; failed: %q", cmp.Or(r.Error, "status 0"), r.Failed)
	}
	for _, name := range p.Tests {
		if !slices.Contains(r.Passed, name) {
			t.Errorf("%s has not passed", name)
		}
	}
	if p.Parts != "" && r.Parts == 0 {
		t.Errorf("nothing is named as %s", p.Parts)
	}
}

// tallies counts what has passed of each engine, for suites that end at any time.
type tallies struct {
	mu            sync.Mutex
	passed, parts map[string]int
	suites        map[string]int // that passed
}

func (a *tallies) add(engine string, r result, passed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.passed == nil {
		a.passed, a.parts, a.suites = map[string]int{}, map[string]int{}, map[string]int{}
	}
	a.passed[engine] += len(r.Passed)
	a.parts[engine] += r.Parts
	if passed {
		a.suites[engine]++
	}
}

// lines says of each engine what ran.
func (a *tallies) lines(suites []suite) (all []string) {
	wanted := map[string]int{}
	for _, s := range suites {
		wanted[s.engine]++
	}
	for _, engine := range []string{qemuKVM, firecracker} {
		switch n := wanted[engine]; {
		case n == 0:
		case a.suites[engine] == n:
			all = append(all, fmt.Sprintf("RAN: %s: %d tests with %d parts passed", engine, a.passed[engine], a.parts[engine]))
		default:
			all = append(all, fmt.Sprintf("FAILED: %s: %d of %d suites did not pass", engine, n-a.suites[engine], n))
		}
	}
	return all
}

// plan is what an outer guest is to run of the suite.
func (s suite) plan(t *testing.T, program string) plan {
	t.Helper()
	p := plan{
		Nonce: nonce(t), Program: filepath.Join("/tests", filepath.Base(program)), Dir: filepath.Join(repository, s.pkg),
		Tests: s.short, Parts: s.shortParts, Env: s.env(), Seconds: cmp.Or(s.seconds, 900),
	}
	if !testing.Short() {
		p.Tests, p.Parts = s.all(t, program), ""
	}
	if len(p.Tests) == 0 {
		t.Fatalf("%s has no tests for %s", s.pkg, s.engine)
	}
	return p
}

// env is the environment of a suite's tests.
func (s suite) env() []string {
	env := []string{"TINE_TEST_ENGINE=" + s.engine}
	for name, path := range s.monitors() {
		env = append(env, name+"="+path, "TINE_"+name+"="+path) // for tests, and for tine
	}
	if rounds := os.Getenv(benchRounds); rounds != "" {
		env = append(env, benchRounds+"="+rounds)
	}
	return env
}

// monitors are the variables that name programs for the suite's engine, and where
// the outer guest has them.
func (s suite) monitors() map[string]string {
	found := map[string]string{}
	for _, name := range []string{"FIRECRACKER", "JAILER"} {
		if s.engine == firecracker && os.Getenv(name) != "" {
			found[name] = "/usr/local/bin/" + strings.ToLower(name)
		}
	}
	return found
}

// all are the tests of the suite's program, or those of them that it is about.
func (s suite) all(t *testing.T, program string) []string {
	t.Helper()
	var names []string
	for name := range strings.FieldsSeq(command(t, program, "-test.list=.")) {
		if strings.HasPrefix(name, "Test") && (s.only == nil || slices.Contains(s.only, name)) {
			names = append(names, name)
		}
	}
	return names
}
