package egress

import (
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// clock is a time that a test sets.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func newClock() *clock { return &clock{at: time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

func TestResolve(t *testing.T) {
	t.Parallel()
	up := newNameServer(t,
		"a.example 300 A 93.184.216.34", "a.example 200 A 93.184.216.35",
		"alias.example 60 CNAME b.other.example", "b.other.example 30 CNAME c.other.example", "c.other.example 100 A 93.184.216.36",
		"loop.example 60 CNAME loop.example",
		"long.example 999999 A 93.184.216.37", "short.example 0 A 93.184.216.38",
		"inside.example 60 A 127.0.0.1", "inside.example 60 A 93.184.216.39", "inside.example 60 A 10.0.0.1",
		"meta.example 60 A 169.254.169.254",
		"stray.example 60 TXT x",
	)
	w := start(t, Config{Upstream: []string{up.addr}, Policy: compile(t, false,
		"a.example", "alias.example", "loop.example", "long.example", "short.example", "inside.example", "meta.example", "stray.example", "gone.example")})
	tests := map[string]struct {
		name  string
		kind  uint16
		rcode int
		addrs string
	}{
		"addresses":     {"a.example", dns.TypeA, dns.RcodeSuccess, "a.example. 200 93.184.216.34, a.example. 200 93.184.216.35"},
		"as-asked":      {"A.eXample", dns.TypeA, dns.RcodeSuccess, "A.eXample. 200 93.184.216.34, A.eXample. 200 93.184.216.35"},
		"alias":         {"alias.example", dns.TypeA, dns.RcodeSuccess, "alias.example. 30 93.184.216.36"},
		"loop":          {"loop.example", dns.TypeA, dns.RcodeSuccess, ""},
		"long":          {"long.example", dns.TypeA, dns.RcodeSuccess, "long.example. 3600 93.184.216.37"},
		"short":         {"short.example", dns.TypeA, dns.RcodeSuccess, "short.example. 1 93.184.216.38"},
		"rebinding":     {"inside.example", dns.TypeA, dns.RcodeSuccess, "inside.example. 60 93.184.216.39"},
		"metadata":      {"meta.example", dns.TypeA, dns.RcodeSuccess, ""},
		"no-address":    {"stray.example", dns.TypeA, dns.RcodeSuccess, ""},
		"gone":          {"gone.example", dns.TypeA, dns.RcodeNameError, ""},
		"unknown":       {"evil.example", dns.TypeA, dns.RcodeRefused, ""},
		"below":         {"x.a.example", dns.TypeA, dns.RcodeRefused, ""},
		"ipv6":          {"a.example", dns.TypeAAAA, dns.RcodeSuccess, ""},
		"https":         {"a.example", dns.TypeHTTPS, dns.RcodeSuccess, ""},
		"svcb":          {"a.example", dns.TypeSVCB, dns.RcodeSuccess, ""},
		"text":          {"a.example", dns.TypeTXT, dns.RcodeRefused, ""},
		"any":           {"a.example", dns.TypeANY, dns.RcodeRefused, ""},
		"reverse":       {"34.216.184.93.in-addr.arpa", dns.TypePTR, dns.RcodeRefused, ""},
		"root":          {".", dns.TypeA, dns.RcodeRefused, ""},
		"no-host-name":  {`a\.b\000.example`, dns.TypeA, dns.RcodeRefused, ""},
		"unknown-type6": {"evil.example", dns.TypeAAAA, dns.RcodeRefused, ""},
	}
	for name, tt := range tests { // one after the other: there is one guest
		a := w.resolve(t, tt.name, tt.kind)
		if a.Rcode != tt.rcode || addrs(a) != tt.addrs {
			t.Errorf("%s: %s, %q, want %s, %q", name, dns.RcodeToString[a.Rcode], addrs(a), dns.RcodeToString[tt.rcode], tt.addrs)
		}
	}
	for _, name := range up.queries() {
		if strings.Contains(name, "evil") || strings.Contains(name, "arpa") || strings.HasPrefix(name, "x.") {
			t.Errorf("the upstream heard of %s", name)
		}
	}
	w.wantDenial(t, "dns", "evil.example", UnknownName)
	w.wantDenial(t, "dns", "a.example", QueryType)
	w.wantDenial(t, "dns", "inside.example (127.0.0.1)", Loopback)
	w.wantDenial(t, "dns", "inside.example (10.0.0.1)", PrivateNetwork)
	w.wantDenial(t, "dns", "meta.example (169.254.169.254)", LinkLocal)
	if got := w.Stats().DNSQueries; got != uint64(len(tests)) {
		t.Errorf("%d queries, want %d", got, len(tests))
	}
	for text, want := range map[string]int{"93.184.216.36": 1, "93.184.216.39": 1, "127.0.0.1": 0, "10.0.0.1": 0} {
		if got := w.names.of(netip.MustParseAddr(text)); len(got) != want {
			t.Errorf("%s is open for %v", text, got)
		}
	}
}

// What an answer opens is open for the rule's ports, until its time has passed.
func TestAnswersOpenAddresses(t *testing.T) {
	t.Parallel()
	c := newClock()
	up := newNameServer(t, "a.example 60 A 93.184.216.34")
	w := start(t, Config{Upstream: []string{up.addr}, Policy: compile(t, false, "a.example:443"), Now: c.now})
	at := func(port uint16) Reason {
		return w.decide(w.current(), TCP, netip.AddrPortFrom(netip.MustParseAddr("93.184.216.34"), port)).reason
	}
	if at(443) != NoRule {
		t.Error("open before it was asked for")
	}
	w.resolve(t, "a.example", dns.TypeA)
	if at(443) != "" || at(80) != NoRule {
		t.Errorf("443: %q, 80: %q", at(443), at(80))
	}
	c.pass(60*time.Second + grace - time.Second)
	if at(443) != "" {
		t.Error("closed too early")
	}
	w.resolve(t, "a.example", dns.TypeA)
	c.pass(2 * time.Second)
	if at(443) != "" {
		t.Error("a new answer does not extend")
	}
	c.pass(time.Minute + grace)
	if at(443) != NoRule {
		t.Error("still open")
	}
}

func TestSizesOfAnswers(t *testing.T) {
	t.Parallel()
	var records []string
	for i := range 100 {
		records = append(records, fmt.Sprintf("big.example 60 A 93.184.217.%d", i))
	}
	up := newNameServer(t, records...) // too long for UDP there, too
	w := start(t, Config{Upstream: []string{up.addr}, Policy: compile(t, false, "big.example")})
	edns := func(size uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.SetEdns0(size, false) } }
	for size, tune := range map[int][]func(*dns.Msg){512: nil, 1232: {edns(4096)}, 800: {edns(800)}} {
		a := w.resolve(t, "big.example", dns.TypeA, tune...)
		a.Compress = true // as it came
		if a.Len() > size || !a.Truncated || len(a.Answer) == 0 {
			t.Errorf("%d bytes, truncated %v, %d answers; want at most %d bytes", a.Len(), a.Truncated, len(a.Answer), size)
		}
	}
	guest := w.link.connect(t, anyDNS)
	for range 2 { // on one connection
		a := resolveTCP(t, guest, query(t, "big.example", dns.TypeA))
		if a.Truncated || len(a.Answer) != 100 {
			t.Errorf("over TCP: %d answers", len(a.Answer))
		}
	}
	_, _ = guest.Write([]byte{0xff, 0xff}) // more than a query may have
	if n, err := guest.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("a huge query: %d bytes, error %v", n, err)
	}
}

