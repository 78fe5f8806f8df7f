package jail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/network"
)

// Programs with files of their own.

func ownFiles(c *Config) { c.OwnFiles = true }

// ownModes runs a test in the modes that there are, with files of its own.
func ownModes(t *testing.T, test func(t *testing.T, j *Jail)) {
	modes(t, test, ownFiles)
}

// await has a hostile program wait until the test says something.
func await() { _, _ = unix.Read(FirstFile, make([]byte, 1)) }

func (p *prisoner) goOn(t *testing.T) map[string]string {
	t.Helper()
	if _, err := p.release.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	return readResults(t, p.output)
}

// ownRole is what a hostile program with files of its own does.
func ownRole(role string, got map[string]string) {
	note := func(name string, err error) { got[name] = fmt.Sprint(err) }
	switch role {
	case "own":
		tryAll(got)
		for name, do := range ownAttempts() {
			note(name, do())
		}
		note("own-fill", fillRun()) // last: Landlock lets nobody remove what there is
		note("own-many", manyFiles())
		_ = unix.CloseRange(3, FirstFile-1, 0) // what it was given is still there
	case "serve":
		note("listen", listenAt("api.sock"))
		say(got)
		await()
		note("state", writeFile("state", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|largeFile, "state of devices"))
		note("state-again", writeFile(RunDir+"/state", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, "devices"))
		for name, flags := range askedFlags() {
			_, err := unix.Open("/asked", flags, 0o600)
			note(name, err)
		}
		note("listen-late", listenAt("late.sock"))
	case "traps":
		note("symlink", unix.Symlink(os.Getenv("TINE_TEST_SECRET"), "link"))
		note("symlink-socket", unix.Symlink(os.Getenv("TINE_TEST_SOCKET"), "link.sock"))
		note("directory", unix.Mkdir("directory", 0o700))
		note("file", writeFile("file", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, "data"))
		note("lease", lease("file"))
		note("sparse", sparse("sparse"))
		note("listen", listenAt("api.sock"))
		fd, _ := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		note("bind", unix.Bind(fd, &unix.SockaddrUnix{Name: "deaf.sock"}))
	case "open":
		_, err := unix.Open(os.Getenv("TINE_TEST_OPEN"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		note("first", err)
		_, err = unix.Open(os.Getenv("TINE_TEST_OPEN"), unix.O_RDWR|unix.O_CLOEXEC, 0)
		note("second", err)
	case "fill":
		note("write", writeFile(os.Getenv("TINE_TEST_OPEN"), unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC|largeFile, "memory"))
		fd, _ := unix.Open(os.Getenv("TINE_TEST_OPEN"), unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
		_, err := unix.Pread(fd, make([]byte, 1), 0)
		note("read", err)
		note("length", unix.Ftruncate(fd, 4))
	case "copies":
		text, err := os.ReadFile("device")
		got["copy"] = string(text)
		note("read", err)
		_, err = os.Stat("device")
		note("stat", err)
	case "tap":
		takeTap(got)
	}
}

func askedFlags() map[string]int {
	return map[string]int{
		"read": unix.O_RDONLY, "read-close": unix.O_RDONLY | unix.O_CLOEXEC, "read-large": unix.O_RDONLY | unix.O_CLOEXEC | largeFile,
		"both": unix.O_RDWR, "both-close": unix.O_RDWR | unix.O_CLOEXEC, "tun": unix.O_RDWR | unix.O_NONBLOCK | unix.O_CLOEXEC | largeFile,
		"make": unix.O_WRONLY | unix.O_CREAT | unix.O_CLOEXEC,
	}
}

func listenAt(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err = unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return err
	}
	return unix.Listen(fd, -1)
}

func writeFile(path string, flags int, text string) error {
	fd, err := unix.Open(path, flags, 0o600)
	if err != nil {
		return err
	}
	_, err = unix.Write(fd, []byte(text))
	return errors.Join(err, unix.Close(fd))
}

// lease has whoever opens a file wait for us.
func lease(path string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
	}
	return err
}

func sparse(path string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return unix.Ftruncate(fd, 1<<20)
}

// ownAttempts are what a program with files of its own must not be able to do, on
// top of attempts.
func ownAttempts() map[string]func() error {
	socket := func(domain, kind int) func() error {
		return func() error { _, err := unix.Socket(domain, kind, 0); return err }
	}
	bind := func(name string) func() error {
		return func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			return unix.Bind(fd, &unix.SockaddrUnix{Name: name})
		}
	}
	const anew = unix.O_WRONLY | unix.O_CREAT | unix.O_TRUNC
	return map[string]func() error{
		"own-datagrams":    socket(unix.AF_UNIX, unix.SOCK_DGRAM),
		"own-packets":      socket(unix.AF_UNIX, unix.SOCK_SEQPACKET),
		"own-high-domain":  func() error { return raw(unix.SYS_SOCKET, unix.AF_INET|1<<32, unix.SOCK_STREAM) },
		"own-alg":          socket(unix.AF_ALG, unix.SOCK_SEQPACKET),
		"own-bind-root":    bind("/evil.sock"),
		"own-bind-up":      bind("../evil.sock"),
		"own-bind-tmp":     bind("/tmp/evil.sock"),
		"own-connect":      func() error { _ = listenAt("own.sock"); return connectPath("own.sock") },
		"own-connect-host": func() error { return connectPath(os.Getenv("TINE_TEST_SOCKET")) },
		"own-connect-abs": func() error {
			if err := listenAt("@own"); err != nil {
				return err
			}
			return connectAbstract("own")
		},
		"own-listen-unbound": func() error {
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			return unix.Listen(fd, 1)
		},
		"own-listen-file":  func() error { return unix.Listen(1, 1) },
		"own-write-root":   func() error { return writeFile("/evil", anew, "x") },
		"own-write-up":     func() error { return writeFile("../evil", anew, "x") },
		"own-write-secret": func() error { return writeFile(os.Getenv("TINE_TEST_SECRET"), anew, "x") },
		"own-write-self":   func() error { return writeFile(os.Getenv("TINE_TEST_PROGRAM"), unix.O_WRONLY, "x") },
		"own-mknod":        func() error { return unix.Mknod("device", unix.S_IFBLK|0o600, 259) },
		"own-fifo":         func() error { return unix.Mkfifo("fifo", 0o600) },
		"own-remount":      func() error { return unix.Mount("", RunDir, "", unix.MS_REMOUNT, "size=1g") },
		"own-unmount":      func() error { return unix.Unmount(RunDir, unix.MNT_DETACH) },
		"own-map-code":     mapCode,
		"own-execute": func() error {
			_ = writeFile("program", anew, "#!/bin/sh\n")
			return unix.Exec(RunDir+"/program", []string{"x"}, nil)
		},
		"own-move-out": func() error { return unix.Rename("own.sock", "/own.sock") },
		"own-chown":    func() error { return unix.Chown(".", 12345, 12345) },
	}
}

