package egress

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

const (
	guestUDP = "172.31.0.2:4000"
	timeUDP  = "93.184.216.34:123"
)

// serveUDP answers each packet with what answer makes of it.
func (i *internet) serveUDP(dst string, answer func([]byte) []byte) {
	i.tb.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		i.tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(answer(buf[:n]), from)
		}
	})
	i.tb.Cleanup(wg.Wait)
	i.tb.Cleanup(func() { _ = c.Close() })
	i.put("udp", dst, c.LocalAddr().String())
}

func upper(p []byte) []byte { return bytes.ToUpper(p) }

func TestUDP(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "udp:93.184.216.34:123", "tcp:0.0.0.0/0")})
	w.net.serveUDP(timeUDP, upper)
	for _, text := range []string{"hello", "again", ""} {
		w.link.send([]byte(text), guestUDP, timeUDP)
		p := w.link.receive(t)
		if p.src.String() != timeUDP || p.dst.String() != guestUDP || string(p.payload) != string(upper([]byte(text))) {
			t.Errorf("got %q from %s to %s", p.payload, p.src, p.dst)
		}
	}
	w.link.send([]byte("other"), "172.31.0.2:4001", timeUDP)
	if p := w.link.receive(t); p.dst.String() != "172.31.0.2:4001" {
		t.Errorf("answered to %s", p.dst)
	}
	w.link.send([]byte("x"), guestUDP, "93.184.216.34:124")
	w.wantDenial(t, UDP, "93.184.216.34:124", NoRule)
	w.link.send([]byte("x"), guestUDP, "169.254.169.254:123")
	w.wantDenial(t, UDP, "169.254.169.254:123", LinkLocal)
	s := w.Stats()
	if s.FlowsTotal != 2 || s.FlowsOpen != 2 || s.PacketsUp != 4 || s.PacketsDown != 4 || s.BytesUp != 15 || s.BytesDown != 15 {
		t.Errorf("stats: %+v", s)
	}
	w.SetPolicy(nil)
	eventually(t, "the cut", func() bool { return w.Stats().FlowsOpen == 0 })
}

func TestSizesOfPackets(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")})
	w.net.serveUDP(timeUDP, func(p []byte) []byte { return make([]byte, int(p[0])<<8|int(p[1])) })
	for size, want := range map[int]int{maxReply + 1: -1, 60000: -1, maxReply: maxReply, 1: 1} {
		before := w.Stats().PacketsDropped
		w.link.send([]byte{byte(size >> 8), byte(size)}, guestUDP, timeUDP)
		if want < 0 {
			eventually(t, "a drop", func() bool { return w.Stats().PacketsDropped == before+1 })
		} else if p := w.link.receive(t); len(p.payload) != want {
			t.Errorf("%d bytes, want %d", len(p.payload), want)
		}
	}
}

func TestTooManyFlows(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")}, func(l *limits) { l.flows = 3 })
	w.net.serveUDP(timeUDP, upper)
	for port := range 10 {
		w.link.send([]byte("x"), fmt.Sprintf("172.31.0.2:%d", 4000+port), timeUDP)
	}
	w.wantDenial(t, UDP, timeUDP, TooManyFlows)
	eventually(t, "all packets", func() bool { return w.Stats().Denied == 7 })
	if s := w.Stats(); s.FlowsOpen != 3 || s.FlowsTotal != 3 {
		t.Errorf("stats: %+v", s)
	}
}

func TestFlowsEnd(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0")}, func(l *limits) { l.flowIdle = 20 * time.Millisecond })
	w.net.serveUDP(timeUDP, upper)
	for i := range 2 { // another one can follow
		w.link.send([]byte("x"), guestUDP, timeUDP)
		eventually(t, "the end", func() bool { s := w.Stats(); return s.FlowsTotal == uint64(i+1) && s.FlowsOpen == 0 })
	}
	w.link.send([]byte("x"), guestUDP, "93.184.216.35:1") // nobody is there
	eventually(t, "a failure", func() bool { return w.Stats().DialFailed == 1 })
}

