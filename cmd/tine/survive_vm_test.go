//go:build vm

package main_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// surviveTime is how long TestSurvive goes on killing.
const surviveTime = 20 * time.Second

// told is what clients of a daemon that is killed again and again have been
// told, or have asked for without learning what became of it.
type told struct {
	mu      sync.Mutex
	lines   map[string][]string // of sandboxes that are there: what was written into each
	asked   map[string][]string // what may have been written
	gone    []string            // sandboxes that were removed
	doubted map[string]bool     // sandboxes whose removal was asked for
	tags    []string            // snapshots that are there
}

// TestSurvive kills the daemon at random moments while clients fork, run
// commands, take snapshots and remove sandboxes. Then it compares what each
// client was told with what is there, and looks for what nobody owns.
func TestSurvive(t *testing.T) {
	h := newOwnHost(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	k := &told{lines: map[string][]string{}, asked: map[string][]string{}, doubted: map[string]bool{}}
	deadline := time.Now().Add(surviveTime)
	rounds := 0
	for ; time.Now().Before(deadline) || rounds < 5; rounds++ {
		daemon := h.serve()
		var work sync.WaitGroup
		for _, act := range k.acts(h, rounds, random) {
			work.Go(act)
		}
		wait := time.Duration(random.IntN(1500)) * time.Millisecond
		<-time.After(wait)
		end(t, daemon, syscall.SIGKILL)
		work.Wait() // all have their answer, or lost their daemon
		daemon = h.serve()
		k.compare(h, fmt.Sprintf("round %d, killed after %v", rounds, wait))
		end(t, daemon, syscall.SIGKILL)
		if t.Failed() {
			break
		}
	}
	t.Logf("%d rounds: %d sandboxes and %d snapshots are there, %d sandboxes were removed", rounds, len(k.lines), len(k.tags), len(k.gone))
	h.serve()
	h.must("rm", "--all")
	h.must("snapshot", "gc")
	h.must("snapshot", "check")
	if got := sandboxes(h.dir); len(got) != 0 {
		t.Errorf("left in the state directory: %q", got)
	}
}

// acts are what the clients do in one round, each once.
func (k *told) acts(h *host, round int, random *rand.Rand) []func() {
	k.mu.Lock()
	defer k.mu.Unlock()
	ids := make([]string, 0, len(k.lines))
	for id := range k.lines {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	random.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	acts := []func(){}
	if len(ids) < 4 {
		acts = append(acts, func() { k.fork(h, "1") }, func() { k.fork(h, "2") })
	}
	for i, id := range ids {
		switch {
		case i == 0 && len(ids) > 2:
			k.doubted[id] = true
			acts = append(acts, func() { k.remove(h, id) })
		case i == 1:
			acts = append(acts, func() { k.branch(h, id, fmt.Sprintf("b%d", round)) })
		}
		if i > 0 {
			acts = append(acts, func() { k.write(h, id, fmt.Sprintf("line-%d", round)) })
		}
	}
	return acts
}

// run is host.tine for acts that may lose their daemon, in any goroutine.
func run(h *host, args ...string) (stdout string, ok bool) {
	cmd := h.command(h.t.Context(), args...)
	out, err := cmd.Output()
	return string(out), err == nil
}

func (k *told) fork(h *host, n string) {
	out, ok := run(h, "fork", "--snapshot", "py", "-n", n, "--json")
	var made []listed
	if !ok || json.Unmarshal([]byte(out), &made) != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range made {
		k.lines[s.ID] = nil
	}
}

func (k *told) write(h *host, id, line string) {
	k.mu.Lock()
	k.asked[id] = append(k.asked[id], line)
	k.mu.Unlock()
	if _, ok := run(h, "exec", id, "--", "sh", "-c", "echo "+line+" >> /root/log"); ok {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.lines[id] = append(k.lines[id], line)
	}
}

func (k *told) branch(h *host, id, tag string) {
	if _, ok := run(h, "branch", id, "--tag", tag); ok {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.tags = append(k.tags, tag)
	}
}

func (k *told) remove(h *host, id string) {
	if _, ok := run(h, "rm", id); ok {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.lines, id)
		k.gone = append(k.gone, id)
	}
}

// compare sees that what is there is what clients were told, and nothing that
// nobody owns.
func (k *told) compare(h *host, when string) {
	h.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	there := h.ids() // all of them run
	for id, lines := range k.lines {
		if !slices.Contains(there, id) {
			if !k.doubted[id] {
				h.t.Errorf("%s: sandbox %s is lost", when, id)
			}
			delete(k.lines, id)
			continue
		}
		k.read(h, when, id, lines)
	}
	for _, id := range k.gone {
		if slices.Contains(there, id) {
			h.t.Errorf("%s: sandbox %s was removed, and is there", when, id)
		}
	}
	for _, tag := range k.tags {
		if !h.has(tag) {
			h.t.Errorf("%s: snapshot %s is lost", when, tag)
		}
	}
	// A fork that was complete when its daemon died is there, and its client
	// does not know: it finds it in the list.
	for _, id := range there {
		if _, known := k.lines[id]; !known {
			h.want(id+"\n", "exec", id, "--", "hostname")
			h.must("rm", id)
		}
	}
	k.doubted = map[string]bool{}
	k.orphans(h, when)
}

// read sees that a sandbox has the lines that were written into it, in order.
func (k *told) read(h *host, when, id string, lines []string) {
	h.t.Helper()
	out, errOut, code := h.tine("exec", id, "--", "sh", "-c", "touch /root/log; cat /root/log")
	if code != 0 {
		h.t.Errorf("%s: sandbox %s: exit code %d: %s", when, id, code, errOut)
		return
	}
	got := strings.Fields(out)
	at := 0
	for _, line := range got {
		if !slices.Contains(k.asked[id], line) {
			h.t.Errorf("%s: sandbox %s has %q, which nobody wrote", when, id, line)
		}
		if at < len(lines) && lines[at] == line {
			at++
		}
	}
	if at < len(lines) {
		h.t.Errorf("%s: sandbox %s has %q, and was told to have %q", when, id, got, lines)
	}
}

// orphans looks for machines, directories, sockets, stages and mounts that
// belong to no sandbox that is listed.
func (k *told) orphans(h *host, when string) {
	h.t.Helper()
	there := h.ids()
	if machines := h.machines(); len(machines) != len(there) {
		h.t.Errorf("%s: %d machines for %d sandboxes", when, len(machines), len(there))
	}
	for _, dir := range sandboxes(h.dir) {
		if !slices.Contains(there, dir) {
			h.t.Errorf("%s: directory %s is of no sandbox", when, dir)
		}
	}
	sockets := 0
	err := filepath.WalkDir(filepath.Join(h.dir, "sandboxes"), func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type()&fs.ModeSocket != 0 {
			sockets++
		}
		return err
	})
	if err != nil || sockets > 2*len(there) {
		h.t.Errorf("%s: %d sockets for %d sandboxes, %v", when, sockets, len(there), err)
	}
	if staging, readErr := os.ReadDir(filepath.Join(h.dir, "snapshots", "staging")); readErr != nil || len(staging) > 0 {
		h.t.Errorf("%s: left in staging: %v, %v", when, staging, readErr)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), h.dir) {
		h.t.Errorf("%s: a mount is left, %v", when, err)
	}
}
