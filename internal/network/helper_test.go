package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm"
)

// apart runs do on a thread that enter has brought to another network namespace.
// The thread comes back: the process's first cannot end, and would stay there.
func apart(enter, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- err
			return
		}
		if err = enter(); err == nil {
			err = do()
		}
		back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET)
		if back == nil {
			runtime.UnlockOSThread()
		}
		done <- errors.Join(err, back, own.Close())
	}()
	return <-done
}

// namespace makes a network namespace in which do has run. It starts from the one
// that from is, or from this process's.
func namespace(from *os.File, do func() error) (ns *os.File, err error) {
	err = apart(func() error {
		if from != nil {
			if setErr := unix.Setns(int(from.Fd()), unix.CLONE_NEWNET); setErr != nil {
				return setErr
			}
		}
		return unix.Unshare(unix.CLONE_NEWNET)
	}, func() error {
		var openErr error
		if ns, openErr = os.Open("/proc/thread-self/ns/net"); openErr != nil {
			return openErr
		}
		return do()
	})
	return ns, err
}

// within runs do in a network namespace.
func within(t *testing.T, ns *os.File, do func() error) {
	t.Helper()
	if err := apart(func() error { return unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET) }, do); err != nil {
		t.Fatal(err)
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: not root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("NOT TESTED: %v", err)
	}
}

// wire is a network that Setup has made, with the test at the guest's end.
type wire struct {
	ns   *os.File // to look into it
	tap  *os.File
	link *Link
}

// newWire makes a network in a namespace that starts from another.
func newWire(t *testing.T, from *os.File) *wire {
	t.Helper()
	return wireOf(t, from, func() ([]int, error) { return Setup(-1) })
}

// wireOf is newWire for a network that is set up in a way of its own.
func wireOf(t *testing.T, from *os.File, setup func() ([]int, error)) *wire {
	t.Helper()
	needRoot(t)
	var fds []int
	ns, err := namespace(from, func() (err error) { fds, err = setup(); return err })
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{ns: ns, tap: os.NewFile(uintptr(fds[fileTap]), "tap")}
	var files []*os.File
	for _, fd := range fds[fileTap+1:] {
		files = append(files, os.NewFile(uintptr(fd), "link"))
	}
	if w.link, err = Open(files); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.link.Close(); err != nil {
			t.Error(err)
		}
		_ = w.tap.Close() // a test may have closed it
		_ = w.ns.Close()
	})
	return w
}

// virtioHeader is in front of each frame: nothing is left for others to do.
const virtioHeader = 10

// send has the guest send a frame.
func (w *wire) send(t *testing.T, frame []byte) {
	t.Helper()
	if _, err := w.tap.Write(append(make([]byte, virtioHeader), frame...)); err != nil {
		t.Fatal(err)
	}
}

// try is send for what the kernel may refuse, with any header.
func (w *wire) try(data []byte) { _, _ = w.tap.Write(data) }

// replies are the frames that the guest was sent and has not read yet.
func (w *wire) replies(t *testing.T) [][]byte {
	t.Helper()
	raw, err := w.tap.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var all [][]byte
	buf := make([]byte, 1<<17)
	for {
		var n int
		var readErr error
		if err = raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buf) }); err != nil {
			t.Fatal(err)
		}
		if errors.Is(readErr, unix.EAGAIN) {
			return all
		}
		if readErr != nil {
			t.Fatal(readErr)
		}
		all = append(all, append([]byte{}, buf[virtioHeader:n]...))
	}
}

// pending reports whether there is a connection to accept or a packet to read.
func pending(t *testing.T, s syscall.Conn) bool {
	t.Helper()
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	fds := []unix.PollFd{{Events: unix.POLLIN}}
	if err = raw.Control(func(fd uintptr) { fds[0].Fd = int32(fd); _, err = unix.Poll(fds, 0) }); err != nil {
		t.Fatal(err)
	}
	return fds[0].Revents != 0
}

// heard is what comes of a packet that the guest may send: the first that
// arrives. What was sent before it and has not arrived never will.
func (w *wire) heard(t *testing.T, payload string) (got string, dst netip.AddrPort) {
	t.Helper()
	w.send(t, datagram(payload, guest(), netip.MustParseAddrPort("198.51.100.7:99")))
	return w.read(t)
}

