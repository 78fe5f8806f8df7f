package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"github.com/tinevm/tine/internal/cgroup"
	"github.com/tinevm/tine/internal/jail"
)

// prison measures the parts of the jail, with a program that does nothing: what
// is the program's own is in both sides.
type prison struct {
	*ward
	program string
	null    *os.File
	full    *jail.Jail // with launchers that wait
	empty   *jail.Jail // without
	last    int        // names groups
}

// spares is how many launchers wait in a full prison.
const spares = 2

// processFloor says what the floor of a process is.
const processFloor = "/bin/true by fork and exec, until it runs"

// cells measures the parts of the jail.
func (w *ward) cells(ctx context.Context) (err error) {
	p := &prison{ward: w}
	if p.program, err = exec.LookPath("true"); err != nil {
		return err
	}
	if p.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.null.Close()) }()
	for _, open := range []struct {
		to    **jail.Jail
		spare int
	}{{&p.full, spares}, {&p.empty, 0}} {
		cfg := w.opts.Isolation.Jail
		cfg.Program, cfg.Others, cfg.Dir, cfg.Spare = p.program, nil, filepath.Join(w.dirs.root, "jail"), open.spare
		cfg.Total = cgroup.Limits{}
		j, openErr := jail.Open(ctx, cfg)
		if openErr != nil {
			return openErr
		}
		defer func() { err = errors.Join(err, j.Close()) }()
		*open.to = j
	}
	rounds := 4 * w.opts.Rounds // they are quick
	for _, row := range []struct {
		name        string
		tine, floor measured
	}{
		{"cell: take one that waits", p.take(p.full, false), p.process},
		{"cell: take one, none waits", p.take(p.empty, false), p.process},
		{"cell: start the program", p.start, p.process},
	} {
		got, turnErr := w.byTurns(ctx, row.name, rounds, row.tine, row.floor)
		if turnErr != nil {
			return turnErr
		}
		w.add(IsolationRow{Row: Row{Step: row.name, Unit: Milliseconds}, FloorIs: processFloor}, got[0], got[1])
	}
	if err = w.try(ctx, "control group", func(ctx context.Context) error { return p.groups(ctx, rounds) }); err != nil {
		return err
	}
	return w.try(ctx, "network", func(ctx context.Context) error { return p.networks(ctx, rounds) })
}

// take takes a cell and sends it away.
func (p *prison) take(j *jail.Jail, link bool) measured {
	return func(ctx context.Context) (float64, error) {
		if err := rest(ctx); err != nil {
			return 0, err
		}
		begin := time.Now()
		c, err := j.Take(ctx, link)
		if err != nil {
			return 0, err
		}
		took := ms(time.Since(begin))
		return took, c.Close()
	}
}

// start starts the program in a cell, until it runs: from then on what takes time
// is the program's.
func (p *prison) start(ctx context.Context) (float64, error) {
	if err := rest(ctx); err != nil {
		return 0, err
	}
	c, err := p.full.Take(ctx, false)
	if err != nil {
		return 0, err
	}
	job := jail.Job{Output: p.null, Limits: p.limits(), DieWithParent: true}
	begin := time.Now()
	started, err := c.Start(ctx, job)
	if err != nil {
		return 0, err
	}
	took := ms(time.Since(begin))
	err = started.Started()
	_ = started.Kill() // it may have ended
	_ = started.Wait() // and says that it was killed
	_, releaseErr := jail.Release(ctx, started.Group)
	return took, errors.Join(err, releaseErr)
}

// process starts the program without a jail.
func (p *prison) process(ctx context.Context) (float64, error) {
	if err := rest(ctx); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, p.program)
	begin := time.Now()
	if err := cmd.Start(); err != nil { // it returns when the child has executed it
		return 0, err
	}
	return ms(time.Since(begin)), cmd.Wait()
}

func (p *prison) name() string {
	p.last++
	return "bench-" + strconv.Itoa(p.last)
}

// limits are those of a machine of 256 MiB, as far as this host can enforce them.
func (p *prison) limits() (l cgroup.Limits) {
	groups := p.opts.Isolation.Jail.Groups
	if groups == nil {
		return l
	}
	can := groups.Support()
	if can.Memory {
		l.MemoryBytes = 448 << 20
	}
	if can.CPU {
		l.CPUMillis = 1500
	}
	if can.PIDs {
		l.PIDs = 128
	}
	return l
}

// groups makes and removes control groups, beside the directories that they are.
func (p *prison) groups(ctx context.Context, rounds int) error {
	groups := p.opts.Isolation.Jail.Groups
	if groups == nil {
		return p.opts.Isolation.Jail.NoGroups
	}
	var parents []string
	tine := func(ctx context.Context) (float64, error) {
		begin := time.Now()
		g, err := groups.Create(p.name(), p.limits())
		if err != nil {
			return 0, err
		}
		made := time.Since(begin)
		parents, err = parentsOf(g)
		begin = time.Now()
		err = errors.Join(err, g.Remove(ctx))
		return ms(made + time.Since(begin)), err
	}
	floor := func(context.Context) (float64, error) {
		begin := time.Now()
		for _, dir := range parents {
			if err := os.Mkdir(filepath.Join(dir, "bench-floor"), 0o750); err != nil {
				return 0, err
			}
		}
		var errs []error
		for _, dir := range parents {
			errs = append(errs, os.Remove(filepath.Join(dir, "bench-floor")))
		}
		return ms(time.Since(begin)), errors.Join(errs...)
	}
	const name = "control group: make, limit and remove"
	got, err := p.byTurns(ctx, name, rounds, tine, floor)
	if err != nil {
		return err
	}
	p.add(IsolationRow{
		Row: Row{Step: name, Unit: Milliseconds}, FloorIs: "mkdir and rmdir of its directories, without limits",
		Note: fmt.Sprintf("a group is %d directories on this host", len(parents)),
	}, got[0], got[1])
	return nil
}

// parentsOf are the directories that those of the group are in.
func parentsOf(g *cgroup.Group) ([]string, error) {
	entrances, err := g.Entrances()
	var parents []string
	for _, f := range entrances {
		parents = append(parents, filepath.Dir(filepath.Dir(f.Name())))
		err = errors.Join(err, f.Close())
	}
	return parents, err
}

// networks measures what it takes to have a network.
func (p *prison) networks(ctx context.Context, rounds int) error {
	const name = "cell with a network"
	sides := []measured{p.take(p.empty, true), p.take(p.empty, false)}
	failure := ""
	if _, err := namespace(ctx); err == nil {
		sides = append(sides, namespace)
	} else {
		failure = "no floor: " + err.Error()
	}
	got, err := p.byTurns(ctx, name, rounds, sides...)
	if err != nil {
		return err
	}
	got = append(got, nil) // where there is no floor
	p.add(IsolationRow{Row: Row{Step: name, Unit: Milliseconds}, FloorIs: "a cell without one, none waits"}, got[0], got[1])
	p.add(IsolationRow{
		Row: Row{Step: "a network adds to: cell", Unit: Milliseconds}, FloorIs: "unshare(CLONE_NEWNET)",
		Note:  "differences within a turn; both cells have a namespace, so the floor is no part of what is added",
		Error: failure,
	}, differences(got[0], got[1]), got[2])
	return nil
}

// namespace makes a network namespace, and nothing else.
func namespace(ctx context.Context) (float64, error) {
	if err := rest(ctx); err != nil {
		return 0, err
	}
	took, err := inNamespace(func() error { return nil })
	return ms(took), err
}
