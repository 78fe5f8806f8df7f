package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

// earlier is the hierarchy of a process that runs in the group from wherever
// this process is in the group own.
func (f *fake) earlier(own, from string) *Hierarchy {
	f.t.Helper()
	cfg := f.cfg
	cfg.Proc = filepath.Join(f.dir, "earlier")
	data, err := os.ReadFile(filepath.Join(f.cfg.Proc, "self/cgroup"))
	if err != nil {
		f.t.Fatal(err)
	}
	f.file("earlier/self/cgroup", strings.ReplaceAll(string(data), ":"+own+"\n", ":"+from+"\n"))
	if data, err = os.ReadFile(filepath.Join(f.cfg.Proc, "self/mountinfo")); err != nil {
		f.t.Fatal(err)
	}
	f.file("earlier/self/mountinfo", string(data))
	for point, controllers := range f.mounts {
		if f.v2(point) {
			controllers = strings.Fields(f.get(f.below(point, "cgroup.controllers")))
		}
		f.descend(point, from, controllers)
	}
	h, err := open(cfg, f)
	if err != nil {
		f.t.Fatal(err)
	}
	return h
}

// join puts a process into a group of h. The kernel tells of it in members.
func (f *fake) join(h *Hierarchy, pid int, name, members string) {
	f.t.Helper()
	for _, t := range h.trees {
		if err := f.write(filepath.Join(t.dir(name), "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			f.t.Fatal(err)
		}
	}
	f.file(fmt.Sprintf("proc/%d/cgroup", pid), members)
}

func TestGroupOf(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		host      func(*fake)
		own, from string
		members   string
		gone      []string // parents that go with the group
		stay      []string // and those that do not
		file      string   // a limit
	}{
		"v1": {
			v1Host, "/box", "/old/run",
			"9:name=systemd:/else\n5:blkio:/tine/a\n4:memory:/old/run/tine/a\n3:pids:/old/run/tine/a\n2:cpu,cpuacct:/tine/a\n1:freezer:/tine/a\n0::/\n",
			[]string{"memory/old/run/tine", "pids/old/run/tine"},
			[]string{"cpu,cpuacct/tine", "memory/box/tine", "pids/box/tine", "memory/old/run"},
			"pids/old/run/tine/a/pids.max",
		},
		"v2": {
			v2Host("/new.scope"), "/new.scope", "/old.scope", "0::/old.scope/tine/a\n",
			[]string{"old.scope/tine"},
			[]string{"new.scope/tine", "old.scope"},
			"old.scope/tine/a/pids.max",
		},
		"hybrid": {
			func(f *fake) {
				f.mount("cpu", "/", "/box", false, "cpu")
				f.mount("unified", "/", "/box", true, "memory", "pids")
			}, "/box", "/old", "1:cpu:/old/tine/a\n0::/old/tine/a\n",
			[]string{"cpu/old/tine", "unified/old/tine"},
			[]string{"cpu/box/tine", "unified/box/tine"},
			"unified/old/tine/a/pids.max",
		},
		"our_own": {
			v2Host("/"), "/", "/", "0::/tine/a\n", nil, []string{"tine"}, "tine/a/pids.max",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			before := f.earlier(tt.own, tt.from)
			if before.by[blkio] != nil {
				before.device = "8:0"
			}
			made, err := before.Create("a", Limits{PIDs: 9})
			if err != nil {
				t.Fatal(err)
			}
			f.join(before, boxed, "a", tt.members)
			h := f.open()
			g, err := h.GroupOf(boxed, "a")
			if err != nil {
				t.Fatal(err)
			}
			if all, pidsErr := g.pids(); pidsErr != nil || !slices.Equal(all, []int{boxed}) || g.Name() != "a" {
				t.Errorf("%s has %v, %v", g.Name(), all, pidsErr)
			}
			want, err := made.Usage()
			if err != nil {
				t.Fatal(err)
			}
			got, err := g.Usage()
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
			if err = g.Set(Limits{PIDs: 12}); err != nil || f.get(tt.file) != "12" {
				t.Errorf("%v, limit %s", err, f.get(tt.file))
			}
			if err = g.Set(Limits{CPUMillis: 1}); !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("a bad limit: %v", err)
			}
			doors, err := g.Entrances()
			if err != nil || len(doors) != len(h.trees) {
				t.Errorf("%d entrances of %d, %v", len(doors), len(h.trees), err)
			}
			for _, d := range doors {
				if err = d.Close(); err != nil || filepath.Base(filepath.Dir(d.Name())) != "a" {
					t.Errorf("%s: %v", d.Name(), err)
				}
			}
			f.removal(h, g, tt.gone, tt.stay)
		})
	}
}

// removal removes a group, twice, and sees which parents are there then.
func (f *fake) removal(h *Hierarchy, g *Group, gone, stay []string) {
	f.t.Helper()
	for _, t := range g.h.trees { // its process ends
		f.put(t.dir(g.name), "cgroup.procs", "")
	}
	if err := errors.Join(g.Kill(f.t.Context()), g.Remove(f.t.Context()), g.Remove(f.t.Context())); err != nil {
		f.t.Error(err)
	}
	for _, dir := range gone {
		if f.get(dir+"/cgroup.procs") != "-" {
			f.t.Errorf("%s is left", dir)
		}
	}
	for _, dir := range stay {
		if f.get(dir+"/cgroup.procs") == "-" {
			f.t.Errorf("%s is gone", dir)
		}
	}
	if _, err := h.GroupOf(boxed, g.name); !errors.Is(err, errdef.ErrNotFound) {
		f.t.Errorf("found: %v", err)
	}
}

