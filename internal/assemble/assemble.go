// Package assemble gives the command line the parts that it is made of. It is
// the one place that names concrete types, so that everything below it can be
// put together otherwise, as tests do.
package assemble

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/bench"
	"github.com/tinevm/tine/internal/cli"
	"github.com/tinevm/tine/internal/daemon"
	"github.com/tinevm/tine/internal/demo"

	"github.com/tinevm/tine/internal/engines"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/wire"
)

// Parts builds what the command line needs. They share only the version.
type Parts struct{ Version string }

// Deps returns the parts.
func (p Parts) Deps() cli.Deps {
	return cli.Deps{Serve: p.serve, Local: p.local, Demo: p.demo, Bench: p.bench, Doctor: p.doctor, Tokens: tokens()}
}

// TwinRole is the command line of this program as the helper of a live branch.
// It is the program that runs now, even when another has taken its name.
func TwinRole() []string { return []string{"/proc/self/exe", "role", "twin"} }

// LaunchRole is the command line of this program as a launcher of machines.
func LaunchRole() []string { return []string{"/proc/self/exe", "role", "launch"} }

// closeTime bounds how long a daemon may take to let go of its sandboxes.
const closeTime = 60 * time.Second

// open opens a daemon on the host that o describes; cfg says what is special
// about it. The function it returns ends it, also when ctx has ended.
func (p Parts) open(ctx context.Context, o cli.HostOptions, cfg daemon.Config) (*daemon.Daemon, func() error, error) {
	var err error
	if cfg.Agent, err = agentPath(); err != nil {
		return nil, nil, err
	}
	if o.StateDir, err = daemon.MakeStateDir(o.StateDir); err != nil {
		return nil, nil, err
	}
	if cfg.Net, err = netConfig(o.Isolation); err != nil {
		return nil, nil, err
	}
	if cfg.Engine, err = engines.Choose(ctx, engineConfig(o, cfg.Logger)); err != nil {
		return nil, nil, err
	}
	cfg.StateDir, cfg.Version, cfg.Twin = o.StateDir, p.Version, TwinRole()
	cfg.Doctor = func(ctx context.Context) []wire.DoctorCheck { return examine(ctx, o) }
	d, err := daemon.Open(ctx, cfg)
	if err != nil {
		return nil, nil, errors.Join(err, cfg.Engine.Close())
	}
	end := func() error {
		late, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeTime)
		defer cancel()
		return errors.Join(d.Close(late), cfg.Engine.Close())
	}
	return d, end, nil
}

