package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(writerDir); dir != "" {
		os.Exit(writeUntilKilled(dir))
	}
	goleak.VerifyTestMain(m)
}

func openLog(t testing.TB, cfg Config) *Log {
	t.Helper()
	l, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func shut(t testing.TB, l *Log) {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// act writes the two lines of an act.
func act(t testing.TB, l *Log, object string) {
	t.Helper()
	seq, err := l.Append(t.Context(), Record{Phase: Intent, Action: "sandbox.exec", Object: object, Digest: Digest([]byte("id"))})
	if err != nil {
		t.Fatal(err)
	}
	if err = l.Keep(t.Context(), Record{Phase: Outcome, Action: "sandbox.exec", Object: object, Intent: seq, Result: OK, Status: 200}); err != nil {
		t.Fatal(err)
	}
}

func verified(t testing.TB, dir string) Report {
	t.Helper()
	report, err := Verify(t.Context(), dir, VerifyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func wantGood(t testing.TB, dir string) Report {
	t.Helper()
	report := verified(t, dir)
	if !report.OK {
		t.Fatalf("the log is not whole: %+v", report.Problems)
	}
	return report
}

func wantBad(t testing.TB, dir, kind string) Report {
	t.Helper()
	report := verified(t, dir)
	for _, p := range report.Problems {
		if p.Kind == kind {
			return report
		}
	}
	t.Fatalf("no problem is %q: %+v", kind, report.Problems)
	return report
}

func lines(t testing.TB, dir string) []Line {
	t.Helper()
	var all []Line
	if _, err := Read(t.Context(), dir, 0, func(l Line) error { all = append(all, l); return nil }); err != nil {
		t.Fatal(err)
	}
	return all
}

func TestPolicies(t *testing.T) {
	t.Parallel()
	for _, sync := range []Sync{"", SyncAlways, SyncInterval, SyncNever} {
		t.Run("sync-"+string(sync), func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(t.TempDir(), "audit")
			l := openLog(t, Config{Dir: dir, Sync: sync})
			for range 10 {
				act(t, l, "sb-1")
			}
			shut(t, l)
			report := wantGood(t, dir)
			if report.Last != 20 || report.First != 1 || report.Ahead != 0 || len(report.Hash) != 64 {
				t.Errorf("report: %+v", report)
			}
		})
	}
	if _, err := Open(Config{Dir: t.TempDir(), Sync: "sometimes"}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("another policy: %v", err)
	}
}

// With SyncAlways a line is there before Append returns, and the head names it
// soon.
func TestAlwaysIsAtOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir, Sync: SyncAlways})
	defer shut(t, l)
	for want := uint64(1); want <= 5; want++ {
		seq, err := l.Append(t.Context(), Record{Phase: Event, Action: "x"})
		if err != nil || seq != want {
			t.Fatal(seq, err)
		}
		if report := wantGood(t, dir); report.Last != want {
			t.Errorf("after line %d: %+v", want, report)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); wantGood(t, dir).Ahead != 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the head does not follow")
		}
	}
}

