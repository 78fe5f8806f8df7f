package workspace

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/sandbox"
)

// boxes are sandboxes that survive a killed process: a file each.
type boxes struct {
	dir  string
	step func(op string) error // before and after each change

	mu sync.Mutex
}

func (b *boxes) at(op string) error {
	if b.step == nil {
		return nil
	}
	return b.step(op)
}

func (b *boxes) save(i sandbox.Info) error {
	data, err := json.Marshal(i)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.dir, i.ID), data, 0o600)
}

func (b *boxes) Fork(_ context.Context, req sandbox.ForkRequest) ([]sandbox.ForkResult, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.at("fork"); err != nil {
		return nil, err
	}
	info := sandbox.Info{ID: fmt.Sprintf("sb-%d", len(b.List())+1), SnapshotTag: req.Snapshot, State: sandbox.Running, Labels: req.Labels, MemoryLimitMiB: req.Limits.MemoryMiB}
	err := b.save(info)
	return []sandbox.ForkResult{{Sandbox: info}}, errors.Join(err, b.at("forked"))
}

func (b *boxes) Get(id string) (sandbox.Info, error) {
	data, err := os.ReadFile(filepath.Join(b.dir, id))
	if err != nil {
		return sandbox.Info{}, fmt.Errorf("sandbox %s %w", id, errdef.ErrNotFound)
	}
	var i sandbox.Info
	return i, json.Unmarshal(data, &i)
}

func (b *boxes) List() []sandbox.Info {
	var all []sandbox.Info
	entries, _ := os.ReadDir(b.dir)
	for _, e := range entries {
		if i, err := b.Get(e.Name()); err == nil {
			all = append(all, i)
		}
	}
	return all
}

func (b *boxes) Kill(_ context.Context, id string) error {
	if err := b.at("kill"); err != nil {
		return err
	}
	err := os.Remove(filepath.Join(b.dir, id))
	if err != nil {
		err = fmt.Errorf("sandbox %s %w", id, errdef.ErrNotFound)
	}
	return errors.Join(err, b.at("killed"))
}

func (b *boxes) turn(id string, state sandbox.State) (sandbox.Info, error) {
	i, err := b.Get(id)
	if err = errors.Join(err, b.at("turn")); err != nil {
		return i, err
	}
	i.State = state
	return i, errors.Join(b.save(i), b.at("turned"))
}

func (b *boxes) Suspend(_ context.Context, id string) (sandbox.Info, error) {
	return b.turn(id, sandbox.Suspended)
}

func (b *boxes) Resume(_ context.Context, id string) (sandbox.Info, error) {
	return b.turn(id, sandbox.Running)
}

func newBoxes(t *testing.T, dir string) *boxes {
	t.Helper()
	b := &boxes{dir: filepath.Join(dir, "boxes")}
	if err := os.MkdirAll(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return b
}

// open opens the workspaces in dir, until the test ends or close is called.
func open(t *testing.T, dir string, b *boxes) (s *Store, closeStore func()) {
	t.Helper()
	s, err := Open(t.Context(), filepath.Join(dir, "workspaces"), b, nil)
	if err != nil {
		t.Fatal(err)
	}
	closeStore = sync.OnceFunc(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(closeStore)
	return s, closeStore
}

func TestLife(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := newBoxes(t, dir)
	s, closeStore := open(t, dir, b)
	w, err := s.Create(t.Context(), CreateRequest{Name: "w", Snapshot: "py", MemoryLimitMiB: 64})
	if err != nil || w.Status != Running || w.Sandbox.MemoryLimitMiB != 64 {
		t.Fatalf("%+v, %v", w, err)
	}
	if _, err = s.Create(t.Context(), CreateRequest{Name: "w", Snapshot: "py"}); !errors.Is(err, errdef.ErrExists) {
		t.Errorf("again: %v", err)
	}
	if _, err = s.Resume(t.Context(), "w"); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("resume of a running one: %v", err)
	}
	if w, err = s.Suspend(t.Context(), "w"); err != nil || w.Status != Suspended {
		t.Errorf("%+v, %v", w, err)
	}
	if _, err = Open(t.Context(), filepath.Join(dir, "workspaces"), b, nil); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("opened twice: %v", err)
	}
	closeStore()
	s, _ = open(t, dir, b)
	again, err := s.Get("w")
	if diff := cmp.Diff(w, again); diff != "" || err != nil {
		t.Errorf("after a restart (-want +got):\n%s%v", diff, err)
	}
	if w, err = s.Resume(t.Context(), "w"); err != nil || w.Status != Running || w.Sandbox.MemoryLimitMiB != 64 {
		t.Errorf("%+v, %v", w, err)
	}
	if err = s.Delete(t.Context(), "w"); err != nil || len(b.List()) != 0 {
		t.Errorf("%v, sandboxes %v", err, b.List())
	}
	if err = s.Delete(t.Context(), "w"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("deleted twice: %v", err)
	}
}

