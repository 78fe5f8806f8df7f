package vmm

import (
	"fmt"
	"net"
	"net/netip"
)

// Network is what the two ends of a machine's network card are called.
type Network struct {
	Guest      netip.Prefix // the guest's address, and how much of it names the link
	Gateway    netip.Addr   // the host's end of the link: the guest's only neighbour and its DNS server
	GuestMAC   net.HardwareAddr
	GatewayMAC net.HardwareAddr
}

// GuestNet is the network of every machine with a network card. All have the
// same addresses, each in a network namespace of its own, so that what a
// template was told at boot is true in its forks. They are locally administered:
// no card that was made has such an address.
func GuestNet() Network {
	return Network{
		Guest:      netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, 0, 2}), 30),
		Gateway:    netip.AddrFrom4([4]byte{172, 30, 0, 1}),
		GuestMAC:   net.HardwareAddr{0x02, 't', 'i', 'n', 'e', 2},
		GatewayMAC: net.HardwareAddr{0x02, 't', 'i', 'n', 'e', 1},
	}
}

// Option is the word of the kernel's command line that tells a guest of its
// network card. A guest without the word looks for none.
func (n Network) Option() string {
	return fmt.Sprintf("tine.net=%s,%s,%s", n.Guest, n.Gateway, n.GatewayMAC)
}

// Link is where one guest's traffic comes in. Its methods may be called at the
// same time, each from one goroutine, but WritePacket and Close from many. After
// Close, Accept and ReadPacket return net.ErrClosed, also to those who wait in
// them; any other error is of one connection or packet, and they are called
// again. All addresses are IPv4. Nothing that the guest sends goes anywhere but
// here.
type Link interface {
	// Accept waits for a TCP connection of the guest. It returns the connection,
	// which the caller closes, and where the guest meant to go.
	Accept() (conn net.Conn, dst netip.AddrPort, err error)
	// ReadPacket waits for a UDP packet of the guest and puts its payload into p,
	// cutting off what does not fit.
	ReadPacket(p []byte) (n int, src, dst netip.AddrPort, err error)
	// WritePacket sends the payload p to the guest, at dst, as if it came from
	// src. It does not keep p, and may drop what the guest does not take.
	WritePacket(p []byte, src, dst netip.AddrPort) error
	// Close lets go of the link. More than one call is fine.
	Close() error
}
