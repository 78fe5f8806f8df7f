package network

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Local returns a function that says whether an address is one of this host's
// own. Interfaces come and go, so it looks again when what it knows is older than
// a second. It is safe for concurrent use. An address whose status cannot be told
// counts as the host's.
func Local() func(netip.Addr) bool {
	l := &local{}
	return l.has
}

const lookAgain = time.Second

type local struct {
	mu    sync.Mutex
	when  time.Time
	known map[netip.Addr]bool
}

func (l *local) has(a netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.when) > lookAgain {
		known, err := addresses()
		if err != nil {
			return true
		}
		l.known, l.when = known, time.Now()
	}
	return l.known[a.Unmap()]
}

func addresses() (map[netip.Addr]bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	known := map[netip.Addr]bool{}
	for _, a := range list {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			known[prefix.Addr().Unmap()] = true
		}
	}
	return known, nil
}

// Resolvers are the name servers that a resolv.conf(5) names, as addresses and
// ports.
func Resolvers(path string) ([]string, error) {
	cfg, err := dns.ClientConfigFromFile(path)
	if err != nil {
		return nil, fmt.Errorf("read name servers: %w", err)
	}
	servers := make([]string, len(cfg.Servers))
	for i, server := range cfg.Servers {
		servers[i] = net.JoinHostPort(server, cfg.Port)
	}
	return servers, nil
}
