package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// GroupOf finds the group name that process pid is in, wherever its parent
// lies: an earlier process that made it may have run in another group than this
// one, in another systemd scope for example. A group found so is like any other,
// but Names does not list it, and Close leaves its parent.
//
// The process must be in that group itself, and the group in a parent of our
// name, under each controller in use. Any other process, one that has ended
// included, is errdef.ErrNotFound. The caller must know that pid is still the
// process that it means: any user may give its own groups such names.
func (h *Hierarchy) GroupOf(pid int, name string) (*Group, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	members, err := h.memberships(pid)
	if err != nil {
		return nil, fmt.Errorf("find group of process %d: %w", pid, err)
	}
	var parents, old []string
	for _, t := range h.trees {
		dir, err := h.groupUnder(t, members, name)
		if err != nil {
			return nil, fmt.Errorf("find group of process %d: %w", pid, err)
		}
		parent := filepath.Dir(dir)
		parents = append(parents, parent)
		if parent != t.parent {
			old = append(old, parent)
		}
	}
	if len(old) == 0 {
		return &Group{h: h, name: name}, nil
	}
	return &Group{h: h.below(parents), name: name, old: old}, nil
}

// memberships are the groups that a process is in.
func (h *Hierarchy) memberships(pid int) ([]membership, error) {
	data, err := readFile(filepath.Join(h.proc, strconv.Itoa(pid), "cgroup"))
	if gone(err) || errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	return parseMemberships(data)
}

// groupUnder returns the directory in t's hierarchy of the group that a process
// is in, if the group and its parent have the names that they should.
func (h *Hierarchy) groupUnder(t *tree, members []membership, name string) (string, error) {
	at, ok := pathUnder(members, t.key)
	if !ok || path.Base(at) != name || path.Base(path.Dir(at)) != h.name {
		return "", fmt.Errorf("%w: it is in %q, not in %s/%s", errdef.ErrNotFound, at, h.name, name)
	}
	dir, err := h.directory(t.key, at)
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		err = fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	}
	return dir, err
}

// below is h as it would be with other parents, which are in the order of its
// trees.
func (h *Hierarchy) below(parents []string) *Hierarchy {
	other := &Hierarchy{
		kernel: h.kernel, name: h.name, proc: h.proc, mounts: h.mounts, by: map[string]*tree{}, missing: h.missing, device: h.device,
	}
	for i, t := range h.trees {
		moved := &tree{v2: t.v2, key: t.key, base: filepath.Dir(parents[i]), parent: parents[i], controllers: t.controllers}
		other.trees = append(other.trees, moved)
		for _, c := range t.controllers {
			other.by[c] = moved
		}
	}
	return other
}
