// Package vmm says what a virtual machine monitor must do for Tine: boot a
// machine, freeze it into a memory image and a device state, and bring up any
// number of machines that share that image copy-on-write. Such a machine can be
// branched while it lives: its device state is written by SaveDevice, and its
// memory is read from outside, with package guestmem, where Memory says it is.
//
// It is the seam between Tine and the monitors (qemu, firecracker, fake). It
// knows nothing of sandboxes, snapshots' names or the guest protocol: it hands
// out a byte stream to the guest and leaves what is said on it to package guest.
package vmm

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/tinevm/tine/internal/guestmem"
)

// Engine starts virtual machines. Implementations are safe for concurrent use
// and must pass vmmtest.Run.
type Engine interface {
	// Name is the engine's short, stable name: "qemu-tcg", "qemu-kvm", "fake".
	Name() string

	// Version is the monitor's version as it reports it. It is part of a
	// snapshot: device state is only read by the version that wrote it, and, where
	// Caps has a Host, on a host that accepts the one it was written on.
	Version() string

	// Caps says what the engine can do.
	Caps() Caps

	// Start boots a machine. It returns when the monitor runs; the guest may
	// still be booting. ctx bounds the call only. When it fails, nothing of
	// the machine is left behind.
	Start(ctx context.Context, spec StartSpec) (VM, error)

	// Restore brings up a machine from a frozen one, already running. ctx
	// bounds the call only. When it fails, nothing of the machine is left
	// behind.
	Restore(ctx context.Context, spec RestoreSpec) (VM, error)

	// Adopt takes over a machine that an earlier process started, found by the
	// Handle that VM.Handle gave. It returns errdef.ErrNotFound when that
	// machine no longer runs.
	Adopt(ctx context.Context, h Handle) (VM, error)

	// Sweep clears away what machines have left on the host that no longer run, and
	// that a process started which is no more.
	Sweep(ctx context.Context) error

	// Close ends what the engine keeps ready for machines to come. Machines go
	// on.
	Close() error
}

// Caps are an engine's abilities.
type Caps struct {
	// Hardware: guest code runs on the CPU, not in an emulator.
	Hardware bool `json:"hardware"`
	// Deterministic: the engine has a mode in which a fork is a pure function
	// of its snapshot and its input.
	Deterministic bool `json:"deterministic"`
	// Model is what guests of deterministic machines see; records name it.
	Model Model `json:"-"`
	// MaxVCPUs is the largest Machine.VCPUs.
	MaxVCPUs int `json:"max_vcpus"`
	// Net: machines can have a network card, which needs a jail.
	Net bool `json:"net"`
	// Jail: a monitor that its guest has taken over can reach nothing of the
	// host. JailLacks says what its jail has not that another host's would have.
	Jail      bool     `json:"jail"`
	JailLacks []string `json:"jail_lacks,omitempty"`
	// Limits are those of Limits that this host can enforce.
	Limits LimitSupport `json:"limits"`
	// Host is what device state depends on beside the monitor; nil: on nothing.
	// Engines with Hardware have one. It is a valid one, the same for as long as the
	// engine lives, and not to be changed.
	Host *Host `json:"-"`
}

// LimitSupport says which fields of Limits can be enforced.
type LimitSupport struct {
	Memory bool `json:"memory"`
	CPU    bool `json:"cpu"`
	PIDs   bool `json:"pids"`
	IO     bool `json:"io"`
}

// Model names the models of a machine and of its processor.
type Model struct{ Machine, CPU string }

