package record

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
)

// five is a store of five records, and its records.
func five(t *testing.T) (*Store, []Envelope) {
	t.Helper()
	s := openStore(t, t.TempDir())
	var all []Envelope
	for i := range 5 {
		d := testDraft()
		d.Output.Stdout = fmt.Appendf(nil, "run %d\n", i)
		all = append(all, appendDraft(t, s, d))
	}
	return s, all
}

func TestCheck(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		spoil func(t *testing.T, s *Store, all []Envelope)
		want  string
		seq   uint64
	}{
		"good": {func(*testing.T, *Store, []Envelope) {}, "", 0},
		"removed-first": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			remove(t, recordFile(s, all[0]))
		}, Removed, 1},
		"removed": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			remove(t, recordFile(s, all[2]))
		}, Removed, 3},
		"truncated": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			remove(t, recordFile(s, all[4]))
			remove(t, recordFile(s, all[3]))
		}, Truncated, 4},
		"emptied": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			for _, e := range all {
				remove(t, recordFile(s, e))
			}
		}, Truncated, 1},
		"reordered-with-their-names": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			write(t, recordFile(s, all[1]), append(all[2].Bytes, '\n'))
			write(t, recordFile(s, all[2]), append(all[1].Bytes, '\n'))
		}, Changed + " " + Changed, 2},
		"renamed": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			rename(t, recordFile(s, all[4]), filepath.Join(s.cfg.Dir, chainDir, place{6, all[4].Record.ID}.name()))
		}, Removed + " " + Changed, 5},
		"a-copy-behind-it": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			id := "ffffffff" + all[2].Record.ID[8:]
			write(t, filepath.Join(s.cfg.Dir, chainDir, place{3, id}.name()), append(all[2].Bytes, '\n'))
		}, Inserted, 3},
		"replaced-by-another-that-the-key-signed": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			r := all[2].Record
			r.User = "token:mallory"
			e, err := sign(r, s.key)
			if err != nil {
				t.Fatal(err)
			}
			write(t, recordFile(s, all[2]), append(e.Bytes, '\n'))
		}, Changed, 4},
		"last-replaced": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			r := all[4].Record
			r.User = "token:mallory"
			e, err := sign(r, s.key)
			if err != nil {
				t.Fatal(err)
			}
			write(t, recordFile(s, all[4]), append(e.Bytes, '\n'))
		}, Changed, 5},
		"signed-by-another": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			r := all[4].Record
			r.KeyID = testKey().Public().ID()
			e, err := sign(r, testKey())
			if err != nil {
				t.Fatal(err)
			}
			write(t, recordFile(s, all[4]), append(e.Bytes, '\n'))
		}, UnknownKey + " " + Changed, 5},
		"no-end": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			write(t, recordFile(s, all[4]), all[4].Bytes)
		}, Changed, 5},
		"cut": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			write(t, recordFile(s, all[1]), all[1].Bytes[:100])
		}, Changed, 2},
		"no-head": {func(t *testing.T, s *Store, _ []Envelope) {
			t.Helper()
			remove(t, filepath.Join(s.cfg.Dir, headName))
		}, Headless, 0},
		"head-of-another": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			if err := writeHead(s.cfg.Dir, head{5, all[4].Digest}, testKey()); err != nil {
				t.Fatal(err)
			}
		}, Headless, 0},
		"content-gone": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			remove(t, blobFile(t, s, all[3].Record.Output.Stdout))
		}, MissingContent, 4},
		"content-changed": {func(t *testing.T, s *Store, all []Envelope) {
			t.Helper()
			write(t, blobFile(t, s, all[3].Record.Output.Stdout), []byte("run X\n"))
		}, BadContent, 4},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, all := five(t)
			tt.spoil(t, s, all)
			report := check(t, s)
			if kinds(report) != tt.want || report.OK != (tt.want == "") {
				t.Fatalf("%+v, want %q", report.Problems, tt.want)
			}
			if !report.OK && report.Problems[0].Seq != tt.seq {
				t.Errorf("%+v, want it at %d", report.Problems[0], tt.seq)
			}
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func blobFile(t *testing.T, s *Store, b Blob) string {
	t.Helper()
	path, err := s.blobs.path(b.Digest)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Any byte of any file that a check reads: it says so, and in which record.
func TestFlipAnyByteOfStore(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	e := appendDraft(t, s, testDraft())
	files := []string{recordFile(s, e), filepath.Join(s.cfg.Dir, headName)}
	for _, b := range e.Record.Blobs() {
		files = append(files, blobFile(t, s, b))
	}
	for _, path := range files {
		good := read(t, path)
		step := 1 + len(good)/40
		for i := rand.IntN(step); i < len(good); i += step {
			bad := bytes.Clone(good)
			bad[i] ^= 1
			write(t, path, bad)
			report := check(t, s)
			if report.OK || (report.Problems[0].Seq != 1 && report.Problems[0].File != headName) {
				t.Fatalf("byte %d of %s: %+v", i, path, report)
			}
		}
		write(t, path, good)
	}
	if report := check(t, s); !report.OK {
		t.Errorf("%+v", report)
	}
}

// What was damaged is whole again when it is recorded again.
func TestDamagedContentIsMended(t *testing.T) {
	t.Parallel()
	s, all := five(t)
	before := s.Usage()
	write(t, blobFile(t, s, all[3].Record.Output.Stdout), []byte("run X\n"))
	d := testDraft()
	d.Output.Stdout = []byte("run 3\n")
	appendDraft(t, s, d)
	if report := check(t, s); !report.OK {
		t.Errorf("%+v", report)
	}
	if after := s.Usage(); after.Contents != before.Contents || after.ContentBytes != before.ContentBytes {
		t.Errorf("%+v, %+v", before, after)
	}
}

// A store that has lost its end goes on, and what is lost is found for ever.
func TestLostEndStaysFound(t *testing.T) {
	t.Parallel()
	s, all := five(t)
	anchor := map[uint64]string{5: all[4].Digest}
	remove(t, recordFile(s, all[4]))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, s.cfg.Dir)
	e := appendDraft(t, s, testDraft())
	if e.Record.Chain != (Chain{6, all[4].Digest}) {
		t.Errorf("%+v", e.Record.Chain)
	}
	report := check(t, s)
	if kinds(report) != Removed || report.Problems[0].Seq != 5 {
		t.Errorf("%+v", report)
	}
	report, err := Check(t.Context(), CheckOptions{Dir: s.cfg.Dir, Trust: trustIn(s), Anchors: anchor})
	if err != nil || report.OK {
		t.Errorf("%+v, %v", report, err)
	}
}

