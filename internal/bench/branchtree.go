package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
)

const (
	// inARow is how many branches are taken one after the other of one guest.
	inARow = 10
	// growthLimit is how many times the first of them the last may be.
	growthLimit = 1.10
	// depthLimit is how many times a fork of a whole image one of a flattened
	// tree may be, down to deepLimit.
	depthLimit = 1.10
	deepLimit  = 8
	// layerMiB is what a guest writes between two branches of a deep tree.
	layerMiB = 4
)

// consecutive measures the first and the last of branches in a row of one
// guest, which writes to all its memory again before each.
func (g *grove) consecutive(ctx context.Context, p *plot, few int) error {
	for _, mode := range []sandbox.Mode{sandbox.Live, sandbox.Diff} {
		var pauses, totals [2][]float64
		for i := range g.opts.Rounds {
			progress.ReportAmount(ctx, step, fmt.Sprintf("measuring branches in a row, mode %s", mode), int64(i+1), int64(g.opts.Rounds))
			pause, total, err := p.inARow(ctx, mode, few)
			if err != nil {
				return fmt.Errorf("branches in a row: %w", err)
			}
			for which, at := range []int{0, inARow - 1} {
				pauses[which] = append(pauses[which], pause[at])
				totals[which] = append(totals[which], total[at])
			}
		}
		row := BranchRow{MemoryMiB: p.memory, Case: fmt.Sprintf("%d MiB again, branch %d in a row", few, inARow), Mode: string(mode)}
		row.Step = stepPause
		g.add(row, Milliseconds, pauses[1], pauses[0], atMost(growthLimit, "the first"))
		row.Step = stepTotal
		g.add(row, Milliseconds, totals[1], totals[0], atMost(growthLimit, "the first"))
	}
	return nil
}

// inARow takes branches of one guest and says what each took.
func (p *plot) inARow(ctx context.Context, mode sandbox.Mode, few int) (pause, total []float64, err error) {
	ctx, cancel := bound(ctx, groupTime)
	defer cancel()
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Close()) }()
	f, err := p.fork(ctx, p.ref)
	if err != nil {
		return nil, nil, err
	}
	u.Add(func() error { return f.end(ctx) })
	err = f.with(ctx, func(ctx context.Context, c *guest.Client) error {
		return withWorker(ctx, c, few, func(w *worker) error {
			pause, total, err = p.rowOf(ctx, f, w, mode, &u)
			return err
		})
	})
	return pause, total, err
}

// rowOf takes branches of a guest whose worker writes everything again before
// each. u takes them back.
func (p *plot) rowOf(ctx context.Context, f *forked, w *worker, mode sandbox.Mode, u *undo.Stack) (pause, total []float64, err error) {
	for range inARow {
		if _, err = w.tell(ctx, workAgain); err != nil {
			return nil, nil, err
		}
		begin := time.Now()
		snap, branchErr := p.branch(ctx, f, mode)
		if branchErr != nil {
			return nil, nil, branchErr
		}
		pause, total = append(pause, snap.PauseMS), append(total, ms(time.Since(begin)))
		u.Add(func() error { return p.remove(ctx, snap.Tag) })
	}
	return pause, total, nil
}

// rollbacks measures a rollback to a node beside a fork of it, which is most of
// what it does.
func (g *grove) rollbacks(ctx context.Context, p *plot, few int) (err error) {
	f, err := p.fork(ctx, p.ref)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	if err = scribble(ctx, f, "few", few); err != nil {
		return err
	}
	node, err := p.branch(ctx, f, sandbox.Diff)
	if err != nil {
		return err
	}
	// The sandbox holds what it was rolled back to, so it goes before.
	defer func() { err = errors.Join(err, f.end(ctx), p.remove(ctx, node.Tag)) }()
	if err = p.d.Snapshots.Flatten(ctx, node); err != nil {
		return err
	}
	var tine, floor []float64
	for i := range g.opts.Rounds {
		progress.ReportAmount(ctx, step, "measuring rollbacks", int64(i+1), int64(g.opts.Rounds))
		begin := time.Now()
		if _, err = p.d.Sandboxes.Rollback(ctx, f.id, node.Tag); err == nil {
			err = f.with(ctx, askPing)
		}
		tine = append(tine, ms(time.Since(begin)))
		if err != nil {
			return fmt.Errorf("rollback: %w", err)
		}
		took, forkErr := p.firstPing(ctx, node.Tag)
		if forkErr != nil {
			return forkErr
		}
		floor = append(floor, took)
	}
	row := BranchRow{MemoryMiB: p.memory, Case: fmt.Sprintf("%d MiB, flattened", few), Row: Row{Step: stepRollback, Point: Ping}}
	g.add(row, Milliseconds, tine, floor)
	return nil
}

// firstPing is how long a fork takes to its first answer.
func (p *plot) firstPing(ctx context.Context, ref string) (took float64, err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	begin := time.Now()
	f, err := p.fork(ctx, ref)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	err = f.with(ctx, askPing)
	return ms(time.Since(begin)), err
}

// suspends measures a suspend beside having its bytes on disk, and a resume
// beside a fork of the template.
func (g *grove) suspends(ctx context.Context, p *plot, few int) error {
	var down, downFloor, up, upFloor []float64
	for i := range g.opts.Rounds {
		progress.ReportAmount(ctx, step, "measuring suspend and resume", int64(i+1), int64(g.opts.Rounds))
		s, err := p.suspend(ctx, few)
		if err != nil {
			return fmt.Errorf("suspend and resume: %w", err)
		}
		down, downFloor = append(down, s.down), append(downFloor, s.downFloor)
		up, upFloor = append(up, s.up), append(upFloor, s.upFloor)
	}
	row := BranchRow{MemoryMiB: p.memory, Case: fmt.Sprintf("%d MiB", few), Row: Row{Step: stepSuspend}}
	g.add(row, Milliseconds, down, downFloor)
	row.Row = Row{Step: stepResume, Point: Ping}
	g.add(row, Milliseconds, up, upFloor)
	return nil
}

