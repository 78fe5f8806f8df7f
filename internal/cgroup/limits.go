package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// Limits bound what all processes of a group take together. A zero is no limit.
type Limits struct {
	// MemoryBytes bounds memory, page cache and what the kernel holds for the
	// group included. What does not fit is not swapped out: the kernel ends a
	// process of the group. At least MinMemory.
	MemoryBytes int64
	// CPUMillis bounds processor time, in thousandths of a core, over each tenth
	// of a second. At least MinCPUMillis.
	CPUMillis int
	// PIDs bounds processes and threads together. One more cannot be made.
	PIDs int
	// IOBytes bounds what is read, and what is written, in bytes a second, on the
	// disk of Config.Disk. Whoever wants more waits. At least MinIOBytes.
	IOBytes int64
}

// The least that can be asked for. Below it a process would not be bounded but
// stand still, or the kernel refuses.
const (
	MinMemory    = 1 << 20
	MinCPUMillis = minQuota * 1000 / period
	MinIOBytes   = 64 << 10
)

const (
	period   = 100_000    // of processor time, in microseconds
	minQuota = 1000       // the kernel's, of a period
	maxCPU   = 10_000_000 // thousandths of a core: more than the kernel can count
)

func (l Limits) check() error {
	for _, f := range []struct {
		name              string
		value, least, top int64
	}{
		{"MemoryBytes", l.MemoryBytes, MinMemory, 1 << 62},
		{"CPUMillis", int64(l.CPUMillis), MinCPUMillis, maxCPU},
		{"PIDs", int64(l.PIDs), 1, 4 << 20}, // the kernel's PID_MAX_LIMIT
		{"IOBytes", l.IOBytes, MinIOBytes, 1 << 62},
	} {
		if f.value != 0 && (f.value < f.least || f.value > f.top) {
			return fmt.Errorf("%w: limit %s is %d, not 0 or from %d to %d", errdef.ErrInvalid, f.name, f.value, f.least, f.top)
		}
	}
	return nil
}

// supports returns errdef.ErrUnsupported for a limit that cannot be set here.
func (h *Hierarchy) supports(l Limits) error {
	for _, f := range []struct {
		name, controller string
		set              bool
	}{
		{"MemoryBytes", memory, l.MemoryBytes != 0},
		{"CPUMillis", cpu, l.CPUMillis != 0},
		{"PIDs", pids, l.PIDs != 0},
		{"IOBytes", blkio, l.IOBytes != 0},
	} {
		if f.set && !h.has(f.controller) {
			return fmt.Errorf("%w: limit %s: %s: %s", errdef.ErrUnsupported, f.name, v2Name(f.controller), h.missing[f.controller])
		}
	}
	return nil
}

// Set changes the limits of a group while its processes run. After an error
// some of them may have been changed. A limit on memory below what is in use
// has the kernel take some back: under v2 it may end processes for it, under v1
// Set returns errdef.ErrConflict when it cannot. Errors are those of Create too.
func (g *Group) Set(l Limits) error {
	if err := l.check(); err != nil {
		return err
	}
	if err := g.h.supports(l); err != nil {
		return fmt.Errorf("%w of group %s", err, g.name)
	}
	return g.apply(l)
}

// apply writes all limits that can be set here.
func (g *Group) apply(l Limits) error {
	for _, c := range []struct {
		name string
		set  func(dir string, v2 bool, l Limits) error
	}{{memory, g.setMemory}, {cpu, g.setCPU}, {pids, g.setPIDs}, {blkio, g.setIO}} {
		if !g.h.has(c.name) {
			continue
		}
		t := g.h.by[c.name]
		if err := limitError(c.set(t.dir(g.name), t.v2, l)); err != nil {
			return fmt.Errorf("limit %s of group %s: %w", v2Name(c.name), g.name, err)
		}
	}
	return nil
}

// limitError adds the category to what the kernel says.
func limitError(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: more is in use: %w", errdef.ErrConflict, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: %w", errdef.ErrNotFound, err)
	default:
		return err
	}
}

func (g *Group) setMemory(dir string, v2 bool, l Limits) error {
	if v2 {
		if err := g.write(dir, "memory.max", orNone(l.MemoryBytes, "max")); err != nil {
			return err
		}
		swap := "0"
		if l.MemoryBytes == 0 {
			swap = "max"
		}
		return g.writeIfThere(dir, "memory.swap.max", swap)
	}
	// The sum of memory and swap may never be bounded more tightly than memory.
	// So it goes first when it rises and last when it falls.
	const sum = "memory.memsw.limit_in_bytes"
	files := []string{"memory.limit_in_bytes", sum}
	data, err := readFile(filepath.Join(dir, sum))
	switch {
	case errors.Is(err, fs.ErrNotExist): // the kernel does not count swap: use none
		files = files[:1]
		if l.MemoryBytes > 0 {
			err = g.writeIfThere(dir, "memory.swappiness", "0")
		} else {
			err = nil
		}
	case err == nil:
		var have int64
		have, err = parseNumber(data)
		if l.MemoryBytes == 0 || l.MemoryBytes > have {
			files[0], files[1] = files[1], files[0]
		}
	}
	for _, file := range files {
		if err == nil {
			err = g.write(dir, file, orNone(l.MemoryBytes, "-1"))
		}
	}
	return err
}

func (g *Group) setCPU(dir string, v2 bool, l Limits) error {
	quota := int64(l.CPUMillis) * period / 1000
	if v2 {
		return g.write(dir, "cpu.max", orNone(quota, "max")+" "+strconv.Itoa(period))
	}
	if err := g.write(dir, "cpu.cfs_period_us", strconv.Itoa(period)); err != nil {
		return err
	}
	err := g.write(dir, "cpu.cfs_quota_us", orNone(quota, "-1"))
	if errors.Is(err, unix.EINVAL) {
		err = errdef.WithHint(err, "under cgroup v1 a group may not have more processor time than the group around it")
	}
	return err
}

func (g *Group) setPIDs(dir string, _ bool, l Limits) error {
	return g.write(dir, "pids.max", orNone(int64(l.PIDs), "max"))
}

func (g *Group) setIO(dir string, v2 bool, l Limits) error {
	if v2 {
		rate := orNone(l.IOBytes, "max")
		return g.write(dir, "io.max", fmt.Sprintf("%s rbps=%s wbps=%s", g.h.device, rate, rate))
	}
	for _, file := range []string{"blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"} {
		if err := g.write(dir, file, fmt.Sprintf("%s %d", g.h.device, l.IOBytes)); err != nil { // 0 is none
			return err
		}
	}
	return nil
}

func orNone(n int64, none string) string {
	if n == 0 {
		return none
	}
	return strconv.FormatInt(n, 10)
}

func (g *Group) write(dir, file, text string) error {
	return g.h.kernel.write(filepath.Join(dir, file), text)
}

// writeIfThere is write to a file that not every kernel has.
func (g *Group) writeIfThere(dir, file, text string) error {
	if err := g.write(dir, file, text); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
