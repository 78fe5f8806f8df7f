package jail

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs again as the launcher, which becomes the test binary as
// the hostile program: it tries what its first argument names and prints how it
// went.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(launcherEnv) != "":
		if err := Serve(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case os.Getenv("TINE_TEST_HOSTILE") != "":
		hostile()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// openJail opens a jail for this test binary.
func openJail(t *testing.T, change ...func(*Config)) *Jail {
	t.Helper()
	if err := canJail(); err != nil {
		t.Skipf("NOT TESTED: %v", err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Command: []string{self}, Dir: filepath.Join(t.TempDir(), "jail"), Program: self, UIDs: filepath.Join(t.TempDir(), "uids")}
	for _, f := range change {
		f(&cfg)
	}
	j, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

// canJail says why this host has no way to make namespaces, if it has none.
func canJail() error {
	if os.Geteuid() == 0 {
		return nil
	}
	data, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	if err != nil {
		return fmt.Errorf("not root, and no user namespaces: %w", err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(data))); err != nil || n == 0 {
		return fmt.Errorf("not root, and user namespaces are off: %s", data)
	}
	return nil
}

// run starts the hostile program in a cell and returns what it printed.
func run(t *testing.T, j *Jail, job Job) map[string]string {
	t.Helper()
	cell, err := j.Take(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	return runIn(t, cell, job)
}

func runIn(t *testing.T, cell *Cell, job Job) map[string]string {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	job.Output = w
	job.Env = append(job.Env, "TINE_TEST_HOSTILE=1")
	if job.FileBytes == 0 {
		job.FileBytes = 1 << 20
	}
	p, err := cell.Start(t.Context(), job)
	if err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	out, readErr := io.ReadAll(r)
	waitErr := p.Wait()
	if err := p.Started(); err != nil {
		t.Error(err)
	}
	if readErr != nil || waitErr != nil {
		t.Fatalf("hostile program: %v, %v\n%s", readErr, waitErr, out)
	}
	got := map[string]string{}
	if err := json.Unmarshal(out, &got); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	return got
}

// hostile tries everything, and says how each thing went.
func hostile() {
	got := map[string]string{}
	try := func(name string, do func() error) {
		if err := do(); err != nil {
			got[name] = "failed: " + err.Error()
			return
		}
		got[name] = "WORKED"
	}
	for name, do := range attempts() {
		try(name, do)
	}
	status, err := readStatus()
	got["status"] = fmt.Sprint(status, err)
	got["ids"] = fmt.Sprint(os.Getuid(), os.Geteuid(), os.Getgid(), os.Getpid())
	if path := os.Getenv("TINE_TEST_OPEN"); path != "" {
		got["given"] = openGiven(path)
	}
	_ = json.NewEncoder(os.Stdout).Encode(got)
}

func readStatus() (string, error) {
	nnp, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err != nil {
		return "", err
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return "", err
	}
	return fmt.Sprintf("no_new_privs=%d caps=%x%x", nnp, caps[0].Permitted|caps[0].Inheritable|caps[0].Effective, caps[1].Permitted), nil
}

// openGiven opens a file in the way that QEMU does, and says what it can do.
func openGiven(path string) string {
	fd, err := unix.Open(path, unix.O_RDWR, 0)
	if err != nil {
		return err.Error()
	}
	buf := make([]byte, 64)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return err.Error()
	}
	_, writeErr := unix.Pwrite(fd, []byte("evil"), 0)
	mem, mapErr := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if mapErr == nil {
		mem[0] = 'X'
	}
	_, sharedErr := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	return fmt.Sprintf("read %q; write: %v; private: %v; shared: %v", buf[:n], writeErr, mapErr, sharedErr)
}

// raw makes a system call and says how it went.
func raw(number uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	if _, _, errno := unix.RawSyscall6(number, a[0], a[1], a[2], a[3], a[4], a[5]); errno != 0 {
		return errno
	}
	return nil
}

func attempts() map[string]func() error {
	open := func(path string, flags int) func() error {
		return func() error { _, err := unix.Open(path, flags, 0o600); return err }
	}
	socket := func(domain, kind int) func() error {
		return func() error { _, err := unix.Socket(domain, kind, 0); return err }
	}
	secret := os.Getenv("TINE_TEST_SECRET")
	victim, _ := strconv.Atoi(os.Getenv("TINE_TEST_VICTIM"))
	return map[string]func() error{
		"read-secret":       open(secret, unix.O_RDONLY),
		"read-secret-2":     open(secret, unix.O_RDONLY|unix.O_CLOEXEC),
		"list-state":        open(filepath.Dir(secret), unix.O_RDONLY|unix.O_DIRECTORY),
		"passwd":            open("/etc/passwd", unix.O_RDONLY),
		"proc":              open("/proc/self/status", unix.O_RDONLY),
		"dev-mem":           open("/dev/mem", unix.O_RDWR),
		"dev-kvm":           open("/dev/kvm", unix.O_RDWR),
		"create":            open("/evil", unix.O_CREAT|unix.O_WRONLY),
		"create-tmp":        open("/tmp/evil", unix.O_CREAT|unix.O_WRONLY),
		"dot-dot":           open("/../../etc/passwd", unix.O_RDONLY|unix.O_CLOEXEC),
		"victim-memory":     open(fmt.Sprintf("/proc/%d/mem", victim), unix.O_RDWR),
		"kill-victim":       func() error { return unix.Kill(victim, unix.SIGKILL) },
		"kill-all":          func() error { return unix.Kill(-1, unix.SIGKILL) },
		"ptrace":            func() error { return raw(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(victim)) },
		"process-vm":        func() error { return raw(unix.SYS_PROCESS_VM_READV, uintptr(victim)) },
		"inet":              socket(unix.AF_INET, unix.SOCK_STREAM),
		"inet6":             socket(unix.AF_INET6, unix.SOCK_DGRAM),
		"unix":              socket(unix.AF_UNIX, unix.SOCK_STREAM),
		"netlink":           socket(unix.AF_NETLINK, unix.SOCK_RAW),
		"packet":            socket(unix.AF_PACKET, unix.SOCK_RAW),
		"vsock":             socket(unix.AF_VSOCK, unix.SOCK_STREAM),
		"mount-tmpfs":       func() error { return unix.Mount("x", "/", "tmpfs", 0, "") },
		"mount-proc":        func() error { return unix.Mount("proc", "/", "proc", 0, "") },
		"remount":           func() error { return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND, "") },
		"unmount":           func() error { return unix.Unmount("/", unix.MNT_DETACH) },
		"chroot":            func() error { return unix.Chroot("/") },
		"unshare-user":      func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWUSER) },
		"unshare-net":       func() error { return raw(unix.SYS_UNSHARE, unix.CLONE_NEWNET) },
		"clone-user":        func() error { return raw(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD)) },
		"fork":              func() error { return raw(unix.SYS_FORK) },
		"vfork":             func() error { return raw(unix.SYS_FORK) },
		"clone-process":     func() error { return raw(unix.SYS_CLONE, uintptr(unix.SIGCHLD)) },
		"clone3":            func() error { return raw(435) },
		"execve":            func() error { return unix.Exec("/proc/self/exe", []string{"x"}, nil) },
		"setuid-0":          func() error { return raw(unix.SYS_SETRESUID, 1, 1, 1) },
		"raise-nofile":      func() error { return setLimit(unix.RLIMIT_NOFILE, 1<<20) },
		"raise-fsize":       func() error { return setLimit(unix.RLIMIT_FSIZE, 1<<40) },
		"bpf":               func() error { return raw(unix.SYS_BPF) },
		"userfaultfd":       func() error { return raw(unix.SYS_USERFAULTFD, 0) },
		"io-uring":          func() error { return raw(unix.SYS_IO_URING_SETUP, 1) },
		"perf":              func() error { return raw(unix.SYS_PERF_EVENT_OPEN) },
		"keyctl":            func() error { return raw(unix.SYS_KEYCTL, 0) },
		"x32-getpid":        func() error { return raw(x32 | unix.SYS_GETPID) },
		"set-time":          func() error { return raw(unix.SYS_CLOCK_SETTIME, 0) },
		"hostname":          func() error { return unix.Sethostname([]byte("evil")) },
		"reboot":            func() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) },
		"open-by-handle":    func() error { return raw(unix.SYS_OPEN_BY_HANDLE_AT) },
		"mknod":             func() error { return unix.Mknod("/evil", unix.S_IFBLK|0o600, 259) },
		"connect-to-daemon": func() error { return connectAbstract(os.Getenv("TINE_TEST_ABSTRACT")) },
	}
}

