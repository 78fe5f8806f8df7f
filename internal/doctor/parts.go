package doctor

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// engines reports the engine that a daemon would use, and then each one.
func (x *examiner) engines(ctx context.Context) []Check {
	if x.cfg.Engines == nil {
		return []Check{{Status: Skip, Detail: "not surveyed"}}
	}
	reports := x.cfg.Engines(ctx)
	checks := []Check{chosen(x.cfg.Engine, reports)}
	for _, r := range reports {
		if r.Usable && (x.cfg.Engine == engines.Auto || x.cfg.Engine == r.Name) {
			checks = append(checks, jailCheck(r.Caps), limitsCheck(r.Caps), networkCheck(r.Caps))
			break
		}
	}
	for _, r := range reports {
		checks = append(checks, engineCheck(r))
	}
	return checks
}

// chosen says what becomes of the wish for the engine name.
func chosen(name string, reports []engines.Report) Check {
	hint := ""
	for _, r := range reports {
		if name != engines.Auto && name != r.Name {
			continue
		}
		if r.Usable {
			return Check{Status: OK, Detail: name + " means " + r.Name}
		}
		hint = r.Hint // under auto the last one's, which asks the least of a host
	}
	if name == engines.Auto {
		return Check{Status: Fail, Detail: "none can be used", Hint: hint}
	}
	if hint == "" {
		hint = "use --engine " + engines.Auto
	}
	return Check{Status: Fail, Detail: name + " cannot be used", Hint: hint}
}

// jailCheck says what a machine's monitor is kept in. A host that lacks something
// works; what it lacks is said, and what to do about it.
func jailCheck(c vmm.Caps) Check {
	check := Check{Name: "jail", Status: OK, Detail: "a user, namespaces, a root, a system call filter and Landlock for each machine"}
	switch {
	case !c.Jail:
		check.Status, check.Detail = Warn, "none: "+strings.Join(c.JailLacks, "; ")
		check.Hint = "run as root, or allow unprivileged user namespaces: sysctl user.max_user_namespaces"
	case len(c.JailLacks) > 0:
		check.Status, check.Detail = Warn, "in force, but it lacks "+strings.Join(c.JailLacks, "; ")
		check.Hint = "docs/isolation.md says what a host must have; --require-jail refuses to start with less"
	}
	return check
}

// limitsCheck says which limits on machines this host enforces.
func limitsCheck(c vmm.Caps) Check {
	var has, lacks []string
	for _, l := range []struct {
		name string
		can  bool
	}{{"memory", c.Limits.Memory}, {"processors", c.Limits.CPU}, {"processes", c.Limits.PIDs}, {"disk bandwidth", c.Limits.IO}} {
		if l.can {
			has = append(has, l.name)
		} else {
			lacks = append(lacks, l.name)
		}
	}
	check := Check{Name: "limits", Status: OK, Detail: "on " + strings.Join(has, ", ")}
	if len(lacks) > 0 {
		check.Status, check.Detail = Warn, "none on "+strings.Join(lacks, ", ")
		check.Hint = "they need control groups: run as root, or in a unit with Delegate=yes"
	}
	return check
}

func networkCheck(c vmm.Caps) Check {
	if !c.Net {
		return Check{
			Name: "network", Status: Warn, Detail: "machines can have no network card",
			Hint: "that takes the jail, nftables, and a /dev/net/tun that the daemon may open: modprobe tun, or run as root",
		}
	}
	return Check{Name: "network", Status: OK, Detail: "machines can have a network card, in a namespace of their own"}
}

func engineCheck(r engines.Report) Check {
	c := Check{Name: "engine " + r.Name, Status: Warn, Detail: r.Reason, Hint: r.Hint}
	switch {
	case r.Usable:
		c.Status = OK
		c.Detail = fmt.Sprintf("%s: %s; %s", r.Version, r.Reason, abilities(r.Caps))
		if host := r.Caps.Host; host != nil {
			c.Detail += "; its snapshots are for hosts like this one: " + host.String()
		}
	case errors.Is(r.Err, errdef.ErrUnsupported):
		c.Status = Skip
	}
	return c
}

// abilities are those that engines differ in.
func abilities(c vmm.Caps) string {
	text := "guests are emulated"
	if c.Hardware {
		text = "guests run on the processor"
	}
	text += fmt.Sprintf(", with up to %d of their own", c.MaxVCPUs)
	if c.Deterministic {
		text += ", and deterministically if asked to"
	}
	return text
}

// tools are a warning at most: images that are built need none of them.
func (x *examiner) tools(context.Context) []Check {
	var checks []Check
	for _, t := range x.cfg.Tools() {
		c := Check{Name: "tool " + t.Name, Status: OK, Detail: t.Path}
		if t.Err != nil {
			c.Status, c.Detail, c.Hint = Warn, "missing: "+t.Why, "apt-get install "+t.Package
		}
		checks = append(checks, c)
	}
	return checks
}

// agent checks the program that becomes a guest's init: in an initramfs there
// is nothing for it to be linked with.
func (x *examiner) agent(context.Context) Check {
	const hint = "make build"
	path := x.cfg.Agent
	if path == "" {
		return Check{Status: Skip, Detail: "not looked for"}
	}
	f, err := elf.Open(path)
	if err != nil {
		return Check{Status: Fail, Detail: err.Error(), Hint: hint}
	}
	defer func() { _ = f.Close() }() // only read
	if f.Machine != elf.EM_X86_64 {
		return Check{Status: Fail, Detail: fmt.Sprintf("%s is for %v", path, f.Machine), Hint: hint}
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return Check{Status: Fail, Detail: path + " is not static", Hint: hint}
		}
	}
	return Check{Status: OK, Detail: path}
}

// daemon asks the daemon whether it is up. That none runs is no fault.
func (x *examiner) daemon(ctx context.Context) Check {
	path := x.cfg.Socket
	err := health(ctx, path)
	switch {
	case err == nil:
		return Check{Status: OK, Detail: "answers on " + path}
	case errors.Is(err, fs.ErrNotExist):
		return Check{Status: Skip, Detail: "none runs"}
	case errors.Is(err, syscall.ECONNREFUSED):
		return Check{Status: Skip, Detail: "none runs; one that died left its socket, which the next replaces"}
	case errors.Is(err, fs.ErrPermission):
		return Check{Status: Warn, Detail: "not ours to ask: " + err.Error(), Hint: "run as the daemon's user"}
	default:
		return Check{Status: Fail, Detail: err.Error(), Hint: "restart tine serve; its sandboxes live on"}
	}
}

// health returns nil if a daemon on the unix socket path says that it is up.
func health(ctx context.Context, path string) error {
	var d net.Dialer
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", path) },
		DisableKeepAlives:      true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tine/healthz", nil)
	if err != nil {
		return err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close() // not read
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the daemon on %s answers %s", path, resp.Status)
	}
	return nil
}
