package egress

import (
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// What secrets may take.
const (
	maxSecrets     = 64
	maxSecretHosts = 64
	maxSecretName  = 64
	maxSecretValue = 16 << 10
)

// Secret is a header that the gateway adds to plain HTTP requests of the guest,
// to port 80 of a host that is in Hosts and that the policy allows by name. The
// request then goes to port 443 of that host, over TLS. So a guest can use a
// credential that it never sees. A header of the same name that the guest sends
// is dropped. Redirects are handed to the guest, not followed. What the host
// makes of the value is the host's: one that echoes headers shows it to the guest.
type Secret struct {
	// Name is what people call it.
	Name string
	// Header is the header's name, Value all that it says ("Bearer ..."). Value
	// is not in what String, LogValue or JSON say of a Secret.
	Header string
	Value  string `json:"-"`
	// Hosts are names ("api.example.com") and "*." with names.
	Hosts []string
	// Clear sends the request to port 80, in clear, for all on the way to read.
	Clear bool
}

// String is the secret without its value.
func (s Secret) String() string {
	return fmt.Sprintf("secret %s: header %s of %s", s.Name, s.Header, strings.Join(s.Hosts, ", "))
}

// GoString is String, for %#v.
func (s Secret) GoString() string { return s.String() }

// LogValue is String, for slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// Validate says what is wrong with s, and never its value.
func (s Secret) Validate() error {
	_, err := s.prepare()
	return err
}

func (s Secret) prepare() (preparedSecret, error) {
	p := preparedSecret{value: s.Value, clear: s.Clear, hosts: newDomains[struct{}]()}
	if s.Name == "" || len(s.Name) > maxSecretName {
		return p, fmt.Errorf("%w: secret %.20q: the name has no length of 1 to %d", errdef.ErrInvalid, s.Name, maxSecretName)
	}
	invalid := func(format string, args ...any) error {
		return fmt.Errorf("%w: secret %s: %s", errdef.ErrInvalid, s.Name, fmt.Sprintf(format, args...))
	}
	p.header = http.CanonicalHeaderKey(s.Header)
	if len(s.Header) > maxSecretName || !isToken(s.Header) || slices.Contains(framing(), p.header) {
		// What was meant for Value may be here.
		return p, invalid("the header is no name of one that a secret can be")
	}
	if s.Value == "" || len(s.Value) > maxSecretValue || strings.ContainsFunc(s.Value, isControl) ||
		strings.TrimSpace(s.Value) != s.Value {
		return p, invalid("the value is empty, longer than %d bytes, or has blanks at its ends or control characters", maxSecretValue)
	}
	if len(s.Hosts) == 0 || len(s.Hosts) > maxSecretHosts {
		return p, invalid("it has %d hosts, not 1 to %d", len(s.Hosts), maxSecretHosts)
	}
	for _, host := range s.Hosts {
		pattern, err := parseDomain(host)
		if err != nil || pattern == "*" {
			return p, invalid("host %.80q is no name, and not *. and a name", host)
		}
		in, key := p.hosts.entry(pattern)
		in[key] = struct{}{}
	}
	return p, nil
}

// framing are headers that say how a request is sent, and those that the proxy
// takes out.
func framing() []string {
	return []string{
		"Host", "Content-Length", "Transfer-Encoding", "Trailer", "Te", "Connection", "Proxy-Connection", "Keep-Alive",
		"Upgrade", "Expect",
	}
}

func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || c >= 0x7f || strings.ContainsRune("\"(),/:;<=>?@[\\]{}", c)
	})
}

func isControl(c rune) bool { return c < ' ' || c == 0x7f }

func validateSecrets(secrets []Secret) error {
	if len(secrets) > maxSecrets {
		return fmt.Errorf("%w: %d secrets, more than %d", errdef.ErrInvalid, len(secrets), maxSecrets)
	}
	type place struct{ header, host string }
	taken := map[place]string{}
	for _, s := range secrets {
		p, err := s.prepare()
		if err != nil {
			return err
		}
		for _, host := range s.Hosts {
			at := place{p.header, strings.ToLower(strings.TrimSuffix(host, "."))}
			if other, ok := taken[at]; ok {
				return fmt.Errorf("%w: secrets %s and %s are both header %s of %s", errdef.ErrInvalid, other, s.Name, p.header, host)
			}
			taken[at] = s.Name
		}
	}
	return nil
}

// preparedSecret is a secret that is valid, ready to be found by host.
type preparedSecret struct {
	header, value string
	hosts         domains[struct{}]
	clear         bool
}

// prepareSecrets is for secrets that are valid.
func prepareSecrets(secrets []Secret) []preparedSecret {
	var all []preparedSecret
	for _, s := range secrets {
		if p, err := s.prepare(); err == nil {
			all = append(all, p)
		}
	}
	return all
}

// secretsOf returns the secrets of a host. Where two of them are the same
// header, the later one is sent.
func (g *Gateway) secretsOf(name string) []preparedSecret {
	var all []preparedSecret
	for _, s := range g.secrets {
		s.hosts.match(name, func(struct{}) bool {
			all = append(all, s)
			return false
		})
	}
	return all
}

// hasSecret says whether a connection may carry requests that a secret is for.
func (g *Gateway) hasSecret(v verdict, port uint16) bool {
	return port == portHTTP && slices.ContainsFunc(v.names, func(name string) bool { return len(g.secretsOf(name)) > 0 })
}
