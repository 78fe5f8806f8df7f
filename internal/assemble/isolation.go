package assemble

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/network"
	"github.com/tinevm/tine/internal/sandbox"
)

// groupsName is that of the control group that all machines of a state directory
// are in. The usual one has a name that a unit can say.
func groupsName(stateDir string) string {
	if stateDir == "/var/lib/tine" {
		return "tine"
	}
	sum := sha256.Sum256([]byte(stateDir))
	return "tine-" + hex.EncodeToString(sum[:4])
}

// spareLaunchers is how many launchers wait for machines: one forks a few
// machines at a time, and each takes some 40 ms to make.
const spareLaunchers = 4

// jailConfig is the jail of a daemon on this host.
func jailConfig(o cli.HostOptions) *jail.Config {
	groups, err := cgroup.Open(cgroup.Config{Name: groupsName(o.StateDir), Disk: o.StateDir})
	var total cgroup.Limits
	if err == nil && groups.Support().Memory {
		total.MemoryBytes = totalMemory(o.Isolation)
	}
	return &jail.Config{
		Total:   total,
		Command: LaunchRole(), Dir: filepath.Join(o.StateDir, "jail"), UIDs: jail.DefaultUIDs,
		Groups: groups, NoGroups: err, Spare: spareLaunchers, Links: o.Isolation.MaxNetworks,
	}
}

// totalMemory is what all machines together may have: what was asked for, or
// nine tenths of the host's memory, so that what they take is taken from each
// other and not from the host.
func totalMemory(o cli.IsolationOptions) int64 {
	if o.TotalMemoryMiB > 0 {
		return int64(o.TotalMemoryMiB) << 20
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit) / 10 * 9
}

// benchIsolation is what a bench of isolation compares with: the same engine
// without a jail, and jails like the daemon's. The function that it returns ends
// the engine.
func benchIsolation(ctx context.Context, o cli.HostOptions, engine string) (*bench.Isolation, func() error, error) {
	cfg := engineConfig(o, logger(o.Log, false, ""))
	cfg.Name, cfg.Jail, cfg.RequireJail = engine, nil, false
	free, err := engines.Choose(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	in := jailConfig(o)
	in.Groups, in.NoGroups = cgroup.Open(cgroup.Config{Name: groupsName(o.StateDir) + "-bench", Disk: o.StateDir})
	return &bench.Isolation{Unjailed: free, Jail: *in}, free.Close, nil
}

// netConfig is what sandboxes of a daemon on this host may reach at most.
func netConfig(o cli.IsolationOptions) (sandbox.NetConfig, error) {
	cfg := sandbox.NetConfig{Bounds: egress.Bounds{Local: network.Local()}}
	for _, text := range o.NetPrivate {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			return cfg, errdef.WithHint(fmt.Errorf("%w: --net-private %s: %w", errdef.ErrInvalid, text, err), "for example --net-private 10.1.0.0/16")
		}
		cfg.Bounds.Private = append(cfg.Bounds.Private, prefix.Masked())
	}
	if err := cfg.Bounds.Validate(); err != nil {
		return cfg, err
	}
	for _, text := range o.NetResolvers {
		if !strings.Contains(text, ":") {
			text = net.JoinHostPort(text, "53")
		}
		if _, err := netip.ParseAddrPort(text); err != nil {
			return cfg, errdef.WithHint(fmt.Errorf("%w: --net-resolver %s: %w", errdef.ErrInvalid, text, err), "for example --net-resolver 9.9.9.9")
		}
		cfg.Upstream = append(cfg.Upstream, text)
	}
	if len(cfg.Upstream) == 0 {
		// Without any no name resolves, which is no reason not to start.
		cfg.Upstream, _ = network.Resolvers("/etc/resolv.conf")
	}
	return cfg, nil
}
