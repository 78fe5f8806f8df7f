package cgroup

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestSetTotal(t *testing.T) {
	t.Parallel()
	const none = "9223372036854771712"
	tests := map[string]struct {
		host  func(*fake)
		l     Limits
		want  map[string]string
		after map[string]string // when all limits are taken back
	}{
		"v1": {
			v1Host,
			Limits{MemoryBytes: 64 << 20, CPUMillis: 1500, PIDs: 100},
			map[string]string{
				"memory/box/tine/memory.limit_in_bytes": "67108864", "memory/box/tine/memory.memsw.limit_in_bytes": "67108864",
				"memory/box/tine/memory.use_hierarchy": "1", "memory/box/memory.use_hierarchy": "0",
				"cpu,cpuacct/tine/cpu.cfs_quota_us": "150000", "pids/box/tine/pids.max": "100",
				"memory/box/memory.limit_in_bytes": none, "memory/box/tine/a/memory.limit_in_bytes": "33554432", "pids/box/tine/a/pids.max": "7",
			},
			map[string]string{
				"memory/box/tine/memory.limit_in_bytes": none, "memory/box/tine/memory.memsw.limit_in_bytes": none,
				"cpu,cpuacct/tine/cpu.cfs_quota_us": "-1", "pids/box/tine/pids.max": "max", "pids/box/tine/a/pids.max": "7",
			},
		},
		"v2": {
			v2Host("/me"),
			Limits{MemoryBytes: 64 << 20, CPUMillis: 1500, PIDs: 100, IOBytes: 1 << 20},
			map[string]string{
				"me/tine/memory.max": "67108864", "me/tine/memory.swap.max": "0", "me/tine/cpu.max": "150000 100000",
				"me/tine/pids.max": "100", "me/tine/io.max": "8:0 rbps=1048576 wbps=1048576",
				"me/memory.max": "max", "me/tine/a/memory.max": "33554432", "me/tine/a/pids.max": "7",
			},
			map[string]string{
				"me/tine/memory.max": "max", "me/tine/memory.swap.max": "max", "me/tine/cpu.max": "max 100000",
				"me/tine/pids.max": "max", "me/tine/io.max": "8:0 rbps=max wbps=max", "me/tine/a/pids.max": "7",
			},
		},
		"v2_root": {
			v2Host("/"),
			Limits{PIDs: 100},
			map[string]string{"tine/pids.max": "100", "tine/memory.max": "max"},
			map[string]string{"tine/pids.max": "max"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			h := f.open()
			g, err := h.Create("a", Limits{MemoryBytes: 32 << 20, PIDs: 7})
			if err != nil {
				t.Fatal(err)
			}
			if err = h.SetTotal(tt.l); err != nil {
				t.Fatal(err)
			}
			f.has("set", tt.want)
			// A process that shares the parent removes it, which nobody notices.
			if err = errors.Join(g.Remove(t.Context()), f.open().Close()); err != nil {
				t.Fatal(err)
			}
			if _, err = h.Create("a", Limits{MemoryBytes: 32 << 20, PIDs: 7}); err != nil {
				t.Fatal(err)
			}
			f.has("made again", tt.want)
			if err = h.SetTotal(Limits{}); err != nil {
				t.Fatal(err)
			}
			f.has("taken back", tt.after)
		})
	}
}

func (f *fake) has(when string, want map[string]string) {
	f.t.Helper()
	for file, text := range want {
		if got := f.get(file); got != text {
			f.t.Errorf("%s: %s: %q, want %q", when, file, got, text)
		}
	}
}

func TestSetTotalWithoutParent(t *testing.T) {
	t.Parallel()
	for name, host := range map[string]func(*fake){"v1": v1Host, "v2": v2Host("/me")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			host(f)
			h := f.open()
			if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			if u, err := h.Total(); err != nil || u != (Usage{}) {
				t.Errorf("of nothing: %+v, %v", u, err)
			}
			if err := h.SetTotal(Limits{PIDs: 3}); err != nil {
				t.Fatal(err)
			}
			got := map[string]string{"v1": "pids/box/tine/pids.max", "v2": "me/tine/pids.max"}[name]
			f.has("set", map[string]string{got: "3"})
		})
	}
}

