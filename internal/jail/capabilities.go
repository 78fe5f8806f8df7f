package jail

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// used are the capabilities that a daemon that is root has a use for. What builds
// images makes file systems as root, and has to have all that this takes.
func used() []int {
	return []int{
		unix.CAP_SYS_ADMIN,                                 // namespaces, mounts, control groups; to suspend a filter for a twin
		unix.CAP_SYS_PTRACE,                                // memory of machines, twins, descriptors of their networks
		unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETPCAP, // users of their own for machines
		unix.CAP_KILL,             // machines are other users' processes
		unix.CAP_SYS_NICE,         // where a deterministic machine's threads run
		unix.CAP_NET_BIND_SERVICE, // --listen :443
		unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_CHOWN, unix.CAP_FOWNER, unix.CAP_FSETID,
		unix.CAP_MKNOD, unix.CAP_SYS_CHROOT, unix.CAP_SETFCAP, // images
	}
}

// DropCapabilities gives up, in all threads and for all programs that this one
// starts, the capabilities that a daemon has no use for. It does nothing for one
// that is not root.
func DropCapabilities() error {
	if os.Geteuid() != 0 {
		return nil
	}
	var keep [2]uint32
	kept := map[int]bool{}
	for _, c := range used() {
		keep[c/32] |= 1 << (c % 32)
		kept[c] = true
	}
	for c := range lastCapability + 1 {
		if kept[c] {
			continue
		}
		_, _, errno := syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0)
		if errno != 0 && !errors.Is(errno, unix.EINVAL) { // the kernel may not know it
			return fmt.Errorf("give up capability %d: %w", c, errno)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&header, &has[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	for i := range has {
		has[i].Effective &= keep[i]
		has[i].Permitted &= keep[i]
		has[i].Inheritable &= keep[i]
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&has[0])), 0)
	if errno != 0 {
		return fmt.Errorf("give up capabilities: %w", errno)
	}
	return nil
}
