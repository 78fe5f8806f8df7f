//go:build vm

package sandbox_test

import (
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmtest"
)

//go:embed testdata/witness.py
var witness string

// sighting is what the witness saw of its machine.
type sighting struct {
	Count  int     `json:"count"`
	Bad    [][]int `json:"bad"`
	Places []int   `json:"places"`
	GapMS  float64 `json:"gap_ms"`
	Random string  `json:"random"`
	Clock  float64 `json:"clock"`
}

// consistent checks that all that was seen belongs to one instant.
func (s *sighting) consistent(t *testing.T, who string) {
	t.Helper()
	if s.Count == 0 || len(s.Bad) > 0 {
		t.Errorf("%s: at count %d pages are wrong: %v", who, s.Count, s.Bad)
	}
	before := s.Count
	for i, place := range s.Places {
		if place > before || s.Count-place >= 128 {
			t.Errorf("%s: at count %d place %d has %d, after %d", who, s.Count, i, place, before)
		}
		before = place
	}
	if late := time.Since(time.UnixMilli(int64(s.Clock * 1000))); late.Abs() > 30*time.Second {
		t.Errorf("%s: its clock is off by %s", who, late)
	}
}

// testify starts the witness with so many MiB.
func (l *lab) testify(t *testing.T, id string, mib int) {
	t.Helper()
	l.sh(t, id, fmt.Sprintf("cat > /root/witness.py <<'END'\n%s\nEND\nsetsid python3 /root/witness.py %d > /root/log 2>&1 < /dev/null & echo $! > /root/pid\n"+
		"until grep -q counting /root/log; do sleep 0.1; done", witness, mib))
}

// ask has the witness look.
func (l *lab) ask(t *testing.T, id string) sighting {
	t.Helper()
	text := l.sh(t, id, "rm -f /tmp/report; kill -USR1 $(cat /root/pid); for i in $(seq 600); do test -e /tmp/report && break; sleep 0.05; done; cat /tmp/report /root/log")
	var s sighting
	if err := json.NewDecoder(strings.NewReader(text)).Decode(&s); err != nil {
		t.Fatalf("%s: %v: %q", id, err, text)
	}
	return s
}

// branch makes a branch that goes with the test.
func (l *lab) branch(t *testing.T, id string, mode sandbox.Mode) snapshot.Snapshot {
	t.Helper()
	snap, err := l.Branch(within(t, time.Minute), id, sandbox.BranchRequest{Mode: mode})
	if err != nil {
		t.Fatal(err)
	}
	l.tags = append(l.tags, snap.Tag)
	return snap
}

// number is what the environment says under the name, for a run by hand that
// takes longer than every run should.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// TestVMBranches branches a machine that writes as fast as it can, in all
// modes, and has a fork of each branch say whether it is of one instant.
// $TINE_TEST_BRANCHES and $TINE_TEST_DIRTY_MIB ask for more.
func TestVMBranches(t *testing.T) {
	l := newLab(t)
	source := l.fork(t, 1)[0]
	l.testify(t, source, number(t, "TINE_TEST_DIRTY_MIB", 16))
	modes := []sandbox.Mode{sandbox.Live, sandbox.Diff, sandbox.Full}
	var seen []string
	last := 0
	for i := range number(t, "TINE_TEST_BRANCHES", 3) {
		mode := modes[i%len(modes)]
		snap := l.branch(t, source, mode)
		if snap.Mode != string(mode) {
			t.Errorf("mode %s: %s", snap.Mode, snap.Warning)
		}
		here := l.ask(t, source)
		here.consistent(t, "source")
		kid := l.fork(t, 1, func(req *sandbox.ForkRequest) { req.Snapshot = snap.Tag })[0]
		there := l.ask(t, kid)
		there.consistent(t, snap.Tag)
		if there.Count <= last || here.Count <= last {
			t.Errorf("%s: counts %d and %d after %d", snap.Tag, there.Count, here.Count, last)
		}
		last = min(there.Count, here.Count)
		if slices.Contains(seen, there.Random) {
			t.Errorf("%s: its random numbers were seen before", snap.Tag)
		}
		seen = append(seen, there.Random, here.Random)
		t.Logf("%-4s depth %d: paused %.1f ms, longest gap seen inside %.1f ms, copied in %d ms, %.1f MiB on disk",
			mode, snap.Depth, snap.PauseMS, here.GapMS, snap.DiffMS, float64(snap.DiffPhysicalBytes)/(1<<20))
		if err := l.Kill(within(t, time.Minute), kid); err != nil {
			t.Error(err)
		}
	}
}

