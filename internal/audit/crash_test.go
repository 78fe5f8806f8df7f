package audit

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// The environment that makes the test binary a process that writes.
const (
	writerDir  = "TINE_TEST_AUDIT_DIR"
	writerSync = "TINE_TEST_AUDIT_SYNC"
)

// writeUntilKilled writes acts from several goroutines, and prints the number
// of each line that Append said is there.
func writeUntilKilled(dir string) int {
	l, err := Open(Config{Dir: dir, Sync: Sync(os.Getenv(writerSync)), MaxSize: 4000})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	said := make(chan string)
	for range 4 {
		go func() {
			for ctx := context.Background(); ; {
				seq, err := l.Append(ctx, Record{Phase: Intent, Action: "sandbox.exec", Object: "sb-1"})
				if err != nil {
					said <- "error " + err.Error()
				}
				said <- strconv.FormatUint(seq, 10)
				if err = l.Keep(ctx, Record{Phase: Outcome, Intent: seq, Result: OK}); err != nil {
					said <- "error " + err.Error()
				}
			}
		}()
	}
	for line := range said {
		fmt.Println(line)
	}
	return 0
}

// Whenever a writer is killed, what it said was written is there, and the next
// one goes on with a log that is whole.
func TestKilledWriter(t *testing.T) {
	t.Parallel()
	for _, policy := range []Sync{SyncAlways, SyncInterval} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			said := map[uint64]bool{}
			for range 12 {
				for _, seq := range runAndKill(t, dir, policy) {
					said[seq] = true
				}
				shut(t, openLog(t, Config{Dir: dir, Sync: policy}))
				wantGood(t, dir)
			}
			open := map[uint64]bool{}
			for _, l := range lines(t, dir) {
				switch l.Phase {
				case Intent:
					open[l.Seq] = true
					delete(said, l.Seq)
				case Outcome:
					if !open[l.Intent] {
						t.Errorf("line %d: the outcome of nothing, or a second one", l.Seq)
					}
					delete(open, l.Intent)
				}
			}
			if len(said) != 0 || len(open) != 0 {
				t.Errorf("%d lines are lost, %d intents have no outcome", len(said), len(open))
			}
		})
	}
}

func runAndKill(t *testing.T, dir string, policy Sync) []uint64 {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerDir+"="+dir, writerSync+"="+string(policy))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seqs []uint64
	scanner := bufio.NewScanner(out)
	var timer *time.Timer
	for scanner.Scan() {
		if timer == nil { // it writes
			timer = time.AfterFunc(rand.N(40*time.Millisecond), func() { _ = cmd.Process.Kill() })
		}
		seq, bad := strconv.ParseUint(scanner.Text(), 10, 64)
		if bad != nil && !strings.HasPrefix(scanner.Text(), "error") {
			break // half a number
		}
		if bad != nil {
			t.Error(scanner.Text())
			_ = cmd.Process.Kill()
		}
		seqs = append(seqs, seq)
	}
	_, _ = io.Copy(io.Discard, out)
	if err = cmd.Wait(); err == nil {
		t.Error("it was not killed")
	}
	if len(seqs) > 0 { // a number that was cut short may look like another
		seqs = seqs[:len(seqs)-1]
	}
	return seqs
}

// TestFullFilesystem fills a real one.
func TestFullFilesystem(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tine-test", dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
		t.Skipf("a filesystem of 64 KiB needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	l := openLog(t, Config{Dir: dir, Sync: SyncAlways})
	var err error
	n := 0
	for ; err == nil && n < 1000; n++ {
		_, err = l.Append(t.Context(), Record{Phase: Intent, Action: "sandbox.exec"})
	}
	if !errors.Is(err, errdef.ErrUnavailable) {
		t.Fatalf("after %d lines: %v", n, err)
	}
	report := verified(t, dir)
	if !report.OK || report.Last != uint64(n-1) {
		t.Errorf("%d lines, report: %+v", n-1, report)
	}
	if err = os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		act(t, l, "sb-1")
	}
	shut(t, l)
	wantGood(t, dir)
}
