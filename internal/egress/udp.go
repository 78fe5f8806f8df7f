package egress

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"
)

const (
	// maxPacket bounds what comes from the guest, maxReply what goes to it.
	maxPacket = 64 << 10
	maxReply  = 1472
)

// flowKey is who speaks to whom by UDP.
type flowKey struct{ src, dst netip.AddrPort }

// flow is a UDP socket of the host for one of the guest's.
type flow struct {
	verdict verdict // does not change
	conn    net.Conn
	last    atomic.Int64 // when a packet passed, in nanoseconds since made
	made    time.Time
}

func (f *flow) touch() { f.last.Store(int64(time.Since(f.made))) }

// readAll takes the guest's packets until the link is closed.
func (g *Gateway) readAll(ctx context.Context, link Link) {
	buf := make([]byte, maxPacket)
	for failures := 0; ; {
		n, src, dst, err := link.ReadPacket(buf)
		if err != nil {
			failures++
			if !again(ctx, err, failures) {
				return
			}
			continue
		}
		failures = 0
		if dst.Port() == portDNS {
			g.answerPacket(ctx, link, buf[:n], src, dst)
		} else {
			g.forward(ctx, link, buf[:n], flowKey{src, ipv4(dst)})
		}
	}
}

// forward sends a packet on, by the flow that it belongs to. Only readAll calls
// it, so nobody else makes flows.
func (g *Gateway) forward(ctx context.Context, link Link, p []byte, key flowKey) {
	g.mu.Lock()
	f := g.flows[key]
	g.mu.Unlock()
	if f == nil {
		if f = g.openFlow(ctx, link, key); f == nil {
			return
		}
	}
	if g.up != nil && !g.up.AllowN(time.Now(), len(p)) {
		g.count.packetsDropped.Add(1)
		return
	}
	f.touch()
	if _, err := f.conn.Write(p); err != nil {
		g.count.packetsDropped.Add(1)
		return
	}
	g.count.packetsUp.Add(1)
	g.count.bytesUp.Add(uint64(len(p)))
}

func (g *Gateway) openFlow(ctx context.Context, link Link, key flowKey) *flow {
	g.mu.Lock()
	p, full := g.policy, len(g.flows) >= g.lim.flows
	g.mu.Unlock()
	v := g.decide(p, UDP, key.dst)
	if v.reason == "" && full {
		v.reason = TooManyFlows
	}
	if v.reason != "" {
		g.denials.note(UDP, key.dst.String(), v.reason)
		return nil
	}
	conn, err := g.dial(ctx, UDP, key.dst)
	if err != nil {
		g.count.dialFailed.Add(1)
		return nil
	}
	f := &flow{verdict: v, conn: conn, made: time.Now()}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.policy != p && !v.holds(g.policy, UDP, key.dst) {
		_ = conn.Close()
		return nil
	}
	g.flows[key] = f
	g.count.flowsOpen.Add(1)
	g.count.flowsTotal.Add(1)
	g.work.Go(func() {
		defer g.endFlow(key, f)
		g.receive(link, key, f)
	})
	return f
}

func (g *Gateway) endFlow(key flowKey, f *flow) {
	_ = f.conn.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.flows, key)
	g.count.flowsOpen.Add(-1)
}

// receive brings what comes back to the guest, until the flow is cut or has been
// silent for long.
func (g *Gateway) receive(link Link, key flowKey, f *flow) {
	buf := make([]byte, maxReply+1)
	for {
		silent := time.Since(f.made) - time.Duration(f.last.Load())
		if silent >= g.lim.flowIdle {
			return
		}
		_ = f.conn.SetReadDeadline(time.Now().Add(g.lim.flowIdle - silent))
		n, err := f.conn.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			continue // a packet of the guest may have come meanwhile
		case err != nil:
			return // cut, or nobody listens there
		}
		f.touch()
		if n > maxReply || g.down != nil && !g.down.AllowN(time.Now(), n) || link.WritePacket(buf[:n], key.dst, key.src) != nil {
			g.count.packetsDropped.Add(1)
			continue
		}
		g.count.packetsDown.Add(1)
		g.count.bytesDown.Add(uint64(n))
	}
}