func TestSetTotalRefuses(t *testing.T) {
	t.Parallel()
	few := func(f *fake) { f.mount("memory", "/", "/", false, "memory") }
	tests := map[string]struct {
		host   func(*fake)
		refuse string
		err    error
		l      Limits
		want   error
		says   string
	}{
		"bad":         {v1Host, "", nil, Limits{PIDs: -1}, errdef.ErrInvalid, "PIDs"},
		"unsupported": {few, "", nil, Limits{PIDs: 1}, errdef.ErrUnsupported, "not mounted of all groups"},
		"io_of_v1":    {v1Host, "", nil, Limits{IOBytes: 1 << 20}, errdef.ErrUnsupported, "bounds each group alone"},
		"in_use":      {v1Host, "memory/box/tine/memory.limit_in_bytes", unix.EBUSY, Limits{MemoryBytes: 1 << 20}, errdef.ErrConflict, "limit memory of group tine"},
		"quota":       {v1Host, "cpu,cpuacct/tine/cpu.cfs_quota_us", unix.EINVAL, Limits{CPUMillis: 10}, errdef.ErrInvalid, "limit cpu of group tine"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			h := f.open()
			if tt.refuse != "" {
				f.refuse[filepath.Join(f.cfg.Root, tt.refuse)] = tt.err
			}
			if err := h.SetTotal(tt.l); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want %v: %s", err, tt.want, tt.says)
			}
			if h.total != (Limits{}) {
				t.Errorf("it is remembered: %+v", h.total)
			}
		})
	}
}

// A parent that has groups cannot be told any more to count their memory.
func TestSetTotalTooLate(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	v1Host(f)
	for _, dir := range []string{"tine", "tine/old"} {
		if err := f.mkdir(filepath.Join(f.cfg.Root, "memory/box", dir)); err != nil {
			t.Fatal(err)
		}
	}
	h := f.open()
	if err := h.SetTotal(Limits{MemoryBytes: 1 << 30}); !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
		t.Errorf("memory: %v (hint: %s)", err, errdef.Hint(err))
	}
	if err := h.SetTotal(Limits{PIDs: 5}); err != nil {
		t.Errorf("processes: %v", err)
	}
	old, err := h.Group("old")
	if err != nil {
		t.Fatal(err)
	}
	if err = errors.Join(old.Remove(t.Context()), h.SetTotal(Limits{MemoryBytes: 1 << 30})); err != nil {
		t.Errorf("when it is gone: %v", err)
	}
	f.has("after all", map[string]string{"memory/box/tine/memory.use_hierarchy": "1"})
}

func TestSetTotalWithoutAChoice(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	f.without = []string{summed}
	v1Host(f)
	if err := f.open().SetTotal(Limits{MemoryBytes: 1 << 30}); err != nil {
		t.Error(err)
	}
}

func TestTotal(t *testing.T) {
	t.Parallel()
	want := Usage{
		MemoryBytes: 500, PrivateBytes: 60, SharedBytes: 30, PeakBytes: 200, CPU: 8 * time.Second,
		Throttled: 5 * time.Millisecond, PIDs: 44, OOMKills: 1, ReadBytes: 10, WriteBytes: 20,
	}
	for name, tt := range map[string]struct {
		host  func(*fake)
		files map[string]string
	}{
		"v1": {v1Host, map[string]string{"memory/box/tine/memory.usage_in_bytes": "500\n", "pids/box/tine/pids.current": "44\n"}},
		"v2": {v2Host("/me"), map[string]string{"me/tine/memory.current": "500\n", "me/tine/pids.current": "44\n"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFake(t)
			tt.host(f)
			h := f.open()
			for file, text := range tt.files {
				f.put(filepath.Join(f.cfg.Root, filepath.Dir(file)), filepath.Base(file), text)
			}
			got, err := h.Total()
			if diff := cmp.Diff(want, got); err != nil || diff != "" {
				t.Errorf("%v\n%s", err, diff)
			}
		})
	}
}