func (w *wire) read(t *testing.T) (got string, dst netip.AddrPort) {
	t.Helper()
	if err := w.link.udp.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, src, dst, err := w.link.ReadPacket(buf)
	if err != nil {
		t.Fatal(err)
	}
	if src.Addr() != guest() {
		t.Errorf("packet from %v", src)
	}
	return string(buf[:n]), dst
}

// quiet checks that nothing of what was sent has arrived or was answered, and
// that what may be sent does arrive.
func (w *wire) quiet(t *testing.T) {
	t.Helper()
	if replies := w.replies(t); len(replies) > 0 {
		t.Errorf("%d replies, one is %x", len(replies), replies[0])
	}
	if got, _ := w.heard(t, "marker"); got != "marker" {
		t.Errorf("a packet of %d bytes has arrived: %.40q", len(got), got)
	}
	if pending(t, w.link.tcp) {
		t.Error("a connection has arrived")
	}
}

// counters are those of the rules that drop, first to last.
func (w *wire) counters(t *testing.T) (counts []uint64) {
	t.Helper()
	within(t, w.ns, func() error {
		c := &nftables.Conn{}
		table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "tine"}
		rules, err := c.GetRules(table, &nftables.Chain{Name: "guest", Table: table})
		for _, r := range rules {
			for _, e := range r.Exprs {
				if counter, ok := e.(*expr.Counter); ok {
					counts = append(counts, counter.Packets)
				}
			}
		}
		return err
	})
	if len(counts) != 3 {
		t.Fatalf("%d counters", len(counts))
	}
	return counts
}

// neighbours are those of the namespace.
func (w *wire) neighbours(t *testing.T) (list []netlink.Neigh) {
	t.Helper()
	within(t, w.ns, func() error {
		all, err := netlink.NeighList(0, netlink.FAMILY_V4)
		for _, n := range all {
			if n.State != netlink.NUD_NOARP { // the kernel's own, of loopback and the like
				list = append(list, n)
			}
		}
		return err
	})
	return list
}

func guest() netip.Addr   { return vmm.GuestNet().Guest.Addr() }
func gateway() netip.Addr { return vmm.GuestNet().Gateway }

// ethernet is a frame to the gateway.
func ethernet(kind uint16, payload []byte) []byte {
	n := vmm.GuestNet()
	return ethernetTo(n.GatewayMAC, kind, payload)
}

func ethernetTo(mac net.HardwareAddr, kind uint16, payload []byte) []byte {
	frame := append(append([]byte{}, mac...), vmm.GuestNet().GuestMAC...)
	frame = binary.BigEndian.AppendUint16(frame, kind)
	return append(frame, payload...)
}

// ipv4 is a packet, or a fragment of one if more or offset, in bytes, say so.
func ipv4(protocol byte, src, dst netip.Addr, payload []byte, fragment ...int) []byte {
	p := make([]byte, ipHeader+len(payload))
	p[0], p[8], p[9] = 0x45, 64, protocol
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	if len(fragment) == 3 {
		id, offset, more := fragment[0], fragment[1], fragment[2]
		binary.BigEndian.PutUint16(p[4:], uint16(id))
		binary.BigEndian.PutUint16(p[6:], uint16(offset/8|more<<13))
	}
	copy(p[offSource:], src.AsSlice())
	copy(p[offDestination:], dst.AsSlice())
	copy(p[ipHeader:], payload)
	binary.BigEndian.PutUint16(p[10:], naiveChecksum(p[:ipHeader]))
	return p
}

// naiveChecksum is that of RFC 1071, word by word with the carry at once.
func naiveChecksum(data []byte) uint16 {
	if len(data)%2 == 1 {
		data = append(append([]byte{}, data...), 0)
	}
	var sum uint16
	for ; len(data) > 0; data = data[2:] {
		word := binary.BigEndian.Uint16(data)
		sum += word
		if sum < word {
			sum++
		}
	}
	return ^sum
}

// udp is a packet without a checksum.
func udp(payload string, srcPort, dstPort uint16) []byte {
	p := binary.BigEndian.AppendUint16(nil, srcPort)
	p = binary.BigEndian.AppendUint16(p, dstPort)
	p = binary.BigEndian.AppendUint16(p, uint16(udpHeader+len(payload)))
	return append(append(p, 0, 0), payload...)
}

func datagram(payload string, src netip.Addr, dst netip.AddrPort) []byte {
	return ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_UDP, src, dst.Addr(), udp(payload, 7777, dst.Port())))
}