// What no check can find without an anchor: an older state as a whole.
func TestAnchors(t *testing.T) {
	t.Parallel()
	s := openStore(t, t.TempDir())
	appendDraft(t, s, testDraft())
	old := read(t, filepath.Join(s.cfg.Dir, headName))
	last := appendDraft(t, s, testDraft())
	remove(t, recordFile(s, last))
	write(t, filepath.Join(s.cfg.Dir, headName), old)
	if report := check(t, s); !report.OK {
		t.Errorf("%+v", report)
	}
	opts := CheckOptions{Dir: s.cfg.Dir, Trust: trustIn(s), Anchors: map[uint64]string{2: last.Digest}}
	report, err := Check(t.Context(), opts)
	if err != nil || kinds(report) != Truncated {
		t.Errorf("%+v, %v", report, err)
	}
	opts.Anchors = map[uint64]string{1: last.Digest}
	if report, err = Check(t.Context(), opts); err != nil || kinds(report) != Changed {
		t.Errorf("%+v, %v", report, err)
	}
	if _, err = Check(t.Context(), CheckOptions{Dir: t.TempDir()}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("nothing there: %v", err)
	}
}

func TestLinked(t *testing.T) {
	t.Parallel()
	s, all := five(t)
	for _, e := range all {
		if err := s.Linked(e); err != nil {
			t.Error(err)
		}
	}
	foreign, _ := testEnvelope(t)
	if err := s.Linked(foreign); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("another store's: %v", err)
	}
	r := all[2].Record
	r.User = "token:mallory"
	forged, err := sign(r, s.key)
	if err != nil {
		t.Fatal(err)
	}
	if err = s.Linked(forged); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("another of the same id: %v", err)
	}
	write(t, recordFile(s, all[2]), append(forged.Bytes, '\n'))
	for _, e := range []Envelope{all[3], forged} {
		if err = s.Linked(e); !errors.Is(err, errdef.ErrConflict) {
			t.Errorf("beside another: %v", err)
		}
	}
}
