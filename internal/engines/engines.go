// Package engines knows the engines of this version of Tine, and chooses the
// best one that can really run a machine on this host.
//
// A /dev/kvm that opens proves nothing: there are hosts where it opens, makes a
// machine, and cannot run an ordinary kernel in it. So KVM counts only when
// the CPU shows its virtualisation and a probe machine has started within a
// bound. The verdict is kept in the state directory until the next boot;
// docs/engines.md describes it. The package runs no machine but the probes.
package engines

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmm/qemu"
)

// The names that Config.Name can have.
const (
	Auto        = "auto" // the best that is usable
	Firecracker = firecracker.Name
	QEMUKVM     = "qemu-kvm"
	QEMUTCG     = "qemu-tcg"
)

// Config says what to choose from.
type Config struct {
	// Name is one of the names above; empty means Auto.
	Name string
	// StateDir is where verdicts on KVM are kept; empty means nowhere. It is
	// not created when it is missing.
	StateDir string
	// Kernel is the path of an uncompressed kernel that the probe of KVM boots
	// as well; empty, or a path where there is none, leaves that part out.
	Kernel string
	// QEMU is its path or name in $PATH; empty means qemu-system-x86_64.
	QEMU string
	// Firecracker is its path or name in $PATH; empty means firecracker.
	Firecracker string
	// CPUTemplate is what guests of Firecracker see of the processor, by name or
	// as the path of a file; empty means all of it. Other engines have none.
	CPUTemplate string
	// Jail is where monitors run, as far as this host can have it; nil: nowhere.
	// With RequireJail an engine is not usable with less than a whole one.
	Jail        *jail.Config
	RequireJail bool
	// Logger may be nil.
	Logger *slog.Logger
}

// Report says whether an engine can be used on this host.
type Report struct {
	Name   string `json:"name"`
	Usable bool   `json:"usable"`
	// Reason says why it is usable, or why not.
	Reason string `json:"reason"`
	// Hint is what to do about it.
	Hint string `json:"hint,omitempty"`
	// Version is the monitor's, and Caps what it can do, when the engine is usable.
	Version string   `json:"version,omitempty"`
	Caps    vmm.Caps `json:"-"`
	// Err is nil for a usable engine. It is errdef.ErrUnsupported when nothing
	// on this host could make the engine usable.
	Err error `json:"-"`
}

// Choose returns the engine that cfg names, or under Auto the first usable one
// in the order firecracker, qemu-kvm, qemu-tcg. It returns errdef.ErrUnavailable
// or errdef.ErrUnsupported, with a reason and perhaps a hint, when that engine
// cannot be used here, and errdef.ErrInvalid for an unknown name.
func Choose(ctx context.Context, cfg Config) (vmm.Engine, error) {
	return newHost(cfg).choose(ctx)
}

// Survey examines all engines, in the order in which Auto tries them.
func Survey(ctx context.Context, cfg Config) []Report {
	return newHost(cfg).survey(ctx)
}

// host is where engines are looked for. Tests put a host of their own here.
type host struct {
	cfg         Config
	log         *slog.Logger
	cpuinfo     string        // path of /proc/cpuinfo
	device      string        // path of /dev/kvm
	askBound    time.Duration // for a monitor to say its version, and for its jail
	bareBound   time.Duration
	kernelBound time.Duration
}

func newHost(cfg Config) *host {
	h := &host{
		cfg: cfg, log: cfg.Logger,
		cpuinfo: "/proc/cpuinfo", device: "/dev/kvm",
		// Many times what a good host takes: a slow one, as an emulated one is, must
		// not be taken for a broken one.
		askBound: time.Minute, bareBound: time.Minute, kernelBound: time.Minute,
	}
	if h.cfg.QEMU == "" {
		h.cfg.QEMU = "qemu-system-x86_64"
	}
	if h.cfg.Firecracker == "" {
		h.cfg.Firecracker = "firecracker"
	}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	return h
}

// candidate is an engine that may be usable.
type candidate struct {
	name string
	// open returns the engine and why it is usable, or an error that says why
	// it is not.
	open func(ctx context.Context) (vmm.Engine, string, error)
}

// candidates are all engines, the best first.
func (h *host) candidates() []candidate {
	return []candidate{
		{Firecracker, h.openFirecracker},
		{QEMUKVM, h.openKVM},
		{QEMUTCG, h.openTCG},
	}
}

func (h *host) choose(ctx context.Context) (vmm.Engine, error) {
	all := h.candidates()
	if h.cfg.Name == "" || h.cfg.Name == Auto {
		return h.first(ctx, all)
	}
	names := []string{Auto}
	for _, c := range all {
		if c.name == h.cfg.Name {
			return h.open(ctx, c)
		}
		names = append(names, c.name)
	}
	return nil, fmt.Errorf("%w: engine %q: want one of %s", errdef.ErrInvalid, h.cfg.Name, strings.Join(names, ", "))
}

