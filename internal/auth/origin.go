package auth

import (
	"context"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// origin is what is known of a connection before anything is read from it.
type origin struct {
	inside  bool // from within this process
	exposed bool // on an address that other hosts can reach
	unix    bool
	uid     uint32 // of a unix socket's peer
}

// trusted reports whether who is there needs to show nothing: the one who runs
// the daemon, and root, who could become it.
func (o origin) trusted() bool {
	return o.unix && (o.uid == 0 || o.uid == uint32(os.Geteuid()))
}

type originKey struct{}

func originOf(ctx context.Context) origin {
	o, _ := ctx.Value(originKey{}).(origin)
	return o
}

// Inside returns ctx for connections from within this process, which are asked
// nothing.
func Inside(ctx context.Context) context.Context {
	return context.WithValue(ctx, originKey{}, origin{inside: true})
}

// Connected returns ctx for requests on conn: with the peer's credentials when
// it is a unix socket's, and with the demand to show some when other hosts can
// reach the address. It is made for http.Server's ConnContext.
func Connected(ctx context.Context, conn net.Conn) context.Context {
	if originOf(ctx).inside {
		return ctx
	}
	switch addr := conn.LocalAddr().(type) {
	case *net.UnixAddr:
		return context.WithValue(ctx, originKey{}, peerOf(conn))
	case *net.TCPAddr:
		return context.WithValue(ctx, originKey{}, origin{exposed: !addr.IP.IsLoopback()})
	}
	return context.WithValue(ctx, originKey{}, origin{exposed: true})
}

// peerOf asks the kernel who made the connection. Where it does not say, nobody
// is trusted.
func peerOf(conn net.Conn) origin {
	stranger := origin{exposed: true}
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return stranger
	}
	raw, err := uc.SyscallConn()
	if err != nil {
		return stranger
	}
	var cred *unix.Ucred
	err = raw.Control(func(fd uintptr) { cred, _ = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err != nil || cred == nil {
		return stranger
	}
	o := origin{unix: true, uid: cred.Uid}
	o.exposed = !o.trusted()
	return o
}
