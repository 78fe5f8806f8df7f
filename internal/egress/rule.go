package egress

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// What rules may take.
const (
	// MaxRules is how many rules there may be in Rules.
	MaxRules = 10_000
	// maxRulePorts is how many ports and ranges one rule may name.
	maxRulePorts = 64
	// maxRuleText bounds a rule in its short form.
	maxRuleText = 1024
)

// The protocols of a rule.
const (
	TCP = "tcp"
	UDP = "udp"
)

// Rules say what a sandbox may reach. What no rule allows is denied, so the zero
// Rules deny everything.
type Rules struct {
	Allow []Rule `json:"allow,omitempty"`
	// Inspect has connections to ports 80 and 443 that are open only for a name
	// show that they are for a name which is allowed. See the Gateway.
	Inspect bool `json:"inspect,omitempty"`
}

// Rule allows one destination. Exactly one of CIDR and Domain is set.
type Rule struct {
	// CIDR is an IPv4 prefix ("10.1.0.0/16") or address.
	CIDR string `json:"cidr,omitempty"`
	// Domain is a name ("example.com"), all names below one ("*.example.com",
	// which is not example.com itself), or every name ("*").
	Domain string `json:"domain,omitempty"`
	// Ports are ports ("443") and ranges ("8000-8010"); none means all.
	Ports []string `json:"ports,omitempty"`
	// Protocol is "tcp", "udp", or "" for both.
	Protocol string `json:"protocol,omitempty"`
}

// ParseRule reads the short form of a rule, which is what String writes:
//
//	[tcp:|udp:] (prefix | address | domain) [:port[-port][,...]]
//
// as in "example.com", "*.example.com:443", "10.1.0.0/16:5432" and
// "udp:203.0.113.7:123". The rule that it returns is valid and normal: in lower
// case, without a final dot, "/32" or "443-443".
func ParseRule(text string) (Rule, error) {
	r, err := splitRule(text)
	if err == nil {
		var p parsed
		if p, err = r.parse(); err == nil {
			return p.rule(), nil
		}
	}
	return Rule{}, fmt.Errorf("egress rule %.80q: %w", text, err)
}

// Normal returns the rule as ParseRule would, or says what is wrong with it.
func (r Rule) Normal() (Rule, error) {
	p, err := r.parse()
	if err != nil {
		return Rule{}, fmt.Errorf("egress rule %.80s: %w", r, err)
	}
	return p.rule(), nil
}

func splitRule(text string) (Rule, error) {
	if len(text) > maxRuleText {
		return Rule{}, fmt.Errorf("%w: it is longer than %d bytes", errdef.ErrInvalid, maxRuleText)
	}
	var r Rule
	rest := text
	for _, protocol := range []string{TCP, UDP} {
		if after, ok := strings.CutPrefix(rest, protocol+":"); ok {
			r.Protocol, rest = protocol, after
			break
		}
	}
	if looksLikeIPv6(rest) {
		return Rule{}, errIPv6()
	}
	target, ports, found := strings.Cut(rest, ":")
	if found {
		r.Ports = strings.Split(ports, ",")
	}
	if strings.Contains(target, "/") || looksLikeIPv4(target) {
		r.CIDR = target
	} else {
		r.Domain = target
	}
	return r, nil
}

// String is the rule's short form.
func (r Rule) String() string {
	var b strings.Builder
	if r.Protocol != "" {
		b.WriteString(r.Protocol + ":")
	}
	b.WriteString(r.CIDR + r.Domain)
	if len(r.Ports) > 0 {
		b.WriteString(":" + strings.Join(r.Ports, ","))
	}
	return b.String()
}

// parsed is a rule that is valid.
type parsed struct {
	prefix   netip.Prefix // of a rule by address
	domain   string       // of a rule by name, with its "*"
	ports    []portRange  // none: all
	protocol string
}

