package guestmem

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// freezer makes twins with this binary as its helper.
func freezer(t testing.TB, role string) Freezer {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Freezer{Command: []string{exe, role}}
}

func prepare(t testing.TB, c *child) *Pending {
	t.Helper()
	p, err := freezer(t, roleHelper).Prepare(t.Context(), c.space)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func freeze(t testing.TB, c *child) *Twin {
	t.Helper()
	p := prepare(t, c)
	twin, err := p.Freeze(t.Context())
	if err != nil {
		err = errors.Join(err, p.Close())
		if errors.Is(err, errdef.ErrUnsupported) && os.Getuid() != 0 {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	return twin
}

// A twin is the memory of one instant, and the source goes on.
func TestTwinOneInstant(t *testing.T) {
	t.Parallel()
	for role, rounds := range map[string]int{roleMachine: 12, roleFiltered: 4} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			const threads = 3
			c := startMachine(t, role, 900)
			c.tell("spin %d", threads)
			waitFor(t, func() bool { return countPrivate(t, c.space) == 900 })
			for range rounds {
				p := prepare(t, c)
				c.pause()
				twin, err := p.Freeze(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				held, err := c.space.Copy(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				c.resume()
				got := c.read(twin)
				checkSpin(t, got, threads)
				if !bytes.Equal(got, c.read(held)) || !bytes.Equal(got, c.read(twin)) {
					t.Fatal("twin and copy differ")
				}
				pid := twin.space.PID
				if err := errors.Join(twin.Close(), held.Close()); err != nil {
					t.Fatal(err)
				}
				if exists(pid) {
					t.Fatalf("twin %d is left", pid)
				}
			}
			c.tell("halt")
			checkUnharmed(t, c)
		})
	}
}

// checkUnharmed sees that the machine computes, and has the memory that others
// see.
func checkUnharmed(t *testing.T, c *child) {
	t.Helper()
	before := c.memory()
	c.tell("dirty 1 2 3")
	for page := 1; page <= 3; page++ {
		fillPage(before, page)
	}
	if !bytes.Equal(before, c.memory()) {
		t.Error("the machine does not write what it should")
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(c.pid) + "/status")
	if err != nil || !strings.Contains(string(status), "TracerPid:\t0\n") {
		t.Errorf("still traced: %v\n%s", err, status)
	}
}

// Freezing does not need a pause: it makes none of the machine's system calls
// fail and loses none of its signals.
func TestTwinOfRunning(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 64)
	for range 50 {
		c.tell("dirty 5")
		twin := freeze(t, c)
		if got := countPrivate(t, twin); got != 1 {
			t.Errorf("%d private pages", got)
		}
		if err := twin.Close(); err != nil {
			t.Fatal(err)
		}
	}
	checkUnharmed(t, c)
}

// A filter that cannot be suspended would kill the machine: it is not tried.
func TestTwinFilterStays(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleFiltered, 16)
	p, err := freezer(t, roleWeak).Prepare(t.Context(), c.space)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if closeErr := p.Close(); closeErr != nil {
			t.Error(closeErr)
		}
	}()
	if _, err = p.Freeze(t.Context()); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("got %v", err)
	}
	checkUnharmed(t, c)
}

// When the helper dies, so does the twin, and the machine does not mind.
func TestTwinHelperKilled(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	twin := freeze(t, c)
	pid := twin.space.PID
	if err := twin.helper.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return !running(pid) })
	if _, err := twin.ReadAt(make([]byte, PageSize), 0); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("read of a dead twin: %v", err)
	}
	if err := twin.Private(func(uint64, uint64) bool { return true }); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("pages of a dead twin: %v", err)
	}
	if err := twin.Close(); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("close: %v", err)
	}
	if exists(pid) {
		t.Errorf("twin %d is left", pid)
	}
	checkUnharmed(t, c)
}

// A machine that dies ends nothing but itself.
func TestTwinMachineKilled(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	c.tell("dirty 3")
	p := prepare(t, c)
	twin := freeze(t, c)
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() bool { return !running(c.pid) })
	if got := countPrivate(t, twin); got != 1 {
		t.Errorf("the twin has %d private pages", got)
	}
	if _, err := p.Freeze(t.Context()); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("freeze of a dead machine: %v", err)
	}
	if err := errors.Join(p.Close(), twin.Close()); err != nil {
		t.Error(err)
	}
	if _, err := freezer(t, roleHelper).Prepare(t.Context(), c.space); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("prepare for a dead machine: %v", err)
	}
}

func TestTwinNotUsed(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	p := prepare(t, c)
	helper := p.helper.cmd.Process.Pid
	if err := errors.Join(p.Close(), p.Close()); err != nil {
		t.Error(err)
	}
	if exists(helper) {
		t.Error("the helper is left")
	}
	if _, err := p.Freeze(t.Context()); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("freeze after close: %v", err)
	}
	checkUnharmed(t, c)
}

// A caller that gives up leaves no twin, whenever it does.
func TestTwinCancelled(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	for i := range 10 {
		p := prepare(t, c)
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*200*time.Microsecond)
		twin, err := p.Freeze(ctx)
		cancel()
		if err == nil {
			err = twin.Close()
		} else if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
		if err = errors.Join(err, p.Close()); err != nil {
			t.Fatal(err)
		}
	}
	checkUnharmed(t, c)
}

func TestHelperMissing(t *testing.T) {
	t.Parallel()
	c := startMachine(t, roleMachine, 16)
	tests := map[string]struct {
		command []string
		want    error
	}{
		"none":   {nil, errdef.ErrUnsupported},
		"ends":   {[]string{"/bin/true"}, errdef.ErrUnavailable},
		"absent": {[]string{"/no/such/program"}, os.ErrNotExist},
		"babble": {[]string{"/bin/sh", "-c", "read request; echo what?"}, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Freezer{Command: tt.command}.Prepare(t.Context(), c.space)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}
}

func FuzzTwinRequest(f *testing.F) {
	f.Add([]byte(`{"pid":7,"ranges":[{"Start":4096,"End":8192,"Offset":0}]}`))
	f.Add([]byte(`{"pid":1}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, line []byte) {
		req, err := decodeTwinRequest(line)
		if err == nil && (req.PID <= 1 || len(req.Ranges) == 0) || err != nil && !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("got %+v, %v", req, err)
		}
	})
}

func countPrivate(t testing.TB, src Source) (n uint64) {
	t.Helper()
	if err := src.Private(func(_, count uint64) bool { n += count; return true }); err != nil {
		t.Fatal(err)
	}
	return n
}

func waitFor(t *testing.T, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !done(); {
		if time.Now().After(deadline) {
			t.Fatal("timed out")
		}
		time.Sleep(time.Millisecond)
	}
}

// running reports whether a process is there and not a zombie.
func running(pid int) bool {
	st, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(st), ") Z ")
}
