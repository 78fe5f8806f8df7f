package snapshot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/vmm"
)

const pages = 16 // of the memory of the tests' machines

func newStore(t *testing.T) *Store {
	t.Helper()
	return openStore(t, t.TempDir())
}

func openStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func testManifest() Manifest {
	return Manifest{
		Engine: "fake", EngineVersion: "1", Machine: vmm.Machine{MemoryMiB: 1, VCPUs: 1},
		Image: digestOf([]byte("image")), Warmup: []string{"python3", "-c", "import json"}, Languages: []string{"python"},
	}
}

// write puts a small machine into a stage: pages of content, and of zeros.
func write(st *Stage, content string) error {
	mem := make([]byte, pages<<12)
	copy(mem, content)
	copy(mem[8<<12:], content)
	return errors.Join(
		os.WriteFile(st.MemoryPath(), mem, 0o600),
		os.WriteFile(st.DevicePath(), []byte("device of "+content), 0o600))
}

// make1 makes a snapshot, over an old one of that tag if there is one.
func make1(ctx context.Context, s *Store, tag, content, parent string) (snap Snapshot, err error) {
	st, err := s.StageReplace(ctx, tag)
	if err != nil {
		return Snapshot{}, err
	}
	defer func() { err = errors.Join(err, st.Abort()) }()
	if err = write(st, content); err != nil {
		return Snapshot{}, err
	}
	m := testManifest()
	m.Parent = parent
	return st.Commit(ctx, m, Facts{BootMS: 5})
}

func create(t *testing.T, s *Store, tag, content string) Snapshot {
	t.Helper()
	snap, err := make1(t.Context(), s, tag, content, "")
	if err != nil {
		t.Fatal(err)
	}
	return snap
}

func wantClean(t *testing.T, s *Store) {
	t.Helper()
	problems, err := s.Check(t.Context())
	if err != nil || len(problems) > 0 {
		t.Errorf("check: %v, %v", problems, err)
	}
}

func TestCreateAndResolve(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	var steps sync.Map
	ctx := progress.With(t.Context(), func(e progress.Event) { steps.Store(e.Message, true) })
	made, makeErr := make1(ctx, s, "py", "hello", "")
	if makeErr != nil {
		t.Fatal(makeErr)
	}
	if _, ok := steps.Load("writing to disk"); !ok {
		t.Error("no progress was reported")
	}
	tests := map[string]struct {
		ref string
		tag string
		err error
	}{
		"tag":            {"py", "py", nil},
		"digest":         {made.Digest, "", nil},
		"digest-prefix":  {made.Digest[:len("sha256:")+12], "", nil},
		"bare-prefix":    {made.Digest[len("sha256:"):][:12], "", nil},
		"short-prefix":   {"sha256:" + made.Digest[7:18], "", errdef.ErrInvalid},
		"other-digest":   {digestOf(nil), "", errdef.ErrNotFound},
		"missing":        {"nope", "", errdef.ErrNotFound},
		"climbing":       {"../py", "", errdef.ErrInvalid},
		"climbing-hash":  {"sha256:../../../../etc/passwd", "", errdef.ErrInvalid},
		"upper-case-hex": {strings.ToUpper(made.Digest[7:]), "", errdef.ErrNotFound},
		"empty":          {"", "", errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := s.Resolve(tt.ref)
			if tt.err != nil {
				if !errors.Is(err, tt.err) {
					t.Errorf("got %v, want %v", err, tt.err)
				}
				return
			}
			want := made
			if want.Tag = tt.tag; tt.tag == "" {
				want.Facts = Facts{}
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(Snapshot{})); err != nil || diff != "" {
				t.Errorf("%v (-want +got):\n%s", err, diff)
			}
			if err = s.Verify(t.Context(), got); err != nil {
				t.Errorf("verify: %v", err)
			}
		})
	}
	if _, err := s.Resolve("nope"); err == nil || err.Error() != "snapshot nope: not found" {
		t.Errorf("message: %v", err)
	}
	wantClean(t, s)
}