func resolveTCP(tb testing.TB, guest io.ReadWriter, asked []byte) *dns.Msg {
	tb.Helper()
	if _, err := guest.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(asked))), asked...)); err != nil {
		tb.Fatal(err)
	}
	var size [2]byte
	if _, err := io.ReadFull(guest, size[:]); err != nil {
		tb.Fatal(err)
	}
	data := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(guest, data); err != nil {
		tb.Fatal(err)
	}
	var a dns.Msg
	if err := a.Unpack(data); err != nil {
		tb.Fatal(err)
	}
	return &a
}

// The guest believes what we believe, so answers to other queries are passed
// over, and a server that fails is not the last one that is asked.
func TestUpstreamIsNotTrusted(t *testing.T) {
	t.Parallel()
	evil := func(_ string, q []byte, a *dns.Msg) [][]byte {
		pack := func(f func(m *dns.Msg)) []byte {
			m := a.Copy()
			rr, _ := dns.NewRR(m.Question[0].Name + " 60 A 66.66.66.66")
			m.Rcode, m.Answer = dns.RcodeSuccess, []dns.RR{rr}
			f(m)
			packed, _ := m.Pack()
			return packed
		}
		packed, _ := a.Pack()
		return [][]byte{
			pack(func(m *dns.Msg) { m.Id++ }),
			pack(func(m *dns.Msg) { m.Question[0].Name = "b.example." }),
			pack(func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAAAA }),
			pack(func(m *dns.Msg) { m.Response = false }),
			pack(func(m *dns.Msg) { m.Question = nil }),
			q,
			{1},
			{},
			packed,
		}
	}
	broken := newNameServer(t)
	broken.set(func(s *nameServer) {
		s.rewrite = func(_ string, _ []byte, a *dns.Msg) [][]byte {
			a.Rcode = dns.RcodeServerFailure
			packed, _ := a.Pack()
			return [][]byte{packed}
		}
	})
	good := newNameServer(t, "a.example 60 A 93.184.216.34", "a.example 60 A 93.184.216.35")
	good.set(func(s *nameServer) { s.rewrite = evil })
	w := start(t, Config{Upstream: []string{broken.addr, good.addr}, Policy: compile(t, false, "a.example")})
	if a := w.resolve(t, "a.example", dns.TypeA); addrs(a) != "a.example. 60 93.184.216.34, a.example. 60 93.184.216.35" {
		t.Errorf("got %s", addrs(a))
	}
	if len(broken.queries()) != 1 {
		t.Errorf("asked %v", broken.queries())
	}
	// An answer that has records of others in it opens none of them.
	good.set(func(s *nameServer) {
		s.rewrite = func(_ string, _ []byte, a *dns.Msg) [][]byte {
			rr, _ := dns.NewRR("other.example. 60 A 66.66.66.66")
			a.Answer = append(a.Answer, rr)
			packed, _ := a.Pack()
			return [][]byte{packed}
		}
	})
	if a := w.resolve(t, "a.example", dns.TypeA); len(a.Answer) != 2 {
		t.Errorf("got %s", addrs(a))
	}
}

