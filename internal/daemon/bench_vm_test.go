//go:build vm

package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/linux"
	"github.com/tinevm/tine/internal/vmtest"
)

// liveVMs is how many machines live under the daemon that is measured.
const liveVMs = 50

// vmDir is a state directory with the shared images and snapshots. Machines
// that it still has at the end are ended.
func vmDir(b *testing.B) string {
	b.Helper()
	vmtest.Snapshot(b)
	dir := stateDir(b)
	for _, shared := range []string{"images", "snapshots"} {
		if err := os.Symlink(filepath.Join(vmtest.StateDir(b), shared), filepath.Join(dir, shared)); err != nil {
			b.Fatal(err)
		}
	}
	b.Cleanup(func() {
		entries, _ := os.ReadDir(filepath.Join(dir, "sandboxes")) // none before the first daemon
		left, err := linux.FindProcesses(func(_ int, argv []string) bool {
			return slices.ContainsFunc(entries, func(e os.DirEntry) bool { return slices.Contains(argv, "tine-"+e.Name()) })
		})
		if err != nil {
			b.Error(err)
		}
		for _, pid := range left {
			b.Errorf("machine %d is left behind", pid)
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	})
	return dir
}

// BenchmarkVMExec is what a command costs over HTTP, beside the same command
// by the agent's session alone. Both are asked by this process, which is the
// daemon too.
func BenchmarkVMExec(b *testing.B) {
	for _, way := range audits() {
		b.Run("audit="+way.name, func(b *testing.B) {
			dir := vmDir(b)
			d, c := benched(b, Config{StateDir: dir, Engine: vmtest.Engine(b), Agent: vmtest.Program(b, "tine-agent"), Audit: way.AuditConfig})
			fork(b, d, 1)
			compareExec(b, d, c)
		})
	}
}

// served is a daemon in a process of its own.
type served struct {
	b      *testing.B
	cmd    *exec.Cmd
	client *client.Client
	log    bytes.Buffer
	killed bool
}

// serveAlone starts a daemon and waits until it lists n sandboxes that run.
func serveAlone(b *testing.B, dir string, n int) (*served, time.Duration) {
	b.Helper()
	s := &served{b: b}
	late := context.WithoutCancel(b.Context())
	s.cmd = exec.CommandContext(late, vmtest.Program(b, "tine"), "serve", "--listen", "", "--state-dir", dir)
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	var err error
	if s.client, err = client.New(client.Config{Socket: filepath.Join(dir, "tine.sock")}); err != nil {
		b.Fatal(err)
	}
	start := time.Now()
	if err = s.cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(s.kill)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for s.running() != n {
		if time.Since(start) > time.Minute {
			s.kill()
			b.Fatalf("the daemon does not list %d sandboxes: %s", n, s.log.String())
		}
		<-tick.C
	}
	return s, time.Since(start)
}

// running is how many sandboxes run, or -1 while nobody answers.
func (s *served) running() int {
	list, err := s.client.Sandboxes(context.WithoutCancel(s.b.Context()))
	if err != nil {
		return -1
	}
	n := 0
	for _, box := range list {
		if box.State == "running" {
			n++
		}
	}
	return n
}

// kill ends the daemon at once. Its machines run on.
func (s *served) kill() {
	if s.killed {
		return
	}
	s.killed = true
	s.client.Close()
	_ = s.cmd.Process.Kill() // unless it has ended
	_ = s.cmd.Wait()         // it was killed
}

func (s *served) fork(n int) {
	s.b.Helper()
	if _, err := s.client.Fork(s.b.Context(), client.ForkRequest{Snapshot: vmtest.SnapshotTag, N: n}); err != nil {
		s.b.Fatal(err)
	}
}

// each does something to all sandboxes, one after the other.
func (s *served) each(what func(ctx context.Context, id string) error) {
	s.b.Helper()
	ctx := context.WithoutCancel(s.b.Context())
	list, err := s.client.Sandboxes(ctx)
	for _, box := range list {
		err = errors.Join(err, what(ctx, box.ID))
	}
	if err != nil {
		s.b.Error(err)
	}
}

func (s *served) ping() {
	s.b.Helper()
	s.each(func(ctx context.Context, id string) error {
		_, err := s.client.Ping(ctx, id)
		return err
	})
}

func (s *served) remove() {
	s.b.Helper()
	s.each(s.client.RemoveSandbox)
}

// memory is what the daemon's process has in memory, in KiB, and its share of
// that where pages are others' too.
func (s *served) memory() (rss, pss float64) {
	s.b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", s.cmd.Process.Pid))
	if err != nil {
		s.b.Fatal(err)
	}
	return kibibytes(s.b, data, "Rss:"), kibibytes(s.b, data, "Pss:")
}

func kibibytes(b *testing.B, rollup []byte, name string) float64 {
	b.Helper()
	for line := range strings.Lines(string(rollup)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == name {
			n, err := strconv.ParseFloat(fields[1], 64)
			if err != nil {
				b.Fatal(err)
			}
			return n
		}
	}
	b.Fatalf("no %s in smaps_rollup", name)
	return 0
}

// BenchmarkVMMemory is what the process of a daemon costs, with no sandbox and
// with some, each of which was forked and has answered a ping.
func BenchmarkVMMemory(b *testing.B) {
	dir := vmDir(b)
	var none, rss, pss float64
	for b.Loop() {
		s, _ := serveAlone(b, dir, 0)
		none, pss = s.memory()
		b.ReportMetric(none/1024, "rss0-MiB")
		b.ReportMetric(pss/1024, "pss0-MiB")
		for _, n := range []int{10, liveVMs} {
			s.fork(n - s.running())
			s.ping()
			rss, pss = s.memory()
			b.ReportMetric(rss/1024, fmt.Sprintf("rss%d-MiB", n))
			b.ReportMetric(pss/1024, fmt.Sprintf("pss%d-MiB", n))
		}
		s.remove()
		s.kill()
	}
	b.ReportMetric(0, "ns/op") // of all this
	b.ReportMetric((rss-none)/liveVMs, "KiB/sandbox")
}

// BenchmarkVMRecovery is the time from the start of a daemon until it lists all
// the sandboxes of one that was killed. The floor is the same program on a
// directory without any.
func BenchmarkVMRecovery(b *testing.B) {
	empty, dir := vmDir(b), vmDir(b)
	s, _ := serveAlone(b, dir, 0)
	s.fork(liveVMs)
	s.ping()
	var took, answered, floor []time.Duration
	var rss float64
	for b.Loop() {
		f, least := serveAlone(b, empty, 0)
		f.kill()
		floor = append(floor, least)
		s.kill()
		start := time.Now()
		var listed time.Duration
		s, listed = serveAlone(b, dir, liveVMs)
		s.ping()
		answered = append(answered, time.Since(start))
		took = append(took, listed)
		rss, _ = s.memory()
	}
	s.remove()
	b.ReportMetric(0, "ns/op")                  // of both
	b.ReportMetric(millis(took[0]), "first-ms") // its machines are just up
	b.ReportMetric(millis(median(took)), "p50-ms")
	b.ReportMetric(millis(median(floor)), "p50-floor-ms")
	b.ReportMetric(millis(median(took)-median(floor))/liveVMs, "ms/sandbox")
	b.ReportMetric(millis(median(answered)), "p50-all-pinged-ms")
	b.ReportMetric(rss/1024, "adopted-rss-MiB")
}
