package jail

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// makeGroup makes a control group for a cell to come, without limits, or none if
// there are no control groups. To enter one takes the kernel 5 ms, as it waits
// until no processor looks at what changes; so that is done before there is a job.
func (j *Jail) makeGroup() (*cgroup.Group, error) {
	if j.cfg.Groups == nil {
		return nil, nil //nolint:nilnil // no groups, no error
	}
	return j.cfg.Groups.Create(j.maker+"."+randomName(), cgroup.Limits{})
}

// randomName is unlike that of any other group of the same maker.
func randomName() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand
	return hex.EncodeToString(b[:])
}

// makerName names this process for ever, in the names of the groups that it makes.
func makerName() (string, error) {
	pid := os.Getpid()
	start, err := linux.StartTime(pid)
	return fmt.Sprintf("%d-%d", pid, start), err
}

// makerLives reports whether the process that made a group is still there: then
// the group is that one's to remove.
func makerLives(name string) bool {
	maker, _, _ := strings.Cut(name, ".")
	pid, start, _ := strings.Cut(maker, "-")
	number, err := strconv.Atoi(pid)
	if err != nil {
		return false
	}
	ticks, err := strconv.ParseUint(start, 10, 64)
	if err != nil {
		return false
	}
	p, err := linux.OpenProcess(number, ticks)
	if err != nil {
		return !errors.Is(err, errdef.ErrNotFound)
	}
	_ = p.Close() // only looked at
	return true
}

// Sweep removes the control groups that processes have left which are no more,
// unless a program still runs in them.
func (j *Jail) Sweep(ctx context.Context) error {
	if j.cfg.Groups == nil {
		return nil
	}
	names, err := j.cfg.Groups.Names()
	if err != nil {
		return fmt.Errorf("list control groups: %w", err)
	}
	var errs []error
	for _, name := range names {
		if !makerLives(name) {
			errs = append(errs, j.sweepGroup(ctx, name))
		}
	}
	return errors.Join(errs...)
}

func (j *Jail) sweepGroup(ctx context.Context, name string) error {
	group, err := j.cfg.Groups.Group(name)
	if errors.Is(err, errdef.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	usage, err := group.Usage()
	if err != nil || usage.PIDs > 0 {
		return err
	}
	return group.Remove(ctx)
}

// Group finds the control group of a program that runs, by its process and the
// group's name, wherever the daemon that started it was in the hierarchy.
func (j *Jail) Group(pid int, name string) (*cgroup.Group, error) {
	if j.cfg.Groups == nil {
		return nil, fmt.Errorf("%w: control group %s", errdef.ErrNotFound, name)
	}
	return j.cfg.Groups.GroupOf(pid, name)
}
