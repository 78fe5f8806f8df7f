package attest_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// builder is a host that has no snapshot until it is made.
type builder struct {
	*host
	mu     sync.Mutex
	byTag  map[string]snapshot.Snapshot
	builds int
	remade deterministic.Comparison
	refuse error // of Remake
}

func (b *builder) Resolve(ref string) (snapshot.Snapshot, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for tag, snap := range b.byTag {
		if ref == tag || ref == snap.Digest {
			return snap, nil
		}
	}
	return snapshot.Snapshot{}, fmt.Errorf("%w: snapshot %s", errdef.ErrNotFound, ref)
}

func (b *builder) Twin(_ context.Context, ref string) (snapshot.Snapshot, error) {
	snap, err := b.Resolve(ref)
	if err == nil && !snap.Manifest.Machine.Deterministic {
		err = fmt.Errorf("%w: it was taken of a sandbox", errdef.ErrUnsupported)
	}
	return snap, err
}

func (b *builder) Build(_ context.Context, req deterministic.BuildRequest) (snapshot.Snapshot, error) {
	snap := b.snapshot()
	snap.Manifest.Image, snap.Manifest.EngineVersion = req.Image, fake.New().Version()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.builds++
	b.byTag[req.Tag] = snap
	return snap, nil
}

func (b *builder) Remake(context.Context, string) (deterministic.Comparison, error) {
	return b.remade, b.refuse
}

// oneImage has one image, of every name.
type oneImage struct{}

func (oneImage) Build(context.Context, image.BuildRequest) (image.Image, bool, error) {
	return image.Image{}, false, nil
}

func (oneImage) Get(ref string) (image.Image, error) {
	return image.Image{Name: ref, Digest: "sha256:" + strings.Repeat("1", 64)}, nil
}

func newBuilder(t *testing.T) (*builder, *attest.Attestor) {
	t.Helper()
	b := &builder{host: &host{digest: "sha256:" + strings.Repeat("a", 64), outcome: echo}, byTag: map[string]snapshot.Snapshot{}}
	dir := t.TempDir()
	a := attest.New(attest.Config{
		Records: filepath.Join(dir, "records"), Blocks: filepath.Join(dir, "blocks"),
		Engine: fake.New(), Deterministic: b, Snapshots: b, Images: oneImage{},
	})
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return b, a
}

func imageBlock(t *testing.T) block.Entry {
	t.Helper()
	e, err := block.NewEntry([]byte(strings.Replace(blockFile, `snapshot = "py"`, `source = "debian:bookworm"`, 1)), attest.CheckRule)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// TestBlockBuildsOnce: who runs a block that nobody has run yet, at once, has
// what it runs on made once.
func TestBlockBuildsOnce(t *testing.T) {
	t.Parallel()
	b, a := newBuilder(t)
	e := imageBlock(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			res, err := a.RunBlock(t.Context(), block.RunRequest{Block: e, Level: block.Three})
			if err != nil || string(res.Output.Stdout) != "hello\n0\n" {
				t.Errorf("%+v, %v", res, err)
			}
		})
	}
	all.Wait()
	if b.builds != 1 {
		t.Errorf("%d snapshots were made", b.builds)
	}
}

// TestBlockTagTaken: whoever may branch can give a branch the tag that a
// block's snapshot is to have. The block does not run in that.
func TestBlockTagTaken(t *testing.T) {
	t.Parallel()
	b, a := newBuilder(t)
	e := imageBlock(t)
	run := func() {
		t.Helper()
		if _, err := a.RunBlock(t.Context(), block.RunRequest{Block: e, Level: block.Three}); err != nil {
			t.Fatal(err)
		}
	}
	run()
	for tag, snap := range b.byTag {
		good := snap
		for name, bad := range map[string]func(*snapshot.Snapshot){
			"branch":       func(s *snapshot.Snapshot) { s.Manifest.Machine.Deterministic = false },
			"other-image":  func(s *snapshot.Snapshot) { s.Manifest.Image = "sha256:" + strings.Repeat("2", 64) },
			"other-engine": func(s *snapshot.Snapshot) { s.Manifest.EngineVersion = "0" },
		} {
			snap = good
			bad(&snap)
			b.byTag[tag] = snap
			before := b.builds
			if run(); b.builds != before+1 {
				t.Errorf("%s: it was not made anew", name)
			}
		}
	}
}

// TestBlockInputs: what the check of a file lets pass, a run takes.
func TestBlockInputs(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		add string
		ok  bool
	}{
		"plain":       {"", true},
		"largest":     {"start = \"2168-12-31T23:59:59Z\"\n[run.limits]\noutput = 268435456\nvirtual = \"24h\"\nwall = \"24h\"\n", true},
		"smallest":    {"start = \"1971-01-01T00:00:00Z\"\ncollect = [\"/a\"]\n[run.limits]\noutput = 1\nvirtual = \"1ns\"\nwall = \"1ns\"\n", true},
		"file":        {"[[run.files]]\npath = \"/a\"\nmode = 0o777\ntext = \"\"\n", true},
		"too-large":   {"[run.limits]\noutput = 268435457\n", false},
		"too-early":   {"start = \"1970-12-31T23:59:59Z\"\n", false},
		"too-late":    {"start = \"2169-01-01T00:00:00Z\"\n", false},
		"set-user-id": {"[[run.files]]\npath = \"/a\"\nmode = 0o4755\ntext = \"\"\n", false},
		"root":        {"[[run.files]]\npath = \"/\"\ntext = \"\"\n", false},
	} {
		e, err := block.NewEntry([]byte(blockFile+c.add), attest.CheckRule)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil {
			continue
		}
		in, err := e.Spec.Run.Input(nil)
		if err == nil {
			_, err = deterministic.Prepare(in)
		}
		if err != nil {
			t.Errorf("%s: the file is right, and its run is refused: %v", name, err)
		}
	}
}

func TestRemakeSnapshot(t *testing.T) {
	t.Parallel()
	b, a := newBuilder(t)
	snap, err := b.Build(t.Context(), deterministic.BuildRequest{Tag: "same"})
	if err != nil {
		t.Fatal(err)
	}
	snap.Manifest.Memory, snap.Manifest.Device = snapshot.File{Digest: "m", Size: 1}, snapshot.File{Digest: "d", Size: 1}
	same := deterministic.Comparison{Snapshot: snap, Memory: snap.Manifest.Memory, Device: snap.Manifest.Device}
	tick, other := same, same
	tick.Device.Digest, other.Memory.Digest = "e", "n"
	for name, c := range map[string]struct {
		remade deterministic.Comparison
		refuse error
		want   record.Result
		missed int
	}{
		"same":         {same, nil, record.Verified, 0},
		"other-device": {tick, nil, record.Verified, 0},
		"other-memory": {other, nil, record.Mismatch, 0},
		"no-image":     {same, fmt.Errorf("%w: its image is gone", errdef.ErrConflict), record.CannotCompare, 1},
		"no-engine":    {same, fmt.Errorf("%w: this engine has none", errdef.ErrUnsupported), record.CannotCompare, 1},
	} {
		b.remade, b.refuse = c.remade, c.refuse
		got, remakeErr := a.RemakeSnapshot(t.Context(), "same")
		if remakeErr != nil || got.Result != c.want || len(got.Missing) != c.missed {
			t.Errorf("%s: %+v, %v", name, got, remakeErr)
		}
	}
	if _, err = a.RemakeSnapshot(t.Context(), "none"); errdef.Code(err) != "not_found" {
		t.Errorf("%v", err)
	}
}