func connectPath(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

// fillRun writes more than there is room for, to files that may each be as long.
func fillRun() error {
	block := make([]byte, 512<<10)
	for i := range 2 * runBytes / len(block) {
		name := "fill" + strconv.Itoa(i%40)
		defer func() { _ = unix.Unlink(name) }()
		fd, err := unix.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if i >= 40 {
			continue
		}
		if _, err = unix.Write(fd, block); err != nil {
			return err
		}
	}
	return nil
}

func manyFiles() error {
	for i := range 2 * runInodes {
		name := "many" + strconv.Itoa(i)
		defer func() { _ = unix.Unlink(name) }()
		if err := writeFile(name, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, ""); err != nil {
			return err
		}
	}
	return nil
}

func mapCode() error {
	fd, err := unix.Open("code", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if _, err = unix.Write(fd, make([]byte, 4096)); err != nil {
		return err
	}
	if fd, err = unix.Open("code", unix.O_RDONLY, 0); err != nil {
		return err
	}
	_, err = unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE)
	return err
}

// takeTap does with the tap what a monitor does that takes it by its name.
func takeTap(got map[string]string) {
	take := func(name string) error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err == nil && flags&unix.O_NONBLOCK == 0 {
			err = errors.New("it blocks")
		}
		req, reqErr := unix.NewIfreq(name)
		if err = errors.Join(err, reqErr); err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return err
		}
		return errors.Join(
			unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM),
			unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, 12),
		)
	}
	got["other"] = fmt.Sprint(take("tap9"))
	got["tap"] = fmt.Sprint(take(network.TapName))
}

