package jail

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
)

// interpret runs a filter as the kernel does (struct seccomp_data: number,
// architecture, instruction pointer, six arguments).
func interpret(p program, arch, number uint32, args ...uint64) (uint32, error) {
	data := make([]byte, 64)
	binary.LittleEndian.PutUint32(data[0:], number)
	binary.LittleEndian.PutUint32(data[4:], arch)
	for i, a := range args {
		binary.LittleEndian.PutUint64(data[16+8*i:], a)
	}
	var acc uint32
	for pc := 0; pc < len(p); pc++ {
		in := p[pc]
		var taken bool
		switch in.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			if in.K%4 != 0 || in.K+4 > uint32(len(data)) {
				return 0, fmt.Errorf("instruction %d loads from %d", pc, in.K)
			}
			acc = binary.LittleEndian.Uint32(data[in.K:])
			continue
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			acc &= in.K
			continue
		case unix.BPF_RET | unix.BPF_K:
			return in.K, nil
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			taken = acc == in.K
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			taken = acc >= in.K
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			taken = acc&in.K != 0
		default:
			return 0, fmt.Errorf("instruction %d has code %x", pc, in.Code)
		}
		if taken {
			pc += int(in.Jt)
		} else {
			pc += int(in.Jf)
		}
	}
	return 0, fmt.Errorf("ran off the end")
}

func TestFilter(t *testing.T) {
	t.Parallel()
	const (
		i386, arm = unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64
		x86       = unix.AUDIT_ARCH_X86_64
		thread    = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM
		high      = 1 << 32 // the kernel looks at the low half of these arguments only
	)
	type call struct {
		arch, number uint32
		args         []uint64
	}
	tests := []struct {
		name string
		call call
		want uint32
	}{
		{"read", call{x86, unix.SYS_READ, nil}, allow},
		{"ioctl", call{x86, unix.SYS_IOCTL, nil}, allow},
		{"mmap", call{x86, unix.SYS_MMAP, nil}, allow},
		{"futex", call{x86, unix.SYS_FUTEX, nil}, allow},
		{"accept4", call{x86, unix.SYS_ACCEPT4, nil}, allow},
		{"recvmsg", call{x86, unix.SYS_RECVMSG, nil}, allow},
		{"sendmsg", call{x86, unix.SYS_SENDMSG, nil}, allow},
		{"exit", call{x86, unix.SYS_EXIT_GROUP, nil}, allow},
		{"i386", call{i386, unix.SYS_READ, nil}, kill},
		{"i386-execve", call{i386, 11, nil}, kill},
		{"arm", call{arm, unix.SYS_READ, nil}, kill},
		{"no-arch", call{0, unix.SYS_READ, nil}, kill},
		{"x32", call{x86, x32, nil}, absent},
		{"x32-ptrace", call{x86, x32 | 521, nil}, absent},
		{"x32-getpid", call{x86, x32 | unix.SYS_GETPID, nil}, absent},
		{"negative", call{x86, 0xffffffff, nil}, absent},
		{"execve", call{x86, unix.SYS_EXECVE, nil}, ask},
		{"execveat", call{x86, unix.SYS_EXECVEAT, nil}, ask},
		{"clone3", call{x86, unix.SYS_CLONE3, nil}, absent},
		{"thread", call{x86, unix.SYS_CLONE, []uint64{thread}}, allow},
		{"thread-high", call{x86, unix.SYS_CLONE, []uint64{thread | high}}, allow},
		{"process", call{x86, unix.SYS_CLONE, []uint64{uint64(unix.SIGCHLD)}}, deny},
		{"process-high", call{x86, unix.SYS_CLONE, []uint64{thread << 32}}, deny},
		{"vm-process", call{x86, unix.SYS_CLONE, []uint64{unix.CLONE_VM | unix.CLONE_VFORK}}, deny},
		{"user", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWUSER}}, deny},
		{"net", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWNET}}, deny},
		{"mnt", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWNS}}, deny},
		{"pid", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWPID | high}}, deny},
		{"uts", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWUTS}}, deny},
		{"ipc", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWIPC}}, deny},
		{"cgroup", call{x86, unix.SYS_CLONE, []uint64{thread | unix.CLONE_NEWCGROUP}}, deny},
		{"open", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDONLY}}, ask},
		{"open-both", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDWR}}, ask},
		{"open-device", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDWR | unix.O_CLOEXEC}}, ask},
		{"open-high", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDWR | high}}, ask},
		{"open-library", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDONLY | unix.O_CLOEXEC}}, allow},
		{"open-create", call{x86, unix.SYS_OPEN, []uint64{1, unix.O_RDWR | unix.O_CREAT}}, allow},
		{"openat", call{x86, unix.SYS_OPENAT, []uint64{0, 1, unix.O_RDONLY}}, ask},
		{"openat-both", call{x86, unix.SYS_OPENAT, []uint64{0, 1, unix.O_RDWR}}, ask},
		{"openat-device", call{x86, unix.SYS_OPENAT, []uint64{0, 1, unix.O_RDWR | unix.O_CLOEXEC}}, ask},
		{"openat-library", call{x86, unix.SYS_OPENAT, []uint64{0, 1, unix.O_RDONLY | unix.O_CLOEXEC}}, allow},
		{"openat-write", call{x86, unix.SYS_OPENAT, []uint64{0, 1, unix.O_WRONLY}}, allow},
	}
	// With files of its own a program is asked about more.
	more := []string{"open-library", "openat-library"}
	for _, own := range []bool{false, true} {
		p := filter(own)
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%s-%t", tt.name, own), func(t *testing.T) {
				t.Parallel()
				want := tt.want
				if own && slices.Contains(more, tt.name) {
					want = ask
				}
				got, err := interpret(p, tt.call.arch, tt.call.number, tt.call.args...)
				if err != nil || got != want {
					t.Errorf("answer %x, %v, want %x", got, err, want)
				}
			})
		}
	}
}

