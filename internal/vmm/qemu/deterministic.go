package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// A deterministic machine has one processor, whose clocks count instructions,
// and only devices that do all their work while the processor waits for them:
// the root image is plain memory to the guest, and the console a ring buffer.
// There is no device whose work the host ends in its own time. (A virtio-pmem is
// one: a guest can ask it for a flush.) So nothing of the host's time reaches
// the guest, and it can only be spoken to while it stands still.

const (
	// maxDeterministicMiB keeps all of the memory below 4 GiB, where a
	// guest-physical address is an offset in the memory's file.
	maxDeterministicMiB = 3 << 10
	// rootAt is the guest-physical address of the root image: the first that
	// QEMU gives to memory that is plugged in.
	rootAt = 4 << 30
	// mailboxAt is the guest-physical address of the mailbox. The kernel loads
	// at 16 MiB, and initramfs and firmware are at the other end of memory.
	mailboxAt = 8 << 20
	// The ports of guestproto: that of pvpanic (docs/specs/pvpanic.txt in QEMU's
	// sources), and two of which each byte goes to a file.
	portStop = 0x505
	portPing = 0x508
	portGate = 0x509
	// epoch is what the machine's clock shows when it is switched on.
	epoch = "2025-01-01T00:00:00"
)

// checkDeterministic refuses what only an ordinary machine can be or have.
func (e *Engine) checkDeterministic(m vmm.Machine) error {
	switch {
	case !m.Deterministic && m.ClockShift == 0:
		return nil
	case !m.Deterministic:
		return fmt.Errorf("%w: a clock shift is for deterministic machines", errdef.ErrInvalid)
	case e.accel != TCG:
		return fmt.Errorf("%w: deterministic machines need emulation: %s runs guest code on the processor, whose instructions nobody counts", errdef.ErrUnsupported, e.Name())
	case m.VCPUs != 1:
		return fmt.Errorf("%w: a deterministic machine of %d vCPUs: it has one", errdef.ErrInvalid, m.VCPUs)
	case m.DiskMiB != 0:
		return fmt.Errorf("%w: a deterministic machine with a scratch disk: a disk works in the host's time", errdef.ErrInvalid)
	case m.Net:
		return fmt.Errorf("%w: a deterministic machine with a network card: packets come in the host's time", errdef.ErrInvalid)
	case m.ClockShift < 0 || m.ClockShift > vmm.MaxClockShift:
		return fmt.Errorf("%w: clock shift %d: 0 to %d are possible", errdef.ErrInvalid, m.ClockShift, vmm.MaxClockShift)
	case m.MemoryMiB > maxDeterministicMiB:
		return fmt.Errorf("%w: a deterministic machine of %d MiB: %d at most", errdef.ErrInvalid, m.MemoryMiB, maxDeterministicMiB)
	}
	return nil
}

// deterministicCmdline tells the kernel where the mailbox is, which it must
// leave alone, and that the root image is persistent memory. A kernel that is
// told so gives it page structures, and with them DAX, as it does for
// virtio-pmem and not for an NVDIMM that the firmware describes.
func (e *Engine) deterministicCmdline(root string) (string, error) {
	info, err := os.Stat(root)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("console=ttyS0 quiet swiotlb=noforce panic=-1 reboot=t no_timer_check 8250.nr_uarts=1 cryptomgr.notests "+
		"mitigations=off tsc=reliable memmap=%#x$%#x memmap=%#x!%#x tine.mode=deterministic tine.mailbox=%#x",
		vmm.MailboxSize, mailboxAt, info.Size(), int64(rootAt), mailboxAt), nil
}

// deterministicModel is QEMU's name of the processor.
const deterministicModel = "Nehalem-v1"

