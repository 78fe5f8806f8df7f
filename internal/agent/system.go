package agent

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// system is what the agent does to the machine as a whole.
type system interface {
	// addEntropy mixes b into the kernel's generator and reseeds it.
	addEntropy(b []byte) error
	// setClock steps the wall clock.
	setClock(t time.Time) error
	// setHostname names the machine.
	setHostname(name string) error
	// raiseNetwork sees that the network card is up, if there is one.
	raiseNetwork() error
	// sync writes dirty pages out.
	sync()
	// powerOff ends the machine; on success it may not return.
	powerOff() error
	// spawn starts a process where a child of the agent belongs.
	spawn(path string, argv []string, attr *syscall.ProcAttr) (int, error)
	// upper opens the directory that holds what the files are beyond the image.
	upper() (*os.File, error)
	// endAll kills every process but this one, and waits until they are gone. On
	// what is not a machine, it kills those of the session that leader leads.
	endAll(leader int)
	// reapsAll: every child of this process is the agent's to wait for.
	reapsAll() bool
}

// machine is the system of an agent that is PID 1.
type machine struct {
	cgroup int      // the children's cgroup, or -1
	oom    *os.File // the agent's own oom_score_adj, or nil
	random *os.File // the kernel's generator, or nil
	over   *os.File // see Config.Upper; or nil
	card   *card    // or nil
}

func newMachine(upper *os.File, card *card) *machine {
	m := &machine{cgroup: -1, over: upper, card: card}
	if fd, err := unix.Open(childrenCgroup, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
		m.cgroup = fd
	}
	if f, err := os.OpenFile("/proc/self/oom_score_adj", os.O_WRONLY, 0); err == nil {
		m.oom = f
		_ = m.setOOM(oomNever) // without it the agent is only less safe
	}
	m.random, _ = os.OpenFile("/dev/urandom", os.O_RDWR, 0) // addEntropy says so if it is missing
	return m
}

const (
	oomNever  = "-1000"
	oomNormal = "0"

	rndAddEntropy = 0x40085203 // RNDADDENTROPY
	rndReseedCRNG = 0x5207     // RNDRESEEDCRNG
)

func (m *machine) setOOM(score string) error {
	if m.oom == nil {
		return nil
	}
	_, err := m.oom.WriteAt([]byte(score), 0)
	return err
}

func (m *machine) addEntropy(b []byte) error {
	if m.random == nil {
		return failf(errdef.ErrUnavailable, "there is no /dev/urandom")
	}
	info := binary.NativeEndian.AppendUint32(nil, uint32(len(b)*8))
	info = binary.NativeEndian.AppendUint32(info, uint32(len(b)))
	info = append(info, b...)
	_, err := control(m.random, func(fd int) (int, error) {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndAddEntropy,
			uintptr(unsafe.Pointer(&info[0]))) //nolint:gosec // x/sys has no wrapper for this ioctl
		if errno != 0 {
			return 0, os.NewSyscallError("ioctl RNDADDENTROPY", errno)
		}
		return 0, os.NewSyscallError("ioctl RNDRESEEDCRNG", unix.IoctlSetInt(fd, rndReseedCRNG, 0))
	})
	return err
}

func (m *machine) setClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return os.NewSyscallError("clock_settime", unix.ClockSettime(unix.CLOCK_REALTIME, &ts))
}

func (m *machine) setHostname(name string) error {
	return os.NewSyscallError("sethostname", unix.Sethostname([]byte(name)))
}

func (m *machine) raiseNetwork() error {
	if m.card == nil {
		return nil
	}
	return m.card.raise()
}

func (m *machine) sync() { unix.Sync() }

// powerOff resets the machine, which ends it, as monitors are told not to
// start it again. The ordinary way out would wait for ever: in Linux 6.1 the
// shutdown of virtio-pmem asks the host for a flush whose answer never comes.
func (m *machine) powerOff() error {
	return os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0)
}

func (m *machine) upper() (*os.File, error) {
	if m.over == nil {
		return nil, failf(errdef.ErrUnsupported, "this machine's files are not kept apart from its image")
	}
	fd, err := unix.Openat(int(m.over.Fd()), ".", openDir, 0)
	if err != nil {
		return nil, os.NewSyscallError("openat", err)
	}
	return os.NewFile(uintptr(fd), "upper"), nil
}

// endAll waits for the children's cgroup to be empty, but not for ever: what
// has got out of it is as good as gone.
func (m *machine) endAll(int) {
	const patience, pause = 5 * time.Second, time.Millisecond
	for begun := time.Now(); time.Since(begun) < patience; {
		_ = syscall.Kill(-1, syscall.SIGKILL) // there may be none
		const longest = 1 << 10
		text, err := readSmall(childrenCgroup+"/cgroup.events", longest)
		if err != nil || strings.Contains(string(text), "populated 0") {
			return
		}
		ts := unix.NsecToTimespec(int64(pause))
		_ = unix.Nanosleep(&ts, nil)
	}
}

func (m *machine) reapsAll() bool { return os.Getpid() == 1 }

// spawn makes the child an ordinary victim of the out-of-memory killer and puts
// it in the children's cgroup. The score is inherited, so it is the agent's own
// that changes for a moment: there is no instant at which the child or its
// children have the agent's.
func (m *machine) spawn(path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	if m.cgroup >= 0 {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, m.cgroup
	}
	if err := m.setOOM(oomNormal); err != nil {
		return 0, fmt.Errorf("prepare child: %w", err)
	}
	pid, err := syscall.ForkExec(path, argv, attr)
	if oomErr := m.setOOM(oomNever); oomErr != nil && err == nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		return pid, fmt.Errorf("protect agent: %w", oomErr)
	}
	return pid, err
}

// Fake stands in for a machine: it records what would have been done to it. An
// agent with a Fake keeps the machine's own files, /etc/hostname and the like,
// below the Fake's directory, and waits only for its own children.
type Fake struct {
	dir string

	mu    sync.Mutex
	calls []string
}

// NewFake returns a Fake whose files are below dir, which must exist.
func NewFake(dir string) *Fake { return &Fake{dir: dir} }

// Calls returns what was done so far, in order.
func (f *Fake) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

func (f *Fake) record(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	const kept = 1000
	if len(f.calls) < kept {
		f.calls = append(f.calls, fmt.Sprintf(format, args...))
	}
}

func (f *Fake) addEntropy(b []byte) error {
	f.record("entropy %d", len(b))
	return nil
}

func (f *Fake) setClock(t time.Time) error {
	f.record("clock %d", t.UnixNano())
	return nil
}

func (f *Fake) setHostname(name string) error {
	f.record("hostname %s", name)
	return nil
}

func (f *Fake) raiseNetwork() error { return nil }

func (f *Fake) sync() { f.record("sync") }

func (f *Fake) powerOff() error {
	f.record("power off")
	return nil
}

func (f *Fake) upper() (*os.File, error) { return os.Open(f.dir) }

func (f *Fake) endAll(leader int) { killSession(leader) }

func (f *Fake) reapsAll() bool { return false }

func (f *Fake) spawn(path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	return syscall.ForkExec(path, argv, attr)
}
