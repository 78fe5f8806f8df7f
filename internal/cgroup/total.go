package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// SetTotal bounds what all groups of the parent take together, besides what
// each may take. A zero is no limit. Groups that GroupOf has found below another
// parent are not bounded. When memory in all does not fit, the kernel ends a
// process of any of the groups.
//
// Processes that share the parent share its limits: the last to call SetTotal
// wins. They stay when the process ends, as long as the parent exists.
//
// Errors are those of Group.Set. Under v1 they have three more causes: IOBytes
// is errdef.ErrUnsupported, for the kernel bounds input and output of each group
// alone; a group may not have more CPUMillis than all, which is
// errdef.ErrInvalid here, and in Create and Set; and on kernels before 5.11
// MemoryBytes is errdef.ErrConflict when groups were made before Open could have
// their memory counted together.
func (h *Hierarchy) SetTotal(l Limits) error {
	if err := h.checkTotal(l); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.prepareAll(); err != nil {
		return fmt.Errorf("make parent group: %w", err)
	}
	if l.MemoryBytes != 0 {
		if err := h.sumMemory(h.by[memory]); err != nil {
			return fmt.Errorf("limit memory of all groups: %w", err)
		}
	}
	if err := h.all().apply(l); err != nil {
		return err
	}
	h.total = l
	return nil
}

func (h *Hierarchy) checkTotal(l Limits) error {
	if err := l.check(); err != nil {
		return err
	}
	if err := h.supports(l); err != nil {
		return fmt.Errorf("%w of all groups", err)
	}
	if l.IOBytes != 0 && !h.by[blkio].v2 {
		return fmt.Errorf("%w: limit IOBytes of all groups: cgroup v1 bounds each group alone", errdef.ErrUnsupported)
	}
	return nil
}

// Total reads what all groups of the parent take together, and have taken since
// it was made: what groups that were removed have taken is in it. Throttled is
// how long the limits of SetTotal kept groups from running. Under v1 OOMKills is
// 0: the kernel counts them for each group alone. Without a parent, which a
// process that shares it may have found empty and removed, all is 0.
func (h *Hierarchy) Total() (Usage, error) {
	u, err := h.all().Usage()
	if errors.Is(err, errdef.ErrNotFound) {
		return Usage{}, nil
	}
	return u, err
}

// all is the parent, seen as a group.
func (h *Hierarchy) all() *Group {
	var bases []string
	for _, t := range h.trees {
		bases = append(bases, t.base)
	}
	return &Group{h: h.below(bases), name: h.name}
}

// restore makes the parent again where it was removed, with its limits.
func (h *Hierarchy) restore() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.prepareAll(); err != nil || h.total == (Limits{}) {
		return err
	}
	return h.all().apply(h.total)
}

func (h *Hierarchy) prepareAll() error {
	for _, t := range h.trees {
		if err := h.prepare(t); err != nil {
			return err
		}
	}
	return nil
}

// sumMemory has the parent in t count the memory of its groups as its own.
// Kernels of v1 before 5.11 do not unless told, before there are groups: when it
// is too late that is errdef.ErrConflict.
func (h *Hierarchy) sumMemory(t *tree) error {
	if t.v2 {
		return nil // v2 always does
	}
	file := filepath.Join(t.parent, "memory.use_hierarchy")
	have, err := readFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // another controller's, or a kernel that has no choice
	}
	if err != nil || strings.TrimSpace(string(have)) != "0" {
		return err
	}
	if err = h.kernel.write(file, "1"); errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: groups that exist are counted alone: %w", errdef.ErrConflict, err)
		err = errdef.WithHint(err, "end everything that runs in "+t.parent+", and start again")
	}
	return err
}
