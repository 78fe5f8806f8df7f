package record

import (
	"crypto/ed25519"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		os.Exit(appendUntilKilled(dir))
	}
	os.Exit(m.Run())
}

// testStart is the clock that deterministic test runs see.
func testStart() time.Time { return time.Date(2026, 11, 21, 12, 0, 0, 5, time.UTC) }

// testKey is the same key everywhere, also in the vectors.
func testKey() *Key {
	seed := make([]byte, ed25519.SeedSize)
	for i := range seed {
		seed[i] = byte(i)
	}
	return &Key{ed25519.NewKeyFromSeed(seed)}
}

func testDraft() Draft {
	shift := 2
	return Draft{
		Block: "git-env", User: "token:ci", Mode: Deterministic,
		Environment: Environment{
			SnapshotTag: "py", Snapshot: Digest([]byte("snapshot")), Image: Digest([]byte("image")),
			Engine: "qemu", EngineVersion: "7.2.22", Machine: "pc", CPU: "Nehalem-v1", VCPUs: 1, MemoryMiB: 256, Icount: &shift,
		},
		Input: Input{
			Argv: []string{"python3", "/srv/job.py"}, Env: []string{"LANG=C.UTF-8"}, Cwd: "/srv", Stdin: []byte("1 2 3\n"),
			Files:   []File{{"/srv/job.py", 0o644, []byte("print('ok')\n")}},
			Collect: []string{"/srv/a", "/srv/b"}, Seed: 1<<63 + 7, Start: testStart(),
			Limits: Limits{Virtual: 10 * time.Second, Wall: time.Minute, Output: 1 << 20},
		},
		Output: Output{
			Stdout: []byte("one\ntwo\nthree\n"), Stderr: []byte("pid 17 at 2026-11-21T12:00:01Z\n"),
			Files: []File{{"/srv/b", 0o600, []byte{0, 1, 2, 255}}}, Virtual: 1234567 * time.Nanosecond, Wall: 2 * time.Second,
		},
		Rules:   Rules{Streams: []string{"timestamps", "pids"}},
		Started: time.Date(2026, 11, 21, 23, 50, 0, 123, time.UTC),
	}
}

func testConfig(dir string) Config {
	now := func() time.Time { return time.Date(2026, 11, 21, 23, 51, 0, 0, time.UTC) }
	return Config{Dir: dir, now: now}
}

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), testConfig(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func appendDraft(t *testing.T, s *Store, d Draft) Envelope {
	t.Helper()
	e, err := s.Append(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func trustIn(s *Store) Trust {
	return Trust{Keys: []Public{s.Public()}, Now: s.cfg.now()}
}

// check walks along the store in dir, with its contents.
func check(t *testing.T, s *Store) Report {
	t.Helper()
	report, err := Check(t.Context(), CheckOptions{Dir: s.cfg.Dir, Trust: trustIn(s), Contents: true})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// kinds are the problems of a report, in short.
func kinds(r Report) string {
	var all []string
	for _, p := range r.Problems {
		all = append(all, p.Kind)
	}
	return strings.Join(all, " ")
}

func recordFile(s *Store, e Envelope) string {
	return filepath.Join(s.cfg.Dir, chainDir, place{e.Record.Chain.Seq, e.Record.ID}.name())
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}
