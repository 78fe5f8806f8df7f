package snapshot

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

var errDead = errors.New("the process is dead")

// hastyFiles do not wait for the disk: a power cut is for package durable to
// test.
type hastyFiles struct{ osFiles }

func (f hastyFiles) write(path string, data []byte) error { return f.replace(path, data) }

func (f hastyFiles) commitDir(stage, final string) error { return f.rename(stage, final) }

func (hastyFiles) syncFile(string) error { return nil }

func (hastyFiles) syncDir(string) error { return nil }

// cutFiles dies, with the error given, after a number of steps. Removing a
// directory is a step for each file in it.
type cutFiles struct {
	hastyFiles
	left int
	with error
}

func (c *cutFiles) step(do func() error) error {
	if c.left == 0 {
		return c.with
	}
	c.left--
	return do()
}

func (c *cutFiles) mkdir(path string) error {
	return c.step(func() error { return c.hastyFiles.mkdir(path) })
}

func (c *cutFiles) create(path string) (f *os.File, err error) {
	err = c.step(func() error { f, err = c.hastyFiles.create(path); return err })
	return f, err
}

func (c *cutFiles) write(path string, data []byte) error {
	return c.step(func() error { return c.hastyFiles.write(path, data) })
}

func (c *cutFiles) replace(path string, data []byte) error {
	return c.step(func() error { return c.hastyFiles.replace(path, data) })
}

func (c *cutFiles) commitDir(stage, final string) error {
	return c.step(func() error { return c.hastyFiles.commitDir(stage, final) })
}

func (c *cutFiles) rename(oldPath, newPath string) error {
	return c.step(func() error { return c.hastyFiles.rename(oldPath, newPath) })
}

func (c *cutFiles) link(oldPath, newPath string) error {
	return c.step(func() error { return c.hastyFiles.link(oldPath, newPath) })
}

func (c *cutFiles) remove(path string) error {
	return c.step(func() error { return c.hastyFiles.remove(path) })
}

func (c *cutFiles) syncFile(path string) error {
	return c.step(func() error { return c.hastyFiles.syncFile(path) })
}

func (c *cutFiles) syncDir(path string) error {
	return c.step(func() error { return c.hastyFiles.syncDir(path) })
}

func (c *cutFiles) removeAll(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err = c.remove(filepath.Join(path, e.Name())); err != nil {
			return err
		}
	}
	return c.remove(path)
}

// stageAndCommit is a writer that dies as a process does: its locks go, and
// nothing is tidied up.
func stageAndCommit(s *Store, t *testing.T, tag, content string, abort bool, disk ...string) error {
	st, err := s.StageReplace(t.Context(), tag)
	if err != nil {
		return err
	}
	defer func() {
		if st.claim != nil {
			_ = durable.Unlock(st.claim)
		}
	}()
	if err = write(st, content); err != nil {
		return err
	}
	m := testManifest()
	if disk != nil {
		m.Machine.DiskMiB = 1
		if err = st.LinkDisk(t.Context(), disk); err != nil {
			return err
		}
	}
	if abort {
		return st.Abort()
	}
	_, err = st.Commit(t.Context(), m, Facts{CreatedAt: time.Unix(1, 0).UTC()})
	return err
}

// diskAndCommit is a writer whose machine has a disk.
func diskAndCommit(s *Store, t *testing.T) error {
	raw, top := filepath.Join(t.TempDir(), "raw"), filepath.Join(t.TempDir(), "top")
	if err := errors.Join(os.WriteFile(raw, rawDisk("raw"), 0o600), os.WriteFile(top, []byte("top"), 0o600)); err != nil {
		return err
	}
	return stageAndCommit(s, t, "c", "three", false, raw, top)
}

type change struct {
	work func(s *Store, t *testing.T) error
	want map[string]string // tag -> content, after
}

// Every store of these tests begins with this.
var before = map[string]string{"a": "one", "b": "two"}

