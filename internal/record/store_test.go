package record

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func TestAppendAndGet(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	first := appendDraft(t, s, testDraft())
	second := appendDraft(t, s, testDraft())
	if first.Record.Chain != (Chain{1, firstDigest}) || second.Record.Chain != (Chain{2, first.Digest}) {
		t.Errorf("%+v, %+v", first.Record.Chain, second.Record.Chain)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	for _, prefix := range []string{second.Record.ID, second.Record.ID[:13], strings.ToUpper(second.Record.ID)} {
		got, err := s.Get(prefix)
		if err != nil || !bytes.Equal(got.Bytes, second.Bytes) {
			t.Errorf("get %s: %v", prefix, err)
		}
	}
	for prefix, want := range map[string]error{"": errdef.ErrInvalid, "abc": errdef.ErrInvalid, "zzzz": errdef.ErrNotFound, strings.Repeat("a", 99): errdef.ErrInvalid} {
		if _, err := s.Get(prefix); !errors.Is(err, want) {
			t.Errorf("get %q: %v, want %v", prefix, err, want)
		}
	}
	s.places = append(s.places, place{3, second.Record.ID[:20] + "x"})
	if _, err := s.Get(second.Record.ID[:13]); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("two of one prefix: %v", err)
	}
	in, err := LoadInput(second.Record, s)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testDraft().Input, in); diff != "" {
		t.Error(diff)
	}
	usage := s.Usage()
	if usage.Contents != 5 || usage.ContentBytes != 6+12+14+31+4 { // each once, though two records name them
		t.Errorf("%+v", usage)
	}
}

func TestOneProcessWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := openStore(t, dir)
	if _, err := Open(t.Context(), testConfig(dir)); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("opened twice: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Append(t.Context(), testDraft()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("append after close: %v", err)
	}
	openStore(t, dir)
}

