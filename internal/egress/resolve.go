package egress

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

const (
	maxQuery = 4 << 10
	// plainSize is what a UDP answer takes when the guest does not say, and
	// ednsSize what it takes at most.
	plainSize = dns.MinMsgSize
	ednsSize  = 1232
	// maxAnswers is how many addresses of one answer are used.
	maxAnswers = 128

	minTTL = time.Second
	maxTTL = time.Hour
	// grace is how long an address stays open beyond its time to live, for who
	// looked it up just before that ended.
	grace = 30 * time.Second
)

// answerPacket answers a query that came by UDP, if there is room for it.
func (g *Gateway) answerPacket(ctx context.Context, link Link, query []byte, src, dst netip.AddrPort) {
	if len(query) > maxQuery || !g.mayAsk() {
		g.count.dnsDropped.Add(1)
		return
	}
	query = append([]byte(nil), query...)
	g.work.Go(func() {
		defer g.asked()
		answer := g.answer(ctx, query, false)
		if answer != nil && link.WritePacket(answer, dst, src) != nil {
			g.count.packetsDropped.Add(1)
		}
	})
}

// serveDNS answers queries that come by TCP, one after the other.
func (g *Gateway) serveDNS(ctx context.Context, guest net.Conn) {
	defer func() { _ = guest.Close() }()
	buf := make([]byte, maxQuery)
	for ctx.Err() == nil {
		_ = guest.SetDeadline(time.Now().Add(g.lim.inspect))
		if _, err := io.ReadFull(guest, buf[:2]); err != nil {
			return
		}
		size := int(binary.BigEndian.Uint16(buf))
		if size > maxQuery {
			return
		}
		if _, err := io.ReadFull(guest, buf[:size]); err != nil {
			return
		}
		if !g.mayAsk() {
			g.count.dnsDropped.Add(1)
			return
		}
		answer := g.answer(ctx, buf[:size], true)
		g.asked()
		if answer == nil {
			return
		}
		_ = guest.SetDeadline(time.Now().Add(g.lim.inspect))
		if _, err := guest.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// mayAsk takes a place for one more query; asked gives it back.
func (g *Gateway) mayAsk() bool {
	if !g.queries.AllowN(g.now(), 1) {
		return false
	}
	select {
	case g.asking <- struct{}{}:
		g.count.dnsQueries.Add(1)
		return true
	default:
		return false
	}
}

func (g *Gateway) asked() { <-g.asking }

// answer returns what is said to a query; nil: nothing.
func (g *Gateway) answer(ctx context.Context, query []byte, tcp bool) []byte {
	var q dns.Msg
	if err := q.Unpack(query); err != nil {
		return formatError(query)
	}
	if q.Response {
		return nil // whoever answers an answer may do so for ever
	}
	var reply dns.Msg
	reply.SetReply(&q)
	reply.RecursionAvailable = true
	size := dns.MaxMsgSize - 1
	if !tcp {
		size = plainSize
	}
	if opt := q.IsEdns0(); opt != nil {
		reply.SetEdns0(ednsSize, false)
		if !tcp {
			size = min(max(int(opt.UDPSize()), plainSize), ednsSize)
		}
	}
	g.fill(ctx, &q, &reply)
	reply.Truncate(size)
	packed, err := reply.Pack()
	if err != nil {
		return nil
	}
	return packed
}

// formatError answers what cannot be read, if that has an id.
func formatError(query []byte) []byte {
	const header, response, qr = 12, 2, 0x80
	if len(query) < header || query[response]&qr != 0 {
		return nil
	}
	answer := make([]byte, header)
	copy(answer, query[:2])
	answer[response] = qr
	answer[response+1] = dns.RcodeFormatError
	return answer
}

// fill puts into reply what is known of the one thing that q asks for.
//
// Addresses (A) of a name that some rule is for are looked up. The name has no
// IPv6 address (AAAA) and no HTTPS or SVCB record, whatever its owner says. All
// other types are refused: they would only carry data.
func (g *Gateway) fill(ctx context.Context, q, reply *dns.Msg) {
	if q.Opcode != dns.OpcodeQuery {
		reply.Rcode = dns.RcodeNotImplemented
		return
	}
	if len(q.Question) != 1 {
		reply.Rcode = dns.RcodeFormatError
		return
	}
	question := q.Question[0]
	name, err := parseName(question.Name)
	if err != nil || question.Qclass != dns.ClassINET || !g.current().knows(name) {
		if err != nil {
			name = question.Name[:min(len(question.Name), maxName)]
		}
		g.denials.note("dns", name, UnknownName)
		reply.Rcode = dns.RcodeRefused
		return
	}
	switch question.Qtype {
	case dns.TypeA:
		g.fillAddresses(ctx, question.Name, name, reply)
	case dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB:
	default:
		g.denials.note("dns", name, QueryType)
		reply.Rcode = dns.RcodeRefused
	}
}

// fillAddresses looks name up, and opens the addresses that it tells the guest.
func (g *Gateway) fillAddresses(ctx context.Context, asked, name string, reply *dns.Msg) {
	found := g.lookup(ctx, name)
	reply.Rcode = found.rcode
	until := g.now().Add(found.ttl + grace)
	for _, addr := range found.addrs {
		g.names.open(addr, name, until)
		reply.Answer = append(reply.Answer, &dns.A{
			Hdr: dns.RR_Header{Name: asked, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: uint32(found.ttl.Seconds())},
			A:   addr.AsSlice(),
		})
	}
}

// found is what a name resolved to. All addresses may be reached.
type found struct {
	rcode int
	addrs []netip.Addr
	ttl   time.Duration
}

// lookup asks for the addresses of a name, and drops those that none may reach:
// a name that is allowed must not lead into the host or its networks.
func (g *Gateway) lookup(ctx context.Context, name string) found {
	answer, err := g.ask(ctx, name)
	if err != nil {
		return found{rcode: dns.RcodeServerFailure}
	}
	addrs, ttl := addresses(answer, name)
	f := found{rcode: answer.Rcode, ttl: min(max(ttl, minTTL), maxTTL)}
	bounds := g.current().bounds
	for _, addr := range addrs {
		if reason := bounds.forbidden(addr); reason != "" {
			g.denials.note("dns", shown(name, addr.String()), reason)
			continue
		}
		f.addrs = append(f.addrs, addr)
	}
	return f
}

// addresses follows the names in an answer from the first to its addresses. The
// time to live is the least on the way.
func addresses(answer *dns.Msg, name string) (addrs []netip.Addr, ttl time.Duration) {
	const maxAliases = 16
	next := dns.Fqdn(name)
	ttl = maxTTL
	for range maxAliases {
		alias := ""
		for _, rr := range answer.Answer {
			header := rr.Header()
			if header.Class != dns.ClassINET || !sameName(header.Name, next) {
				continue
			}
			switch rr := rr.(type) {
			case *dns.A:
				if addr, ok := netip.AddrFromSlice(rr.A.To4()); ok && len(addrs) < maxAnswers {
					addrs = append(addrs, addr)
					ttl = min(ttl, time.Duration(header.Ttl)*time.Second)
				}
			case *dns.CNAME:
				if alias == "" {
					alias = rr.Target
					ttl = min(ttl, time.Duration(header.Ttl)*time.Second)
				}
			}
		}
		if len(addrs) > 0 || alias == "" {
			break
		}
		next = alias
	}
	return addrs, ttl
}

// sameName compares two names as DNS does.
func sameName(a, b string) bool { return dns.CanonicalName(a) == dns.CanonicalName(b) }