var changes = map[string]change{
	"commit": {
		func(s *Store, t *testing.T) error { return stageAndCommit(s, t, "c", "three", false) },
		map[string]string{"a": "one", "b": "two", "c": "three"},
	},
	"commit-disk": {
		diskAndCommit,
		map[string]string{"a": "one", "b": "two", "c": "three"},
	},
	"commit-equal": {
		func(s *Store, t *testing.T) error { return stageAndCommit(s, t, "c", "one", false) },
		map[string]string{"a": "one", "b": "two", "c": "one"},
	},
	"replace": {
		func(s *Store, t *testing.T) error { return stageAndCommit(s, t, "b", "three", false) },
		map[string]string{"a": "one", "b": "three"},
	},
	"abort": {
		func(s *Store, t *testing.T) error { return stageAndCommit(s, t, "c", "three", true) },
		before,
	},
	"remove": {
		func(s *Store, t *testing.T) error { return s.Remove(t.Context(), "b") },
		map[string]string{"a": "one"},
	},
	"gc": {
		func(s *Store, t *testing.T) error { _, err := s.GC(t.Context(), false); return err },
		before,
	},
}

// prepare makes the store that a change starts from, with something in it for
// GC to do, and returns its directory.
func prepare(t *testing.T) string {
	t.Helper()
	s := newStore(t)
	for _, tag := range []string{"a", "b"} {
		create(t, s, tag, before[tag])
	}
	create(t, s, "untagged", "zero")
	if err := errors.Join(
		os.Remove(s.path(tagsDir, "untagged.json")),
		os.Mkdir(s.path(stagingDir, "stale"), 0o700),
		os.WriteFile(s.path(stagingDir, "stale", memoryFile), []byte("half"), 0o600),
		os.Mkdir(s.path(trashDir, "x"), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	return s.dir
}

// readTags reads what a store has, through the device file, which says.
func readTags(t *testing.T, s *Store) map[string]string {
	t.Helper()
	all, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, snap := range all {
		if snap.Status == StatusWriting {
			continue
		}
		if snap.Status != StatusReady {
			t.Errorf("%s is %s: %s", snap.Tag, snap.Status, snap.Problem)
		}
		data, err := os.ReadFile(snap.DevicePath())
		if err != nil {
			t.Error(err)
		}
		got[snap.Tag] = strings.TrimPrefix(string(data), "device of ")
		if err = s.Verify(t.Context(), snap); err != nil {
			t.Error(err)
		}
	}
	return got
}

// wantWhole sees that a store holds what it did before a change or what it
// should after it, now, once it is opened again, and once it has been cleaned.
func wantWhole(t *testing.T, at string, s *Store, done bool, after map[string]string) {
	t.Helper()
	for _, look := range []string{"as left", "opened again", "cleaned"} {
		switch look {
		case "opened again":
			s = openStore(t, s.dir)
		case "cleaned":
			if _, err := s.GC(t.Context(), false); err != nil {
				t.Errorf("%s: gc: %v", at, err)
			}
		}
		got := readTags(t, s)
		if !cmp.Equal(got, after) && (done || !cmp.Equal(got, before)) {
			t.Errorf("%s, %s: done %t, holds %v", at, look, done, got)
		}
		wantClean(t, s)
	}
	contents := map[string]bool{}
	for _, content := range readTags(t, s) {
		contents[content] = true
	}
	objects, err := s.list(objectsDir)
	if err != nil || len(objects) != len(contents) {
		t.Errorf("%s: %d objects for %d contents, %v", at, len(objects), len(contents), err)
	}
	for _, dir := range []string{stagingDir, trashDir} {
		if names, listErr := s.list(dir); listErr != nil || len(names) > 0 {
			t.Errorf("%s: %s has %v, %v", at, dir, names, listErr)
		}
	}
}

// A process that dies, or a disk that is full, at any step of any change
// leaves the old state or the new one.
func TestCutAfterEveryStep(t *testing.T) {
	t.Parallel()
	template := os.DirFS(prepare(t))
	for name, c := range changes {
		for _, with := range []error{errDead, unix.ENOSPC} {
			t.Run(fmt.Sprintf("%s-%v", name, strings.ReplaceAll(with.Error(), " ", "-")), func(t *testing.T) {
				t.Parallel()
				for steps := range 100 {
					dir := t.TempDir()
					if err := os.CopyFS(dir, template); err != nil {
						t.Fatal(err)
					}
					s := &Store{dir: dir, logger: slog.New(slog.DiscardHandler), files: &cutFiles{left: steps, with: with}}
					err := c.work(s, t)
					if err != nil && !errors.Is(err, with) {
						t.Errorf("cut after %d: %v", steps, err)
					}
					wantWhole(t, fmt.Sprintf("cut after %d", steps), openless(s), err == nil, c.want)
					if s.files.(*cutFiles).left > 0 {
						return
					}
				}
				t.Error("the work never ends")
			})
		}
	}
}

// openless is the store as another process that has it open sees it.
func openless(s *Store) *Store { return &Store{dir: s.dir, logger: s.logger, files: osFiles{}} }

// The test binary runs again as other processes that use the same store.
// The store is the directory they run in.
const roleEnv = "TINE_TEST_SNAPSHOT_ROLE"

var roles = map[string]func() error{
	"pin":     rolePin,
	"hold":    waitForParent,
	"churn":   roleChurn,
	"full":    roleFull,
	"grow":    roleGrow,
	"flatten": roleFlatten,
}

func TestMain(m *testing.M) {
	if role := roles[os.Getenv(roleEnv)]; role != nil {
		if err := role(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func waitForParent() error {
	if _, err := fmt.Println("ready"); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func rolePin() error {
	s, err := Open(".", nil)
	if err != nil {
		return err
	}
	snap, err := s.Resolve("py")
	if err != nil {
		return err
	}
	pin, err := s.Pin(snap)
	if err != nil {
		return err
	}
	return errors.Join(waitForParent(), pin.Close())
}

// process is a role, running.
type process struct {
	*exec.Cmd
	out *bufio.Reader
	in  io.Closer
}

func start(t *testing.T, role, dir string, extra ...*os.File) process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = extra
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := process{cmd, bufio.NewReader(out), in}
	p.line(t)
	return p
}

func (p process) line(t *testing.T) {
	t.Helper()
	if _, err := p.out.ReadString('\n'); err != nil {
		t.Fatalf("the child says no more: %v", err)
	}
}

// kill ends the process as kill -9 does, and waits until it is gone.
func (p process) kill(t *testing.T) {
	t.Helper()
	if err := p.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = p.Wait() // killed
}

// A pin holds for as long as any process that has or inherited it lives, and
// kill -9 ends it.
func TestPinByProcess(t *testing.T) {
	t.Parallel()
	for _, role := range []string{"pin", "hold"} {
		t.Run(role, func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			snap := create(t, s, "py", "a")
			p := process{}
			if role == "pin" {
				p = start(t, "pin", s.dir)
			} else {
				p = startWithPin(t, s, snap)
			}
			if err := s.Remove(t.Context(), "py"); !errors.Is(err, errdef.ErrConflict) {
				t.Errorf("removed while another process has it: %v", err)
			}
			p.kill(t)
			if err := s.Remove(t.Context(), "py"); err != nil {
				t.Errorf("the pin outlived its process: %v", err)
			}
		})
	}
}

// startWithPin hands a pin down, and gives up its own.
func startWithPin(t *testing.T, s *Store, snap Snapshot) process {
	t.Helper()
	pin, err := s.Pin(snap)
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, "hold", s.dir, pin)
	if err = pin.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// roleGrow does to a tree on what is tagged kept all that can be done, until it
// is killed.
func roleGrow() error {
	s, err := Open(".", nil)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		if err = grow(context.Background(), s, byte(i)); err != nil {
			return err
		}
		if _, err = fmt.Println(i); err != nil {
			return err
		}
	}
}

func grow(ctx context.Context, s *Store, b byte) error {
	kept, err := s.Resolve("kept")
	if err != nil {
		return err
	}
	st, err := s.StageReplace(ctx, "x")
	if err != nil {
		return err
	}
	x, err := commitLayer(ctx, st, fmt.Sprint(b), kept, map[uint64]byte{4: b}, Facts{})
	if err != nil {
		return err
	}
	if st, err = s.StageHeld(ctx, "h"); err != nil {
		return err
	}
	held, err := commitLayer(ctx, st, fmt.Sprint(b), x, map[uint64]byte{5: b}, Facts{})
	if err != nil {
		return err
	}
	if err = errors.Join(s.Flatten(ctx, held), s.Flatten(ctx, x)); err != nil {
		return err
	}
	if _, err = s.Retag(ctx, "y", held, true); err != nil {
		return err
	}
	if err = s.Remove(ctx, "whole"); err != nil && !errors.Is(err, errdef.ErrNotFound) {
		return err
	}
	if _, err = s.Compact(ctx, "y", "whole"); err != nil {
		return err
	}
	_, err = s.DropFlats(ctx, false)
	return errors.Join(err, s.DropHeld(ctx, "h"))
}

// roleChurn makes and removes snapshots until it is killed.
func roleChurn() error {
	s, err := Open(".", nil)
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		tag := []string{"x", "y"}[rand.IntN(2)]
		if _, err = make1(context.Background(), s, tag, fmt.Sprint(rand.IntN(4)), ""); err != nil {
			return err
		}
		if err = s.Remove(context.Background(), "x"); err != nil && !errors.Is(err, errdef.ErrNotFound) {
			return err
		}
		if _, err = fmt.Println(i); err != nil {
			return err
		}
	}
}

// Whatever is killed in the middle of whatever it does to a tree, all that is
// there is whole.
func TestKillNineOfTree(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	create(t, openStore(t, dir), "kept", "kept")
	kills := 0
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); kills++ {
		p := start(t, "grow", dir)
		for spin := time.Now().Add(rand.N(30 * time.Millisecond)); time.Now().Before(spin); {
		}
		p.kill(t)
		s := openStore(t, dir)
		if got := readTree(t, s); got["kept"] == "" {
			t.Fatalf("after %d kills: %v", kills, got)
		}
		wantClean(t, s)
	}
	t.Logf("%d kills", kills)
}

func TestKillNine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	kept := create(t, openStore(t, dir), "kept", "kept")
	kills := 0
	for end := time.Now().Add(1500 * time.Millisecond); time.Now().Before(end); kills++ {
		p := start(t, "churn", dir)
		for range rand.IntN(4) {
			p.line(t)
		}
		// Somewhere in the next round, which takes some milliseconds.
		for spin := time.Now().Add(rand.N(8 * time.Millisecond)); time.Now().Before(spin); {
		}
		p.kill(t)
		s := openStore(t, dir)
		got := readTags(t, s)
		if got["kept"] != "kept" {
			t.Fatalf("after %d kills: %v", kills, got)
		}
		wantClean(t, s)
		if names, err := s.list(stagingDir); err != nil || len(names) > 0 {
			t.Fatalf("after %d kills: staging has %v, %v", kills, names, err)
		}
	}
	s := openStore(t, dir)
	if _, err := s.GC(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	for _, tag := range []string{"x", "y"} {
		if err := s.Remove(t.Context(), tag); err != nil && !errors.Is(err, errdef.ErrNotFound) {
			t.Error(err)
		}
	}
	if names, err := s.list(objectsDir); err != nil || len(names) != 1 || names[0] != kept.Digest[7:] {
		t.Errorf("objects %v, %v", names, err)
	}
	t.Logf("%d kills", kills)
}

// roleFull fills a small disk of its own while it takes a snapshot.
func roleFull() error {
	dir, err := os.Getwd()
	if err != nil {
		return err
	}
	if err = unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	s, err := Open(filepath.Join(dir, "store"), nil)
	if err != nil {
		return err
	}
	if _, err = make1(context.Background(), s, "good", "good", ""); err != nil {
		return err
	}
	st, err := s.Stage(context.Background(), "bad")
	if err != nil {
		return err
	}
	if err = write(st, "bad"); err != nil {
		return err
	}
	// The zeros of the memory become holes, and those are taken too.
	err = os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 2<<20), 0o600)
	if !errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the disk is not full: %w", err)
	}
	if err = os.Truncate(st.MemoryPath(), 1); err != nil {
		return err
	}
	if err = os.WriteFile(filepath.Join(dir, "filler2"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the disk is not full: %w", err)
	}
	if _, err = st.Commit(context.Background(), testManifest(), Facts{}); !errors.Is(err, errdef.ErrExhausted) {
		return fmt.Errorf("commit on a full disk: %w", err)
	}
	if err = st.Abort(); err != nil {
		return err
	}
	if err = fullTree(s, dir); err != nil {
		return err
	}
	return onlyGood(s)
}

