package engines

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/qemu"
)

// probe runs first the ROM and then, if there is one, a kernel. It returns ""
// when all ran as they should, or in what way they did not. An error means
// that there is nothing to be said: ctx ended, or QEMU did not start.
func (h *host) probe(ctx context.Context, accel qemu.Accel, kernel string) (fault string, err error) {
	fault, err = h.probeROM(ctx, accel)
	if err != nil || fault != "" || kernel == "" {
		return fault, err
	}
	return h.probeKernel(ctx, accel, kernel)
}

// probeROM runs a firmware of our own, that ends QEMU with a status of its own.
func (h *host) probeROM(ctx context.Context, accel qemu.Accel) (fault string, err error) {
	rom, err := openROM()
	if err != nil {
		return "", fmt.Errorf("make probe ROM: %w", err)
	}
	defer func() { _ = rom.Close() }() // nothing that lasts
	args := append(machine(accel, "16M"),
		"-bios", "/dev/fd/3",
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=1", romPort))
	end, err := h.run(ctx, h.romBound, args, rom)
	if err != nil || end.status == romStatus {
		return "", err
	}
	return "a probe machine " + end.String(), nil
}

// rootMissing is the last that a healthy kernel says when it is given no root.
const rootMissing = "Unable to mount root fs"

// probeKernel boots a real kernel, which panics for lack of a root, and
// reboots, which ends QEMU. A machine that only breaks down does that too, but
// without the kernel's words.
func (h *host) probeKernel(ctx context.Context, accel qemu.Accel, kernel string) (fault string, err error) {
	args := append(machine(accel, "128M"),
		"-serial", "stdio", "-kernel", kernel,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t no_timer_check 8250.nr_uarts=1 cryptomgr.notests")
	end, err := h.run(ctx, h.kernelBound, args)
	if err != nil || (end.status == 0 && strings.Contains(end.console, rootMissing)) {
		return "", err
	}
	return "a kernel in a probe machine " + end.String(), nil
}

// machine is the kind of machine that the engine makes, without its devices.
func machine(accel qemu.Accel, memory string) []string {
	cpu := "max"
	if accel == qemu.KVM {
		cpu = "host"
	}
	return []string{
		"-name", "tine-probe", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "pc,hpet=off,vmport=off,usb=off,smm=off,graphics=off,i8042=off",
		"-accel", string(accel), "-cpu", cpu, "-m", memory,
	}
}

// ending is how a probe machine's QEMU ended, and the end of what it said.
type ending struct {
	late    time.Duration // the bound after which it was killed, or 0
	broken  bool          // it was killed because KVM could not go on
	status  int
	console string // the guest's words
	errors  string // QEMU's own
}

// String completes a sentence that begins with the machine.
func (e ending) String() string {
	how := fmt.Sprintf("ended with status %d", e.status)
	switch {
	case e.broken:
		how = "broke down"
	case e.late != 0:
		how = fmt.Sprintf("had not ended after %v", e.late)
	}
	if line := telling(e.errors, e.console); line != "" {
		how += fmt.Sprintf(": %.200q", line)
	}
	return how
}

// telling is the first thing that QEMU said, but for warnings, or else the last
// that the guest did.
func telling(qemuSaid, guestSaid string) string {
	for line := range strings.Lines(qemuSaid) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "warning:") {
			return line
		}
	}
	guestSaid = strings.TrimSpace(guestSaid)
	return strings.TrimSpace(guestSaid[strings.LastIndexByte(guestSaid, '\n')+1:])
}

// kvmBroken is what QEMU says when KVM cannot go on with a machine. QEMU itself
// stays, and so does the machine, for somebody to look at.
const kvmBroken = "KVM internal error"

// run runs QEMU until it ends, and kills it after bound, or when KVM cannot go
// on. The thread stays this
// goroutine's meanwhile, because a child's death signal comes when the thread
// that started it ends.
func (h *host) run(ctx context.Context, bound time.Duration, args []string, files ...*os.File) (ending, error) {
	bounded, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	cmd := exec.CommandContext(bounded, h.cfg.QEMU, args...)
	var console tail
	said := tail{word: kvmBroken, heard: cancel}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &console, &said, files
	cmd.Env = []string{"PATH=" + os.DevNull, "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	err := cmd.Run()
	if ctx.Err() != nil {
		return ending{}, context.Cause(ctx)
	}
	if cmd.ProcessState == nil { // it never ran
		return ending{}, fmt.Errorf("run QEMU: %w", err)
	}
	end := ending{status: cmd.ProcessState.ExitCode(), console: console.String(), errors: said.String()}
	if end.status < 0 { // it was killed
		end.broken = strings.Contains(end.errors, kvmBroken)
		if !end.broken && errors.Is(bounded.Err(), context.DeadlineExceeded) {
			end.late = bound
		}
	}
	return end, nil
}

// tail keeps the last words of one who may talk for ever.
type tail struct {
	text  []byte
	word  string // if it is not empty, heard is called when this was said
	heard func()
}

const maxTail = 16 << 10

// Write takes words as they come.
func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p[max(0, len(p)-maxTail):]...)
	if t.word != "" && bytes.Contains(t.text, []byte(t.word)) {
		t.heard()
	}
	if extra := len(t.text) - maxTail; extra > 0 {
		t.text = append(t.text[:0], t.text[extra:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(bytes.ToValidUTF8(t.text, []byte("?"))) }

// openROM returns the probe's ROM as a file that is gone once it is closed.
func openROM() (_ *os.File, err error) {
	fd, err := unix.MemfdCreate("tine-probe-rom", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "probe ROM")
	if _, err = f.Write(romImage()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
