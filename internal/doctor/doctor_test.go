package doctor

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/vmm"
)

// root makes a tree of files to stand for /proc and /sys.
func root(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestKernelFiles(t *testing.T) {
	t.Parallel()
	const v2 = "0::/user/me\n"
	tests := []struct {
		name  string
		files map[string]string
		run   func(*examiner) func(context.Context) Check
		want  Check
	}{
		{
			"memory",
			map[string]string{"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2097152 kB\n"},
			memory,
			Check{Status: OK, Detail: "2.0 GiB available"},
		},
		{
			"memory_low",
			map[string]string{"proc/meminfo": "MemAvailable: 614400 kB\n"},
			memory,
			Check{Status: Warn, Detail: "600 MiB available", Hint: "ps -e -o rss,pid,comm --sort=-rss | head"},
		},
		{
			"memory_in_cgroup",
			map[string]string{
				"proc/meminfo": "MemAvailable: 2097152 kB\n", "proc/self/cgroup": v2,
				"sys/fs/cgroup/user/me/memory.max": "104857600\n",
			},
			memory,
			Check{
				Status: Fail, Detail: "2.0 GiB available, 100 MiB of them to this cgroup",
				Hint: "ps -e -o rss,pid,comm --sort=-rss | head",
			},
		},
		{
			"memory_unknown",
			map[string]string{"proc/meminfo": "MemAvailable: many kB\n"},
			memory,
			Check{Status: Warn, Detail: "/proc/meminfo says nothing of it", Hint: "free -m"},
		},
		{
			"processes",
			map[string]string{
				"proc/sys/kernel/pid_max": "32768\n", "proc/sys/kernel/threads-max": "192686\n",
				"proc/self/cgroup": v2, "sys/fs/cgroup/user/me/pids.max": "max\n",
			},
			processes,
			Check{Status: OK, Detail: "kernel.pid_max allows 32768"},
		},
		{
			"processes_in_cgroup",
			map[string]string{
				"proc/sys/kernel/pid_max": "32768\n", "proc/self/cgroup": "8:pids:/box\n3:cpuset:/\nodd\n",
				"sys/fs/cgroup/pids/box/pids.max": "300\n",
			},
			processes,
			Check{
				Status: Fail, Detail: "the cgroup's pids.max allows 300",
				Hint: "raise pids.max (TasksMax= in a systemd unit)",
			},
		},
		{"processes_unknown", nil, processes, Check{Status: Warn, Detail: "no limit could be read", Hint: "mount -t proc proc /proc"}},
		{
			"memory_maps",
			map[string]string{"proc/sys/vm/max_map_count": "65530\n"},
			memoryMaps,
			Check{Status: OK, Detail: "65530 for each process"},
		},
		{
			"memory_maps_few",
			map[string]string{"proc/sys/vm/max_map_count": "1000\n"},
			memoryMaps,
			Check{Status: Warn, Detail: "1000 for each process", Hint: "sysctl -w vm.max_map_count=65530"},
		},
		{"user_namespaces", nil, userNamespaces, Check{Status: OK, Detail: "open to this user"}},
		{
			"user_namespaces_off",
			map[string]string{
				"proc/sys/user/max_user_namespaces": "1000\n", "proc/sys/kernel/unprivileged_userns_clone": "0\n",
			},
			userNamespaces,
			Check{
				Status: Warn, Detail: "kernel.unprivileged_userns_clone is 0: images are built by root only",
				Hint: "sysctl -w kernel.unprivileged_userns_clone=1",
			},
		},
		{
			"cgroups_v2",
			map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory pids\n"},
			cgroups,
			Check{Status: OK, Detail: "v2 with cpu, memory, pids"},
		},
		{
			"cgroups_v2_part",
			map[string]string{"sys/fs/cgroup/cgroup.controllers": "cpu pids\n"},
			cgroups,
			Check{Status: Warn, Detail: "v2 without memory", Hint: "boot with cgroup_enable=memory"},
		},
		{
			"cgroups_v1",
			map[string]string{
				"sys/fs/cgroup/cpu/cgroup.procs": "", "sys/fs/cgroup/memory/cgroup.procs": "", "sys/fs/cgroup/pids/cgroup.procs": "",
			},
			cgroups,
			Check{Status: OK, Detail: "v1 with cpu, memory, pids"},
		},
		{
			"cgroups_none", nil, cgroups,
			Check{Status: Warn, Detail: "none mounted: machines cannot be limited", Hint: "mount -t cgroup2 cgroup2 /sys/fs/cgroup"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			x := newExaminer(Config{Root: root(t, tt.files)})
			x.euid = 0
			if strings.HasPrefix(tt.name, "user") {
				x.euid = 1000
			}
			if diff := cmp.Diff(tt.want, tt.run(x)(t.Context())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// These let a row of the table name its check.
func memory(x *examiner) func(context.Context) Check         { return x.memory }
func processes(x *examiner) func(context.Context) Check      { return x.processes }
func memoryMaps(x *examiner) func(context.Context) Check     { return x.memoryMaps }
func userNamespaces(x *examiner) func(context.Context) Check { return x.userNamespaces }
func cgroups(x *examiner) func(context.Context) Check        { return x.cgroups }

func TestDisk(t *testing.T) {
	t.Parallel()
	for free, want := range map[int64]Status{6 << 30: OK, 5 << 30: OK, 5<<30 - 1: Warn, 1 << 30: Warn, 1<<30 - 1: Fail, 0: Fail} {
		if c := diskCheck("/x", free); c.Status != want || (c.Hint == "") != (want == OK) {
			t.Errorf("%d bytes free: %+v, want %s", free, c, want)
		}
	}
}

func TestStateDirectory(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		dir    string
		status Status
		detail string
	}{
		"there":     {dir, OK, dir},
		"to_make":   {dir + "/a/b", OK, dir + "/a/b, to be made"},
		"file":      {file, Fail, "use " + file + ": not a directory"},
		"in_file":   {file + "/a", Fail, "stat " + file + "/a: not a directory"},
		"read_only": {"/proc/sys/tine", Fail, "write to /proc/sys: permission denied"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newExaminer(Config{StateDir: tt.dir}).state(t.Context())
			if c.Status != tt.status || (c.Hint == "") != (tt.status == OK) {
				t.Errorf("got %+v", c)
			}
			if c.Detail != tt.detail && name != "read_only" { // which errno depends on the mount
				t.Errorf("detail %q, want %q", c.Detail, tt.detail)
			}
		})
	}
}

func TestIsolation(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		check  func(vmm.Caps) Check
		caps   vmm.Caps
		status Status
		says   string
	}{
		"no-jail":      {jailCheck, vmm.Caps{JailLacks: []string{"all of it"}}, Warn, "none: all of it"},
		"half-a-jail":  {jailCheck, vmm.Caps{Jail: true, JailLacks: []string{"Landlock", "users"}}, Warn, "it lacks Landlock; users"},
		"jail":         {jailCheck, vmm.Caps{Jail: true}, OK, "Landlock"},
		"no-limits":    {limitsCheck, vmm.Caps{}, Warn, "none on memory, processors, processes, disk bandwidth"},
		"some-limits":  {limitsCheck, vmm.Caps{Limits: vmm.LimitSupport{Memory: true, CPU: true}}, Warn, "none on processes, disk bandwidth"},
		"no-networks":  {networkCheck, vmm.Caps{}, Warn, "no network card"},
		"with-network": {networkCheck, vmm.Caps{Net: true}, OK, "of their own"},
	} {
		if c := tt.check(tt.caps); c.Status != tt.status || !strings.Contains(c.Detail, tt.says) {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

func TestSocketPath(t *testing.T) {
	t.Parallel()
	for n, want := range map[int]Status{maxStateDir: OK, maxStateDir + 1: Fail} {
		c := newExaminer(Config{StateDir: "/" + strings.Repeat("x", n-1)}).socketPath(t.Context())
		if c.Status != want {
			t.Errorf("%d bytes: %+v", n, c)
		}
	}
}

func TestEngines(t *testing.T) {
	t.Parallel()
	kvm := engines.Report{Name: engines.QEMUKVM, Reason: "no vmx", Hint: "buy one", Err: errdef.ErrUnavailable}
	tcg := engines.Report{Name: engines.QEMUTCG, Usable: true, Reason: "always", Version: "7.2"}
	noTCG := engines.Report{Name: engines.QEMUTCG, Reason: "no QEMU", Hint: "install it", Err: errdef.ErrUnavailable}
	tcg.Caps = vmm.Caps{MaxVCPUs: 16, Deterministic: true, Jail: true, Net: true, Limits: vmm.LimitSupport{Memory: true, CPU: true, PIDs: true, IO: true}}
	fire := engines.Report{Name: engines.Firecracker, Reason: "Firecracker 1.9.0 is older than 1.10.0", Hint: "get another", Err: errdef.ErrUnsupported}
	works := engines.Report{
		Name: engines.Firecracker, Usable: true, Reason: "a kernel ran", Version: "1.16.1",
		Caps: vmm.Caps{Hardware: true, MaxVCPUs: 32, Jail: true, Net: true, Limits: tcg.Caps.Limits},
	}
	hardware := engines.Report{Name: engines.QEMUKVM, Usable: true, Reason: "a kernel ran", Version: "7.2", Caps: vmm.Caps{Hardware: true, MaxVCPUs: 16}}
	hardware.Caps.Host = &vmm.Host{CPU: vmm.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC"}, Kernel: "6.1.112"}
	tests := map[string]struct {
		wish    string
		reports []engines.Report
		want    []Check
	}{
		"usual": {"", []engines.Report{fire, kvm, tcg}, []Check{
			{"engine", OK, "auto means qemu-tcg", ""},
			{"jail", OK, "a user, namespaces, a root, a system call filter and Landlock for each machine", ""},
			{"limits", OK, "on memory, processors, processes, disk bandwidth", ""},
			{"network", OK, "machines can have a network card, in a namespace of their own", ""},
			{"engine firecracker", Skip, "Firecracker 1.9.0 is older than 1.10.0", "get another"},
			{"engine qemu-kvm", Warn, "no vmx", "buy one"},
			{"engine qemu-tcg", OK, "7.2: always; guests are emulated, with up to 16 of their own, and deterministically if asked to", ""},
		}},
		"firecracker": {engines.Firecracker, []engines.Report{works, kvm}, []Check{
			{"engine", OK, "firecracker means firecracker", ""},
			{"jail", OK, "a user, namespaces, a root, a system call filter and Landlock for each machine", ""},
			{"limits", OK, "on memory, processors, processes, disk bandwidth", ""},
			{"network", OK, "machines can have a network card, in a namespace of their own", ""},
			{"engine firecracker", OK, "1.16.1: a kernel ran; guests run on the processor, with up to 32 of their own", ""},
			{"engine qemu-kvm", Warn, "no vmx", "buy one"},
		}},
		"none": {"", []engines.Report{kvm, noTCG}, []Check{
			{"engine", Fail, "none can be used", "install it"},
			{"engine qemu-kvm", Warn, "no vmx", "buy one"},
			{"engine qemu-tcg", Warn, "no QEMU", "install it"},
		}},
		"wanted": {engines.QEMUKVM, []engines.Report{kvm, tcg}, []Check{
			{"engine", Fail, "qemu-kvm cannot be used", "buy one"},
			{"engine qemu-kvm", Warn, "no vmx", "buy one"},
			{"engine qemu-tcg", OK, "7.2: always; guests are emulated, with up to 16 of their own, and deterministically if asked to", ""},
		}},
		"hardware": {engines.QEMUTCG, []engines.Report{hardware, noTCG}, []Check{
			{"engine", Fail, "qemu-tcg cannot be used", "install it"},
			{"engine qemu-kvm", OK, "7.2: a kernel ran; guests run on the processor, with up to 16 of their own; its snapshots are for hosts like this one: " +
				"AMD EPYC (AuthenticAMD family 25 model 1 stepping 2), Linux 6.1", ""},
			{"engine qemu-tcg", Warn, "no QEMU", "install it"},
		}},
		"unknown": {"xen", []engines.Report{tcg}, []Check{
			{"engine", Fail, "xen cannot be used", "use --engine auto"},
			{"engine qemu-tcg", OK, "7.2: always; guests are emulated, with up to 16 of their own, and deterministically if asked to", ""},
		}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			survey := func(context.Context) []engines.Report { return tt.reports }
			all := newExaminer(Config{Engine: tt.wish, Engines: survey}).examinations()
			if diff := cmp.Diff(tt.want, all[0].perform(t.Context())); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestTools(t *testing.T) {
	t.Parallel()
	tools := func() []image.ToolStatus {
		return []image.ToolStatus{
			{Name: "mkfs.erofs", Path: "/bin/mkfs.erofs", Package: "erofs-utils", Why: "writes"},
			{Name: "mmdebstrap", Package: "mmdebstrap", Why: "makes", Err: errors.New("not there")},
		}
	}
	want := []Check{
		{"tool mkfs.erofs", OK, "/bin/mkfs.erofs", ""},
		{"tool mmdebstrap", Warn, "missing: makes", "apt-get install mmdebstrap"},
	}
	if diff := cmp.Diff(want, newExaminer(Config{Tools: tools}).tools(t.Context())); diff != "" {
		t.Error(diff)
	}
}

func TestAgent(t *testing.T) {
	t.Parallel()
	text := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]Status{"": Skip, text: Fail, "/no/such/agent": Fail, "/bin/sh": Fail} {
		c := newExaminer(Config{Agent: path}).agent(t.Context())
		if c.Status != want || (c.Hint == "") == (want == Fail) {
			t.Errorf("%q: %+v", path, c)
		}
	}
}

func TestDaemon(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	status := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	stuck := make(chan struct{})
	t.Cleanup(func() { close(stuck) })
	for name, handler := range map[string]http.HandlerFunc{
		"up": status(http.StatusOK), "odd": status(http.StatusTeapot),
		"stuck": func(http.ResponseWriter, *http.Request) { <-stuck },
	} {
		listener, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		srv := &httptest.Server{Listener: listener, Config: &http.Server{Handler: handler}}
		srv.Start()
		t.Cleanup(srv.CloseClientConnections)
	}
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "dead"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	if err = dead.Close(); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]Status{"up": OK, "odd": Fail, "stuck": Fail, "dead": Skip, "none": Skip} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if name == "stuck" {
			cancel()
			ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		}
		c := newExaminer(Config{Socket: filepath.Join(dir, name)}).daemon(ctx)
		cancel()
		if c.Status != want || c.Detail == "" || (c.Hint == "") == (want == Fail) {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// A check that hangs fails within its bound, under its own name.
func TestBound(t *testing.T) {
	t.Parallel()
	never := make(chan struct{})
	t.Cleanup(func() { close(never) })
	e := examination{"slow", time.Millisecond, one(func(context.Context) Check { <-never; return Check{} })}
	want := []Check{{"slow", Fail, "no answer: context deadline exceeded", ""}}
	if diff := cmp.Diff(want, e.perform(t.Context())); diff != "" {
		t.Error(diff)
	}
}

// Without any of what it reads, Run still answers, row for row, in order.
func TestRunOnNothing(t *testing.T) {
	t.Parallel()
	cfg := Config{Root: "/no/such/root", StateDir: t.TempDir(), Tools: func() []image.ToolStatus { return nil }}
	checks := Run(t.Context(), cfg)
	var names []string
	for _, c := range checks {
		names = append(names, c.Name)
		if c.Detail == "" || (c.Status == Fail && c.Hint == "") {
			t.Errorf("got %+v", c)
		}
	}
	want := []string{
		"engine", "agent", "state directory", "socket path", "daemon", "disk", "memory", "open files", "processes",
		"memory maps", "user namespaces", "cgroups", "pidfd", "memfd", "pagemap scan", "userfaultfd",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
	if !Failed(checks) {
		t.Error("a host without /proc passes")
	}
}

// The log of this test shows what doctor says of the host that it runs on.
func TestRunHere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	cfg := Config{StateDir: dir, Engines: func(ctx context.Context) []engines.Report {
		return []engines.Report{{Name: engines.QEMUTCG, Usable: true, Reason: "a fake", Version: "0"}}
	}}
	for _, c := range Run(t.Context(), cfg) {
		t.Logf("%-4s  %s: %s  %s", c.Status, c.Name, c.Detail, c.Hint)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("doctor left %v, %v", entries, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "tine.sock")); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
