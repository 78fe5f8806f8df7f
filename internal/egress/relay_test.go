package egress

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

const server = "93.184.216.34:443"

func TestRelay(t *testing.T) {
	t.Parallel()
	for name, bytesPerSecond := range map[string]int64{"spliced": 0, "with-a-rate": 1 << 40} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, Config{
				Policy:           compile(t, false, "93.184.216.0/24:443"),
				UpBytesPerSecond: bytesPerSecond, DownBytesPerSecond: bytesPerSecond,
			})
			w.net.serve(server, echo)
			sent := make([]byte, 3<<20)
			_, _ = rand.Read(sent)
			guest := w.link.connect(t, server)
			go func() {
				_, _ = guest.Write(sent)
				_ = guest.CloseWrite() // the echo comes after that
			}()
			got, err := io.ReadAll(guest)
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("%d bytes, error %v", len(got), err)
			}
			eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
			s := w.Stats()
			if s.ConnectionsTotal != 1 || s.BytesUp != uint64(len(sent)) || s.BytesDown != uint64(len(sent)) || s.Denied != 0 {
				t.Errorf("stats: %+v", s)
			}
		})
	}
}

func TestDenied(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0:443", "udp:0.0.0.0/0:80")})
	for dst, reason := range map[string]Reason{
		"93.184.216.34:80": NoRule, "127.0.0.1:443": Loopback, "169.254.169.254:443": LinkLocal, "10.0.0.1:443": PrivateNetwork,
		"0.0.0.0:443": Unspecified, "255.255.255.255:443": Multicast,
	} {
		wantReset(t, w.link.connect(t, dst))
		w.wantDenial(t, TCP, dst, reason)
	}
	if dialed := w.net.dials(); len(dialed) > 0 {
		t.Errorf("dialed %v", dialed)
	}
	if w.Stats().Denied != 6 {
		t.Errorf("stats: %+v", w.Stats())
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")})
	wantReset(t, w.link.connect(t, server)) // nobody serves there
	if s := w.Stats(); s.DialFailed != 1 || s.Denied != 0 {
		t.Errorf("stats: %+v", s)
	}
}

// A side that fails is seen to fail by the other one.
func TestResetsAreHandedOn(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")})
	failed := make(chan error, 1)
	w.net.serve("93.184.216.34:1", func(c *net.TCPConn) {
		_, err := io.Copy(io.Discard, c)
		failed <- err
	})
	w.net.serve("93.184.216.34:2", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
	})
	guest := w.link.connect(t, "93.184.216.34:1")
	_, _ = guest.Write([]byte("x"))
	eventually(t, "the connection", func() bool { return len(w.net.dials()) == 1 })
	reset(guest)
	if err := <-failed; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server saw %v", err)
	}
	guest = w.link.connect(t, "93.184.216.34:2")
	_, _ = guest.Write([]byte("x"))
	wantReset(t, guest)
	eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
}

func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")}, func(l *limits) { l.connections = 2 })
	w.net.serve(server, echo)
	var open []*net.TCPConn
	for range 2 {
		c := w.link.connect(t, server)
		_, _ = c.Write([]byte("x"))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	wantReset(t, w.link.connect(t, server))
	w.wantDenial(t, TCP, server, TooManyConnections)
	_ = open[0].Close()
	eventually(t, "a place", func() bool { return w.Stats().ConnectionsOpen == 1 })
	c := w.link.connect(t, server)
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

// The host's own addresses are asked for anew at each connection.
func TestHostIsNeverReached(t *testing.T) {
	t.Parallel()
	var moved atomic.Bool
	local := func(a netip.Addr) bool { return moved.Load() && a == netip.MustParseAddr("93.184.216.34") }
	p, err := Compile(Rules{Allow: []Rule{{CIDR: "93.184.216.34"}}}, Bounds{Local: local})
	if err != nil {
		t.Fatal(err)
	}
	w := start(t, Config{Policy: p})
	w.net.serve(server, echo)
	wantEcho(t, w.link.connect(t, server), w.link.connect(t, "[::ffff:93.184.216.34]:443"))
	moved.Store(true)
	wantReset(t, w.link.connect(t, server))
	w.wantDenial(t, TCP, server, HostItself)
	wantReset(t, w.link.connect(t, "[2001:db8::1]:443"))
	w.wantDenial(t, TCP, "[2001:db8::1]:443", NotIPv4)
}

// One whose one side has ended does not wait for ever for the other.
func TestSilentConnectionsEnd(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]bool{"half-open": true, "open": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")}, func(l *limits) {
				l.tick, l.open, l.halfOpen = time.Millisecond, 10*time.Millisecond, time.Hour
				if end {
					l.open, l.halfOpen = l.halfOpen, l.open
				}
			})
			w.net.serve(server, func(c *net.TCPConn) { _, _ = c.Read(make([]byte, 1)); _, _ = c.Read(make([]byte, 1)) })
			guest := w.link.connect(t, server)
			if end {
				_ = guest.CloseWrite()
			}
			_, err := guest.Read(make([]byte, 1))
			if err == nil {
				t.Error("read something")
			}
			eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
		})
	}
}

