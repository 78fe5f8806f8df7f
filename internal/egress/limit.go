package egress

import (
	"context"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// limits are the bounds that the gateway keeps. Only tests have others than
// these.
type limits struct {
	connections, flows, names int
	queries                   int // worked on at once
	queryRate                 rate.Limit
	queryBurst                int

	dial, upstream time.Duration
	inspect        time.Duration // until a connection has shown its name
	flowIdle       time.Duration
	// halfOpen is how long a connection may be silent when one side has ended,
	// open when none has, and stalled how long one write may take.
	halfOpen, open, stalled time.Duration
	tick                    time.Duration // between two looks at what is silent
}

func defaultLimits() limits {
	return limits{
		connections: 256, flows: 256, names: 4096,
		queries: 64, queryRate: 200, queryBurst: 400,
		dial: 10 * time.Second, upstream: 5 * time.Second, inspect: 10 * time.Second,
		flowIdle: 60 * time.Second,
		halfOpen: 2 * time.Minute, open: time.Hour, stalled: 10 * time.Minute,
		tick: 30 * time.Second,
	}
}

const (
	// minBurst is what may go through at once, however low the rate.
	minBurst = 64 << 10
	// MinBytesPerSecond is the least rate there may be.
	MinBytesPerSecond = 1 << 10
)

// bandwidth returns the bucket of so many bytes per second; nil: no bound.
func bandwidth(bytesPerSecond int64) *rate.Limiter {
	if bytesPerSecond <= 0 {
		return nil
	}
	return rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(max(minBurst, bytesPerSecond/8), 1<<30)))
}

// wait takes n bytes of a bucket, or of none, in as many parts as it needs.
func wait(ctx context.Context, bucket *rate.Limiter, n int) error {
	if bucket == nil {
		return nil
	}
	for n > 0 {
		part := min(n, bucket.Burst())
		if err := bucket.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}

// metered is a guest's connection whose bytes are counted, and held back to the
// rate.
type metered struct {
	net.Conn
	ctx       context.Context // of the one connection, whose reads and writes have none
	up, down  *rate.Limiter
	countUp   *atomic.Uint64
	countDown *atomic.Uint64
	stalled   time.Duration
}

// Read is net.Conn's: of what the guest sends.
func (m *metered) Read(p []byte) (int, error) {
	n, err := m.Conn.Read(p)
	m.countUp.Add(uint64(n))
	if waited := wait(m.ctx, m.up, n); waited != nil && err == nil {
		err = waited
	}
	return n, err
}

// Write is net.Conn's: of what the guest gets.
func (m *metered) Write(p []byte) (int, error) {
	written := 0
	for len(p) > 0 {
		part := p[:min(len(p), minBurst)]
		if err := wait(m.ctx, m.down, len(part)); err != nil {
			return written, err
		}
		if err := m.SetWriteDeadline(time.Now().Add(m.stalled)); err != nil {
			return written, err
		}
		n, err := m.Conn.Write(part)
		m.countDown.Add(uint64(n))
		written += n
		if err != nil {
			return written, err
		}
		p = p[n:]
	}
	return written, nil
}

// CloseWrite tells the guest that no more comes.
func (m *metered) CloseWrite() error { return closeWrite(m.Conn) }