func TestCommitPunchesZeros(t *testing.T) {
	t.Parallel()
	snap := create(t, newStore(t), "py", "hello")
	use, err := snap.DiskUse()
	if err != nil || use > 6<<12 {
		t.Errorf("%d bytes of disk for 2 pages of memory and 3 small files, %v", use, err)
	}
	mem, err := os.ReadFile(snap.MemoryPath())
	if err != nil || len(mem) != pages<<12 || !bytes.HasPrefix(mem[8<<12:], []byte("hello")) {
		t.Errorf("the memory changed: %d bytes, %v", len(mem), err)
	}
}

func TestCheckTag(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"py", "a", "_x", "0", "a.b-c_d", "a..b", strings.Repeat("a", 64)} {
		if err := CheckTag(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", ".", "..", ".a", "-a", "a/b", "../a", "a\x00", "a b", "ä", "a\n", "/", strings.Repeat("a", 65), `a\b`,
	} {
		if err := CheckTag(bad); !errors.Is(err, errdef.ErrInvalid) || errdef.Hint(err) == "" {
			t.Errorf("%q: %v", bad, err)
		}
		s := newStore(t)
		_, err := s.Stage(t.Context(), bad)
		if removeErr := s.Remove(t.Context(), bad); !errors.Is(err, errdef.ErrInvalid) || !errors.Is(removeErr, errdef.ErrInvalid) {
			t.Errorf("%q: stage %v, remove %v", bad, err, removeErr)
		}
	}
}

func TestEqualSnapshotsAreOne(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	a, b := create(t, s, "a", "same"), create(t, s, "b", "same")
	if a.Digest != b.Digest {
		t.Errorf("digests %s and %s", a.Digest, b.Digest)
	}
	if c := create(t, s, "c", "other"); c.Digest == a.Digest {
		t.Error("different snapshots have one digest")
	}
	if err := s.Remove(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve("b"); err != nil {
		t.Errorf("went with another tag: %v", err)
	}
	wantClean(t, s)
	if names, err := s.list(stagingDir); err != nil || len(names) > 0 {
		t.Errorf("staging has %v, %v", names, err)
	}
}

func TestStageExistsAndReplace(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	old := create(t, s, "py", "old")
	_, err := s.Stage(t.Context(), "py")
	if !errors.Is(err, errdef.ErrExists) || errdef.Hint(err) == "" {
		t.Errorf("stage of an existing tag: %v", err)
	}
	now := create(t, s, "py", "new")
	got, err := s.Resolve("py")
	if err != nil || got.Digest != now.Digest {
		t.Errorf("got %s, %v", got.Digest, err)
	}
	if _, err = s.Resolve(old.Digest); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("the replaced object is still there: %v", err)
	}
	wantClean(t, s)
}

func TestStageConflict(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var won []*Stage
	for range 8 {
		wg.Go(func() {
			st, err := openStore(t, dir).Stage(t.Context(), "py")
			if err != nil {
				if !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			won = append(won, st)
		})
	}
	wg.Wait()
	if len(won) != 1 {
		t.Fatalf("%d won", len(won))
	}
	for range 2 {
		if err := won[0].Abort(); err != nil {
			t.Error(err)
		}
	}
	if _, err := won[0].Commit(t.Context(), testManifest(), Facts{}); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("commit after abort: %v", err)
	}
	create(t, openStore(t, dir), "py", "x")
}

