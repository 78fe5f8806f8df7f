package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// patience bounds waits for what must come about: a test that fails is late,
// and nothing is measured.
const patience = time.Minute

// host is this host's control groups, and the part of them that one test has.
// All tests share one parent: a process can be moved out of the way, as v2
// wants, only once.
type host struct {
	*Hierarchy
	prefix string
}

var hostNumber atomic.Int64

func parentName() string { return fmt.Sprintf("tine-test-%d", os.Getpid()) }

// realHost takes all groups of the test away at its end. It skips tests that
// this host cannot run for want of root or of the controllers needed.
func realHost(t *testing.T, needs ...string) host {
	t.Helper()
	h, err := Open(Config{Name: parentName(), Disk: "."})
	if errors.Is(err, errdef.ErrDenied) || errors.Is(err, errdef.ErrUnsupported) {
		t.Skipf("NOT TESTED on real control groups: %v (hint: %s)", err, errdef.Hint(err))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range needs {
		if !h.has(c) {
			t.Skipf("NOT TESTED on real control groups: %s: %s", c, h.missing[c])
		}
	}
	x := host{h, fmt.Sprintf("%d-", hostNumber.Add(1))}
	t.Cleanup(func() { x.sweep(t) })
	return x
}

// sweep ends and removes all groups of a test.
func (h host) sweep(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	for _, name := range h.names(t) {
		g, err := h.Group(h.prefix + name)
		if err == nil {
			err = errors.Join(g.Kill(ctx), g.Remove(ctx))
		}
		if err != nil {
			t.Error(err)
		}
	}
	if left := h.names(t); len(left) > 0 {
		t.Errorf("groups are left: %v", left)
	}
}

// names are the groups of this test.
func (h host) names(t *testing.T) []string {
	t.Helper()
	all, err := h.Names()
	if err != nil {
		t.Fatal(err)
	}
	var mine []string
	for _, name := range all {
		if short, ok := strings.CutPrefix(name, h.prefix); ok {
			mine = append(mine, short)
		}
	}
	return mine
}

func (h host) group(t *testing.T, name string, l Limits) *Group {
	t.Helper()
	g, err := h.Create(h.prefix+name, l)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// leaveHost removes what the tests share, and sees that nothing of it is left.
func leaveHost() error {
	h, err := Open(Config{Name: parentName()})
	if errors.Is(err, errdef.ErrDenied) || errors.Is(err, errdef.ErrUnsupported) {
		return nil
	}
	if err != nil {
		return err
	}
	err = h.Close()
	for _, t := range h.trees {
		if _, statErr := os.Stat(t.parent); !errors.Is(statErr, os.ErrNotExist) {
			err = errors.Join(err, fmt.Errorf("%s is left: %w", t.parent, statErr))
		}
		if t.v2 {
			err = errors.Join(err, h.moveBack(t))
		}
	}
	return err
}

// moveBack undoes what Open does to this process in a delegated group.
func (h *Hierarchy) moveBack(t *tree) error {
	leaf := filepath.Join(t.base, h.name+"-daemon")
	if _, err := os.Stat(leaf); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, c := range t.controllers {
		if err := h.kernel.write(filepath.Join(t.base, "cgroup.subtree_control"), "-"+v2Name(c)); err != nil {
			return err
		}
	}
	if err := h.kernel.write(filepath.Join(t.base, "cgroup.procs"), "0"); err != nil {
		return err
	}
	return h.kernel.rmdir(leaf)
}

// run starts a helper in a group. The test need not end it, but what it is in.
func run(t *testing.T, g *Group, role, name string) *exec.Cmd {
	t.Helper()
	cmd, err := start(context.WithoutCancel(t.Context()), g, role, name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // it was killed
	})
	return cmd
}

// until waits for a group's usage to be as wanted.
func until(t *testing.T, g *Group, what string, want func(Usage) bool) Usage {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var p pause
	for {
		u, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		if want(u) {
			return u
		}
		if err = p.wait(ctx); err != nil {
			t.Fatalf("%s did not come about: %+v", what, u)
		}
	}
}

func killed(err error) bool { return endedBy(err, syscall.SIGKILL) }

func endedBy(err error, signal syscall.Signal) bool {
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return false
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	return ok && status.Signal() == signal
}

func alive(t *testing.T, g *Group, cmd *exec.Cmd) {
	t.Helper()
	all, err := g.pids()
	if err != nil || !slices.Contains(all, cmd.Process.Pid) {
		t.Errorf("process %d is not in group %s any more: %v, %v", cmd.Process.Pid, g.Name(), all, err)
	}
}

func TestHostMemory(t *testing.T) {
	t.Parallel()
	h := realHost(t, memory)
	bystander := h.group(t, "bystander", Limits{MemoryBytes: feast})
	beside := run(t, bystander, "hold", "")
	g := h.group(t, "glutton", Limits{MemoryBytes: feast / 4})
	if err := run(t, g, "eat", "").Wait(); !killed(err) {
		t.Errorf("the process that took too much: %v", err)
	}
	u := until(t, g, "OOMKills", func(u Usage) bool { return u.OOMKills > 0 })
	if u.PeakBytes > feast/2 { // the kernel lets a process that it ends have a few pages more
		t.Errorf("it had %d bytes of at most %d", u.PeakBytes, feast/4)
	}
	alive(t, bystander, beside)
	// The kernel sums up what memory is used for only every few seconds.
	u = until(t, bystander, "private memory", func(u Usage) bool { return u.PrivateBytes >= snack })
	if u.OOMKills != 0 || u.MemoryBytes < snack || u.PeakBytes > feast {
		t.Errorf("the other group: %+v", u)
	}
}

// A limit that is raised while a process runs holds from then on.
func TestHostSet(t *testing.T) {
	t.Parallel()
	h := realHost(t, memory)
	g := h.group(t, "growing", Limits{MemoryBytes: 16 << 20})
	for _, bytes := range []int64{64 << 20, 32 << 20, 0, 2 * feast} {
		if err := g.Set(Limits{MemoryBytes: bytes}); err != nil {
			t.Errorf("%d: %v", bytes, err)
		}
	}
	if err := run(t, g, "eat", "").Wait(); killed(err) || err == nil {
		t.Errorf("the process that had enough: %v", err)
	}
}

func TestHostPIDs(t *testing.T) {
	t.Parallel()
	const most = 40
	h := realHost(t, pids)
	l := Limits{PIDs: most}
	if h.has(cpu) {
		l.CPUMillis = 200 // for the sake of whoever else is here
	}
	g := h.group(t, "bomb", l)
	run(t, g, "bomb", "")
	refused := func(Usage) bool {
		data, err := readFile(filepath.Join(h.by[pids].dir(g.Name()), "pids.events"))
		if err != nil {
			t.Fatal(err)
		}
		n, err := parseField(data, "max")
		return err == nil && n > 0
	}
	if u := until(t, g, "a fork that was refused", refused); u.PIDs > most {
		t.Errorf("%d processes, at most %d", u.PIDs, most)
	}
	other := h.group(t, "other", l)
	alive(t, other, run(t, other, "idle", ""))
}

func TestHostCPU(t *testing.T) {
	t.Parallel()
	h := realHost(t, cpu)
	g := h.group(t, "busy", Limits{CPUMillis: 50})
	run(t, g, "spin", "")
	until(t, g, "throttling", func(u Usage) bool { return u.Throttled > 0 && u.CPU > 0 })
	free := h.group(t, "free", Limits{})
	run(t, free, "idle", "")
	if u, err := free.Usage(); err != nil || u.Throttled != 0 {
		t.Errorf("without a limit: %+v, %v", u, err)
	}
}

func TestHostIO(t *testing.T) {
	t.Parallel()
	h := realHost(t, blkio)
	g := h.group(t, "disk", Limits{IOBytes: 1 << 20})
	rules := func() string {
		file := "blkio.throttle.write_bps_device"
		if h.by[blkio].v2 {
			file = "io.max"
		}
		data, err := readFile(filepath.Join(h.by[blkio].dir(g.Name()), file))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	if got := rules(); !strings.Contains(got, h.device) || !strings.Contains(got, "1048576") {
		t.Errorf("the kernel has %q for device %s", got, h.device)
	}
	if err := g.Set(Limits{}); err != nil || strings.TrimSpace(rules()) != "" {
		t.Errorf("the limit is left: %q, %v", rules(), err)
	}
	alive(t, g, run(t, g, "idle", ""))
}

// Whoever has inherited the entrances needs no rights of its own.
func TestHostEntrancesOfNobody(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: only root can become nobody")
	}
	h := realHost(t)
	g := h.group(t, "a", Limits{})
	pid := run(t, g, "nobody", "").Process.Pid
	for _, tr := range h.trees {
		all, err := readPIDs(tr.dir(g.Name()))
		if err != nil || !slices.Equal(all, []int{pid}) {
			t.Errorf("%s has %v, %v; want %d", tr.parent, all, err, pid)
		}
	}
}

// older is a kernel that does not have some of the files yet.
type older struct {
	kernel
	without []string
}

func (o older) write(file, text string) error {
	if slices.Contains(o.without, filepath.Base(file)) {
		return &os.PathError{Op: "open", Path: file, Err: syscall.ENOENT}
	}
	return o.kernel.write(file, text)
}

// A group that makes processes faster than they could be killed one by one
// ends, by each of the means that hosts have.
func TestHostKill(t *testing.T) {
	t.Parallel()
	tests := map[string][]string{
		"as_it_is":        nil,
		"without_kill":    {"cgroup.kill"},
		"without_freezer": {"cgroup.kill", "cgroup.freeze", "freezer.state"},
	}
	for name, without := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const most = 100
			h := realHost(t, pids)
			h.kernel = older{h.kernel, without}
			l := Limits{PIDs: most}
			if h.has(cpu) {
				l.CPUMillis = 500
			}
			g := h.group(t, "bomb", l)
			cmd := run(t, g, "bomb", "")
			until(t, g, "a full group", func(u Usage) bool { return u.PIDs > most/2 })
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if err := g.Kill(ctx); err != nil {
				t.Fatal(err)
			}
			if all, err := g.pids(); err != nil || len(all) > 0 {
				t.Errorf("left: %v, %v", all, err)
			}
			if err := cmd.Wait(); !killed(err) {
				t.Errorf("the first of them: %v", err)
			}
			if err := errors.Join(g.Kill(ctx), g.Remove(ctx), g.Remove(ctx), g.Kill(ctx)); err != nil {
				t.Error(err)
			}
			if names := h.names(t); len(names) > 0 {
				t.Errorf("names %v", names)
			}
		})
	}
}

