// Package cgroup gives each sandbox a control group of its own, which bounds
// and counts what all of its processes take together, and can end them.
//
// It works with cgroup v2, with v1, and where a host has both. Under v1 a group
// is a directory in each controller's hierarchy; under v2 it is one directory.
// Groups are named by their owner and have no state but the kernel's: a process
// that starts after its forerunner was killed finds them all by Names, and by
// GroupOf where the forerunner ran in another group than itself.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// Config says where control groups are, and what the parent of ours is called.
type Config struct {
	Root string // where they are mounted, or below which; "" is /sys/fs/cgroup
	Proc string // "" is /proc
	Sys  string // "" is /sys
	// Name is that of the group in which all others are made. It lies in the
	// group that this process is in, so that what bounds this process bounds
	// them too. Several processes may share it.
	Name string
	// Disk is a path on the block device that Limits.IOBytes bounds; without it
	// nothing bounds input and output.
	Disk string
}

// Hierarchy makes and finds the groups below one parent. It is safe for
// concurrent use. It holds nothing that has to be closed.
type Hierarchy struct {
	kernel  kernel
	name    string
	proc    string // where the kernel tells of processes
	mounts  []mount
	trees   []*tree
	by      map[string]*tree  // the tree of each controller that is there
	missing map[string]string // why a controller cannot limit anything
	device  string            // the disk's, as MAJOR:MINOR, or ""

	mu    sync.Mutex
	total Limits // what SetTotal has set last
}

// A tree is one mounted hierarchy, and our parent group in it.
type tree struct {
	v2          bool
	key         string   // a controller that tells the hierarchy from others; "" is v2
	base        string   // directory of the group that the parent lies in
	parent      string   // directory of the parent
	controllers []string // those that it is used for
}

// The controllers, by their names under v1. All but the last three are limits.
const (
	memory  = "memory"
	cpu     = "cpu"
	pids    = "pids"
	blkio   = "blkio"
	cpuacct = "cpuacct" // counts processor time; v2 does it without
	freezer = "freezer" // v2 does it without
)

func limiters() []string { return []string{memory, cpu, pids, blkio} }

// Support says which limits can be set.
type Support struct {
	Version               int // 2, or 1 where some of the limits are set by v1
	Memory, CPU, PIDs, IO bool
	Missing               []string // one line for each that is false: its name, and why
}

