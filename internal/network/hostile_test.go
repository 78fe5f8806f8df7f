package network

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm"
)

// What has another source than the guest's address goes nowhere, and is counted.
func TestSpoofedSources(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	to := netip.MustParseAddrPort("198.51.100.7:80")
	sources := []string{"10.0.0.1", "172.30.0.1", "172.30.0.3", "172.30.0.0", "127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1", "8.8.8.8", "198.51.100.7"}
	for _, source := range sources {
		src := netip.MustParseAddr(source)
		w.send(t, datagram("spoofed", src, to))
		w.send(t, segment(src, 4000, to, 1, 0, syn))
		w.send(t, echo(src, gateway(), 1))
	}
	w.quiet(t)
	if got, want := w.counters(t)[0], uint64(3*len(sources)); got != want {
		t.Errorf("%d packets were counted, want %d", got, want)
	}
}

// Where many would hear it, nobody does.
func TestManyDestinations(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	everybody := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	destinations := []string{"224.0.0.1", "224.0.0.251", "239.255.255.250", "240.0.0.1", "255.255.255.255"}
	for _, destination := range destinations {
		to := netip.AddrPortFrom(netip.MustParseAddr(destination), 5353)
		packet := ipv4(unix.IPPROTO_UDP, guest(), to.Addr(), udp("to all", 5353, 5353))
		w.send(t, ethernet(unix.ETH_P_IP, packet))
		w.send(t, ethernetTo(everybody, unix.ETH_P_IP, packet))
		w.send(t, ethernetTo(net.HardwareAddr{1, 0, 0x5e, 0, 0, 1}, unix.ETH_P_IP, packet))
		w.send(t, segment(guest(), 4000, to, 1, 0, syn))
		w.send(t, echo(guest(), to.Addr(), 1))
	}
	w.quiet(t)
	if got, want := w.counters(t)[1], uint64(5*len(destinations)); got != want {
		t.Errorf("%d packets were counted, want %d", got, want)
	}
	// Frames for other hosts are not even looked at.
	w.send(t, ethernetTo(net.HardwareAddr{2, 2, 2, 2, 2, 2}, unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, guest(), gateway(), udp("x", 1, 1))))
	w.quiet(t)
}

// Addresses that mean this host to any host lead nowhere. Those of the link lead
// to the relay like all others.
func TestOwnAddresses(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	for _, destination := range []string{"127.0.0.1:1", "127.0.0.1:22", "0.0.0.0:1"} {
		to := netip.MustParseAddrPort(destination)
		w.send(t, datagram("own", guest(), to))
		w.send(t, segment(guest(), 4000, to, 1, 0, syn))
	}
	w.quiet(t)
	for _, destination := range []string{"172.30.0.0:1", "172.30.0.1:1", "172.30.0.2:1", "172.30.0.3:1"} {
		to := netip.MustParseAddrPort(destination)
		w.send(t, datagram("link", guest(), to))
		if got, dst := w.read(t); got != "link" || dst != to {
			t.Errorf("%q to %v, want it to %v", got, dst, to)
		}
	}
	w.quiet(t)
}

// A new namespace begins with the host's settings, which may be a router's. They
// change nothing.
func TestHostIsARouter(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	within(t, w.ns, func() error {
		var err error
		for name, value := range map[string]string{
			"ip_forward": "1", "conf/all/rp_filter": "1", "conf/all/route_localnet": "1", "conf/all/forwarding": "1",
			"conf/all/accept_local": "1", "conf/all/accept_source_route": "1", "conf/all/proxy_arp": "1", "conf/all/log_martians": "1",
			"conf/all/arp_accept": "1", "conf/all/accept_redirects": "1", "icmp_echo_ignore_all": "0",
		} {
			err = errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/"+name, []byte(value), 0o600))
		}
		return err
	})
	w.send(t, datagram("spoofed", netip.MustParseAddr("10.0.0.1"), netip.MustParseAddrPort("1.1.1.1:1")))
	w.send(t, segment(gateway(), 4000, netip.MustParseAddrPort("1.1.1.1:1"), 1, 0, syn))
	w.send(t, echo(guest(), netip.MustParseAddr("8.8.8.8"), 1))
	w.send(t, ethernet(unix.ETH_P_IP, ipv4(47, guest(), netip.MustParseAddr("8.8.8.8"), make([]byte, 64))))
	w.quiet(t)
	to := netip.MustParseAddrPort("8.8.8.8:53")
	if !w.connect(t, 4000, to) {
		t.Fatal("no connection")
	}
	conn, dst, err := w.link.Accept()
	if err != nil || dst != to {
		t.Fatalf("connection to %v, %v", dst, err)
	}
	_ = conn.Close()
}

