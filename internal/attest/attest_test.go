package attest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/attest"
	"github.com/tinevm/tine/internal/block"
	"github.com/tinevm/tine/internal/deterministic"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/record"
	"github.com/tinevm/tine/internal/snapshot"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// host stands in for machines, snapshots and images.
type host struct {
	mu      sync.Mutex
	digest  string // of the one snapshot there is
	outcome func(record.Input) (record.Output, error)
	runs    int
	built   []deterministic.BuildRequest
}

func (h *host) snapshot() snapshot.Snapshot {
	snap := snapshot.Snapshot{Tag: "py", Digest: h.digest}
	snap.Manifest.Machine = vmm.Machine{MemoryMiB: 256, VCPUs: 1, Deterministic: true, ClockShift: 2}
	snap.Manifest.Engine, snap.Manifest.EngineVersion = "fake", "1"
	snap.Manifest.Image = "sha256:" + strings.Repeat("1", 64)
	return snap
}

func (h *host) Resolve(ref string) (snapshot.Snapshot, error) {
	if ref != "py" && ref != h.digest {
		return snapshot.Snapshot{}, fmt.Errorf("%w: snapshot %s", errdef.ErrNotFound, ref)
	}
	return h.snapshot(), nil
}

func (h *host) Twin(_ context.Context, ref string) (snapshot.Snapshot, error) { return h.Resolve(ref) }

func (h *host) Remake(context.Context, string) (deterministic.Comparison, error) {
	return deterministic.Comparison{}, errors.ErrUnsupported
}

func (h *host) Build(_ context.Context, req deterministic.BuildRequest) (snapshot.Snapshot, error) {
	h.built = append(h.built, req)
	return h.snapshot(), nil
}

func (h *host) Run(_ context.Context, ref string, in record.Input, opt deterministic.Options) (record.Output, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.runs++
	if ref != h.digest {
		return record.Output{}, fmt.Errorf("%w: snapshot %s", errdef.ErrNotFound, ref)
	}
	out, err := h.outcome(in)
	if err == nil && opt.Stdout != nil {
		_, err = opt.Stdout.Write(out.Stdout)
	}
	return out, err
}

type images struct{}

func (images) Build(context.Context, image.BuildRequest) (image.Image, bool, error) {
	return image.Image{}, false, nil
}

func (images) Get(ref string) (image.Image, error) {
	return image.Image{}, fmt.Errorf("%w: image %s", errdef.ErrNotFound, ref)
}

// echo is a program that prints its input and its seed.
func echo(in record.Input) (record.Output, error) {
	return record.Output{Stdout: fmt.Appendf(nil, "%s\n%d\n", in.Stdin, in.Seed), Virtual: time.Millisecond}, nil
}

func newHost(t *testing.T) (*host, *attest.Attestor) {
	t.Helper()
	h := &host{digest: "sha256:" + strings.Repeat("a", 64), outcome: echo}
	return h, newAttestor(t, h)
}

func newAttestor(t *testing.T, h *host) *attest.Attestor {
	t.Helper()
	return newAttestorIn(t, h, t.TempDir())
}

