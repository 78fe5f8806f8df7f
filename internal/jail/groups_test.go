package jail

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/linux"
)

func TestMakerLives(t *testing.T) {
	t.Parallel()
	own, err := makerName()
	if err != nil {
		t.Fatal(err)
	}
	ended := exec.Command("true")
	if err := ended.Start(); err != nil {
		t.Fatal(err)
	}
	start, startErr := linux.StartTime(ended.Process.Pid)
	if err := ended.Wait(); err != nil || startErr != nil {
		t.Fatal(err, startErr)
	}
	for name, want := range map[string]bool{
		own + ".0a": true, own: true,
		strconv.Itoa(ended.Process.Pid) + "-" + strconv.FormatUint(start, 10) + ".0a": false,
		strconv.Itoa(os.Getpid()) + "-1.0a":                                           false, // another process had the number
		"":                                                                            false, "sb-abc.0a": false, "1": false, "x-1.0a": false,
	} {
		if got := makerLives(name); got != want {
			t.Errorf("maker of %q lives: %v", name, got)
		}
	}
}

// A sweep removes what a process has left that is no more, unless something runs
// in it, and nothing of one that is there.
func TestSweep(t *testing.T) {
	j := openJail(t, withGroups(t))
	if j.cfg.Groups == nil {
		t.Skipf("NOT TESTED: %v", j.cfg.NoGroups)
	}
	ended := exec.Command("true")
	if err := ended.Run(); err != nil {
		t.Fatal(err)
	}
	dead := strconv.Itoa(ended.Process.Pid) + "-1."
	for _, name := range []string{dead + "empty", dead + "used", j.maker + ".own"} {
		group, err := j.cfg.Groups.Create(name, cgroup.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := group.Remove(context.WithoutCancel(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
	used, err := j.cfg.Groups.Group(dead + "used")
	if err != nil {
		t.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1000")
	if err = sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = sleeper.Process.Kill()
		_ = sleeper.Wait() // and says that it was killed
	})
	entrances, err := used.Entrances()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range entrances {
		_, writeErr := f.WriteString(strconv.Itoa(sleeper.Process.Pid))
		if err = errors.Join(writeErr, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	if err = j.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	names, err := j.cfg.Groups.Names()
	want := []string{dead + "used", j.maker + ".own"}
	slices.Sort(want)
	if err != nil || !slices.Equal(names, want) {
		t.Errorf("after a sweep there are %q, want %q, %v", names, want, err)
	}
}