// IPv6 has no answer.
func TestIPv6(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	link, all := netip.MustParseAddr("fe80::2"), netip.MustParseAddr("ff02::1")
	for _, dst := range []netip.Addr{all, netip.MustParseAddr("ff02::1:ff00:1"), netip.MustParseAddr("fe80::1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("::ffff:172.30.0.1"), netip.IPv6Loopback()} {
		solicitation := append([]byte{135, 0, 0, 0, 0, 0, 0, 0}, dst.AsSlice()...)
		binary.BigEndian.PutUint16(solicitation[2:], naiveChecksum(append(pseudo6(unix.IPPROTO_ICMPV6, link, dst, len(solicitation)), solicitation...)))
		packet := udp("six", 1, 53)
		binary.BigEndian.PutUint16(packet[6:], naiveChecksum(append(pseudo6(unix.IPPROTO_UDP, link, dst, len(packet)), packet...)))
		for protocol, payload := range map[byte][]byte{unix.IPPROTO_ICMPV6: solicitation, unix.IPPROTO_UDP: packet} {
			w.send(t, ethernet(unix.ETH_P_IPV6, ipv6(protocol, link, dst, payload)))
			w.send(t, ethernetTo(net.HardwareAddr{0x33, 0x33, 0, 0, 0, 1}, unix.ETH_P_IPV6, ipv6(protocol, link, dst, payload)))
		}
	}
	w.quiet(t)
}

func ipv6(protocol byte, src, dst netip.Addr, payload []byte) []byte {
	p := append([]byte{0x60, 0, 0, 0}, byte(len(payload)>>8), byte(len(payload)), protocol, 255)
	p = append(append(p, src.AsSlice()...), dst.AsSlice()...)
	return append(p, payload...)
}

func pseudo6(protocol byte, src, dst netip.Addr, size int) []byte {
	p := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	return append(p, 0, 0, byte(size>>8), byte(size), 0, 0, 0, protocol)
}

// A packet in fragments arrives whole, in whatever order they come. Fragments
// that do not make a packet never arrive.
func TestFragments(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	to := netip.MustParseAddr("198.51.100.7")
	payload := strings.Repeat("0123456789abcdef", 200)
	whole := udp(payload, 7, 99)
	fragment := func(id, from, until int) {
		more := 0
		if until < len(whole) {
			more = 1
		}
		w.send(t, ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, guest(), to, whole[from:until], id, from, more)))
	}
	for id, order := range [][]int{{0, 1, 2}, {2, 0, 1}, {2, 1, 0}} {
		for _, part := range order {
			fragment(id+1, part*1400, min((part+1)*1400, len(whole)))
		}
		if got, dst := w.read(t); got != payload || dst.String() != "198.51.100.7:99" {
			t.Errorf("order %v: %d bytes to %v", order, len(got), dst)
		}
	}
	fragment(10, 0, 1400) // the rest never comes
	fragment(11, 1400, len(whole))
	fragment(12, 0, 1400) // overlaps
	fragment(12, 1392, len(whole))
	fragment(13, 0, 8) // too short for a port to be in
	for i := range 2000 {
		w.send(t, ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, guest(), to, make([]byte, 1400), 1000+i, 1400, 1)))
	}
	w.send(t, ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, guest(), to, make([]byte, 1400), 20, 65528, 0))) // ends beyond 64 KiB
	w.quiet(t)
}

func echo(src, dst netip.Addr, number uint16) []byte {
	p := []byte{8, 0, 0, 0, 0, 7}
	p = append(binary.BigEndian.AppendUint16(p, number), "ping"...)
	binary.BigEndian.PutUint16(p[2:], naiveChecksum(p))
	return ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_ICMP, src, dst, p))
}

// The gateway answers pings, some; nobody else does.
func TestPing(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	for i := range uint16(100) {
		w.send(t, echo(guest(), netip.MustParseAddr("8.8.8.8"), i))
	}
	w.quiet(t)
	begin := time.Now()
	const flood = 2000
	replies := 0
	for i := range uint16(flood) {
		w.send(t, echo(guest(), gateway(), i))
		replies += len(w.replies(t))
	}
	most := 20 + 10*int(time.Since(begin)/time.Second+1)
	if replies < 1 || replies > most {
		t.Errorf("%d of %d pings were answered, want 1 to %d", replies, flood, most)
	}
	w.quiet(t)
}

// All networks of the host share one table of neighbours: what a guest says of
// itself is not for it.
func TestNeighboursAreNotLearned(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	rng := rand.New(rand.NewPCG(1, 2))
	everybody := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for i := range 100_000 {
		// Hardware type, protocol, sizes; a request or an answer.
		p := []byte{0, 1, 8, 0, 6, 4, 0, byte(1 + i%2)}
		p = append(p, 2, 0, 0)
		p = append(p, byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32()))
		sender := [4]byte{10, byte(rng.Uint32()), byte(rng.Uint32()), byte(rng.Uint32())}
		switch i % 10 {
		case 8:
			sender = guest().As4()
		case 9:
			sender = gateway().As4()
		}
		p = append(p, sender[:]...)
		p = append(p, 0, 0, 0, 0, 0, 0)
		p = append(p, gateway().AsSlice()...)
		w.send(t, ethernetTo(everybody, unix.ETH_P_ARP, p))
	}
	w.quiet(t)
	got := w.neighbours(t)
	if len(got) != 1 || got[0].State != netlink.NUD_PERMANENT || got[0].HardwareAddr.String() != vmm.GuestNet().GuestMAC.String() {
		t.Errorf("%d neighbours, the first %v", len(got), got[:min(len(got), 1)])
	}
	if err := w.link.WritePacket([]byte("x"), netip.MustParseAddrPort("1.1.1.1:1"), netip.AddrPortFrom(guest(), 1)); err != nil {
		t.Fatal(err)
	}
	replies := w.replies(t)
	if len(replies) != 1 || net.HardwareAddr(replies[0][:6]).String() != vmm.GuestNet().GuestMAC.String() {
		t.Errorf("a packet for the guest became %x", replies)
	}
}