func (r Rule) parse() (parsed, error) {
	var p parsed
	var err error
	switch {
	case r.CIDR != "" && r.Domain != "":
		return p, fmt.Errorf("%w: it has both a cidr and a domain", errdef.ErrInvalid)
	case r.CIDR != "":
		p.prefix, err = parseCIDR(r.CIDR)
	case r.Domain != "":
		p.domain, err = parseDomain(r.Domain)
	default:
		return p, fmt.Errorf("%w: it has neither a cidr nor a domain", errdef.ErrInvalid)
	}
	if err != nil {
		return p, err
	}
	if r.Protocol != "" && r.Protocol != TCP && r.Protocol != UDP {
		return p, fmt.Errorf("%w: protocol %.20q is not tcp, udp or empty", errdef.ErrInvalid, r.Protocol)
	}
	p.protocol = r.Protocol
	p.ports, err = parsePorts(r.Ports)
	return p, err
}

// rule is p as callers write it.
func (p parsed) rule() Rule {
	r := Rule{Domain: p.domain, Protocol: p.protocol}
	if p.domain == "" {
		r.CIDR = p.prefix.String()
		if p.prefix.IsSingleIP() {
			r.CIDR = p.prefix.Addr().String()
		}
	}
	for _, ports := range p.ports {
		r.Ports = append(r.Ports, ports.String())
	}
	return r
}

func parseCIDR(text string) (netip.Prefix, error) {
	if looksLikeIPv6(text) {
		return netip.Prefix{}, errIPv6()
	}
	if len(text) > len("255.255.255.255/32") {
		return netip.Prefix{}, fmt.Errorf("%w: cidr %.40q is too long", errdef.ErrInvalid, text)
	}
	if !strings.Contains(text, "/") {
		text += "/32"
	}
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%w: cidr %q is no IPv4 prefix or address", errdef.ErrInvalid, text)
	}
	if masked := prefix.Masked(); masked != prefix {
		return netip.Prefix{}, errdef.WithHint(
			fmt.Errorf("%w: cidr %q has bits set beyond its length", errdef.ErrInvalid, text),
			fmt.Sprintf("write %s for the network, %s for the one address", masked, prefix.Addr()))
	}
	return prefix, nil
}

// looksLikeIPv4 is meant for what is an address or one that was misspelled: no
// domain consists of digits and dots.
func looksLikeIPv4(text string) bool {
	return text != "" && strings.Trim(text, "0123456789.") == ""
}

func looksLikeIPv6(text string) bool {
	return strings.HasPrefix(text, "[") || strings.Count(text, ":") > 1
}

func errIPv6() error {
	return fmt.Errorf("%w: it is for IPv6, and guests have IPv4 only", errdef.ErrUnsupported)
}

// portRange is from first to last, both included.
type portRange struct{ first, last uint16 }

func (r portRange) String() string {
	first, last := strconv.Itoa(int(r.first)), strconv.Itoa(int(r.last))
	if r.first == r.last {
		return first
	}
	return first + "-" + last
}

func parsePorts(texts []string) ([]portRange, error) {
	if len(texts) > maxRulePorts {
		return nil, fmt.Errorf("%w: it names %d ports, more than %d", errdef.ErrInvalid, len(texts), maxRulePorts)
	}
	var all []portRange
	for _, text := range texts {
		low, high, found := strings.Cut(text, "-")
		if !found {
			high = low
		}
		first, err1 := parsePort(low)
		last, err2 := parsePort(high)
		if err1 != nil || err2 != nil || first > last {
			return nil, fmt.Errorf("%w: port %.20q is not like 443 or 8000-8010, of 1 to 65535", errdef.ErrInvalid, text)
		}
		all = append(all, portRange{first, last})
	}
	return all, nil
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 || text[0] == '+' {
		return 0, fmt.Errorf("%w: port %.20q", errdef.ErrInvalid, text)
	}
	return uint16(n), nil
}
