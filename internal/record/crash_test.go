package record

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// writerDir makes the test binary a process that records runs in that store.
const writerDir = "TINE_TEST_RECORD_DIR"

// appendUntilKilled records runs from several goroutines, and prints the id of
// each that Append said is there.
func appendUntilKilled(dir string) int {
	s, err := Open(context.Background(), testConfig(dir))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	said := make(chan string)
	for g := range 3 {
		go func() {
			for n := 0; ; n++ {
				d := testDraft()
				d.Output.Stdout = []byte(strconv.Itoa(os.Getpid()) + " " + strconv.Itoa(g) + " " + strconv.Itoa(n))
				e, appendErr := s.Append(context.Background(), d)
				if appendErr != nil {
					said <- "error " + appendErr.Error()
					return
				}
				said <- e.Record.ID
			}
		}()
	}
	for line := range said {
		fmt.Println(line)
	}
	return 0
}

// Whenever a writer is killed, what it said was recorded is there, and the next
// one goes on with a chain that is whole.
func TestKilledWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var said []string
	for range 5 {
		said = append(said, appendAndKill(t, dir)...)
		s, err := Open(t.Context(), testConfig(dir))
		if err != nil {
			t.Fatal(err)
		}
		if report := check(t, s); !report.OK || report.Records != uint64(s.Usage().Records) {
			t.Fatalf("after a kill: %+v", report)
		}
		for _, id := range said {
			if _, err = s.Get(id); err != nil {
				t.Fatalf("a record is lost: %v", err)
			}
		}
		appendDraft(t, s, testDraft())
		if err = s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if len(said) == 0 {
		t.Error("nothing was ever recorded")
	}
}

func appendAndKill(t *testing.T, dir string) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	lines := bufio.NewScanner(out)
	stop := rand.IntN(8)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "error") {
			t.Error(lines.Text())
		}
		said = append(said, lines.Text())
		if len(said) == stop+1 {
			time.Sleep(time.Duration(rand.IntN(8000)) * time.Microsecond) // anywhere in an append
			if err = cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
		}
	}
	_ = cmd.Wait() // it was killed
	return said
}

// What each step of an append can leave behind is put in order by the next Open.
func TestOpenAfterCuts(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		cut         func(t *testing.T, s *Store, last Envelope, oldHead []byte)
		wantRecords int64
	}{
		"temporary-files": {func(t *testing.T, s *Store, _ Envelope, _ []byte) {
			t.Helper()
			for _, dir := range []string{"", chainDir, blobDir + "/ff", keyDir} {
				if err := os.MkdirAll(filepath.Join(s.cfg.Dir, dir), 0o700); err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(s.cfg.Dir, dir, ".tine-tmp-ABC"), []byte("half"))
			}
		}, 3},
		"contents-without-a-record": {func(t *testing.T, s *Store, _ Envelope, _ []byte) {
			t.Helper()
			if _, _, err := s.blobs.put(t.Context(), map[string][]byte{Digest([]byte("x")): []byte("x")}); err != nil {
				t.Fatal(err)
			}
		}, 3},
		"record-without-its-head": {func(t *testing.T, s *Store, _ Envelope, oldHead []byte) {
			t.Helper()
			write(t, filepath.Join(s.cfg.Dir, headName), oldHead)
		}, 3},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			s := openStore(t, dir)
			appendDraft(t, s, testDraft())
			appendDraft(t, s, testDraft())
			oldHead := read(t, filepath.Join(dir, headName))
			last := appendDraft(t, s, testDraft())
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			tt.cut(t, s, last, oldHead)
			s = openStore(t, dir)
			if got := s.Usage().Records; got != tt.wantRecords {
				t.Errorf("%d records, want %d", got, tt.wantRecords)
			}
			e := appendDraft(t, s, testDraft())
			if e.Record.Chain.Previous != last.Digest {
				t.Error("the chain does not go on from the last record")
			}
			if report := check(t, s); !report.OK {
				t.Errorf("%+v", report)
			}
		})
	}
}

// A disk that fails in the middle of an append leaves a store that goes on.
func TestFailingDisk(t *testing.T) {
	t.Parallel()
	for name, writes := range map[string]bool{"nothing-written": false, "written-and-reported-as-failed": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := testConfig(t.TempDir())
			broken := false
			boom := fmt.Errorf("%w: no space", errdef.ErrExhausted)
			cfg.write = func(path string, data []byte) error {
				if !broken {
					return os.WriteFile(path, data, 0o600)
				}
				if writes {
					return errors.Join(boom, os.WriteFile(path, data, 0o600))
				}
				return boom
			}
			s, err := Open(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			appendDraft(t, s, testDraft())
			broken = true
			if _, err = s.Append(t.Context(), testDraft()); !errors.Is(err, errdef.ErrExhausted) {
				t.Errorf("append on a full disk: %v", err)
			}
			broken = false
			appendDraft(t, s, testDraft())
			if report := check(t, s); !report.OK {
				t.Errorf("%+v", report)
			}
		})
	}
}