func TestSetPolicyCuts(t *testing.T) {
	t.Parallel()
	up := newNameServer(t, "a.example 60 A 93.184.216.34")
	w := start(t, Config{Upstream: []string{up.addr}, Policy: compile(t, false, "a.example", "93.184.217.1")})
	w.net.serve("93.184.216.34:22", echo)
	w.net.serve("93.184.216.34:443", echo)
	w.net.serve("93.184.217.1:443", echo)
	w.resolve(t, "a.example", 1)
	open := func(dst string) *net.TCPConn {
		c := w.link.connect(t, dst)
		wantEcho(t, c)
		return c
	}
	ssh, web, addr := open("93.184.216.34:22"), open("93.184.216.34:443"), open("93.184.217.1:443")
	w.SetPolicy(compile(t, false, "*.example", "93.184.217.0/24:443")) // the same, by other rules
	wantEcho(t, ssh, web, addr)
	w.SetPolicy(compile(t, true, "*.example", "93.184.217.0/24:443")) // who never showed a name
	wantReset(t, web)
	wantEcho(t, ssh, addr)
	w.SetPolicy(compile(t, true, "a.example:22"))
	wantReset(t, addr)
	wantEcho(t, ssh)
	if got := w.Rules(); len(got.Allow) != 1 || got.Allow[0].String() != "a.example:22" || !got.Inspect {
		t.Errorf("rules: %+v", got)
	}
	w.SetPolicy(nil)
	wantReset(t, ssh)
	wantReset(t, w.link.connect(t, "93.184.216.34:22"))
	w.wantDenial(t, TCP, "93.184.216.34:22", NoRule)
	eventually(t, "the end", func() bool { return w.Stats().ConnectionsOpen == 0 })
}

func wantEcho(tb testing.TB, conns ...net.Conn) {
	tb.Helper()
	for _, c := range conns {
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Write([]byte("hello")); err != nil {
			tb.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
			tb.Fatalf("got %q, error %v", got, err)
		}
	}
}

// Whatever a policy does not allow is gone, however the two met.
func TestSetPolicyRaces(t *testing.T) {
	t.Parallel()
	w := start(t, Config{})
	w.net.serve(server, echo)
	w.net.serveUDP("93.184.216.34:443", upper)
	on := compile(t, false, "0.0.0.0/0")
	for range 30 {
		w.SetPolicy(on)
		var guests []*net.TCPConn
		for i := range 4 {
			guests = append(guests, w.link.connect(t, server))
			w.link.send([]byte("x"), fmt.Sprintf("172.31.0.2:%d", 1000+i), server)
		}
		w.SetPolicy(nil)
		for _, c := range guests {
			wantReset(t, c)
		}
	}
	eventually(t, "the end", func() bool { s := w.Stats(); return s.ConnectionsOpen+s.FlowsOpen == 0 })
}

// Whatever is open when the link closes is cut, and nothing is left of it.
func TestServeEnds(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, true, "0.0.0.0/0:22", "*")})
	w.net.serve("93.184.216.34:22", echo)
	talks, dns, web := w.link.connect(t, "93.184.216.34:22"), w.link.connect(t, anyDNS), w.link.connect(t, server)
	wantEcho(t, talks)
	wantReset(t, web) // of no name
	w.names.open(netip.MustParseAddr("93.184.216.34"), "a.example", time.Now().Add(time.Hour))
	silent, asks := w.link.connect(t, server), w.link.connect(t, "93.184.216.34:80")
	eventually(t, "all of them", func() bool { return w.Stats().ConnectionsOpen == 4 })
	_ = w.link.Close()
	w.stop()
	for _, c := range []net.Conn{talks, dns, silent, asks} {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read %d bytes, error %v", n, err)
		}
	}
	if s := w.Stats(); s.ConnectionsOpen != 0 {
		t.Errorf("stats: %+v", s)
	}
	if err := w.Serve(t.Context(), w.link); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("serve again: %v", err)
	}
}

// A link that fails now and then is asked again.
func TestLinkFailsOnce(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")})
	w.net.serve(server, echo)
	for range 3 {
		w.link.failures <- syscall.EMFILE
	}
	guest := w.link.connect(t, server)
	wantEcho(t, guest)
}

