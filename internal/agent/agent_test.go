package agent_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/agent"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// machine is the real agent on a fake machine.
type machine struct {
	t     testing.TB
	dir   string
	fake  *agent.Fake
	agent *agent.Agent
	work  sync.WaitGroup
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir()}
	m.fake = agent.NewFake(m.dir)
	m.agent = agent.New(agent.Config{Fake: m.fake, Env: []string{"FROM_IMAGE=yes"}})
	t.Cleanup(func() {
		m.agent.Close()
		m.work.Wait()
	})
	return m
}

// pipe returns the host's end of a link that the agent serves.
func (m *machine) pipe() net.Conn {
	host, guestEnd := net.Pipe()
	m.work.Go(func() {
		if err := m.agent.Serve(context.Background(), guestEnd); err != nil {
			m.t.Errorf("serve: %v", err)
		}
		_ = guestEnd.Close()
	})
	m.t.Cleanup(func() { _ = host.Close() })
	return host
}

func (m *machine) dial() *guest.Client {
	m.t.Helper()
	return m.dialOn(m.pipe())
}

func (m *machine) dialOn(link net.Conn) *guest.Client {
	m.t.Helper()
	c, err := guest.Dial(within(m.t), link)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (m *machine) path(p string) string { return filepath.Join(m.dir, p) }

func (m *machine) write(path, text string, mode os.FileMode) {
	m.t.Helper()
	path = m.path(path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) read(path string) string {
	m.t.Helper()
	text, err := os.ReadFile(m.path(path))
	if err != nil {
		m.t.Error(err)
	}
	return strings.TrimSpace(string(text))
}

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// eventually waits for a condition that nothing announces.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func sh(script string) guest.ExecSpec { return guest.ExecSpec{Argv: []string{"/bin/sh", "-c", script}} }

func TestPing(t *testing.T) {
	t.Parallel()
	pong, err := newMachine(t).dial().Ping(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if pong.Agent != agent.Version || pong.PID != os.Getpid() || pong.Generation != "" || pong.Uptime <= 0 {
		t.Errorf("pong is %+v", pong)
	}
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.write("run/tine/secrets/token", "parent's", 0o600)
	m.write("etc/tine/fork.d/20-second", "#!/bin/sh\necho second >> "+m.path("hooks")+"\n", 0o755)
	m.write("etc/tine/fork.d/10-first", "#!/bin/sh\necho first $TINE_GENERATION $TINE_HOSTNAME >> "+m.path("hooks")+"\n", 0o755)
	id := guest.NewIdentity("fork-1", "gen-1")
	id.Clock = 1_800_000_000_000_000_000
	c, err := guest.DialIdentity(within(t), m.pipe(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := strings.Join(m.fake.Calls(), "; "); got != "entropy 64; clock 1800000000000000000; hostname fork-1" {
		t.Errorf("the machine was told %q", got)
	}
	for path, want := range map[string]string{
		"etc/hostname": "fork-1", "etc/machine-id": id.MachineID, "run/tine/boot_id": id.BootID,
		"run/tine/generation": "gen-1", "hooks": "first gen-1 fork-1\nsecond",
	} {
		if got := m.read(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	if !strings.Contains(m.read("etc/hosts"), "fork-1") {
		t.Error("hosts does not name the machine")
	}
	if _, err = os.Stat(m.path("run/tine/secrets")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("secrets are still there: %v", err)
	}
	if pong, err := c.Ping(within(t)); err != nil || pong.Generation != "gen-1" {
		t.Errorf("pong is %+v, %v", pong, err)
	}
}

func TestIdentityClockOnly(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	if err := m.dial().SetClock(within(t)); err != nil {
		t.Fatal(err)
	}
	if calls := m.fake.Calls(); len(calls) != 1 || !strings.HasPrefix(calls[0], "clock ") {
		t.Errorf("calls are %v", calls)
	}
}

func TestIdentityFailsClosed(t *testing.T) {
	t.Parallel()
	good := func() guest.Identity { return guest.NewIdentity("fork", "gen") }
	tests := map[string]struct {
		spoil func(*machine, *guest.Identity)
		want  string
		is    error
	}{
		"no-entropy":    {func(_ *machine, id *guest.Identity) { id.Entropy = nil }, "entropy", errdef.ErrInvalid},
		"bad-hostname":  {func(_ *machine, id *guest.Identity) { id.Hostname = "a\nb" }, "hostname", errdef.ErrInvalid},
		"bad-machineid": {func(_ *machine, id *guest.Identity) { id.MachineID = "short" }, "machine id", errdef.ErrInvalid},
		"bad-bootid":    {func(_ *machine, id *guest.Identity) { id.BootID = "../../../../etc/shadow/0123456789abc" }, "boot id", errdef.ErrInvalid},
		"bad-gen":       {func(_ *machine, id *guest.Identity) { id.Generation = "a b" }, "generation", errdef.ErrInvalid},
		"no-hostname-file": {func(m *machine, _ *guest.Identity) {
			if err := os.MkdirAll(m.path("etc/hostname"), 0o755); err != nil {
				m.t.Fatal(err)
			}
		}, "hostname", nil},
		"hook-fails": {func(m *machine, _ *guest.Identity) {
			m.write("etc/tine/fork.d/bad", "#!/bin/sh\necho the reason >&2; exit 4\n", 0o755)
		}, "bad: exit status 4, signal 0: the reason", nil},
		"hook-not-executable": {func(m *machine, _ *guest.Identity) {
			m.write("etc/tine/fork.d/bad", "", 0o644)
		}, "hooks: bad", errdef.ErrDenied},
		"hook-hangs": {func(m *machine, id *guest.Identity) {
			m.write("etc/tine/fork.d/slow", "#!/bin/sh\nsleep 100\n", 0o755)
			id.Deadline = 200 * time.Millisecond
		}, "slow: ", errdef.ErrTimeout},
		"bad-signal": {func(m *machine, _ *guest.Identity) {
			m.write("run/tine/fork-signal.d/12345", "NOSUCH", 0o644)
		}, "signals", errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, id := newMachine(t), good()
			tt.spoil(m, &id)
			c, err := guest.DialIdentity(within(t), m.pipe(), id)
			if err == nil {
				_ = c.Close()
				t.Fatal("the identity was confirmed")
			}
			if !strings.Contains(err.Error(), tt.want) || tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("error is %q, want one with %q that is %v", err, tt.want, tt.is)
			}
		})
	}
}

func TestIdentitySignals(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	ctx := within(t)
	p, err := c.Exec(ctx, sh(`trap 'echo reseeded; exit 0' USR1; mkdir -p run/tine/fork-signal.d
		echo USR1 > run/tine/fork-signal.d/$$; echo ready; while :; do sleep 0.01; done`))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if out, nerr := p.Next(ctx); nerr != nil || string(out.Data) != "ready\n" {
		t.Fatalf("%q, %v", out.Data, nerr)
	}
	if err = c.Identify(ctx, guest.NewIdentity("fork", "gen")); err != nil {
		t.Fatal(err)
	}
	if out, err := p.Next(ctx); err != nil || string(out.Data) != "reseeded\n" {
		t.Fatalf("%q, %v", out.Data, err)
	}
}

func TestQuiesceAndPowerOff(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	c := m.dial()
	if err := errors.Join(c.Quiesce(within(t)), c.Resume(within(t)), c.PowerOff(within(t))); err != nil {
		t.Fatal(err)
	}
	eventually(t, "power off", func() bool { return strings.HasSuffix(strings.Join(m.fake.Calls(), ";"), "power off") })
}

func asRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to act as other users")
	}
	if _, err := user.Lookup("nobody"); err != nil {
		t.Skip("needs a user named nobody")
	}
}
