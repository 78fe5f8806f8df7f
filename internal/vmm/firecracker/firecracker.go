// Package firecracker runs machines in Firecracker, on hosts with KVM.
//
// Firecracker is told everything by name, through an HTTP interface on a unix
// socket, and makes its sockets and files itself. The names are the same for all
// machines, and are frozen with a machine's devices: root, disk, memory and so on.
// What they mean is for each machine to say. In the jail they are opened by it on
// the machine's behalf; without one they are links in the machine's directory,
// which is where Firecracker then works.
//
// A template's memory is written by Firecracker when it is frozen. A fork maps
// that file privately, and its own memory is found, copied and completed from
// outside, by package guestmem, as that of any engine: Firecracker is only asked
// for the state of its devices. docs/engines.md says how, and what it costs.
package firecracker

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
	"github.com/tinevm/tine/internal/vmm/process"
)

// Config says which Firecracker to use and how.
type Config struct {
	// Binary is Firecracker's path or name in $PATH; empty means firecracker.
	Binary string
	// CPUTemplate is one of Firecracker's own templates by its name (T2, T2S, T2CL,
	// T2A, C3), or the path of a file with a template of the user's; empty: guests
	// see the host's CPU, and their snapshots are for it alone.
	CPUTemplate string
	// Jail is where Firecracker runs, nil for no jail. Its Program and OwnFiles are
	// filled in here.
	Jail *jail.Config
	// Logger may be nil.
	Logger *slog.Logger

	// Tests have others; the zero values stand for answerTime and kvmDevice.
	answer time.Duration
	kvm    string
}

// Name is the engine's.
const Name = "firecracker"

// Engine is Firecracker. It is safe for concurrent use.
type Engine struct {
	binary   string
	version  api.Version
	template cpuTemplate
	host     vmm.Host
	keeper   process.Keeper
	answer   time.Duration // answerTime
	kvm      string        // kvmDevice
}

var _ vmm.Engine = (*Engine)(nil)

// cpuTemplate is what guests are to see of the CPU: a name or JSON, or neither.
type cpuTemplate struct {
	name   string
	custom json.RawMessage
	title  string // for snapshots: the name, or a file's with its digest
}

// New finds Firecracker and asks for its version. It returns
// errdef.ErrUnavailable, with a hint, when there is none, and
// errdef.ErrUnsupported when its version is not one that this package knows, or
// when a jail is asked for that this host cannot have. It does not look whether
// KVM works. The caller closes the engine.
func New(ctx context.Context, cfg Config) (*Engine, error) {
	name := cfg.Binary
	if name == "" {
		name = "firecracker"
	}
	binary, err := exec.LookPath(name)
	if err != nil {
		err = fmt.Errorf("%w: find Firecracker: %w", errdef.ErrUnavailable, err)
		return nil, errdef.WithHint(err, "put a release of Firecracker in $PATH as firecracker, or name it with --firecracker")
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return nil, err
	}
	e := &Engine{
		binary: binary, keeper: process.Keeper{Engine: Name, Monitor: "Firecracker", Logger: cfg.Logger},
		answer: cmp.Or(cfg.answer, answerTime), kvm: cmp.Or(cfg.kvm, kvmDevice),
	}
	if e.keeper.Logger == nil {
		e.keeper.Logger = slog.New(slog.DiscardHandler)
	}
	if e.version, err = askVersion(ctx, binary, e.answer); err != nil {
		return nil, err
	}
	if e.template, err = readTemplate(cfg.CPUTemplate); err != nil {
		return nil, err
	}
	if e.host, err = vmm.ThisHost(); err != nil {
		return nil, err
	}
	e.host.Template = e.template.title
	if cfg.Jail != nil {
		jailed := *cfg.Jail
		jailed.Program, jailed.Others, jailed.OwnFiles = binary, nil, true
		if e.keeper.Jail, err = jail.Open(ctx, jailed); err != nil {
			return nil, err
		}
	}
	return e, nil
}

// askVersion runs a program that says "Firecracker v1.16.1" and more.
func askVersion(ctx context.Context, binary string, most time.Duration) (api.Version, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Env = process.Environment()
	cmd.WaitDelay = most // for what it may have left behind, with our pipe
	out, err := process.Output(cmd, 64<<10)
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("no answer: %w", context.Cause(ctx))
		}
		return api.Version{}, fmt.Errorf("%w: ask %s for its version: %w", errdef.ErrUnavailable, binary, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	number, found := strings.CutPrefix(strings.TrimSpace(line), "Firecracker ")
	if !found {
		return api.Version{}, fmt.Errorf("%w: %s does not say that it is Firecracker", errdef.ErrUnavailable, binary)
	}
	version, err := api.ParseVersion(number)
	if err != nil { // in one category: it is not for the user to change what he asked for
		return api.Version{}, fmt.Errorf("%w: ask %s for its version: %s", errdef.ErrUnavailable, binary, err.Error())
	}
	return version, version.Check()
}

