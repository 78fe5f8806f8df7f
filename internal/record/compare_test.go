package record

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func freshOf(d Draft) Fresh {
	return Fresh{Environment: d.Environment, Input: d.Input, Output: d.Output, Started: d.Started.Add(time.Hour)}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	e, contents := testEnvelope(t)
	old := &Bundle{contents: contents}
	shift := 3
	tests := map[string]struct {
		change func(*Fresh)
		want   Result
		differ string
	}{
		"same":        {func(f *Fresh) { f.Output.Wall = 99 }, Verified, ""},
		"stdout":      {func(f *Fresh) { f.Output.Stdout = []byte("one\ntwX\nthree\n") }, Mismatch, "stdout"},
		"stderr":      {func(f *Fresh) { f.Output.Stderr = nil }, Mismatch, "stderr"},
		"exit":        {func(f *Fresh) { f.Output.Exit = 1 }, Mismatch, "exit code"},
		"signal":      {func(f *Fresh) { f.Output.Exit, f.Output.Signal = -1, "SIGSEGV" }, Mismatch, "exit code, signal"},
		"failure":     {func(f *Fresh) { f.Output.Failure = "timed out" }, Mismatch, "failure"},
		"virtual":     {func(f *Fresh) { f.Output.Virtual++ }, Mismatch, "virtual time"},
		"file":        {func(f *Fresh) { f.Output.Files = []File{{"/srv/b", 0o600, []byte("x")}} }, Mismatch, "file /srv/b"},
		"file-mode":   {func(f *Fresh) { f.Output.Files = []File{{"/srv/b", 0o644, []byte{0, 1, 2, 255}}} }, Mismatch, "mode of /srv/b"},
		"other-file":  {func(f *Fresh) { f.Output.Files[0].Path = "/srv/a" }, Mismatch, "file /srv/b, file /srv/a"},
		"only-pid":    {func(f *Fresh) { f.Output.Stderr = []byte("pid 18 at 2026-11-21T12:00:01Z\n") }, Mismatch, "stderr"},
		"no-memory":   {func(f *Fresh) { f.Output.Memory = Digest(nil) }, Verified, ""},
		"snapshot":    {func(f *Fresh) { f.Environment.Snapshot = Digest(nil) }, CannotCompare, ""},
		"tag-only":    {func(f *Fresh) { f.Environment.SnapshotTag = "other" }, Verified, ""},
		"input":       {func(f *Fresh) { f.Input.Seed++ }, CannotCompare, ""},
		"engine":      {func(f *Fresh) { f.Environment.EngineVersion = "9.0"; f.Output.Exit = 1 }, CannotCompare, "exit code"},
		"engine-same": {func(f *Fresh) { f.Environment.EngineVersion = "9.0" }, Verified, ""},
		"icount":      {func(f *Fresh) { f.Environment.Icount = &shift; f.Output.Virtual *= 2 }, CannotCompare, "virtual time"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			fresh := freshOf(testDraft())
			tt.change(&fresh)
			v, err := Compare(e.Record, old, fresh)
			if err != nil {
				t.Fatal(err)
			}
			var what []string
			for _, d := range v.Differences {
				what = append(what, d.What)
			}
			if v.Result != tt.want || strings.Join(what, ", ") != tt.differ {
				t.Errorf("%+v", v)
			}
			if (v.Result == CannotCompare) != (len(v.Missing) > 0) || v.Worth == "" {
				t.Errorf("%+v", v)
			}
			if name == "engine-same" && len(v.Notes) == 0 {
				t.Error("nothing says that it ran elsewhere")
			}
		})
	}
}

func TestCompareMemory(t *testing.T) {
	t.Parallel()
	d := testDraft()
	d.Output.Memory = Digest([]byte("RAM"))
	s := openStore(t, t.TempDir())
	e := appendDraft(t, s, d)
	fresh := freshOf(d)
	fresh.Output.Memory = Digest([]byte("other RAM"))
	v, err := Compare(e.Record, s, fresh)
	if err != nil || v.Result != Mismatch || len(v.Differences) != 1 || v.Differences[0].What != "guest memory" {
		t.Errorf("%+v, %v", v, err)
	}
}

// Of a normal run the canonical output counts, and the verdict says what it is
// worth.
func TestCompareNormal(t *testing.T) {
	t.Parallel()
	d := testDraft()
	d.Mode, d.Input.Seed, d.Input.Start, d.Output.Virtual = Normal, 0, time.Time{}, 0
	d.Output.Stderr = []byte("pid 17 at 2026-11-21T12:00:01Z\n")
	s := openStore(t, t.TempDir())
	e := appendDraft(t, s, d)
	fresh := freshOf(d)
	fresh.Output.Stderr = []byte("pid 4711 at 2026-11-22T01:02:03Z\n")
	v, err := Compare(e.Record, s, fresh)
	if err != nil || v.Result != Verified || len(v.Notes) != 1 || len(v.Differences) != 1 || !strings.Contains(v.Worth, "no proof") {
		t.Errorf("%+v, %v", v, err)
	}
	fresh.Output.Stderr = []byte("pid unknown\n")
	if v, err = Compare(e.Record, s, fresh); err != nil || v.Result != Mismatch {
		t.Errorf("%+v, %v", v, err)
	}
	if report := check(t, s); !report.OK {
		t.Errorf("%+v", report)
	}
}

func TestDiff(t *testing.T) {
	t.Parallel()
	e, contents := testEnvelope(t)
	fresh := freshOf(testDraft())
	fresh.Output.Stdout = []byte("one\ntwo\nth\x1bee\nfour")
	v, err := Compare(e.Record, &Bundle{contents: contents}, fresh)
	if err != nil {
		t.Fatal(err)
	}
	at := int64(10)
	want := Difference{
		What: "stdout", Recorded: describe(blobOf([]byte("one\ntwo\nthree\n"))), Fresh: describe(blobOf(fresh.Output.Stdout)),
		Offset: &at, Line: 3,
		Diff: []string{"  one", "  two", "- three", `+ "th\x1bee"`, "+ four (no end of line)"},
	}
	if diff := cmp.Diff([]Difference{want}, v.Differences); diff != "" {
		t.Error(diff)
	}
	for name, from := range map[string]Source{"nothing-at-hand": nil, "not-these": &Bundle{}} {
		if v, err = Compare(e.Record, from, fresh); err != nil || v.Result != Mismatch || v.Differences[0].Offset != nil {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	long := bytes.Repeat([]byte("x"), 1<<20)
	other := bytes.Clone(long)
	other[1<<19] = 'y'
	for _, line := range diffAt(long, other, firstDifference(long, other)) {
		if len(line) > 300 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	if got := diffAt([]byte("a\n"), []byte("a\nb\n"), 2); cmp.Diff(got, []string{"  a", "- (end)", "+ b"}) != "" {
		t.Errorf("%q", got)
	}
}