// TestVMRollbackAndSuspend takes a counting machine to a node and back, and to
// the disk and back: each time it goes on from where it was.
func TestVMRollbackAndSuspend(t *testing.T) {
	l := newLab(t)
	id := l.fork(t, 1)[0]
	l.testify(t, id, 16)
	node := l.branch(t, id, sandbox.Live)
	l.sh(t, id, "echo later > /root/later; rm /root/witness.py")
	now := l.ask(t, id)

	d, err := l.Diff(within(t, time.Minute), node.Tag, id)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []sandbox.DiffEntry{{Path: "/root/later", Change: "added", After: 6}} {
		if !slices.Contains(d.Files, want) {
			t.Errorf("diff lacks %+v: %+v", want, d.Files)
		}
	}
	if !slices.ContainsFunc(d.Files, func(e sandbox.DiffEntry) bool { return e.Path == "/root/witness.py" && e.Change == "removed" }) {
		t.Errorf("diff lacks what was removed: %+v", d.Files)
	}
	if d.Pages < 4096 || d.Pages > d.TotalPages/2 {
		t.Errorf("%d of %d pages differ, and 4096 or more were written", d.Pages, d.TotalPages)
	}

	if _, err = l.Rollback(within(t, time.Minute), id, node.Tag); err != nil {
		t.Fatal(err)
	}
	back := l.ask(t, id)
	back.consistent(t, "rolled back")
	l.sh(t, id, "test -e /root/witness.py && test ! -e /root/later")

	for range 2 {
		if _, err = l.Suspend(within(t, time.Minute), id); err != nil {
			t.Fatal(err)
		}
		if pids := l.processes(t); len(pids) > 0 {
			t.Errorf("processes of a suspended sandbox: %v", pids)
		}
		again := l.ask(t, id) // which resumes it
		again.consistent(t, "resumed")
		if again.Count <= back.Count || again.Random == back.Random {
			t.Errorf("resumed at count %d after %d", again.Count, back.Count)
		}
		back = again
	}
	t.Logf("counts: %d at the node and on, %d in the end", now.Count, back.Count)
}

// TestVMBranchesWithDisk: what is on the scratch disk is of the same instant as
// the memory, in branches, after a roll-back and after a suspension.
func TestVMBranchesWithDisk(t *testing.T) {
	l := newLab(t)
	_, py := vmtest.Snapshot(t)
	const tag = "branch-test-disk"
	_, err := l.CreateSnapshot(within(t, 2*time.Minute), sandbox.SnapshotRequest{
		Tag: tag, Image: py.Manifest.Image, Machine: vmm.Machine{MemoryMiB: 256, DiskMiB: 512}, Replace: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	l.tags = append(l.tags, tag)
	from := func(tag string) func(*sandbox.ForkRequest) {
		return func(req *sandbox.ForkRequest) { req.Snapshot = tag }
	}
	id := l.fork(t, 1, from(tag))[0]
	l.testify(t, id, 8)
	const fill = "head -c 6000000 /dev/urandom > /root/noise; sha256sum /root/noise > /root/sum"
	const whole = "sha256sum --quiet -c /root/sum && df --output=size -m / | tail -1"
	l.sh(t, id, fill)
	if size := l.sh(t, id, whole); len(size) < 3 || size > "520" {
		t.Errorf("the root has %s MiB", size)
	}
	var nodes []snapshot.Snapshot
	for _, mode := range []sandbox.Mode{sandbox.Live, sandbox.Diff, sandbox.Full} {
		nodes = append(nodes, l.branch(t, id, mode))
		l.sh(t, id, "echo "+string(mode)+" >> /root/modes; sync")
	}
	l.sh(t, id, fill)
	for i, node := range nodes {
		kid := l.fork(t, 1, from(node.Tag))[0]
		l.sh(t, kid, whole)
		seen := l.ask(t, kid)
		seen.consistent(t, node.Mode)
		if n := l.sh(t, kid, "cat /root/modes 2>/dev/null | wc -l"); n != strconv.Itoa(i) {
			t.Errorf("%s: %s modes are on its disk, want %d", node.Mode, n, i)
		}
		l.sh(t, kid, "echo mine > /root/mine; "+fill) // which no sibling must see
		t.Logf("%s: paused %.1f ms, %d files of disk", node.Mode, node.PauseMS, len(node.Manifest.Disk))
	}
	if _, err = l.Suspend(within(t, time.Minute), id); err != nil {
		t.Fatal(err)
	}
	l.sh(t, id, whole+" && test ! -e /root/mine")
	if _, err = l.Rollback(within(t, time.Minute), id, nodes[1].Tag); err != nil {
		t.Fatal(err)
	}
	l.sh(t, id, whole)
	back := l.ask(t, id)
	back.consistent(t, "rolled back")
}
