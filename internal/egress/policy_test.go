package egress

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
)

func TestCompileRefuses(t *testing.T) {
	t.Parallel()
	private := Bounds{Private: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}}
	local := Bounds{Local: func(a netip.Addr) bool { return a == netip.MustParseAddr("203.0.113.1") }}
	tests := map[string]struct {
		rule   Rule
		bounds Bounds
		want   error // nil: accepted
		hint   string
	}{
		"public":            {Rule{CIDR: "93.184.0.0/16"}, Bounds{}, nil, ""},
		"everything":        {Rule{CIDR: "0.0.0.0/0"}, Bounds{}, nil, ""},
		"wider-than-never":  {Rule{CIDR: "126.0.0.0/7"}, Bounds{}, nil, ""},
		"zero":              {Rule{CIDR: "0.0.0.0"}, Bounds{}, errdef.ErrDenied, ""},
		"loopback":          {Rule{CIDR: "127.0.0.0/8"}, Bounds{}, errdef.ErrDenied, ""},
		"loopback-address":  {Rule{CIDR: "127.0.0.1"}, Bounds{}, errdef.ErrDenied, ""},
		"metadata":          {Rule{CIDR: "169.254.169.254"}, Bounds{Private: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}, errdef.ErrDenied, ""},
		"multicast":         {Rule{CIDR: "239.1.0.0/16"}, Bounds{}, errdef.ErrDenied, ""},
		"multicast-and-up":  {Rule{CIDR: "224.0.0.0/3"}, Bounds{}, errdef.ErrDenied, ""},
		"broadcast":         {Rule{CIDR: "255.255.255.255"}, Bounds{}, errdef.ErrDenied, ""},
		"reserved":          {Rule{CIDR: "240.0.0.0/4"}, Bounds{}, errdef.ErrDenied, ""},
		"private":           {Rule{CIDR: "10.2.0.0/16"}, Bounds{}, errdef.ErrDenied, "--net-private 10.2.0.0/16"},
		"private-elsewhere": {Rule{CIDR: "10.2.0.0/16"}, private, errdef.ErrDenied, "--net-private"},
		"private-allowed":   {Rule{CIDR: "10.1.2.0/24"}, private, nil, ""},
		"private-partly":    {Rule{CIDR: "10.0.0.0/8"}, private, nil, ""},
		"carrier":           {Rule{CIDR: "100.64.1.1"}, Bounds{}, errdef.ErrDenied, "--net-private"},
		"benchmark":         {Rule{CIDR: "198.19.0.0/16"}, Bounds{}, errdef.ErrDenied, "--net-private"},
		"ietf":              {Rule{CIDR: "192.0.0.8"}, Bounds{}, errdef.ErrDenied, "--net-private"},
		"host":              {Rule{CIDR: "203.0.113.1"}, local, errdef.ErrDenied, ""},
		"around-the-host":   {Rule{CIDR: "203.0.113.0/24"}, local, nil, ""},
		"ipv6":              {Rule{CIDR: "2001:db8::/32"}, Bounds{}, errdef.ErrUnsupported, ""},
		"ipv4-in-ipv6":      {Rule{CIDR: "::ffff:10.0.0.1"}, Bounds{}, errdef.ErrUnsupported, ""},
		"both":              {Rule{CIDR: "1.1.1.1", Domain: "a.example"}, Bounds{}, errdef.ErrInvalid, ""},
		"neither":           {Rule{Ports: []string{"1"}}, Bounds{}, errdef.ErrInvalid, ""},
		"protocol":          {Rule{CIDR: "1.1.1.1", Protocol: "icmp"}, Bounds{}, errdef.ErrInvalid, ""},
		"domain-in-cidr":    {Rule{CIDR: "example.com"}, Bounds{}, errdef.ErrInvalid, ""},
		"address-in-domain": {Rule{Domain: "1.1.1.1"}, Bounds{}, errdef.ErrInvalid, ""},
		"bounds":            {Rule{CIDR: "1.1.1.1"}, Bounds{Private: []netip.Prefix{netip.MustParsePrefix("fc00::/7")}}, errdef.ErrInvalid, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Compile(Rules{Allow: []Rule{{Domain: "ok.example"}, tt.rule}}, tt.bounds)
			if !errors.Is(err, tt.want) || !strings.Contains(errdef.Hint(err), tt.hint) {
				t.Fatalf("error %v, hint %q", err, errdef.Hint(err))
			}
			if err != nil && name != "bounds" && !strings.Contains(err.Error(), "egress rule 2 (") {
				t.Errorf("the error does not name the rule: %v", err)
			}
		})
	}
	if _, err := Compile(Rules{Allow: make([]Rule, MaxRules+1)}, Bounds{}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("too many: %v", err)
	}
}