func TestOneWriter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir})
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
		t.Errorf("a second writer: %v", err)
	}
	shut(t, l)
	if _, err := l.Append(t.Context(), Record{Phase: Event}); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if err := l.Keep(t.Context(), Record{Phase: Event}); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestConcurrentWritersAndRotation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir, MaxSize: 8 << 10})
	ctx, stop := context.WithCancel(t.Context())
	var readers sync.WaitGroup
	readers.Go(func() { // whoever verifies a log that is written to finds it whole
		for ctx.Err() == nil {
			report, err := Verify(ctx, dir, VerifyOptions{})
			if ctx.Err() != nil {
				return
			}
			if err != nil || (!report.OK && report.Problems[0].Kind != Torn) {
				t.Errorf("while it is written: %v %+v", err, report.Problems)
				return
			}
		}
	})
	var group errgroup.Group
	const writers, acts = 8, 100
	for i := range writers {
		group.Go(func() error {
			for range acts {
				seq, err := l.Append(t.Context(), Record{Phase: Intent, Action: "a", Object: fmt.Sprint(i)})
				if err != nil {
					return err
				}
				if err = l.Keep(t.Context(), Record{Phase: Outcome, Action: "a", Intent: seq}); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	stop()
	readers.Wait()
	shut(t, l)
	report := wantGood(t, dir)
	if report.Files < 10 {
		t.Errorf("%d files", report.Files)
	}
	open, outcomes := map[uint64]bool{}, 0
	for _, l := range lines(t, dir) {
		switch l.Phase {
		case Intent:
			open[l.Seq] = true
		case Outcome:
			outcomes++
			delete(open, l.Intent)
		}
	}
	if outcomes != writers*acts || len(open) != 0 {
		t.Errorf("%d outcomes, %d intents without", outcomes, len(open))
	}
	files, _, err := list(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		info, err := os.Stat(filepath.Join(dir, f.name))
		if err != nil || info.Mode().Perm() != sealedMode {
			t.Errorf("%s: %v %v", f.name, info.Mode(), err)
		}
	}
}

func TestEachRunHasItsFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 3 {
		l := openLog(t, Config{Dir: dir})
		act(t, l, "sb-1")
		shut(t, l)
	}
	report := wantGood(t, dir)
	if report.Files != 3 || report.Last != 8 { // a line for each of the two rotations
		t.Errorf("report: %+v", report)
	}
}

func TestClockSetBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	noon := time.Date(2026, 11, 21, 12, 0, 0, 123456789, time.UTC)
	times := []time.Time{noon, noon.Add(-time.Hour), noon.Add(time.Second)}
	n := 0
	clock := func() time.Time { n++; return times[(n-1)%len(times)] }
	l := openLog(t, Config{Dir: dir, now: clock})
	for range times {
		if _, err := l.Append(t.Context(), Record{Phase: Event}); err != nil {
			t.Fatal(err)
		}
	}
	shut(t, l)
	// The next run keeps to it, too.
	l = openLog(t, Config{Dir: dir, now: func() time.Time { return noon.Add(-time.Minute) }})
	shut(t, l)
	var got []string
	for _, l := range lines(t, dir) {
		got = append(got, fmt.Sprint(l.TS, " ", l.ClockBackUS))
	}
	want := []string{
		"2026-11-21T12:00:00.123456789Z 0", "2026-11-21T12:00:00.123456789Z 3600000000",
		"2026-11-21T12:00:01.123456789Z 0", "2026-11-21T12:00:01.123456789Z 61000000",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	wantGood(t, dir)
}

func TestUnknownOutcomes(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir, MaxSize: 1000})
	first, err := l.Append(t.Context(), Record{Phase: Intent, Action: "sandbox.create", Actor: Token("ci"), RequestID: "r1"})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // rotates: the first intent is in a file of its own by then
		act(t, l, "sb-1")
	}
	second, err := l.Append(t.Context(), Record{Phase: Intent, Action: "snapshot.delete", Object: "py", RequestID: "r2"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = l.Append(t.Context(), Record{Phase: Intent, Intent: second, Digest: Digest(nil)}); err != nil {
		t.Fatal(err)
	}
	shut(t, l)
	shut(t, openLog(t, Config{Dir: dir}))
	shut(t, openLog(t, Config{Dir: dir})) // and only once
	got := map[uint64]string{}
	n := 0
	for _, l := range lines(t, dir) {
		if l.Result == Unknown {
			got[l.Intent] = l.RequestID
			n++
		}
	}
	if got[second] != "r2" || n != 2 {
		t.Errorf("%d unknown outcomes: %v", n, got)
	}
	if _, there := got[first]; !there {
		t.Errorf("none for the intent of an earlier file: %v", got)
	}
	wantGood(t, dir)
}

func TestHalfALine(t *testing.T) {
	t.Parallel()
	for name, tail := range map[string]string{
		"half": `{"action":"x","phase":"ev`, "zeros": strings.Repeat("\x00", 5000), "garbage-with-ends": "a\nb\n\n{}\n", "huge": strings.Repeat("x", 3*maxLine),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			l := openLog(t, Config{Dir: dir})
			act(t, l, "sb-1")
			shut(t, l)
			extend(t, filepath.Join(dir, activeName), tail)
			if report := verified(t, dir); report.OK {
				t.Error("not found")
			}
			shut(t, openLog(t, Config{Dir: dir}))
			wantGood(t, dir)
			torn, err := filepath.Glob(filepath.Join(dir, "*.torn"))
			if err != nil || len(torn) != 1 {
				t.Fatal(torn, err)
			}
			data, err := os.ReadFile(torn[0])
			if err != nil || string(data) != tail {
				t.Errorf("set aside: %d bytes, %v", len(data), err)
			}
			said := false
			for _, l := range lines(t, dir) {
				said = said || (l.Action == "log.torn" && l.Object == filepath.Base(torn[0]))
			}
			if !said {
				t.Error("the log does not say so")
			}
		})
	}
}

