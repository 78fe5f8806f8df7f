package daemon

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/auth"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// openAuth reads the credentials, and what TLS listeners show.
func (d *Daemon) openAuth() (err error) {
	cfg := d.cfg.Auth
	cfg.Store, cfg.Logger, cfg.Certificates = auth.StorePath(d.cfg.StateDir), d.log, d.cfg.TLS.ClientCA != ""
	cfg.Signed = auth.SignedPath(d.cfg.StateDir)
	if d.guard, err = auth.Open(cfg); err != nil {
		return err
	}
	d.certs, err = auth.OpenTLS(d.cfg.TLS, d.log)
	return err
}

// Reload reads credentials and certificates again, as the daemon does by itself
// when their files have changed. What cannot be used is logged, and leaves what
// was there before.
func (d *Daemon) Reload() {
	if d.guard != nil {
		d.guard.Reload()
	}
	if d.certs != nil {
		d.certs.Reload()
	}
	d.witness.reloaded()
}

// placed is the context of what comes by ln.
func placed(ctx context.Context, ln net.Listener) context.Context {
	if _, ok := ln.(*memoryListener); ok {
		return auth.Inside(ctx)
	}
	return ctx
}

// Addresses say where to serve.
type Addresses struct {
	Socket string // path of a unix socket, or "" for none
	Listen string // TCP address, or "" for none
	// Plain allows an address that other hosts reach without TLS, where whoever
	// is on the way reads the tokens.
	Plain bool
}

// Listen opens the addresses. One that other hosts can reach is refused unless
// callers must show who they are, over TLS.
func (d *Daemon) Listen(ctx context.Context, at Addresses) (_ []net.Listener, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	var listeners []net.Listener
	if at.Socket != "" {
		ln, listenErr := listenSocket(ctx, at.Socket)
		if listenErr != nil {
			return nil, listenErr
		}
		u.Add(ln.Close)
		listeners = append(listeners, ln)
	}
	if at.Listen != "" {
		ln, listenErr := d.listenTCP(ctx, at)
		if listenErr != nil {
			return nil, listenErr
		}
		listeners = append(listeners, ln)
	}
	return listeners, nil
}

// listenSocket replaces a socket that an earlier daemon left; the lock says
// that there is no other now.
func listenSocket(ctx context.Context, path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	// Nobody else may connect, from the first moment on.
	private := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var chmodErr error
		controlErr := c.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(controlErr, chmodErr)
	}}
	ln, err := private.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln, nil
}

func (d *Daemon) listenTCP(ctx context.Context, at Addresses) (net.Listener, error) {
	if err := d.checkExposure(ctx, at); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", at.Listen)
	if err != nil {
		return nil, fmt.Errorf("%w: listen: %w", errdef.ErrUnavailable, err)
	}
	if d.certs != nil {
		ln = tls.NewListener(ln, d.certs.Config())
	}
	return ln, nil
}

// checkExposure refuses an address that lets in more than was meant.
func (d *Daemon) checkExposure(ctx context.Context, at Addresses) error {
	host, _, err := net.SplitHostPort(at.Listen)
	if err != nil {
		return fmt.Errorf("%w: listen address %q: %w", errdef.ErrInvalid, at.Listen, err)
	}
	if ip := net.ParseIP(host); host == "localhost" || (ip != nil && ip.IsLoopback()) {
		return nil
	}
	switch {
	case d.guard == nil || !d.guard.Required():
		return errdef.WithHint(
			fmt.Errorf("%w: refusing to listen on %s without authentication", errdef.ErrDenied, at.Listen),
			"use a loopback address, as in --listen 127.0.0.1:8889, or give --token-file or --tls-client-ca, or make a token: tine token create")
	case d.certs == nil && !at.Plain:
		return errdef.WithHint(
			fmt.Errorf("%w: refusing to listen on %s without TLS", errdef.ErrDenied, at.Listen),
			"give --tls-cert and --tls-key, or --insecure-plain where something else encrypts")
	case d.certs == nil:
		d.log.WarnContext(ctx, "serving without TLS: whoever is on the way can read the tokens", slog.String("listen", at.Listen))
	}
	return nil
}
