package jail

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/cgroup"
)

// The test binary runs again as the launcher, which becomes the test binary as
// the program in the jail: what that does, a variable of its environment says.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv(launcherEnv) != "":
		launch(os.Args[1:])
		os.Exit(0)
	case os.Getenv(adoptEnv) != "":
		if err := adopt(os.Getenv(adoptEnv)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	case os.Getenv(hostileEnv) != "":
		hostile(os.Getenv(hostileEnv))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

const hostileEnv = "TINE_TEST_HOSTILE"

// launch is a launcher, or one that an argument has made a bad one.
func launch(args []string) {
	serve := Serve
	if len(args) > 0 {
		serve = badLauncher(args[0])
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
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

// prisoner is a program in the jail. It has said something, and now waits.
type prisoner struct {
	*Process
	said    map[string]string
	output  *bufio.Reader // what it has yet to say
	release *os.File      // the program ends when this closes
}

// startIn starts the program of this test in a cell, as one that does what role
// says, and waits until it has done so.
func startIn(t *testing.T, cell *Cell, role string, job Job) *prisoner {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	hold, release, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	job.Output, job.Files = w, append([]*os.File{hold}, job.Files...)
	job.Env = append(job.Env, hostileEnv+"="+role)
	if job.FileBytes == 0 {
		job.FileBytes = 1 << 20
	}
	p, err := cell.Start(t.Context(), job)
	if err = errors.Join(err, w.Close(), hold.Close()); err != nil {
		t.Fatal(err)
	}
	pr := &prisoner{Process: p, output: bufio.NewReader(r), release: release}
	t.Cleanup(func() {
		_ = pr.Kill() // it may have ended
		_ = pr.Wait()
		if err := errors.Join(pr.Started(), r.Close()); err != nil {
			t.Error(err)
		}
		_ = release.Close()
		if _, err := Release(t.Context(), p.Group); err != nil {
			t.Error(err)
		}
	})
	pr.said = readResults(t, pr.output)
	return pr
}

// readResults reads up to the line of results. In front of it may be complaints
// of the race detector, which finds no files here.
func readResults(t *testing.T, r *bufio.Reader) map[string]string {
	t.Helper()
	var all strings.Builder
	for {
		line, err := r.ReadString('\n')
		all.WriteString(line)
		if err != nil {
			t.Fatalf("program: %v\n%s", err, all.String())
		}
		got := map[string]string{}
		if strings.HasPrefix(line, "{") && json.Unmarshal([]byte(line), &got) == nil {
			return got
		}
	}
}

// end lets the program end.
func (p *prisoner) end(t *testing.T) {
	t.Helper()
	if err := errors.Join(p.release.Close(), p.Wait(), p.Started()); err != nil {
		t.Error(err)
	}
}

func take(t *testing.T, j *Jail) *Cell {
	t.Helper()
	cell, err := j.Take(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	return cell
}

// hostile is the program in the jail. It uses no file of Go's, so as to have no
// descriptors but those that it was given.
func hostile(role string) {
	got := map[string]string{}
	switch role {
	case "try":
		tryAll(got)
	case "idle":
	case "threads":
		say(got)
		for { // until there are no more threads
			go func() { runtime.LockOSThread(); _ = unix.Pause() }()
		}
	case "eat":
		say(got)
		for { // until there is no more memory
			mem, _ := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			for i := 0; i < len(mem); i += 4096 {
				mem[i] = 1
			}
		}
	default:
		ownRole(role, got)
	}
	say(got)
	_, _ = unix.Read(FirstFile, make([]byte, 1))
	_ = raw(unix.SYS_EXIT_GROUP, 0) // at once, which the race detector would not
}

func say(got map[string]string) {
	line, _ := json.Marshal(got)
	_, _ = unix.Write(1, append(line, '\n'))
}

// tryAll tries everything, and says how each thing went.
func tryAll(got map[string]string) {
	got["environment"] = strings.Join(os.Environ(), "\n")
	got["umask"] = fmt.Sprintf("%03o", unix.Umask(0))
	cwd, err := os.Getwd()
	got["directory"] = fmt.Sprint(cwd, err)
	sid, err := unix.Getsid(0)
	got["session"] = fmt.Sprint(sid, err)
	status, err := readStatus()
	got["status"] = fmt.Sprint(status, err)
	got["ids"] = fmt.Sprint(os.Getuid(), os.Geteuid(), os.Getgid(), os.Getpid())
	if path := os.Getenv("TINE_TEST_OPEN"); path != "" {
		got["given"] = openGiven(path)
	}
	for name, do := range attempts() {
		got[name] = "WORKED"
		if err := do(); err != nil {
			got[name] = "failed: " + err.Error()
		}
	}
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
		"ptrace-first":      func() error { return raw(unix.SYS_PTRACE, unix.PTRACE_SEIZE, 1) },
		"read-victim":       func() error { return vmRead(victim) },
		"read-first":        func() error { return vmRead(1) },
		"pidfd":             func() error { _, err := unix.PidfdOpen(victim, 0); return err },
		"priority":          func() error { return unix.Setpriority(unix.PRIO_PROCESS, victim, 19) },
		"limit-victim":      func() error { return unix.Prlimit(victim, unix.RLIMIT_NOFILE, nil, &unix.Rlimit{}) },
		"affinity":          func() error { return unix.SchedSetaffinity(victim, &unix.CPUSet{1}) },
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
		"send-to-daemon":    func() error { return sendAbstract(os.Getenv("TINE_TEST_ABSTRACT")) },
		"raw-io":            func() error { return raw(unix.SYS_IOPL, 3) },
		"ambient":           func() error { return unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, 0, 0, 0) },
		"keep-caps":         func() error { return unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0) },
		"secure-bits":       func() error { return unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0) },
		"bound":             func() error { return unix.Prctl(unix.PR_CAPBSET_DROP, 0, 0, 0, 0) },
		"write-lease":       func() error { _, err := unix.Write(FirstFile+1, []byte("x")); return err },
		"truncate-lease":    func() error { return unix.Ftruncate(FirstFile+1, 1<<20) },
		"lock-pages":        func() error { return unix.Mlock(make([]byte, 1<<20)) },
		"real-time": func() error {
			return unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
		},
	}
}

