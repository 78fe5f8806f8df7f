package apitest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// newAttestor has real records, and machines that know a few words; see runs.
func (b *Backend) newAttestor() *attest.Attestor {
	runs := runs{b}
	return attest.New(attest.Config{
		Records: filepath.Join(b.dir, "records"), Blocks: filepath.Join(b.dir, "blocks"), Trusted: filepath.Join(b.dir, "keys"),
		Engine: fake.New(), Deterministic: runs, Sandboxes: b, Snapshots: runs, Images: images{b},
	})
}

// Records is the directory of the records, for tests that damage it.
func (b *Backend) Records() string { return filepath.Join(b.dir, "records") }

// runs are machines that run a command without a machine. They know
//
//	echo WORD...    cat [FILE...]     warn WORD...      bytes N
//	seed            fail CODE         die               loop
//	write FILE WORD...                drift             sleep
//
// where drift comes out differently each time and sleep does not end.
type runs struct{ b *Backend }

// twinDigest is the digest of the snapshot that stands for another.
func twinDigest(digest string) string {
	sum := sha256.Sum256([]byte("twin " + digest))
	return "sha256:" + hex.EncodeToString(sum[:])
}

func twinOf(snap snapshot.Snapshot) snapshot.Snapshot {
	snap.Digest, snap.Tag = twinDigest(snap.Digest), deterministic.TwinTag(snap.Digest)
	snap.Manifest.Machine = vmm.Machine{MemoryMiB: 256, VCPUs: 1, Deterministic: true, ClockShift: deterministic.DefaultShift}
	snap.Manifest.Engine, snap.Manifest.EngineVersion = "fake", "1"
	return snap
}

// Resolve finds a snapshot, or a twin by its digest.
func (r runs) Resolve(ref string) (snapshot.Snapshot, error) {
	all, err := r.b.store.List()
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	for _, snap := range all {
		if ref == twinDigest(snap.Digest) {
			return twinOf(snap), nil
		}
	}
	return r.b.store.Resolve(ref)
}

// Twin pretends to make one.
func (r runs) Twin(ctx context.Context, ref string) (snapshot.Snapshot, error) {
	snap, err := r.Resolve(ref)
	if err != nil || snap.Manifest.Machine.Deterministic {
		return snap, err
	}
	progress.Report(ctx, "boot", "booting the deterministic template")
	return twinOf(snap), r.b.failure("twin")
}

// Build writes a snapshot of a machine that never ran.
func (r runs) Build(ctx context.Context, req deterministic.BuildRequest) (snapshot.Snapshot, error) {
	img, err := images(r).Get(req.Image)
	if err == nil {
		err = r.b.failure("build snapshot")
	}
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	machine := vmm.Machine{MemoryMiB: 1, VCPUs: 1, Deterministic: true, ClockShift: deterministic.DefaultShift}
	if req.ClockShift != nil {
		machine.ClockShift = *req.ClockShift
	}
	progress.Report(ctx, "boot", "booting the deterministic template")
	return r.b.writeSnapshot(ctx, req.Tag, req.Replace, snapshot.Manifest{
		Engine: "fake", EngineVersion: "1", Machine: machine, Image: img.Digest, Warmup: req.Warmup,
	})
}

// Remake makes nothing, and finds it the same unless "remake" fails.
func (r runs) Remake(_ context.Context, ref string) (deterministic.Comparison, error) {
	snap, err := r.Resolve(ref)
	if err != nil {
		return deterministic.Comparison{}, err
	}
	if !snap.Manifest.Machine.Deterministic {
		return deterministic.Comparison{}, fmt.Errorf("%w: snapshot %s is not deterministic", errdef.ErrConflict, snap.Digest)
	}
	c := deterministic.Comparison{Snapshot: snap, Memory: snap.Manifest.Memory, Device: snap.Manifest.Device}
	if r.b.failure("remake") != nil {
		c.Memory.Digest = twinDigest(c.Memory.Digest)
	}
	return c, nil
}

// Run runs one of the words.
func (r runs) Run(ctx context.Context, ref string, in record.Input, opt deterministic.Options) (record.Output, error) {
	in, err := deterministic.Prepare(in)
	if err != nil {
		return record.Output{}, err
	}
	if _, err = r.Resolve(ref); err != nil {
		return record.Output{}, err
	}
	if err = r.b.failure("run"); err != nil {
		return record.Output{}, err
	}
	out := record.Output{Virtual: 3 * time.Millisecond, Wall: time.Millisecond}
	if opt.MemoryDigest {
		out.Memory = record.Digest([]byte(ref))
	}
	if err = r.word(ctx, in, &out); err != nil {
		return record.Output{}, err
	}
	if int64(len(out.Stdout)) > in.Limits.Output {
		out.Stdout = out.Stdout[:in.Limits.Output]
		out.Exit, out.Signal, out.Failure = -1, "SIGKILL", "output limit"
	}
	if opt.Stdout != nil {
		if _, err = opt.Stdout.Write(out.Stdout); err != nil {
			return record.Output{}, err
		}
	}
	if opt.Stderr != nil {
		_, err = opt.Stderr.Write(out.Stderr)
	}
	return out, err
}

func (r runs) word(ctx context.Context, in record.Input, out *record.Output) error {
	words := strings.Join(in.Argv[1:], " ")
	switch in.Argv[0] {
	case "echo":
		out.Stdout = []byte(words + "\n")
	case "cat":
		out.Stdout = append(out.Stdout, in.Stdin...)
		for _, f := range in.Files {
			if slices.Contains(in.Argv[1:], f.Path) {
				out.Stdout = append(out.Stdout, f.Data...)
			}
		}
	case "warn":
		out.Stderr = []byte(words + "\n")
	case "bytes":
		n, err := strconv.Atoi(words)
		if err != nil {
			return fmt.Errorf("%w: bytes %s", errdef.ErrInvalid, words)
		}
		out.Stdout = []byte(strings.Repeat("\xff\x00", n/2))
	case "seed":
		out.Stdout = fmt.Appendf(nil, "%d %s\n", in.Seed, in.Start.Format(time.RFC3339))
	case "fail":
		code, err := strconv.Atoi(words)
		if err != nil {
			return fmt.Errorf("%w: fail %s", errdef.ErrInvalid, words)
		}
		out.Exit = code
	case "die":
		out.Exit, out.Signal = -1, "SIGSEGV"
	case "loop":
		out.Exit, out.Signal, out.Failure = -1, "SIGKILL", "timed out"
	case "write":
		if slices.Contains(in.Collect, in.Argv[1]) {
			out.Files = []record.File{{Path: in.Argv[1], Mode: 0o644, Data: []byte(strings.Join(in.Argv[2:], " "))}}
		}
	case "drift":
		r.b.mu.Lock()
		defer r.b.mu.Unlock()
		r.b.drift++
		out.Stdout = fmt.Appendf(nil, "same\nthis is %d\n", r.b.drift)
	case "sleep":
		<-ctx.Done()
		return context.Cause(ctx)
	default:
		out.Exit, out.Failure = -1, "not found"
	}
	return nil
}
