// Package egress decides what a sandbox may send to the network, and carries
// it.
//
// A guest's network card ends in a place that has no way out. What it sends
// comes in by a Link, as connections and packets with the address that they were
// meant for, and leaves only if a Gateway dials that address from the host. So
// what no rule allows goes nowhere, and so does what this package does not
// understand. Names are answered here too: a rule that names a domain opens the
// addresses which the domain's own answers named, for as long as these last.
//
// The package knows nothing of namespaces, firewalls or root: that is for
// whoever makes the Link. Everything that it reads from a Link, or from a name
// server, is taken to be hostile, and what it keeps of it is bounded.
package egress

import (
	"net"
	"net/netip"
)

// Link is where one guest's traffic comes in. Its methods may be called at the
// same time, each from one goroutine, but WritePacket and Close from many.
// After Close, Accept and ReadPacket return net.ErrClosed, also to those who
// wait in them; any other error is of one connection or packet, and they are
// called again. All addresses are IPv4.
type Link interface {
	// Accept waits for a TCP connection of the guest. It returns the
	// connection, which the caller closes and whose RemoteAddr is the guest's,
	// and where the guest meant to go. To be relayed by splice(2) it must be a
	// *net.TCPConn.
	Accept() (conn net.Conn, dst netip.AddrPort, err error)
	// ReadPacket waits for a UDP packet of the guest and puts its payload into
	// p, cutting off what does not fit.
	ReadPacket(p []byte) (n int, src, dst netip.AddrPort, err error)
	// WritePacket sends the payload p to the guest, at dst, as if it came from
	// src. It does not keep p, and may drop what the guest does not take.
	WritePacket(p []byte, src, dst netip.AddrPort) error
	// Close ends the link. More than one call is fine.
	Close() error
}
