package network

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// TestUDPPacket: the checksum of a packet with its checksum in it is zero, and
// all else is where the RFCs have it.
func TestUDPPacket(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		address := func(name string) netip.AddrPort {
			b := rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, name)
			return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), rapid.Uint16().Draw(t, name+"-port"))
		}
		src, dst := address("src"), address("dst")
		payload := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 0x7f, 0xff}), 0, maxPayload).Draw(t, "payload")
		p := udpPacket(payload, src, dst)
		datagram := p[ipHeader:]
		if got := naiveChecksum(append(pseudo(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), len(datagram)), datagram...)); got != 0 {
			t.Errorf("checksum is off by %x", got)
		}
		if binary.BigEndian.Uint16(datagram[6:]) == 0 {
			t.Error("checksum 0 says that there is none")
		}
		want := ipv4(unix.IPPROTO_UDP, src.Addr(), dst.Addr(), udp(string(payload), src.Port(), dst.Port()))
		copy(want[ipHeader+6:], datagram[6:8])
		copy(p[10:], want[10:12]) // the kernel fills it in
		if string(p) != string(want) {
			t.Errorf("packet is %x, want %x", p, want)
		}
	})
}

// TestChecksumZero: where the sum comes to zero, the packet says 0xffff.
func TestChecksumZero(t *testing.T) {
	t.Parallel()
	src, dst := netip.MustParseAddrPort("1.1.1.1:1"), netip.MustParseAddrPort("2.2.2.2:2")
	sum := binary.BigEndian.Uint16(udpPacket([]byte{0, 0}, src, dst)[ipHeader+6:])
	p := udpPacket(binary.BigEndian.AppendUint16(nil, sum), src, dst)
	if got := binary.BigEndian.Uint16(p[ipHeader+6:]); got != 0xffff {
		t.Errorf("checksum %x", got)
	}
}

func FuzzDestination(f *testing.F) {
	message := func(level, kind int32, data []byte) []byte {
		oob := make([]byte, unix.CmsgSpace(len(data)))
		binary.NativeEndian.PutUint64(oob, uint64(unix.CmsgLen(len(data))))
		binary.NativeEndian.PutUint32(oob[8:], uint32(level))
		binary.NativeEndian.PutUint32(oob[12:], uint32(kind))
		copy(oob[unix.CmsgLen(0):], data)
		return oob
	}
	address := []byte{2, 0, 0, 53, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0}
	good := message(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, address)
	f.Add(good)
	f.Add(append(message(unix.SOL_IP, unix.IP_TTL, []byte{64, 0, 0, 0}), good...))
	f.Add(message(unix.SOL_IP, unix.IP_RECVORIGDSTADDR, address[:7]))
	f.Add(good[:20])
	f.Add([]byte{})
	if dst, err := destination(good); err != nil || dst.String() != "1.2.3.4:53" {
		f.Errorf("destination %v, %v", dst, err)
	}
	f.Fuzz(func(t *testing.T, oob []byte) {
		if dst, err := destination(oob); err == nil && !dst.Addr().Is4() {
			t.Errorf("destination %v", dst)
		}
	})
}