func TestPolicyOfNames(t *testing.T) {
	t.Parallel()
	p := compile(t, false, "example.com:80", "*.example.com:443", "tcp:*.deep.example.com:22,8000-8010", "udp:time.example:123")
	tests := []struct {
		protocol, name string
		port           uint16
		want           bool
	}{
		{TCP, "example.com", 80, true},
		{TCP, "example.com", 443, false}, // a wildcard is not of the apex
		{UDP, "a.example.com", 443, true},
		{TCP, "a.b.c.example.com", 443, true},
		{TCP, "a.example.com", 80, false},
		{TCP, "notexample.com", 443, false},
		{TCP, "example.com.evil.example", 443, false},
		{TCP, "a.deep.example.com", 22, true},
		{TCP, "a.deep.example.com", 443, true}, // of the wider rule
		{TCP, "deep.example.com", 22, false},
		{UDP, "a.deep.example.com", 22, false},
		{TCP, "a.deep.example.com", 8005, true},
		{TCP, "a.deep.example.com", 8011, false},
		{UDP, "time.example", 123, true},
		{TCP, "time.example", 123, false},
	}
	for _, tt := range tests {
		if got := p.allowsName(tt.protocol, tt.name, tt.port); got != tt.want {
			t.Errorf("%s %s:%d: %v", tt.protocol, tt.name, tt.port, got)
		}
	}
	if all := compile(t, false, "*:443"); !all.allowsName(TCP, "a", 443) || !all.knows("a.b") || all.allowsName(TCP, "a.b", 80) {
		t.Error("* is not every name")
	}
	var none domains[int]
	none.match("a.b", func(int) bool { t.Error("nothing matches"); return true })
}

// naive is the policy as its rules read.
func naive(rules []Rule, protocol string, dst netip.AddrPort) bool {
	return slices.ContainsFunc(rules, func(r Rule) bool {
		p, err := r.parse()
		if err != nil || p.domain != "" || !p.prefix.Contains(dst.Addr()) || p.protocol != "" && p.protocol != protocol {
			return false
		}
		return len(p.ports) == 0 || slices.ContainsFunc(p.ports, func(r portRange) bool { return r.first <= dst.Port() && dst.Port() <= r.last })
	})
}

// The compiled policy is what its rules say, one by one.
func TestPolicyIsNaiveOne(t *testing.T) {
	t.Parallel()
	// Few distinct bits, so that prefixes overlap and addresses hit them.
	addr := rapid.Custom(func(t *rapid.T) netip.Addr {
		octet := rapid.SampledFrom([]byte{1, 2, 3, 128, 129, 200})
		return netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{20, 21, 52}).Draw(t, "a"), octet.Draw(t, "b"), octet.Draw(t, "c"), octet.Draw(t, "d")})
	})
	rule := rapid.Custom(func(t *rapid.T) Rule {
		prefix := netip.PrefixFrom(addr.Draw(t, "addr"), rapid.IntRange(0, 32).Draw(t, "bits")).Masked()
		r := Rule{CIDR: prefix.String(), Protocol: rapid.SampledFrom([]string{"", TCP, UDP}).Draw(t, "protocol")}
		for range rapid.IntRange(0, 3).Draw(t, "ports") {
			first := rapid.IntRange(1, 30).Draw(t, "first")
			r.Ports = append(r.Ports, fmt.Sprintf("%d-%d", first, first+rapid.IntRange(0, 5).Draw(t, "more")))
		}
		return r
	})
	rapid.Check(t, func(t *rapid.T) {
		rules := rapid.SliceOfN(rule, 0, 20).Draw(t, "rules")
		rules = slices.DeleteFunc(rules, func(r Rule) bool { // what lies wholly in 0.0.0.0/8
			_, err := Compile(Rules{Allow: []Rule{r}}, Bounds{})
			return errors.Is(err, errdef.ErrDenied)
		})
		p, err := Compile(Rules{Allow: rules}, Bounds{})
		if err != nil {
			t.Fatal(err)
		}
		again, err := Compile(p.Rules(), Bounds{})
		if err != nil {
			t.Fatal(err)
		}
		for range 50 {
			dst := netip.AddrPortFrom(addr.Draw(t, "dst"), uint16(rapid.IntRange(1, 40).Draw(t, "port")))
			protocol := rapid.SampledFrom([]string{TCP, UDP}).Draw(t, "of")
			want := naive(rules, protocol, dst)
			if p.allowsAddr(protocol, dst) != want || again.allowsAddr(protocol, dst) != want {
				t.Fatalf("%s %s: naive says %v", protocol, dst, want)
			}
		}
	})
}

