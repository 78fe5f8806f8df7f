package network

import (
	"encoding/binary"
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm"
)

// Where a rule finds things in an IPv4 header.
const (
	offSource      = 12
	offDestination = 16
)

// installRules decides what becomes of what the guest sends, as `nft list
// ruleset` in the namespace shows:
//
//	table inet tine {
//	  chain guest { type filter hook prerouting priority mangle; policy drop;
//	    iifname "lo" accept
//	    ip saddr != 172.30.0.2 counter drop          # spoofed
//	    ip daddr 224.0.0.0-255.255.255.255 counter drop
//	    meta l4proto { tcp, udp } tproxy ip to :1 accept
//	    icmp type echo-request ip daddr 172.30.0.1 limit rate 10/second accept
//	    counter
//	  }
//	}
//
// All else ends there: other protocols, and IPv6. Fragments are put together
// before, as tproxy needs whole packets.
func installRules(c *nftables.Conn) error {
	n := vmm.GuestNet()
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "tine"})
	drop := nftables.ChainPolicyDrop
	chain := c.AddChain(&nftables.Chain{
		Name: "guest", Table: t, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle, Policy: &drop,
	})
	for _, exprs := range [][]expr.Any{
		sequence(fromInterface("lo"), verdict(expr.VerdictAccept)),
		sequence(isIPv4(), address(offSource, expr.CmpOpNeq, n.Guest.Addr().AsSlice()), counted(expr.VerdictDrop)),
		sequence(isIPv4(), address(offDestination, expr.CmpOpGte, []byte{224, 0, 0, 0}), counted(expr.VerdictDrop)),
		sequence(isIPv4(), isProtocol(unix.IPPROTO_TCP), toRelay()),
		sequence(isIPv4(), isProtocol(unix.IPPROTO_UDP), toRelay()),
		sequence(isIPv4(), isProtocol(unix.IPPROTO_ICMP), isEcho(), address(offDestination, expr.CmpOpEq, n.Gateway.AsSlice()),
			[]expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: 10, Unit: expr.LimitTimeSecond, Burst: 20}}, verdict(expr.VerdictAccept)),
		{&expr.Counter{}},
	} {
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
	}
	return c.Flush()
}

func sequence(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func fromInterface(name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: padded},
	}
}

func isIPv4() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
	}
}

func isProtocol(number byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{number}},
	}
}

func isEcho() []expr.Any {
	const echoRequest = 8 // RFC 792
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{echoRequest}},
	}
}

func address(offset uint32, op expr.CmpOp, ip net.IP) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Cmp{Op: op, Register: 1, Data: ip},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

func counted(kind expr.VerdictKind) []expr.Any {
	return append([]expr.Any{&expr.Counter{}}, verdict(kind)...)
}

// toRelay gives a packet to the socket that hears the guest, whatever address it
// has, and leaves it as it is.
func toRelay() []expr.Any {
	port := make([]byte, 2)
	binary.BigEndian.PutUint16(port, relayPort)
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: port},
		&expr.TProxy{Family: byte(nftables.TableFamilyIPv4), TableFamily: byte(nftables.TableFamilyINet), RegPort: 1},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}