func TestList(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	create(t, s, "good", "a")
	gone, short, broken := create(t, s, "gone", "b"), create(t, s, "short", "c"), create(t, s, "broken", "d")
	live, err := s.Stage(t.Context(), "live")
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.StageReplace(t.Context(), "good")
	if err != nil {
		t.Fatal(err)
	}
	if err = errors.Join(
		os.Mkdir(s.path(stagingDir, "stale"), 0o700),
		os.RemoveAll(gone.Dir()),
		os.Truncate(short.MemoryPath(), 1),
		os.WriteFile(filepath.Join(broken.Dir(), manifestFile), []byte("{}"), 0o600),
		os.WriteFile(s.path(tagsDir, "torn.json"), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	got, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	status := map[string]Status{}
	for _, snap := range got {
		if status[snap.Tag] = snap.Status; (snap.Problem != "") != (snap.Status == StatusFailed) {
			t.Errorf("%s is %s: %q", snap.Tag, snap.Status, snap.Problem)
		}
	}
	want := map[string]Status{
		"good": StatusReady, "gone": StatusFailed, "short": StatusFailed, "broken": StatusFailed,
		"torn": StatusFailed, "live": StatusWriting,
	}
	if diff := cmp.Diff(want, status); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	for _, tag := range []string{"gone", "short", "broken"} {
		if _, err = s.Resolve(tag); !errors.Is(err, errdef.ErrUnavailable) || errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("resolve %s: %v", tag, err)
		}
	}
	if err = errors.Join(live.Abort(), again.Abort()); err != nil {
		t.Error(err)
	}
	for tag := range want {
		if tag == "live" {
			continue
		}
		if err = s.Remove(t.Context(), tag); err != nil {
			t.Errorf("remove %s: %v", tag, err)
		}
	}
	if _, err = s.GC(t.Context(), false); err != nil {
		t.Error(err)
	}
	if left, listErr := s.List(); listErr != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, listErr)
	}
	wantClean(t, s)
}

func TestRemove(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "a")
	pin, err := s.Pin(snap)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Remove(t.Context(), "py")
	if !errors.Is(err, errdef.ErrConflict) || errdef.Hint(err) == "" {
		t.Errorf("remove while pinned: %v", err)
	}
	if _, err = s.Resolve("py"); err != nil {
		t.Errorf("a refused removal removed the tag: %v", err)
	}
	if err = pin.Close(); err != nil {
		t.Fatal(err)
	}
	if err = s.Remove(t.Context(), "py"); err != nil {
		t.Fatal(err)
	}
	if err = s.Remove(t.Context(), "py"); !errors.Is(err, errdef.ErrNotFound) || err.Error() != "snapshot py: not found" {
		t.Errorf("removed twice: %v", err)
	}
	if _, err = s.Pin(snap); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("pin of what is gone: %v", err)
	}
	for _, dir := range []string{objectsDir, tagsDir, trashDir, stagingDir} {
		if names, listErr := s.list(dir); listErr != nil || len(names) > 0 {
			t.Errorf("%s has %v, %v", dir, names, listErr)
		}
	}
}

func TestParentsAreKept(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	base := create(t, s, "base", "a")
	if _, err := make1(t.Context(), s, "leaf", "b", base.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := make1(t.Context(), s, "orphan", "c", digestOf(nil)); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a snapshot without its parent: %v", err)
	}
	if err := s.Remove(t.Context(), "base"); err != nil {
		t.Fatal(err)
	}
	if freed, err := s.GC(t.Context(), false); err != nil || len(freed.Objects) > 0 {
		t.Errorf("gc took %v, %v", freed, err)
	}
	wantClean(t, s)
	if err := s.Remove(t.Context(), "leaf"); err != nil {
		t.Fatal(err)
	}
	dry, err := s.GC(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = s.Resolve(base.Digest); err != nil {
		t.Errorf("a dry run removed something: %v", err)
	}
	wet, err := s.GC(t.Context(), false)
	if diff := cmp.Diff(dry, wet); err != nil || diff != "" || len(wet.Objects) != 1 || wet.Bytes == 0 {
		t.Errorf("%v (-dry +wet):\n%s", err, diff)
	}
}

func TestGCKeepsPinnedAndItsParents(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	base := create(t, s, "base", "a")
	leaf, err := make1(t.Context(), s, "leaf", "b", base.Digest)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := s.Pin(leaf)
	if err != nil {
		t.Fatal(err)
	}
	if err = errors.Join(os.Remove(s.path(tagsDir, "leaf.json")), os.Remove(s.path(tagsDir, "base.json"))); err != nil {
		t.Fatal(err)
	}
	if freed, gcErr := s.GC(t.Context(), false); gcErr != nil || len(freed.Objects) > 0 {
		t.Errorf("gc took %v, %v", freed, gcErr)
	}
	if err = pin.Close(); err != nil {
		t.Fatal(err)
	}
	if freed, gcErr := s.GC(t.Context(), false); gcErr != nil || len(freed.Objects) != 2 {
		t.Errorf("gc took %v, %v", freed, gcErr)
	}
}

// An unreadable tag may point at anything: nothing may be collected.
func TestGCStopsAtUnreadableTag(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "a")
	if err := os.WriteFile(s.path(tagsDir, "py.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.GC(t.Context(), false); err == nil || !strings.Contains(errdef.Hint(err), "rm py") {
		t.Errorf("gc: %v", err)
	}
	if _, err := s.Resolve(snap.Digest); err != nil {
		t.Errorf("collected: %v", err)
	}
}

func TestVerifyRemembers(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "a")
	st, err := os.Stat(snap.MemoryPath())
	if err != nil {
		t.Fatal(err)
	}
	flip(t, snap.MemoryPath(), 77)
	if err = os.Chtimes(snap.MemoryPath(), time.Time{}, st.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err = s.Verify(t.Context(), snap); err != nil {
		t.Errorf("nothing changed that shows, but it was read again: %v", err)
	}
	problems, err := s.Check(t.Context())
	if err != nil || len(problems) != 1 || problems[0].Object != snap.Digest {
		t.Errorf("check: %v, %v", problems, err)
	}
	err = s.Verify(t.Context(), snap)
	if bad := (*DigestError)(nil); !errors.As(err, &bad) || !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("verify after check: %v", err)
	}
	flip(t, snap.MemoryPath(), 77)
	if err = s.Verify(t.Context(), snap); err != nil || !remembered(snap) {
		t.Errorf("verify of the repaired file: %v, remembered: %t", err, remembered(snap))
	}
	wantClean(t, s)
}

