package sandbox

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// seen keeps what happens.
type seen struct {
	mu     sync.Mutex
	events []Event
}

func (s *seen) note(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, e)
}

// of are the types of what has happened to a sandbox, or to snapshots.
func (s *seen) of(id string) (types []EventType) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if e.Sandbox == id {
			types = append(types, e.Type)
		}
	}
	return types
}

func (s *seen) watch(cfg *Config) { cfg.Events = NewEvents(16, s.note) }

// TestEventsOfALife sees that each change of a sandbox is told of once, and
// what nobody was given is not.
func TestEventsOfALife(t *testing.T) {
	t.Parallel()
	w, s := newWorld(t), &seen{}
	m := w.manager(t, s.watch)
	w.template(t, m)
	if err := m.SetPool(t.Context(), "py", 1); err != nil { // its fork is nobody's
		t.Fatal(err)
	}
	eventually(t, "the pool is full", func() bool { ready, _ := m.Pool("py"); return ready == 1 })
	if load := m.Load(); len(load.Pools) != 1 || load.Pools[0].Snapshot != "py" || load.Pools[0].Ready != 1 || load.BranchCap != 4 {
		t.Errorf("load %+v", load)
	}
	id := fork(t, m, 1, func(r *ForkRequest) { r.NoPool = true })[0]
	branch(t, m, id, BranchRequest{Tag: "b"})
	if _, err := m.Suspend(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	ping(t, m, id)
	if _, err := m.Rollback(t.Context(), id, "b"); err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := m.SetPool(t.Context(), "py", 0); err != nil {
		t.Fatal(err)
	}
	want := []EventType{Created, Started, Branched, SnapshotCreated, WasSuspended, Resumed, RolledBack, Removed}
	if diff := cmp.Diff(want, s.of(id)); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range s.events {
		switch {
		case e.Sandbox != "" && e.Sandbox != id:
			t.Errorf("event of a sandbox that nobody has: %+v", e)
		case e.Type == Branched && (e.Data.Snapshot != "b" || e.Data.TookMS <= 0), e.Type == Created && e.Data.TookMS <= 0:
			t.Errorf("%+v", e)
		case e.Seq != uint64(i+1):
			t.Errorf("event %d has number %d", i+1, e.Seq)
		}
	}
}

func TestEventsOfTheEnd(t *testing.T) {
	t.Parallel()
	w, s := newWorld(t), &seen{}
	m := w.manager(t, s.watch)
	w.template(t, m)
	old := fork(t, m, 1, func(r *ForkRequest) { r.Lifetime = 10 * time.Millisecond })[0]
	ill := fork(t, m, 1)[0]
	b, err := m.find(ill)
	if err != nil {
		t.Fatal(err)
	}
	if err = b.machine().Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both have ended", func() bool {
		return slices.Contains(s.of(old), Removed) && slices.Contains(s.of(ill), Died)
	})
	for id, want := range map[string][]EventType{old: {Created, Started, Expired, Removed}, ill: {Created, Started, Died}} {
		if diff := cmp.Diff(want, s.of(id)); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	}
}

// TestEventsOfAdoption sees that the next daemon tells of what it found.
func TestEventsOfAdoption(t *testing.T) {
	t.Parallel()
	w, s := newWorld(t), &seen{}
	first := w.manager(t, lasting)
	w.template(t, first)
	ids := fork(t, first, 2)
	if _, err := first.Suspend(t.Context(), ids[1]); err != nil {
		t.Fatal(err)
	}
	closeManager(t, first)
	m := w.manager(t, lasting, s.watch)
	for id, want := range map[string]EventType{ids[0]: Started, ids[1]: WasSuspended} {
		if diff := cmp.Diff([]EventType{want}, s.of(id)); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		if err := m.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

// TestEventsRing checks the law of After: a reader has all events, in order and
// each once, or is told that there is a gap.
func TestEventsRing(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 20).Draw(t, "size")
		e := NewEvents(size, nil)
		var position, added uint64
		for range rapid.IntRange(1, 30).Draw(t, "steps") {
			for range rapid.IntRange(0, 8).Draw(t, "adds") {
				e.Add(Resumed, "", EventData{})
				added++
			}
			limit := rapid.IntRange(1, 10).Draw(t, "limit")
			events, gap, _, open := e.After(position, limit)
			if lost := added-position > uint64(size); gap != lost || !open {
				t.Fatalf("gap %v at %d of %d, %d kept", gap, position, added, size)
			}
			if want := min(added-position, uint64(size), uint64(limit)); uint64(len(events)) != want {
				t.Fatalf("%d events, want %d", len(events), want)
			}
			for i, event := range events {
				if !gap && event.Seq != position+1 || i > 0 && event.Seq != events[i-1].Seq+1 {
					t.Fatalf("event %d after %d", event.Seq, position)
				}
				if !gap {
					position = event.Seq
				}
			}
			if gap && len(events) > 0 {
				position = events[len(events)-1].Seq
			}
		}
	})
}

// TestEventsWait sees that a reader is woken, also by the end, and that nobody
// waits for one that does not read.
func TestEventsWait(t *testing.T) {
	t.Parallel()
	e := NewEvents(2, nil)
	_, _, more, _ := e.After(0, 1)
	for range 100 {
		e.Add(Died, "sb", EventData{Reason: strings.Repeat("ä", maxReason)})
	}
	<-more
	events, gap, more, _ := e.After(0, 10)
	if !gap || len(events) != 2 || events[1].Seq != 100 || len(events[0].Data.Reason) > maxReason {
		t.Errorf("gap %v, %d events", gap, len(events))
	}
	e.Close()
	e.Close()
	<-more
	e.Add(Died, "sb", EventData{})
	if _, _, _, open := e.After(e.Last(), 1); open {
		t.Error("closed events are open")
	}
	var none *Events
	none.Add(Died, "sb", EventData{})
	none.Close()
}