// TestFailures: whatever fails, a workspace is there with its sandbox or
// neither is, and a failed suspend leaves it as it was.
func TestFailures(t *testing.T) {
	t.Parallel()
	broken := errors.New("broken")
	for _, op := range []string{"fork", "forked", "kill", "killed", "turn", "turned"} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			b := newBoxes(t, dir)
			s, _ := open(t, dir, b)
			fail := true
			b.step = func(at string) error {
				if fail && at == op {
					return broken
				}
				return nil
			}
			_, err := s.Create(t.Context(), CreateRequest{Name: "w", Snapshot: "py"})
			if failed := strings.HasPrefix(op, "fork"); errors.Is(err, broken) != failed {
				t.Fatalf("create: %v", err)
			} else if failed {
				if names, listErr := s.names(); len(names) != 0 || listErr != nil || len(b.List()) != 0 {
					t.Errorf("left: %v, %v, %v", names, b.List(), listErr)
				}
				return
			}
			if _, err = s.Suspend(t.Context(), "w"); errors.Is(err, broken) != strings.HasPrefix(op, "turn") {
				t.Errorf("suspend: %v", err)
			}
			if err = s.Delete(t.Context(), "w"); errors.Is(err, broken) != strings.HasPrefix(op, "kill") {
				t.Errorf("delete: %v", err)
			}
			fail = false
			if err = s.Delete(t.Context(), "w"); err != nil && !errors.Is(err, errdef.ErrNotFound) || len(b.List()) != 0 {
				t.Errorf("delete again: %v, %v", err, b.List())
			}
		})
	}
}

// TestSameName: of many who want a name, one gets it.
func TestSameName(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	b := newBoxes(t, dir)
	s, _ := open(t, dir, b)
	errs := make([]error, 16)
	var work sync.WaitGroup
	for i := range errs {
		work.Go(func() { _, errs[i] = s.Create(t.Context(), CreateRequest{Name: "w", Snapshot: "py"}) })
	}
	work.Wait()
	made := 0
	for _, err := range errs {
		if err == nil {
			made++
		} else if !errors.Is(err, errdef.ErrExists) && !errors.Is(err, errdef.ErrConflict) {
			t.Error(err)
		}
	}
	if made != 1 || len(b.List()) != 1 {
		t.Errorf("%d made, %d sandboxes", made, len(b.List()))
	}
}