// A damaged object gives way when its like is made again.
func TestCommitRepairs(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "a")
	if err := os.Remove(snap.MemoryPath()); err != nil {
		t.Fatal(err)
	}
	if again := create(t, s, "py", "a"); again.Digest != snap.Digest {
		t.Errorf("digests %s and %s", snap.Digest, again.Digest)
	}
	wantClean(t, s)
}

func TestCommitRefuses(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		spoil func(st *Stage, m *Manifest) error
		want  error
	}{
		"no-memory":     {func(st *Stage, _ *Manifest) error { return os.Remove(st.MemoryPath()) }, os.ErrNotExist},
		"no-device":     {func(st *Stage, _ *Manifest) error { return os.Remove(st.DevicePath()) }, os.ErrNotExist},
		"other-file":    {func(st *Stage, _ *Manifest) error { return os.WriteFile(st.Dir()+"/log", nil, 0o600) }, errdef.ErrInvalid},
		"link":          {func(st *Stage, _ *Manifest) error { return relink(st) }, errdef.ErrInvalid},
		"no-engine":     {func(_ *Stage, m *Manifest) error { m.Engine = ""; return nil }, errdef.ErrInvalid},
		"no-machine":    {func(_ *Stage, m *Manifest) error { m.Machine.VCPUs = 0; return nil }, errdef.ErrInvalid},
		"bad-image":     {func(_ *Stage, m *Manifest) error { m.Image = "py"; return nil }, errdef.ErrInvalid},
		"bad-language":  {func(_ *Stage, m *Manifest) error { m.Languages = []string{"a\nb"}; return nil }, errdef.ErrInvalid},
		"huge-manifest": {func(_ *Stage, m *Manifest) error { m.Warmup = []string{strings.Repeat("x", maxJSON)}; return nil }, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			st, err := s.Stage(t.Context(), "py")
			if err != nil {
				t.Fatal(err)
			}
			m := testManifest()
			if err = errors.Join(write(st, "a"), tt.spoil(st, &m)); err != nil {
				t.Fatal(err)
			}
			if _, err = st.Commit(t.Context(), m, Facts{}); !errors.Is(err, tt.want) {
				t.Errorf("commit: %v, want %v", err, tt.want)
			}
			if err = st.Abort(); err != nil {
				t.Error(err)
			}
			wantEmpty(t, s)
		})
	}
}