func vmRead(pid int) error {
	buf := make([]byte, 8)
	local := []unix.Iovec{{Base: &buf[0], Len: 8}}
	_, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: 0x400000, Len: 8}}, 0)
	return err
}

// sendAbstract needs neither socket nor connect.
func sendAbstract(name string) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer closeAll(fds[:])
	return unix.Sendto(fds[0], []byte("evil"), 0, &unix.SockaddrUnix{Name: "@" + name + "-datagrams"})
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

// modes runs a test in a jail with user namespaces and, as root, in one without.
// That there are none where the kernel has them would be a jail that is less than
// it says.
func modes(t *testing.T, test func(t *testing.T, j *Jail), change ...func(*Config)) {
	t.Run("user-namespace", func(t *testing.T) {
		t.Parallel()
		j := openJail(t, change...)
		if canUserNamespace() && !j.level.UserNamespace {
			t.Fatalf("no user namespace: %v", j.level.Missing)
		}
		if j.level.Landlock != landlockVersion() || j.level.OwnUser != (os.Geteuid() == 0) {
			t.Errorf("level is %+v", j.level)
		}
		test(t, j)
	})
	t.Run("plain", func(t *testing.T) {
		t.Parallel()
		if os.Geteuid() != 0 {
			t.Skip("NOT TESTED: not root")
		}
		j := openJail(t, change...)
		j.level.UserNamespace = false
		test(t, j)
	})
}

func canUserNamespace() bool {
	data, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	n, convErr := strconv.Atoi(strings.TrimSpace(string(data)))
	return err == nil && convErr == nil && n > 0
}