func newAttestorIn(t *testing.T, h *host, dir string) *attest.Attestor {
	t.Helper()
	a := attest.New(attest.Config{
		Records: filepath.Join(dir, "records"), Blocks: filepath.Join(dir, "blocks"), Trusted: filepath.Join(dir, "trusted"),
		Engine: fake.New(), Deterministic: h, Snapshots: h, Images: images{},
	})
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

func run(t *testing.T, a *attest.Attestor, in record.Input) attest.Result {
	t.Helper()
	res, err := a.Run(t.Context(), attest.Request{Snapshot: "py", Input: in, User: "me"})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func input() record.Input {
	return record.Input{Argv: []string{"cat"}, Stdin: []byte("hello"), Seed: 7}
}

func TestVerify(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		prepare func(h *host)
		want    record.Result
		agreed  int
		missing string
	}{
		{"same", func(*host) {}, record.Verified, 3, ""},
		{"other output", func(h *host) {
			h.outcome = func(in record.Input) (record.Output, error) {
				return record.Output{Stdout: []byte("hullo\n7\n"), Virtual: time.Millisecond}, nil
			}
		}, record.Mismatch, 0, ""},
		{"other exit code", func(h *host) {
			h.outcome = func(in record.Input) (record.Output, error) {
				out, err := echo(in)
				out.Exit = 1
				return out, err
			}
		}, record.Mismatch, 0, ""},
		{"one of three differs", func(h *host) {
			h.outcome = func(in record.Input) (record.Output, error) {
				out, err := echo(in)
				if h.runs == 3 { // one was for the record
					out.Stdout[0]++
				}
				return out, err
			}
		}, record.Mismatch, 2, ""},
		{"snapshot is gone", func(h *host) { h.digest = "sha256:" + strings.Repeat("b", 64) }, record.CannotCompare, 0, "snapshot sha256:aaa"},
		{"other engine", func(h *host) {
			h.outcome = func(record.Input) (record.Output, error) {
				return record.Output{}, fmt.Errorf("%w: it was made by qemu-tcg 6", errdef.ErrConflict)
			}
		}, record.CannotCompare, 0, "qemu-tcg 6"},
		{"too slow a host", func(h *host) {
			h.outcome = func(record.Input) (record.Output, error) {
				return record.Output{}, fmt.Errorf("%w: not done", errdef.ErrTimeout)
			}
		}, record.CannotCompare, 0, "not done"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h, a := newHost(t)
			made := run(t, a, input())
			c.prepare(h)
			rep, err := a.Verify(t.Context(), attest.VerifyRequest{ID: made.Record.Record.ID[:8], Runs: 3})
			if err != nil {
				t.Fatal(err)
			}
			if rep.Result != c.want || rep.Agreed != c.agreed || rep.Chain != attest.Linked || !strings.Contains(strings.Join(rep.Missing, "\n"), c.missing) {
				t.Errorf("%+v", rep)
			}
			if c.want == record.Mismatch && len(rep.Verdict.Differences) == 0 {
				t.Errorf("no differences: %+v", rep.Verdict)
			}
		})
	}
}