func extend(t testing.TB, path, tail string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err = f.WriteString(tail); err != nil {
		t.Fatal(err)
	}
}

// What the head says is missing stays missing, however often the log is opened.
func TestLossStaysEvident(t *testing.T) {
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
	cut := strings.LastIndex(strings.TrimSuffix(string(data), "\n"), "\n") + 1
	if err = os.Truncate(path, int64(cut)); err != nil {
		t.Fatal(err)
	}
	if report := wantBad(t, dir, Truncated); report.Problems[0].Seq != 10 {
		t.Errorf("report: %+v", report)
	}
	for range 3 {
		l = openLog(t, Config{Dir: dir})
		act(t, l, "sb-2")
		shut(t, l)
		if report := wantBad(t, dir, Removed); report.Problems[0].Seq != 10 {
			t.Errorf("report: %+v", report)
		}
	}
}

// disk is a file that takes as much as there is room.
type disk struct {
	file
	mu   *sync.Mutex
	room *int
	sync *error
}

func (d disk) Write(b []byte) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := min(len(b), *d.room)
	*d.room -= n
	if _, err := d.file.Write(b[:n]); err != nil || n == len(b) {
		return n, err
	}
	return n, &os.PathError{Op: "write", Path: "/secret/place", Err: unix.ENOSPC}
}

func (d disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if *d.sync != nil {
		return *d.sync
	}
	return d.file.Sync()
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	for _, policy := range []Sync{SyncAlways, SyncInterval, SyncNever} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			var mu sync.Mutex
			room, failSync := 2000, error(nil)
			l := openLog(t, Config{Dir: dir, Sync: policy, wrap: func(f file) file { return disk{f, &mu, &room, &failSync} }})
			var err error
			began := 0
			var seq uint64
			for err == nil {
				var s uint64
				if s, err = l.Append(t.Context(), Record{Phase: Intent, Action: "sandbox.exec"}); err == nil {
					began, seq = began+1, s
				}
			}
			if !errors.Is(err, errdef.ErrUnavailable) || errdef.Code(err) != "unavailable" || errdef.Hint(err) == "" || strings.Contains(err.Error(), "/") {
				t.Errorf("a full disk: %v", err)
			}
			// What was under way ends meanwhile, and is not forgotten.
			if err = l.Keep(t.Context(), Record{Phase: Outcome, Intent: seq, Result: OK}); err != nil {
				t.Error(err)
			}
			if report := verified(t, dir); !report.OK {
				t.Errorf("while it is full: %+v", report.Problems)
			}
			mu.Lock()
			room = 1 << 20
			mu.Unlock()
			for range 50 {
				act(t, l, "sb-1")
			}
			shut(t, l)
			wantGood(t, dir)
			var intents, outcomes, notes int
			for _, l := range lines(t, dir) {
				switch {
				case l.Phase == Intent:
					intents++
				case l.Phase == Outcome:
					outcomes++
				case l.Action == "log.recovered":
					notes++
				}
			}
			if intents != began+50 || outcomes != 51 || notes != 1 {
				t.Errorf("%d intents of %d, %d outcomes, %d notes", intents, began+50, outcomes, notes)
			}
		})
	}
}

// TestOpenOnFullDisk: a log that cannot be put in order yet takes no line, says
// so, and is put in order once there is room.
func TestOpenOnFullDisk(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir})
	if _, err := l.Append(t.Context(), Record{Phase: Intent, Action: "sandbox.exec"}); err != nil {
		t.Fatal(err)
	}
	shut(t, l)
	var mu sync.Mutex
	room, failSync := 0, error(nil)
	l = openLog(t, Config{Dir: dir, wrap: func(f file) file { return disk{f, &mu, &room, &failSync} }})
	if err := l.Trouble(); !errors.Is(err, errdef.ErrUnavailable) || strings.Contains(err.Error(), "/") {
		t.Errorf("trouble: %v", err)
	}
	if err := l.Event(t.Context(), "daemon.start", "", ""); err != nil {
		t.Error(err)
	}
	if _, err := l.Append(t.Context(), Record{Phase: Intent}); !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) == "" {
		t.Errorf("an act: %v", err)
	}
	if _, err := l.Rotate(t.Context()); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("a rotation: %v", err)
	}
	mu.Lock()
	room = 1 << 20
	mu.Unlock()
	for deadline := time.Now().Add(10 * time.Second); l.Trouble() != nil && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
	}
	if err := l.Trouble(); err != nil {
		t.Fatalf("there is room: %v", err)
	}
	act(t, l, "sb-1")
	sealed, err := l.Rotate(t.Context())
	if err != nil || sealed.First == 0 || sealed.Last < sealed.First {
		t.Errorf("sealed %+v, %v", sealed, err)
	}
	shut(t, l)
	wantGood(t, dir)
	var got []string
	for _, l := range lines(t, dir) {
		got = append(got, l.Phase+" "+l.Action+" "+l.Result)
	}
	want := []string{
		"intent sandbox.exec ", "outcome sandbox.exec unknown", "note log.rotate ", "note log.recovered ", "event daemon.start ",
	}
	if diff := cmp.Diff(want, got[:min(len(got), len(want))]); diff != "" {
		t.Error(diff)
	}
}