// A program in the jail can do nothing of what a monitor that was taken over
// would try.
func TestHostile(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, j *Jail) {
		secret := filepath.Join(t.TempDir(), "tokens.json")
		if err := os.WriteFile(secret, []byte("token"), 0o644); err != nil { // even one that all may read
			t.Fatal(err)
		}
		abstract := listenAbstract(t)
		victim := startIn(t, take(t, j), "idle", Job{})
		env := []string{"TINE_TEST_SECRET=" + secret, "TINE_TEST_VICTIM=" + strconv.Itoa(victim.PID()), "TINE_TEST_ABSTRACT=" + abstract}
		p := startIn(t, take(t, j), "try", Job{Env: env})
		for name := range attempts() {
			if result, ok := p.said[name]; !ok || !strings.HasPrefix(result, "failed: ") {
				t.Errorf("%s: %q", name, result)
			}
		}
		uid := hostUID(t, p.PID())
		inside := uid
		if j.level.UserNamespace {
			inside = 0
		}
		want := map[string]string{
			"environment": strings.Join(append(env, hostileEnv+"=try"), "\n"),
			"umask":       "077", "directory": "/<nil>", "session": "1 <nil>",
			"status": "no_new_privs=1 caps=00<nil>",
			"ids":    fmt.Sprint(inside, inside, inside, 1),
		}
		for name := range want {
			if got := p.said[name]; got != want[name] {
				t.Errorf("%s is %q, want %q", name, got, want[name])
			}
		}
		checkApart(t, j, p, victim)
		p.end(t)
		victim.end(t) // it was not harmed
	})
}

// listenAbstract makes sockets that all of this network namespace can reach.
func listenAbstract(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("%s-%d", strings.ReplaceAll(t.Name(), "/", "-"), os.Getpid())
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "unix", "@"+name)
	if err != nil {
		t.Fatal(err)
	}
	datagrams, err := lc.ListenPacket(t.Context(), "unixgram", "@"+name+"-datagrams")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(ln.Close(), datagrams.Close()) })
	return name
}

// checkApart looks from outside at two programs of one jail.
func checkApart(t *testing.T, j *Jail, a, b *prisoner) {
	t.Helper()
	self := os.Getpid()
	names := []string{"mnt", "pid", "net", "ipc", "uts", "cgroup"}
	if j.level.UserNamespace {
		names = append(names, "user")
	}
	for _, name := range names {
		seen := map[string]bool{}
		for _, pid := range []int{self, a.PID(), b.PID()} {
			ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
			if err != nil {
				t.Fatal(err)
			}
			seen[ns] = true
		}
		if len(seen) != 3 {
			t.Errorf("namespaces %s of this process and two programs: %v", name, seen)
		}
	}
	for _, p := range []*prisoner{a, b} {
		status := procStatus(t, p.PID())
		for field, want := range map[string]string{
			"CapInh": noCaps, "CapPrm": noCaps, "CapEff": noCaps, "CapBnd": noCaps, "CapAmb": noCaps,
			"Seccomp": "2", "NoNewPrivs": "1", "Groups": "",
		} {
			if got := status[field]; got != want && (field != "Groups" || j.level.OwnUser) {
				t.Errorf("%s of a program is %q, want %q", field, got, want)
			}
		}
		checkFiles(t, j, p)
	}
	if !j.level.OwnUser {
		return
	}
	uids := []int{hostUID(t, a.PID()), hostUID(t, b.PID())}
	if uids[0] == uids[1] {
		t.Errorf("both programs are user %d", uids[0])
	}
	for _, uid := range uids {
		if uid < firstUID || uid >= firstUID+countUIDs {
			t.Errorf("program is user %d", uid)
		}
	}
}

const noCaps = "0000000000000000"

func procStatus(t *testing.T, pid int) map[string]string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	return fields
}

// hostUID is the user that a program is to the host, in every way.
func hostUID(t *testing.T, pid int) int {
	t.Helper()
	status := procStatus(t, pid)
	ids := strings.Fields(status["Uid"] + " " + status["Gid"])
	for _, id := range ids {
		if id != ids[0] {
			t.Errorf("user and group ids of a program: %v", ids)
		}
	}
	uid, err := strconv.Atoi(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	return uid
}

// checkFiles: a program has what it was given and, as its last file, the lease of
// its user id.
func checkFiles(t *testing.T, j *Jail, p *prisoner) {
	t.Helper()
	want := map[string]string{"0": os.DevNull, "1": "pipe", "2": "pipe", strconv.Itoa(FirstFile): "pipe"}
	if j.level.OwnUser {
		want[strconv.Itoa(FirstFile+1)] = filepath.Join(j.cfg.UIDs, strconv.Itoa(hostUID(t, p.PID())))
	}
	dir := fmt.Sprintf("/proc/%d/fd", p.PID())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		target, _, _ = strings.Cut(target, ":")
		got[e.Name()] = target
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("files of a program (-want +got):\n%s", diff)
	}
}