// deterministicCPU is a processor without RDRAND and RDSEED, which would be
// the host's random numbers, and what makes its time a count of instructions.
// With sleep=off a guest that waits does so at once.
func deterministicCPU(shift int) []string {
	return []string{
		"-accel", "tcg,thread=single,tb-size=64", "-cpu", deterministicModel,
		"-icount", "shift=" + strconv.Itoa(shift) + ",sleep=off",
		"-rtc", "base=" + epoch + ",clock=vm", "-seed", "1",
	}
}

// deterministic adds the root image, the port that stops the machine, and those
// by which the guest calls.
func (l *launcher) deterministic() (err error) {
	if l.gate, err = newGate(); err != nil {
		return fmt.Errorf("make a gate: %w", err)
	}
	l.args = append(l.args,
		"-device", fmt.Sprintf("nvdimm,memdev=root,unarmed=on,addr=%#x", int64(rootAt)),
		"-device", fmt.Sprintf("pvpanic,ioport=%#x", portStop), "-action", "panic=pause")
	for i, port := range []struct {
		at   int
		file *os.File
	}{{portPing, l.gate.pingIn}, {portGate, l.gate.passIn}} {
		// Writing to a file is the one thing that QEMU does at once and, when
		// the file takes nothing, goes on trying.
		l.args = append(l.args,
			"-add-fd", fmt.Sprintf("fd=%d,set=%d", l.give(port.file), i+1),
			"-chardev", fmt.Sprintf("file,id=port%d,append=on,path=/dev/fdset/%d", i+1, i+1),
			"-device", fmt.Sprintf("isa-debugcon,iobase=%#x,chardev=port%d", port.at, i+1))
	}
	return nil
}

// gate is how the guest of a deterministic machine calls its host and waits. A
// byte that it writes to one port comes out of ping. The other port leads into
// a pipe that holds one byte and no more, and is full: the instruction that
// writes to it ends when a byte is taken out of pass. QEMU waits for that with
// its lock held, so no clock, timer or device goes on meanwhile. (To pause the
// machine instead is not exact: until QEMU's main thread comes to do it, it may
// find the processor idle, and then sets the guest's clock forward to its next
// timer.)
type gate struct {
	ping, pass     *os.File // ours to read
	pingIn, passIn *os.File // QEMU has copies
}

func newGate() (g *gate, err error) {
	g = &gate{}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if g.ping, g.pingIn, err = newPipe(0); err != nil {
		return g, err
	}
	if g.pass, g.passIn, err = newPipe(unix.O_DIRECT); err != nil {
		return g, err
	}
	_, err = control(g.passIn, fillPipe)
	return g, err
}

// fillPipe leaves no room in a pipe of packets.
func fillPipe(fd int) (int, error) {
	// One page is one slot, and that is for one packet, however small.
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, os.Getpagesize()); err != nil {
		return 0, os.NewSyscallError("fcntl F_SETPIPE_SZ", err)
	}
	n, err := unix.Write(fd, []byte{0})
	return n, os.NewSyscallError("write", err)
}

func newPipe(flags int) (r, w *os.File, err error) {
	var fds [2]int
	if err = unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK|flags); err != nil {
		return nil, nil, os.NewSyscallError("pipe2", err)
	}
	return os.NewFile(uintptr(fds[0]), "gate"), os.NewFile(uintptr(fds[1]), "gate"), nil
}

// control calls f with the file's descriptor, without making it blocking.
func control(file *os.File, f func(fd int) (int, error)) (n int, err error) {
	raw, err := file.SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(fd uintptr) { n, err = f(int(fd)) })
	return n, errors.Join(controlErr, err)
}

// handed is for when QEMU has its copies. It has made its pipe one of bytes, as
// many as fit a slot: the flag is the pipe's own, so it can be set again. Without
// ours the other one ends with QEMU.
func (g *gate) handed() error {
	_, err := control(g.passIn, func(fd int) (int, error) {
		return unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_DIRECT|unix.O_NONBLOCK)
	})
	return errors.Join(os.NewSyscallError("fcntl F_SETFL", err), g.pingIn.Close())
}