// After a kill a group may be used again: it is not left frozen, nor without
// the right to make processes.
func TestHostUseAfterKill(t *testing.T) {
	t.Parallel()
	h := realHost(t)
	g := h.group(t, "a", Limits{})
	for range 3 {
		cmd := run(t, g, "idle", "")
		alive(t, g, cmd)
		if err := g.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); !killed(err) {
			t.Errorf("it ended with %v", err)
		}
	}
}

func TestHostRemoveOfAFullGroup(t *testing.T) {
	t.Parallel()
	h := realHost(t)
	g := h.group(t, "a", Limits{})
	cmd := run(t, g, "idle", "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := g.Remove(ctx); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("remove: %v", err)
	}
	alive(t, g, cmd)
	if _, err := h.Create(g.Name(), Limits{}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("made again: %v", err)
	}
}

// What a process leaves that is killed can be found, ended and removed.
func TestHostCreatorIsKilled(t *testing.T) {
	t.Parallel()
	h := realHost(t, pids)
	cmd := run(t, nil, "creator", h.name+"/"+h.prefix+"orphan")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); !killed(err) {
		t.Errorf("it ended with %v", err)
	}
	if names := h.names(t); !slices.Equal(names, []string{"orphan"}) {
		t.Fatalf("names %v", names)
	}
	g, err := h.Group(h.prefix + "orphan")
	if err != nil {
		t.Fatal(err)
	}
	until(t, g, "a process that goes on", func(u Usage) bool { return u.PIDs > 0 })
	if err = errors.Join(g.Kill(t.Context()), g.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	if names := h.names(t); len(names) > 0 {
		t.Errorf("names %v", names)
	}
}