var goodName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$`)

func checkName(name string) error {
	if !goodName.MatchString(name) {
		return fmt.Errorf("%w: name of a control group %q", errdef.ErrInvalid, name)
	}
	return nil
}

// Open finds out what this host has and makes the parent group. Under v2 it
// moves this process and its children into a group NAME-daemon first, where it
// has to: a group that gives controllers to others may have no processes.
//
// It returns errdef.ErrDenied when this user may not make groups here, and
// errdef.ErrUnsupported when no limit can be set for another reason; both with
// a hint. That some of the limits can be set is enough: see Support.
func Open(cfg Config) (*Hierarchy, error) { return open(cfg, linuxKernel{}) }

func open(cfg Config, k kernel) (_ *Hierarchy, err error) {
	if err = checkName(cfg.Name); err != nil {
		return nil, err
	}
	for path, usual := range map[*string]string{&cfg.Root: "/sys/fs/cgroup", &cfg.Proc: "/proc", &cfg.Sys: "/sys"} {
		if *path == "" {
			*path = usual
		}
	}
	h := &Hierarchy{kernel: k, name: cfg.Name, proc: cfg.Proc, by: map[string]*tree{}, missing: map[string]string{}}
	s := search{h: h, cfg: cfg}
	if err = s.run(); err != nil {
		return nil, fmt.Errorf("find control groups: %w", err)
	}
	if !slices.ContainsFunc(limiters(), h.has) {
		return nil, errors.Join(s.verdict(), h.Close())
	}
	return h, nil
}

// has reports whether a controller can set limits.
func (h *Hierarchy) has(controller string) bool {
	return h.by[controller] != nil && h.missing[controller] == ""
}

// Support says which limits can be set, and why others cannot.
func (h *Hierarchy) Support() Support {
	s := Support{Version: 2, Memory: h.has(memory), CPU: h.has(cpu), PIDs: h.has(pids), IO: h.has(blkio)}
	for _, c := range limiters() {
		switch {
		case !h.has(c):
			s.Missing = append(s.Missing, v2Name(c)+": "+h.missing[c])
		case !h.by[c].v2:
			s.Version = 1
		}
	}
	return s
}

// v2Name is what v2 calls a controller.
func v2Name(controller string) string {
	if controller == blkio {
		return "io"
	}
	return controller
}

// Create makes the group name and sets its limits. It returns errdef.ErrExists
// when any part of such a group exists, errdef.ErrInvalid for a bad name or
// limit, and errdef.ErrUnsupported for a limit that this host cannot set. On
// error nothing is left of the group.
func (h *Hierarchy) Create(name string, l Limits) (_ *Group, err error) {
	if err = errors.Join(checkName(name), l.check()); err != nil {
		return nil, err
	}
	if err = h.supports(l); err != nil {
		return nil, fmt.Errorf("%w of group %s", err, name)
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	for _, t := range h.trees {
		dir := t.dir(name)
		if err = h.mkdir(dir); err != nil {
			return nil, fmt.Errorf("make group %s: %w", name, err)
		}
		u.Add(func() error { return h.kernel.rmdir(dir) })
		if err = h.inheritCPUs(t, dir); err != nil {
			return nil, fmt.Errorf("make group %s: %w", name, err)
		}
	}
	g := &Group{h: h, name: name}
	if err = g.apply(l); err != nil {
		return nil, err
	}
	return g, nil
}

// mkdir makes a group, and the parent anew should another process have found it
// empty and removed it.
func (h *Hierarchy) mkdir(dir string) error {
	err := h.kernel.mkdir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		if err = h.restore(); err == nil {
			err = h.kernel.mkdir(dir)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: %s", errdef.ErrExists, dir)
	}
	return err
}

// prepare makes the parent in t and lets it give its controllers to groups.
func (h *Hierarchy) prepare(t *tree) error {
	err := h.kernel.mkdir(t.parent)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err = h.inheritCPUs(t, t.parent); err != nil {
		return err
	}
	// SetTotal says it when that cannot be had: groups do without.
	if err = h.sumMemory(t); err != nil && !errors.Is(err, errdef.ErrConflict) {
		return err
	}
	for _, c := range t.controllers {
		if err = h.enable(t, c); err != nil {
			return err
		}
	}
	return nil
}

// enable has t's base and parent hand a controller down.
func (h *Hierarchy) enable(t *tree, controller string) error {
	if !t.v2 {
		return nil // v1 always does
	}
	for _, dir := range []string{t.base, t.parent} {
		file := filepath.Join(dir, "cgroup.subtree_control")
		have, err := readFile(file)
		if err != nil {
			return err
		}
		if slices.Contains(strings.Fields(string(have)), v2Name(controller)) {
			continue // nothing to ask for, nor to be refused
		}
		if err = h.kernel.write(file, "+"+v2Name(controller)); err != nil {
			return err
		}
	}
	return nil
}

// inheritCPUs fills in what a v1 group of the cpuset controller begins without,
// and admits no process before it has. It matters where that controller is
// mounted together with one that is used here.
func (h *Hierarchy) inheritCPUs(t *tree, dir string) error {
	if t.v2 {
		return nil // v2 does it by itself
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		file := filepath.Join(dir, name)
		have, err := readFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || strings.TrimSpace(string(have)) != "" {
			return err
		}
		theirs, err := readFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil {
			err = h.kernel.write(file, strings.TrimSpace(string(theirs)))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Group finds the group name, which may exist in part: a process that was
// killed while it made or removed a group leaves one such. It returns
// errdef.ErrNotFound when no part of it exists.
func (h *Hierarchy) Group(name string) (*Group, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	g := &Group{h: h, name: name}
	dirs, err := g.dirs()
	if err != nil {
		return nil, err
	}
	if len(dirs) == 0 {
		return nil, fmt.Errorf("%w: control group %s", errdef.ErrNotFound, name)
	}
	return g, nil
}

// Names lists the groups that exist in whole or in part, sorted.
func (h *Hierarchy) Names() ([]string, error) {
	var names []string
	for _, t := range h.trees {
		entries, err := os.ReadDir(t.parent)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list control groups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && goodName.MatchString(e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Close removes the parent where it has no groups. A later Create makes it
// again, and sets its limits. The group into which Open has moved this process stays.
func (h *Hierarchy) Close() error {
	var all error
	for _, t := range h.trees {
		all = errors.Join(all, h.removeParent(t.parent))
	}
	return all
}

// removeParent removes a parent that has no groups, and leaves any other.
func (h *Hierarchy) removeParent(dir string) error {
	err := h.kernel.rmdir(dir)
	used := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY)
	if err != nil && !gone(err) && !used {
		return fmt.Errorf("remove parent group: %w", err)
	}
	return nil
}

func (t *tree) dir(name string) string { return filepath.Join(t.parent, name) }
