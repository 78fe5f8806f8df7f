package deterministic

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
)

// What a run may ask for, and what it gets when it asks for nothing.
const (
	DefaultVirtual = 5 * time.Minute
	DefaultWall    = 10 * time.Minute
	DefaultOutput  = 8 << 20

	MaxVirtual = 24 * time.Hour
	MaxWall    = 24 * time.Hour
	MaxOutput  = 256 << 20
	MaxStdin   = 64 << 20
	MaxFiles   = 64 << 20 // the files of an input together, and those of an output

	maxNames = 1024 // of files
)

// DefaultStart is the guest's wall clock when no start time was asked for.
func DefaultStart() time.Time { return time.Date(2025, time.January, 1, 0, 0, 0, 0, time.UTC) }

// Options say what to do with what comes of a run. None has an influence on it.
type Options struct {
	// Stdout and Stderr, if not nil, are given the output as it comes, too.
	Stdout, Stderr io.Writer
	// MemoryDigest asks for the digest of the guest's memory.
	MemoryDigest bool
}

// Prepare checks an input and puts in the values that apply where it says
// nothing. Run does so itself: call it to know what will be run.
func Prepare(in record.Input) (record.Input, error) {
	if in.Start.IsZero() {
		in.Start = DefaultStart()
	}
	in.Start = in.Start.UTC().Round(0) // of the wall clock alone
	for _, limit := range []struct {
		value          *time.Duration
		otherwise, top time.Duration
		name           string
	}{
		{&in.Limits.Virtual, DefaultVirtual, MaxVirtual, "virtual time"},
		{&in.Limits.Wall, DefaultWall, MaxWall, "wall time"},
	} {
		if *limit.value == 0 {
			*limit.value = limit.otherwise
		}
		if *limit.value < 0 || *limit.value > limit.top {
			return in, fmt.Errorf("%w: limit of %s %s: at most %s", errdef.ErrInvalid, limit.name, *limit.value, limit.top)
		}
	}
	if in.Limits.Output == 0 {
		in.Limits.Output = DefaultOutput
	}
	if in.Limits.Output < 0 || in.Limits.Output > MaxOutput {
		return in, fmt.Errorf("%w: limit of %d bytes of output: at most %d", errdef.ErrInvalid, in.Limits.Output, MaxOutput)
	}
	return in, check(&in)
}

// check refuses what the guest would, and what would be too much for it.
func check(in *record.Input) error {
	// A guest cannot have been up for longer than since 1970.
	first, last := time.Unix(0, 0).AddDate(1, 0, 0), time.Unix(0, 0).AddDate(200, 0, 0)
	switch {
	case len(in.Argv) == 0 || in.Argv[0] == "":
		return fmt.Errorf("%w: there is no command", errdef.ErrInvalid)
	case in.Start.Before(first) || in.Start.After(last):
		return fmt.Errorf("%w: start time %s: it must be from 1971 to 2169", errdef.ErrInvalid, in.Start.Format(time.RFC3339))
	case len(in.Stdin) > MaxStdin:
		return fmt.Errorf("%w: standard input of %d bytes: at most %d", errdef.ErrInvalid, len(in.Stdin), MaxStdin)
	case len(in.Files) > maxNames || len(in.Collect) > maxNames:
		return fmt.Errorf("%w: more than %d files", errdef.ErrInvalid, maxNames)
	}
	size := 0
	for _, f := range in.Files {
		if size += len(f.Data); size > MaxFiles {
			return fmt.Errorf("%w: files of more than %d bytes", errdef.ErrInvalid, MaxFiles)
		}
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || f.Mode&^0o777 != 0 {
			return fmt.Errorf("%w: file %q of mode %o: the path must be absolute and clean, the mode permission bits", errdef.ErrInvalid, f.Path, f.Mode)
		}
	}
	if slices.Contains(in.Collect, "") {
		return fmt.Errorf("%w: a file to be collected has no name", errdef.ErrInvalid)
	}
	spec := specOf(in)
	for _, s := range slices.Concat([]string{in.Cwd}, in.Argv, in.Env, in.Collect) {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf("%w: a zero byte in a word of the command", errdef.ErrInvalid)
		}
	}
	if n := len(guestproto.Encode(&spec)); n > guestproto.MaxLetter {
		return fmt.Errorf("%w: command, variables and names of files take %d bytes: at most %d", errdef.ErrInvalid, n, guestproto.MaxLetter)
	}
	return nil
}

