package cgroup

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestOpen(t *testing.T) {
	t.Parallel()
	const all = "memory cpu pids io"
	tests := map[string]struct {
		host    func(*fake)
		version int
		has     string
		missing []string // a part of each line
		parents string   // the directories of the parent that must be there
	}{
		"v1": {
			host: v1Host, version: 1, has: all,
			parents: "cpu,cpuacct/tine memory/box/tine pids/box/tine blkio/tine freezer/tine",
		},
		"v1_in_a_container": {
			host: func(f *fake) {
				f.mount("memory", "/docker/ab", "/docker/ab", false, "memory")
				f.mount("cpu", "/docker/ab", "/docker/ab/cd", false, "cpu")
			},
			version: 1, has: "memory cpu", missing: []string{"pids: not mounted", "io: not mounted"},
			parents: "memory/tine cpu/cd/tine",
		},
		"v1_group_out_of_sight": {
			host: func(f *fake) {
				f.mount("memory", "/docker/ab", "/docker/xy", false, "memory")
				f.mount("pids", "/", "/", false, "pids")
			},
			version: 1, has: "pids", missing: []string{"memory: the group /docker/xy is not below", "cpu:", "io:"},
			parents: "pids/tine",
		},
		"v1_all_in_one": {
			host: func(f *fake) {
				f.mount(".", "/", "/", false, "cpuset", "memory", "cpu", "cpuacct", "pids", "blkio", "freezer")
				f.put(f.cfg.Root, "cpuset.cpus", "0-1\n")
				f.put(f.cfg.Root, "cpuset.mems", "0\n")
			},
			version: 1, has: all, parents: "tine",
		},
		"v1_some_denied": {
			host: func(f *fake) {
				v1Host(f)
				f.refuse[filepath.Join(f.cfg.Root, "memory")] = unix.EACCES
				f.refuse[filepath.Join(f.cfg.Root, "blkio")] = unix.EROFS
			},
			version: 1, has: "cpu pids", missing: []string{"memory: mkdir", "io: mkdir"},
			parents: "cpu,cpuacct/tine pids/box/tine freezer/tine",
		},
		"v1_kernel_without_throttling": {
			host: func(f *fake) {
				f.without = []string{"blkio.throttle.read_bps_device"}
				v1Host(f)
			},
			version: 1, has: "memory cpu pids", missing: []string{"io: the kernel was built without it"},
		},
		"v2_root": {host: v2Host("/"), version: 2, has: all, parents: "tine"},
		"v2_delegated": {
			host: v2Host("/system.slice/tine.service"), version: 2, has: all,
			parents: "system.slice/tine.service/tine system.slice/tine.service/tine-daemon",
		},
		"v2_again": {
			host: v2Host("/system.slice/tine.service/tine-daemon"), version: 2, has: all,
			parents: "system.slice/tine.service/tine",
		},
		"v2_container": {
			host: func(f *fake) {
				f.without = []string{"root"}
				v2Host("/")(f)
				f.put(f.cfg.Root, "cgroup.events", "")
			},
			version: 2, has: all, parents: "tine tine-daemon",
		},
		"v2_with_children": {
			host: func(f *fake) {
				v2Host("/me")(f)
				f.put(f.cfg.Root+"/me", "cgroup.procs", strconv.Itoa(os.Getpid())+"\n"+strconv.Itoa(child)+"\n")
			},
			version: 2, has: all, parents: "me/tine me/tine-daemon",
		},
		"v2_part": {
			host:    func(f *fake) { f.mount(".", "/", "/user/me", true, "memory", "pids") },
			version: 2, has: "memory pids", missing: []string{"cpu: not among the controllers", "io: not among the controllers"},
			parents: "user/me/tine",
		},
		"v2_kernel_without_throttling": {
			host: func(f *fake) {
				f.without = []string{"io.max"}
				v2Host("/")(f)
			},
			version: 2, has: "memory cpu pids", missing: []string{"io: the kernel was built without it"},
		},
		"hybrid_v1_only": {
			host: func(f *fake) {
				v1Host(f)
				f.mount("unified", "/", "/box", true)
			},
			version: 1, has: all, parents: "memory/box/tine unified/box/tine",
		},
		"hybrid_shared_out": {
			host: func(f *fake) {
				f.mount("cpu", "/", "/", false, "cpu")
				f.mount("unified", "/", "/", true, "memory", "pids")
			},
			version: 1, has: "memory cpu pids", missing: []string{"io: not among the controllers"},
			parents: "cpu/tine unified/tine",
		},
		"hybrid_v2_denied": {
			host: func(f *fake) {
				v1Host(f)
				f.mount("unified", "/", "/", true)
				f.refuse[filepath.Join(f.cfg.Root, "unified")] = unix.EACCES
			},
			version: 1, has: all, parents: "memory/box/tine",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			for range 2 { // the second finds what the first has made
				s := f.open().Support()
				want := Support{
					Version: tt.version, Memory: strings.Contains(tt.has, "memory"), CPU: strings.Contains(tt.has, "cpu"),
					PIDs: strings.Contains(tt.has, "pids"), IO: strings.Contains(tt.has, "io"), Missing: s.Missing,
				}
				if diff := cmp.Diff(want, s); diff != "" || len(s.Missing) != len(tt.missing) {
					t.Errorf("missing %q, want %q\n%s", s.Missing, tt.missing, diff)
				}
				for i, part := range tt.missing {
					if i < len(s.Missing) && !strings.Contains(s.Missing[i], part) {
						t.Errorf("missing %q, want %q", s.Missing[i], part)
					}
				}
				for dir := range strings.FieldsSeq(tt.parents) {
					if f.get(dir+"/cgroup.procs") == "-" {
						t.Errorf("no group %s", dir)
					}
				}
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	denyAll := func(err error) func(*fake) {
		return func(f *fake) { f.refuse[f.cfg.Root] = err }
	}
	tests := map[string]struct {
		hosts []func(*fake)
		want  error
		says  string
		hint  string
	}{
		"none":                {nil, errdef.ErrUnsupported, "no control groups are mounted", "mount -t cgroup2"},
		"v1_denied":           {[]func(*fake){v1Host, denyAll(unix.EACCES)}, errdef.ErrDenied, "memory: mkdir", "run as root"},
		"v1_read_only":        {[]func(*fake){v1Host, denyAll(unix.EROFS)}, errdef.ErrDenied, "read-only", "run as root"},
		"v2_denied":           {[]func(*fake){v2Host("/user/me"), denyAll(unix.EACCES)}, errdef.ErrDenied, "memory, cpu, pids, io: mkdir", "Delegate=yes"},
		"v2_nothing_to_give":  {[]func(*fake){func(f *fake) { f.mount(".", "/", "/me", true) }}, errdef.ErrUnsupported, "memory, cpu, pids, io: not among", "Delegate=yes"},
		"v2_others_processes": {[]func(*fake){v2Host("/me"), addStranger}, errdef.ErrUnsupported, "process 2000000002, which is not ours", "systemd-run --scope"},
		"v2_unseen_processes": {[]func(*fake){v2Host("/me"), addUnseen}, errdef.ErrUnsupported, "process 0, which is not ours", "systemd-run --scope"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			for _, host := range tt.hosts {
				host(f)
			}
			_, err := open(f.cfg, f)
			if !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) || !strings.Contains(errdef.Hint(err), tt.hint) {
				t.Errorf("got %v (hint: %s), want %v, %q, %q", err, errdef.Hint(err), tt.want, tt.says, tt.hint)
			}
			left, err := filepath.Glob(f.cfg.Root + "/*/tine*")
			if err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}

func addStranger(f *fake) { f.file("cgroup/me/cgroup.procs", strconv.Itoa(stranger)+"\n") }
func addUnseen(f *fake)   { f.file("cgroup/me/cgroup.procs", "0\n") }

func TestOpenMovesOnlyWhatItMust(t *testing.T) {
	t.Parallel()
	me := strconv.Itoa(os.Getpid())
	f := newFake(t)
	v2Host("/me")(f)
	f.file("cgroup/me/cgroup.procs", strconv.Itoa(child)+"\n")
	f.open()
	if got := f.get("me/cgroup.procs"); got != "" {
		t.Errorf("in the delegated group: %q", got)
	}
	if got, want := f.get("me/tine-daemon/cgroup.procs"), me+"\n"+strconv.Itoa(child); got != want {
		t.Errorf("in the daemon's group: %q, want %q", got, want)
	}
	for name, host := range map[string]func(*fake){"v2_root": v2Host("/"), "hybrid": func(f *fake) {
		v1Host(f)
		f.mount("unified", "/", "/me", true)
	}} {
		f = newFake(t)
		host(f)
		f.open()
		for _, dir := range []string{".", "unified/me"} {
			if got := f.get(dir + "/cgroup.procs"); got != me && got != "-" {
				t.Errorf("%s: in %s: %q", name, dir, got)
			}
		}
	}
}

func TestOpenBadConfig(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", ".", "..", "a/b", "-x", strings.Repeat("x", 65)} {
		if _, err := Open(Config{Name: name}); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := Open(Config{Name: "x", Proc: t.TempDir()}); err == nil {
		t.Error("no /proc, and no error")
	}
	f := newFake(t)
	f.file("proc/self/cgroup", "nonsense")
	if _, err := open(f.cfg, f); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("nonsense: %v", err)
	}
	f = newFake(t)
	f.file("proc/self/mountinfo", strings.Repeat("x", maxFile))
	if _, err := open(f.cfg, f); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("a file that is too long: %v", err)
	}
}

func TestCreate(t *testing.T) {
	t.Parallel()
	limits := Limits{MemoryBytes: 64 << 20, CPUMillis: 1500, PIDs: 100, IOBytes: 1 << 20}
	tests := map[string]struct {
		host func(*fake)
		want map[string]string
	}{
		"v1": {v1Host, map[string]string{
			"memory/box/tine/sb-1/memory.limit_in_bytes":       "67108864",
			"memory/box/tine/sb-1/memory.memsw.limit_in_bytes": "67108864",
			"cpu,cpuacct/tine/sb-1/cpu.cfs_quota_us":           "150000",
			"cpu,cpuacct/tine/sb-1/cpu.cfs_period_us":          "100000",
			"pids/box/tine/sb-1/pids.max":                      "100",
			"blkio/tine/sb-1/blkio.throttle.read_bps_device":   "8:0 1048576",
			"blkio/tine/sb-1/blkio.throttle.write_bps_device":  "8:0 1048576",
			"freezer/tine/sb-1/freezer.state":                  "THAWED",
		}},
		"v2": {v2Host("/"), map[string]string{
			"tine/sb-1/memory.max": "67108864", "tine/sb-1/memory.swap.max": "0", "tine/sb-1/cpu.max": "150000 100000",
			"tine/sb-1/pids.max": "100", "tine/sb-1/io.max": "8:0 rbps=1048576 wbps=1048576",
		}},
		"cpuset": {
			func(f *fake) {
				f.mount(".", "/", "/", false, "cpuset", "memory", "cpu", "pids", "blkio")
				f.put(f.cfg.Root, "cpuset.cpus", "0-1\n")
				f.put(f.cfg.Root, "cpuset.mems", "0\n")
			},
			map[string]string{"tine/sb-1/cpuset.cpus": "0-1", "tine/sb-1/cpuset.mems": "0", "tine/sb-1/pids.max": "100"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			h := f.open()
			g, err := h.Create("sb-1", limits)
			if err != nil {
				t.Fatal(err)
			}
			for file, want := range tt.want {
				if got := f.get(file); got != want {
					t.Errorf("%s: %q, want %q", file, got, want)
				}
			}
			if _, err = h.Create("sb-1", Limits{}); !errors.Is(err, errdef.ErrExists) {
				t.Errorf("again: %v", err)
			}
			if names, listErr := h.Names(); listErr != nil || !slices.Equal(names, []string{"sb-1"}) {
				t.Errorf("names %v, %v", names, listErr)
			}
			if err = g.Remove(t.Context()); err != nil {
				t.Error(err)
			}
			if err = g.Remove(t.Context()); err != nil {
				t.Errorf("removed again: %v", err)
			}
			if names, listErr := h.Names(); listErr != nil || len(names) > 0 {
				t.Errorf("names %v, %v", names, listErr)
			}
			if _, err = h.Group("sb-1"); !errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("found: %v", err)
			}
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.mount("memory", "/", "/", false, "memory")
	f.mount("pids", "/", "/", false, "pids")
	h := f.open()
	tests := map[string]struct {
		group string
		l     Limits
		want  error
		says  string
	}{
		"name":          {"../x", Limits{}, errdef.ErrInvalid, "name"},
		"dots":          {"..", Limits{}, errdef.ErrInvalid, "name"},
		"empty":         {"", Limits{}, errdef.ErrInvalid, "name"},
		"memory":        {"a", Limits{MemoryBytes: -1}, errdef.ErrInvalid, "MemoryBytes"},
		"little_memory": {"a", Limits{MemoryBytes: MinMemory - 1}, errdef.ErrInvalid, "MemoryBytes"},
		"little_cpu":    {"a", Limits{CPUMillis: MinCPUMillis - 1}, errdef.ErrInvalid, "CPUMillis"},
		"much_cpu":      {"a", Limits{CPUMillis: maxCPU + 1}, errdef.ErrInvalid, "CPUMillis"},
		"pids":          {"a", Limits{PIDs: -1}, errdef.ErrInvalid, "PIDs"},
		"little_io":     {"a", Limits{IOBytes: MinIOBytes - 1}, errdef.ErrInvalid, "IOBytes"},
		"no_cpu":        {"a", Limits{CPUMillis: 1000}, errdef.ErrUnsupported, "CPUMillis"},
		"no_io":         {"a", Limits{IOBytes: 1 << 20}, errdef.ErrUnsupported, "IOBytes"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := h.Create(tt.group, tt.l); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %v of %s", err, tt.want, tt.says)
			}
		})
	}
	t.Cleanup(func() {
		if names, listErr := h.Names(); listErr != nil || len(names) > 0 {
			t.Errorf("left: %v, %v", names, listErr)
		}
	})
}

// What is refused half way leaves nothing.
func TestCreateTakesBack(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		where string
		err   error
		want  error
	}{
		"directory": {"pids/box/tine/a", unix.ENOSPC, unix.ENOSPC},
		"limit":     {"pids/box/tine/a/pids.max", unix.EINVAL, errdef.ErrInvalid},
		"busy":      {"memory/box/tine/a/memory.limit_in_bytes", unix.EBUSY, errdef.ErrConflict},
		"quota":     {"cpu,cpuacct/tine/a/cpu.cfs_quota_us", unix.EINVAL, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			v1Host(f)
			h := f.open()
			f.refuse[filepath.Join(f.cfg.Root, tt.where)] = tt.err
			_, err := h.Create("a", Limits{MemoryBytes: 1 << 30, CPUMillis: 100, PIDs: 10})
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if name == "quota" && errdef.Hint(err) == "" {
				t.Error("no hint")
			}
			if names, listErr := h.Names(); listErr != nil || len(names) > 0 {
				t.Errorf("left: %v, %v", names, listErr)
			}
		})
	}
}