func TestForbidden(t *testing.T) {
	t.Parallel()
	b := Bounds{
		Private: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("169.254.0.0/16")},
		Local:   func(a netip.Addr) bool { return a == netip.MustParseAddr("10.1.0.1") },
	}
	for text, want := range map[string]Reason{
		"0.0.0.0": Unspecified, "0.1.2.3": Unspecified, "127.0.0.1": Loopback, "127.255.0.1": Loopback,
		"169.254.169.254": LinkLocal, "224.0.0.1": Multicast, "239.255.255.250": Multicast, "240.0.0.1": Multicast,
		"255.255.255.255": Multicast, "10.0.0.1": PrivateNetwork, "10.1.0.2": "", "10.1.0.1": HostItself, "10.2.0.1": PrivateNetwork,
		"172.15.255.255": "", "172.16.0.1": PrivateNetwork, "172.31.255.255": PrivateNetwork, "172.32.0.0": "", "192.168.1.1": PrivateNetwork,
		"100.63.255.255": "", "100.64.0.1": PrivateNetwork, "100.127.255.255": PrivateNetwork, "100.128.0.0": "", "198.17.255.255": "",
		"198.18.0.1": PrivateNetwork, "198.19.255.255": PrivateNetwork, "198.20.0.0": "", "192.0.0.1": PrivateNetwork, "192.0.1.1": "",
		"8.8.8.8": "", "223.255.255.255": "", "::1": NotIPv4, "::ffff:8.8.8.8": NotIPv4,
	} {
		if got := b.forbidden(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
	if got := b.forbidden(netip.Addr{}); got != NotIPv4 {
		t.Errorf("no address: %q", got)
	}
}

func BenchmarkLookup10000(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	var rules Rules
	for len(rules.Allow) < MaxRules {
		a := netip.AddrFrom4([4]byte{byte(1 + random.IntN(9)), byte(random.IntN(256)), byte(random.IntN(256)), byte(random.IntN(256))})
		prefix := netip.PrefixFrom(a, 4+random.IntN(29)).Masked()
		if prefix.Addr().As4()[0] != 0 {
			rules.Allow = append(rules.Allow, Rule{CIDR: prefix.String(), Ports: []string{fmt.Sprint(1 + random.IntN(1000))}})
		}
	}
	p, err := Compile(rules, Bounds{})
	if err != nil {
		b.Fatal(err)
	}
	dst := netip.MustParseAddrPort("8.7.6.5:40000") // no rule is for that port, so all maps are asked
	b.ReportAllocs()
	for b.Loop() {
		if p.allowsAddr(TCP, dst) {
			b.Fatal("allowed")
		}
	}
}

func BenchmarkCompile10000(b *testing.B) {
	var rules Rules
	for i := range MaxRules {
		rules.Allow = append(rules.Allow, Rule{Domain: fmt.Sprintf("*.host%d.example", i), Ports: []string{"443"}})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Compile(rules, Bounds{}); err != nil {
			b.Fatal(err)
		}
	}
}
