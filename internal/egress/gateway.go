package egress

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/time/rate"

	"github.com/tinevm/tine/internal/errdef"
)

// Config is what a gateway is made from.
type Config struct {
	// Policy is what the sandbox may reach; nil: nothing. SetPolicy changes it.
	Policy *Policy
	// Upstream are the name servers that are asked, in this order, as IP
	// address and port. None: no name resolves.
	Upstream []string
	// Secrets are added to plain HTTP requests. See Secret.
	Secrets []Secret
	// RootCAs verify the hosts that secrets are sent to; nil: the system's.
	RootCAs *x509.CertPool
	// UpBytesPerSecond bounds what the sandbox sends, DownBytesPerSecond what it
	// gets, over all its connections; 0: no bound.
	UpBytesPerSecond, DownBytesPerSecond int64
	// Denied is told of denials: at most once a minute of the same destination
	// and reason. It is called from one goroutine, and holds up nothing but the
	// end of Serve. Denials that come while it lags are only counted.
	Denied func(Denial)
	// Dial connects to where a guest may go, and nowhere else: network is "tcp"
	// or "udp", dst has passed the policy. nil: the host's own network.
	Dial func(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error)
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Validate says whether a gateway can be made from c.
func (c Config) Validate() error {
	if len(c.Upstream) > maxUpstream {
		return fmt.Errorf("%w: %d name servers, more than %d", errdef.ErrInvalid, len(c.Upstream), maxUpstream)
	}
	for _, server := range c.Upstream {
		if _, err := netip.ParseAddrPort(server); err != nil {
			return fmt.Errorf("%w: name server %.80q is no IP address and port", errdef.ErrInvalid, server)
		}
	}
	for _, bytes := range []int64{c.UpBytesPerSecond, c.DownBytesPerSecond} {
		if bytes != 0 && bytes < MinBytesPerSecond {
			return fmt.Errorf("%w: %d bytes per second, less than %d", errdef.ErrInvalid, bytes, MinBytesPerSecond)
		}
	}
	return validateSecrets(c.Secrets)
}

// Gateway carries the traffic of one sandbox. Its methods are safe for
// concurrent use.
//
// Goroutines: Serve starts one that accepts connections, one that reads packets
// and one that reports denials, and waits for them. The first two start one for
// each connection and DNS query, and one for each UDP flow; a connection starts
// a second for its other direction. All of these are counted in work, and end
// when the gateway cuts what they hold.
type Gateway struct {
	cfg     Config
	lim     limits
	now     func() time.Time
	count   counters
	denials *denials
	names   *names
	up      *rate.Limiter
	down    *rate.Limiter
	queries *rate.Limiter
	asking  chan struct{} // holds a token for each query that is worked on
	secrets []preparedSecret

	work sync.WaitGroup

	mu     sync.Mutex
	policy *Policy
	served bool
	relays map[*relay]struct{}
	flows  map[flowKey]*flow
}

// New returns a gateway, which does nothing before Serve.
func New(cfg Config) (*Gateway, error) { return newGateway(cfg, defaultLimits()) }

func newGateway(cfg Config, lim limits) (*Gateway, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("make egress gateway: %w", err)
	}
	if cfg.Policy == nil {
		cfg.Policy = &Policy{names: newDomains[*grant]()}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	g := &Gateway{
		cfg: cfg, lim: lim, now: cfg.Now, policy: cfg.Policy,
		names:   newNames(cfg.Now, lim.names),
		up:      bandwidth(cfg.UpBytesPerSecond),
		down:    bandwidth(cfg.DownBytesPerSecond),
		queries: rate.NewLimiter(lim.queryRate, lim.queryBurst),
		asking:  make(chan struct{}, lim.queries),
		secrets: prepareSecrets(cfg.Secrets),
		relays:  map[*relay]struct{}{},
		flows:   map[flowKey]*flow{},
	}
	g.denials = newDenials(cfg.Now, &g.count, cfg.Denied != nil)
	return g, nil
}

// Serve carries what comes in by link until ctx ends or link is closed, and
// closes it. When it returns all that the sandbox had open is cut. It can be
// called once.
func (g *Gateway) Serve(ctx context.Context, link Link) error {
	g.mu.Lock()
	served := g.served
	g.served = true
	g.mu.Unlock()
	if served {
		return fmt.Errorf("%w: this egress gateway has served already", errdef.ErrConflict)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var loops, reporter sync.WaitGroup
	quiet := make(chan struct{})
	reporter.Go(func() { g.reportDenials(quiet) })
	loops.Go(func() { defer cancel(); g.acceptAll(ctx, link) })
	loops.Go(func() { defer cancel(); g.readAll(ctx, link) })
	<-ctx.Done()
	err := link.Close()
	loops.Wait()
	g.cut(func(verdict, string, netip.AddrPort) bool { return false })
	g.work.Wait()
	close(quiet)
	reporter.Wait()
	if err != nil && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("close egress link: %w", err)
	}
	return nil
}

// reportDenials tells of denials until it is quiet, and of those before that.
func (g *Gateway) reportDenials(quiet <-chan struct{}) {
	for {
		select {
		case d := <-g.denials.report: // never, when nobody listens
			g.cfg.Denied(d)
			continue
		case <-quiet:
		}
		if len(g.denials.report) == 0 {
			return
		}
	}
}

// again waits after a failed call of a link, or says that there is no use.
func again(ctx context.Context, err error, failures int) bool {
	if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
		return false
	}
	t := time.NewTimer(min(time.Millisecond<<min(failures, 10), time.Second))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// SetPolicy changes what the sandbox may reach, nil to nothing. Connections and
// flows that are not allowed any more are cut before it returns.
func (g *Gateway) SetPolicy(p *Policy) {
	if p == nil {
		p = &Policy{names: newDomains[*grant]()}
	}
	g.mu.Lock()
	g.policy = p
	g.mu.Unlock()
	g.cut(func(v verdict, protocol string, dst netip.AddrPort) bool { return v.holds(p, protocol, dst) })
}

// cut ends what has been decided on and is not to stay.
func (g *Gateway) cut(stays func(v verdict, protocol string, dst netip.AddrPort) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for r := range g.relays {
		if !stays(r.verdict, TCP, r.dst) {
			r.cut()
		}
	}
	for key, f := range g.flows {
		if !stays(f.verdict, UDP, key.dst) {
			_ = f.conn.Close()
		}
	}
}

// Rules returns what the sandbox may reach now.
func (g *Gateway) Rules() Rules { return g.current().Rules() }

// Stats returns what the gateway has done so far.
func (g *Gateway) Stats() Stats { return g.count.stats() }

// Denials returns what was denied, the latest first: at most 256 destinations,
// and one line for the rest.
func (g *Gateway) Denials() []Denial { return g.denials.list() }

func (g *Gateway) current() *Policy {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.policy
}

// dial connects to dst, if that is not an address which none may reach.
func (g *Gateway) dial(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	if reason := g.current().bounds.forbidden(dst.Addr()); reason != "" {
		g.denials.note(network, dst.String(), reason)
		return nil, fmt.Errorf("%w: dial %s: %s", errdef.ErrDenied, dst, reason)
	}
	ctx, cancel := context.WithTimeout(ctx, g.lim.dial)
	defer cancel()
	if g.cfg.Dial != nil {
		return g.cfg.Dial(ctx, network, dst)
	}
	d := net.Dialer{Control: g.checkPeer}
	return d.DialContext(ctx, network, dst.String())
}

// checkPeer looks once more at what a socket is about to be connected to.
func (g *Gateway) checkPeer(_, address string, _ syscall.RawConn) error {
	peer, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%w: peer %q", errdef.ErrDenied, address)
	}
	if reason := g.current().bounds.forbidden(peer.Addr().Unmap()); reason != "" {
		return fmt.Errorf("%w: peer %s: %s", errdef.ErrDenied, peer, reason)
	}
	return nil
}
