package process_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/process"
)

// actEnv makes of this test binary a monitor that does what its value says.
const actEnv = "TINE_TEST_ACT"

func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == actEnv {
		act(os.Args[2])
	}
	os.Exit(m.Run())
}

func act(what string) {
	switch what {
	case "wait":
		fmt.Println("here")
		time.Sleep(time.Minute)
	case "fail":
		fmt.Println("first\nlast words")
		os.Exit(3)
	case "talk":
		for range 1000 {
			fmt.Println(strings.Repeat("x", 1000))
		}
	case "environment":
		fmt.Println(strings.Join(os.Environ(), " "))
	}
	os.Exit(0)
}

func keeper() *process.Keeper {
	return &process.Keeper{Engine: "test", Monitor: "The monitor", Logger: slog.New(slog.DiscardHandler)}
}

func launch(t *testing.T, what string) (process.Launch, string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	out, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = out.Close() }) // only written by the child
	return process.Launch{
		Handle: vmm.Handle{Dir: dir, Memory: "/memory"}, Binary: self, Args: []string{actEnv, what}, Output: out,
	}, path
}

func start(t *testing.T, what string, hooks process.Hooks) (*process.Process, string) {
	t.Helper()
	l, path := launch(t, what)
	s, err := keeper().Start(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	if err = s.Settled(); err != nil {
		t.Fatal(err)
	}
	p := s.Watch(hooks)
	t.Cleanup(func() {
		if err := p.Kill(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	return p, path
}

// TestKilled: a process that was killed has ended as it should, and its hooks come
// in order.
func TestKilled(t *testing.T) {
	t.Parallel()
	var order []string
	gone := make(chan struct{})
	p, _ := start(t, "wait", process.Hooks{
		Ended:   func() { order = append(order, "ended") },
		Explain: func(err error) error { order = append(order, "explain"); return err },
		Gone:    func() { order = append(order, "gone"); close(gone) },
	})
	h := p.Handle()
	if h.Engine != "test" || h.PID != p.PID() || h.StartTime == 0 || h.BootID == "" || h.Memory != "/memory" || h.Jailed {
		t.Errorf("handle %+v", h)
	}
	if err := p.Ended(errors.New("mine")); err == nil || err.Error() != "mine" {
		t.Errorf("while it lives: %v", err)
	}
	for range 2 {
		if err := p.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	<-gone
	if err := p.Err(); err != nil {
		t.Errorf("after Kill: %v", err)
	}
	if err := p.Ended(errors.New("mine")); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("after its end: %v", err)
	}
	if got := strings.Join(order, " "); got != "ended gone" {
		t.Errorf("hooks: %s", got)
	}
	if _, err := p.Memory(); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("memory after its end: %v", err)
	}
}

// TestFails: how a process ended by itself is told, with what the engine knows.
func TestFails(t *testing.T) {
	t.Parallel()
	p, _ := start(t, "fail", process.Hooks{Explain: func(err error) error { return fmt.Errorf("%w: last words", err) }})
	<-p.Done()
	err := p.Err()
	if !errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), "The monitor ended: exit status 3: last words") {
		t.Errorf("error %v", err)
	}
}

// TestAdopt: a later daemon takes a process over, and is told of its end; one that
// is gone, or of another boot or engine, is not found.
func TestAdopt(t *testing.T) {
	t.Parallel()
	p, _ := start(t, "wait", process.Hooks{})
	handle := p.Handle()
	for name, change := range map[string]func(h *vmm.Handle){
		"engine": func(h *vmm.Handle) { h.Engine = "other" },
		"boot":   func(h *vmm.Handle) { h.BootID = "other" },
		"start":  func(h *vmm.Handle) { h.StartTime++ },
	} {
		other := handle
		change(&other)
		if _, err := keeper().Adopt(other, process.Hooks{}); !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("another %s: %v", name, err)
		}
	}
	again, err := keeper().Adopt(handle, process.Hooks{})
	if err != nil {
		t.Fatal(err)
	}
	if err = again.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err = again.Err(); err != nil {
		t.Errorf("after Kill: %v", err)
	}
	if err = p.Err(); err == nil {
		t.Error("the first owner was told of no error")
	}
	if _, err = keeper().Adopt(handle, process.Hooks{}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("of a dead process: %v", err)
	}
}

// TestWithoutJail: what needs one is refused.
func TestWithoutJail(t *testing.T) {
	t.Parallel()
	l, _ := launch(t, "wait")
	l.Limits.MemoryMiB = 100
	if _, err := keeper().Start(t.Context(), l); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("limits: %v", err)
	}
	if _, err := keeper().TakeCell(t.Context(), true); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("network: %v", err)
	}
	if c, err := keeper().TakeCell(t.Context(), false); c != nil || err != nil {
		t.Errorf("cell %v, %v", c, err)
	}
	caps := keeper().Caps(vmm.Caps{MaxVCPUs: 3})
	if caps.MaxVCPUs != 3 || caps.Jail || len(caps.JailLacks) == 0 {
		t.Errorf("caps %+v", caps)
	}
	p, _ := start(t, "wait", process.Hooks{})
	if _, err := p.Usage(); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("usage: %v", err)
	}
	if _, err := p.Link(); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("link: %v", err)
	}
	if err := errors.Join(p.SetLimits(vmm.Limits{})); err != nil {
		t.Errorf("no limits: %v", err)
	}
	if err := p.SetLimits(vmm.Limits{PIDs: 1}); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("set limits: %v", err)
	}
}

// TestEnvironment: a monitor is told nothing of the daemon's surroundings.
func TestEnvironment(t *testing.T) {
	t.Parallel()
	p, path := start(t, "environment", process.Hooks{})
	<-p.Done()
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "PATH=/dev/null LC_ALL=C\n" {
		t.Errorf("environment %q, %v", got, err)
	}
}

// TestOutput: no more is taken of a program's words than one wants to read.
func TestOutput(t *testing.T) {
	t.Parallel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	out, err := process.Output(exec.CommandContext(t.Context(), self, actEnv, "talk"), 4096)
	if err == nil || len(out) > 4096 {
		t.Errorf("%d bytes, error %v", len(out), err)
	}
	out, err = process.Output(exec.CommandContext(t.Context(), self, actEnv, "fail"), 4096)
	if err == nil || string(out) != "first\nlast words\n" {
		t.Errorf("%q, error %v", out, err)
	}
}
