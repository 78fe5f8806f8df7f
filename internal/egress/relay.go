package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// chunk is how much is copied between two looks at the clock, and so how far
// the counters of bytes lag behind.
const chunk = 256 << 10

// relay is one TCP connection of the guest.
type relay struct {
	g     *Gateway
	ctx   context.Context // ends when the relay is cut
	end   context.CancelFunc
	dst   netip.AddrPort
	guest net.Conn

	verdict verdict // guarded by the gateway's mu; all zero until it is decided

	mu     sync.Mutex
	remote net.Conn // nil while there is none
	ended  bool

	last   atomic.Int64 // when a byte passed, in nanoseconds since started
	halves atomic.Int32 // how many directions have ended
}

// acceptAll takes the guest's connections until the link is closed.
func (g *Gateway) acceptAll(ctx context.Context, link Link) {
	for failures := 0; ; {
		guest, dst, err := link.Accept()
		if err != nil {
			failures++
			if !again(ctx, err, failures) {
				return
			}
			continue
		}
		failures = 0
		if g.count.connsOpen.Add(1) > int64(g.lim.connections) {
			g.count.connsOpen.Add(-1)
			g.denials.note(TCP, dst.String(), TooManyConnections)
			reset(guest)
			continue
		}
		g.count.connsTotal.Add(1)
		r := &relay{g: g, dst: ipv4(dst), guest: guest}
		r.ctx, r.end = context.WithCancel(ctx)
		g.work.Go(func() {
			defer g.count.connsOpen.Add(-1)
			defer r.end()
			r.serve()
		})
	}
}

// serve carries one connection from its beginning to its end.
func (r *relay) serve() {
	v := r.enter()
	defer r.leave()
	switch {
	case r.ctx.Err() != nil:
		reset(r.guest)
	case v.dns:
		r.g.serveDNS(r.ctx, r.guest)
	case v.reason != "":
		r.deny(r.dst.String(), v.reason)
	case v.inspect || r.g.hasSecret(v, r.dst.Port()):
		r.inspect(v)
	default:
		r.carry(nil)
	}
}

// enter decides on the relay and makes it known, in one step: a policy that is
// set later sees it.
func (r *relay) enter() verdict {
	r.g.mu.Lock()
	defer r.g.mu.Unlock()
	r.verdict = r.g.decide(r.g.policy, TCP, r.dst)
	if r.verdict.reason == "" && r.ctx.Err() == nil { // Serve cuts after that
		r.g.relays[r] = struct{}{}
	}
	return r.verdict
}

func (r *relay) leave() {
	r.g.mu.Lock()
	defer r.g.mu.Unlock()
	delete(r.g.relays, r)
}

func (r *relay) deny(to string, reason Reason) {
	r.g.denials.note(TCP, to, reason)
	reset(r.guest)
}

// cut ends the relay at once, whatever it does.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	reset(r.guest) // before end, which would have others close it with care
	if r.remote != nil {
		reset(r.remote)
	}
	r.end()
}

// connect dials the destination, so that a cut ends that connection too.
func (r *relay) connect(ctx context.Context) (net.Conn, error) {
	remote, err := r.g.dial(ctx, TCP, r.dst)
	if err != nil {
		r.g.count.dialFailed.Add(1)
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		reset(remote)
		return nil, net.ErrClosed
	}
	r.remote = remote
	return remote, nil
}

// carry connects, sends what was read of the guest already, and copies both
// ways until both are through.
func (r *relay) carry(read []byte) {
	remote, err := r.connect(r.ctx)
	if err != nil {
		reset(r.guest)
		return
	}
	if len(read) > 0 {
		_ = remote.SetWriteDeadline(time.Now().Add(r.g.lim.stalled))
		if _, err := remote.Write(read); err != nil {
			r.cut()
			return
		}
		r.g.count.bytesUp.Add(uint64(len(read)))
	}
	started := time.Now()
	var up sync.WaitGroup
	up.Go(func() { r.half(remote, r.guest, started, true) })
	r.half(r.guest, remote, started, false)
	up.Wait()
	_ = r.guest.Close()
	_ = remote.Close()
}

// half copies one way. An end is handed on as an end, a failure as a reset.
func (r *relay) half(dst, src net.Conn, started time.Time, up bool) {
	err := r.copy(dst, src, started, up)
	r.last.Store(int64(time.Since(started))) // the other side's time begins anew
	r.halves.Add(1)
	if err == nil {
		err = closeWrite(dst)
	}
	if err != nil {
		r.cut()
	}
}

func (r *relay) copy(dst, src net.Conn, started time.Time, up bool) error {
	counter, bucket := &r.g.count.bytesDown, r.g.down
	if up {
		counter, bucket = &r.g.count.bytesUp, r.g.up
	}
	step := func() (int64, error) {
		// Between two *net.TCPConn this is splice(2).
		return io.CopyN(dst, src, chunk)
	}
	if bucket != nil {
		buf := make([]byte, 16<<10)
		step = func() (int64, error) {
			n, err := src.Read(buf)
			if waited := wait(r.ctx, bucket, n); waited != nil {
				return 0, waited
			}
			_ = dst.SetWriteDeadline(time.Now().Add(r.g.lim.stalled))
			if _, failed := dst.Write(buf[:n]); failed != nil {
				return 0, failed
			}
			return int64(n), err
		}
	}
	for {
		now := time.Now()
		_ = src.SetReadDeadline(now.Add(r.g.lim.tick))
		_ = dst.SetWriteDeadline(now.Add(r.g.lim.stalled))
		n, err := step()
		counter.Add(uint64(n))
		if n > 0 {
			r.last.Store(int64(time.Since(started)))
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded) && time.Since(now) < r.g.lim.stalled:
			if silent := time.Since(started) - time.Duration(r.last.Load()); silent > r.patience() {
				return err
			}
		default:
			return err
		}
	}
}

// patience is how long the relay may be silent.
func (r *relay) patience() time.Duration {
	if r.halves.Load() > 0 {
		return r.g.lim.halfOpen
	}
	return r.g.lim.open
}

// ipv4 is an address without the clothes of IPv6, which some sockets give it.
func ipv4(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// reset closes a connection so that the other side sees it fail.
func reset(c net.Conn) {
	if l, ok := c.(interface{ SetLinger(sec int) error }); ok {
		_ = l.SetLinger(0)
	}
	_ = c.Close()
}

// closeWrite tells the other side that no more comes.
func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}