// The parent is removed with its last group.
func TestGroupOfOneOfTwo(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	v2Host("/new")(f)
	before := f.earlier("/new", "/old")
	for _, name := range []string{"a", "b"} {
		if _, err := before.Create(name, Limits{}); err != nil {
			t.Fatal(err)
		}
	}
	f.file(fmt.Sprintf("proc/%d/cgroup", boxed), "0::/old/tine/a\n")
	f.file(fmt.Sprintf("proc/%d/cgroup", stranger), "0::/old/tine/b\n")
	h := f.open()
	a, err := h.GroupOf(boxed, "a")
	if err != nil {
		t.Fatal(err)
	}
	b, err := h.GroupOf(stranger, "b")
	if err != nil {
		t.Fatal(err)
	}
	if err = a.Remove(t.Context()); err != nil || f.get("old/tine/b/cgroup.procs") != "" {
		t.Errorf("the first: %v", err)
	}
	if err = b.Remove(t.Context()); err != nil || f.get("old/tine/cgroup.procs") != "-" {
		t.Errorf("the last: %v", err)
	}
}

func TestGroupOfRefuses(t *testing.T) {
	t.Parallel()
	v1 := func(memory, pids string) string {
		return fmt.Sprintf("5:blkio:/tine/a\n4:memory:%s\n3:pids:%s\n2:cpu,cpuacct:/tine/a\n1:freezer:/tine/a\n", memory, pids)
	}
	tests := map[string]struct {
		members string
		name    string
		want    error
		says    string
	}{
		"found":          {v1("/box/tine/a", "/box/tine/a"), "a", nil, ""},
		"other_name":     {v1("/box/tine/a", "/box/tine/b"), "a", errdef.ErrNotFound, `it is in "/box/tine/b"`},
		"other_parent":   {v1("/box/tine/a", "/box/vine/a"), "a", errdef.ErrNotFound, "not in tine/a"},
		"no_parent":      {v1("/a", "/a"), "a", errdef.ErrNotFound, "not in tine/a"},
		"root":           {v1("/", "/"), "a", errdef.ErrNotFound, "not in tine/a"},
		"group_inside":   {v1("/box/tine/a/x", "/box/tine/a"), "a", errdef.ErrNotFound, "not in tine/a"},
		"prefix":         {v1("/box/tine/aa", "/box/tine/a"), "a", errdef.ErrNotFound, "not in tine/a"},
		"deleted":        {v1("/box/tine/a (deleted)", "/box/tine/a"), "a", errdef.ErrNotFound, "not in tine/a"},
		"out_of_sight":   {v1("/../x/tine/a", "/box/tine/a"), "a", errdef.ErrNotFound, "is not below"},
		"not_there":      {v1("/gone/tine/a", "/box/tine/a"), "a", errdef.ErrNotFound, "no such file"},
		"no_controller":  {"5:blkio:/tine/a\n", "a", errdef.ErrNotFound, `it is in ""`},
		"v2_for_v1":      {"0::/box/tine/a\n", "a", errdef.ErrNotFound, "not in tine/a"},
		"nonsense":       {"nonsense", "a", errdef.ErrInvalid, "line"},
		"ended":          {"", "a", errdef.ErrNotFound, "not in tine/a"},
		"no_process":     {"-", "a", errdef.ErrNotFound, "no such file"},
		"bad_name":       {v1("/box/tine/..", "/box/tine/.."), "..", errdef.ErrInvalid, "name"},
		"name_of_a_path": {v1("/box/tine/a", "/box/tine/a"), "tine/a", errdef.ErrInvalid, "name"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			v1Host(f)
			h := f.open()
			if _, err := h.Create("a", Limits{}); err != nil {
				t.Fatal(err)
			}
			if tt.members != "-" {
				f.file(fmt.Sprintf("proc/%d/cgroup", boxed), tt.members)
			}
			g, err := h.GroupOf(boxed, tt.name)
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.says) || (g == nil) != (err != nil) {
				t.Errorf("got %v, %v; want %v: %s", g, err, tt.want, tt.says)
			}
		})
	}
}

// What this user may not look at may well exist.
func TestGroupOfDenied(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 {
		t.Skip("NOT TESTED: root may look at everything")
	}
	f := newFake(t)
	v2Host("/")(f)
	h := f.open()
	closed := filepath.Dir(filepath.Dir(f.descend(f.cfg.Root, "/closed/tine/a", nil)))
	if err := os.Chmod(closed, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(closed, 0o700) }) // it could not be removed else
	f.file(fmt.Sprintf("proc/%d/cgroup", boxed), "0::/closed/tine/a\n")
	if _, err := h.GroupOf(boxed, "a"); !errors.Is(err, os.ErrPermission) || errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a group that is not for this user: %v", err)
	}
}
