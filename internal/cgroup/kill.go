package cgroup

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Kill ends every process of the group, however fast they make others, and
// returns when there are none. When ctx ends first it returns
// errdef.ErrConflict: processes that wait for a device may not end. A group
// that does not exist has no processes. Nothing else may enter meanwhile.
func (g *Group) Kill(ctx context.Context) error {
	var p pause
	for {
		left, err := g.killRound()
		if err != nil {
			return fmt.Errorf("kill group %s: %w", g.name, err)
		}
		if left == 0 {
			return nil
		}
		if err = p.wait(ctx); err != nil {
			return fmt.Errorf("%w: kill group %s: %d processes are left: %w", errdef.ErrConflict, g.name, left, err)
		}
	}
}

// killRound sends every process to its end, and returns how many there were.
func (g *Group) killRound() (left int, err error) {
	if err = g.killV2(); err != nil {
		return 0, err
	}
	found, err := g.pids()
	if err != nil || len(found) == 0 {
		return 0, err
	}
	var held undo.Stack
	err = g.hold(&held)
	if err == nil {
		found, err = g.pids() // again: only now do they stand still
	}
	for batch := range slices.Chunk(found, killBatch) {
		if err == nil {
			err = g.killSome(batch)
		}
	}
	return len(found), errors.Join(err, held.Close())
}

// killV2 has v2 do it in one step that misses none. Older kernels cannot, and
// processes may be in the groups of v1 alone.
func (g *Group) killV2() error {
	for _, t := range g.h.trees {
		if t.v2 {
			if err := g.writeIfThere(t.dir(g.name), "cgroup.kill", "1"); err != nil && !gone(err) {
				return err
			}
		}
	}
	return nil
}

// hold keeps the group from making new processes, until u is closed. Frozen
// processes make none. Without a freezer they may not make any.
func (g *Group) hold(u *undo.Stack) error {
	for _, t := range g.h.trees {
		file, on, off := "cgroup.freeze", "1", "0"
		if !t.v2 {
			if t != g.h.by[freezer] {
				continue
			}
			file, on, off = "freezer.state", "FROZEN", "THAWED"
		}
		frozen, err := g.swap(t, file, on, off, u)
		if frozen || err != nil {
			return err
		}
	}
	t := g.h.by[pids]
	if t == nil {
		return nil
	}
	have, err := readFile(filepath.Join(t.dir(g.name), "pids.max"))
	if err != nil {
		return ignoreGone(err)
	}
	_, err = g.swap(t, "pids.max", "0", strings.TrimSpace(string(have)), u)
	return err
}

// swap writes on to a file, if it is there, and has u write off.
func (g *Group) swap(t *tree, file, on, off string, u *undo.Stack) (done bool, err error) {
	dir := t.dir(g.name)
	if err = g.write(dir, file, on); err != nil {
		return false, ignoreGone(err)
	}
	u.Add(func() error { return ignoreGone(g.write(dir, file, off)) })
	return true, nil
}

func ignoreGone(err error) error {
	if gone(err) {
		return nil
	}
	return err
}

// killBatch is how many processes are held open at a time.
const killBatch = 128

// killSome kills those of the processes that are in the group. A number read
// a moment ago may be another process's by now. But if it is in the group once
// more after it was opened, then what was opened is of the group, or dead.
func (g *Group) killSome(some []int) error {
	var u undo.Stack
	opened := map[int]int{}
	var all error
	for _, pid := range some {
		if pid == 0 {
			continue // not to be seen from here
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err == nil {
			opened[pid] = fd
			u.Add(func() error { return unix.Close(fd) })
		} else if !errors.Is(err, unix.ESRCH) {
			all = errors.Join(all, fmt.Errorf("open process %d: %w", pid, err))
		}
	}
	still, err := g.pids()
	all = errors.Join(all, err)
	for _, pid := range still {
		fd, ok := opened[pid]
		if !ok {
			continue
		}
		if err = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			all = errors.Join(all, fmt.Errorf("kill process %d: %w", pid, err))
		}
	}
	return errors.Join(all, u.Close())
}
