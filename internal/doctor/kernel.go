package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// controllers are the parts of cgroups that limit a machine.
func controllers() []string { return []string{"cpu", "memory", "pids"} }

const cgroupRoot = "/sys/fs/cgroup"

// cgroups says which version there is, and whether the controllers are there.
func (x *examiner) cgroups(context.Context) Check {
	version, has := "v2", map[string]bool{}
	if text, err := x.read(cgroupRoot + "/cgroup.controllers"); err == nil {
		for name := range strings.FieldsSeq(text) {
			has[name] = true
		}
	} else {
		version = "v1"
		for _, name := range controllers() {
			_, err := os.Stat(filepath.Join(x.cfg.Root, cgroupRoot, name, "cgroup.procs"))
			has[name] = err == nil
		}
	}
	return cgroupCheck(version, has)
}

func cgroupCheck(version string, has map[string]bool) Check {
	var present, missing []string
	for _, name := range controllers() {
		if has[name] {
			present = append(present, name)
		} else {
			missing = append(missing, name)
		}
	}
	switch {
	case len(present) == 0:
		return Check{Status: Warn, Detail: "none mounted: machines cannot be limited", Hint: "mount -t cgroup2 cgroup2 " + cgroupRoot}
	case len(missing) > 0:
		return Check{
			Status: Warn, Detail: fmt.Sprintf("%s without %s", version, strings.Join(missing, ", ")),
			Hint: "boot with cgroup_enable=" + strings.Join(missing, ","),
		}
	default:
		return Check{Status: OK, Detail: version + " with " + strings.Join(present, ", ")}
	}
}

// cgroupLimit returns a limit that this process's own cgroup sets, by the
// file's name in version 2 and in version 1. Limits further up are not seen.
func (x *examiner) cgroupLimit(controller, v2, v1 string) (int64, bool) {
	text, err := x.read("/proc/self/cgroup")
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) != 3 {
			continue
		}
		file := ""
		switch fields[1] {
		case "":
			file = path.Join(cgroupRoot, fields[2], v2)
		case controller:
			file = path.Join(cgroupRoot, controller, fields[2], v1)
		default:
			continue
		}
		if n, ok := x.number(file); ok {
			return n, true
		}
	}
	return 0, false
}

// number reads a file that holds one; "max" is none.
func (x *examiner) number(file string) (int64, bool) {
	text, err := x.read(file)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	return n, err == nil
}

// pidfd is what the daemon holds machines by.
func (x *examiner) pidfd(context.Context) Check {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	c := feature(fd, err, "a kernel from 5.3 on has it")
	if c.Status == Warn {
		c.Status = Fail
	}
	return c
}

// memfd is what the probe of KVM keeps its firmware in.
func (x *examiner) memfd(context.Context) Check {
	fd, err := unix.MemfdCreate("tine-doctor", unix.MFD_CLOEXEC)
	return feature(fd, err, "a kernel with CONFIG_MEMFD_CREATE has it")
}

// pagemapScan finds what a fork has written. A kernel that has it gets as far
// as the arguments, of which there are none.
func (x *examiner) pagemapScan(context.Context) Check {
	const request = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg) of linux/fs.h
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return Check{Status: Warn, Detail: err.Error(), Hint: "mount -t proc proc /proc"}
	}
	defer func() { _ = f.Close() }() // only asked
	if err = unix.IoctlSetInt(int(f.Fd()), request, 0); errors.Is(err, unix.ENOTTY) {
		return Check{Status: Warn, Detail: "missing: pages are read one by one, which is slower", Hint: "a kernel from 6.7 on has it"}
	}
	return Check{Status: OK, Detail: "there"}
}

// userfaultfd hands page faults to a process. Without privilege it may be
// limited to faults of user code, and a KVM guest's are the kernel's.
func (x *examiner) userfaultfd(context.Context) Check {
	const open, userModeOnly = unix.O_CLOEXEC | unix.O_NONBLOCK, 1
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, open, 0, 0)
	if errno != unix.EPERM {
		return feature(int(fd), asError(errno), "a kernel with CONFIG_USERFAULTFD has it")
	}
	fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, open|userModeOnly, 0, 0)
	c := feature(int(fd), asError(errno), "")
	if c.Status == OK {
		c.Status, c.Detail = Warn, "for faults of user code only"
	}
	c.Hint = "sysctl -w vm.unprivileged_userfaultfd=1"
	return c
}

// asError keeps errno 0 from becoming an error that is not nil.
func asError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// feature says whether the kernel gave the descriptor that it was asked for.
func feature(fd int, err error, hint string) Check {
	if err != nil {
		return Check{Status: Warn, Detail: "missing: " + err.Error(), Hint: hint}
	}
	_ = unix.Close(fd) // nothing was done with it
	return Check{Status: OK, Detail: "there"}
}
