package egress

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
)

// nameServer is an upstream on loopback.
type nameServer struct {
	addr string

	mu      sync.Mutex
	zone    map[string][]string // by name with the final dot: records as in a zone file, without their owner
	asked   []string
	rewrite func(network string, query []byte, answer *dns.Msg) [][]byte // instead of the packed answer
}

// newNameServer serves UDP and TCP until the test ends. Each argument is a
// record: "name ttl type data".
func newNameServer(tb testing.TB, records ...string) *nameServer {
	tb.Helper()
	s := &nameServer{zone: map[string][]string{}}
	for _, r := range records {
		name := dns.Fqdn(strings.Fields(r)[0])
		s.zone[name] = append(s.zone[name], r)
	}
	var packets net.PacketConn
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err == nil {
		packets, err = net.ListenPacket("udp", l.Addr().String())
	}
	if err != nil {
		tb.Fatal(err)
	}
	s.addr = l.Addr().String()
	var wg sync.WaitGroup
	wg.Go(func() { s.servePackets(packets) })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.serveConn(c)
		}
	})
	tb.Cleanup(func() {
		_ = l.Close()
		_ = packets.Close()
		wg.Wait()
	})
	return s
}

func (s *nameServer) servePackets(c net.PacketConn) {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		for _, answer := range s.answers("udp", buf[:n]) {
			_, _ = c.WriteTo(answer, from)
		}
	}
}

func (s *nameServer) serveConn(c net.Conn) {
	defer c.Close()
	var size [2]byte
	if _, err := io.ReadFull(c, size[:]); err != nil {
		return
	}
	query := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, query); err != nil {
		return
	}
	for _, answer := range s.answers("tcp", query) {
		_, _ = c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...))
	}
}

func (s *nameServer) answers(network string, query []byte) [][]byte {
	var q, a dns.Msg
	if q.Unpack(query) != nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = append(s.asked, q.Question[0].Name)
	a.SetReply(&q)
	a.Rcode = dns.RcodeNameError
	for name := q.Question[0].Name; name != ""; {
		records := s.zone[name]
		name = ""
		for _, text := range records {
			rr, err := dns.NewRR(text)
			if err != nil {
				panic(fmt.Sprintf("record %q: %v", text, err))
			}
			a.Rcode = dns.RcodeSuccess
			a.Answer = append(a.Answer, rr)
			if c, ok := rr.(*dns.CNAME); ok && len(a.Answer) < 50 {
				name = c.Target
			}
		}
	}
	if s.rewrite != nil {
		return s.rewrite(network, query, &a)
	}
	if network == "udp" {
		a.Truncate(1232)
	}
	packed, err := a.Pack()
	if err != nil {
		panic(err)
	}
	return [][]byte{packed}
}

// queries returns which names were asked for.
func (s *nameServer) queries() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.asked...)
}

// set changes what the server says from now on.
func (s *nameServer) set(f func(*nameServer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

const (
	guestDNS = "172.31.0.2:5353"
	anyDNS   = "9.9.9.9:53"
)

// query packs a question.
func query(tb testing.TB, name string, kind uint16, tune ...func(*dns.Msg)) []byte {
	tb.Helper()
	var q dns.Msg
	q.SetQuestion(dns.Fqdn(name), kind)
	for _, f := range tune {
		f(&q)
	}
	packed, err := q.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	return packed
}

// resolve is what a guest does with a name.
func (w *world) resolve(tb testing.TB, name string, kind uint16, tune ...func(*dns.Msg)) *dns.Msg {
	tb.Helper()
	asked := query(tb, name, kind, tune...)
	w.link.send(asked, guestDNS, anyDNS)
	p := w.link.receive(tb)
	if p.src.String() != anyDNS || p.dst.String() != guestDNS {
		tb.Fatalf("answered by %s to %s", p.src, p.dst)
	}
	var a dns.Msg
	if err := a.Unpack(p.payload); err != nil {
		tb.Fatal(err)
	}
	if a.Id != binary.BigEndian.Uint16(asked) || !a.Response {
		tb.Fatalf("no answer to that: %v", a.MsgHdr)
	}
	return &a
}

// addrs are the addresses of an answer, as text.
func addrs(a *dns.Msg) string {
	var all []string
	for _, rr := range a.Answer {
		all = append(all, fmt.Sprintf("%s %d %s", rr.Header().Name, rr.Header().Ttl, rr.(*dns.A).A))
	}
	return strings.Join(all, ", ")
}