// A file that is opened by its name comes with the rights that we give.
func TestGivenFileOnlyReads(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, j *Jail) {
		image := filepath.Join(t.TempDir(), "memory")
		if err := os.WriteFile(image, []byte("frozen"), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(image)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		p := startIn(t, take(t, j), "try", Job{
			Env:   []string{"TINE_TEST_OPEN=" + image, "TINE_TEST_VICTIM=" + strconv.Itoa(os.Getpid())},
			Opens: map[string]*os.File{image: f},
		})
		want := `read "frozen"; write: bad file descriptor; private: <nil>; shared: permission denied`
		if p.said["given"] != want {
			t.Errorf("got  %s\nwant %s", p.said["given"], want)
		}
		p.end(t)
		if data, err := os.ReadFile(image); err != nil || string(data) != "frozen" {
			t.Errorf("image is %q now, %v", data, err)
		}
	})
}

// withGroups gives a jail a parent of control groups of the test's own, if this
// user may make one.
func withGroups(t *testing.T) func(*Config) {
	t.Helper()
	h, err := cgroup.Open(cgroup.Config{Name: fmt.Sprintf("tine-jail-%d-%s", os.Getpid(), t.Name())})
	if err != nil {
		if os.Geteuid() == 0 {
			t.Logf("NOT TESTED, control groups: %v", err)
		}
		return func(c *Config) { c.NoGroups = err }
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return func(c *Config) { c.Groups = h }
}

// What a program takes too much of, it lacks itself, and nobody else does.
func TestBombs(t *testing.T) {
	t.Parallel()
	j := openJail(t, withGroups(t))
	if j.cfg.Groups == nil {
		t.Skipf("NOT TESTED: %v", j.cfg.NoGroups)
	}
	h := j.cfg.Groups
	bystander := startIn(t, take(t, j), "idle", Job{})
	t.Run("threads", func(t *testing.T) {
		if !h.Support().PIDs {
			t.Skipf("NOT TESTED: %v", h.Support().Missing)
		}
		p := startIn(t, take(t, j), "threads", Job{Env: []string{"GOTRACEBACK=none"}, Limits: cgroup.Limits{PIDs: 40}})
		out, err := io.ReadAll(p.output)
		waitErr := p.Wait()
		// EAGAIN, from Go's runtime or from C's.
		again := strings.Contains(string(out), "errno=11") || strings.Contains(string(out), "Resource temporarily unavailable")
		if err != nil || waitErr == nil || !again {
			t.Errorf("program with as many threads as it likes: %v, %v\n%s", err, waitErr, out)
		}
		startIn(t, take(t, j), "idle", Job{}).end(t)
	})
	t.Run("memory", func(t *testing.T) {
		if !h.Support().Memory {
			t.Skipf("NOT TESTED: %v", h.Support().Missing)
		}
		p := startIn(t, take(t, j), "eat", Job{Limits: cgroup.Limits{MemoryBytes: 128 << 20}})
		err := p.Wait()
		kills, releaseErr := Release(t.Context(), p.Group)
		if err == nil || releaseErr != nil || kills < 1 {
			t.Errorf("program with as much memory as it likes: %v; %d kills, %v", err, kills, releaseErr)
		}
	})
	bystander.end(t)
}

func BenchmarkTakeAndStart(b *testing.B) {
	for _, own := range []bool{false, true} {
		for _, link := range []bool{false, true} {
			b.Run(fmt.Sprintf("own-%t-link-%t", own, link), func(b *testing.B) { takeAndStart(b, own, link) })
		}
	}
}

func takeAndStart(b *testing.B, own, link bool) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	j, err := Open(b.Context(), Config{
		Command: []string{self}, Dir: filepath.Join(b.TempDir(), "jail"), Program: self, UIDs: filepath.Join(b.TempDir(), "uids"), OwnFiles: own,
	})
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
		cell, err := j.Take(b.Context(), link)
		if err != nil {
			b.Fatal(err)
		}
		take += time.Since(begin)
		begin = time.Now()
		p, err := cell.Start(b.Context(), Job{Output: null, Args: []string{"-test.run=^$"}, FileBytes: 1 << 20})
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