func relink(st *Stage) error {
	return errors.Join(os.Remove(st.MemoryPath()), os.Symlink("/etc/passwd", st.MemoryPath()))
}

func wantEmpty(t *testing.T, s *Store) {
	t.Helper()
	for _, dir := range []string{objectsDir, tagsDir, trashDir, stagingDir} {
		if names, err := s.list(dir); err != nil || len(names) > 0 {
			t.Errorf("%s has %v, %v", dir, names, err)
		}
	}
}

func TestCommitCancelled(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	st, err := s.Stage(t.Context(), "py")
	if err != nil {
		t.Fatal(err)
	}
	if err = write(st, "a"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("ctrl-c")
	cancel(cause)
	if _, err = st.Commit(ctx, testManifest(), Facts{}); !errors.Is(err, cause) {
		t.Errorf("commit: %v", err)
	}
	if err = st.Abort(); err != nil {
		t.Error(err)
	}
	wantEmpty(t, s)
}

// Check finds any flipped bit of what a digest covers.
func TestCheckFindsFlippedBits(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "some content")
	rapid.Check(t, func(rt *rapid.T) {
		path := filepath.Join(snap.Dir(), rapid.SampledFrom([]string{memoryFile, deviceFile, manifestFile}).Draw(rt, "file"))
		st, err := os.Stat(path)
		if err != nil {
			rt.Fatal(err)
		}
		at := rapid.Int64Range(0, st.Size()*8-1).Draw(rt, "bit")
		flip(rt, path, at)
		problems, err := s.Check(t.Context())
		flip(rt, path, at)
		if err != nil || len(problems) != 1 || problems[0].Object != snap.Digest {
			rt.Errorf("%v, %v", problems, err)
		}
	})
	wantClean(t, s)
}

func TestCheckFindsStrangers(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	snap := create(t, s, "py", "a")
	dangling := tagFile{Version: Version, Digest: digestOf(nil)}
	data, err := dangling.encode()
	if err != nil {
		t.Fatal(err)
	}
	if err = errors.Join(
		os.WriteFile(s.path("notes"), nil, 0o600),
		os.WriteFile(s.path(tagsDir, "notes"), nil, 0o600),
		os.WriteFile(s.path(tagsDir, "torn.json"), nil, 0o600),
		os.WriteFile(s.path(tagsDir, "dangling.json"), data, 0o600),
		os.WriteFile(filepath.Join(snap.Dir(), "notes"), nil, 0o600),
		os.Mkdir(s.path(objectsDir, "abc"), 0o700),
		os.Mkdir(s.objectPath(digestOf([]byte("empty"))), 0o700),
	); err != nil {
		t.Fatal(err)
	}
	problems, err := s.Check(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, p := range problems {
		got[p.Object] = true
	}
	want := map[string]bool{
		"notes": true, "tags/notes": true, "torn": true, "dangling": true, "objects/abc": true,
		digestOf([]byte("empty")): true, filepath.Join(objectsDir, snap.Digest[7:], "notes"): true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

type fataler interface {
	Helper()
	Fatal(args ...any)
}

// flip changes one bit of a file.
func flip(t fataler, path string, bit int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	_, err = f.ReadAt(b[:], bit/8)
	b[0] ^= 1 << (bit % 8)
	_, writeErr := f.WriteAt(b[:], bit/8)
	if err = errors.Join(err, writeErr, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestResolveWhileRemoved: a snapshot is there or is not; it is never damaged
// because somebody removes it just now.
func TestResolveWhileRemoved(t *testing.T) {
	t.Parallel()
	s := newStore(t)
	for range 30 {
		snap := create(t, s, "a", "content")
		removed := make(chan error, 1)
		go func() { removed <- s.Remove(context.WithoutCancel(t.Context()), "a") }()
		for gone := false; !gone; {
			for _, ref := range []string{"a", snap.Digest} {
				_, err := s.Resolve(ref)
				if gone = errors.Is(err, errdef.ErrNotFound); err != nil && !gone {
					t.Fatalf("Resolve %s: %v", ref, err)
				}
			}
		}
		if err := <-removed; err != nil {
			t.Fatal(err)
		}
	}
}