// A dial that hangs does not outlive the policy that allowed it.
func TestCutWhileDialing(t *testing.T) {
	t.Parallel()
	dialing, dialed := make(chan struct{}), make(chan struct{})
	w := start(t, Config{
		Policy: compile(t, false, "0.0.0.0/0"),
		Dial: func(ctx context.Context, _ string, _ netip.AddrPort) (net.Conn, error) {
			close(dialing)
			<-ctx.Done()
			close(dialed)
			return nil, ctx.Err()
		},
	})
	guest := w.link.connect(t, server)
	<-dialing
	w.SetPolicy(nil)
	wantReset(t, guest)
	<-dialed
}

// Without Config.Dial, the address that a socket is connected to is looked at
// once more.
func TestDefaultDialChecks(t *testing.T) {
	t.Parallel()
	g, err := New(Config{Policy: compile(t, false, "0.0.0.0/0")})
	if err != nil {
		t.Fatal(err)
	}
	for _, dst := range []string{"127.0.0.1:80", "10.0.0.1:80"} {
		if _, err := g.dial(t.Context(), TCP, netip.MustParseAddrPort(dst)); !errors.Is(err, errdef.ErrDenied) {
			t.Errorf("%s: %v", dst, err)
		}
		if err := g.checkPeer("tcp4", dst, nil); !errors.Is(err, errdef.ErrDenied) {
			t.Errorf("peer %s: %v", dst, err)
		}
	}
	if got := g.Denials(); len(got) != 2 {
		t.Errorf("denials: %v", got)
	}
	if err := g.checkPeer("tcp4", "93.184.216.34:80", nil); err != nil {
		t.Error(err)
	}
	if err := g.checkPeer("tcp4", "nonsense", nil); err == nil {
		t.Error("nonsense is dialed")
	}
}

func TestConfigValidate(t *testing.T) {
	t.Parallel()
	secret := Secret{Name: "s", Header: "Authorization", Value: "Bearer x", Hosts: []string{"a.example"}}
	for name, cfg := range map[string]Config{
		"server-name": {Upstream: []string{"dns.example:53"}},
		"no-port":     {Upstream: []string{"9.9.9.9"}},
		"servers":     {Upstream: strings.Split(strings.Repeat("9.9.9.9:53,", 9), ",")},
		"rate":        {UpBytesPerSecond: 10},
		"negative":    {DownBytesPerSecond: -1},
		"secret":      {Secrets: []Secret{{Name: "s"}}},
		"twice":       {Secrets: []Secret{secret, secret}},
	} {
		if _, err := New(cfg); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := New(Config{Upstream: []string{"[::1]:53"}, Secrets: []Secret{secret}, UpBytesPerSecond: 1024}); err != nil {
		t.Error(err)
	}
}

func TestBandwidth(t *testing.T) {
	t.Parallel()
	const perSecond = 1 << 20
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0"), DownBytesPerSecond: perSecond})
	const size = minBurst*2 + perSecond/4
	w.net.serve(server, func(c *net.TCPConn) { _, _ = c.Write(make([]byte, size)) })
	began := time.Now()
	got, err := io.ReadAll(w.link.connect(t, server))
	if err != nil || len(got) != size {
		t.Fatalf("%d bytes, error %v", len(got), err)
	}
	// The burst goes at once; what is beyond it cannot be faster than the rate.
	least := time.Duration(size-perSecond/8) * time.Second / perSecond
	if took := time.Since(began); took < least {
		t.Errorf("it took %v, less than %v", took, least)
	}
}

// BenchmarkRelay says how much of a plain copy over loopback the relay attains:
// guest to relay to server, against guest to server.
func BenchmarkRelay(b *testing.B) {
	const block = 64 << 20
	sink := func(c *net.TCPConn) {
		for {
			if n, err := io.CopyN(io.Discard, c, block); n < block || err != nil {
				return
			}
			if _, err := c.Write([]byte{1}); err != nil {
				return
			}
		}
	}
	w := start(b, Config{Policy: compile(b, false, "0.0.0.0/0")})
	w.net.serve(server, sink)
	direct, err := net.Dial("tcp", w.net.at["tcp "+server])
	if err != nil {
		b.Fatal(err)
	}
	defer direct.Close()
	relayed := w.link.connect(b, server)
	data := make([]byte, 1<<20)
	send := func(c net.Conn) time.Duration {
		began := time.Now()
		for range block / len(data) {
			if _, err := c.Write(data); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			b.Fatal(err)
		}
		return time.Since(began)
	}
	var plain, through time.Duration
	for b.Loop() { // by turns, so that both meet the same machine
		plain += send(direct)
		through += send(relayed)
	}
	perSecond := func(d time.Duration) float64 { return float64(b.N) * block / d.Seconds() / 1e6 }
	b.ReportMetric(perSecond(plain), "direct-MB/s")
	b.ReportMetric(perSecond(through), "relayed-MB/s")
	b.ReportMetric(plain.Seconds()/through.Seconds(), "ratio")
	b.ReportMetric(0, "ns/op")
}
