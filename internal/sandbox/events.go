package sandbox

import (
	"crypto/rand"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/snapshot"
)

// EventType says what has happened.
type EventType string

// The types. After Created comes Running; after Expired, Removed.
const (
	Created         EventType = "created"
	Started         EventType = "running"
	Branched        EventType = "branched"
	WasSuspended    EventType = "suspended"
	Resumed         EventType = "resumed"
	RolledBack      EventType = "rolled_back"
	Died            EventType = "died"
	OutOfMemory     EventType = "out_of_memory" // and then Died
	EgressDenied    EventType = "egress_denied" // at most once a minute for each destination
	Expired         EventType = "expired"
	Removed         EventType = "removed"
	SnapshotCreated EventType = "snapshot.created"
	SnapshotRemoved EventType = "snapshot.removed"
)

// Event is a change in the life of a sandbox or a snapshot.
type Event struct {
	Seq     uint64 // 1, 2, 3, …
	At      time.Time
	Type    EventType
	Sandbox string // empty for what is of a snapshot alone
	Data    EventData
}

// EventData is what there is to say of an event; which fields there are depends
// on its type.
type EventData struct {
	Snapshot string  // a tag
	Digest   string  // the snapshot's, or the node's
	Mode     string  // of a branch
	Reason   string  // of a death
	FromPool bool    // of a sandbox that was made
	Adopted  bool    // found so when the daemon started
	PauseMS  float64 // of a branch
	TookMS   float64 // of a fork, a branch, a template
}

// maxReason bounds a reason, part of which may be a machine's own words.
const maxReason = 1 << 10

// Events keeps the last events for whoever follows them. Nobody who adds one
// waits: a reader comes for what is there, and one that is too slow finds that
// the oldest have gone. A nil *Events keeps nothing. It is safe for concurrent
// use.
type Events struct {
	epoch   string
	observe func(Event)

	mu     sync.Mutex
	ring   []Event // ring[seq%len(ring)]
	last   uint64
	more   chan struct{} // closed with the next event
	closed bool
}

// NewEvents keeps size events. observe, which may be nil, is told of each as it
// happens, and must not block.
func NewEvents(size int, observe func(Event)) *Events {
	return &Events{epoch: strings.ToLower(rand.Text()[:12]), observe: observe, ring: make([]Event, max(size, 1)), more: make(chan struct{})}
}

// Epoch tells the numbers of these Events from those of another daemon's.
func (e *Events) Epoch() string { return e.epoch }

// Last is the number of the last event, or 0.
func (e *Events) Last() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last
}

// After returns at most limit of the events after number seq, oldest first, and
// whether some of those are lost. More is closed when there are others, or
// there will be none; then open is false.
func (e *Events) After(seq uint64, limit int) (events []Event, gap bool, more <-chan struct{}, open bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	size := uint64(len(e.ring))
	if e.last > size && seq < e.last-size {
		seq, gap = e.last-size, true
	}
	for n := seq + 1; n <= e.last && len(events) < limit; n++ {
		events = append(events, e.ring[n%size])
	}
	return events, gap, e.more, !e.closed
}

// Close tells those who wait for more that there will be none.
func (e *Events) Close() {
	if e == nil {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.closed {
		e.closed = true
		close(e.more)
	}
}

// Add notes an event, now. It never blocks.
func (e *Events) Add(what EventType, id string, data EventData) {
	if e == nil {
		return
	}
	if len(data.Reason) > maxReason {
		data.Reason = strings.ToValidUTF8(data.Reason[:maxReason], "")
	}
	event := e.put(Event{At: time.Now(), Type: what, Sandbox: id, Data: data})
	if e.observe != nil {
		e.observe(event)
	}
}

func (e *Events) put(event Event) Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last++
	event.Seq = e.last
	e.ring[e.last%uint64(len(e.ring))] = event
	if !e.closed {
		close(e.more)
		e.more = make(chan struct{})
	}
	return event
}

// handedOut tells of a sandbox that somebody has been given.
func (e *Events) handedOut(i Info) {
	data := EventData{Snapshot: i.SnapshotTag, Digest: i.SnapshotDigest, FromPool: i.FromPool, TookMS: i.ForkMS}
	e.Add(Created, i.ID, data)
	e.Add(Started, i.ID, EventData{Snapshot: i.SnapshotTag, Digest: i.SnapshotDigest})
}

// adopted tells of a sandbox that an earlier daemon left, as it is.
func (e *Events) adopted(i Info) {
	data := EventData{Snapshot: i.SnapshotTag, Digest: i.SnapshotDigest, Reason: i.Reason, Adopted: true}
	switch i.State {
	case Running:
		e.Add(Started, i.ID, data)
	case Suspended:
		e.Add(WasSuspended, i.ID, data)
	case Dead:
		e.Add(Died, i.ID, data)
	case Creating: // is never adopted
	}
}

// gone tells that a sandbox is no more, if anybody ever had it.
func (e *Events) gone(b *box) {
	if i := b.info(); i.State != Creating {
		e.Add(Removed, i.ID, EventData{Snapshot: i.SnapshotTag, Digest: i.SnapshotDigest})
	}
}

// tell tells of a branch, if there is one.
func (w *branching) tell(snap snapshot.Snapshot, err error) {
	if err != nil {
		return
	}
	data := EventData{
		Snapshot: snap.Tag, Digest: snap.Digest, Mode: snap.Mode, PauseMS: snap.PauseMS,
		TookMS: float64(time.Since(w.at)) / float64(time.Millisecond),
	}
	w.m.Events.Add(Branched, w.b.id, data)
	w.m.Events.Add(SnapshotCreated, w.b.id, EventData{Snapshot: snap.Tag, Digest: snap.Digest})
}

// madeTemplate tells of a snapshot that no sandbox was branched for.
func (e *Events) madeTemplate(snap snapshot.Snapshot, began time.Time) {
	e.Add(SnapshotCreated, "", EventData{
		Snapshot: snap.Tag, Digest: snap.Digest, TookMS: float64(time.Since(began)) / float64(time.Millisecond),
	})
}

// promoted tells of a tag that points at another snapshot now.
func (m *Manager) promoted(snap snapshot.Snapshot, err error) (snapshot.Snapshot, error) {
	if err == nil {
		m.Events.Add(SnapshotCreated, "", EventData{Snapshot: snap.Tag, Digest: snap.Digest})
	}
	return snap, err
}

// Load is how busy a Manager is.
type Load struct {
	Branches, BranchCap int // under way, and the most there may be
	Pools               []PoolLoad
	Net                 NetTotals
}

// PoolLoad is how full a pool is.
type PoolLoad struct {
	Snapshot    string // the tag that it was made by
	Digest      string
	Ready, Want int
}

// Load says how busy the Manager is. It looks at nothing but its own memory.
func (m *Manager) Load() Load {
	load := Load{Branches: len(m.branchSlots), BranchCap: cap(m.branchSlots), Net: m.outlets.totals()}
	m.mu.Lock()
	defer m.mu.Unlock()
	for digest, p := range m.pools {
		load.Pools = append(load.Pools, PoolLoad{Snapshot: p.origin.snap.Tag, Digest: digest, Ready: len(p.idle), Want: p.want})
	}
	return load
}
