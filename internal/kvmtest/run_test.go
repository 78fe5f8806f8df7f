package main

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTally: outcomes are counted whatever pieces they come in, and nothing else.
func TestTally(t *testing.T) {
	t.Parallel()
	const said = `=== RUN   TestA
=== RUN   TestA/one
    a_test.go:1: --- PASS: no outcome
--- PASS: TestA (1.20s)
    --- PASS: TestA/one (0.10s)
        --- PASS: TestA/one/deeper (0.10s)
--- FAIL: TestB (0.00s)
    --- FAIL: TestB/two (0.00s)
--- SKIP: TestC (0.00s)
PASS
--- PASS: TestD (0.00s)`
	want := result{Passed: []string{"TestA", "TestD"}, Failed: []string{"TestB"}, Skipped: []string{"TestC"}, Parts: 2}
	for _, size := range []int{1, 7, len(said)} {
		var got tally
		for rest := said; rest != ""; rest = rest[min(size, len(rest)):] {
			_, _ = fmt.Fprint(&got, rest[:min(size, len(rest))])
		}
		got.finish()
		if diff := cmp.Diff(want, got.result); diff != "" {
			t.Errorf("in pieces of %d: %s", size, diff)
		}
	}
}