// Other protocols end there.
func TestOtherProtocols(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	before := w.counters(t)[2]
	sent := 0
	for protocol := range 256 {
		if protocol == unix.IPPROTO_TCP || protocol == unix.IPPROTO_UDP {
			continue
		}
		for _, dst := range []netip.Addr{gateway(), netip.MustParseAddr("8.8.8.8")} {
			payload := make([]byte, 64)
			payload[0] = 13 // of ICMP: a timestamp, please
			w.send(t, ethernet(unix.ETH_P_IP, ipv4(byte(protocol), guest(), dst, payload)))
			sent++
		}
	}
	w.quiet(t)
	if got := w.counters(t)[2] - before; got != uint64(sent) {
		t.Errorf("%d packets were counted, want %d", got, sent)
	}
	for _, kind := range []uint16{unix.ETH_P_8021Q, unix.ETH_P_PAE, 0x88cc, unix.ETH_P_MPLS_UC, unix.ETH_P_PPP_SES, 3, 0xffff} {
		w.send(t, ethernet(kind, make([]byte, 100)))
	}
	w.quiet(t)
}

// Garbage of any size, with any header, does no harm.
func TestGarbage(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	rng := rand.New(rand.NewPCG(3, 4))
	good := append(make([]byte, virtioHeader), segment(guest(), 4000, netip.MustParseAddrPort("1.1.1.1:1"), 1, 0, 0)...)
	for i := range 5_000 {
		data := make([]byte, rng.IntN(2000))
		for j := range data {
			data[j] = byte(rng.Uint32())
		}
		if i%2 == 0 { // a frame that is almost good
			data = append([]byte{}, good...)
			for range 1 + rng.IntN(4) {
				data[rng.IntN(len(data)-ipHeader)] ^= 1 << rng.IntN(8)
			}
		}
		w.try(data)
	}
	for _, size := range []int{0, 1, virtioHeader, virtioHeader + 13, virtioHeader + 14, 1 << 16, 1<<16 + 100, 1 << 17, 1 << 20} {
		w.try(make([]byte, size))
		w.try(append(append([]byte{}, good...), make([]byte, size)...))
	}
	w.replies(t) // some were good after all
	for pending(t, w.link.udp) {
		w.read(t)
	}
	if got, _ := w.heard(t, "marker"); got != "marker" {
		t.Errorf("%.40q arrived", got)
	}
}

// Connections that nobody accepts are bounded, and when they are accepted, or
// were never meant, others get through.
func TestFloodOfConnections(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	for i := range 50_000 {
		to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{8, byte(i >> 16), byte(i >> 8), byte(i)}), uint16(i+1))
		w.send(t, segment(guest(), uint16(i), to, uint32(i), 0, syn))
	}
	w.replies(t)
	made := 0
	for i := range 2 * backlog {
		if w.connect(t, uint16(i+1), netip.MustParseAddrPort("203.0.113.9:443")) {
			made++
		}
	}
	accepted := 0
	for pending(t, w.link.tcp) {
		conn, _, err := w.link.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
		accepted++
	}
	if accepted < 1 || accepted > backlog+1 || made < accepted {
		t.Errorf("%d connections were made and %d waited, want at most %d", made, accepted, backlog+1)
	}
	w.replies(t)
	to := netip.MustParseAddrPort("203.0.113.9:444")
	if !w.connect(t, 40_000, to) {
		t.Fatal("no connection after a flood")
	}
	conn, dst, err := w.link.Accept()
	if err != nil || dst != to {
		t.Fatalf("connection to %v, %v", dst, err)
	}
	_ = conn.Close()
}

// Packets that nobody reads are bounded by the socket's buffer.
func TestFloodOfPackets(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	const flood = 50_000
	for i := range flood {
		w.send(t, datagram("flood", guest(), netip.AddrPortFrom(netip.AddrFrom4([4]byte{9, 9, 9, 9}), uint16(i+1))))
	}
	kept := 0
	for pending(t, w.link.udp) {
		w.read(t)
		kept++
	}
	if kept < 1 || kept > flood/10 {
		t.Errorf("%d of %d packets were kept", kept, flood)
	}
	w.quiet(t)
}
