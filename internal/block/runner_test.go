package block

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/record"
)

// echo is an Executor that prints its input, and keeps what it was asked.
type echo struct {
	jobs []Job
	out  record.Output
	err  error
}

func (x *echo) Run(_ context.Context, job Job) (Execution, error) {
	x.jobs = append(x.jobs, job)
	out := x.out
	if out.Stdout == nil {
		out.Stdout = job.Input.Stdin
	}
	return Execution{RecordID: "rec-1", Snapshot: "sha256:1", Started: time.Unix(1_800_000_000, 0), Output: out}, x.err
}

func TestRunner(t *testing.T) {
	t.Parallel()
	r, x := open(t, t.TempDir()), &echo{}
	runner := Runner{Registry: r, Executor: x}
	e := add(t, r, read(t, filepath.Join(examples, "word-count", FileName)))
	got, err := runner.Run(t.Context(), RunRequest{Block: e, Stdin: []byte("a b c"), User: "token:ci"})
	if err != nil {
		t.Fatal(err)
	}
	job := x.jobs[0]
	if string(job.Input.Stdin) != "a b c" || job.Block != e.Ref || job.BlockID != e.ID() || job.User != "token:ci" ||
		job.Target.Source != "debian:bookworm" || !job.Input.Start.Equal(DefaultStart()) || !cmp.Equal(job.Input.Argv, []string{"wc", "-w"}) {
		t.Errorf("%+v", job)
	}
	if got.RecordID != "rec-1" || got.Status.Word != Succeeded || got.Forge.InputHash != ForgeHash([]byte("a b c"), nil) ||
		got.Forge.OutputHash != got.Forge.InputHash || got.Forge.UserID != "token:ci" || got.Forge.BlockID != e.ID() {
		t.Errorf("%+v", got)
	}
	seed, start := uint64(1)<<63, time.Unix(5, 0)
	if _, err = runner.Run(t.Context(), RunRequest{Block: e, Stdin: []byte{}, Seed: &seed, Start: &start}); err != nil {
		t.Fatal(err)
	}
	if in := x.jobs[1].Input; in.Seed != seed || !in.Start.Equal(start) || len(in.Stdin) != 0 {
		t.Errorf("%+v", in)
	}
	if _, err = runner.Run(t.Context(), RunRequest{Block: e, Stdin: make([]byte, MaxStdin)}); err != nil {
		t.Errorf("64 MiB: %v", err)
	}
	if _, err = runner.Run(t.Context(), RunRequest{Block: e, Stdin: make([]byte, MaxStdin+1)}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("more than 64 MiB: %v", err)
	}
	x.out = record.Output{Exit: 3}
	if got, err = runner.Run(t.Context(), RunRequest{Block: e}); err != nil || got.Status != (ExecutionStatus{Failed, "exit code 3"}) || got.Forge.Status != got.Status {
		t.Errorf("a failure: %+v, %v", got.Status, err)
	}
	x.err = errdef.ErrUnavailable
	if _, err = runner.Run(t.Context(), RunRequest{Block: e}); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("no engine: %v", err)
	}
}

func TestRunnerGate(t *testing.T) {
	t.Parallel()
	r, x := open(t, t.TempDir()), &echo{}
	runner := Runner{Registry: r, Executor: x}
	data := read(t, filepath.Join(examples, "commit-id", FileName))
	loose, err := NewEntry(data, nil)
	if err != nil {
		t.Fatal(err)
	}
	run := func(e Entry, level TrustLevel) error {
		_, runErr := runner.Run(t.Context(), RunRequest{Block: e, Level: level})
		return runErr
	}
	if err = run(loose, One); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("nobody has approved it: %v", err)
	}
	if err = run(loose, Two); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("what it requires is not there: %v", err)
	}
	git := add(t, r, read(t, filepath.Join(examples, "git-env", FileName)))
	if err = run(loose, Two); err != nil {
		t.Error(err)
	}
	e := add(t, r, data)
	if err = run(e, Zero); !errors.Is(err, errdef.ErrDenied) || err.Error() != "denied: run block commit-id: it needs trust level One, the caller has Zero" {
		t.Errorf("at level Zero: %v", err)
	}
	if err = run(e, One); err != nil {
		t.Error(err)
	}
	// What a caller says of a block in the registry counts for nothing.
	forged := e
	forged.Spec.MinimumTrustLevel, forged.Spec.Run.Command = Zero, []string{"evil"}
	if err = run(forged, Zero); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("forged: %v", err)
	}
	if err = run(forged, One); err != nil || x.jobs[len(x.jobs)-1].Input.Argv[0] != "sh" {
		t.Errorf("forged: %v, %+v", err, x.jobs[len(x.jobs)-1].Input.Argv)
	}
	s := statement("k", "rec", Mismatch)
	s.Runs = 2
	if _, err = r.AddStatement(git.Ref.Digest, s); err != nil {
		t.Fatal(err)
	}
	for _, quarantined := range []Entry{git, e, loose} {
		if err = run(quarantined, Three); !errors.Is(err, errdef.ErrDenied) || errdef.Hint(err) == "" {
			t.Errorf("%s: %v", quarantined.Ref, err)
		}
	}
	req := RunRequest{Block: git, Level: One, Quarantined: true}
	if _, err = runner.Run(t.Context(), req); !errors.Is(err, errdef.ErrDenied) {
		t.Errorf("in quarantine at level One: %v", err)
	}
	req.Level = Two
	if _, err = runner.Run(t.Context(), req); err != nil {
		t.Error(err)
	}
}

