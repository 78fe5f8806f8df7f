package guestmem

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/linux"
)

// The test binary runs again as a machine, which is a process that maps an
// image privately and writes to it, or as the helper of a Freezer.
const (
	roleEnv  = "TINE_TEST_GUESTMEM"
	imageEnv = "TINE_TEST_GUESTMEM_IMAGE"

	roleMachine  = "machine"
	roleFiltered = "filtered"    // a machine that may not fork
	roleHelper   = "helper"      // ServeTwin
	roleWeak     = "weak-helper" // one that may not suspend filters
)

func TestMain(m *testing.M) {
	role := os.Getenv(roleEnv)
	if len(os.Args) > 1 && (os.Args[1] == roleHelper || os.Args[1] == roleWeak) {
		role = os.Args[1]
	}
	if role == "" {
		// Else every helper of a race build waits a second before it ends.
		if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
			panic(err)
		}
		os.Exit(m.Run())
	}
	if err := play(role); err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func play(role string) error {
	switch role {
	case roleWeak:
		if err := dropSysAdmin(); err != nil {
			return err
		}
		fallthrough
	case roleHelper:
		return ServeTwin(os.Stdin, os.Stdout)
	default:
		return playMachine(os.Getenv(imageEnv), role == roleFiltered)
	}
}

// dropSysAdmin takes the right to suspend filters from all threads to come.
func dropSysAdmin() error {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return err
	}
	for _, set := range []*uint32{&caps[0].Effective, &caps[0].Permitted, &caps[0].Inheritable} {
		*set &^= 1 << unix.CAP_SYS_ADMIN
	}
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return err
	}
	// Other threads are there already: only a new program has these rights in
	// all of them, and root would get the others back without the bounding set.
	if err := unix.Prctl(unix.PR_CAPBSET_DROP, unix.CAP_SYS_ADMIN, 0, 0, 0); err != nil && !errors.Is(err, unix.EPERM) {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	return unix.Exec(exe, []string{exe, roleHelper}, os.Environ())
}

// machine is the far side of the tests' child.
type machine struct {
	mem     []byte
	stop    atomic.Bool
	writers sync.WaitGroup
	bad     atomic.Pointer[string]
}

func playMachine(path string, filtered bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	m := &machine{}
	if m.mem, err = unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE); err != nil {
		return err
	}
	if err := unix.Madvise(m.mem, unix.MADV_DONTFORK); err != nil { // as QEMU has it
		return err
	}
	if filtered {
		if err := denyFork(); err != nil {
			return err
		}
	}
	go m.serve()
	return m.mainThread()
}

// mainThread is what the injector borrows: it sleeps, polls and computes, and
// notices when one of them goes wrong.
func (m *machine) mainThread() error {
	runtime.LockOSThread()
	want, thread := spinHash(1000), unix.Gettid()
	for {
		start := time.Now()
		ts := unix.NsecToTimespec(int64(300 * time.Microsecond))
		if err := unix.Nanosleep(&ts, nil); err == nil && time.Since(start) < 300*time.Microsecond {
			return m.fail("slept for %v", time.Since(start))
		} else if err != nil && !errors.Is(err, unix.EINTR) {
			return m.fail("sleep: %v", err)
		}
		start = time.Now()
		ts = unix.NsecToTimespec(int64(300 * time.Microsecond))
		var mask uint64 // nothing is blocked meanwhile
		n, _, errno := unix.Syscall6(unix.SYS_PPOLL, 0, 0, uintptr(unsafe.Pointer(&ts)), uintptr(unsafe.Pointer(&mask)), unsafe.Sizeof(mask), 0)
		if errno == 0 && (n != 0 || time.Since(start) < 300*time.Microsecond) || errno != 0 && errno != unix.EINTR {
			return m.fail("polled for %v: %d, %v", time.Since(start), n, errno)
		}
		for range 10 {
			if got := spinHash(1000); got != want {
				return m.fail("computed %x, want %x", got, want)
			}
		}
		if tid := unix.Gettid(); tid != thread {
			return m.fail("the thread was %d and is %d", thread, tid)
		}
	}
}

