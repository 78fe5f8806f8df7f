package agent

import (
	"context"
	"io"
	"sync"

	"github.com/tinevm/tine/internal/guestproto"
)

// link writes frames to the host, of one session at a time.
type link struct {
	w io.Writer

	mu    sync.Mutex
	owner *epoch // the session that may write
	buf   []byte
}

// epoch is one session's right to write to the link, until the next is adopted.
type epoch struct {
	link *link
}

// adopt makes a new session the owner of the link, and says so to the host in
// the same breath: no frame of the old session follows the HelloAck. The
// delimiter before it ends whatever an earlier write left unfinished.
func (l *link) adopt(ack *guestproto.HelloAck) *epoch {
	e := &epoch{link: l}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.owner = e
	l.buf = guestproto.AppendFrame(append(l.buf[:0], 0), guestproto.TypeHelloAck, 0, guestproto.Encode(ack))
	// A link that cannot be written to fails in Serve, where it is read.
	_, _ = l.w.Write(l.buf)
	return e
}

// WriteFrame writes a frame unless the session is over. It waits for as long
// as the host does not read.
func (e *epoch) WriteFrame(_ context.Context, t guestproto.FrameType, stream uint32, parts ...[]byte) error {
	l := e.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.owner != e {
		return guestproto.ErrSessionOver
	}
	l.buf = guestproto.AppendFrame(l.buf[:0], t, stream, parts...)
	_, err := l.w.Write(l.buf)
	return err
}
