package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	rootDevice = "/dev/vda"
	newRoot    = "/newroot"
	deviceTime = time.Minute
	openFiles  = 1 << 16
)

// enterDisk goes from the initramfs to the root on the disk.
func enterDisk() error {
	if err := mount("devtmpfs", "/dev", "devtmpfs", ""); err != nil {
		return err
	}
	for _, list := range []string{"order", "order.d/blk", "order.d/ext4", "order.d/more"} {
		if err := loadModules(filepath.Join("/modules", list)); err != nil {
			return err
		}
	}
	if err := await(rootDevice); err != nil {
		return err
	}
	if err := mount(rootDevice, newRoot, "ext4", ""); err != nil {
		return err
	}
	// A root that is moved into place is one that pivot_root can leave, which the
	// jail does. The initramfs itself is not.
	if err := errors.Join(unix.Chdir(newRoot), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), unix.Chdir("/")); err != nil {
		return fmt.Errorf("enter %s: %w", rootDevice, err)
	}
	return unix.Exec("/init", []string{"/init", modeInit}, environment())
}

func environment() []string {
	return []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C"}
}

// loadModules loads what a file lists, each after those that it needs. One that
// is there already is fine.
func loadModules(list string) error {
	data, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	for path := range strings.Lines(string(data)) {
		path = strings.TrimSpace(path)
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		_ = f.Close() // only read
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("load module %s: %w", path, err)
		}
	}
	return nil
}

func await(path string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(deviceTime); ; {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-late:
			return fmt.Errorf("no %s after %v", path, deviceTime)
		}
	}
}

func mount(source, target, kind, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil { //nolint:gosec // it is mounted on
		return err
	}
	if err := unix.Mount(source, target, kind, 0, data); err != nil {
		return &os.PathError{Op: "mount " + kind, Path: target, Err: err}
	}
	return nil
}

// initialise makes of the root on the disk what a test expects of a host, has
// the plan run, and reaps whatever process ends meanwhile.
func initialise(ctx context.Context) error {
	for _, m := range []struct{ kind, target, data string }{
		{"proc", "/proc", ""},
		{"sysfs", "/sys", ""},
		{"devtmpfs", "/dev", ""},
		{"devpts", "/dev/pts", "mode=0600,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
		{"cgroup2", "/sys/fs/cgroup", ""},
	} {
		if err := mount(m.kind, m.target, m.kind, m.data); err != nil {
			return err
		}
	}
	if err := os.Symlink("/proc/self/fd", "/dev/fd"); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("bring loopback up: %w: %s", err, out)
	}
	if err := unix.Sethostname([]byte("outer")); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: openFiles, Max: openFiles}); err != nil {
		return err
	}
	run := exec.CommandContext(ctx, "/init", modeRun)
	run.Stdout, run.Stderr = os.Stdout, os.Stderr
	if err := run.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("wait for processes: %w", err)
		case pid == run.Process.Pid && status.ExitStatus() != 0:
			return fmt.Errorf("the plan's runner ended with status %d", status.ExitStatus())
		case pid == run.Process.Pid:
			return nil
		}
	}
}
