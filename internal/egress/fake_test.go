package egress

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeLink is a link over loopback: real TCP connections, packets in memory.
type fakeLink struct {
	listener net.Listener
	conns    chan fakeConn
	in, out  chan fakePacket
	closed   chan struct{}
	once     sync.Once
	failures chan error // returned by Accept before anything else
}

type fakeConn struct {
	conn net.Conn
	dst  netip.AddrPort
}

type fakePacket struct {
	payload  []byte
	src, dst netip.AddrPort
}

func newFakeLink(tb testing.TB) *fakeLink {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = listener.Close() })
	return &fakeLink{
		listener: listener, conns: make(chan fakeConn, 16), in: make(chan fakePacket, 16), out: make(chan fakePacket, 4096),
		closed: make(chan struct{}), failures: make(chan error, 16),
	}
}

func (l *fakeLink) Accept() (net.Conn, netip.AddrPort, error) {
	select {
	case err := <-l.failures:
		return nil, netip.AddrPort{}, err
	case c := <-l.conns:
		return c.conn, c.dst, nil
	case <-l.closed:
		return nil, netip.AddrPort{}, net.ErrClosed
	}
}

func (l *fakeLink) ReadPacket(p []byte) (int, netip.AddrPort, netip.AddrPort, error) {
	select {
	case packet := <-l.in:
		return copy(p, packet.payload), packet.src, packet.dst, nil
	case <-l.closed:
		return 0, netip.AddrPort{}, netip.AddrPort{}, net.ErrClosed
	}
}

func (l *fakeLink) WritePacket(p []byte, src, dst netip.AddrPort) error {
	select {
	case l.out <- fakePacket{append([]byte(nil), p...), src, dst}:
		return nil
	case <-l.closed:
		return net.ErrClosed
	}
}

func (l *fakeLink) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// connect is what a guest does.
func (l *fakeLink) connect(tb testing.TB, dst string) *net.TCPConn {
	tb.Helper()
	guest, ours := l.pair(tb)
	l.conns <- fakeConn{ours, netip.MustParseAddrPort(dst)}
	return guest
}

// pair returns the two ends of a connection.
func (l *fakeLink) pair(tb testing.TB) (guest *net.TCPConn, ours net.Conn) {
	tb.Helper()
	c, err := net.Dial("tcp", l.listener.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	if ours, err = l.listener.Accept(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = ours.Close() })
	return c.(*net.TCPConn), ours
}

// send is a packet of the guest.
func (l *fakeLink) send(payload []byte, src, dst string) {
	l.in <- fakePacket{payload, netip.MustParseAddrPort(src), netip.MustParseAddrPort(dst)}
}

// receive waits for a packet to the guest.
func (l *fakeLink) receive(tb testing.TB) fakePacket {
	tb.Helper()
	select {
	case p := <-l.out:
		return p
	case <-time.After(10 * time.Second):
		tb.Fatal("no packet came")
		return fakePacket{}
	}
}

// internet is where the gateway's dials go: servers on loopback, by the
// addresses that they are meant to have.
type internet struct {
	tb testing.TB

	mu     sync.Mutex
	at     map[string]string // "network ip:port" to a loopback address
	dialed []string
}

func newInternet(tb testing.TB) *internet { return &internet{tb: tb, at: map[string]string{}} }

func (i *internet) put(network, dst, server string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.at[network+" "+dst] = server
}

func (i *internet) dial(ctx context.Context, network string, dst netip.AddrPort) (net.Conn, error) {
	i.mu.Lock()
	i.dialed = append(i.dialed, dst.String())
	server := i.at[network+" "+dst.String()]
	i.mu.Unlock()
	if server == "" {
		return nil, errors.New("nobody is there")
	}
	return (&net.Dialer{}).DialContext(ctx, network, server)
}

// dials returns where connections went so far.
func (i *internet) dials() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return append([]string(nil), i.dialed...)
}

// serve has a TCP server at dst.
func (i *internet) serve(dst string, handle func(*net.TCPConn)) {
	i.tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		i.tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			i.tb.Cleanup(func() { _ = c.Close() })
			wg.Go(func() {
				defer c.Close()
				handle(c.(*net.TCPConn))
			})
		}
	})
	i.tb.Cleanup(wg.Wait)
	i.tb.Cleanup(func() { _ = l.Close() })
	i.put("tcp", dst, l.Addr().String())
}

// echo sends back what comes, and then ends.
func echo(c *net.TCPConn) {
	_, _ = io.Copy(c, c)
	_ = c.CloseWrite()
}

// compile is Compile of rules in their short form.
func compile(tb testing.TB, inspect bool, rules ...string) *Policy {
	tb.Helper()
	r := Rules{Inspect: inspect}
	for _, text := range rules {
		rule, err := ParseRule(text)
		if err != nil {
			tb.Fatal(err)
		}
		r.Allow = append(r.Allow, rule)
	}
	p, err := Compile(r, Bounds{})
	if err != nil {
		tb.Fatal(err)
	}
	return p
}

// world is a gateway at work, with its guest's end and its internet.
type world struct {
	*Gateway
	link *fakeLink
	net  *internet
	stop func()
}

// start serves until the test ends, or stop is called.
func start(tb testing.TB, cfg Config, tune ...func(*limits)) *world {
	tb.Helper()
	w := &world{link: newFakeLink(tb), net: newInternet(tb)}
	if cfg.Dial == nil {
		cfg.Dial = w.net.dial
	}
	lim := defaultLimits()
	for _, f := range tune {
		f(&lim)
	}
	var err error
	if w.Gateway, err = newGateway(cfg, lim); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(tb.Context())
	done := make(chan error, 1)
	go func() { done <- w.Serve(ctx, w.link) }()
	w.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				tb.Errorf("serve: %v", err)
			}
		case <-time.After(30 * time.Second):
			tb.Error("serve does not end")
		}
	})
	tb.Cleanup(w.stop)
	return w
}

// eventually waits until a condition holds.
func eventually(tb testing.TB, what string, holds func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("not in time: %s", what)
		}
	}
}

// wantDenial waits for the one line of the table that a test expects.
func (w *world) wantDenial(tb testing.TB, protocol, to string, reason Reason) {
	tb.Helper()
	eventually(tb, "denial of "+to+" for "+string(reason), func() bool {
		for _, d := range w.Denials() {
			if d.Protocol == protocol && d.To == to && d.Reason == reason {
				return true
			}
		}
		return false
	})
}

// wantReset sees that a guest's connection is reset.
func wantReset(tb testing.TB, c net.Conn) {
	tb.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	n, err := c.Read(make([]byte, 1))
	if n > 0 || err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		tb.Fatalf("read %d bytes, error %v, want a reset", n, err)
	}
}