func setLimit(resource int, most uint64) error {
	return unix.Prlimit(0, resource, &unix.Rlimit{Cur: most, Max: most}, nil)
}

func connectAbstract(name string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrUnix{Name: "@" + name})
}

// A program in the jail can do nothing of what a monitor that was taken over
// would try.
func TestHostile(t *testing.T) {
	j := openJail(t)
	secret := filepath.Join(t.TempDir(), "tokens.json")
	if err := os.WriteFile(secret, []byte("token"), 0o644); err != nil { // even one that all may read
		t.Fatal(err)
	}
	got := run(t, j, Job{Name: "hostile", Env: []string{
		"TINE_TEST_SECRET=" + secret, "TINE_TEST_VICTIM=" + strconv.Itoa(os.Getpid()), "TINE_TEST_ABSTRACT=tine-test",
	}})
	for name := range attempts() {
		if result, ok := got[name]; !ok || !strings.HasPrefix(result, "failed: ") {
			t.Errorf("%s: %q", name, result)
		}
	}
	if want := "no_new_privs=1 caps=00<nil>"; got["status"] != want {
		t.Errorf("status %q, want %q", got["status"], want)
	}
	if want := "0 0 0 1"; j.level.UserNamespace && got["ids"] != want {
		t.Errorf("uid, euid, gid, pid: %q, want %q", got["ids"], want)
	}
}

