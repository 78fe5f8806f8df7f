package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

const (
	ringSize = 256 << 10 // output kept of a process that nobody is attached to
	pipeMost = 1 << 20   // the largest pipe that an ordinary user can make
)

// ring keeps the latest output, of all channels together.
type ring struct {
	pieces  []guestproto.Chunk
	size    int
	dropped int64
}

// add keeps a copy of data, and drops the oldest pieces when there is too much.
func (r *ring) add(ch guestproto.Channel, data []byte) {
	if n := len(r.pieces); n > 0 && r.pieces[n-1].Channel == ch && len(r.pieces[n-1].Data)+len(data) <= ringSize/8 {
		r.pieces[n-1].Data = append(r.pieces[n-1].Data, data...)
	} else {
		r.pieces = append(r.pieces, guestproto.Chunk{Channel: ch, Data: append([]byte(nil), data...)})
	}
	const perPiece = 64 // so that many small pieces are bounded too
	r.size += len(data)
	for len(r.pieces) > 1 && r.size+perPiece*len(r.pieces) > ringSize {
		r.size -= len(r.pieces[0].Data)
		r.dropped += int64(len(r.pieces[0].Data))
		r.pieces = r.pieces[1:]
	}
}

// pump takes output from f until it ends. After the process's end, which sets
// a deadline, it takes only what is there; whatever others write to f later is
// read and forgotten, so that they do not die of a closed pipe.
func (pr *process) pump(f *os.File, ch guestproto.Channel) {
	defer f.Close() //nolint:errcheck // only read from
	stop := context.AfterFunc(pr.agent.ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, guestproto.MaxData)
	var err error
	for err == nil {
		var n int
		n, err = f.Read(buf)
		pr.deliver(ch, buf[:n])
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || pr.agent.ctx.Err() != nil {
		pr.pumps.Done()
		return
	}
	pr.drain(f, ch, buf)
	pr.pumps.Done()
	if f.SetReadDeadline(time.Time{}) == nil && pr.agent.ctx.Err() == nil {
		_, _ = io.CopyBuffer(io.Discard, onlyReader{f}, buf)
	}
}

// onlyReader hides the ways around a buffer that *os.File has.
type onlyReader struct{ io.Reader }

// drain takes what is in the pipe now, and no more than a pipe can hold.
func (pr *process) drain(f *os.File, ch guestproto.Channel, buf []byte) {
	raw, err := f.SyscallConn()
	if err != nil || f.SetReadDeadline(time.Time{}) != nil {
		return
	}
	for taken := 0; taken < pipeMost; {
		n := 0
		err = raw.Read(func(fd uintptr) bool {
			n, _ = unix.Read(int(fd), buf)
			return true
		})
		if err != nil || n <= 0 {
			return
		}
		pr.deliver(ch, buf[:n])
		taken += n
	}
}

// deliver hands output to whoever is attached, waiting for its credit, or
// keeps it in the ring.
func (pr *process) deliver(ch guestproto.Channel, data []byte) {
	for len(data) > 0 {
		att := pr.sink(ch, data)
		if att == nil {
			return
		}
		n, err := att.send(ch, data)
		data = data[n:]
		if err != nil {
			pr.detach(att)
		}
	}
}

// sink returns who is attached; if nobody is, it keeps data.
func (pr *process) sink(ch guestproto.Channel, data []byte) *attachment {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	if pr.attached == nil {
		pr.ring.add(ch, data)
	}
	return pr.attached
}

// send waits until earlier output is out, then sends.
func (att *attachment) send(ch guestproto.Channel, data []byte) (int, error) {
	ctx := att.stream.Context()
	select {
	case <-att.ready:
		return att.stream.Send(ctx, ch, data)
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// join attaches a stream in place of the one before, and returns the output
// that it has to send before it makes the attachment ready.
func (pr *process) join(st *guestproto.Stream) (att *attachment, backlog ring) {
	att = &attachment{stream: st, ready: make(chan struct{})}
	pr.mu.Lock()
	old := pr.attached
	pr.attached, backlog, pr.ring = att, pr.ring, ring{}
	pr.mu.Unlock()
	if old != nil {
		old.stream.Reset(errdef.Code(errdef.ErrConflict), fmt.Sprintf("process %d was attached elsewhere", pr.info.PID))
	}
	return att, backlog
}

// detach lets go of an attachment, if it is still the one.
func (pr *process) detach(att *attachment) {
	pr.mu.Lock()
	defer pr.mu.Unlock()
	if pr.attached == att {
		pr.attached = nil
	}
}