// Machine is the shape of a machine: what a guest can see of it. It is part of
// a snapshot, and a machine restored from one must have the same shape.
type Machine struct {
	MemoryMiB int `json:"memory_mib"`
	VCPUs     int `json:"vcpus"`
	// DiskMiB is the size of the scratch disk; 0 is a machine without one.
	DiskMiB int `json:"disk_mib,omitempty"`
	// Net: the machine has a network card, whose guest is configured as GuestNet
	// says. Only engines with Caps.Net have such machines.
	Net bool `json:"net,omitempty"`
	// Deterministic: the guest's clocks count its instructions, and it has no
	// device by which the host's time or anything else of the host's could reach
	// it. What is said to it is written to its Mailbox while it stands still.
	// Only engines with Caps.Deterministic have such machines, of one vCPU and
	// without disk or network card, and there is nothing in them to Dial.
	Deterministic bool `json:"deterministic,omitempty"`
	// ClockShift: an instruction of a deterministic machine takes 2^ClockShift
	// nanoseconds of the guest's time. At most MaxClockShift.
	ClockShift int `json:"clock_shift,omitempty"`
}

// The bounds of Machine.DiskMiB, unless it is 0, with any engine. A disk that is
// smaller is of little use; the L1 table of one that is larger needs more counts
// than an empty overlay of QEMU's has room for.
const (
	MinDiskMiB = 16
	MaxDiskMiB = 1 << 20
)

// MaxSocketPath is the longest path a unix socket address holds: sun_path is 108
// bytes with its terminating zero (unix(7)).
const MaxSocketPath = 107

// MaxClockShift is the largest Machine.ClockShift.
const MaxClockShift = 10

// MailboxSize is how much memory of a deterministic machine its host shares
// with its guest.
const MailboxSize = 1 << 20

// Mailbox is that memory, from offset 0 to MailboxSize. It is to be used only
// while the machine stands still.
type Mailbox interface {
	io.ReaderAt
	io.WriterAt
}

// Boot names the files a machine starts from. All are read only.
type Boot struct {
	Kernel  string // uncompressed ELF kernel
	Initrd  string // cpio archive
	Cmdline string // appended to what the engine needs
}

// Common is what Start and Restore both need.
type Common struct {
	// ID names the machine in process lists and logs.
	ID string
	// Dir is an empty directory of the machine's own, for sockets and logs. It
	// belongs to the caller, who removes it after the machine is gone. Its
	// path must be short: sockets in it have a limit of 107 bytes.
	Dir string
	// Machine is the machine's shape.
	Machine Machine
	// Root is the read-only root image, shared by all machines that use it.
	Root string
	// Leases are files that the monitor keeps open until it dies, so that a
	// lock on one lasts exactly as long as the machine. The caller keeps its
	// own copies, and closes them when it likes.
	Leases []*os.File
	// DieWithParent: the machine must not outlive this process.
	DieWithParent bool
	// Limits is what the machine may take of its host.
	Limits Limits
}

// Limits is what a machine, its monitor included, may take of its host. A field
// that is zero is no limit. One that the host cannot enforce makes Start,
// Restore and SetLimits fail with errdef.ErrUnsupported.
type Limits struct {
	// MemoryMiB bounds what the machine has of its own, and what it makes the
	// host keep in its page cache. What goes over it is killed: ErrOutOfMemory.
	MemoryMiB int `json:"memory_mib,omitempty"`
	// CPUMillis is processor time, in thousandths of a core.
	CPUMillis int `json:"cpu_millis,omitempty"`
	// PIDs is how many threads the monitor may have.
	PIDs int `json:"pids,omitempty"`
	// IOBytes is how many bytes may be read from the disk in a second, and how
	// many written.
	IOBytes int64 `json:"io_bytes,omitempty"`
}

// Usage is what a machine, its monitor included, takes of its host.
type Usage struct {
	MemoryBytes  int64         // all that counts against its limit
	PrivateBytes int64         // of that: what vanishes with it
	SharedBytes  int64         // of that: page cache
	PeakBytes    int64         // the most that it has been; 0 if not known
	CPU          time.Duration // in all
	Throttled    time.Duration // how long its limit has held it back
	PIDs         int
	ReadBytes    int64 // from and to disk; 0 if not known
	WriteBytes   int64
}

// ErrOutOfMemory is the end of a machine that went over its own limit.
var ErrOutOfMemory = errors.New("out of memory: it went over its limit")