// A file that is opened by its name comes with the rights that we give.
func TestGivenFileOnlyReads(t *testing.T) {
	j := openJail(t)
	image := filepath.Join(t.TempDir(), "memory")
	if err := os.WriteFile(image, []byte("frozen"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	got := run(t, j, Job{Name: "given", Env: []string{"TINE_TEST_OPEN=" + image}, Opens: map[string]*os.File{image: f}})
	want := `read "frozen"; write: bad file descriptor; private: <nil>; shared: permission denied`
	if got["given"] != want {
		t.Errorf("got  %s\nwant %s", got["given"], want)
	}
	if data, err := os.ReadFile(image); err != nil || string(data) != "frozen" {
		t.Errorf("image is %q now, %v", data, err)
	}
}

func BenchmarkTakeAndStart(b *testing.B) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	j, err := Open(b.Context(), Config{Command: []string{self}, Dir: filepath.Join(b.TempDir(), "jail"), Program: self, UIDs: filepath.Join(b.TempDir(), "uids")})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = j.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	var take, start time.Duration
	for b.Loop() {
		begin := time.Now()
		cell, err := j.Take(context.Background(), false)
		if err != nil {
			b.Fatal(err)
		}
		take += time.Since(begin)
		begin = time.Now()
		p, err := cell.Start(context.Background(), Job{Name: "bench", Output: null, Args: []string{"-test.run=^$"}, FileBytes: 1 << 20})
		if err != nil {
			b.Fatal(err)
		}
		start += time.Since(begin)
		_ = p.Kill()
		_ = p.Wait()
		_ = p.Started()
	}
	b.ReportMetric(float64(take.Microseconds())/1000/float64(b.N), "ms-take/op")
	b.ReportMetric(float64(start.Microseconds())/1000/float64(b.N), "ms-start/op")
}
