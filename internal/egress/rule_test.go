package egress

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func TestParseRule(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		want   Rule
		normal string // where String is not the text
	}{
		"example.com":                    {Rule{Domain: "example.com"}, ""},
		"*.example.com:443":              {Rule{Domain: "*.example.com", Ports: []string{"443"}}, ""},
		"10.1.0.0/16:5432":               {Rule{CIDR: "10.1.0.0/16", Ports: []string{"5432"}}, ""},
		"udp:203.0.113.7:123":            {Rule{CIDR: "203.0.113.7", Ports: []string{"123"}, Protocol: "udp"}, ""},
		"tcp:example.com":                {Rule{Domain: "example.com", Protocol: "tcp"}, ""},
		"example.com:80,443,8000-8010":   {Rule{Domain: "example.com", Ports: []string{"80", "443", "8000-8010"}}, ""},
		"0.0.0.0/0":                      {Rule{CIDR: "0.0.0.0/0"}, ""},
		"*":                              {Rule{Domain: "*"}, ""},
		"*:443":                          {Rule{Domain: "*", Ports: []string{"443"}}, ""},
		"_x.a-b.example":                 {Rule{Domain: "_x.a-b.example"}, ""},
		"Example.COM.":                   {Rule{Domain: "example.com"}, "example.com"},
		"203.0.113.7/32:443-443":         {Rule{CIDR: "203.0.113.7", Ports: []string{"443"}}, "203.0.113.7:443"},
		"example.com:0443":               {Rule{Domain: "example.com", Ports: []string{"443"}}, "example.com:443"},
		"localhost":                      {Rule{Domain: "localhost"}, ""},
		"tcp":                            {Rule{Domain: "tcp"}, ""},
		strings.Repeat("a", 63) + ".com": {Rule{Domain: strings.Repeat("a", 63) + ".com"}, ""},
	}
	for text, tt := range tests {
		t.Run(strings.ReplaceAll(text, "/", "_"), func(t *testing.T) {
			t.Parallel()
			got, err := ParseRule(text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			normal := tt.normal
			if normal == "" {
				normal = text
			}
			if got.String() != normal {
				t.Errorf("String is %q, want %q", got, normal)
			}
		})
	}
}

func TestParseRuleRefuses(t *testing.T) {
	t.Parallel()
	invalid := []string{
		"", ":", ":443", "tcp:", "tcp::443", "icmp:example.com", "example.com:", "example.com:0", "example.com:65536",
		"example.com:443-80", "example.com:https", "example.com:+443", "example.com:-1", "example.com:80,,443",
		"**.example.com", "a.*.example.com", "*example.com", "exa mple.com", ".example.com", "example..com", "-a.com", "a-.com",
		"a.com-", "a-.b", "1.2.3", "1.2.3.4.5", "256.1.1.1", "01.2.3.4", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/", "/8",
		"example.com/8", "10.1.2.3/8", "example.123", strings.Repeat("a", 64) + ".com", strings.Repeat("a.", 127) + "a",
		"münchen.example", "*.", "*..", "a\x00b", strings.Repeat("x", 2000), "example.com:" + strings.Repeat("1,", 64) + "1",
	}
	for _, text := range invalid {
		if r, err := ParseRule(text); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%.40q: %v, error %v", text, r, err)
		} else if len(err.Error()) > 500 {
			t.Errorf("%.40q: the error has %d bytes", text, len(err.Error()))
		}
	}
	for _, text := range []string{"2001:db8::/32", "[2001:db8::1]:443", "::1", "tcp:::1", "2001:db8::1"} {
		if r, err := ParseRule(text); !errors.Is(err, errdef.ErrUnsupported) || !strings.Contains(err.Error(), "IPv4 only") {
			t.Errorf("%q: %v, error %v", text, r, err)
		}
	}
	for text, hint := range map[string]string{"münchen.example": "punycode", "10.1.2.3/8": "10.0.0.0/8"} {
		if _, err := ParseRule(text); !strings.Contains(errdef.Hint(err), hint) {
			t.Errorf("%q: hint %q", text, errdef.Hint(err))
		}
	}
}

func TestRulesAsJSON(t *testing.T) {
	t.Parallel()
	want := Rules{Inspect: true, Allow: []Rule{{CIDR: "10.0.0.0/8"}, {Domain: "example.com", Ports: []string{"443"}, Protocol: "tcp"}}}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	const text = `{"allow":[{"cidr":"10.0.0.0/8"},{"domain":"example.com","ports":["443"],"protocol":"tcp"}],"inspect":true}`
	if string(data) != text {
		t.Errorf("got %s", data)
	}
	var got Rules
	if err := json.Unmarshal(data, &got); err != nil || !cmp.Equal(got, want) {
		t.Errorf("back: %+v, error %v", got, err)
	}
}

func FuzzParseRule(f *testing.F) {
	for _, text := range []string{"example.com", "*.example.com:443", "10.1.0.0/16:5432", "udp:203.0.113.7:123", "*", "[::1]:1", "a:1-2,3"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := ParseRule(text)
		if err != nil {
			return
		}
		again, err := ParseRule(r.String())
		if err != nil || !slices.Equal(again.Ports, r.Ports) || !cmp.Equal(again, r) {
			t.Fatalf("%q is %+v, is %q, is %+v, error %v", text, r, r, again, err)
		}
		if _, err := Compile(Rules{Allow: []Rule{r}}, Bounds{}); err != nil && !errors.Is(err, errdef.ErrDenied) {
			t.Fatalf("%q cannot be compiled: %v", text, err)
		}
	})
}

// TestNormal: a rule in parts becomes what its short form is read as.
func TestNormal(t *testing.T) {
	t.Parallel()
	for want, r := range map[string]Rule{
		"example.com:443":        {Domain: "EXAMPLE.com.", Ports: []string{"443-443"}},
		"tcp:192.0.2.7:80,81-90": {CIDR: "192.0.2.7/32", Ports: []string{"80", "81-90"}, Protocol: TCP},
		"*":                      {Domain: "*"},
	} {
		got, err := r.Normal()
		if err != nil || got.String() != want {
			t.Errorf("%+v: %s, %v", r, got, err)
		}
	}
	for _, bad := range []Rule{{}, {CIDR: "192.0.2.7", Domain: "example.com"}, {CIDR: "example.com"}, {Domain: "192.0.2.7"}} {
		if got, err := bad.Normal(); err == nil || got.String() != "" {
			t.Errorf("%+v: %+v", bad, got)
		}
	}
}