// StartSpec is a machine to boot.
type StartSpec struct {
	Common
	Boot Boot
	// Memory is the path of the file that becomes the guest's RAM, shared: the
	// engine creates it, and after Freeze it holds the guest's memory. It must
	// not exist. Empty: RAM is private and anonymous, and the machine cannot be
	// frozen. Either way the machine cannot be branched: VM.Memory refuses.
	Memory string
	// Disk is the path of the scratch disk, a raw file of the size that Machine
	// says, which is there already. The guest writes to it, so no other machine
	// may have it until this one is gone; after Freeze it is what a restored
	// machine needs. It is given if, and only if, Machine.DiskMiB is above zero.
	Disk string
}

// RestoreSpec is a machine to bring up from a frozen one.
type RestoreSpec struct {
	Common
	// Memory is a whole image: what Freeze left, or one made from it and the
	// layers of branches. It is mapped privately: the file never changes, and
	// must not be written to, renamed or removed while the machine lives.
	Memory string
	// Device is the file of device state that Freeze or SaveDevice wrote: the
	// engine sees which. A file that is neither is errdef.ErrInvalid.
	Device string
	// Disk are the files of the frozen scratch disk, oldest first: the raw one
	// that a template had, and what FreezeDisk added. None of them changes, and
	// none may be written to, renamed or removed while the machine lives, whose
	// own writes go to files in its directory. They are given if, and only if,
	// Machine.DiskMiB is above zero.
	Disk []string
	// Fill, if not nil, completes the memory: it writes what the image lacks,
	// say the layers above it, into the space that it is given. It is called
	// once, when the memory is mapped and before the machine has loaded device
	// state or run, so that nothing reads what it has not written yet. Its
	// context is Restore's. When it fails so does Restore, with its error.
	Fill func(context.Context, guestmem.Space) error
	// Paused leaves the machine paused: call Resume to run it.
	Paused bool
}