// first returns the first engine that is usable, or the last one's error: that
// one asks the least of a host. What is wrong with the wish, and not with the
// host, no other engine makes right.
func (h *host) first(ctx context.Context, all []candidate) (engine vmm.Engine, err error) {
	for _, c := range all {
		engine, err = h.open(ctx, c)
		if err == nil || ctx.Err() != nil || (errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrUnavailable)) {
			break
		}
		h.log.DebugContext(ctx, "engine is not usable", "engine", c.name, "error", err)
	}
	return engine, err
}

func (h *host) open(ctx context.Context, c candidate) (vmm.Engine, error) {
	engine, why, err := c.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open engine %s: %w", c.name, err)
	}
	h.log.InfoContext(ctx, "engine is chosen", "engine", c.name, "version", engine.Version(), "reason", why)
	if h.cfg.CPUTemplate != "" && c.name != Firecracker {
		h.log.WarnContext(ctx, "CPU template is not used: only firecracker has them", "engine", c.name)
	}
	return engine, nil
}

func (h *host) survey(ctx context.Context) []Report {
	all := h.candidates()
	reports := make([]Report, 0, len(all))
	for _, c := range all {
		engine, why, err := c.open(ctx)
		r := Report{Name: c.name, Usable: err == nil, Reason: why, Err: err}
		if err == nil {
			r.Version, r.Caps = engine.Version(), engine.Caps()
			r.Err = engine.Close()
		} else {
			r.Reason, r.Hint = reason(err), errdef.Hint(err)
		}
		reports = append(reports, r)
	}
	return reports
}

// reason is err without the category, which Usable says already.
func reason(err error) string {
	text := err.Error()
	if category := errdef.FromCode(errdef.Code(err)); category != nil {
		text = strings.TrimPrefix(text, category.Error()+": ")
	}
	return text
}

func (h *host) openFirecracker(ctx context.Context) (vmm.Engine, string, error) {
	return h.onKVM(ctx, firecrackerProber{h.cfg.Firecracker}, h.firecracker)
}

func (h *host) openKVM(ctx context.Context) (vmm.Engine, string, error) {
	return h.onKVM(ctx, qemuProber{h.cfg.QEMU, qemu.KVM}, h.qemu(qemu.KVM))
}

func (h *host) openTCG(ctx context.Context) (vmm.Engine, string, error) {
	engine, err := h.jailed(ctx, h.qemu(qemu.TCG))
	if err != nil {
		return nil, "", err
	}
	return engine, "software emulation, on any host", nil
}

// opener opens an engine in a jail, nil for none.
type opener func(context.Context, *jail.Config) (vmm.Engine, error)

func (h *host) firecracker(ctx context.Context, in *jail.Config) (vmm.Engine, error) {
	engine, err := firecracker.New(ctx, firecracker.Config{
		Binary: h.cfg.Firecracker, CPUTemplate: h.cfg.CPUTemplate, Jail: in, Logger: h.cfg.Logger,
	})
	if err != nil && errdef.Hint(err) == "" {
		err = errdef.WithHint(err, "name a release of Firecracker with --firecracker, or use another --engine")
	}
	return engine, err
}

func (h *host) qemu(accel qemu.Accel) opener {
	return func(ctx context.Context, in *jail.Config) (vmm.Engine, error) {
		return qemu.New(ctx, qemu.Config{Binary: h.cfg.QEMU, Accel: accel, Jail: in, Logger: h.cfg.Logger})
	}
}

// onKVM opens an engine that needs KVM. It asks for what costs nothing first.
func (h *host) onKVM(ctx context.Context, p prober, open opener) (vmm.Engine, string, error) {
	if err := h.hardware(); err != nil {
		return nil, "", err
	}
	engine, err := h.jailed(ctx, open)
	if err != nil {
		return nil, "", err
	}
	v, err := h.verdict(ctx, p, engine.Version())
	if err == nil && !v.Usable {
		err = h.refuse(v)
	}
	if err != nil {
		return nil, "", errors.Join(err, engine.Close())
	}
	return engine, v.Reason, nil
}

// jailed opens an engine in the jail, and where there can be none, and there need
// not be one, without.
func (h *host) jailed(ctx context.Context, open opener) (vmm.Engine, error) {
	ctx, cancel := context.WithTimeout(ctx, h.askBound)
	defer cancel()
	engine, err := open(ctx, h.cfg.Jail)
	if h.cfg.Jail != nil && errors.Is(err, errdef.ErrUnsupported) && !h.cfg.RequireJail {
		why := err
		if engine, err = open(ctx, nil); err == nil {
			h.log.WarnContext(ctx, "machines run without a jail", "error", why)
		}
	}
	if err != nil {
		return nil, err
	}
	if caps := engine.Caps(); h.cfg.RequireJail && (!caps.Jail || len(caps.JailLacks) > 0) {
		err = fmt.Errorf("%w: the jail of this host lacks %s", errdef.ErrUnsupported, strings.Join(caps.JailLacks, "; "))
		return nil, errors.Join(errdef.WithHint(err, "leave out --require-jail, or see docs/isolation.md for what a host must have"), engine.Close())
	}
	return engine, nil
}
