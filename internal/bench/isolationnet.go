package bench

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

//go:embed netload.py
var netProgram string

// How much goes over a network.
const (
	streamMiB = 64
	trips     = 1000
	connects  = 100
)

// worldNote says where what guests reach through Tine really is.
const worldNote = "the server is in the bench's own process: 203.0.113.10, which the rules allow, is dialed as a listener on loopback"

// wires measures networks: forks that have one, and forks that have none.
type wires struct {
	*ward
	card  *subject // the same with a network card
	plain *subject // the same without
	m     *sandbox.Manager
	world *world
}

// network measures networks.
func (w *ward) network(ctx context.Context) (err error) {
	n := &wires{ward: w}
	for _, s := range []struct {
		to   **subject
		card bool
	}{{&n.card, true}, {&n.plain, false}} {
		sub, remove, madeErr := w.shaped(ctx, s.card)
		if madeErr != nil {
			return madeErr
		}
		defer func() { err = errors.Join(err, remove()) }()
		*s.to = sub
	}
	if n.world, err = newWorld(onLoopback(ctx)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.world.close()) }()
	m, end, err := w.manager(ctx, w.sub.d.Sandboxes.Engine, sandbox.NetConfig{Dial: n.world.dial})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	n.m = m
	if err = w.try(ctx, "forks with a network", n.crowds); err != nil {
		return err
	}
	return w.try(ctx, "relay", n.relay)
}

// shaped is the subject with or without a network card: itself, or a template
// that is made of its image, and that the function removes.
func (w *ward) shaped(ctx context.Context, card bool) (*subject, func() error, error) {
	nothing := func() error { return nil }
	if w.sub.snap.Manifest.Machine.Net == card {
		return w.sub, nothing, nil
	}
	progress.Report(ctx, step, "making a template, network card: "+strconv.FormatBool(card))
	sub := *w.sub
	p := &plot{subject: &sub, dirs: w.dirs}
	p.ref = newTag()
	shape := w.sub.snap.Manifest.Machine
	shape.Net = card
	var err error
	p.snap, err = w.sub.d.Sandboxes.CreateSnapshot(ctx, sandbox.SnapshotRequest{
		Tag: p.ref, Image: w.sub.img.Digest, Machine: vmm.Machine{MemoryMiB: shape.MemoryMiB, VCPUs: shape.VCPUs, DiskMiB: shape.DiskMiB, Net: card},
		Imports: []string{"socket"},
	})
	if err != nil {
		return nil, nil, err
	}
	return p.subject, func() error { return p.remove(ctx, p.ref) }, nil
}

// reach is what a guest may reach: the bench's servers.
func reach() *sandbox.Net {
	rule := egress.Rule{CIDR: there().String()}
	for _, port := range serverPorts() {
		rule.Ports = append(rule.Ports, strconv.Itoa(port))
	}
	return &sandbox.Net{Rules: egress.Rules{Allow: []egress.Rule{rule}}}
}

// Greeted is where a measurement ends when a guest has heard from a server.
const Greeted = "server"

// askServer has the warm interpreter fetch the greeting. It passes by
// create_connection, which would load what international names need, and be
// measured for that.
func askServer(ctx context.Context, c *guest.Client) error {
	code := fmt.Sprintf("[s := __import__('socket').socket(), s.settimeout(60), s.connect(('%s', %d)), s.recv(%d).decode()][-1]", there(), portGreet, len(welcome))
	r, err := c.Eval(ctx, guest.EvalRequest{Language: python, Code: code})
	switch {
	case err != nil:
		return err
	case r.Error != nil:
		return r.Error
	case !strings.Contains(r.Value, welcome):
		return fmt.Errorf("%w: the server said %q", errdef.ErrUnavailable, r.Value)
	}
	return nil
}

// crowd is what became of sandboxes that were forked at once.
type crowd struct {
	mu       sync.Mutex
	machines []*forked
	stages   []stage // of all: see crowdStages
}

// stage is how far sandboxes have come.
type stage struct {
	times []float64 // of those that have come so far, from when all were asked to
	err   error     // the first failure
}

func (c *crowd) note(at int, begin time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := &c.stages[at]
	if err == nil {
		s.times = append(s.times, ms(time.Since(begin)))
	} else if s.err == nil {
		s.err = err
	}
}

func (c *crowd) add(f *forked) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.machines = append(c.machines, f)
}