// A program with files of its own can do what it is for, and nothing more than
// any other program.
func TestHostileOwn(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		secret := filepath.Join(t.TempDir(), "tokens.json")
		if err := os.WriteFile(secret, []byte("token"), 0o644); err != nil {
			t.Fatal(err)
		}
		victim := startIn(t, take(t, j), "idle", Job{})
		env := []string{
			"TINE_TEST_SECRET=" + secret, "TINE_TEST_VICTIM=" + strconv.Itoa(victim.PID()), "TINE_TEST_ABSTRACT=" + listenAbstract(t),
			"TINE_TEST_SOCKET=" + listenPath(t), "TINE_TEST_PROGRAM=" + j.cfg.Program,
		}
		p := startIn(t, take(t, j), "own", Job{Env: env, FileBytes: 2 * runBytes})
		for name := range attempts() {
			if result, ok := p.said[name]; !ok || strings.HasPrefix(result, "failed: ") == (name == "unix") {
				t.Errorf("%s: %q", name, result)
			}
		}
		for name := range ownAttempts() {
			if result, ok := p.said[name]; !ok || result == "<nil>" {
				t.Errorf("%s: %q", name, result)
			}
		}
		if dir := p.said["directory"]; dir != RunDir+"<nil>" {
			t.Errorf("directory is %s", dir)
		}
		for name, want := range map[string]error{
			"own-fill": unix.ENOSPC, "own-many": unix.ENOSPC, "own-map-code": unix.EPERM, "own-connect": unix.EPERM, "own-connect-abs": unix.EPERM,
			"own-connect-host": unix.EPERM, "own-mknod": unix.EPERM, "own-fifo": unix.EPERM, "own-execute": unix.EPERM,
		} {
			if p.said[name] != want.Error() {
				t.Errorf("%s: %q, want %q", name, p.said[name], want)
			}
		}
		checkApart(t, j, p, victim)
		p.end(t)
		victim.end(t)
	})
}

// listenPath makes a socket of the host's that all may connect to.
func listenPath(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "jail") //nolint:usetesting // a path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	var lc net.ListenConfig
	ln, err := lc.Listen(t.Context(), "unix", path)
	if err = errors.Join(err, os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(ln.Close(), os.RemoveAll(dir)) })
	return path
}

// A program is reached by its sockets, and its files are read, by any process that
// knows it, from the start and long after it: what the program needs nobody for
// goes on, what it would ask for does not.
func TestOwnFiles(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		p := startIn(t, take(t, j), "serve", Job{})
		if err := p.Listens(t.Context(), "api.sock"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("enough"))
		if err := p.Listens(ctx, "other.sock"); err == nil || err.Error() != "enough" {
			t.Errorf("wait for a socket that is not there: %v", err)
		}
		dir := openDir(t, p)
		dial(t, dir, "api.sock")
		if _, err := dir.Dial(t.Context(), "other.sock"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("dial: %v", err)
		}
		if err := p.Started(); err != nil {
			t.Error(err)
		}
		if err := p.Listens(t.Context(), "api.sock"); !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("wait for a socket: %v", err)
		}
		want := map[string]string{
			"listen": "<nil>", "state": "<nil>", "state-again": "<nil>", "listen-late": unix.ENOSYS.Error(),
		}
		for name := range askedFlags() {
			want[name] = unix.ENOSYS.Error()
		}
		if diff := cmp.Diff(want, p.goOn(t)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		later := openDir(t, p)
		dial(t, later, "api.sock")
		if data, err := later.Read("state", 7); err != nil || string(data) != "devices" {
			t.Errorf("state is %q, %v", data, err)
		}
		if _, err := later.Read("state", 6); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("state of more than 6 bytes: %v", err)
		}
		start, err := linux.StartTime(p.PID())
		if err != nil {
			t.Fatal(err)
		}
		daemon := exec.CommandContext(t.Context(), j.cfg.Program)
		daemon.Env = []string{fmt.Sprintf("%s=%d %d", adoptEnv, p.PID(), start)}
		if out, runErr := daemon.CombinedOutput(); runErr != nil {
			t.Errorf("another daemon: %v\n%s", runErr, out)
		}
		if err = errors.Join(later.Remove("state"), later.Remove("api.sock")); err != nil {
			t.Error(err)
		}
		if _, err = dir.Read("state", 7); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("file that was removed: %v", err)
		}
		if _, err = OpenDir(p.PID(), start+1); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("another process: %v", err)
		}
		p.end(t)
		if _, err = OpenDir(p.PID(), start); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("process that has ended: %v", err)
		}
	})
}

