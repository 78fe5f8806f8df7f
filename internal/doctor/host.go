package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/linux"
)

const otherStateDir = `export TINE_STATE_DIR="$HOME/tine"`

// state checks that the state directory is there and can be written to, or can
// be made.
func (x *examiner) state(context.Context) Check {
	dir := x.cfg.StateDir
	there, err := existing(dir)
	if err == nil {
		err = unix.Faccessat(unix.AT_FDCWD, there, unix.W_OK|unix.X_OK, unix.AT_EACCESS)
		if err != nil {
			err = &fs.PathError{Op: "write to", Path: there, Err: err}
		}
	}
	switch {
	case err != nil:
		return Check{Status: Fail, Detail: err.Error(), Hint: otherStateDir}
	case there != dir:
		return Check{Status: OK, Detail: dir + ", to be made"}
	default:
		return Check{Status: OK, Detail: dir}
	}
}

// existing is the first of dir and its parents that exists, a directory.
func existing(dir string) (string, error) {
	for {
		info, err := os.Stat(dir)
		switch {
		case err == nil && info.IsDir():
			return dir, nil
		case err == nil:
			return "", &fs.PathError{Op: "use", Path: dir, Err: unix.ENOTDIR}
		case !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir):
			return "", err
		}
		dir = filepath.Dir(dir)
	}
}

// maxStateDir leaves room for the sockets below the state directory: their
// paths hold 107 bytes at most (unix(7)).
const maxStateDir = 107 - len("/sandboxes/sb-0123456789ab/0/agent.sock")

func (x *examiner) socketPath(context.Context) Check {
	n := len(x.cfg.StateDir)
	c := Check{Status: OK, Detail: fmt.Sprintf("the state directory's path has %d bytes of at most %d", n, maxStateDir)}
	if n > maxStateDir {
		c.Status = Fail
	}
	return hinted(c, otherStateDir)
}

func (x *examiner) disk(context.Context) Check {
	there, err := existing(x.cfg.StateDir)
	if err != nil {
		return Check{Status: Fail, Detail: err.Error(), Hint: otherStateDir}
	}
	free, err := linux.FreeSpace(there)
	if err != nil {
		return Check{Status: Fail, Detail: err.Error(), Hint: otherStateDir}
	}
	return diskCheck(there, free)
}

func diskCheck(dir string, free int64) Check {
	c := Check{Status: grade(free, 5<<30, 1<<30), Detail: size(free) + " free on the filesystem of " + dir}
	return hinted(c, "tine snapshot gc")
}

// memory checks what a new process could have, in a container too.
func (x *examiner) memory(context.Context) Check {
	text, err := x.read("/proc/meminfo")
	if err != nil {
		return Check{Status: Fail, Detail: err.Error(), Hint: "mount -t proc proc /proc"}
	}
	available, ok := meminfo(text, "MemAvailable:")
	if !ok {
		return Check{Status: Warn, Detail: "/proc/meminfo says nothing of it", Hint: "free -m"}
	}
	c := Check{Detail: size(available) + " available"}
	if limit, limited := x.cgroupLimit("memory", "memory.max", "memory.limit_in_bytes"); limited && limit < available {
		available = limit
		c.Detail += ", " + size(limit) + " of them to this cgroup"
	}
	c.Status = grade(available, 1<<30, 512<<20)
	return hinted(c, "ps -e -o rss,pid,comm --sort=-rss | head")
}

// meminfo returns a line's value in bytes.
func meminfo(text, key string) (int64, bool) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 3 && fields[0] == key && fields[2] == "kB" {
			kib, err := strconv.ParseInt(fields[1], 10, 52)
			return kib << 10, err == nil && kib >= 0
		}
	}
	return 0, false
}

func (x *examiner) openFiles(context.Context) Check {
	limit, err := rlimit(unix.RLIMIT_NOFILE)
	if err != nil {
		return Check{Status: Warn, Detail: err.Error()}
	}
	if limit == unlimited {
		return Check{Status: OK, Detail: "no limit"}
	}
	c := Check{Status: grade(limit, 4096, 1024), Detail: fmt.Sprintf("at most %d for each process", limit)}
	return hinted(c, "ulimit -Hn 65536 (as root), or LimitNOFILE=65536 in a systemd unit")
}

const unlimited = 1 << 62

// rlimit is the hard limit: the Go runtime raises the soft one to it.
func rlimit(which int) (int64, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(which, &r); err != nil {
		return 0, fmt.Errorf("get limit: %w", err)
	}
	return int64(min(r.Max, unlimited)), nil
}

// limit is one of several limits on the same thing.
type limit struct {
	name  string
	value int64
	raise string // how to raise it
}

// processes checks the tightest of the limits on processes and threads.
func (x *examiner) processes(context.Context) Check {
	var limits []limit
	for _, name := range []string{"kernel.pid_max", "kernel.threads-max"} {
		if n, ok := x.sysctl(name); ok {
			limits = append(limits, limit{name, n, "sysctl -w " + name + "=65536"})
		}
	}
	if n, err := rlimit(unix.RLIMIT_NPROC); err == nil && x.euid != 0 {
		limits = append(limits, limit{"this user's limit", n, "ulimit -Hu 65536 (as root)"})
	}
	if n, ok := x.cgroupLimit("pids", "pids.max", "pids.max"); ok {
		limits = append(limits, limit{"the cgroup's pids.max", n, "raise pids.max (TasksMax= in a systemd unit)"})
	}
	return tightest(limits)
}

func tightest(limits []limit) Check {
	if len(limits) == 0 {
		return Check{Status: Warn, Detail: "no limit could be read", Hint: "mount -t proc proc /proc"}
	}
	least := limits[0]
	for _, l := range limits[1:] {
		if l.value < least.value {
			least = l
		}
	}
	c := Check{Status: grade(least.value, 4096, 512), Detail: fmt.Sprintf("%s allows %d", least.name, least.value)}
	return hinted(c, least.raise)
}

// sysctl returns a number under /proc/sys.
func (x *examiner) sysctl(name string) (int64, bool) {
	return x.number("/proc/sys/" + strings.ReplaceAll(name, ".", "/"))
}

func (x *examiner) memoryMaps(context.Context) Check {
	const usual = 65530 // the kernel's default
	n, ok := x.sysctl("vm.max_map_count")
	if !ok {
		return Check{Status: Skip, Detail: "/proc/sys/vm/max_map_count cannot be read"}
	}
	c := Check{Status: grade(n, usual, 0), Detail: fmt.Sprintf("%d for each process", n)}
	return hinted(c, fmt.Sprintf("sysctl -w vm.max_map_count=%d", usual))
}

// userNamespaces are what image builds without root are made in.
func (x *examiner) userNamespaces(context.Context) Check {
	if x.euid == 0 {
		return Check{Status: OK, Detail: "root needs none"}
	}
	for _, wall := range []struct {
		name   string
		closed int64
		open   string
	}{
		{"user.max_user_namespaces", 0, "15000"},
		{"kernel.unprivileged_userns_clone", 0, "1"},
		{"kernel.apparmor_restrict_unprivileged_userns", 1, "0"},
	} {
		if n, ok := x.sysctl(wall.name); ok && n == wall.closed {
			return Check{
				Status: Warn, Detail: fmt.Sprintf("%s is %d: images are built by root only", wall.name, n),
				Hint: fmt.Sprintf("sysctl -w %s=%s", wall.name, wall.open),
			}
		}
	}
	return Check{Status: OK, Detail: "open to this user"}
}
