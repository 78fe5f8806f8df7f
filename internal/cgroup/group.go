package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Group is the control group of one sandbox. It is a name, and holds nothing:
// the group goes on when nobody knows of it. It is safe for concurrent use.
type Group struct {
	h    *Hierarchy
	name string
	old  []string // parents that go with the group, for it is not in ours
}

// Name is the group's name below its parent.
func (g *Group) Name() string { return g.name }

// dirs are the directories of the group that exist.
func (g *Group) dirs() ([]string, error) {
	var dirs []string
	for _, t := range g.h.trees {
		switch _, err := os.Stat(t.dir(g.name)); {
		case err == nil:
			dirs = append(dirs, t.dir(g.name))
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("find group %s: %w", g.name, err)
		}
	}
	return dirs, nil
}

// Entrances opens the way into the group. A process that writes "0" to each of
// the files is in it, and so is what it starts from then on. It needs no access
// to control groups itself: the kernel asks who opened the file. It should
// enter before it has much memory, for that stays on its old group's account.
// The caller closes the files. A group that exists in part is
// errdef.ErrNotFound.
func (g *Group) Entrances() (_ []*os.File, err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	var files []*os.File
	for _, t := range g.h.trees {
		var f *os.File
		f, err = os.OpenFile(filepath.Join(t.dir(g.name), "cgroup.procs"), os.O_WRONLY, 0)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
		}
		if err != nil {
			return nil, fmt.Errorf("open group %s: %w", g.name, err)
		}
		u.Add(f.Close)
		files = append(files, f)
	}
	return files, nil
}

// pids are the processes that are in the group, under any controller.
func (g *Group) pids() ([]int, error) {
	var all []int
	for _, t := range g.h.trees {
		some, err := readPIDs(t.dir(g.name))
		if err != nil && !gone(err) {
			return nil, err
		}
		all = append(all, some...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// readPIDs reads the processes of a group, or as many as maxFile has room for.
func readPIDs(dir string) ([]int, error) {
	data, err := readSome(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	return parsePIDs(data)
}

// gone reports whether err says that the group does not exist any more.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// Remove removes the group, which must have no processes but such that are on
// their way out: for these it waits until ctx ends, and then returns
// errdef.ErrConflict. A group that does not exist is no error. The parent of a
// group that GroupOf has found elsewhere is removed too when that was its last.
func (g *Group) Remove(ctx context.Context) error {
	var all error
	for _, t := range g.h.trees {
		if err := g.remove(ctx, t.dir(g.name)); err != nil {
			all = errors.Join(all, fmt.Errorf("remove group %s: %w", g.name, err))
		}
	}
	for _, dir := range g.old {
		all = errors.Join(all, g.h.removeParent(dir))
	}
	return all
}

func (g *Group) remove(ctx context.Context, dir string) error {
	var p pause
	for {
		err := g.h.kernel.rmdir(dir)
		if err == nil || gone(err) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		if ctxErr := p.wait(ctx); ctxErr != nil {
			return fmt.Errorf("%w: %w: %w", errdef.ErrConflict, err, ctxErr)
		}
	}
}

// pause is a wait that grows. The kernel has events for some of what is waited
// for here, but not under v1.
type pause struct{ last time.Duration }

const (
	minPause = time.Millisecond
	maxPause = 50 * time.Millisecond
)

// wait returns the cause of ctx when that ends.
func (p *pause) wait(ctx context.Context) error {
	p.last = min(max(2*p.last, minPause), maxPause)
	timer := time.NewTimer(p.last)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