func (g *gate) close() {
	if g == nil {
		return
	}
	for _, f := range []*os.File{g.ping, g.pass, g.pingIn, g.passIn} {
		if f != nil {
			_ = f.Close() // twice is once
		}
	}
}

// arm makes a deterministic machine's gate ready, before the guest can come to
// it. The control connection is made, too: later QEMU would not greet.
func (m *machine) arm(ctx context.Context) error {
	if m.gate == nil {
		return nil
	}
	if _, err := m.monitor(ctx); err != nil {
		return m.gone(err)
	}
	return m.gate.handed()
}

// Halted waits for the guest to call.
func (m *machine) Halted(ctx context.Context) error {
	if m.gate == nil {
		return m.notDeterministic()
	}
	if err := m.gate.ping.SetReadDeadline(time.Time{}); err != nil {
		return m.gone(err)
	}
	stop := context.AfterFunc(ctx, func() { _ = m.gate.ping.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	_, err := m.gate.ping.Read(b[:])
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return m.gone(err)
}

// Answer opens the gate for one byte.
func (m *machine) Answer() error {
	if m.gate == nil {
		return m.notDeterministic()
	}
	// It is full, unless the guest goes its own ways.
	if err := m.gate.pass.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
		return m.gone(err)
	}
	var b [1]byte
	_, err := m.gate.pass.Read(b[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("%w: the guest does not wait for an answer", errdef.ErrUnavailable)
	}
	if err != nil {
		return m.gone(err)
	}
	return nil
}

// gone says why QEMU does not answer: its files close a little before it ends.
func (m *machine) gone(err error) error {
	select {
	case <-m.Done():
	case <-time.After(time.Second):
	}
	return m.Ended(err)
}

// haltExactly lets the guest go on, which stops the machine, and waits for that.
//
// The processor stands still at that instruction, but for QEMU's main thread the
// machine runs until it has heard of it. If it hears late, it finds an idle
// processor and sets the clock forward to the next timer, once; if it is quick,
// and there before the processor has come to a stop, it does not. So that one
// snapshot is like the other it is made to be late: it shares a CPU with the
// processor's thread, which it may not interrupt.
func (m *machine) haltExactly(ctx context.Context) error {
	control, err := m.monitor(ctx)
	if err != nil {
		return err
	}
	control.watch(eventStop)
	if err = m.delayMain(); err == nil {
		err = m.Answer()
	}
	if err == nil {
		err = control.await(ctx, eventStop)
	}
	if err != nil {
		return m.Ended(fmt.Errorf("stop exactly: %w", err))
	}
	return nil
}

// delayMain puts QEMU's main thread and that of the processor on one CPU, and
// has the former wait until the latter sleeps.
func (m *machine) delayMain() error {
	processor, err := processorThread(m.handle.PID)
	if err != nil {
		return err
	}
	var allowed, one unix.CPUSet
	if err = unix.SchedGetaffinity(processor, &allowed); err != nil {
		return os.NewSyscallError("sched_getaffinity", err)
	}
	for cpu := 0; one.Count() == 0 && cpu < len(allowed)*bits.UintSize; cpu++ {
		if allowed.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	for _, tid := range []int{m.handle.PID, processor} {
		if err = unix.SchedSetaffinity(tid, &one); err != nil {
			return os.NewSyscallError("sched_setaffinity", err)
		}
	}
	// One of that policy interrupts no other when it wakes up.
	attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}
	return os.NewSyscallError("sched_setattr", unix.SchedSetAttr(m.handle.PID, attr, 0))
}

// processorThread finds QEMU's thread for the processor by its name.
func processorThread(pid int) (tid int, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil {
		return 0, err
	}
	for _, task := range tasks {
		name, err := os.ReadFile(filepath.Join(task, "comm"))
		if err == nil && strings.HasSuffix(strings.TrimSpace(string(name)), "/TCG") {
			return strconv.Atoi(filepath.Base(task))
		}
	}
	return 0, fmt.Errorf("%w: thread of the processor of QEMU %d", errdef.ErrNotFound, pid)
}

// Mailbox is a window on the memory of a fork, or on the file of a template's,
// which QEMU maps shared.
func (m *machine) Mailbox() (vmm.Mailbox, error) {
	switch {
	case m.gate == nil:
		return nil, m.notDeterministic()
	case m.handle.Memory == "" && m.shared == "":
		return nil, fmt.Errorf("%w: the memory of this machine is not in a file", errdef.ErrUnsupported)
	case m.handle.Memory == "":
		return window{m.openShared}, nil
	}
	space, err := m.Memory()
	if err != nil {
		return nil, err
	}
	return window{func() (memory, error) { return spaceMemory{space}, nil }}, nil
}

func (m *machine) notDeterministic() error {
	return fmt.Errorf("%w: machine in %s is not deterministic", errdef.ErrUnsupported, m.handle.Dir)
}

func (m *machine) openShared() (memory, error) { return os.OpenFile(m.shared, os.O_RDWR, 0) }

// memory is a guest's memory while it is looked at.
type memory interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
}

// spaceMemory is the memory of a fork, which needs no closing.
type spaceMemory struct {
	vmm.Mailbox
}

func (spaceMemory) Close() error { return nil }

// window is the mailbox within a machine's memory.
type window struct {
	open func() (memory, error)
}

func (w window) ReadAt(p []byte, off int64) (int, error) { return w.move(memory.ReadAt, p, off) }

func (w window) WriteAt(p []byte, off int64) (int, error) { return w.move(memory.WriteAt, p, off) }

func (w window) move(call func(memory, []byte, int64) (int, error), p []byte, off int64) (n int, err error) {
	if off < 0 || off > vmm.MailboxSize || int64(len(p)) > vmm.MailboxSize-off {
		return 0, fmt.Errorf("%w: %d bytes at offset %d of a mailbox", errdef.ErrInvalid, len(p), off)
	}
	m, err := w.open()
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	return call(m, p, mailboxAt+off)
}

// forgetHostClocks makes zeros of what is of the host's clocks in a frozen
// machine's device state: two offsets, which a machine that counts instructions
// has no use for. Nothing else of it differs from one making of a snapshot to
// the next. The section is vmstate_timers in QEMU's softmmu/cpu-timers.c: after
// its name, its instance and its version come the ticks' offset, a number that
// is not used, and the clock's offset, of 8 bytes each.
func forgetHostClocks(f *os.File) error {
	const offsets = 24
	head := []byte("\x05timer\x00\x00\x00\x00\x00\x00\x00\x02")
	state, err := io.ReadAll(io.NewSectionReader(f, 0, maxState))
	if err != nil {
		return err
	}
	if bytes.Count(state, head) != 1 {
		return nil // of a QEMU that writes it otherwise; it is only harder to compare
	}
	at := bytes.Index(state, head) + len(head)
	if at+offsets > len(state) {
		return nil
	}
	_, err = f.WriteAt(make([]byte, offsets), int64(at))
	return err
}

// eventStop tells that the machine has stopped.
const eventStop = "STOP"

// watch has await know of these events, from now on.
func (m *monitor) watch(events ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen = map[string]bool{}
	for _, e := range events {
		m.seen[e] = false
	}
}

// note remembers an event that is watched for.
func (m *monitor) note(event string) {
	if _, watched := m.seen[event]; watched {
		m.seen[event] = true
	}
}

// await reads until an event has come that is watched for.
func (m *monitor) await(ctx context.Context, event string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errNoAnswer
	}
	stop := m.bound(ctx)
	defer stop()
	for !m.seen[event] {
		if !m.in.Scan() {
			m.dead = true
			return errors.Join(errNoAnswer, m.in.Err(), context.Cause(ctx))
		}
		var r reply
		if err := decode(m.in.Bytes(), &r); err != nil {
			m.dead = true
			return err
		}
		m.note(r.Event)
	}
	return nil
}