func TestNoUpstream(t *testing.T) {
	t.Parallel()
	silent := newNameServer(t)
	silent.set(func(s *nameServer) { s.rewrite = func(string, []byte, *dns.Msg) [][]byte { return nil } })
	for name, upstream := range map[string][]string{"none": nil, "silent": {silent.addr}, "closed": {"127.0.0.1:1"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := start(t, Config{Upstream: upstream, Policy: compile(t, false, "a.example")},
				func(l *limits) { l.upstream = 50 * time.Millisecond })
			if a := w.resolve(t, "a.example", dns.TypeA); a.Rcode != dns.RcodeServerFailure {
				t.Errorf("got %s", dns.RcodeToString[a.Rcode])
			}
		})
	}
}

// A guest that asks as fast as it can is not answered as fast.
func TestRateOfQueries(t *testing.T) {
	t.Parallel()
	c := newClock()
	w := start(t, Config{Policy: compile(t, false, "a.example"), Now: c.now}, func(l *limits) { l.queryBurst = 20 })
	flood := func() {
		for range 30 {
			w.link.send(query(t, "evil.example", dns.TypeA), guestDNS, anyDNS)
		}
	}
	flood()
	eventually(t, "drops", func() bool { return w.Stats().DNSDropped == 10 })
	c.pass(100 * time.Millisecond) // 200 a second
	flood()
	eventually(t, "drops", func() bool { return w.Stats().DNSDropped == 20 })
	for range 40 {
		w.link.receive(t)
	}
	w.wantDenial(t, "dns", "evil.example", UnknownName)
	if s := w.Stats(); s.DNSQueries != 40 || s.Denied != 40 {
		t.Errorf("stats: %+v", s)
	}
	w.link.send(make([]byte, maxQuery+1), guestDNS, anyDNS)
	eventually(t, "a drop", func() bool { return w.Stats().DNSDropped == 21 })
}

func TestQueriesInFlight(t *testing.T) {
	t.Parallel()
	silent := newNameServer(t)
	silent.set(func(s *nameServer) { s.rewrite = func(string, []byte, *dns.Msg) [][]byte { return nil } })
	w := start(t, Config{Upstream: []string{silent.addr}, Policy: compile(t, false, "a.example")},
		func(l *limits) { l.queries, l.upstream = 4, 10*time.Minute })
	for range 10 {
		w.link.send(query(t, "a.example", dns.TypeA), guestDNS, anyDNS)
	}
	eventually(t, "drops", func() bool { return w.Stats().DNSDropped == 6 })
	w.stop() // does not wait for the silent server
}

