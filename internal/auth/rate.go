package auth

import (
	"math"
	"sync"
	"time"
)

// maxBuckets is how many identities are remembered before those that have been
// quiet are forgotten. Tokens are fewer; certificates need not be.
const maxBuckets = 4096

// limiter bounds how often each identity comes: a bucket that fills at rate and
// holds burst.
type limiter struct {
	rate, burst float64

	mu      sync.Mutex
	buckets map[string]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

func newLimiter(rate float64, burst int) *limiter {
	l := &limiter{rate: rate, burst: float64(burst), buckets: map[string]bucket{}}
	if burst == 0 {
		l.burst = math.Max(1, math.Ceil(rate))
	}
	return l
}

// take lets name come, or says how long it must wait.
func (l *limiter) take(name string, now time.Time) (wait time.Duration) {
	if l.rate == 0 {
		return 0
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.buckets[name]
	if !ok {
		l.forget(now)
		b = bucket{left: l.burst, at: now}
	}
	b = l.filled(b, now)
	if b.left >= 1 {
		b.left--
	} else {
		seconds := math.Min((1-b.left)/l.rate, time.Hour.Seconds())
		wait = max(time.Duration(seconds*float64(time.Second)), time.Millisecond)
	}
	l.buckets[name] = b
	return wait
}

// filled is b as it is now. A clock that was set back fills nothing.
func (l *limiter) filled(b bucket, now time.Time) bucket {
	if since := now.Sub(b.at); since > 0 {
		b.left = math.Min(l.burst, b.left+since.Seconds()*l.rate)
	}
	b.at = now
	return b
}

// forget makes room for one more: full buckets say nothing. Where none is, the
// newcomer finds a place all the same, since each is somebody we let in.
func (l *limiter) forget(now time.Time) {
	if len(l.buckets) < maxBuckets {
		return
	}
	for name, b := range l.buckets {
		if l.filled(b, now).left >= l.burst {
			delete(l.buckets, name)
		}
	}
}