// TestDamaged: a record that cannot be read is seen, and can be deleted; one
// of a later version is left alone.
func TestDamaged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, closeStore := open(t, dir, newBoxes(t, dir))
	for name, content := range map[string]string{"bad": "{", "worse": "", "late": `{"version":2,"name":"late"}`} {
		if err := os.WriteFile(s.path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.List()
	if err != nil || len(all) != 3 || all[0].Status != Stale || all[1].Status != Stale || all[2].Status != Stale {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err = s.Create(t.Context(), CreateRequest{Name: "bad", Snapshot: "py"}); !errors.Is(err, errdef.ErrUnavailable) {
		t.Errorf("create over a damaged one: %v", err)
	}
	if err = s.Delete(t.Context(), "bad"); err != nil {
		t.Error(err)
	}
	if err = s.Delete(t.Context(), "late"); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("delete of a later version's: %v", err)
	}
	worse := s.path("worse")
	closeStore()
	s, _ = open(t, dir, newBoxes(t, dir)) // which sets it aside, and not the later version's
	if all, err = s.List(); err != nil || len(all) != 1 || all[0].Name != "late" {
		t.Errorf("%+v, %v", all, err)
	}
	if aside, globErr := filepath.Glob(worse + ".corrupt-*"); globErr != nil || len(aside) != 1 {
		t.Errorf("set aside: %q, %v", aside, globErr)
	}
	if _, err = s.Create(t.Context(), CreateRequest{Name: "worse", Snapshot: "py"}); err != nil {
		t.Errorf("its name is not free: %v", err)
	}
}

// The steps at which TestKilled kills a process, and what it was about.
const (
	killVar = "TINE_WORKSPACE_KILL"
	dirVar  = "TINE_WORKSPACE_DIR"
)

// TestKilled kills a process with kill -9 before and after each change that it
// makes to a sandbox, and sees that nothing is lost that anybody was told of,
// and nothing is left that nobody was.
func TestKilled(t *testing.T) {
	if at := os.Getenv(killVar); at != "" {
		live(t, os.Getenv(dirVar), at)
		return
	}
	t.Parallel()
	for _, tt := range []struct {
		at     string
		status Status // "" for no workspace
	}{
		{"fork 2", ""},
		{"forked 2", ""},
		{"turn 1", Running},
		{"turned 1", Suspended},
		{"turn 2", Suspended},
		{"turned 2", Running},
		{"kill 1", Running},
		{"killed 1", Stale},
	} {
		t.Run(strings.ReplaceAll(tt.at, " ", "_"), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			b := newBoxes(t, dir)
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKilled$")
			cmd.Env = append(os.Environ(), killVar+"="+tt.at, dirVar+"="+dir)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
				t.Fatalf("the process was not killed: %v\n%s", err, out)
			}
			s, _ := open(t, dir, b)
			got := map[string]Status{}
			all, err := s.List()
			for _, w := range all {
				got[w.Name] = w.Status
			}
			want := map[string]Status{"first": Running}
			if tt.status != "" {
				want["w"] = tt.status
			}
			if diff := cmp.Diff(want, got); diff != "" || err != nil {
				t.Errorf("(-want +got):\n%s%v", diff, err)
			}
			living := 1
			if tt.status == Running || tt.status == Suspended {
				living = 2
			}
			if len(b.List()) != living {
				t.Errorf("sandboxes: %+v", b.List())
			}
			if tt.status != "" {
				if err = s.Delete(t.Context(), "w"); err != nil {
					t.Error(err)
				}
			}
			if _, err = s.Create(t.Context(), CreateRequest{Name: "w", Snapshot: "py"}); err != nil {
				t.Error(err)
			}
		})
	}
}

// live is the life of a process that is killed at a step: "fork 2" is just
// before the second fork, "forked 2" just after it.
func live(t *testing.T, dir, at string) {
	t.Helper()
	b := newBoxes(t, dir)
	count := map[string]int{}
	b.step = func(op string) error {
		count[op]++
		if op+" "+strconv.Itoa(count[op]) == at {
			return syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
		return nil
	}
	s, _ := open(t, dir, b)
	var errs []error
	for _, name := range []string{"first", "w"} {
		_, err := s.Create(t.Context(), CreateRequest{Name: name, Snapshot: "py"})
		errs = append(errs, err)
	}
	_, err := s.Suspend(t.Context(), "w")
	_, resumeErr := s.Resume(t.Context(), "w")
	t.Fatal("still alive", errors.Join(append(errs, err, resumeErr, s.Delete(t.Context(), "w"))...))
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for name, good := range map[string]bool{
		"w": true, "My_work-space1": true, "-": true, strings.Repeat("x", 64): true,
		"": false, strings.Repeat("x", 65): false, "a.b": false, "../a": false, "a/b": false, "a b": false, "é": false, "a\x00": false,
	} {
		if err := CheckName(name); (err == nil) != good || (!good && !errors.Is(err, errdef.ErrInvalid)) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func FuzzRecord(f *testing.F) {
	for _, seed := range []string{
		`{"version":1,"name":"w","snapshot":"py","created_at":"2026-11-21T18:00:00Z","claim":"w/ABC","sandbox_id":"sb-1","memory_limit_mib":64}`,
		`{"version":1,"name":"w","snapshot":"py","created_at":"2026-11-21T18:00:00Z","claim":"w/ABC"}`,
		`{"version":2,"name":"w"}`, `{"version":1,"name":"x","claim":"c"}`, `{} {}`, `null`, `[]`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data, "w")
		if err != nil {
			if !errors.Is(err, errdef.ErrUnavailable) && !errors.Is(err, errdef.ErrUnsupported) {
				t.Errorf("%q: %v", data, err)
			}
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			return // a time that JSON does not have
		}
		back, err := decodeRecord(again, "w")
		if diff := cmp.Diff(r, back); diff != "" || err != nil {
			t.Errorf("%q: (-want +got):\n%s%v", data, diff, err)
		}
	})
}