func TestConcurrentWriters(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			for n := range 5 {
				d := testDraft()
				d.Output.Stdout = []byte(strconv.Itoa(100*g + n%2)) // some the same
				if _, err := s.Append(t.Context(), d); err != nil {
					t.Error(err)
				}
				if _, err := s.List(t.Context(), Filter{Limit: 3}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if report := check(t, s); !report.OK || report.Records != 30 || report.Last != 30 {
		t.Errorf("%+v", report)
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	now := cfg.now()
	cfg.now = func() time.Time { now = now.Add(time.Minute); return now }
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	var made []Envelope
	for i := range 6 {
		d := testDraft()
		if i%2 == 1 {
			d.Block, d.User, d.Mode = "", "unix:0", Normal
			d.Input.Seed, d.Input.Start, d.Output.Virtual = 0, time.Time{}, 0
			d.Environment.SnapshotTag, d.Environment.Snapshot = "node", Digest([]byte("node"))
		}
		made = append(made, appendDraft(t, s, d))
	}
	tests := map[string]struct {
		f    Filter
		want []uint64
		next uint64
	}{
		"all":           {Filter{}, []uint64{6, 5, 4, 3, 2, 1}, 0},
		"first-page":    {Filter{Limit: 4}, []uint64{6, 5, 4, 3}, 3},
		"next-page":     {Filter{Limit: 4, Before: 3}, []uint64{2, 1}, 0},
		"exact-page":    {Filter{Limit: 6}, []uint64{6, 5, 4, 3, 2, 1}, 0},
		"block":         {Filter{Block: "git-env", Limit: 2}, []uint64{5, 3}, 3},
		"user":          {Filter{User: "unix:0"}, []uint64{6, 4, 2}, 0},
		"mode":          {Filter{Mode: Normal}, []uint64{6, 4, 2}, 0},
		"snapshot-tag":  {Filter{Snapshot: "py"}, []uint64{5, 3, 1}, 0},
		"snapshot":      {Filter{Snapshot: Digest([]byte("node"))}, []uint64{6, 4, 2}, 0},
		"since":         {Filter{Since: made[3].Record.Created}, []uint64{6, 5, 4}, 0},
		"nothing":       {Filter{Block: "no"}, nil, 0},
		"before-all":    {Filter{Before: 1}, nil, 0},
		"block-and-day": {Filter{Block: "git-env", Since: made[3].Record.Created}, []uint64{5}, 0},
	}
	for name, tt := range tests {
		page, listErr := s.List(t.Context(), tt.f)
		if listErr != nil {
			t.Fatal(listErr)
		}
		var got []uint64
		for _, e := range page.Records {
			got = append(got, e.Record.Chain.Seq)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" || page.Next != tt.next {
			t.Errorf("%s: next %d, want %d:\n%s", name, page.Next, tt.next, diff)
		}
	}
	for _, f := range []Filter{{Limit: -1}, {Limit: 1001}, {Mode: "magic"}} {
		if _, err = s.List(t.Context(), f); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%+v: %v", f, err)
		}
	}
	write(t, recordFile(s, made[2]), []byte("{}\n"))
	page, err := s.List(t.Context(), Filter{})
	if err != nil || len(page.Records) != 5 || len(page.Unreadable) != 1 {
		t.Errorf("with one that cannot be read: %d, %v, %v", len(page.Records), page.Unreadable, err)
	}
}

// What cannot be recorded leaves nothing behind.
func TestInvalidDrafts(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	tests := map[string]func(*Draft){
		"no-command":         func(d *Draft) { d.Input.Argv = nil },
		"empty-command":      func(d *Draft) { d.Input.Argv = []string{""} },
		"not-utf8":           func(d *Draft) { d.Input.Argv = []string{"a\xff"} },
		"nul":                func(d *Draft) { d.Input.Argv = []string{"a\x00b"} },
		"too-much-text":      func(d *Draft) { d.Input.Argv = []string{strings.Repeat("a", MaxText+1)} },
		"variable":           func(d *Draft) { d.Input.Env = []string{"NOVALUE"} },
		"relative-cwd":       func(d *Draft) { d.Input.Cwd = "srv" },
		"relative-file":      func(d *Draft) { d.Input.Files[0].Path = "job" },
		"dirty-file":         func(d *Draft) { d.Input.Files[0].Path = "/srv/../job" },
		"file-mode":          func(d *Draft) { d.Input.Files[0].Mode = 0o100644 },
		"collect-twice":      func(d *Draft) { d.Input.Collect = []string{"/a", "/a"} },
		"uncollected":        func(d *Draft) { d.Input.Collect = nil },
		"wrong-order":        func(d *Draft) { d.Output.Files = []File{{"/srv/b", 0, nil}, {"/srv/a", 0, nil}} },
		"negative-limit":     func(d *Draft) { d.Input.Limits.Output = -1 },
		"mode":               func(d *Draft) { d.Mode = "" },
		"normal-with-seed":   func(d *Draft) { d.Mode = Normal },
		"no-start":           func(d *Draft) { d.Input.Start = time.Time{} },
		"no-snapshot":        func(d *Draft) { d.Environment.Snapshot = "py" },
		"no-engine":          func(d *Draft) { d.Environment.Engine = "" },
		"no-icount":          func(d *Draft) { d.Environment.Icount = nil },
		"newline-in-user":    func(d *Draft) { d.User = "a\nb" },
		"long-block":         func(d *Draft) { d.Block = strings.Repeat("b", 257) },
		"parent":             func(d *Draft) { d.Parent = "abcd" },
		"unknown-rule":       func(d *Draft) { d.Rules.Files = []string{"no"} },
		"memory":             func(d *Draft) { d.Output.Memory = "sha256:ABC" },
		"signal-with-escape": func(d *Draft) { d.Output.Signal = "\x1b[2J" },
	}
	ofInput := 0
	for name, spoil := range tests {
		d := testDraft()
		spoil(&d)
		if err := d.Input.Validate(); err != nil {
			ofInput++
		}
		if _, err := s.Append(t.Context(), d); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := testDraft().Input.Validate(); err != nil || ofInput != 12 {
		t.Errorf("%d inputs cannot be recorded, of a good one: %v", ofInput, err)
	}
	if u := s.Usage(); u.Records != 0 || u.Contents != 0 {
		t.Errorf("%+v", u)
	}
}

// What the guest came to is recorded whatever it was.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	tests := map[string]Output{
		"nothing":      {},
		"signal":       {Exit: -1, Signal: "SIGSEGV", Virtual: 1},
		"timed-out":    {Exit: -1, Signal: "SIGKILL", Failure: "timed out", Stdout: []byte("half"), Virtual: 10 * time.Second},
		"output-limit": {Exit: -1, Failure: "output limit", Stdout: bytes.Repeat([]byte("y\n"), 1000)},
		"not-found":    {Exit: -1, Failure: "not found"},
		"binary":       {Stdout: allBytes(), Stderr: []byte("\x1b[31m\u2028</script>")},
		"memory":       {Memory: Digest([]byte("RAM"))},
	}
	for name, out := range tests {
		d := testDraft()
		d.Output = out
		e := appendDraft(t, s, d)
		got, err := LoadOutput(e.Record, s)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(out, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
		v, err := Compare(e.Record, s, Fresh{Environment: d.Environment, Input: d.Input, Output: out})
		if err != nil || v.Result != Verified {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	if report := check(t, s); !report.OK {
		t.Errorf("%+v", report)
	}
}

func TestEmptyAndLargeInput(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	for _, size := range []int{0, 64 << 20} {
		d := testDraft()
		d.Input.Stdin = make([]byte, size)
		e := appendDraft(t, s, d)
		in, err := LoadInput(e.Record, s)
		if err != nil || len(in.Stdin) != size {
			t.Errorf("%d bytes came back as %d: %v", size, len(in.Stdin), err)
		}
		if HashInput(e.Record.Environment.Snapshot, in) != e.Record.Hashes.Tine.Input {
			t.Errorf("%d bytes: another hash", size)
		}
	}
	d := testDraft()
	d.Input.Stdin = make([]byte, MaxBlob+1)
	if _, err := s.Append(t.Context(), d); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("more than MaxBlob: %v", err)
	}
}

func TestFullStore(t *testing.T) {
	t.Parallel()
	cfg := testConfig(t.TempDir())
	cfg.MaxBytes = 200
	s, err := Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	appendDraft(t, s, testDraft())
	d := testDraft()
	d.Output.Stdout = make([]byte, 200)
	if _, err = s.Append(t.Context(), d); !errors.Is(err, errdef.ErrExhausted) || errdef.Hint(err) == "" {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = s.Append(ctx, testDraft()); !errors.Is(err, context.Canceled) {
		t.Errorf("called off: %v", err)
	}
}

// A store without its key or its head is not begun anew behind what is there.
func TestOpenRefusesToForget(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(dir string) error{
		"key-gone":  func(dir string) error { return os.Remove(filepath.Join(dir, keyDir, keyName)) },
		"head-gone": func(dir string) error { return os.Remove(filepath.Join(dir, headName)) },
		"head-bad":  func(dir string) error { return os.WriteFile(filepath.Join(dir, headName), []byte("{}\n"), 0o600) },
		"head-dir": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, headName)), os.Mkdir(filepath.Join(dir, headName), 0o700))
		},
		"other-head": func(dir string) error { return writeHead(dir, head{0, firstDigest}, testKey()) },
	} {
		dir := t.TempDir()
		s := openStore(t, dir)
		appendDraft(t, s, testDraft())
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err := spoil(dir); err != nil {
			t.Fatal(err)
		}
		if again, err := Open(t.Context(), testConfig(dir)); err == nil {
			t.Errorf("%s: it opened", name)
			again.Close()
		} else if name != "head-dir" && (!errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
