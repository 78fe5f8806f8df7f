package sandbox

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// outside is where sandboxes of these tests go: nobody is there, and all that is
// allowed ends at echo.
var outside = netip.MustParseAddrPort("203.0.113.7:80")

// netWorld has the snapshot net, of a machine with a network card.
func netWorld(t *testing.T, change ...func(*Config)) (*world, *Manager) {
	t.Helper()
	w := newWorld(t)
	m := w.netManager(t, change...)
	if _, err := m.CreateSnapshot(t.Context(), SnapshotRequest{Tag: "net", Image: "py", Machine: vmm.Machine{Net: true}}); err != nil {
		t.Fatal(err)
	}
	return w, m
}

// netManager has sandboxes dial an echo.
func (w *world) netManager(t *testing.T, change ...func(*Config)) *Manager {
	t.Helper()
	return w.manager(t, append(change, func(c *Config) {
		c.Net.Dial = func(context.Context, string, netip.AddrPort) (net.Conn, error) {
			here, there := net.Pipe()
			go func() {
				_, _ = io.Copy(there, there) // until it is closed
				_ = there.Close()
			}()
			return here, nil
		}
	})...)
}

func allowing(rules ...string) *Net {
	n := &Net{}
	for _, text := range rules {
		rule, err := egress.ParseRule(text)
		if err != nil {
			panic(err) // a test's own mistake
		}
		n.Rules.Allow = append(n.Rules.Allow, rule)
	}
	return n
}

// reaches says whether the guest of a sandbox gets an answer from dst.
func (w *world) reaches(t *testing.T, m *Manager, id string, dst netip.AddrPort) bool {
	t.Helper()
	b, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := w.engine.Connect(t.Context(), b.machine().Handle().Dir, dst)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err = conn.Write([]byte("x")); err != nil {
		return false
	}
	var got [1]byte
	_, err = io.ReadFull(conn, got[:])
	return err == nil && got[0] == 'x'
}

func netFork(t *testing.T, m *Manager, reach *Net) string {
	t.Helper()
	return fork(t, m, 1, func(r *ForkRequest) { r.Snapshot, r.Net = "net", reach })[0]
}

func TestEgress(t *testing.T) {
	t.Parallel()
	events := NewEvents(100, nil)
	w, m := netWorld(t, func(c *Config) { c.Events = events })
	closed := netFork(t, m, nil)
	open := netFork(t, m, allowing("203.0.113.0/24:80"))
	if w.reaches(t, m, closed, outside) {
		t.Error("what nobody has allowed is reached")
	}
	if !w.reaches(t, m, open, outside) {
		t.Error("what is allowed is not reached")
	}
	if w.reaches(t, m, open, netip.MustParseAddrPort("203.0.113.7:81")) {
		t.Error("another port is reached")
	}
	state, err := m.NetState(closed)
	if err != nil || len(state.Denials) != 1 || state.Denials[0].Reason != egress.NoRule || state.Stats.Denied != 1 {
		t.Errorf("%+v, %v", state, err)
	}
	eventually(t, "the event", func() bool {
		all, _, _, _ := events.After(0, 100)
		for _, e := range all {
			if e.Type == EgressDenied && e.Sandbox == closed && e.Data.Reason == "tcp to 203.0.113.7:80: no_rule" {
				return true
			}
		}
		return false
	})
	// Rules change while it runs.
	if _, err = m.SetNet(t.Context(), closed, allowing("203.0.113.7").Rules); err != nil || !w.reaches(t, m, closed, outside) {
		t.Errorf("after it was allowed: not reached, %v", err)
	}
	if _, err = m.SetNet(t.Context(), closed, egress.Rules{}); err != nil || w.reaches(t, m, closed, outside) {
		t.Errorf("after it was denied again: reached, %v", err)
	}
}