// Several processes may share a parent, and one of them removes it when it
// looks empty to it.
func TestParentIsMadeAgain(t *testing.T) {
	t.Parallel()
	for name, host := range map[string]func(*fake){"v1": v1Host, "v2": v2Host("/me")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			host(f)
			one, other := f.open(), f.open()
			g, err := one.Create("a", Limits{PIDs: 5})
			if err != nil {
				t.Fatal(err)
			}
			if err = other.Close(); err != nil {
				t.Errorf("close with a group: %v", err)
			}
			if _, err = other.Group("a"); err != nil {
				t.Error(err)
			}
			if err = errors.Join(g.Remove(t.Context()), other.Close(), other.Close()); err != nil {
				t.Error(err)
			}
			if names, listErr := one.Names(); listErr != nil || len(names) > 0 {
				t.Errorf("names %v, %v", names, listErr)
			}
			if _, err = one.Create("b", Limits{PIDs: 5}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSet(t *testing.T) {
	t.Parallel()
	const mem, sum = "memory/box/tine/a/memory.limit_in_bytes", "memory/box/tine/a/memory.memsw.limit_in_bytes"
	f := newFake(t)
	v1Host(f)
	h := f.open()
	g, err := h.Create("a", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	const none = "9223372036854771712"
	for _, step := range []struct {
		bytes int64
		want  string
	}{{2 << 20, "2097152"}, {4 << 20, "4194304"}, {1 << 20, "1048576"}, {1 << 20, "1048576"}, {0, none}, {8 << 20, "8388608"}} {
		if err = g.Set(Limits{MemoryBytes: step.bytes}); err != nil {
			t.Fatalf("%d: %v", step.bytes, err)
		}
		if f.get(mem) != step.want || f.get(sum) != step.want {
			t.Errorf("%d: %s and %s", step.bytes, f.get(mem), f.get(sum))
		}
	}
	if err = g.Set(Limits{PIDs: -1}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("a bad limit: %v", err)
	}
	if err = g.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err = g.Set(Limits{PIDs: 7}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a group that is gone: %v", err)
	}
}

func TestSetWithoutSwapAccounting(t *testing.T) {
	t.Parallel()
	for name, host := range map[string]func(*fake){"v1": v1Host, "v2": v2Host("/")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			f.without = []string{"memory.memsw.limit_in_bytes", "memory.swap.max"}
			host(f)
			g, err := f.open().Create("a", Limits{MemoryBytes: 1 << 20})
			if err != nil {
				t.Fatal(err)
			}
			if name == "v1" && f.get("memory/box/tine/a/memory.swappiness") != "0" {
				t.Error("what does not fit is swapped out")
			}
			if err = g.Set(Limits{}); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	all := Usage{
		MemoryBytes: 100, PrivateBytes: 60, SharedBytes: 30, PeakBytes: 200, CPU: 8 * time.Second,
		Throttled: 5 * time.Millisecond, PIDs: 3, OOMKills: 1, ReadBytes: 10, WriteBytes: 20,
	}
	tests := map[string]struct {
		host func(*fake)
		want Usage
	}{
		"v1": {v1Host, all},
		"v1_old": {
			func(f *fake) { f.without = []string{"blkio.throttle.io_service_bytes_recursive"}; v1Host(f) },
			func() Usage { u := all; u.ReadBytes, u.WriteBytes = 1, 2; return u }(),
		},
		"v2":          {v2Host("/"), all},
		"v1_few":      {func(f *fake) { f.mount("pids", "/", "/", false, "pids") }, Usage{PIDs: 3}},
		"v2_few":      {func(f *fake) { f.mount(".", "/", "/", true, "pids") }, Usage{PIDs: 3, CPU: 7 * time.Second}},
		"v2_old":      {func(f *fake) { f.without = []string{"memory.peak"}; v2Host("/")(f) }, func() Usage { u := all; u.PeakBytes = 0; return u }()},
		"nothing_yet": {func(f *fake) { f.without = []string{"pids.current"}; f.mount("pids", "/", "/", false, "pids") }, Usage{}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			g, err := f.open().Create("a", Limits{})
			if err != nil {
				t.Fatal(err)
			}
			got, err := g.Usage()
			if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
			if err = g.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err = g.Usage(); !errors.Is(err, errdef.ErrNotFound) {
				t.Errorf("of a group that is gone: %v", err)
			}
		})
	}
}

func TestUsageOfNonsense(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	v2Host("/")(f)
	g, err := f.open().Create("a", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	f.put(f.cfg.Root+"/tine/a", "memory.events", "oom_kill many\n")
	if u, err := g.Usage(); !errors.Is(err, errdef.ErrInvalid) || u != (Usage{}) {
		t.Errorf("got %v, %v", u, err)
	}
}

// A process that is killed half way leaves parts of groups.
func TestPartOfAGroup(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	v1Host(f)
	h := f.open()
	if err := f.mkdir(filepath.Join(f.cfg.Root, "pids/box/tine/a")); err != nil {
		t.Fatal(err)
	}
	if names, listErr := h.Names(); listErr != nil || !slices.Equal(names, []string{"a"}) {
		t.Errorf("names %v, %v", names, listErr)
	}
	if _, err := h.Create("a", Limits{}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("made again: %v", err)
	}
	g, err := h.Group("a")
	if err != nil {
		t.Fatal(err)
	}
	u, err := g.Usage()
	if err != nil || u.PIDs != 3 || u.MemoryBytes != 0 {
		t.Errorf("usage %v, %v", u, err)
	}
	if _, err = g.Entrances(); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("entrances: %v", err)
	}
	if err = errors.Join(g.Kill(t.Context()), g.Remove(t.Context())); err != nil {
		t.Error(err)
	}
	if names, listErr := h.Names(); listErr != nil || len(names) > 0 {
		t.Errorf("names %v, %v", names, listErr)
	}
}

func TestEntrances(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		host func(*fake)
		want int
	}{"v1": {v1Host, 5}, "v2": {v2Host("/"), 1}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			g, err := f.open().Create("a", Limits{})
			if err != nil {
				t.Fatal(err)
			}
			doors, err := g.Entrances()
			if err != nil || len(doors) != tt.want {
				t.Fatalf("%d, %v; want %d", len(doors), err, tt.want)
			}
			for _, d := range doors {
				if filepath.Base(d.Name()) != "cgroup.procs" {
					t.Errorf("a way into %s", d.Name())
				}
				if err = d.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestKillOfV2(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	v2Host("/")(f)
	g, err := f.open().Create("a", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	f.put(f.cfg.Root+"/tine/a", "cgroup.procs", strconv.Itoa(boxed)+"\n")
	if err = g.Kill(t.Context()); err != nil {
		t.Error(err)
	}
	if got := f.get("tine/a/cgroup.procs"); got != "" {
		t.Errorf("left: %s", got)
	}
}

// What does not end is said to, and nothing is left frozen or forbidden.
func TestKillGivesUp(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		host func(*fake)
		dir  string
		file string
		want string
	}{
		"v1_freezer": {v1Host, "freezer/tine/a", "freezer.state", "THAWED"},
		"v1_pids":    {func(f *fake) { f.mount("pids", "/", "/", false, "pids") }, "pids/tine/a", "pids.max", "12"},
		"v2_freezer": {func(f *fake) { f.without = []string{"cgroup.kill"}; v2Host("/")(f) }, "tine/a", "cgroup.freeze", "0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			g, err := f.open().Create("a", Limits{PIDs: 12})
			if err != nil {
				t.Fatal(err)
			}
			f.put(filepath.Join(f.cfg.Root, tt.dir), "cgroup.procs", "0\n"+strconv.Itoa(boxed)+"\n")
			ctx, cancel := context.WithCancelCause(t.Context())
			cause := errors.New("enough")
			cancel(cause)
			if err = g.Kill(ctx); !errors.Is(err, errdef.ErrConflict) || !errors.Is(err, cause) {
				t.Errorf("kill: %v", err)
			}
			if err = g.Remove(ctx); !errors.Is(err, errdef.ErrConflict) || !errors.Is(err, unix.EBUSY) {
				t.Errorf("remove: %v", err)
			}
			dir := strings.TrimSuffix(tt.dir, "/")
			if got := f.get(dir + "/" + tt.file); got != tt.want {
				t.Errorf("%s is %q, want %q", tt.file, got, tt.want)
			}
			held := func(w string) bool { return strings.HasPrefix(w, tt.file+"=") && w != tt.file+"="+tt.want }
			if !slices.ContainsFunc(f.writes, held) {
				t.Errorf("it was never held: %v", f.writes)
			}
		})
	}
}

func TestWholeDisk(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.file("sys/devices/sda/dev", "8:0\n")
	f.file("sys/devices/sda/sda1/partition", "1\n")
	f.file("sys/devices/sda/sda1/dev", "8:1\n")
	f.file("sys/devices/odd/odd1/partition", "1\n")
	f.file("sys/devices/odd/dev", "what\n")
	f.file("sys/dev/block/README", "")
	for device, to := range map[string]string{"8:0": "sda", "8:1": "sda/sda1", "9:1": "odd/odd1"} {
		if err := os.Symlink("../../devices/"+to, filepath.Join(f.cfg.Sys, "dev/block", device)); err != nil {
			t.Fatal(err)
		}
	}
	for device, want := range map[string]string{"8:0": "8:0", "8:1": "8:0", "9:1": "", "7:7": ""} {
		got, err := wholeDisk(f.cfg.Sys, device)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%s: got %q, %v; want %q", device, got, err, want)
		}
	}
}

func TestNoBlockDevice(t *testing.T) {
	t.Parallel()
	for path, says := range map[string]string{"": "no disk", "/proc": "without a block device", "/nowhere": "no such file"} {
		f := newFake(t)
		v2Host("/")(f)
		f.cfg.Disk = path
		h, err := open(f.cfg, f)
		if err != nil {
			t.Fatal(err)
		}
		if s := h.Support(); s.IO || len(s.Missing) != 1 || !strings.Contains(s.Missing[0], says) {
			t.Errorf("%q: %v", path, s)
		}
		if _, err = h.Create("a", Limits{IOBytes: 1 << 20}); !errors.Is(err, errdef.ErrUnsupported) {
			t.Errorf("%q: %v", path, err)
		}
		g, err := h.Create("a", Limits{PIDs: 3})
		if err != nil {
			t.Fatal(err)
		}
		if u, err := g.Usage(); err != nil || u.ReadBytes != 11 || u.WriteBytes != 22 {
			t.Errorf("%q: without a disk, all are counted: %v, %v", path, u, err)
		}
	}
}