// fullTree runs out of room in the middle of a branch, a flattening and a
// compaction, and sees that what they took is free again.
func fullTree(s *Store, dir string) error {
	ctx := context.Background()
	good, err := s.Resolve("good")
	if err != nil {
		return err
	}
	if err = os.Remove(filepath.Join(dir, "filler2")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err = os.Truncate(filepath.Join(dir, "filler"), 512<<10); err != nil {
		return err
	}
	st, err := s.Stage(ctx, "leaf")
	if err != nil {
		return err
	}
	leaf, err := commitLayer(ctx, st, "leaf", good, map[uint64]byte{1: 1, 2: 2, 3: 3}, Facts{})
	if err != nil {
		return err
	}
	for _, left := range []int{0, 2, 4, 7, 8} { // pages
		if err = fullAt(ctx, s, dir, leaf, left); err != nil {
			return fmt.Errorf("with %d pages left: %w", left, err)
		}
	}
	return errors.Join(s.Remove(ctx, "leaf"), os.Truncate(filepath.Join(dir, "filler"), 0))
}

// fullAt fills the disk but for some pages, and tries.
func fullAt(ctx context.Context, s *Store, dir string, leaf Snapshot, left int) error {
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, bytes.Repeat([]byte{1}, 2<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("the disk is not full: %w", err)
	}
	st, err := os.Stat(filler)
	if err != nil {
		return err
	}
	if err = os.Truncate(filler, st.Size()&^4095-int64(left)<<12); err != nil {
		return err
	}
	before, err := linux.FreeSpace(dir)
	if err != nil {
		return err
	}
	stage, err := s.Stage(ctx, "more")
	if err == nil {
		changed := map[uint64]byte{}
		for page := range uint64(left) {
			changed[page] = 7
		}
		_, err = commitLayer(ctx, stage, "more", leaf, changed, Facts{})
	}
	flatErr := s.Flatten(ctx, leaf)
	if flatErr == nil && left > 6 { // there was just enough
		flatErr = errdef.ErrExhausted
		if dropErr := s.DropFlat(ctx, leaf); dropErr != nil {
			return dropErr
		}
	}
	_, compactErr := s.Compact(ctx, "leaf", "whole")
	for verb, failed := range map[string]error{"branch": err, "flatten": flatErr, "compact": compactErr} {
		if !errors.Is(failed, unix.ENOSPC) && !errors.Is(failed, errdef.ErrExhausted) {
			return fmt.Errorf("%s on a full disk: %w", verb, failed)
		}
	}
	after, err := linux.FreeSpace(dir)
	if err != nil || after != before {
		return fmt.Errorf("%d bytes were free, and now %d: %w", before, after, err)
	}
	problems, err := s.Check(ctx)
	if err != nil || len(problems) > 0 {
		return fmt.Errorf("check: %v, %w", problems, err)
	}
	return nil
}

func onlyGood(s *Store) error {
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Tag != "good" || all[0].Status != StatusReady {
		return fmt.Errorf("listed: %v, %w", all, err)
	}
	if problems, checkErr := s.Check(context.Background()); checkErr != nil || len(problems) > 0 {
		return fmt.Errorf("check: %v, %w", problems, checkErr)
	}
	if _, err = fmt.Println("ready"); err != nil {
		return err
	}
	return s.Remove(context.Background(), "good") // which needs no room
}

// The small disk is mounted in a namespace that dies with the child.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Dir, cmd.Env = t.TempDir(), append(os.Environ(), roleEnv+"=full")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL) {
		t.Skipf("no user namespace to mount a small disk in: %v", err)
	}
	if err != nil || string(out) != "ready\n" {
		t.Errorf("%v: %s", err, out)
	}
}