const adoptEnv = "TINE_TEST_ADOPT"

// adopt is another daemon, which knows a program by its process.
func adopt(handle string) error {
	var pid int
	var start uint64
	if _, err := fmt.Sscan(handle, &pid, &start); err != nil {
		return err
	}
	dir, err := OpenDir(pid, start)
	if err != nil {
		return err
	}
	conn, err := dir.Dial(context.Background(), "api.sock")
	if err != nil {
		return err
	}
	data, err := dir.Read("state", 100)
	if err == nil && string(data) != "devices" {
		err = fmt.Errorf("state is %q", data)
	}
	return errors.Join(err, conn.Close(), dir.Close())
}

func openDir(t *testing.T, p *prisoner) *Dir {
	t.Helper()
	dir, err := p.OpenDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = dir.Close() })
	return dir
}

func dial(t *testing.T, dir *Dir, name string) {
	t.Helper()
	conn, err := dir.Dial(t.Context(), name)
	if err == nil {
		err = conn.Close()
	}
	if err != nil {
		t.Error(err)
	}
}

// Nothing that a program puts into its directory leads elsewhere, or holds up who
// looks at it.
func TestTraps(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		j.level.Landlock = 0 // it would not let these be made
		secret := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(secret, []byte("token"), 0o644); err != nil {
			t.Fatal(err)
		}
		p := startIn(t, take(t, j), "traps", Job{Env: []string{"TINE_TEST_SECRET=" + secret, "TINE_TEST_SOCKET=" + listenPath(t)}})
		for name, result := range p.said {
			if result != "<nil>" {
				t.Errorf("trap %s: %s", name, result)
			}
		}
		dir := openDir(t, p)
		for name, want := range map[string]error{
			"link": unix.ELOOP, "directory": errdef.ErrInvalid, "file": unix.EAGAIN, "sparse": errdef.ErrInvalid, "api.sock": unix.ENXIO,
			"": errdef.ErrInvalid, ".": errdef.ErrInvalid, "..": errdef.ErrInvalid, "../etc": errdef.ErrInvalid, "/etc/passwd": errdef.ErrInvalid,
			"directory/../link": errdef.ErrInvalid,
		} {
			if data, err := dir.Read(name, 1<<10); !errors.Is(err, want) {
				t.Errorf("read %q: %q, %v, want %v", name, data, err, want)
			}
		}
		for name, want := range map[string]error{
			"link.sock": errdef.ErrInvalid, "file": errdef.ErrInvalid, "directory": errdef.ErrInvalid, "deaf.sock": unix.ECONNREFUSED,
			"none.sock": os.ErrNotExist, "../x": errdef.ErrInvalid,
		} {
			if conn, err := dir.Dial(t.Context(), name); !errors.Is(err, want) {
				t.Errorf("dial %q: %v, %v, want %v", name, conn, err, want)
			}
		}
		for _, name := range []string{"..", ".", "../x", "directory"} {
			if err := dir.Remove(name); err == nil {
				t.Errorf("removed %s", name)
			}
		}
		if err := dir.Remove("link"); err != nil {
			t.Error(err)
		}
		if data, err := os.ReadFile(secret); err != nil || string(data) != "token" {
			t.Errorf("secret is %q, %v", data, err)
		}
		p.end(t)
	})
}