// entropy is what a seed means to the guest's kernel.
func entropy(seed uint64) []byte {
	sum := sha256.Sum256(binary.LittleEndian.AppendUint64([]byte("tine deterministic seed 1\n"), seed))
	return sum[:]
}

func specOf(in *record.Input) guestproto.Job {
	spec := guestproto.Job{
		Argv: in.Argv, Env: in.Env, Dir: in.Cwd, Stdin: len(in.Stdin) > 0, Collect: in.Collect,
		Entropy: entropy(in.Seed), Clock: in.Start.UnixNano(),
		Time: in.Limits.Virtual, Output: in.Limits.Output, CollectSize: MaxFiles,
	}
	for _, f := range in.Files {
		spec.Files = append(spec.Files, guestproto.JobFile{Path: f.Path, Mode: f.Mode, Size: int64(len(f.Data))})
	}
	return spec
}

// Run runs a command in a fork of a deterministic snapshot. An outcome is a
// function of the snapshot and the input, but for Output.Wall; so is that the
// guest refuses the command. All other errors say that there is no outcome.
func (r *Runner) Run(ctx context.Context, ref string, in record.Input, opt Options) (record.Output, error) {
	done, err := r.begin()
	if err != nil {
		return record.Output{}, err
	}
	defer done()
	if in, err = Prepare(in); err != nil {
		return record.Output{}, err
	}
	o, err := r.origin(ctx, ref)
	if err != nil {
		return record.Output{}, fmt.Errorf("run in %s: %w", ref, err)
	}
	out, err := r.run(ctx, o, in, opt)
	if err = errors.Join(err, o.pin.Close()); err != nil {
		return record.Output{}, fmt.Errorf("run in %s: %w", ref, err)
	}
	return out, nil
}

// origin is a snapshot to run in, which cannot be removed until pin is closed.
type origin struct {
	snap snapshot.Snapshot
	root string
	pin  *os.File
}

// origin finds and pins a snapshot and checks that runs can come of it.
func (r *Runner) origin(ctx context.Context, ref string) (origin, error) {
	snap, pin, err := r.pin(ref)
	if err != nil {
		return origin{}, err
	}
	o := origin{snap: snap, pin: pin}
	if err = r.fits(&o); err == nil {
		err = r.cfg.Snapshots.Verify(ctx, snap)
	}
	if err != nil {
		return origin{}, errors.Join(err, pin.Close())
	}
	return o, nil
}

// pin finds a snapshot and keeps it from being removed. When it goes between
// the two, its tag may have been given to another.
func (r *Runner) pin(ref string) (snapshot.Snapshot, *os.File, error) {
	const tries = 3
	for try := 1; ; try++ {
		snap, err := r.cfg.Snapshots.Resolve(ref)
		if err != nil {
			return snap, nil, err
		}
		pin, err := r.cfg.Snapshots.Pin(snap)
		if err == nil || !errors.Is(err, errdef.ErrNotFound) || try == tries {
			return snap, pin, err
		}
	}
}

func (r *Runner) fits(o *origin) error {
	m := o.snap.Manifest
	if !m.Machine.Deterministic {
		err := fmt.Errorf("%w: snapshot %s is not deterministic", errdef.ErrConflict, o.snap.Digest)
		return errdef.WithHint(err, "run it with --deterministic through its twin, or make one: tine snapshot create --deterministic")
	}
	if m.Layered() {
		return fmt.Errorf("%w: snapshot %s is a branch: deterministic ones are whole", errdef.ErrConflict, o.snap.Digest)
	}
	if err := o.snap.RestorableBy(r.cfg.Engine); err != nil {
		return err
	}
	img, err := r.cfg.Images.Get(m.Image)
	if err != nil {
		return fmt.Errorf("%w: snapshot %s: its image: %s", errdef.ErrConflict, o.snap.Digest, err.Error())
	}
	o.root = img.RootPath()
	return nil
}