// The network is the sandbox's, whichever machine it has and whichever daemon.
func TestEgressLasts(t *testing.T) {
	t.Parallel()
	w, m := netWorld(t, lasting)
	reach := allowing("203.0.113.0/24:80")
	reach.Secrets = []egress.Secret{{Name: "api", Header: "Authorization", Value: "Bearer s3cret", Hosts: []string{"api.example.com"}}}
	id := netFork(t, m, reach)
	for _, step := range []func(context.Context, string) (Info, error){m.Suspend, m.Resume} {
		if _, err := step(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if !w.reaches(t, m, id, outside) {
		t.Error("not reached after it was resumed")
	}
	closeManager(t, m)
	m = w.netManager(t, lasting)
	if !w.reaches(t, m, id, outside) || w.reaches(t, m, id, netip.MustParseAddrPort("198.51.100.1:80")) {
		t.Error("another daemon has other rules")
	}
	b, err := m.find(id)
	if err != nil || len(b.record.Net.Secrets) != 1 || b.record.Net.Secrets[0].Value != "Bearer s3cret" {
		t.Errorf("secrets after a daemon: %v, %v", b.record.Net.Secrets, err)
	}
	if _, err = m.Suspend(t.Context(), id); err != nil { // and once more, while it has no machine
		t.Fatal(err)
	}
	closeManager(t, m)
	m = w.netManager(t, lasting)
	if b, err = m.find(id); err != nil || len(b.record.Net.Secrets) != 1 || b.record.Net.Secrets[0].Value != "Bearer s3cret" {
		t.Errorf("secrets of one that was suspended: %v, %v", b.record.Net.Secrets, err)
	}
	if _, err = m.Resume(t.Context(), id); err != nil || !w.reaches(t, m, id, outside) {
		t.Errorf("not reached after it was resumed by another daemon: %v", err)
	}
	record, err := os.ReadFile(filepath.Join(m.dir(id), recordFile))
	if err != nil || strings.Contains(string(record), "s3cret") {
		t.Errorf("the record tells a secret, %v", err)
	}
	// A fork of its branch may reach nothing, and has no secret.
	if _, err = m.Branch(t.Context(), id, BranchRequest{Tag: "b"}); err != nil {
		t.Fatal(err)
	}
	child := fork(t, m, 1, func(r *ForkRequest) { r.Snapshot = "b" })[0]
	if w.reaches(t, m, child, outside) {
		t.Error("a fork has what its parent was allowed")
	}
	for _, id := range []string{id, child} {
		if err := m.Kill(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}

func TestNetRefused(t *testing.T) {
	t.Parallel()
	w, m := netWorld(t)
	w.template(t, m)
	for name, tc := range map[string]struct {
		snapshot string
		reach    *Net
		want     error
	}{
		"no-card":      {"py", &Net{}, errdef.ErrInvalid},
		"loopback":     {"net", allowing("127.0.0.1"), errdef.ErrDenied},
		"metadata":     {"net", allowing("169.254.169.254:80"), errdef.ErrDenied},
		"private":      {"net", allowing("10.0.0.0/8"), errdef.ErrDenied},
		"bad-secret":   {"net", &Net{Secrets: []egress.Secret{{Name: "x"}}}, errdef.ErrInvalid},
		"slow-rate":    {"net", &Net{UpBytes: 1}, errdef.ErrInvalid},
		"minus-rate":   {"net", &Net{DownBytes: -1}, errdef.ErrInvalid},
		"no-such-rule": {"net", &Net{Rules: egress.Rules{Allow: []egress.Rule{{}}}}, errdef.ErrInvalid},
	} {
		if _, err := m.Fork(t.Context(), ForkRequest{Snapshot: tc.snapshot, N: 1, Net: tc.reach}); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	id := fork(t, m, 1)[0]
	if _, err := m.NetState(id); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("network of a sandbox without a card: %v", err)
	}
	if _, err := m.SetNet(t.Context(), id, egress.Rules{}); err == nil {
		t.Error("rules for a sandbox without a card")
	}
}

// A sandbox that cannot be given its network is never handed out: nobody is told
// of it, and nothing of it is left.
func TestNetFails(t *testing.T) {
	t.Parallel()
	events := NewEvents(100, nil)
	w, m := netWorld(t, func(c *Config) { c.Events = events })
	last := events.Last()
	failed := errors.New("no network")
	w.engine.Fail("Link", failed)
	results, err := m.Fork(t.Context(), ForkRequest{Snapshot: "net", N: 1})
	if err != nil || !errors.Is(results[0].Err, failed) {
		t.Fatalf("%+v, %v", results, err)
	}
	if told, _, _, _ := events.After(last, 100); len(told) > 0 {
		t.Errorf("events: %+v", told)
	}
	w.nothing(t, m)
}