// A process that is not in the jail, or has no files of its own, has no Dir.
func TestOpenDirOfOthers(t *testing.T) {
	t.Parallel()
	modes(t, func(t *testing.T, j *Jail) {
		p := startIn(t, take(t, j), "idle", Job{})
		if _, err := p.OpenDir(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("program without: %v", err)
		}
		p.end(t)
	})
	start, err := linux.StartTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if _, err = OpenDir(os.Getpid(), start); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("this process: %v", err)
	}
}

// What is to be done before a file is opened is done once, and the program stands
// still; its error is the program's and the caller's.
func TestBefore(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		job := func(before func(context.Context) error) Job {
			return Job{
				Env:    []string{"TINE_TEST_OPEN=/dev/kvm"},
				Opens:  map[string]*os.File{"/dev/kvm": f},
				Before: map[string]func(context.Context) error{"/dev/kvm": before},
			}
		}
		var calls atomic.Int32
		p := startIn(t, take(t, j), "open", job(func(context.Context) error { calls.Add(1); return nil }))
		if p.said["first"] != "<nil>" || p.said["second"] != "<nil>" || calls.Load() != 1 {
			t.Errorf("%v after %d calls", p.said, calls.Load())
		}
		p.end(t)

		cause := errors.New("layer is gone")
		failing := startIn(t, take(t, j), "open", job(func(context.Context) error { return cause }))
		if failing.said["first"] != unix.EIO.Error() || failing.said["second"] != unix.ENOSYS.Error() {
			t.Errorf("program says %v", failing.said)
		}
		if err = failing.Started(); !errors.Is(err, cause) {
			t.Errorf("caller is told %v", err)
		}
		failing.end(t)
	})
}

// A program stands still while something is done before its file is opened, and
// that ends with Started.
func TestBeforeIsCancelled(t *testing.T) {
	t.Parallel()
	j := openJail(t, ownFiles)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	p, err := take(t, j).Start(t.Context(), Job{
		Env: []string{hostileEnv + "=open", "TINE_TEST_OPEN=/file"}, Output: w, FileBytes: 1,
		Opens: map[string]*os.File{"/file": f},
		Before: map[string]func(context.Context) error{"/file": func(ctx context.Context) error {
			close(entered)
			<-ctx.Done()
			return context.Cause(ctx)
		}},
	})
	if err = errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	<-entered
	if err = p.Started(); !errors.Is(err, context.Canceled) {
		t.Errorf("caller is told %v", err)
	}
	out, err := io.ReadAll(r)
	if err != nil || !strings.Contains(string(out), `"first":"input/output error"`) {
		t.Errorf("program says %s, %v", out, err)
	}
	_ = p.Wait() // it ends, as it has nothing to wait for
	_ = r.Close()
}

// A file that the program is to write comes with no right to read.
func TestGivenFileOnlyWrites(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		path := filepath.Join(t.TempDir(), "memory")
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = f.Close() })
		p := startIn(t, take(t, j), "fill", Job{Env: []string{"TINE_TEST_OPEN=" + path}, Opens: map[string]*os.File{path: f}})
		want := map[string]string{"write": "<nil>", "read": unix.EBADF.Error(), "length": "<nil>"}
		if diff := cmp.Diff(want, p.said); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		p.end(t)
		if data, err := os.ReadFile(path); err != nil || string(data) != "memo" {
			t.Errorf("file is %q, %v", data, err)
		}
	})
}

// A program takes its tap by name, and no other.
func TestTakeTap(t *testing.T) {
	t.Parallel()
	ownModes(t, func(t *testing.T, j *Jail) {
		cell, err := j.Take(t.Context(), true)
		if err != nil && os.Geteuid() != 0 {
			t.Skipf("NOT TESTED: %v", err)
		}
		if err != nil {
			t.Fatal(err)
		}
		p := startIn(t, cell, "tap", Job{})
		want := map[string]string{"other": unix.EPERM.Error(), "tap": "<nil>"}
		if diff := cmp.Diff(want, p.said); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		p.end(t)
	})
}
