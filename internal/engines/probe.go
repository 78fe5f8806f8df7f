package engines

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/process"
)

// prober is a monitor whose probe machines are run to see what KVM is worth.
type prober interface {
	// monitor is its name, and part of the name of the file with its verdict.
	monitor() string
	// bare is a machine that does a little work of our own making.
	bare() (probe, error)
	// boot is a machine that boots the kernel at path, without a root.
	boot(path string) (probe, error)
}

// probe is a run of a monitor, and what it has to come to.
type probe struct {
	binary string
	args   []string
	files  []*os.File // the monitor's, from descriptor 3 on
	passed func(ending) bool
}

// rootMissing is the last that a healthy kernel says when it is given no root. It
// panics then, and reboots, which ends its monitor. A machine that only breaks
// down ends it too, but without the kernel's words.
const rootMissing = "Unable to mount root fs"

// probe runs first the bare machine and then, if there is one, a kernel. It
// returns "" when all ran as they should, or in what way they did not. An error
// means that there is nothing to be said: ctx ended, or the monitor did not start.
func (h *host) probe(ctx context.Context, p prober, kernel string) (fault string, err error) {
	fault, err = h.probeBare(ctx, p)
	if err != nil || fault != "" || kernel == "" {
		return fault, err
	}
	return h.probeKernel(ctx, p, kernel)
}

func (h *host) probeBare(ctx context.Context, p prober) (fault string, err error) {
	run, err := p.bare()
	if err != nil {
		return "", fmt.Errorf("make probe machine: %w", err)
	}
	return try(ctx, "a probe machine", h.bareBound, run)
}

func (h *host) probeKernel(ctx context.Context, p prober, kernel string) (fault string, err error) {
	run, err := p.boot(kernel)
	if err != nil {
		return "", fmt.Errorf("make probe machine with a kernel: %w", err)
	}
	return try(ctx, "a kernel in a probe machine", h.kernelBound, run)
}

// try runs p, which is what, and uses it up.
func try(ctx context.Context, what string, bound time.Duration, p probe) (fault string, err error) {
	defer closeAll(p.files)
	end, err := p.run(ctx, bound)
	if err != nil || (end.late == 0 && !end.broken && p.passed(end)) {
		return "", err
	}
	return what + " " + end.String(), nil
}

// closeAll closes files that nothing was written to by a buffer.
func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing that lasts
	}
}

// ending is how the monitor of a probe machine ended, and the end of what it said.
type ending struct {
	late    time.Duration // the bound after which it was killed, or 0
	broken  bool          // it was killed because KVM could not go on
	status  int
	console string // the guest's words
	errors  string // the monitor's own
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
		how += fmt.Sprintf(": %q", lastOf(line))
	}
	return how
}

// maxTelling bounds what is told of what was said.
const maxTelling = 200

// lastOf is the end of a long line, which says more than its beginning where
// errors are told from the outside in.
func lastOf(line string) string {
	if len(line) <= maxTelling {
		return line
	}
	return "…" + strings.ToValidUTF8(line[len(line)-maxTelling:], "")
}

// stamp is what Firecracker begins a line of its log with.
var stamp = regexp.MustCompile(`^\d{4}-[-0-9T:.]+ \[[^]]*\] `)

// telling is the first thing that the monitor said, but for warnings, or else the
// last that the guest did.
func telling(monitorSaid, guestSaid string) string {
	for line := range strings.Lines(monitorSaid) {
		if line = strings.TrimSpace(line); line != "" && !strings.Contains(line, "warning:") {
			return stamp.ReplaceAllString(line, "")
		}
	}
	guestSaid = strings.TrimSpace(guestSaid)
	return strings.TrimSpace(guestSaid[strings.LastIndexByte(guestSaid, '\n')+1:])
}

// kvmBroken is what QEMU says when KVM cannot go on with a machine. QEMU itself
// stays, and so does the machine, for somebody to look at.
const kvmBroken = "KVM internal error"

// run runs the monitor until it ends, and kills it after bound, or when KVM cannot
// go on, and whatever it has started in its session. The thread stays this
// goroutine's meanwhile, because a child's death signal comes when the thread that
// started it ends.
func (p probe) run(ctx context.Context, bound time.Duration) (ending, error) {
	bounded, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	cmd := exec.CommandContext(bounded, p.binary, p.args...)
	var console tail
	said := tail{word: kvmBroken, heard: cancel}
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &console, &said, p.files
	cmd.Env = process.Environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	err := cmd.Run()
	if ctx.Err() != nil {
		return ending{}, context.Cause(ctx)
	}
	if cmd.ProcessState == nil { // it never ran
		return ending{}, fmt.Errorf("run %s: %w", p.binary, err)
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

// memoryFile returns data as a file that is gone once it is closed.
func memoryFile(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err = f.Write(data); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
