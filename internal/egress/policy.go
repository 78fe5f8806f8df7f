package egress

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/tinevm/tine/internal/errdef"
)

// Policy is rules made ready to be asked. It never changes, and is safe for
// concurrent use.
type Policy struct {
	rules  Rules
	bounds Bounds
	// nets has the rules by address: a map for each length of prefix that is in
	// use, from the longest, by the bits of the prefix.
	nets  []prefixes
	names domains[*grant]
}

type prefixes struct {
	mask uint32
	of   map[uint32]*grant
}

// Compile makes rules ready, within what the operator allows. Its errors name
// the rule: errdef.ErrInvalid, ErrUnsupported for IPv6, ErrDenied for what no
// rule may open.
func Compile(rules Rules, bounds Bounds) (*Policy, error) {
	if err := bounds.Validate(); err != nil {
		return nil, err
	}
	if len(rules.Allow) > MaxRules {
		return nil, fmt.Errorf("%w: %d egress rules, more than %d", errdef.ErrInvalid, len(rules.Allow), MaxRules)
	}
	p := &Policy{rules: Rules{Inspect: rules.Inspect}, bounds: bounds, names: newDomains[*grant]()}
	var byLength [33]map[uint32]*grant
	for i, r := range rules.Allow {
		valid, err := r.parse()
		if err == nil && valid.domain == "" {
			err = bounds.check(valid.prefix)
		}
		if err != nil {
			return nil, fmt.Errorf("egress rule %d (%.80s): %w", i+1, r, err)
		}
		p.rules.Allow = append(p.rules.Allow, valid.rule())
		if valid.domain != "" {
			add(p.names.entry(valid.domain))(valid)
			continue
		}
		of := &byLength[valid.prefix.Bits()]
		if *of == nil {
			*of = map[uint32]*grant{}
		}
		add(*of, bits(valid.prefix.Addr()))(valid)
	}
	for length, of := range slices.Backward(byLength[:]) {
		if of != nil {
			p.nets = append(p.nets, prefixes{mask: mask(length), of: of})
			merge(of)
		}
	}
	merge(p.names.exact)
	merge(p.names.below)
	return p, nil
}

// Rules returns a copy of the rules, in their normal form.
func (p *Policy) Rules() Rules {
	rules := p.rules
	rules.Allow = slices.Clone(rules.Allow)
	for i := range rules.Allow {
		rules.Allow[i].Ports = slices.Clone(rules.Allow[i].Ports)
	}
	return rules
}

// allowsAddr says whether a rule by address allows it.
func (p *Policy) allowsAddr(protocol string, dst netip.AddrPort) bool {
	a := bits(dst.Addr())
	for _, n := range p.nets {
		if g := n.of[a&n.mask]; g != nil && g.allows(protocol, dst.Port()) {
			return true
		}
	}
	return false
}

// allowsName says whether a rule by name allows it.
func (p *Policy) allowsName(protocol, name string, port uint16) (ok bool) {
	p.names.match(name, func(g *grant) bool {
		ok = g.allows(protocol, port)
		return !ok
	})
	return ok
}

// knows says whether any rule is for the name.
func (p *Policy) knows(name string) (ok bool) {
	p.names.match(name, func(*grant) bool {
		ok = true
		return false
	})
	return ok
}

// grant is what rules of one destination allow together.
type grant struct{ tcp, udp []portRange }

func (g *grant) allows(protocol string, port uint16) bool {
	ranges := g.tcp
	if protocol == UDP {
		ranges = g.udp
	}
	_, found := slices.BinarySearchFunc(ranges, port, func(r portRange, port uint16) int {
		switch {
		case r.last < port:
			return -1
		case r.first > port:
			return 1
		}
		return 0
	})
	return found
}

// add returns what adds a rule to the grant under the key.
func add[K comparable](to map[K]*grant, key K) func(parsed) {
	return func(p parsed) {
		g := to[key]
		if g == nil {
			g = &grant{}
			to[key] = g
		}
		ports := p.ports
		if len(ports) == 0 {
			ports = []portRange{{1, 65535}}
		}
		if p.protocol != UDP {
			g.tcp = append(g.tcp, ports...)
		}
		if p.protocol != TCP {
			g.udp = append(g.udp, ports...)
		}
	}
}

// merge sorts the ranges of all grants, and joins those that meet.
func merge[K comparable](grants map[K]*grant) {
	for _, g := range grants {
		g.tcp, g.udp = joined(g.tcp), joined(g.udp)
	}
}

func joined(ranges []portRange) []portRange {
	slices.SortFunc(ranges, func(a, b portRange) int { return cmp.Compare(a.first, b.first) })
	var out []portRange
	for _, r := range ranges {
		if n := len(out); n > 0 && int(r.first) <= int(out[n-1].last)+1 {
			out[n-1].last = max(out[n-1].last, r.last)
		} else {
			out = append(out, r)
		}
	}
	return out
}

func bits(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func mask(length int) uint32 { return ^uint32(0) << (32 - length) }
