package egress

import "net/netip"

// verdict is what the policy says of one destination, and on what ground, so
// that another policy can be asked the same later.
type verdict struct {
	reason  Reason   // "" when it is allowed
	byAddr  bool     // a rule by address allows it
	names   []string // those that opened the address, and that rules allow
	inspect bool     // the connection has yet to show one of the names
	dns     bool     // it is for a name server, whose part the gateway takes
}

// decide asks the policy of dst.
func (g *Gateway) decide(p *Policy, protocol string, dst netip.AddrPort) verdict {
	if dst.Port() == portDNS {
		return verdict{dns: true}
	}
	if reason := p.bounds.forbidden(dst.Addr()); reason != "" {
		return verdict{reason: reason}
	}
	v := verdict{byAddr: p.allowsAddr(protocol, dst)}
	for _, name := range g.names.of(dst.Addr()) {
		if p.allowsName(protocol, name, dst.Port()) {
			v.names = append(v.names, name)
		}
	}
	switch {
	case v.byAddr:
	case len(v.names) == 0:
		v.reason = NoRule
	case p.inspects(dst.Port()):
		v.inspect = true
		if protocol == UDP {
			v.reason = CannotInspect
		}
	}
	return v
}

// holds says whether p allows what the verdict allowed. It does not matter that
// the answer of a name server has ended since.
func (v verdict) holds(p *Policy, protocol string, dst netip.AddrPort) bool {
	if v.dns {
		return true
	}
	if v.reason != "" || p.bounds.forbidden(dst.Addr()) != "" {
		return false
	}
	if p.allowsAddr(protocol, dst) {
		return true
	}
	for _, name := range v.names {
		if p.allowsName(protocol, name, dst.Port()) {
			return v.inspect || !p.inspects(dst.Port())
		}
	}
	return false
}

// inspects says whether connections to the port must show whom they are for,
// where no rule by address allows them: those to the ports of the web.
func (p *Policy) inspects(port uint16) bool {
	return p.rules.Inspect && (port == portHTTP || port == portTLS)
}

const (
	portHTTP = 80
	portTLS  = 443
	portDNS  = 53
)