// A process finds the groups of one that ran in another group, as a daemon does
// that is started again in another session.
func TestHostGroupOf(t *testing.T) {
	t.Parallel()
	h := realHost(t, pids)
	session := h.group(t, "session", Limits{})
	earlier := h.inside(t, session)
	creator := run(t, session, "creator", h.name+"/orphan")
	if err := creator.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := creator.Wait(); !killed(err) {
		t.Errorf("it ended with %v", err)
	}
	orphan := &Group{h: earlier, name: "orphan"}
	all, err := orphan.pids()
	if err != nil || len(all) != 1 {
		t.Fatalf("it has left the processes %v, %v", all, err)
	}
	for pid, name := range map[int]string{all[0]: "other", os.Getpid(): "orphan", 1 << 30: "orphan"} {
		if _, err = h.GroupOf(pid, name); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("process %d, group %s: %v", pid, name, err)
		}
	}
	g, err := h.GroupOf(all[0], "orphan")
	if err != nil {
		t.Fatal(err)
	}
	if err = g.Set(Limits{PIDs: 60}); err != nil {
		t.Error(err)
	}
	if data, readErr := readFile(filepath.Join(earlier.by[pids].dir("orphan"), "pids.max")); string(data) != "60\n" {
		t.Errorf("the limit is %q, %v", data, readErr)
	}
	until(t, g, "a process that goes on", func(u Usage) bool { return u.PIDs > 0 })
	alive(t, orphan, run(t, g, "idle", ""))
	if err = errors.Join(g.Kill(t.Context()), g.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	for _, tr := range earlier.trees {
		if _, err = os.Stat(tr.parent); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", tr.parent, err)
		}
	}
	if _, err = h.GroupOf(all[0], "orphan"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("it is found again: %v", err)
	}
}