// borrow runs use on a daemon that ends with it, and its sandboxes too.
func (p Parts) borrow(ctx context.Context, o cli.HostOptions, use func(*daemon.Daemon) error) (err error) {
	d, end, err := p.open(ctx, o, daemon.Config{Ephemeral: true, Logger: logger(o.Log, false, "")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	return use(d)
}

func (p Parts) serve(ctx context.Context, o cli.ServeOptions) (err error) {
	if err = jail.DropCapabilities(); err != nil {
		return err
	}
	d, end, err := p.open(ctx, o.HostOptions, daemon.Config{
		Limits:       sandbox.Limits{Sandboxes: o.MaxSandboxes, Branches: o.Branches},
		KeepBranches: o.KeepBranches, ForgeSnapshot: o.ForgeSnapshot, Logger: logger(o.Log, o.Verbose, o.LogFormat),
		Audit: daemon.AuditConfig{Off: o.Audit.Dir == "none", Dir: o.Audit.Dir, Sync: audit.Sync(o.Audit.Sync), Reads: o.Audit.Reads},
		Auth:  authConfig(o.Auth), TLS: auth.TLSFiles{Cert: o.Auth.TLSCert, Key: o.Auth.TLSKey, ClientCA: o.Auth.ClientCA},
		ShareSandboxes: o.Auth.Share,
		DrainTime:      o.DrainTime, OnStop: daemon.OnStop(o.OnStop),
		HTTP: daemon.HTTPLimits{
			Body: o.MaxBody, HeaderTime: o.HeaderTime, BodyTime: o.BodyTime, IdleTime: o.IdleTime, Streams: o.MaxStreams,
		},
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	socket := o.Socket
	if socket == "" {
		socket = filepath.Join(o.StateDir, "tine.sock")
	}
	var u undo.Stack
	listeners, err := d.Listen(ctx, daemon.Addresses{Socket: socket, Listen: o.Listen, Plain: o.Auth.Plain})
	if err != nil {
		return err
	}
	addresses := make([]string, len(listeners))
	for i, ln := range listeners {
		u.Add(ln.Close)
		addresses[i] = ln.Addr().Network() + "://" + ln.Addr().String()
	}
	for tag, n := range o.Pool {
		poolErr := d.Sandboxes.SetPool(ctx, tag, n)
		if errors.Is(poolErr, errdef.ErrInvalid) {
			return u.Run(fmt.Errorf("pool of %s: %w", tag, poolErr))
		}
		if poolErr != nil { // a snapshot that is gone must not keep the sandboxes from their daemon
			logger(o.Log, o.Verbose, o.LogFormat).WarnContext(ctx, "no forks are parked", "snapshot", tag, "error", poolErr)
		}
	}
	u.Release()
	defer onHangUp(ctx, d.Reload)()
	if o.Ready != nil {
		o.Ready(addresses)
	}
	err = d.Serve(ctx, listeners...)
	if ctx.Err() != nil { // it was told to stop
		d.Settle(context.WithoutCancel(ctx))
	}
	return err
}

func (p Parts) local(ctx context.Context, o cli.HostOptions) (*client.Client, func(context.Context) error, error) {
	d, end, err := p.open(ctx, o, daemon.Config{Ephemeral: true, Logger: logger(o.Log, false, "")})
	if err != nil {
		return nil, nil, err
	}
	c, stop, err := d.Local(ctx)
	if err != nil {
		return nil, nil, errors.Join(err, end())
	}
	return c, stop, nil
}

func (p Parts) demo(ctx context.Context, o cli.DemoOptions) error {
	return p.borrow(ctx, o.HostOptions, func(d *daemon.Daemon) error {
		return demo.Run(ctx, d, demo.Options{N: o.N, Out: o.Out, JSON: o.JSON})
	})
}

func (p Parts) bench(ctx context.Context, o cli.BenchOptions) error {
	return p.borrow(ctx, o.HostOptions, func(d *daemon.Daemon) error {
		if o.Snapshot == demo.Name {
			if _, err := demo.Template(ctx, d); err != nil {
				return err
			}
		}
		opts := bench.Options{
			Snapshot: o.Snapshot, Forks: o.Forks, Rounds: o.Rounds, Floor: o.Floor, Out: o.Out, JSON: o.JSON,
			Branch: o.Branch, Memory: o.Memory, Deterministic: o.Deterministic,
		}
		if o.Isolate {
			isolation, end, err := benchIsolation(ctx, o.HostOptions, d.Sandboxes.Engine.Name())
			if err != nil {
				return err
			}
			opts.Isolation = isolation
			return errors.Join(bench.Run(ctx, d, opts), end())
		}
		return bench.Run(ctx, d, opts)
	})
}

func (p Parts) doctor(ctx context.Context, o cli.HostOptions) ([]client.Check, error) {
	return examine(ctx, o), nil
}

// engineConfig says how to look for engines: with a kernel to try, once an
// image has brought one.
func engineConfig(o cli.HostOptions, log *slog.Logger) engines.Config {
	cfg := engines.Config{
		Name: o.Engine, Firecracker: o.Firecracker, CPUTemplate: o.CPUTemplate, StateDir: o.StateDir, Logger: log,
		Jail: jailConfig(o), RequireJail: o.Isolation.RequireJail,
	}
	store, err := image.Open(image.Config{Dir: filepath.Join(o.StateDir, "images")})
	if err != nil {
		return cfg // whoever needs the store will say what is wrong with it
	}
	if list, err := store.List(); err == nil && len(list) > 0 {
		cfg.Kernel = list[0].KernelPath()
	}
	return cfg
}

// agentPath finds the guest agent beside this program.
func agentPath() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	path := filepath.Join(filepath.Dir(self), "tine-agent")
	if _, err := os.Stat(path); err != nil {
		err = fmt.Errorf("%w: guest agent: %w", errdef.ErrUnavailable, err)
		return "", errdef.WithHint(err, "keep tine-agent in the directory of tine; make build builds both")
	}
	return path, nil
}

// logger writes to w, as JSON if that is the format.
func logger(w io.Writer, verbose bool, format string) *slog.Logger {
	if w == nil {
		return slog.New(slog.DiscardHandler)
	}
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	opts := &slog.HandlerOptions{Level: level}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}
