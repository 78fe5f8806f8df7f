package agent

import (
	"context"
	"errors"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/relink"
)

const (
	vsockPort = 10789
	hostCID   = 2
)

// serveVsock serves hosts on vsock. The kernel drops all connections when the
// machine is frozen, also in the one that goes on; so streams outlive them.
func (a *Agent) serveVsock(ctx context.Context) error {
	listener, err := listenVsock()
	if err != nil {
		return err
	}
	return a.ServeHosts(ctx, listener, relink.Grace)
}

// ServeHosts serves the hosts whose connections come from an Acceptor, which
// belongs to it, until that fails or ctx ends. It serves one at a time; a new one
// takes the place of the old. One that is without a connection for grace is gone:
// what processes have to say to it keeps them no longer.
func (a *Agent) ServeHosts(ctx context.Context, from relink.Acceptor, grace time.Duration) error {
	hosts := relink.Listen(from, grace)
	defer hosts.Close() //nolint:errcheck // nothing is lost with it
	stop := context.AfterFunc(ctx, func() { _ = from.Close() })
	defer stop()
	end := func() {}
	defer func() { end() }()
	for {
		stream, err := hosts.Accept()
		switch {
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return err
		}
		end()
		end = a.serveConn(ctx, stream)
	}
}

// serveConn serves a stream until it ends or end is called.
func (a *Agent) serveConn(ctx context.Context, stream io.ReadWriteCloser) (end func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := a.Serve(ctx, stream); err != nil && ctx.Err() == nil {
			a.log.WarnContext(ctx, "serve", "error", err)
		}
		_ = stream.Close() // it ended, or end closed it
	}()
	return func() {
		_ = stream.Close()
		<-done
	}
}

// vsock is a socket that listens to the host.
type vsock struct {
	file *os.File
	raw  syscall.RawConn
}

func listenVsock() (*vsock, error) {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	v := &vsock{file: os.NewFile(uintptr(fd), "vsock")}
	if err = unix.Bind(fd, &unix.SockaddrVM{CID: unix.VMADDR_CID_ANY, Port: vsockPort}); err != nil {
		return nil, errors.Join(os.NewSyscallError("bind", err), v.Close())
	}
	if err = unix.Listen(fd, 4); err != nil {
		return nil, errors.Join(os.NewSyscallError("listen", err), v.Close())
	}
	if v.raw, err = v.file.SyscallConn(); err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return v, nil
}

func (v *vsock) Close() error { return v.file.Close() }

// Accept waits for a connection of the host; others are turned away.
func (v *vsock) Accept() (io.ReadWriteCloser, error) {
	for {
		var fd int
		var from unix.Sockaddr
		var aerr error
		err := v.raw.Read(func(l uintptr) bool {
			fd, from, aerr = unix.Accept4(int(l), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return !errors.Is(aerr, unix.EAGAIN)
		})
		if err == nil {
			err = aerr
		}
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.ECONNABORTED) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("accept", err)
		}
		if vm, ok := from.(*unix.SockaddrVM); ok && vm.CID == hostCID {
			return os.NewFile(uintptr(fd), "vsock"), nil
		}
		_ = unix.Close(fd)
	}
}