// inside is the hierarchy of a process that opens one in a group. It is taken
// away at the end of the test.
func (h host) inside(t *testing.T, g *Group) *Hierarchy {
	t.Helper()
	var parents []string
	for _, tr := range h.trees {
		parents = append(parents, filepath.Join(tr.dir(g.Name()), h.name))
	}
	inner := h.below(parents)
	t.Cleanup(func() {
		host{inner, ""}.sweep(t)
		err := inner.Close()
		for _, dir := range parents {
			if rmErr := h.kernel.rmdir(dir + "-daemon"); !errors.Is(rmErr, os.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
		if err != nil {
			t.Error(err)
		}
	})
	return inner
}

func TestHostGroupOfOurs(t *testing.T) {
	t.Parallel()
	h := realHost(t)
	g := h.group(t, "a", Limits{})
	cmd := run(t, g, "idle", "")
	found, err := h.GroupOf(cmd.Process.Pid, g.Name())
	if err != nil || len(found.old) > 0 {
		t.Fatalf("%+v, %v", found, err)
	}
	alive(t, found, cmd)
}

// limitAll bounds all groups until the end of the test. Such a test may not be
// parallel to others: these share the parent.
func (h host) limitAll(t *testing.T, l Limits) {
	t.Helper()
	t.Cleanup(func() {
		if err := h.SetTotal(Limits{}); err != nil {
			t.Error(err)
		}
	})
	if err := h.SetTotal(l); err != nil {
		t.Fatal(err)
	}
}

// Two groups that each stay within their limit are too much together. The
// kernel ends the larger one's process. The test runs alone, for it bounds the
// others' groups too.
func TestHostTotalMemory(t *testing.T) {
	const each, most = feast / 2, 6 * snack
	h := realHost(t, memory)
	h.limitAll(t, Limits{MemoryBytes: most})
	outside := run(t, nil, "idle", "")
	small, large := h.group(t, "small", Limits{MemoryBytes: each}), h.group(t, "large", Limits{MemoryBytes: each})
	goesOn, ends := run(t, small, "hold", ""), run(t, large, "meal", "")
	u := until(t, large, "a kill", func(u Usage) bool { return u.OOMKills > 0 })
	if err := ends.Wait(); !killed(err) || u.PeakBytes >= most {
		t.Errorf("it ended with %v and had %d bytes", err, u.PeakBytes)
	}
	alive(t, small, goesOn)
	if u, err := small.Usage(); err != nil || u.OOMKills != 0 || u.PeakBytes >= most {
		t.Errorf("the other group: %+v, %v", u, err)
	}
	// The kernel lets a process that it ends have a few pages more.
	if u, err := h.Total(); err != nil || u.PeakBytes < most-snack || u.PeakBytes >= each {
		t.Errorf("both together: %+v, %v", u, err)
	}
	if err := outside.Process.Signal(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if err := outside.Wait(); !endedBy(err, syscall.SIGTERM) {
		t.Errorf("the process outside ended with %v before", err)
	}
}

// It runs alone like the one before.
func TestHostTotalPIDs(t *testing.T) {
	const most, each = 40, 30
	h := realHost(t, pids, cpu)
	h.limitAll(t, Limits{PIDs: most})
	groups := []*Group{h.group(t, "a", Limits{PIDs: each}), h.group(t, "b", Limits{PIDs: each})}
	for _, g := range groups {
		run(t, g, "bomb", "")
	}
	if err := h.SetTotal(Limits{PIDs: most, CPUMillis: 100}); err != nil { // they have started, and go on
		t.Fatal(err)
	}
	u := until(t, h.all(), "as many as may be", func(u Usage) bool { return u.PIDs >= most && u.Throttled > 0 })
	if total, err := h.Total(); err != nil || u.PIDs > most || total.PIDs > most || total.CPU == 0 {
		t.Errorf("%+v, %v", total, err)
	}
	if _, err := h.Create(h.prefix+"c", Limits{CPUMillis: 500}); !h.by[cpu].v2 && (!errors.Is(err, errdef.ErrInvalid) || errdef.Hint(err) == "") {
		t.Errorf("more processor time than all: %v", err)
	}
	if err := h.SetTotal(Limits{PIDs: most}); err != nil { // or they would end slowly
		t.Error(err)
	}
}
