package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/undo"
	"github.com/tinevm/tine/internal/vmm"
)

// plot is where trees are grown: a template with so much memory, and all that
// is made of it. All of it goes when the plot is closed.
type plot struct {
	*subject // of the template
	dirs     *dirs
	memory   int              // MiB
	hand     *bareFirecracker // nil: machines are saved by the engine
	floor    *ideal
	u        undo.Stack
}

// newPlot makes a template of the subject's image.
func newPlot(ctx context.Context, from *subject, d *dirs, memory int) (_ *plot, err error) {
	progress.Report(ctx, step, fmt.Sprintf("making a template of %d MiB", memory))
	sub := *from
	p := &plot{subject: &sub, dirs: d, memory: memory}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	p.ref = newTag()
	p.snap, err = p.d.Sandboxes.CreateSnapshot(ctx, sandbox.SnapshotRequest{
		Tag: p.ref, Image: from.img.Digest,
		Machine: vmm.Machine{MemoryMiB: memory, VCPUs: from.snap.Manifest.Machine.VCPUs},
	})
	if err != nil {
		return nil, err
	}
	p.u.Add(func() error { return p.remove(ctx, p.ref) })
	if p.hand, err = newHand(ctx, p); err != nil {
		return nil, err
	}
	if p.floor, err = newIdeal(ctx, p); err == nil {
		p.u.Add(func() error { return p.floor.close(ctx) })
	}
	return p, err
}

func (p *plot) close() error { return p.u.Close() }

// newTag is a tag for what goes again.
func newTag() string { return "bench-" + rand.Text() }

// remove removes a snapshot, also when ctx has ended. It is idempotent.
func (p *plot) remove(ctx context.Context, tag string) error {
	ctx, cancel := late(ctx)
	defer cancel()
	if err := p.d.Snapshots.Remove(ctx, tag); err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	return nil
}

// fork makes one sandbox of a snapshot.
func (p *plot) fork(ctx context.Context, ref string) (*forked, error) {
	results, err := p.d.Sandboxes.Fork(ctx, sandbox.ForkRequest{Snapshot: ref, N: 1, NoPool: true})
	if err == nil {
		err = results[0].Err
	}
	if err != nil {
		return nil, err
	}
	return &forked{p.d.Sandboxes, results[0].Sandbox.ID}, nil
}

// branch branches a sandbox. The caller removes what comes of it.
func (p *plot) branch(ctx context.Context, f *forked, mode sandbox.Mode) (snapshot.Snapshot, error) {
	return p.d.Sandboxes.Branch(ctx, f.id, sandbox.BranchRequest{Tag: newTag(), Mode: mode})
}

// dirtied is how many bytes of its memory a fork of the template has to itself:
// those that it has written to.
func (p *plot) dirtied(f *forked) (n int64, err error) {
	info, err := p.d.Sandboxes.Get(f.id)
	if err != nil {
		return 0, err
	}
	path, err := filepath.EvalSymlinks(p.snap.MemoryPath())
	if err != nil {
		return 0, err
	}
	space, err := guestmem.FindSpace(info.PID, path)
	if err != nil {
		return 0, err
	}
	err = space.Private(func(_, count uint64) bool {
		n += int64(count) * guestmem.PageSize
		return true
	})
	return n, err
}

// scribble has a guest write a file of so many MiB that lies in its memory.
func scribble(ctx context.Context, f *forked, name string, mib int) error {
	return f.with(ctx, func(ctx context.Context, c *guest.Client) error { return scribbleBy(ctx, c, name, mib) })
}

func scribbleBy(ctx context.Context, c *guest.Client, name string, mib int) error {
	command := fmt.Sprintf("head -c %dM /dev/urandom > /dev/shm/%s", mib, name)
	r, err := c.Run(ctx, guest.ExecSpec{Argv: []string{"/bin/sh", "-c", command}}, nil, maxLine)
	if err == nil && r.Exit.Code != 0 {
		err = fmt.Errorf("%w: %s: status %d: %s", errdef.ErrUnavailable, command, r.Exit.Code, r.Stderr)
	}
	return err
}