func (m *machine) fail(format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	m.bad.Store(&text)
	select {}
}

func spinHash(n int) uint64 {
	x := uint64(88172645463325252)
	for range n {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
	}
	return x
}

// serve obeys lines from the test, and ends with it.
func (m *machine) serve() {
	in := bufio.NewScanner(os.Stdin)
	fmt.Println("ready")
	for in.Scan() {
		verb, rest, _ := strings.Cut(in.Text(), " ")
		switch verb {
		case "dirty": // pages
			for field := range strings.FieldsSeq(rest) {
				page, err := strconv.Atoi(field)
				if err != nil {
					panic(err)
				}
				fillPage(m.mem, page)
			}
		case "dirtyall":
			for at := 0; at < len(m.mem); at += PageSize {
				m.mem[at]++
			}
		case "spin":
			threads, _ := strconv.Atoi(rest)
			m.spin(threads)
		case "halt":
			m.stop.Store(true)
			m.writers.Wait()
			m.stop.Store(false)
		}
		if bad := m.bad.Load(); bad != nil {
			fmt.Println("bad", *bad)
			continue
		}
		if verb == "sum" {
			fmt.Printf("%x\n", sha256.Sum256(m.mem))
			continue
		}
		fmt.Println("ok")
	}
	os.Exit(0)
}

// fillPage is what "dirty" makes of a page.
func fillPage(mem []byte, page int) {
	for i := range PageSize {
		mem[page*PageSize+i] ^= byte(page + i + 1)
	}
}

// spin has threads count, each through pages of its own, round and round, so
// that at every instant the counts of a thread's pages descend by at most one.
func (m *machine) spin(threads int) {
	pages := len(m.mem) / PageSize / threads
	for i := range threads {
		m.writers.Go(func() {
			runtime.LockOSThread()
			part := m.mem[i*pages*PageSize:][:pages*PageSize]
			for count := uint64(1); !m.stop.Load(); count++ {
				for at := 0; at < len(part); at += PageSize {
					atomic.StoreUint64((*uint64)(unsafe.Pointer(&part[at])), count)
				}
			}
		})
	}
}

// checkSpin sees that a memory was taken at one instant.
func checkSpin(t *testing.T, mem []byte, threads int) {
	t.Helper()
	pages := len(mem) / PageSize / threads
	for i := range threads {
		part := mem[i*pages*PageSize:][:pages*PageSize]
		count := func(page int) uint64 { return *(*uint64)(unsafe.Pointer(&part[page*PageSize])) }
		for p := 1; p < pages; p++ {
			if count(p) > count(p-1) || count(p)+1 < count(0) {
				t.Fatalf("thread %d: page %d has count %d, the one before %d, the first %d", i, p, count(p), count(p-1), count(0))
			}
		}
		if count(0) == 0 {
			t.Fatalf("thread %d had not begun", i)
		}
	}
}