func (c *crowd) end(ctx context.Context) error {
	errs := make([]error, len(c.machines))
	var wg sync.WaitGroup
	for i, f := range c.machines {
		wg.Go(func() { errs[i] = f.end(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// gather forks so many at once and has each execute something. When all have, or
// have failed, it asks all of those that have the last point, at once. Failures
// are counted; only the end of ctx is an error.
func gather(ctx context.Context, m *sandbox.Manager, n int, req sandbox.ForkRequest, last point) (_ *crowd, err error) {
	ctx, cancel := bound(ctx, groupTime)
	defer cancel()
	c := &crowd{stages: make([]stage, 3)}
	defer func() { err = errors.Join(err, c.end(ctx)) }()
	var able []*forked
	begin := time.Now()
	req.N, req.NoPool = n, true
	req.Each = func(r sandbox.ForkResult) {
		c.note(0, begin, r.Err)
		if r.Err != nil {
			return
		}
		f := &forked{m, r.Sandbox.ID}
		c.add(f)
		failed := f.with(ctx, askExec)
		c.note(1, begin, failed)
		if failed == nil {
			c.mu.Lock()
			able = append(able, f)
			c.mu.Unlock()
		}
	}
	if _, err = m.Fork(ctx, req); err != nil {
		return c, err
	}
	begin = time.Now()
	var wg sync.WaitGroup
	for _, f := range able {
		wg.Go(func() { c.note(2, begin, f.with(ctx, last.ask)) })
	}
	wg.Wait()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return c, err
}

// crowds forks many with a network at once, and beside them as many without.
func (n *wires) crowds(ctx context.Context) error {
	count := n.opts.crowdSize()
	if count == 0 {
		return nil
	}
	last := []point{{Greeted, askServer}, {Eval, askEval}}
	requests := []sandbox.ForkRequest{{Snapshot: n.card.snap.Digest, Net: reach()}, {Snapshot: n.plain.snap.Digest}}
	sides := make([][]*crowd, 2)
	rounds := (n.opts.Rounds + 2) / 3
	for i := range rounds {
		for side := range sides {
			progress.ReportAmount(ctx, step, fmt.Sprintf("measuring %d networks at once", count), int64(i+1), int64(rounds))
			c, err := gather(ctx, n.m, count, requests[side], last[side])
			if err != nil {
				return err
			}
			sides[side] = append(sides[side], c)
		}
	}
	for at, what := range crowdStages() {
		n.addStage(count, at, what, sides)
	}
	return nil
}

// stageReached is the last of crowdStages, which are the stages of a crowd by
// name.
const stageReached = 2

func crowdStages() [3]string { return [...]string{"came up", "first exec", "reached a server"} }

// addStage adds how many have come to a stage, and when the last of them had.
func (n *wires) addStage(count, at int, what string, sides [][]*crowd) {
	var counts, walls [2][]float64
	var failure string
	for side, rounds := range sides {
		for _, c := range rounds {
			s := c.stages[at]
			counts[side] = append(counts[side], float64(len(s.times)))
			if len(s.times) > 0 {
				walls[side] = append(walls[side], slices.Max(s.times))
			}
			if s.err != nil && failure == "" {
				failure = s.err.Error()
			}
		}
	}
	head := IsolationRow{
		Row:     Row{Step: fmt.Sprintf("%d networks at once: %s", count, what), Unit: Sandboxes},
		FloorIs: "forks without a network card", Error: failure,
	}
	if at == stageReached {
		head.FloorIs, head.Note = "eval of 6 * 7 in forks without a network card", worldNote
	}
	n.add(head, counts[0], counts[1], all(count))
	head.Unit, head.Point, head.Note, head.Error = Milliseconds, "the last", "", ""
	n.add(head, walls[0], walls[1])
}

// all is for a count that should be complete in every round.
func all(count int) goal {
	return func(r *Row) Target {
		return Target{Goal: fmt.Sprintf("%d of %d", count, count), Value: r.Tine.Min, Met: int(r.Tine.Min) == count}
	}
}

// relay measures what goes from a guest to a server through Tine, and beside it
// from a guest to a server at the other end of a tap.
func (n *wires) relay(ctx context.Context) (err error) {
	f, err := forkOne(ctx, n.m, sandbox.ForkRequest{Snapshot: n.card.snap.Digest, NoPool: true, Net: reach()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	tine := guestEnd{f, there().String()}
	floor, remove, floorErr := n.bareEnd(ctx)
	if floorErr == nil {
		defer func() { err = errors.Join(err, remove()) }()
	} else if ctx.Err() != nil {
		return floorErr
	}
	for _, task := range []netTask{
		{fmt.Sprintf("stream of %d MiB from the guest", streamMiB), MiBPerSecond, "stream", portSink, streamMiB},
		{"round trip of a byte", Milliseconds, "trips", portEcho, trips},
		{"connection, and a byte there and back", Milliseconds, "connects", portEcho, connects},
	} {
		err = n.try(ctx, task.name, func(ctx context.Context) error { return n.carry(ctx, task, [2]guestEnd{tine, floor}, floorErr) })
		if err != nil {
			return err
		}
	}
	return nil
}

// carry adds the row of a task that both guests do; there may be no second one,
// for a reason.
func (n *wires) carry(ctx context.Context, task netTask, ends [2]guestEnd, noFloor error) error {
	var samples [2][]float64
	for i := range n.opts.Rounds {
		progress.ReportAmount(ctx, step, "measuring a "+task.name, int64(i+1), int64(n.opts.Rounds))
		for side, e := range ends {
			if e.m == nil {
				continue
			}
			got, err := e.do(ctx, task)
			if err != nil {
				return fmt.Errorf("to %s: %w", e.host, err)
			}
			samples[side] = append(samples[side], got...)
		}
	}
	row := IsolationRow{Row: Row{Step: task.name, Unit: task.unit}, FloorIs: "bare QEMU and a tap, server at the tap's address", Note: worldNote}
	if noFloor != nil {
		row.FloorIs, row.Error = "", "no floor: "+noFloor.Error()
	}
	n.add(row, samples[0], samples[1])
	return nil
}

// netTask is what a guest does to a network; see netload.py.
type netTask struct {
	name, unit, what string
	port, count      int
}

// guestEnd is a guest, and where it finds the servers.
type guestEnd struct {
	m    machine // nil: there is no such guest
	host string
}

// do has the guest do it and returns what it has measured.
func (e guestEnd) do(ctx context.Context, t netTask) (samples []float64, err error) {
	ctx, cancel := bound(ctx, sampleTime)
	defer cancel()
	err = e.m.with(ctx, func(ctx context.Context, c *guest.Client) error {
		const enough = 1 << 20
		argv := []string{"python3", "-c", netProgram, t.what, e.host, strconv.Itoa(t.port), strconv.Itoa(t.count)}
		r, runErr := c.Run(ctx, guest.ExecSpec{Argv: argv}, nil, enough)
		if runErr == nil && r.Exit.Code != 0 {
			runErr = fmt.Errorf("%w: status %d: %s", errdef.ErrUnavailable, r.Exit.Code, lastLine(r.Stderr))
		}
		if runErr != nil {
			return runErr
		}
		samples, runErr = parseSamples(string(r.Stdout))
		return runErr
	})
	return samples, err
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}

// parseSamples reads one number a line.
func parseSamples(text string) ([]float64, error) {
	var samples []float64
	for field := range strings.FieldsSeq(text) {
		n, err := strconv.ParseFloat(field, 64)
		if err != nil || math.IsNaN(n) || math.IsInf(n, 0) || n <= 0 {
			return nil, fmt.Errorf("%w: the guest has measured %q", errdef.ErrUnavailable, field)
		}
		samples = append(samples, n)
	}
	if len(samples) == 0 {
		return nil, fmt.Errorf("%w: the guest has measured nothing", errdef.ErrUnavailable)
	}
	return samples, nil
}

// bareEnd starts a QEMU by hand, with its network card at a bare tap. The
// function that it returns ends both.
func (n *wires) bareEnd(ctx context.Context) (_ guestEnd, remove func() error, err error) {
	if engine := n.m.Engine.Name(); !strings.HasPrefix(engine, "qemu-") {
		return guestEnd{}, nil, fmt.Errorf("%w: there is no harness for %s", errdef.ErrUnsupported, engine)
	}
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	tap, err := newBareTap()
	if err != nil {
		return guestEnd{}, nil, err
	}
	u.Add(tap.close)
	l, err := learnFork(ctx, &tine{subject: n.card, dirs: n.dirs})
	if err == nil && (l.tap == 0 || !l.waits()) {
		err = fmt.Errorf("%w: a fork without a tap, or that waits for nothing", errLine)
	}
	if err != nil {
		return guestEnd{}, nil, err
	}
	b := &bare{subject: n.card, monitor: &bareQEMU{dirs: n.dirs, device: n.card.snap.DevicePath(), lines: lines{fork: l}, tap: tap.tap}}
	p, err := b.raised(ctx, b.restore)
	if err != nil {
		return guestEnd{}, nil, fmt.Errorf("bare QEMU: %w", err)
	}
	u.Release()
	return guestEnd{p, vmm.GuestNet().Gateway.String()}, func() error { return errors.Join(p.end(ctx), tap.close()) }, nil
}