func TestUDPRate(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "0.0.0.0/0"), UpBytesPerSecond: MinBytesPerSecond})
	w.net.serveUDP(timeUDP, func([]byte) []byte { return nil })
	for range 100 {
		w.link.send(make([]byte, 1400), guestUDP, timeUDP)
	}
	eventually(t, "all packets", func() bool { s := w.Stats(); return s.PacketsUp+s.PacketsDropped == 100 })
	if s := w.Stats(); s.PacketsUp < 40 || s.PacketsUp > 60 { // the burst is 64 KiB
		t.Errorf("stats: %+v", s)
	}
}

// What cannot be inspected is denied where inspection is on.
func TestUDPIsNotInspected(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, true, "a.example", "93.184.216.35")})
	w.names.open(netip.MustParseAddr("93.184.216.34"), "a.example", time.Now().Add(time.Hour))
	w.link.send([]byte("x"), guestUDP, "93.184.216.34:443")
	w.wantDenial(t, UDP, "93.184.216.34:443", CannotInspect)
	for _, dst := range []string{"93.184.216.34:123", "93.184.216.35:443"} {
		w.net.serveUDP(dst, upper)
		w.link.send([]byte("x"), guestUDP, dst)
		if p := w.link.receive(t); p.src.String() != dst {
			t.Errorf("from %s", p.src)
		}
	}
}

func TestDenials(t *testing.T) {
	t.Parallel()
	c := newClock()
	var count counters
	d := newDenials(c.now, &count, true)
	d.note(TCP, "a:1", NoRule)
	d.note(TCP, "a:1", NoRule)
	d.note(TCP, "a:1", Loopback)
	c.pass(denialEvery - 1)
	d.note(TCP, "a:1", NoRule)
	if got := len(d.report); got != 2 {
		t.Errorf("%d reports within a minute", got)
	}
	c.pass(1)
	d.note(TCP, "a:1", NoRule)
	if got := len(d.report); got != 3 {
		t.Errorf("%d reports after it", got)
	}
	all := d.list()
	if len(all) != 2 || all[0].Count != 4 || all[0].Last.Sub(all[0].First) != denialEvery || all[1].Reason != Loopback {
		t.Errorf("got %+v", all)
	}
	for i := range 1000 {
		d.note("dns", fmt.Sprint(i), UnknownName)
	}
	all = d.list()
	i := 0
	for all[i].Reason != Overflow {
		i++
	}
	if len(all) != maxDenials+1 || all[i].Count != 1002-maxDenials || count.denialsOverflowed.Load() != all[i].Count {
		t.Errorf("%d lines, %+v", len(all), all[i])
	}
	if s := count.stats(); s.Denied != 1005 || s.DenialsUnreported == 0 || len(d.report) != denialQueue {
		t.Errorf("stats: %+v, %d reports", s, len(d.report))
	}
}

// A callback that hangs holds up nothing but the end.
func TestDeniedIsCalled(t *testing.T) {
	t.Parallel()
	called, proceed := make(chan Denial, 10), make(chan struct{})
	w := start(t, Config{Denied: func(d Denial) { called <- d; <-proceed }})
	for range 300 {
		wantReset(t, w.link.connect(t, server))
	}
	close(proceed)
	w.stop()
	d := <-called
	if d.To != server || d.Reason != NoRule || d.Protocol != TCP || d.Count != 1 || len(called) != 0 {
		t.Errorf("called with %+v, and %d more", d, len(called))
	}
}

func TestClosedLink(t *testing.T) {
	t.Parallel()
	link := newFakeLink(t)
	_ = link.Close()
	g, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Serve(t.Context(), link); err != nil {
		t.Error(err)
	}
	if _, _, err := link.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