func TestFailedSync(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var mu sync.Mutex
	room, failSync := 1<<20, error(nil)
	l := openLog(t, Config{Dir: dir, Sync: SyncAlways, wrap: func(f file) file { return disk{f, &mu, &room, &failSync} }})
	act(t, l, "sb-1")
	mu.Lock()
	failSync = unix.EIO
	mu.Unlock()
	for range 3 {
		if _, err := l.Append(t.Context(), Record{Phase: Intent}); !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("a sync that fails: %v", err)
		}
	}
	mu.Lock()
	failSync = nil
	mu.Unlock()
	act(t, l, "sb-1")
	shut(t, l)
	if report := wantGood(t, dir); report.Last != 5 {
		t.Errorf("report: %+v", report)
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if _, err := Tail(t.Context(), dir, 3); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no log: %v", err)
	}
	if _, err := Verify(t.Context(), filepath.Join(dir, "none"), VerifyOptions{}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no log: %v", err)
	}
	l := openLog(t, Config{Dir: dir, MaxSize: 1500})
	seen := make(chan uint64, 1000)
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error)
	go func() {
		done <- Follow(ctx, dir, 0, func(l Line) error { seen <- l.Seq; return nil })
	}()
	for range 20 {
		act(t, l, "sb-1")
	}
	shut(t, l)
	all := lines(t, dir)
	for _, n := range []int{0, 1, 3, 10, len(all), 500} {
		got, err := Tail(t.Context(), dir, n)
		if err != nil || len(got) != min(n, len(all)) {
			t.Fatalf("tail of %d: %d, %v", n, len(got), err)
		}
		if diff := cmp.Diff(all[len(all)-len(got):], got); diff != "" {
			t.Error(diff)
		}
	}
	for want := range all {
		if got := <-seen; got != uint64(want)+1 {
			t.Fatalf("followed to %d, want %d", got, want+1)
		}
	}
	enough := errors.New("enough")
	cancel(enough)
	if err := <-done; !errors.Is(err, enough) {
		t.Error(err)
	}
}

func TestTrimmedAndAnchored(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	l := openLog(t, Config{Dir: dir, MaxSize: 1000})
	for range 20 {
		act(t, l, "sb-1")
	}
	shut(t, l)
	report := wantGood(t, dir)
	verify := func(opts VerifyOptions) bool {
		t.Helper()
		r, err := Verify(t.Context(), dir, opts)
		if err != nil {
			t.Fatal(err)
		}
		return r.OK
	}
	if !verify(VerifyOptions{Anchors: map[uint64]string{report.Last: report.Hash}}) {
		t.Error("the right anchor is not accepted")
	}
	if verify(VerifyOptions{Anchors: map[uint64]string{report.Last - 1: report.Hash}}) || verify(VerifyOptions{Anchors: map[uint64]string{9999: report.Hash}}) {
		t.Error("a wrong anchor is accepted")
	}
	files, _, err := list(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err = os.Remove(filepath.Join(dir, files[0].name)); err != nil {
		t.Fatal(err)
	}
	wantBad(t, dir, Removed)
	if !verify(VerifyOptions{Trimmed: true}) {
		t.Error("a trimmed log is not accepted as such")
	}
	if err = os.Remove(filepath.Join(dir, files[2].name)); err != nil {
		t.Fatal(err)
	}
	if verify(VerifyOptions{Trimmed: true}) {
		t.Error("a hole is accepted as trimming")
	}
}