// bundle is a record as it is handed on.
func bundle(t *testing.T, a *attest.Attestor, e record.Envelope) []byte {
	t.Helper()
	store, err := a.Records(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err = record.WriteBundle(&b, e, store.Public(), store); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestVerifyElsewhere: a record is worth something to whoever trusts its key,
// and has the snapshot.
func TestVerifyElsewhere(t *testing.T) {
	t.Parallel()
	h, a := newHost(t)
	data := bundle(t, a, run(t, a, input()).Record)
	store, err := a.Records(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	other := newAttestorIn(t, h, dir)
	verify := func(req attest.VerifyRequest) attest.Report {
		t.Helper()
		rep, verr := other.Verify(t.Context(), req)
		if verr != nil {
			t.Fatal(verr)
		}
		return rep
	}
	if rep := verify(attest.VerifyRequest{Bundle: data}); rep.Result != record.CannotCompare || rep.Findings[0].Kind != record.UnknownKey || rep.Runs != 0 {
		t.Errorf("unknown key: %+v", rep)
	}
	keys := []record.Public{store.Public()}
	if rep := verify(attest.VerifyRequest{Bundle: data, Keys: keys}); rep.Result != record.Verified || rep.Chain != attest.Elsewhere {
		t.Errorf("known key: %+v", rep)
	}
	before := h.runs
	if rep := verify(attest.VerifyRequest{Bundle: data, Keys: keys, Offline: true}); rep.Result != record.CannotCompare || h.runs != before {
		t.Errorf("offline: %+v, %d runs", rep, h.runs-before)
	}
	if err = os.Mkdir(filepath.Join(dir, "trusted"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err = os.WriteFile(filepath.Join(dir, "trusted", "theirs.pem"), store.Public().PEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := verify(attest.VerifyRequest{Bundle: data}); rep.Result != record.Verified {
		t.Errorf("trusted key: %+v", rep)
	}
	if rep := verify(attest.VerifyRequest{Bundle: []byte("{}"), Keys: keys}); rep.Result != record.Mismatch || rep.ID != "" {
		t.Errorf("no record: %+v", rep)
	}
}

// TestVerifyTampered: one byte of what is handed on is another.
func TestVerifyTampered(t *testing.T) {
	t.Parallel()
	_, a := newHost(t)
	e := run(t, a, input()).Record
	data := bundle(t, a, e)
	for at := 0; at < len(data); at += 97 {
		bad := bytes.Clone(data)
		bad[at] ^= 1
		rep, err := a.Verify(t.Context(), attest.VerifyRequest{Bundle: bad})
		if err != nil {
			t.Fatalf("byte %d: %v", at, err)
		}
		if rep.Result == record.Verified {
			t.Errorf("byte %d of %d is another, and it is %s", at, len(data), rep.Result)
		}
	}
}

func TestRefused(t *testing.T) {
	t.Parallel()
	_, a := newHost(t)
	for name, req := range map[string]attest.Request{
		"mode":             {Snapshot: "py", Mode: "odd", Input: input()},
		"rule":             {Snapshot: "py", Input: input(), Rules: record.Rules{Streams: []string{"odd"}}},
		"no command":       {Snapshot: "py"},
		"seed when normal": {Snapshot: "py", Mode: record.Normal, Input: input()},
		"relative collect": {Snapshot: "py", Mode: record.Normal, Input: record.Input{Argv: []string{"x"}, Collect: []string{"a"}}},
		"memory when normal": {
			Snapshot: "py", Mode: record.Normal, MemoryDigest: true, Input: record.Input{Argv: []string{"x"}},
		},
	} {
		if _, err := a.Run(t.Context(), req); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	if _, err := a.Run(t.Context(), attest.Request{Snapshot: "other", Input: input()}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no snapshot: %v", err)
	}
	store, err := a.Records(t.Context())
	if err != nil || store.Usage().Records != 0 {
		t.Errorf("%+v, %v", store.Usage(), err)
	}
	for name, req := range map[string]attest.VerifyRequest{"nothing": {}, "both": {ID: "a", Bundle: []byte("b")}, "runs": {ID: "a", Runs: -1}} {
		if _, err := a.Verify(t.Context(), req); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
}

const blockFile = `format = 1
name = "hello"
version = "1.0.0"
description = "Says hello."
author = "me"
cognitive_load = "Low"
minimum_trust_level = "Zero"

[[provides]]
name = "hello"
version = "1.0.0"

[run]
snapshot = "py"
command = ["cat"]
stdin = "hello"
`

// TestBlock: what verifying the records of a block comes to is evidence of it.
func TestBlock(t *testing.T) {
	t.Parallel()
	h, a := newHost(t)
	blocks, err := a.Blocks(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	e, err := blocks.Add(block.AddRequest{File: []byte(blockFile), Level: block.Three, Publisher: "me"})
	if err != nil {
		t.Fatal(err)
	}
	res, err := a.RunBlock(t.Context(), block.RunRequest{Block: e, Level: block.Zero, User: "me"})
	if err != nil {
		t.Fatal(err)
	}
	if res.Status != block.StatusOf(record.Output{}) || string(res.Output.Stdout) != "hello\n0\n" {
		t.Errorf("%+v", res)
	}
	rep, err := a.Verify(t.Context(), attest.VerifyRequest{ID: res.RecordID})
	if err != nil || rep.Result != record.Verified {
		t.Fatalf("%+v, %v", rep, err)
	}
	h.outcome = func(record.Input) (record.Output, error) { return record.Output{Stdout: []byte("no")}, nil }
	if rep, err = a.Verify(t.Context(), attest.VerifyRequest{ID: res.RecordID, Runs: 2}); err != nil || rep.Result != record.Mismatch {
		t.Fatalf("%+v, %v", rep, err)
	}
	trust, err := blocks.Trust(e.Ref.Digest)
	if err != nil || len(trust.Evidence) != 2 || trust.Status != block.Quarantined {
		t.Errorf("%+v, %v", trust, err)
	}
	if _, err = a.RunBlock(t.Context(), block.RunRequest{Block: e, Level: block.Zero}); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("run in quarantine: %v", err)
	}
}
