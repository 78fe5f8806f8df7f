package jail

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Limits of any monitor, whatever it runs. Its threads are a few, and up to 64
// that serve its disk; its files are those it was given, and a connection each
// for control and agent.
const (
	maxThreads   = 256
	maxOpenFiles = 1024
)

// limit bounds what the process may take of the kernel. Memory and processors
// are for control groups.
func limit(j job) error {
	for _, l := range []struct {
		resource int
		most     uint64
	}{
		{unix.RLIMIT_CORE, 0},
		{unix.RLIMIT_NPROC, maxThreads},
		{unix.RLIMIT_NOFILE, maxOpenFiles},
		{unix.RLIMIT_FSIZE, j.FileBytes},
		{unix.RLIMIT_MEMLOCK, 64 << 10},
		{unix.RLIMIT_MSGQUEUE, 0},
	} {
		// Not unix.Setrlimit, which remembers NOFILE and puts it back at exec.
		rlimit := unix.Rlimit{Cur: l.most, Max: l.most}
		if err := unix.Prlimit(0, l.resource, &rlimit, nil); err != nil {
			return fmt.Errorf("resource %d: %w", l.resource, err)
		}
	}
	return nil
}

// lastCapability is above all that any kernel has: those it does not have are
// not there to be dropped.
const lastCapability = 63

// secureBits keep uid 0 from being anything special, for good.
const secureBits = 1<<0 | 1<<1 | // SECBIT_NOROOT, and locked
	1<<2 | 1<<3 | // SECBIT_NO_SETUID_FIXUP, and locked: capabilities are dropped below
	1<<5 | // SECBIT_KEEP_CAPS_LOCKED
	1<<6 | 1<<7 // SECBIT_NO_CAP_AMBIENT_RAISE, and locked (capabilities(7))

// dropBounds sees to it that no program that this process becomes can have a
// capability. What the process has itself it keeps.
func dropBounds() error {
	for c := range lastCapability + 1 {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel has no more
			return nil
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// dropPrivileges becomes uid, unless that is 0, and gives up every capability.
func dropPrivileges(uid int) error {
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, secureBits, 0, 0, 0); err != nil {
		return fmt.Errorf("set secure bits: %w", err)
	}
	if uid != 0 {
		if err := becomeUser(uid); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	return nil
}

// becomeUser changes the user and group of this thread. The wrappers in package
// syscall change all threads, which is of no use here and takes longer.
func becomeUser(uid int) error {
	id := uintptr(uid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, id, id, id); errno != 0 {
		return errno
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, id, id, id); errno != 0 {
		return errno
	}
	return nil
}

// landlockVersion is the kernel's version of Landlock, or 0 if it has none.
func landlockVersion() int {
	version, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(version)
}

// landlockRights are those that each version of Landlock knows of.
func landlockRights(version int) unix.LandlockRulesetAttr {
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1}
	for _, later := range []struct {
		since int
		files uint64
	}{
		{2, unix.LANDLOCK_ACCESS_FS_REFER}, {3, unix.LANDLOCK_ACCESS_FS_TRUNCATE}, {5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	} {
		if version >= later.since {
			attr.Handled_access_fs |= later.files
		}
	}
	if version >= 4 {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
	}
	if version >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
	}
	return attr
}

// restrictFiles lets this thread, and the program that it becomes, read the tree
// that it sees, execute it, and do nothing else to any file that it was not
// given (landlock(7)); but with own it may make files and sockets in RunDir, and
// write them.
func restrictFiles(version int, own bool) error {
	if version < 1 {
		return nil
	}
	attr := landlockRights(version)
	ruleset, _, errno := unix.RawSyscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return fmt.Errorf("make ruleset: %w", errno)
	}
	defer func() { _ = unix.Close(int(ruleset)) }()
	const look = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	if err := allowBelow(ruleset, "/", look); err != nil {
		return err
	}
	if own {
		const write = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE |
			unix.LANDLOCK_ACCESS_FS_MAKE_REG | unix.LANDLOCK_ACCESS_FS_MAKE_SOCK
		if err := allowBelow(ruleset, RunDir, write&attr.Handled_access_fs); err != nil {
			return err
		}
	}
	if _, _, errno = unix.RawSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0, 0); errno != 0 {
		return fmt.Errorf("restrict: %w", errno)
	}
	return nil
}

// allowBelow adds to a ruleset what may be done in a directory and below it.
func allowBelow(ruleset uintptr, dir string, rights uint64) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	if _, _, errno := unix.RawSyscall6(unix.SYS_LANDLOCK_ADD_RULE, ruleset, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("add rule for %s: %w", dir, errno)
	}
	return nil
}
