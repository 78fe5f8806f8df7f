package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// memoryDir is where files are in memory.
const memoryDir = "/dev/shm"

// way is a way to have Firecracker write the state of a machine's devices. It has
// no request for that alone: with each it writes some memory, or tries to.
type way struct {
	name    string
	kind    api.SnapshotType
	tracked bool   // the machine was loaded to have its dirty pages tracked
	where   string // of the memory: a directory, or "" for nowhere
}

// wayList are the ways; the first is the engine's.
func wayList(dir, inMemory string) []way {
	return []way{
		{"Full, memory nowhere", api.Full, false, ""},
		{"Diff, pages not tracked", api.Diff, false, dir},
		{"Diff, pages tracked", api.Diff, true, dir},
		{"Full, memory in " + memoryDir, api.Full, false, inMemory},
	}
}

// wayOf is what was measured of a way.
type wayOf struct {
	pauses  []float64 // ms
	memory  []float64 // MiB written
	warning string    // why it cannot be had here
}

// ways measures the ways beside each other: how long a machine stands still whose
// guest has written a little since the last time. There is a choice with
// Firecracker only.
func (g *grove) ways(ctx context.Context, p *plot, few int) (err error) {
	if p.hand == nil {
		return nil
	}
	dir, err := p.dirs.make()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	inMemory, err := os.MkdirTemp(memoryDir, "tine-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(inMemory)) }()
	machines := map[bool]*process{} // by whether pages are tracked
	defer func() {
		for _, m := range machines {
			err = errors.Join(err, m.end(ctx))
		}
	}()
	for _, tracked := range []bool{false, true} {
		m, loadErr := p.hand.load(ctx, tracked)
		if loadErr == nil {
			loadErr = m.meet(ctx)
		}
		if loadErr != nil {
			return fmt.Errorf("bare Firecracker: %w", loadErr)
		}
		machines[tracked] = m
	}
	list := wayList(dir, inMemory)
	got := make([]wayOf, len(list))
	for i := range g.opts.Rounds {
		progress.ReportAmount(ctx, step, "measuring ways to save device state", int64(i+1), int64(g.opts.Rounds))
		for at, w := range list {
			if err = w.measure(ctx, machines[w.tracked], p.memory, few, &got[at]); err != nil {
				return fmt.Errorf("save device state, %s: %w", w.name, err)
			}
		}
	}
	g.addWays(p.memory, few, list, got)
	return nil
}

// measure saves a machine once. What this host or this Firecracker does not have
// is no error.
func (w way) measure(ctx context.Context, p *process, memory, few int, got *wayOf) error {
	if got.warning != "" {
		return nil
	}
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	took, written, err := w.take(ctx, p, memory, few)
	switch {
	case errors.Is(err, errdef.ErrUnsupported), errors.Is(err, errdef.ErrExhausted):
		got.warning = w.name + ": " + err.Error()
		return nil
	case err != nil:
		return err
	}
	got.pauses, got.memory = append(got.pauses, ms(took)), append(got.memory, mib(written))
	return nil
}

// take has the guest write, and then stand still until it is saved.
func (w way) take(ctx context.Context, p *process, memory, few int) (took time.Duration, written int64, err error) {
	g := p.grip.(*firecrackerGrip)
	if w.kind == api.Diff && !w.tracked && !g.client.Version().Has(api.UntrackedDiff) {
		return 0, 0, fmt.Errorf("%w: Firecracker %v does not have %v", errdef.ErrUnsupported, g.client.Version(), api.UntrackedDiff)
	}
	if err = w.fits(memory); err != nil {
		return 0, 0, err
	}
	if err = scribbleBy(ctx, p.client, "few", few); err != nil {
		return 0, 0, err
	}
	file := filepath.Join(w.where, "memory")
	begin := time.Now()
	if err = g.client.Pause(ctx); err != nil {
		return 0, 0, err
	}
	if w.where == "" {
		err = g.saveDevice(ctx)
	} else {
		err = g.save(ctx, api.Snapshot{Type: w.kind, Mem: file})
	}
	if err == nil {
		err = g.client.Resume(ctx)
	}
	took = time.Since(begin)
	if err == nil {
		err = g.reconnect(ctx)
	}
	if w.where == "" || err != nil {
		return took, 0, errors.Join(err, g.forget())
	}
	var info unix.Stat_t
	err = os.NewSyscallError("stat", unix.Stat(file, &info))
	return took, info.Blocks * 512, errors.Join(err, os.Remove(file), g.forget())
}

// fits is errdef.ErrExhausted where there is no room for the whole memory.
func (w way) fits(memory int) error {
	if w.where == "" {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(w.where, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: w.where, Err: err}
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < int64(memory)<<20 {
		return fmt.Errorf("%w: %s has %d MiB left", errdef.ErrExhausted, w.where, free>>20)
	}
	return nil
}

// addWays adds the rows: the engine's way is the floor of the others.
func (g *grove) addWays(memory, few int, list []way, got []wayOf) {
	for at, w := range list {
		row := BranchRow{MemoryMiB: memory, Case: strconv.Itoa(few) + " MiB again, by hand: " + w.name, Warning: got[at].warning, Row: Row{Step: stepPause}}
		var floor []float64
		if at > 0 {
			floor = got[0].pauses
		}
		g.add(row, Milliseconds, got[at].pauses, floor)
		if w.where == "" {
			continue
		}
		row.Step = stepMemory
		g.add(row, MiB, got[at].memory, nil)
	}
}
