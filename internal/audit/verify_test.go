package audit

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write testdata anew")

// sample is a log of several files, and all that is in its directory.
func sample(t *testing.T) (string, map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	for range 2 {
		l := openLog(t, Config{Dir: dir, MaxSize: 2000})
		for i := range 8 {
			act(t, l, fmt.Sprintf("sb-%d", i))
		}
		shut(t, l)
	}
	wantGood(t, dir)
	all, err := names(dir)
	if err != nil {
		t.Fatal(err)
	}
	content := map[string][]byte{}
	for _, name := range append(all, headName) {
		if content[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir, content
}

// put makes the directory hold exactly content.
func put(t *rapid.T, dir string, content map[string][]byte) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err = os.Remove(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
	for name, data := range content {
		if err = os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func drawFile(t *rapid.T, content map[string][]byte, lines bool) string {
	var all []string
	for name := range content {
		if !lines || name != headName {
			all = append(all, name)
		}
	}
	slices.Sort(all)
	return rapid.SampledFrom(all).Draw(t, "file")
}

// Whatever is done to a log, it is found, and what was not touched is good.
func TestLawAnyChangeIsFound(t *testing.T) {
	t.Parallel()
	_, good := sample(t)
	dir := t.TempDir()
	tampering := map[string]func(*rapid.T, map[string][]byte){
		"byte": func(t *rapid.T, c map[string][]byte) {
			name := drawFile(t, c, false)
			at := rapid.IntRange(0, len(c[name])-1).Draw(t, "at")
			c[name][at] ^= byte(rapid.IntRange(1, 255).Draw(t, "xor"))
		},
		"delete-byte": func(t *rapid.T, c map[string][]byte) {
			name := drawFile(t, c, false)
			at := rapid.IntRange(0, len(c[name])-1).Draw(t, "at")
			c[name] = slices.Delete(c[name], at, at+1)
		},
		"insert-byte": func(t *rapid.T, c map[string][]byte) {
			name := drawFile(t, c, false)
			at := rapid.IntRange(0, len(c[name])).Draw(t, "at")
			c[name] = slices.Insert(c[name], at, rapid.Byte().Draw(t, "byte"))
		},
		"truncate": func(t *rapid.T, c map[string][]byte) {
			name := drawFile(t, c, false)
			c[name] = c[name][:rapid.IntRange(0, len(c[name])-1).Draw(t, "to")]
		},
		"remove-file": func(t *rapid.T, c map[string][]byte) { delete(c, drawFile(t, c, false)) },
		"swap-files": func(t *rapid.T, c map[string][]byte) {
			a, b := drawFile(t, c, true), drawFile(t, c, true)
			if a == b {
				t.Skip("the same")
			}
			c[a], c[b] = c[b], c[a]
		},
		"remove-line": lineLaw(func(t *rapid.T, lines [][]byte) [][]byte {
			at := rapid.IntRange(0, len(lines)-1).Draw(t, "line")
			return slices.Delete(lines, at, at+1)
		}),
		"swap-lines": lineLaw(func(t *rapid.T, lines [][]byte) [][]byte {
			a, b := rapid.IntRange(0, len(lines)-1).Draw(t, "a"), rapid.IntRange(0, len(lines)-1).Draw(t, "b")
			if a == b {
				t.Skip("the same")
			}
			lines[a], lines[b] = lines[b], lines[a]
			return lines
		}),
		"duplicate-line": lineLaw(func(t *rapid.T, lines [][]byte) [][]byte {
			from, to := rapid.IntRange(0, len(lines)-1).Draw(t, "from"), rapid.IntRange(0, len(lines)).Draw(t, "to")
			return slices.Insert(lines, to, lines[from])
		}),
		"forged-line": lineLaw(func(t *rapid.T, lines [][]byte) [][]byte { // by somebody who knows the format
			at := rapid.IntRange(0, len(lines)-1).Draw(t, "line")
			r, err := decode(bytes.TrimSuffix(lines[at], []byte("\n")))
			if err != nil {
				t.Fatal(err)
			}
			r.Actor = "token:somebody-else"
			line, err := encode(r)
			if err != nil {
				t.Fatal(err)
			}
			lines[at] = append(line, '\n')
			return lines
		}),
	}
	for name, tamper := range tampering {
		t.Run(name, func(t *testing.T) { //nolint:paralleltest // they share a directory
			rapid.Check(t, func(t *rapid.T) {
				content := map[string][]byte{}
				for name, data := range good {
					content[name] = slices.Clone(data)
				}
				put(t, dir, content)
				if report, err := Verify(t.Context(), dir, VerifyOptions{}); err != nil || !report.OK {
					t.Fatalf("untouched: %v %+v", err, report.Problems)
				}
				tamper(t, content)
				put(t, dir, content)
				report, err := Verify(t.Context(), dir, VerifyOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if report.OK {
					t.Fatal("not found")
				}
				for _, p := range report.Problems {
					if p.Kind == "" || p.File == "" || p.Detail == "" {
						t.Errorf("a problem without a place: %+v", p)
					}
				}
			})
		})
	}
}

func lineLaw(change func(*rapid.T, [][]byte) [][]byte) func(*rapid.T, map[string][]byte) {
	return func(t *rapid.T, c map[string][]byte) {
		name := drawFile(t, c, true)
		lines := slices.Collect(bytes.Lines(c[name]))
		c[name] = slices.Concat(change(t, lines)...)
	}
}

// What is wrong is said to be where it is.
func TestPlaces(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir})
	for range 5 {
		act(t, l, "sb-1")
	}
	shut(t, l)
	path := filepath.Join(dir, activeName)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good := strings.SplitAfter(strings.TrimSuffix(string(data), "\n"), "\n")
	good[9] += "\n"
	tests := map[string]struct {
		lines []string
		want  Problem
	}{
		"changed":        {slices.Replace(slices.Clone(good), 3, 4, strings.Replace(good[3], "sb-1", "sb-2", 1)), Problem{Kind: Changed, File: activeName, Line: 4, Seq: 4}},
		"no-line":        {slices.Replace(slices.Clone(good), 3, 4, "{}\n"), Problem{Kind: Changed, File: activeName, Line: 4, Seq: 4}},
		"changed-last":   {slices.Replace(slices.Clone(good), 9, 10, strings.Replace(good[9], "sb-1", "sb-2", 1)), Problem{Kind: Changed, File: activeName, Line: 10, Seq: 10}},
		"removed":        {slices.Delete(slices.Clone(good), 3, 5), Problem{Kind: Removed, File: activeName, Line: 4, Seq: 4}},
		"removed-first":  {good[1:], Problem{Kind: Removed, File: activeName, Line: 1, Seq: 1}},
		"inserted":       {slices.Insert(slices.Clone(good), 7, good[2]), Problem{Kind: Inserted, File: activeName, Line: 8, Seq: 3}},
		"truncated":      {good[:8], Problem{Kind: Truncated, File: headName, Seq: 9}},
		"nothing-at-all": {nil, Problem{Kind: Truncated, File: headName, Seq: 1}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) { //nolint:paralleltest // they share a directory
			if err := os.WriteFile(path, []byte(strings.Join(tt.lines, "")), 0o600); err != nil {
				t.Fatal(err)
			}
			report := verified(t, dir)
			if len(report.Problems) == 0 {
				t.Fatal("not found")
			}
			got := report.Problems[0]
			got.Detail = ""
			if got != tt.want {
				t.Errorf("got %+v, want %+v (%+v)", got, tt.want, report.Problems)
			}
		})
	}
}

// The log in testdata is for other implementations, and must stay as it is.
func TestVector(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	clock := time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)
	l := openLog(t, Config{Dir: dir, MaxSize: 2000, now: func() time.Time { clock = clock.Add(1500 * time.Microsecond); return clock }})
	for _, r := range []Record{
		{Phase: Event, Action: "daemon.start", Actor: Daemon, Note: "version 1.2.3"},
		{Phase: Intent, Action: "sandbox.create", Actor: Token("ci"), Digest: Digest([]byte(`{"snapshot_tag":"py"}`)), Method: "POST", Remote: "loopback", RequestID: "r1", Route: "POST /v1/sandboxes"},
		{
			Phase: Outcome, Action: "sandbox.create", Actor: Token("ci"), Digest: Digest([]byte(`{"snapshot_tag":"py"}`)), Intent: 2, LatencyUS: 98342, Made: []string{"sb-k3v7xq2m4tza"},
			Method: "POST", Path: "/v1/sandboxes", Remote: "loopback", RequestID: "r1", Result: OK, Route: "POST /v1/sandboxes", Status: 201, UA: "Python-urllib/3.11 \"quoted\" <é>",
		},
		{Phase: Outcome, Action: "auth.failure", Actor: Anonymous, Code: "denied", LatencyUS: 41, Method: "GET", Path: "/v1/sandboxes", Remote: "tcp", RequestID: "r2", Result: Error, Status: 401},
		{Phase: Event, Action: "sandbox.expired", Actor: Daemon, Object: "sb-k3v7xq2m4tza"},
	} {
		if err := l.Keep(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	shut(t, l)
	wantGood(t, dir)
	all, err := names(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(all, headName) {
		got, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if *update {
			if err = errors.Join(os.MkdirAll("testdata/vector", 0o750), os.WriteFile(filepath.Join("testdata/vector", name), got, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(filepath.Join("testdata/vector", name))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %v, got\n%s", name, err, got)
		}
	}
	wantGood(t, "testdata/vector")
}

// Any record comes back as it was bounded, and in one form only.
func TestLawRecordRoundTrip(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.OneOf(rapid.String(), rapid.Custom(func(t *rapid.T) string {
			return string(rapid.SliceOf(rapid.Byte()).Draw(t, "bytes"))
		}), rapid.Just(strings.Repeat(`"\`, 5000)), rapid.Just("\u2028<&>\ufffd"))
		r := Record{
			V: version, Seq: 7, Prev: noHash, TS: "2026-11-21T12:00:00.000000000Z", Phase: Intent,
			Action: text.Draw(t, "action"), Actor: text.Draw(t, "actor"), Path: text.Draw(t, "path"), UA: text.Draw(t, "ua"),
			Note: text.Draw(t, "note"), Object: text.Draw(t, "object"), Route: text.Draw(t, "route"), Made: rapid.SliceOf(text).Draw(t, "made"),
		}
		if len(r.Made) == 0 {
			r.Made = nil
		}
		r.bound()
		line, err := encode(r)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.ContainsAny(line, "\n\r\x00") || len(line) > maxLine {
			t.Fatalf("line: %q", line)
		}
		again, err := decode(line)
		if err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if seqOf(line) != r.Seq {
			t.Fatalf("looks like line %d: %s", seqOf(line), line)
		}
		if fmt.Sprintf("%#v", again) != fmt.Sprintf("%#v", r) {
			t.Fatalf("got  %#v\nwant %#v", again, r)
		}
	})
}

func FuzzDecode(f *testing.F) {
	r := Record{
		V: version, Seq: 7, Prev: noHash, TS: "2026-11-21T12:00:00.000000001Z", Phase: Outcome, Status: 200, Made: []string{"sb-1"}, Open: []uint64{1},
		LatencyUS: 5, Result: OK, Path: "/v1/sandboxes", Method: "POST", UA: "Python-urllib/3.11",
	}
	line, err := encode(r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(line)
	f.Add(bytes.Replace(line, []byte(`"v":1`), []byte(`"v":2`), 1))
	f.Add([]byte(`{"seq":18446744073709551615}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := decode(line)
		if err != nil {
			return
		}
		again, err := encode(r)
		if seqOf(line) != r.Seq {
			t.Errorf("%q looks like line %d, and is %d", line, seqOf(line), r.Seq)
		}
		if err != nil || !bytes.Equal(again, line) {
			t.Errorf("%q is read as %q, %v", line, again, err)
		}
		if r.Time().IsZero() && !strings.HasPrefix(r.TS, "0001-01-01T00:00:00.000000000Z") {
			t.Errorf("time of %q", line)
		}
	})
}

// FuzzOpen begins with any file and any head: a log can always be opened, and
// from then on it grows as one does.
func FuzzOpen(f *testing.F) {
	head, err := encodeHead(head{V: version, Seq: 3, Hash: noHash})
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("half"), head)
	f.Add([]byte("{}\n{}\n"), []byte("{}"))
	f.Fuzz(func(t *testing.T, file, head []byte) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{activeName: file, headName: head} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		l := openLog(t, Config{Dir: dir, Sync: SyncNever})
		act(t, l, "sb-1")
		shut(t, l)
		report := verified(t, dir)
		if report.Ahead != 0 || report.Last < 2 {
			t.Errorf("report: %+v", report)
		}
	})
}
