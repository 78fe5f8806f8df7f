package egress

import (
	"container/heap"
	"net/netip"
	"sync"
	"time"
)

// maxNamesOfAddr is how many names one address is remembered for.
const maxNamesOfAddr = 64

// names remembers which addresses were answered for which names, and until when.
// It keeps at most max pairs, and maxNamesOfAddr of one address: where there are
// more, those go that end first. It is safe for concurrent use.
type names struct {
	now func() time.Time
	max int

	mu     sync.Mutex
	byAddr map[netip.Addr]map[string]*pair
	queue  pairs
}

// pair is an address that a name was answered with.
type pair struct {
	addr  netip.Addr
	name  string
	until time.Time
	index int // in the queue
}

func newNames(now func() time.Time, most int) *names {
	return &names{now: now, max: most, byAddr: map[netip.Addr]map[string]*pair{}}
}

// open notes that name was answered with addr, which is good until then. It
// never shortens what an earlier answer said.
func (n *names) open(addr netip.Addr, name string, until time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if p := n.byAddr[addr][name]; p != nil {
		if until.After(p.until) {
			p.until = until
			heap.Fix(&n.queue, p.index)
		}
		return
	}
	n.makeRoomLocked(addr)
	p := &pair{addr: addr, name: name, until: until}
	heap.Push(&n.queue, p)
	if n.byAddr[addr] == nil {
		n.byAddr[addr] = map[string]*pair{}
	}
	n.byAddr[addr][name] = p
}

// makeRoomLocked takes out what has ended, and makes room for one more.
func (n *names) makeRoomLocked(addr netip.Addr) {
	now := n.now()
	for len(n.queue) > 0 && (len(n.queue) >= n.max || !n.queue[0].until.After(now)) {
		n.removeLocked(n.queue[0])
	}
	if of := n.byAddr[addr]; len(of) >= maxNamesOfAddr {
		var first *pair
		for _, p := range of {
			if first == nil || p.until.Before(first.until) {
				first = p
			}
		}
		n.removeLocked(first)
	}
}

func (n *names) removeLocked(p *pair) {
	heap.Remove(&n.queue, p.index)
	of := n.byAddr[p.addr]
	delete(of, p.name)
	if len(of) == 0 {
		delete(n.byAddr, p.addr)
	}
}

// of returns the names for which addr is open now.
func (n *names) of(addr netip.Addr) []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []string
	now := n.now()
	for name, p := range n.byAddr[addr] {
		if p.until.After(now) {
			all = append(all, name)
		}
	}
	return all
}

// pairs is a heap, the pair that ends first on top.
type pairs []*pair

func (p pairs) Len() int           { return len(p) }
func (p pairs) Less(i, j int) bool { return p[i].until.Before(p[j].until) }

func (p pairs) Swap(i, j int) {
	p[i], p[j] = p[j], p[i]
	p[i].index, p[j].index = i, j
}

// Push is of heap.Interface.
func (p *pairs) Push(x any) {
	if one, ok := x.(*pair); ok {
		one.index = len(*p)
		*p = append(*p, one)
	}
}

// Pop is of heap.Interface.
func (p *pairs) Pop() any {
	last := len(*p) - 1
	one := (*p)[last]
	(*p)[last] = nil
	*p = (*p)[:last]
	return one
}