// run waits for its turn and runs.
func (r *Runner) run(ctx context.Context, o origin, in record.Input, opt Options) (_ record.Output, err error) {
	if err = r.slots.Acquire(ctx, 1); err != nil {
		return record.Output{}, fmt.Errorf("wait for other machines: %w", context.Cause(ctx))
	}
	defer r.slots.Release(1)
	began := time.Now()
	ctx, cancel := context.WithTimeoutCause(ctx, in.Limits.Wall, fmt.Errorf("%w: not done after %s by the host's clock", errdef.ErrTimeout, in.Limits.Wall))
	defer cancel()
	place, err := r.newSeat()
	if err != nil {
		return record.Output{}, err
	}
	defer func() { err = errors.Join(err, place.remove()) }()
	// What fails when time is over fails for that reason, whatever it says.
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = fmt.Errorf("%w (%s)", context.Cause(ctx), err.Error())
		}
	}()
	vm, err := r.cfg.Engine.Restore(ctx, vmm.RestoreSpec{
		Common: vmm.Common{
			ID: filepath.Base(place.dir), Dir: place.dir, Machine: o.snap.Manifest.Machine, Root: o.root,
			Leases: []*os.File{o.pin}, DieWithParent: true,
		},
		Memory: o.snap.MemoryPath(), Device: o.snap.DevicePath(),
	})
	if err != nil {
		return record.Output{}, err
	}
	defer func() { err = errors.Join(err, kill(ctx, vm)) }()
	out, err := converse(ctx, vm, in, opt)
	if err != nil {
		return record.Output{}, err
	}
	if opt.MemoryDigest {
		if out.Memory, err = memoryDigest(ctx, vm, o.snap.Manifest.Memory.Size); err != nil {
			return record.Output{}, err
		}
	}
	out.Wall = time.Since(began)
	return out, nil
}

// converse gives a restored machine its job and takes what comes of it.
func converse(ctx context.Context, vm vmm.VM, in record.Input, opt Options) (record.Output, error) {
	box, err := vm.Mailbox()
	if err != nil {
		return record.Output{}, err
	}
	t := &talk{vm: vm, box: box}
	if err = t.listen(ctx); err != nil {
		return record.Output{}, err
	}
	return t.outcome(ctx, in, opt)
}

// outcome runs an input to its end.
func (t *talk) outcome(ctx context.Context, in record.Input, opt Options) (record.Output, error) {
	var out record.Output
	j := &job{spec: specOf(&in), stdin: in.Stdin, take: func(stream uint32, data []byte) error {
		to, also := &out.Stdout, opt.Stdout
		if stream == guestproto.StreamStderr {
			to, also = &out.Stderr, opt.Stderr
		}
		*to = append(*to, data...)
		if also == nil {
			return nil
		}
		_, err := also.Write(data)
		return err
	}}
	for _, f := range in.Files {
		j.files = append(j.files, f.Data)
	}
	done, err := t.run(ctx, j)
	if err != nil {
		return record.Output{}, err
	}
	out.Exit, out.Signal, out.Failure = done.Code, signalName(done.Signal), failure(done.End)
	out.Virtual, out.Files = done.Virtual, j.collected(done)
	return out, nil
}

// signalName is a signal as records name it.
func signalName(n int) string {
	if n == 0 {
		return ""
	}
	if name := unix.SignalName(unix.Signal(n)); name != "" {
		return name
	}
	return fmt.Sprintf("SIG%d", n) // a real-time signal
}

// memoryDigest is the digest of all of a machine's memory.
func memoryDigest(ctx context.Context, vm vmm.VM, size int64) (string, error) {
	space, err := vm.Memory()
	if err != nil {
		return "", err
	}
	return digest(ctx, space, size)
}

// digest hashes the first size bytes of r.
func digest(ctx context.Context, r io.ReaderAt, size int64) (string, error) {
	sum, buf := sha256.New(), make([]byte, 1<<20)
	for at := int64(0); at < size; {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-at)], at)
		if err != nil {
			return "", err
		}
		_, _ = sum.Write(buf[:n]) // a hash takes everything
		at += int64(n)
	}
	return "sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}
