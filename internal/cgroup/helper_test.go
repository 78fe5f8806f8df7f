package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The test binary runs again as a process that enters a group through the
// files that it inherits, says so, and then plays a role.
const (
	roleEnv  = "TINE_TEST_CGROUP_ROLE"
	doorsEnv = "TINE_TEST_CGROUP_DOORS" // how many files, from descriptor 3 on
	nameEnv  = "TINE_TEST_CGROUP_NAME"  // of the creator's parent group and group, PARENT/NAME
)

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := play(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	code := m.Run()
	if err := leaveHost(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func play(role string) error {
	if role == "nobody" { // has no access to control groups but by those files
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(65534), syscall.Setuid(65534)); err != nil {
			return err
		}
	}
	doors, err := strconv.Atoi(os.Getenv(doorsEnv))
	if err != nil {
		return err
	}
	for fd := range doors {
		if _, err = unix.Write(3+fd, []byte("0")); err != nil {
			return fmt.Errorf("enter %d: %w", fd, err)
		}
	}
	if role == "creator" {
		if err = create(os.Getenv(nameEnv)); err != nil {
			return err
		}
	}
	if role == "hold" {
		if err = eat(snack); err != nil {
			return err
		}
	}
	if _, err = fmt.Println("ready"); err != nil {
		return err
	}
	switch role {
	case "eat":
		if err = eat(feast); err == nil {
			err = errors.New("there was enough for all of it")
		}
		return err
	case "meal":
		if err = eat(meal); err != nil {
			return err
		}
	case "spin":
		for {
			runtime.Gosched()
		}
	case "bomb":
		runtime.LockOSThread()
		bomb()
	}
	for {
		if err = unix.Pause(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

const (
	feast = 256 << 20
	meal  = 80 << 20
	snack = 16 << 20
)

// eat takes memory for good, and writes to all of it.
func eat(bytes int) error {
	mem, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	for i := 0; i < len(mem); i += os.Getpagesize() {
		mem[i] = 1
	}
	return nil
}

var nap = unix.Timespec{Nsec: int64(time.Millisecond)}

// bomb forks for ever, and so does each process that it makes. These have one
// thread and no Go runtime, so they may do nothing else.
//
//go:norace
//go:nosplit
func bomb() {
	for {
		_, _, _ = unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
		_, _, _ = unix.RawSyscall6(unix.SYS_PPOLL, 0, 0, uintptr(unsafe.Pointer(&nap)), 0, 0, 0)
	}
}

// create makes a group with a process in it, of whom nobody knows when this
// process is killed.
func create(path string) error {
	parent, name, _ := strings.Cut(path, "/")
	h, err := Open(Config{Name: parent})
	if err != nil {
		return err
	}
	g, err := h.Create(name, Limits{PIDs: 50})
	if err != nil {
		return err
	}
	_, err = start(context.Background(), g, "idle", "")
	return err
}

// start runs a helper in a group and returns when it is in it.
func start(ctx context.Context, g *Group, role, name string) (*exec.Cmd, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, exe)
	cmd.Stderr = os.Stderr
	if g != nil {
		if cmd.ExtraFiles, err = g.Entrances(); err != nil {
			return nil, err
		}
	}
	cmd.Env = append(os.Environ(), roleEnv+"="+role, doorsEnv+"="+strconv.Itoa(len(cmd.ExtraFiles)), nameEnv+"="+name)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	err = cmd.Start()
	for _, f := range cmd.ExtraFiles {
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready") {
		return nil, errors.Join(fmt.Errorf("%s said %q: %w", role, line, err), cmd.Process.Kill(), cmd.Wait())
	}
	return cmd, nil
}