// What the filter of a program with files of its own says where others' say no.
func TestFilterOwn(t *testing.T) {
	t.Parallel()
	const makes, anew = unix.O_WRONLY | unix.O_CREAT, unix.O_WRONLY | unix.O_CREAT | unix.O_TRUNC
	const stream, flags = unix.SOCK_STREAM, unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	opening := map[uint64]uint32{
		unix.O_RDONLY: ask, unix.O_RDWR: ask, makes: ask, anew: allow, unix.O_WRONLY: allow, unix.O_WRONLY | unix.O_TRUNC: allow,
		unix.O_RDWR | unix.O_CREAT: allow, makes | unix.O_EXCL: allow, unix.O_RDONLY | unix.O_DIRECTORY: allow, unix.O_PATH: allow,
	}
	p := filter(true)
	check := func(want, number uint32, args ...uint64) {
		t.Helper()
		if got, err := interpret(p, unix.AUDIT_ARCH_X86_64, number, args...); err != nil || got != want {
			t.Errorf("answer to call %d with %x is %x, %v, want %x", number, args, got, err, want)
		}
	}
	for how, want := range opening {
		for _, with := range []uint64{0, unix.O_CLOEXEC, unix.O_NONBLOCK, largeFile, unix.O_CLOEXEC | unix.O_NONBLOCK | largeFile} {
			check(want, unix.SYS_OPEN, 1, how|with)
			check(want, unix.SYS_OPENAT, 0, 1, how|with)
		}
	}
	check(allow, unix.SYS_SOCKET, unix.AF_UNIX, stream)
	check(allow, unix.SYS_SOCKET, unix.AF_UNIX, stream|flags)
	for domain := range uint64(64) {
		for kind := range uint64(16) {
			if domain != unix.AF_UNIX || kind != stream {
				check(deny, unix.SYS_SOCKET, domain, kind|flags)
			}
		}
	}
	check(allow, unix.SYS_BIND, 3)
	check(ask, unix.SYS_LISTEN, 3)
	check(deny, unix.SYS_CONNECT, 3)
}

// TestFilterKnowsEveryCall: every number has the answer that its list says. A
// jump of a filter reaches over 255 instructions, so a list that is too long
// would make another filter.
func TestFilterKnowsEveryCall(t *testing.T) {
	t.Parallel()
	for _, own := range []bool{false, true} {
		t.Run(strconv.FormatBool(own), func(t *testing.T) {
			t.Parallel()
			knowsEveryCall(t, own)
		})
	}
}

func knowsEveryCall(t *testing.T, own bool) {
	t.Helper()
	p := filter(own)
	special := []uint32{unix.SYS_OPEN, unix.SYS_OPENAT, unix.SYS_CLONE, unix.SYS_CLONE3, unix.SYS_EXECVE, unix.SYS_EXECVEAT}
	if own {
		special = append(special, unix.SYS_SOCKET, unix.SYS_BIND, unix.SYS_LISTEN)
	}
	for number := range uint32(1024) {
		got, err := interpret(p, unix.AUDIT_ARCH_X86_64, number, 0, 0, 0, 0, 0, 0)
		if err != nil {
			t.Fatal(err)
		}
		want := uint32(allow)
		if slices.Contains(forbidden(), number) {
			want = deny
		}
		if !slices.Contains(special, number) && got != want {
			t.Errorf("answer to call %d is %x, want %x", number, got, want)
		}
		if got, err = interpret(p, unix.AUDIT_ARCH_I386, number); err != nil || got != kill {
			t.Errorf("answer to call %d of i386 is %x, %v", number, got, err)
		}
	}
	if most := 256; len(p) > most {
		t.Errorf("filter of %d instructions", len(p))
	}
}
