package cgroup

import (
	"fmt"
	"math"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Usage is what a group takes, and has taken since it was made. What this host
// does not count is 0. The kernel may be seconds late with PrivateBytes and
// SharedBytes.
type Usage struct {
	MemoryBytes  int64         // all that is on its account now
	PrivateBytes int64         // of it, what processes have written and no file backs
	SharedBytes  int64         // of it, page cache: files, and memory of tmpfs and memfd
	PeakBytes    int64         // the most that MemoryBytes has been
	CPU          time.Duration // processor time
	Throttled    time.Duration // how long it was kept from running by CPUMillis
	PIDs         int           // processes and threads now
	OOMKills     int64         // processes that the kernel ended for want of memory
	// ReadBytes and WriteBytes are what went from and to the disk of Config.Disk,
	// or all disks without it.
	ReadBytes, WriteBytes int64
}

// Usage reads what the group takes. Its numbers are read one after another, so
// they need not be of one instant. It returns errdef.ErrNotFound when no part
// of the group exists.
func (g *Group) Usage() (Usage, error) {
	dirs, err := g.dirs()
	if err != nil {
		return Usage{}, err
	}
	if len(dirs) == 0 {
		return Usage{}, fmt.Errorf("%w: control group %s", errdef.ErrNotFound, g.name)
	}
	r := reading{g: g}
	u := Usage{PIDs: int(r.number(pids, "pids.current"))}
	r.memory(&u)
	r.cpu(&u)
	r.io(&u)
	if r.err != nil {
		return Usage{}, fmt.Errorf("read usage of group %s: %w", g.name, r.err)
	}
	return u, nil
}

// reading reads a group's files and remembers the first error. A file that is
// not there reads as empty, and that as 0.
type reading struct {
	g   *Group
	err error
}

// file reads a file of a controller.
func (r *reading) file(controller, name string) []byte {
	t := r.g.h.by[controller]
	if t == nil {
		return nil
	}
	return r.fileOf(t, name)
}

func (r *reading) fileOf(t *tree, name string) []byte {
	data, err := readFile(filepath.Join(t.dir(r.g.name), name))
	if err != nil && !gone(err) && r.err == nil {
		r.err = err
	}
	return data
}

func (r *reading) number(controller, name string) int64 {
	data := r.file(controller, name)
	if len(data) == 0 {
		return 0
	}
	return r.keep(parseNumber(data))
}

func (r *reading) field(data []byte, key string) int64 { return r.keep(parseField(data, key)) }

func (r *reading) keep(n int64, err error) int64 {
	if err != nil && r.err == nil {
		r.err = err
	}
	return n
}

// isV2 reports whether a controller is there, and of v2.
func (r *reading) isV2(controller string) bool {
	t := r.g.h.by[controller]
	return t != nil && t.v2
}

func (r *reading) memory(u *Usage) {
	stat := r.file(memory, "memory.stat")
	if r.isV2(memory) {
		u.MemoryBytes = r.number(memory, "memory.current")
		u.PeakBytes = r.number(memory, "memory.peak")
		u.PrivateBytes, u.SharedBytes = r.field(stat, "anon"), r.field(stat, "file")
		u.OOMKills = r.field(r.file(memory, "memory.events"), "oom_kill")
		return
	}
	u.MemoryBytes = r.number(memory, "memory.usage_in_bytes")
	u.PeakBytes = r.number(memory, "memory.max_usage_in_bytes")
	u.PrivateBytes, u.SharedBytes = r.field(stat, "total_rss"), r.field(stat, "total_cache")
	u.OOMKills = r.field(r.file(memory, "memory.oom_control"), "oom_kill")
}

func (r *reading) cpu(u *Usage) {
	stat := r.file(cpu, "cpu.stat")
	if r.isV2(cpu) {
		u.Throttled = duration(r.field(stat, "throttled_usec"), time.Microsecond)
	} else {
		u.Throttled = duration(r.field(stat, "throttled_time"), time.Nanosecond)
	}
	if r.g.h.by[cpuacct] != nil {
		u.CPU = duration(r.number(cpuacct, "cpuacct.usage"), time.Nanosecond)
		return
	}
	for _, t := range r.g.h.trees { // v2 counts it without the controller
		if t.v2 {
			u.CPU = duration(r.field(r.fileOf(t, "cpu.stat"), "usage_usec"), time.Microsecond)
		}
	}
}

// duration is n units, or the longest there is.
func duration(n int64, unit time.Duration) time.Duration {
	return time.Duration(min(n, math.MaxInt64/int64(unit))) * unit
}

func (r *reading) io(u *Usage) {
	const v1 = "blkio.throttle.io_service_bytes"
	var data []byte
	if r.isV2(blkio) {
		data = r.file(blkio, "io.stat")
	} else if data = r.file(blkio, v1+"_recursive"); len(data) == 0 { // the groups below included
		data = r.file(blkio, v1) // the kernel is older
	}
	read, written, err := parseIO(data, r.g.h.device)
	u.ReadBytes, u.WriteBytes = r.keep(read, err), written
}
