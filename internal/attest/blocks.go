package attest

import (
	"context"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/record"
)

// RunBlock runs a block.
func (a *Attestor) RunBlock(ctx context.Context, req block.RunRequest) (block.Result, error) {
	blocks, err := a.Blocks(ctx)
	if err != nil {
		return block.Result{}, err
	}
	return block.Runner{Registry: blocks, Executor: executor{a}}.Run(ctx, req)
}

// executor is what runs blocks.
type executor struct{ a *Attestor }

// Run runs a block's job, deterministically, and keeps the record.
func (x executor) Run(ctx context.Context, job block.Job) (block.Execution, error) {
	snap, err := x.a.target(ctx, job)
	if err != nil {
		return block.Execution{}, err
	}
	res, err := x.a.Run(ctx, Request{
		Snapshot: snap, Input: job.Input, Block: job.Block.String(), User: job.User,
		Rules: record.Rules{Streams: job.Canonical, Files: job.CanonicalFiles},
	})
	if err != nil {
		return block.Execution{}, err
	}
	r := res.Record.Record
	return block.Execution{RecordID: r.ID, Snapshot: r.Environment.Snapshot, Started: r.Started, Output: res.Output}, nil
}

// target returns the snapshot that a job runs in. It is made, and its image
// too, when it is not there yet.
func (a *Attestor) target(ctx context.Context, job block.Job) (ref string, err error) {
	t := job.Target
	if t.Snapshot != "" {
		return t.Snapshot, nil
	}
	name := t.Image
	if t.Source != "" {
		name = "block-" + short(block.Digest([]byte(t.Source)))
		if _, _, err = a.cfg.Images.Build(ctx, image.BuildRequest{Name: name, Source: t.Source}); err != nil {
			return "", fmt.Errorf("build image: %w", err)
		}
	}
	img, err := a.cfg.Images.Get(name)
	if err != nil {
		return "", err
	}
	// One snapshot for all blocks of one image and warm-up.
	tag := "block-" + short(block.Digest([]byte(img.Digest+"\n"+strings.Join(t.Warmup, "\n"))))
	if digest, ok := a.made(tag, img.Digest); ok {
		return digest, nil
	}
	// One at a time: who runs the same block meanwhile waits for it.
	select {
	case a.making <- struct{}{}:
		defer func() { <-a.making }()
	case <-ctx.Done():
		return "", fmt.Errorf("wait for another snapshot: %w", context.Cause(ctx))
	}
	if digest, ok := a.made(tag, img.Digest); ok {
		return digest, nil
	}
	snap, err := a.cfg.Deterministic.Build(ctx, deterministic.BuildRequest{Tag: tag, Image: img.Digest, Warmup: t.Warmup, Replace: true})
	if err != nil {
		return "", fmt.Errorf("make snapshot for %s: %w", job.Block, err)
	}
	return snap.Digest, nil
}

// made finds a snapshot that was made for blocks. Anybody who may branch could
// have chosen its tag, so the tag says nothing.
func (a *Attestor) made(tag, image string) (digest string, ok bool) {
	snap, err := a.cfg.Snapshots.Resolve(tag)
	m := snap.Manifest
	ok = err == nil && m.Machine.Deterministic && m.Image == image && m.Parent == "" && snap.RestorableBy(a.cfg.Engine) == nil
	return snap.Digest, ok
}

// short is enough of a digest to name what only this program makes.
func short(digest string) string {
	const enough = 24 // hex digits
	return strings.TrimPrefix(digest, "sha256:")[:enough]
}