// denyFork is what QEMU's -sandbox spawn=deny does: who makes a process dies.
func denyFork() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	const load, equal, set, ret = 0x20, 0x15, 0x45, 0x06
	filter := []unix.SockFilter{
		{Code: load, K: 0},
		{Code: equal, K: unix.SYS_FORK, Jt: 4},
		{Code: equal, K: unix.SYS_VFORK, Jt: 3},
		{Code: equal, K: unix.SYS_CLONE, Jt: 0, Jf: 3},
		{Code: load, K: 16}, // the flags
		{Code: set, K: unix.CLONE_VM, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}

// child is the near side.
type child struct {
	t     testing.TB
	path  string
	pid   int
	space Space
	cmd   *exec.Cmd
	in    *bufio.Reader
	out   *os.File
}

// startMachine makes an image of that many pages, none of zeros, and a process
// that maps it.
func startMachine(t testing.TB, role string, pages int) *child {
	t.Helper()
	c := &child{t: t, path: filepath.Join(t.TempDir(), "memory")}
	if err := os.WriteFile(c.path, baseContent(pages), 0o600); err != nil {
		t.Fatal(err)
	}
	c.start(role)
	return c
}

func baseContent(pages int) []byte {
	content := make([]byte, pages*PageSize)
	for i := range content {
		content[i] = byte(i>>12 + i)
	}
	for p := range pages { // where the counts are
		clear(content[p*PageSize:][:8])
	}
	return content
}

func (c *child) start(role string) {
	c.t.Helper()
	exe, err := os.Executable()
	if err != nil {
		c.t.Fatal(err)
	}
	c.cmd = exec.CommandContext(c.t.Context(), exe)
	c.cmd.Env = append(os.Environ(), roleEnv+"="+role, imageEnv+"="+c.path)
	c.cmd.Stderr = os.Stderr
	theirIn, out, err := os.Pipe()
	if err != nil {
		c.t.Fatal(err)
	}
	in, theirOut, err := os.Pipe()
	if err != nil {
		c.t.Fatal(err)
	}
	c.cmd.Stdin, c.cmd.Stdout, c.out, c.in = theirIn, theirOut, out, bufio.NewReader(in)
	if err = c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	theirIn.Close()
	theirOut.Close()
	c.t.Cleanup(func() {
		_ = c.cmd.Process.Kill()
		_ = c.cmd.Wait()
		out.Close()
		in.Close()
	})
	c.pid = c.cmd.Process.Pid
	c.expect("ready")
	if c.space, err = FindSpace(c.pid, c.path); err != nil {
		c.t.Fatal(err)
	}
}

// ask sends a line and returns the answer.
func (c *child) ask(format string, args ...any) string {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.out, format+"\n", args...); err != nil {
		c.t.Fatal(err)
	}
	line, err := c.in.ReadString('\n')
	if err != nil {
		c.t.Fatalf("machine did not answer: %v", err)
	}
	return strings.TrimSpace(line)
}

func (c *child) expect(want string) {
	c.t.Helper()
	line, err := c.in.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		c.t.Fatalf("machine said %q, %v; want %q", line, err, want)
	}
}

func (c *child) tell(format string, args ...any) {
	c.t.Helper()
	if got := c.ask(format, args...); got != "ok" {
		c.t.Fatalf("machine answered %q to %q", got, fmt.Sprintf(format, args...))
	}
}

// pause stops all threads and waits until they are.
func (c *child) pause() {
	c.t.Helper()
	if err := unix.Kill(c.pid, unix.SIGSTOP); err != nil {
		c.t.Fatal(err)
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(c.pid, &ws, unix.WUNTRACED, nil); err != nil || !ws.Stopped() {
		c.t.Fatalf("machine did not stop: %v, %v", ws, err)
	}
}

func (c *child) resume() {
	c.t.Helper()
	if err := unix.Kill(c.pid, unix.SIGCONT); err != nil {
		c.t.Fatal(err)
	}
}

// memory is what the machine says that it has, page for page what the test sees.
func (c *child) memory() []byte {
	c.t.Helper()
	p := make([]byte, c.size())
	if _, err := c.space.ReadAt(p, 0); err != nil {
		c.t.Fatal(err)
	}
	return p
}

func (c *child) size() int {
	st, err := os.Stat(c.path)
	if err != nil {
		c.t.Fatal(err)
	}
	return int(st.Size())
}

// read lays the private pages of src over the image.
func (c *child) read(src Source) []byte {
	c.t.Helper()
	p, err := os.ReadFile(c.path)
	if err != nil {
		c.t.Fatal(err)
	}
	runs, err := privateRuns(src)
	if err != nil {
		c.t.Fatal(err)
	}
	for _, r := range runs {
		if _, err := src.ReadAt(p[r.first*PageSize:r.end()*PageSize], int64(r.first*PageSize)); err != nil {
			c.t.Fatal(err)
		}
	}
	return p
}

// exists reports whether there is such a process, be it a zombie.
func exists(pid int) bool {
	return linux.CheckAlive(pid) == nil || unix.Kill(pid, 0) == nil
}
