package egress

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Reason says why something was denied. It is a word that does not change.
type Reason string

// The reasons.
const (
	NoRule             Reason = "no_rule"              // no rule allows the address and port
	UnknownName        Reason = "unknown_name"         // no rule is for the name that was asked for
	QueryType          Reason = "query_type"           // the name is allowed, what was asked about it is not
	Unspecified        Reason = "unspecified"          // 0.0.0.0/8
	Loopback           Reason = "loopback"             // 127.0.0.0/8
	LinkLocal          Reason = "link_local"           // 169.254.0.0/16
	Multicast          Reason = "multicast"            // 224.0.0.0/3: multicast, reserved, broadcast
	PrivateNetwork     Reason = "private"              // a private network that the operator keeps
	HostItself         Reason = "host"                 // an address of the host itself
	NotIPv4            Reason = "not_ipv4"             // an address that is not IPv4
	NoServerName       Reason = "no_server_name"       // inspected, and it showed no name
	WrongServerName    Reason = "wrong_server_name"    // inspected, and its name is not allowed
	CannotInspect      Reason = "cannot_inspect"       // UDP to a port whose connections are inspected
	TooManyConnections Reason = "too_many_connections" // as many as the sandbox may have
	TooManyFlows       Reason = "too_many_flows"       // the same, for UDP
	Overflow           Reason = "overflow"             // stands for all that the table has no room for
)

// Denial is what was denied of one destination for one reason.
type Denial struct {
	// Protocol is "tcp", "udp" or "dns".
	Protocol string `json:"protocol"`
	// To is an address and port, a name, or a name and the address in brackets
	// that it resolved to. The guest chose it.
	To     string    `json:"to"`
	Reason Reason    `json:"reason"`
	Count  uint64    `json:"count"`
	First  time.Time `json:"first"`
	Last   time.Time `json:"last"`
}

// Stats counts what a gateway did since it was made. Bytes are of payload; up is
// from the guest.
type Stats struct {
	ConnectionsOpen  int64  `json:"connections_open"`
	ConnectionsTotal uint64 `json:"connections_total"`
	FlowsOpen        int64  `json:"flows_open"`
	FlowsTotal       uint64 `json:"flows_total"`
	BytesUp          uint64 `json:"bytes_up"`
	BytesDown        uint64 `json:"bytes_down"`
	PacketsUp        uint64 `json:"packets_up"`
	PacketsDown      uint64 `json:"packets_down"`
	// PacketsDropped were over a rate, over a bound, or could not be sent.
	PacketsDropped uint64 `json:"packets_dropped"`
	DNSQueries     uint64 `json:"dns_queries"`
	// DNSDropped are queries over the rate, or more than are worked on at once.
	DNSDropped uint64 `json:"dns_dropped"`
	// DialFailed are connections that were allowed and did not come about.
	DialFailed uint64 `json:"dial_failed"`
	Denied     uint64 `json:"denied"`
	// DenialsOverflow are those of Denied that have no line of their own in
	// Denials, DenialsUnreported the calls of Config.Denied that were left out
	// because it was slow.
	DenialsOverflow   uint64 `json:"denials_overflow"`
	DenialsUnreported uint64 `json:"denials_unreported"`
}

type counters struct {
	connsOpen, flowsOpen                              atomic.Int64
	connsTotal, flowsTotal, dialFailed                atomic.Uint64
	bytesUp, bytesDown                                atomic.Uint64
	packetsUp, packetsDown, packetsDropped            atomic.Uint64
	dnsQueries, dnsDropped                            atomic.Uint64
	denied, denialsOverflowed, denialsUnreportedCalls atomic.Uint64
}

func (c *counters) stats() Stats {
	return Stats{
		ConnectionsOpen: c.connsOpen.Load(), ConnectionsTotal: c.connsTotal.Load(),
		FlowsOpen: c.flowsOpen.Load(), FlowsTotal: c.flowsTotal.Load(),
		BytesUp: c.bytesUp.Load(), BytesDown: c.bytesDown.Load(),
		PacketsUp: c.packetsUp.Load(), PacketsDown: c.packetsDown.Load(), PacketsDropped: c.packetsDropped.Load(),
		DNSQueries: c.dnsQueries.Load(), DNSDropped: c.dnsDropped.Load(), DialFailed: c.dialFailed.Load(),
		Denied: c.denied.Load(), DenialsOverflow: c.denialsOverflowed.Load(),
		DenialsUnreported: c.denialsUnreportedCalls.Load(),
	}
}

const (
	maxDenials = 256
	// denialEvery is how often the same denial is reported at most.
	denialEvery = time.Minute
	// denialQueue is how many reports wait for a slow Config.Denied.
	denialQueue = 64
)

type denialKey struct {
	protocol, to string
	reason       Reason
}

type denialEntry struct {
	Denial
	reported time.Time
}

// denials is the table of what was denied. It keeps the first maxDenials
// destinations, and one line for all others.
type denials struct {
	now    func() time.Time
	count  *counters
	report chan Denial // nil: nobody listens

	mu sync.Mutex
	of map[denialKey]*denialEntry
}

func newDenials(now func() time.Time, count *counters, listens bool) *denials {
	d := &denials{now: now, count: count, of: map[denialKey]*denialEntry{}}
	if listens {
		d.report = make(chan Denial, denialQueue)
	}
	return d
}

// note counts a denial. It waits for nobody.
func (d *denials) note(protocol, to string, reason Reason) {
	d.count.denied.Add(1)
	now := d.now()
	d.mu.Lock()
	defer d.mu.Unlock()
	key := denialKey{protocol, to, reason}
	e := d.of[key]
	if e == nil && len(d.of) >= maxDenials {
		d.count.denialsOverflowed.Add(1)
		key = denialKey{reason: Overflow}
		e = d.of[key]
	}
	if e == nil {
		e = &denialEntry{Denial: Denial{Protocol: key.protocol, To: key.to, Reason: key.reason, First: now}}
		d.of[key] = e
	}
	e.Count++
	e.Last = now
	if d.report == nil || !e.reported.IsZero() && now.Sub(e.reported) < denialEvery {
		return
	}
	select {
	case d.report <- e.Denial:
		e.reported = now
	default:
		d.count.denialsUnreportedCalls.Add(1)
	}
}

// list returns the table, the latest first.
func (d *denials) list() []Denial {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Denial, 0, len(d.of))
	for _, e := range d.of {
		all = append(all, e.Denial)
	}
	slices.SortFunc(all, func(a, b Denial) int {
		return cmp.Or(b.Last.Compare(a.Last), cmp.Compare(a.To, b.To), cmp.Compare(a.Reason, b.Reason),
			cmp.Compare(a.Protocol, b.Protocol))
	})
	return all
}