func TestMalformedQueries(t *testing.T) {
	t.Parallel()
	w := start(t, Config{Policy: compile(t, false, "a.example")})
	good := query(t, "a.example", dns.TypeAAAA)
	two := query(t, "a.example", dns.TypeAAAA, func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) })
	tests := map[string]struct {
		query []byte
		rcode int // -1: no answer
	}{
		"good":     {good, dns.RcodeSuccess},
		"cut":      {good[:len(good)-3], dns.RcodeFormatError},
		"short":    {good[:11], -1},
		"empty":    {nil, -1},
		"two":      {two, dns.RcodeFormatError},
		"none":     {query(t, "a.example", dns.TypeA, func(m *dns.Msg) { m.Question = nil }), dns.RcodeFormatError},
		"answer":   {query(t, "a.example", dns.TypeA, func(m *dns.Msg) { m.Response = true }), -1},
		"update":   {query(t, "a.example", dns.TypeA, func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), dns.RcodeNotImplemented},
		"chaos":    {query(t, "a.example", dns.TypeA, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), dns.RcodeRefused},
		"trailing": {append(slices.Clone(good), 1, 2, 3), dns.RcodeSuccess},
	}
	for name, tt := range tests {
		got := -1
		if a := w.answer(t.Context(), tt.query, false); a != nil {
			var m dns.Msg
			if err := m.Unpack(a); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			got = m.Rcode
		}
		if got != tt.rcode {
			t.Errorf("%s: %d, want %d", name, got, tt.rcode)
		}
	}
}

func FuzzQuery(f *testing.F) {
	f.Add(query(f, "a.example", dns.TypeA), true)
	f.Add(query(f, "b.example", dns.TypeAAAA, func(m *dns.Msg) { m.SetEdns0(4096, true) }), false)
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01"), false)
	g, err := New(Config{Policy: compile(f, false, "a.example", "*.b.example")})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, data []byte, tcp bool) {
		if len(data) > maxQuery {
			return
		}
		a := g.answer(t.Context(), data, tcp)
		if a == nil {
			return
		}
		var m dns.Msg
		if err := m.Unpack(a); err != nil || !m.Response || m.Id != binary.BigEndian.Uint16(data) {
			t.Fatalf("answer %x: %v", a, err)
		}
		if !tcp && len(a) > ednsSize {
			t.Fatalf("%d bytes", len(a))
		}
	})
}

func FuzzAnswer(f *testing.F) {
	var q dns.Msg
	q.SetQuestion("a.example.", dns.TypeA)
	q.Id = 7
	reply := new(dns.Msg).SetReply(&q)
	for _, text := range []string{"a.example. 60 CNAME b.example.", "b.example. 60 A 93.184.216.34", "b.example. 60 A 127.0.0.1"} {
		rr, err := dns.NewRR(text)
		if err != nil {
			f.Fatal(err)
		}
		reply.Answer = append(reply.Answer, rr)
	}
	packed, err := reply.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Fuzz(func(t *testing.T, data []byte) {
		answer := answerTo(&q, data)
		if answer == nil {
			return
		}
		all, ttl := addresses(answer, "a.example")
		if len(all) > maxAnswers || ttl < 0 || ttl > maxTTL {
			t.Fatalf("%d addresses for %v", len(all), ttl)
		}
		for _, a := range all {
			if !a.Is4() {
				t.Fatalf("address %v", a)
			}
		}
	})
}

func TestNamesAreBounded(t *testing.T) {
	t.Parallel()
	c := newClock()
	n := newNames(c.now, 100)
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{93, 1, byte(i >> 8), byte(i)}) }
	for i := range 1000 {
		n.open(addr(i), "a.example", c.now().Add(time.Duration(1000+i)*time.Second))
	}
	if len(n.queue) != 100 || len(n.byAddr) != 100 {
		t.Fatalf("%d pairs, %d addresses", len(n.queue), len(n.byAddr))
	}
	if len(n.of(addr(899))) != 0 || len(n.of(addr(900))) != 1 {
		t.Error("what ends first does not go first")
	}
	n.open(addr(999), "a.example", c.now()) // does not shorten
	n.open(addr(999), "b.example", c.now().Add(time.Hour))
	if got := n.of(addr(999)); len(got) != 2 {
		t.Errorf("open for %v", got)
	}
	for i := range 1000 { // many names of one address count, too
		n.open(addr(0), fmt.Sprintf("%d.example", i), c.now().Add(2*time.Hour))
	}
	if got := n.of(addr(0)); len(n.queue) > 100 || len(got) != maxNamesOfAddr {
		t.Errorf("%d names, %d pairs, %d addresses", len(got), len(n.queue), len(n.byAddr))
	}
	c.pass(3 * time.Hour)
	n.open(addr(1), "a.example", c.now().Add(time.Hour))
	if len(n.queue) != 1 || len(n.byAddr) != 1 {
		t.Errorf("after their end: %d pairs, %d addresses", len(n.queue), len(n.byAddr))
	}
}