// suspended is one suspend and the resume from it, in ms.
type suspended struct{ down, downFloor, up, upFloor float64 }

func (p *plot) suspend(ctx context.Context, few int) (s suspended, err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	f, err := p.fork(ctx, p.ref)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	if err = scribble(ctx, f, "few", few); err != nil {
		return s, err
	}
	begin := time.Now()
	if _, err = p.d.Sandboxes.Suspend(ctx, f.id); err != nil {
		return s, err
	}
	s.down = ms(time.Since(begin))
	held, err := p.d.Snapshots.Held(f.id)
	if err != nil {
		return s, err
	}
	begin = time.Now()
	if err = f.with(ctx, askPing); err != nil { // it resumes by itself
		return s, err
	}
	s.up = ms(time.Since(begin))
	if s.upFloor, err = p.firstPing(ctx, p.ref); err != nil {
		return s, err
	}
	s.downFloor, err = p.saveAndWrite(ctx, held.DiffPhysicalBytes)
	return s, err
}

// saveAndWrite is the floor of what need not be quick for the guest's sake.
func (p *plot) saveAndWrite(ctx context.Context, n int64) (float64, error) {
	save, err := p.floor.save(ctx)
	if err != nil {
		return 0, err
	}
	write, err := p.floor.write(n)
	return ms(save + write), err
}

// depths measures forks of trees of several depths, as they are and flattened.
func (g *grove) depths(ctx context.Context, p *plot) (err error) {
	var u undo.Stack
	defer func() { err = errors.Join(err, u.Close()) }()
	nodes, err := p.climb(ctx, deepest(g.opts.Depths), &u)
	if err != nil {
		return fmt.Errorf("make a deep tree: %w", err)
	}
	depths := slices.Sorted(slices.Values(g.opts.Depths))
	layered, flat := make([][]float64, len(depths)), make([][]float64, len(depths))
	for i := range g.opts.Rounds {
		progress.ReportAmount(ctx, step, "measuring forks of deep trees", int64(i+1), int64(g.opts.Rounds))
		for at, depth := range depths {
			l, f, forkErr := p.bothWays(ctx, nodes[depth])
			if forkErr != nil {
				return fmt.Errorf("fork at depth %d: %w", depth, forkErr)
			}
			layered[at], flat[at] = append(layered[at], l), append(flat[at], f)
		}
	}
	g.addDepths(p, depths, layered, flat)
	return nil
}

// addDepths adds the rows of forks. What is not layered is the floor of the
// rest.
func (g *grove) addDepths(p *plot, depths []int, layered, flat [][]float64) {
	var whole []float64
	row := BranchRow{MemoryMiB: p.memory, Row: Row{Step: string(coldFork), Point: Ping}}
	for at, depth := range depths {
		row.Case = "depth " + strconv.Itoa(depth)
		if depth == 0 {
			whole = layered[at]
			g.add(row, Milliseconds, whole, nil)
			continue
		}
		var goals []goal
		if len(whole) > 0 && depth <= deepLimit {
			goals = []goal{atMost(depthLimit, "depth 0")}
		}
		row.Case = fmt.Sprintf("depth %d, flattened", depth)
		g.add(row, Milliseconds, flat[at], whole, goals...)
		row.Case = fmt.Sprintf("depth %d, layered", depth)
		g.add(row, Milliseconds, layered[at], whole)
	}
}

// climb makes nodes down to a depth: node i is i branches deep. u takes them
// back.
func (p *plot) climb(ctx context.Context, depth int, u *undo.Stack) (_ []snapshot.Snapshot, err error) {
	nodes := []snapshot.Snapshot{p.snap}
	f, err := p.fork(ctx, p.ref)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	for i := range depth {
		progress.ReportAmount(ctx, step, "making a deep tree", int64(i+1), int64(depth))
		if err = scribble(ctx, f, strconv.Itoa(i), layerMiB); err != nil {
			return nil, err
		}
		snap, branchErr := p.branch(ctx, f, sandbox.Diff)
		if branchErr != nil {
			return nil, branchErr
		}
		u.Add(func() error { return p.remove(ctx, snap.Tag) })
		if snap.Depth != i+1 {
			return nil, fmt.Errorf("%w: branch %d is %d deep", errdef.ErrConflict, i+1, snap.Depth)
		}
		nodes = append(nodes, snap)
	}
	return nodes, nil
}

// bothWays forks a node as it is and flattened. The manager may have begun to
// flatten it by itself; that is waited for.
func (p *plot) bothWays(ctx context.Context, node snapshot.Snapshot) (layered, flat float64, err error) {
	if layered, err = p.firstPing(ctx, node.Tag); err != nil || node.Depth == 0 {
		return layered, 0, err
	}
	if err = p.d.Snapshots.Flatten(ctx, node); err != nil {
		return 0, 0, err
	}
	if flat, err = p.firstPing(ctx, node.Tag); err != nil {
		return 0, 0, err
	}
	return layered, flat, p.unflatten(ctx, node)
}

// unflatten drops the flat image of a node as soon as nobody uses it.
func (p *plot) unflatten(ctx context.Context, node snapshot.Snapshot) error {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	tick := time.NewTicker(poolPoll)
	defer tick.Stop()
	for {
		err := p.d.Snapshots.DropFlat(ctx, node)
		if !errors.Is(err, errdef.ErrConflict) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		}
	}
}
