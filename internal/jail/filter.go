package jail

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What a system call filter is told of a call (struct seccomp_data of
// seccomp(2)): offsets of the number, the architecture, and the low halves of
// the arguments.
const (
	offNumber = 0
	offArch   = 4
	offArgs   = 16
)

// x32 is set in the numbers of a second set of calls, for programs with short
// pointers, that would pass by the filter.
const x32 = 0x40000000

// namespaces are the flags of clone(2) that make namespaces.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER |
	unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWCGROUP

// forbidden are calls that no monitor has use for once it was given its files,
// and with which it could reach other processes, other namespaces, or the parts
// of the kernel that break most often.
func forbidden() []uint32 {
	return []uint32{
		// Other processes.
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP, unix.SYS_PIDFD_OPEN,
		unix.SYS_PIDFD_GETFD, unix.SYS_PROCESS_MADVISE, unix.SYS_FORK, unix.SYS_VFORK,
		// Files and mounts that it was not given.
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR,
		unix.SYS_OPEN_BY_HANDLE_AT, unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_MKNOD, unix.SYS_MKNODAT, unix.SYS_QUOTACTL,
		unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_FANOTIFY_INIT,
		// Namespaces.
		unix.SYS_UNSHARE, unix.SYS_SETNS,
		// Sockets: it has all that it needs.
		unix.SYS_SOCKET, unix.SYS_CONNECT, unix.SYS_BIND,
		// The kernel itself.
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD, unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER,
		unix.SYS_IO_URING_REGISTER, unix.SYS_ADD_KEY, unix.SYS_KEYCTL, unix.SYS_REQUEST_KEY, unix.SYS_KEXEC_LOAD,
		unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_REBOOT,
		unix.SYS_SYSLOG, unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_PERSONALITY, unix.SYS_MODIFY_LDT,
		unix.SYS_CLOCK_SETTIME, unix.SYS_SETTIMEOFDAY, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
		unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME,
	}
}

// Answers of the filter.
const (
	allow  = unix.SECCOMP_RET_ALLOW
	deny   = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	absent = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	kill   = unix.SECCOMP_RET_KILL_PROCESS
	ask    = unix.SECCOMP_RET_USER_NOTIF
)

// program is a filter in the making.
type program []unix.SockFilter

func (p *program) load(offset uint32) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset})
}

func (p *program) end(answer uint32) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: answer})
}

// when does what follows in body if what was loaded compares so with k, and
// leaves it out if not.
func (p *program) when(compare uint16, k uint32, body func()) {
	jump := len(*p)
	*p = append(*p, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_K | compare, K: k})
	body()
	(*p)[jump].Jf = uint8(len(*p) - jump - 1)
}

// without clears bits of what was loaded.
func (p *program) without(bits uint32) {
	*p = append(*p, unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: ^bits})
}

// call does body for one system call. What was loaded is its number again after it.
func (p *program) call(number uint32, body func()) {
	p.when(unix.BPF_JEQ, number, func() {
		body()
		p.end(allow)
	})
}

// filter is the whole program. The opening of a file in the plain ways that
// monitors open what they are named on their command line is asked about: see
// opener. So is the execution of programs, of which there is one. With own it is
// the filter of a program that makes files and sockets of its own.
func filter(own bool) program {
	var p program
	p.load(offArch)
	p.when(unix.BPF_JEQ, unix.AUDIT_ARCH_X86_64, func() {
		p.load(offNumber)
		p.when(unix.BPF_JGE, x32, func() { p.end(absent) })
		opening := p.opening
		if own {
			opening = p.openingOwn
			p.ownSockets()
		}
		p.call(unix.SYS_OPENAT, func() { opening(2) })
		p.call(unix.SYS_OPEN, func() { opening(1) })
		p.call(unix.SYS_CLONE, func() {
			p.load(offArgs)
			p.when(unix.BPF_JSET, namespaces, func() { p.end(deny) })
			p.when(unix.BPF_JSET, unix.CLONE_THREAD, func() { p.end(allow) })
			p.end(deny)
		})
		p.call(unix.SYS_CLONE3, func() { p.end(absent) }) // its flags are out of sight; libraries fall back to clone
		for _, number := range []uint32{unix.SYS_EXECVE, unix.SYS_EXECVEAT} {
			p.call(number, func() { p.end(ask) })
		}
		for _, number := range forbidden() {
			p.when(unix.BPF_JEQ, number, func() { p.end(deny) })
		}
		p.end(allow)
	})
	p.end(kill)
	return p
}

// opening asks about a file that is opened for reading, or for both reading and
// writing: images and kernels without any other flag, devices with O_CLOEXEC.
func (p *program) opening(flags uint32) {
	p.load(offArgs + 8*flags)
	p.when(unix.BPF_JEQ, unix.O_RDONLY, func() { p.end(ask) })
	p.when(unix.BPF_JEQ, unix.O_RDWR, func() { p.end(ask) })
	p.when(unix.BPF_JEQ, unix.O_RDWR|unix.O_CLOEXEC, func() { p.end(ask) })
}

// largeFile is O_LARGEFILE, which C libraries may set where it says nothing. It
// is 0 in package unix.
const largeFile = 0x8000

// openingOwn asks about files as opening does, whatever library the program opens
// them with, and about a file that it is to write and does not cut off first: one
// that is handed to it to be filled. What is written anew goes by unasked, at any
// time: only RunDir has room for it.
func (p *program) openingOwn(flags uint32) {
	p.load(offArgs + 8*flags)
	p.without(unix.O_CLOEXEC | unix.O_NONBLOCK | largeFile)
	for _, asked := range []uint32{unix.O_RDONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_CREAT} {
		p.when(unix.BPF_JEQ, asked, func() { p.end(ask) })
	}
}

// ownSockets lets the program make stream sockets of this host, and bind them. A
// path leads it to RunDir, and a name without a path ends in its own network
// namespace. It is asked about when it would listen, and connects to nobody.
func (p *program) ownSockets() {
	p.call(unix.SYS_SOCKET, func() {
		p.load(offArgs)
		p.when(unix.BPF_JEQ, unix.AF_UNIX, func() {
			p.load(offArgs + 8)
			p.without(unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK)
			p.when(unix.BPF_JEQ, unix.SOCK_STREAM, func() { p.end(allow) })
		})
		p.end(deny)
	})
	p.call(unix.SYS_BIND, func() {})
	p.call(unix.SYS_LISTEN, func() { p.end(ask) })
}

// installFilter puts this thread, and the program that it becomes, under the
// filter, and returns the descriptor that its questions come by.
func installFilter(own bool) (listener int, err error) {
	p := filter(own)
	fprog := unix.SockFprog{Len: uint16(len(p)), Filter: &p[0]}
	fd, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return -1, fmt.Errorf("seccomp: %w", errno)
	}
	return int(fd), nil
}
