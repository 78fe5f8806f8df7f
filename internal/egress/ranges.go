package egress

import (
	"fmt"
	"net/netip"

	"github.com/tinevm/tine/internal/errdef"
)

// Bounds are the operator's: no rule reaches beyond them.
type Bounds struct {
	// Private are the private networks that rules may open; none by default.
	Private []netip.Prefix
	// Local says whether an address is one of the host itself; nil: none is. It
	// is asked again for every connection, maybe from several goroutines at
	// once and with locks held: it must be quick, and call nothing of here.
	Local func(netip.Addr) bool
}

// Validate says whether all of b.Private is IPv4.
func (b Bounds) Validate() error {
	for _, p := range b.Private {
		if !p.IsValid() || !p.Addr().Is4() {
			return fmt.Errorf("%w: private network %s is no IPv4 prefix", errdef.ErrInvalid, p)
		}
	}
	return nil
}

// block is a range with a name.
type block struct {
	prefix netip.Prefix
	reason Reason
}

func ipv4Block(a, b, c byte, bits int, reason Reason) block {
	return block{netip.PrefixFrom(netip.AddrFrom4([4]byte{a, b, c, 0}), bits), reason}
}

// never are the blocks that no rule opens.
func never() [4]block {
	return [...]block{
		ipv4Block(0, 0, 0, 8, Unspecified),
		ipv4Block(127, 0, 0, 8, Loopback),
		ipv4Block(169, 254, 0, 16, LinkLocal), // the metadata services of clouds
		ipv4Block(224, 0, 0, 3, Multicast),    // 224/4; 240/4, reserved and broadcast
	}
}

// private are the blocks that rules open only where the operator lets them.
func private() [6]block {
	return [...]block{
		ipv4Block(10, 0, 0, 8, PrivateNetwork),
		ipv4Block(172, 16, 0, 12, PrivateNetwork),
		ipv4Block(192, 168, 0, 16, PrivateNetwork),
		ipv4Block(100, 64, 0, 10, PrivateNetwork), // carriers' NAT
		ipv4Block(198, 18, 0, 15, PrivateNetwork), // benchmarks
		ipv4Block(192, 0, 0, 24, PrivateNetwork),  // IETF's
	}
}

// forbidden says why no rule reaches the address, "" if one may.
func (b Bounds) forbidden(a netip.Addr) Reason {
	if !a.Is4() {
		return NotIPv4
	}
	for _, n := range never() {
		if n.prefix.Contains(a) {
			return n.reason
		}
	}
	if b.Local != nil && b.Local(a) {
		return HostItself
	}
	for _, p := range private() {
		if p.prefix.Contains(a) && !b.private(a) {
			return p.reason
		}
	}
	return ""
}

func (b Bounds) private(a netip.Addr) bool {
	for _, p := range b.Private {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// check refuses a prefix of which no address can ever be reached.
func (b Bounds) check(p netip.Prefix) error {
	within := func(outer netip.Prefix) bool { return outer.Bits() <= p.Bits() && outer.Contains(p.Addr()) }
	for _, n := range never() {
		if within(n.prefix) {
			return fmt.Errorf("%w: no rule opens %s (%s)", errdef.ErrDenied, n.prefix, n.reason)
		}
	}
	if p.IsSingleIP() && b.Local != nil && b.Local(p.Addr()) {
		return fmt.Errorf("%w: no rule opens an address of the host itself", errdef.ErrDenied)
	}
	for _, n := range private() {
		if within(n.prefix) && !b.overlaps(p) {
			return errdef.WithHint(
				fmt.Errorf("%w: %s is private, and this host lets no rule open it", errdef.ErrDenied, n.prefix),
				fmt.Sprintf("the operator can allow it: tine serve --net-private %s", p))
		}
	}
	return nil
}

func (b Bounds) overlaps(p netip.Prefix) bool {
	for _, own := range b.Private {
		if own.Overlaps(p) {
			return true
		}
	}
	return false
}