// Flags of TCP.
const (
	syn = 0x02
	ack = 0x10
)

func segment(src netip.Addr, srcPort uint16, dst netip.AddrPort, seq, acked uint32, flags byte) []byte {
	p := make([]byte, 20)
	binary.BigEndian.PutUint16(p, srcPort)
	binary.BigEndian.PutUint16(p[2:], dst.Port())
	binary.BigEndian.PutUint32(p[4:], seq)
	binary.BigEndian.PutUint32(p[8:], acked)
	p[12], p[13] = 5<<4, flags
	binary.BigEndian.PutUint16(p[14:], 64000)
	binary.BigEndian.PutUint16(p[16:], naiveChecksum(append(pseudo(unix.IPPROTO_TCP, src, dst.Addr(), len(p)), p...)))
	return ethernet(unix.ETH_P_IP, ipv4(unix.IPPROTO_TCP, src, dst.Addr(), p))
}

// pseudo is the header that checksums are also over.
func pseudo(protocol byte, src, dst netip.Addr, size int) []byte {
	p := append(append([]byte{}, src.AsSlice()...), dst.AsSlice()...)
	p = append(p, 0, protocol)
	return binary.BigEndian.AppendUint16(p, uint16(size))
}

// connect makes a connection by hand, and reports whether it was let.
func (w *wire) connect(t *testing.T, port uint16, dst netip.AddrPort) bool {
	t.Helper()
	w.send(t, segment(guest(), port, dst, 1000, 0, syn))
	for _, frame := range w.replies(t) {
		tcp := frame[14+ipHeader:]
		if binary.BigEndian.Uint16(tcp[2:]) == port && tcp[13] == syn|ack {
			w.send(t, segment(guest(), port, dst, 1001, binary.BigEndian.Uint32(tcp[4:])+1, ack))
			return true
		}
	}
	return false
}

// stack is a guest with a kernel of its own: another namespace, with a tap whose
// frames go to and fro.
type stack struct {
	*wire
	guest *os.File // the namespace
}

func newStack(t *testing.T) *stack {
	t.Helper()
	s := &stack{wire: newWire(t, nil)}
	var tap int
	ns, err := namespace(nil, func() (err error) {
		if tap, err = openTap(-1); err == nil {
			err = configureGuest()
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s.guest = ns
	theirs := os.NewFile(uintptr(tap), "guest's tap")
	done := make(chan struct{}, 2)
	for _, pair := range [][2]*os.File{{s.tap, theirs}, {theirs, s.tap}} {
		go func() {
			defer func() { done <- struct{}{} }()
			buf := make([]byte, 1<<17)
			for {
				n, err := pair[0].Read(buf)
				if err != nil {
					return // closed
				}
				_, _ = pair[1].Write(buf[:n]) // a frame may be lost
			}
		}()
	}
	t.Cleanup(func() {
		_ = errors.Join(theirs.Close(), s.tap.Close(), ns.Close())
		<-done
		<-done
	})
	return s
}

// configureGuest does what the agent does in a guest.
func configureGuest() error {
	n := vmm.GuestNet()
	link, err := netlink.LinkByName(TapName)
	if err != nil {
		return err
	}
	address := &net.IPNet{IP: n.Guest.Addr().AsSlice(), Mask: net.CIDRMask(n.Guest.Bits(), 32)}
	return errors.Join(
		netlink.LinkSetHardwareAddr(link, n.GuestMAC),
		netlink.AddrAdd(link, &netlink.Addr{IPNet: address}),
		netlink.LinkSetUp(link),
		netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: n.Gateway.AsSlice(), HardwareAddr: n.GatewayMAC,
		}),
		netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: n.Gateway.AsSlice()}),
	)
}

// dial has the guest connect.
func (s *stack) dial(t *testing.T, to netip.AddrPort) (conn net.Conn) {
	t.Helper()
	within(t, s.guest, func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second}
		conn, err = d.DialContext(t.Context(), "tcp4", to.String())
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// listen has the guest open a port for packets.
func (s *stack) listen(t *testing.T) (conn net.PacketConn) {
	t.Helper()
	within(t, s.guest, func() (err error) {
		var lc net.ListenConfig
		conn, err = lc.ListenPacket(t.Context(), "udp4", guest().String()+":0")
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func count(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