// VM is one running machine. Its methods are safe for concurrent use.
//
// To branch a machine is Pause, SaveDevice and a copy or a freeze of Memory, in
// any order, then Resume: device state and memory belong together only if the
// machine did not run between them. That is the caller's to see to, as nothing
// here keeps another caller from resuming a machine.
type VM interface {
	// Dial opens the byte stream to the guest's agent. There is at most one at
	// a time: a second Dial waits for, or fails because of, the first. Closing
	// the stream does not disturb the guest. Bytes of an earlier stream may
	// still arrive on a new one; package guest deals with that.
	Dial(ctx context.Context) (io.ReadWriteCloser, error)

	// Freeze pauses the machine and writes its device state to the file
	// device, which must not exist. The machine stays paused; its memory is in
	// StartSpec.Memory. On error the machine is resumed. Restored machines are
	// branched instead; to freeze one is errdef.ErrInvalid. A deterministic
	// machine must be halted, and its guest must stop it when it is answered.
	Freeze(ctx context.Context, device string) error

	// Pause stops the virtual CPUs; Resume lets them run. Both are idempotent.
	// When Pause fails, as when its context ends, the machine may be paused or
	// not: a caller who gives up calls Resume all the same.
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// Paused reports whether the virtual CPUs stand still.
	Paused(ctx context.Context) (bool, error)

	// SaveDevice writes the device state of a paused machine, without its
	// memory, to the file device, which must not exist. It does not sync the
	// file. The machine stays paused whatever happens, and goes on as if
	// nothing had been when it is resumed, as often as one likes. Streams to
	// the guest stay open; a machine restored from the file begins with none.
	// It returns errdef.ErrConflict when the machine is not paused. On error
	// there is no file, unless it was there before.
	SaveDevice(ctx context.Context, device string) error

	// PrepareDisk makes FreezeDisk quick, and keeps the number of files below a
	// scratch disk within bounds: it may have the monitor join what was frozen
	// in the life of this machine, which takes as long as to copy it, and remove
	// the files that are needed no more. Call it before Pause, while the machine
	// runs. When it fails nothing is lost, and FreezeDisk works all the same.
	PrepareDisk(ctx context.Context) error

	// FreezeDisk returns the files of a paused machine's scratch disk as it is
	// now, oldest first, for RestoreSpec.Disk. None of them changes any more:
	// the machine goes on with a new layer. Those in the machine's directory
	// are there until the next PrepareDisk, so link to them before that. They
	// are not synced. It is nil for a machine without a disk, and
	// errdef.ErrConflict when the machine is not paused; a machine that was
	// booted and not restored is errdef.ErrUnsupported. On error the machine
	// can go on as if nothing had been.
	FreezeDisk(ctx context.Context) ([]string, error)

	// Memory says where the guest's RAM is mapped: a private mapping of
	// RestoreSpec.Memory, or of a copy of it that Fill has completed. Pages that are
	// not the machine's own are as they were when it was restored. It returns errdef.ErrUnsupported for a machine that
	// was booted and not restored, whose RAM is no such mapping. The space is
	// good for as long as the machine lives. What is read from it belongs to
	// one instant only while the machine is paused.
	Memory() (guestmem.Space, error)

	// Halted waits until the guest of a deterministic machine has something to
	// say and stands still, in the middle of an instruction, for want of an
	// answer. From then on until Answer, which lets it go on, the monitor does
	// nothing else: only Memory, Mailbox, Freeze and Kill may be used. Both are
	// errdef.ErrUnsupported for other machines.
	Halted(ctx context.Context) error
	Answer() error

	// Mailbox is what a deterministic machine shares with its guest; for other
	// machines it is errdef.ErrUnsupported. It is good for as long as the
	// machine lives.
	Mailbox() (Mailbox, error)

	// Link is where what the guest sends comes in. Each call gives another Link to
	// the same network, for the caller to close; of several, one gets what comes.
	// A machine without a network card has none: errdef.ErrUnsupported.
	Link() (Link, error)

	// PID is the monitor's process, or 0 where there is none.
	PID() int

	// SetLimits changes the machine's limits. When it fails some may have been
	// changed.
	SetLimits(l Limits) error

	// Usage says what the machine takes. It is errdef.ErrUnsupported where the
	// host does not count that.
	Usage() (Usage, error)

	// Handle is what Adopt needs, to be kept on disk.
	Handle() Handle

	// Done is closed when the machine is gone; Err then says why, nil meaning
	// that Kill or the guest's own power-off ended it.
	Done() <-chan struct{}
	Err() error

	// Kill ends the machine at once and waits until it is gone. It is
	// idempotent, and nil when the machine was gone already.
	Kill(ctx context.Context) error

	// Detach lets go of the machine without ending it, as when a daemon stops
	// and its machines go on. The VM is unusable afterwards.
	Detach() error
}

// Handle identifies a running machine across restarts of the daemon.
type Handle struct {
	Engine string `json:"engine"`
	PID    int    `json:"pid"`
	// StartTime is the process's start in clock ticks since boot (field 22 of
	// /proc/PID/stat): with PID it names one process for ever.
	StartTime uint64 `json:"start_time"`
	// BootID is the host's boot id: ticks of another boot mean nothing.
	BootID string `json:"boot_id"`
	Dir    string `json:"dir"`
	// Memory is the image that the machine maps privately, as an absolute path
	// without links, and empty if it maps none: VM.Memory finds the mapping by
	// it.
	Memory string `json:"memory,omitempty"`
	// Disk is RestoreSpec.Disk, as absolute paths.
	Disk []string `json:"disk,omitempty"`
	// Link are the descriptors of the machine's network, as its monitor has them.
	Link []int `json:"link,omitempty"`
	// Jailed: the monitor can open no file of the host's by its name.
	Jailed bool `json:"jailed,omitempty"`
	// Group is the name of the machine's control group, if it has one.
	Group string `json:"group,omitempty"`
}