// A caller at level One runs an approved composition with one part swapped, and
// nothing else that is not approved.
func TestRunnerSwap(t *testing.T) {
	t.Parallel()
	r, x := open(t, t.TempDir()), &echo{}
	runner := Runner{Registry: r, Executor: x}
	git := "[[provides]]\nname = \"git-cli\"\nversion = %q"
	add(t, r, file("git", "2.0.0", fmt.Sprintf(git, "2.0.0")))
	newer := add(t, r, file("git", "2.1.0", fmt.Sprintf(git, "2.1.0")))
	app := add(t, r, file("app", "1.0.0", "[[requires]]\nname = \"git-cli\"\nversion = \"=2.0.0\""))
	app2 := add(t, r, file("app", "1.1.0", "[[requires]]\nname = \"git-cli\"\nversion = \"2\""))
	compose := func(root Entry, version SemVer) Entry {
		resolution, err := Resolve(root, r.List(), ResolveOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := Compose(Two, Title{Name: "stack", Version: version, Author: "tine"}, resolution)
		if err != nil {
			t.Fatal(err)
		}
		return entryOf(t, s)
	}
	data, err := compose(app2, SemVer{1, 0, 0}).Spec.Encode()
	if err != nil {
		t.Fatal(err)
	}
	approved := add(t, r, data)
	older, err := r.Get("git@2.0.0")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Swap(One, Title{Name: "stack", Version: SemVer{1, 0, 1}, Author: "me"}, approved.Spec, "git", older, r.List())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(approved.Spec.ComposedOf, newer.Ref) || !slices.Contains(s.ComposedOf, older.Ref) {
		t.Fatalf("%v became %v", approved.Spec.ComposedOf, s.ComposedOf)
	}
	swapped := entryOf(t, s)
	evil := swapped
	evil.Spec.Run.Command = []string{"evil"}
	for _, c := range []struct {
		what   string
		e      Entry
		needed TrustLevel
	}{
		{"swapped", swapped, One},
		{"another command", evil, Two},
		{"two parts differ", compose(app, SemVer{1, 0, 2}), Two},
	} {
		for level := Zero; level <= Three; level++ {
			_, err := runner.Run(t.Context(), RunRequest{Block: c.e, Level: level})
			if allowed := err == nil; allowed != (level >= c.needed) || !allowed && !errors.Is(err, errdef.ErrDenied) {
				t.Errorf("%s at level %s: %v", c.what, level, err)
			}
		}
	}
}

// A composition does not run while a part of it is in quarantine.
func TestRunnerQuarantinedPart(t *testing.T) {
	t.Parallel()
	r := open(t, t.TempDir())
	part := add(t, r, file("part", "1.0.0"))
	whole := add(t, r, file("whole", "1.0.0", `composed_of = ["`+part.Ref.String()+`"]`))
	runner := Runner{Registry: r, Executor: &echo{}}
	if _, err := runner.Run(t.Context(), RunRequest{Block: whole}); err != nil {
		t.Fatal(err)
	}
	s := statement("k", "rec", Mismatch)
	s.Runs = 2
	if _, err := r.AddStatement(part.Ref.Digest, s); err != nil {
		t.Fatal(err)
	}
	_, err := runner.Run(t.Context(), RunRequest{Block: whole, Level: Three})
	if want := "denied: run block whole@1.0.0: block part@1.0.0 is quarantined: running it again came to another result"; err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	if trust, err := r.Trust(whole.Ref.Digest); err != nil || trust.Status != Unproven {
		t.Errorf("%+v, %v", trust, err)
	}
}

func entryOf(t *testing.T, s Spec) Entry {
	t.Helper()
	data, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEntry(data, nil)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// git-env says what Forge's hash of its output is.
func TestGitEnvHash(t *testing.T) {
	t.Parallel()
	if text := read(t, filepath.Join(examples, "git-env", FileName)); !bytes.Contains(text, []byte(ForgeHash([]byte("git-env\n"), nil).String())) {
		t.Error("the hash in the file is another")
	}
}