// staticTemplates are those that Firecracker has, in upper case and digits.
var staticTemplates = regexp.MustCompile(`^[A-Z][A-Z0-9]{1,7}$`)

// maxTemplate bounds the file of a CPU template: it is sent in one request.
const maxTemplate = 48 << 10

func readTemplate(name string) (cpuTemplate, error) {
	if name == "" || staticTemplates.MatchString(name) {
		return cpuTemplate{name: name, title: name}, nil
	}
	text, err := readTemplateFile(name)
	if err == nil && !json.Valid(text) {
		err = errors.New("it is not JSON")
	}
	if err != nil {
		err = fmt.Errorf("%w: CPU template %s: %w", errdef.ErrInvalid, name, err)
		return cpuTemplate{}, errdef.WithHint(err, "a template is one of Firecracker's own (T2, T2S, T2CL, T2A, C3), or a file as its cpu-template-helper writes")
	}
	plain := strings.Map(func(r rune) rune {
		if r > ' ' && r < 0x7f {
			return r
		}
		return '?'
	}, filepath.Base(name))
	return cpuTemplate{custom: text, title: fmt.Sprintf("%.40s@%x", plain, sha256.Sum256(text))}, nil
}

func readTemplateFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe would wait
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err != nil {
		return nil, err
	}
	return readAll(f, maxTemplate)
}

// Name is "firecracker".
func (e *Engine) Name() string { return Name }

// Version is Firecracker's.
func (e *Engine) Version() string { return e.version.String() }

// maxVCPUs is Firecracker's own bound (MachineConfiguration in its OpenAPI
// document).
const maxVCPUs = 32

// Caps says what Firecracker can do.
func (e *Engine) Caps() vmm.Caps {
	return e.keeper.Caps(vmm.Caps{Hardware: true, Host: &e.host, MaxVCPUs: maxVCPUs})
}

// Sweep removes the control groups of machines that are no more.
func (e *Engine) Sweep(ctx context.Context) error { return e.keeper.Sweep(ctx) }

// Close ends the launchers that wait for machines.
func (e *Engine) Close() error { return e.keeper.Close() }

// Adopt takes over a machine whose process is still the one in h.
func (e *Engine) Adopt(ctx context.Context, h vmm.Handle) (vmm.VM, error) {
	m := &machine{engine: e, handle: h, ready: make(chan struct{})}
	defer close(m.ready)
	var err error
	if m.Process, err = e.keeper.Adopt(h, m.hooks()); err != nil { //nolint:contextcheck // it is watched for as long as it lives
		return nil, err
	}
	if m.place, err = openPlace(h); err == nil {
		err = m.connect(ctx)
	}
	if err != nil {
		return nil, errors.Join(m.Ended(fmt.Errorf("adopt machine in %s: %w", h.Dir, err)), m.Detach())
	}
	return m, nil
}

// check refuses the shapes that no machine of Firecracker's can have.
func (e *Engine) check(c vmm.Common) error {
	m := c.Machine
	switch {
	case m.Deterministic:
		err := fmt.Errorf("%w: deterministic machines need emulation: Firecracker runs guest code on the processor, whose instructions nobody counts", errdef.ErrUnsupported)
		return errdef.WithHint(err, "use --engine qemu-tcg for it")
	case m.ClockShift != 0:
		return fmt.Errorf("%w: a clock shift is for deterministic machines", errdef.ErrInvalid)
	case m.MemoryMiB < 64 || m.MemoryMiB > 1<<20:
		return fmt.Errorf("%w: memory of %d MiB", errdef.ErrInvalid, m.MemoryMiB)
	case m.VCPUs < 1 || m.VCPUs > maxVCPUs:
		return fmt.Errorf("%w: %d vCPUs: 1 to %d are possible", errdef.ErrInvalid, m.VCPUs, maxVCPUs)
	case m.DiskMiB != 0 && (m.DiskMiB < vmm.MinDiskMiB || m.DiskMiB > vmm.MaxDiskMiB):
		return fmt.Errorf("%w: a disk of %d MiB: %d to %d are possible", errdef.ErrInvalid, m.DiskMiB, vmm.MinDiskMiB, vmm.MaxDiskMiB)
	case e.keeper.Jail == nil && len(filepath.Join(c.Dir, agentSocket)) > vmm.MaxSocketPath:
		return fmt.Errorf("%w: socket path in %s is longer than %d bytes", errdef.ErrInvalid, c.Dir, vmm.MaxSocketPath)
	}
	return nil
}
