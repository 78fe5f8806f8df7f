package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// TestAdoption: what one Manager leaves another takes over.
func TestAdoption(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	ids := fork(t, first, 2, func(r *ForkRequest) {
		r.Labels, r.IdleTTL, r.Lifetime = map[string]string{"a": "b"}, time.Hour, time.Hour
	})
	sh(t, first, ids[0], "echo before > file")
	setPool(t, first, 2)
	eventually(t, "2 parked", func() bool { return ready(first) == 2 })
	was, err := first.Get(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	closeManager(t, first)
	if n := w.engine.alive(); n != 2 {
		t.Errorf("%d machines left, want the 2 that were handed out", n)
	}

	second := w.manager(t, lasting)
	is, err := second.Get(ids[0])
	if err != nil {
		t.Fatal(err)
	}
	if !is.LastActive.After(was.LastActive) {
		t.Error("an adopted sandbox has been idle since its record was written")
	}
	was.LastActive = is.LastActive
	if diff := cmp.Diff(was, is); diff != "" {
		t.Errorf("adopted sandbox differs (-was +is):\n%s", diff)
	}
	if got := sh(t, second, ids[0], "cat file"); got != "before" {
		t.Errorf("file holds %q", got)
	}
	if n := len(second.List()); n != 2 {
		t.Errorf("%d adopted", n)
	}
	killAll(t, second)
	w.nothing(t, second)
}

// TestAdoptionOverTheLimit: a smaller limit loses no sandbox.
func TestAdoptionOverTheLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	fork(t, first, 3)
	closeManager(t, first)
	second := w.manager(t, lasting, func(c *Config) { c.Limits.Sandboxes = 1 })
	if n := len(second.List()); n != 3 {
		t.Errorf("%d adopted", n)
	}
	if _, err := second.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1}); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("Fork: %v, want ErrExhausted", err)
	}
	killAll(t, second)
	w.nothing(t, second)
}

// TestExpiredMeanwhile: a lifetime goes on while no daemon runs.
func TestExpiredMeanwhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	id := fork(t, first, 1, func(r *ForkRequest) { r.Lifetime = time.Hour })[0]
	closeManager(t, first)
	change(t, first.dir(id), func(r *record) { r.ExpiresAt = time.Now().Add(-time.Minute) })
	second := w.manager(t, lasting)
	eventually(t, "it to go", func() bool { return len(second.all()) == 0 })
	w.nothing(t, second)
}

// change rewrites a record.
func change(t *testing.T, dir string, f func(*record)) {
	t.Helper()
	r, err := readRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	f(&r)
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, recordFile), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestMachineEndedMeanwhile: it is listed as dead, until it is removed.
func TestMachineEndedMeanwhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	ids := fork(t, first, 2)
	closeManager(t, first)
	w.engine.Crash(seatOf(first, ids[0]), nil)
	w.engine.onStep(func(_ context.Context, step string) error {
		if step == "adopt" {
			return errInjected
		}
		return nil
	})
	second := w.manager(t, lasting)
	for _, id := range ids {
		if info, err := second.Get(id); err != nil || info.State != Dead || info.Reason == "" {
			t.Errorf("Get: %+v, %v", info, err)
		}
		if err := tryPing(t.Context(), second, id); !errors.Is(err, errdef.ErrConflict) {
			t.Errorf("With: %v, want ErrConflict", err)
		}
	}
	closeManager(t, second)
	w.engine.onStep(nil)
	third := w.manager(t, lasting) // which can adopt what the second could not
	ping(t, third, ids[1])
	if info, err := third.Get(ids[0]); err != nil || info.State != Dead {
		t.Errorf("Get: %+v, %v", info, err)
	}
	killAll(t, third)
	w.nothing(t, third)
}

// TestLeftovers: every kind of directory that a Manager may find.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	id := newID()
	good := record{Version: recordVersion, Info: Info{ID: id, State: Running, Engine: "fake"}}
	encode := func(f func(*record)) string {
		r := good
		f(&r)
		data, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	self, err := thisProcess()
	if err != nil {
		t.Fatal(err)
	}
	const none = "no record"
	for name, tt := range map[string]struct {
		dir, record string
		daemon, cli bool // whether it is still there after either has started
		listed      bool // by the daemon
		aside       bool // by the daemon
	}{
		"no-record":         {dir: id, record: none, cli: true},
		"empty-record":      {dir: id, record: "", cli: true, aside: true},
		"torn-record":       {dir: id, record: encode(func(*record) {})[:60], cli: true, aside: true},
		"not-a-record":      {dir: id, record: `{"version":1}`, cli: true, aside: true},
		"too-long":          {dir: id, record: strings.Repeat(" ", maxRecord+1), cli: true, aside: true},
		"of-another-id":     {dir: id, record: encode(func(r *record) { r.ID = newID() }), cli: true, aside: true},
		"no-file":           {dir: id + "/" + recordFile, record: none, cli: true, aside: true},
		"of-a-later-tine":   {dir: id, record: `{"version":2,"id":7}`, daemon: true, cli: true},
		"being-made":        {dir: id, record: encode(func(r *record) { r.State = Creating }), cli: true},
		"without-a-machine": {dir: id, record: encode(func(*record) {}), daemon: true, cli: true, listed: true},
		"dead":              {dir: id, record: encode(func(r *record) { r.State = Dead }), daemon: true, cli: true, listed: true},
		"of-another-engine": {dir: id, record: encode(func(r *record) { r.Engine = "qemu-tcg" }), daemon: true, cli: true, listed: true},
		"of-a-live-process": {dir: id, record: encode(func(r *record) { r.Owner = self }), daemon: true, cli: true},
		"of-a-dead-process": {dir: id, record: encode(func(r *record) { r.Owner = self; r.Owner.StartTime++ })},
		"of-another-boot":   {dir: id, record: encode(func(r *record) { r.Owner = self; r.Owner.BootID = "other" })},
		"being-born":        {dir: unborn(id, self), record: none, daemon: true, cli: true},
		"never-born":        {dir: unborn(id, process{PID: self.PID, StartTime: self.StartTime + 1}), record: none},
		"nobody-s-child":    {dir: id + newSuffix, record: none, daemon: true, cli: true},
		"not-ours":          {dir: "precious", record: none, daemon: true, cli: true},
		"almost-an-id":      {dir: id + "0", record: none, daemon: true, cli: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, ephemeral := range []bool{true, false} {
				w := newWorld(t)
				dir := filepath.Join(w.dir, "sandboxes", tt.dir)
				if err := os.MkdirAll(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if tt.record != none {
					if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(tt.record), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				m := w.manager(t, func(c *Config) { c.Ephemeral = ephemeral })
				want := map[bool]bool{true: tt.cli, false: tt.daemon}[ephemeral]
				if _, err := os.Stat(dir); (err == nil) != want {
					t.Errorf("ephemeral %v: still there: %v, want %v", ephemeral, err, want)
				}
				aside := slices.ContainsFunc(names(t, m.Dir), durable.IsAside)
				if want := tt.aside && !ephemeral; aside != want {
					t.Errorf("ephemeral %v: set aside: %v, want %v", ephemeral, aside, want)
				}
				if listed := len(m.List()) == 1; listed != (tt.listed && !ephemeral) {
					t.Errorf("ephemeral %v: listed: %v", ephemeral, listed)
				}
				killAll(t, m)
			}
		})
	}
}

// TestDamagedRecord: a machine whose record cannot be understood is ended, and
// its files are kept for somebody to look at. The others do not notice.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	ids := fork(t, first, 2)
	if _, err := first.Suspend(t.Context(), ids[0]); err != nil {
		t.Fatal(err)
	}
	closeManager(t, first)
	const torn = `{"version":1,"id":"sb-`
	for _, id := range ids[:1] {
		if err := os.WriteFile(filepath.Join(first.dir(id), recordFile), []byte(torn), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	machine, _ := stray(t, ids[0])
	second := w.manager(t, lasting)
	wait(t, machine)
	ping(t, second, ids[1])
	if _, err := second.Get(ids[0]); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("the damaged one: %v, want ErrNotFound", err)
	}
	aside := names(t, second.Dir)
	aside = slices.DeleteFunc(aside, func(name string) bool { return !durable.IsAside(name) })
	if len(aside) != 1 || !strings.HasPrefix(aside[0], ids[0]) {
		t.Fatalf("set aside: %q", aside)
	}
	if data, err := os.ReadFile(filepath.Join(second.Dir, aside[0], recordFile)); err != nil || string(data) != torn {
		t.Errorf("its record: %q, %v", data, err)
	}
	if _, err := w.snaps.Held(ids[0]); err != nil {
		t.Errorf("what it was suspended in is lost: %v", err)
	}
	killAll(t, second)
}

// TestRemovalCutOff: a removal that has begun is completed by the next daemon,
// wherever it was cut off, and does not leave a dead sandbox.
func TestRemovalCutOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	ids := fork(t, first, 2)
	w.engine.onStep(func(_ context.Context, step string) error {
		if step != "kill" {
			return nil
		}
		r, err := readRecord(first.dir(ids[0]))
		if err != nil || r.State != Creating {
			t.Errorf("as its machine ends the record says %s, %v", r.State, err)
		}
		return errInjected
	})
	if err := first.Kill(t.Context(), ids[0]); !errors.Is(err, errInjected) {
		t.Errorf("Kill: %v", err)
	}
	w.engine.onStep(nil)
	closeManager(t, first)
	w.engine.Crash(seatOf(first, ids[0]), nil) // the fake has no process to be killed
	second := w.manager(t, lasting)
	if list := second.List(); len(list) != 1 || list[0].ID != ids[1] {
		t.Errorf("listed: %+v", list)
	}
	if _, err := os.Stat(second.dir(ids[0])); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory: %v", err)
	}
	killAll(t, second)
	w.nothing(t, second)
}

// stray starts a process that looks like the machine of a sandbox.
func stray(t *testing.T, id string) (gone <-chan struct{}, pid int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "read x", machineName+id)
	in, err := cmd.StdinPipe() // nothing ever comes
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = in.Close()
		<-done
	})
	return done, cmd.Process.Pid
}

// TestStrayMachines: a machine that no record names yet is found by its
// arguments, and ended.
func TestStrayMachines(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t, lasting)
	w.template(t, m)
	handedOut := fork(t, m, 1)[0]
	closeManager(t, m)

	r := m.newRecord(newID())
	if err := r.create(m.Dir, m.self); err != nil {
		t.Fatal(err)
	}
	unnamed, _ := stray(t, r.ID)
	// One that a record names not, as another took its place: it is ended too.
	lost, _ := stray(t, handedOut)
	stranger, pid := stray(t, newID())
	w.engine.onStep(func(_ context.Context, step string) error {
		if step == "adopt" {
			return errInjected
		}
		return nil
	})
	again := w.manager(t, lasting)
	wait(t, unnamed)
	wait(t, lost)
	killAll(t, again)
	select {
	case <-stranger:
		t.Error("a machine of nobody here was ended")
	default:
	}
	if start, err := linux.StartTime(pid); err != nil || start == 0 {
		t.Error(err)
	}
	w.engine.Crash(seatOf(m, handedOut), nil) // the fake has no process to be killed
	w.nothing(t, again)
}

func wait(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Fatal("a stray machine runs on")
	}
}

// TestRecordNotWritten: a sandbox whose record cannot be written is not handed out.
func TestRecordNotWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	w.template(t, m)
	w.engine.onStep(func(_ context.Context, step string) error {
		if step != "dial" {
			return nil
		}
		for _, name := range names(t, m.Dir) {
			path := filepath.Join(m.dir(name), recordFile)
			if err := errors.Join(os.Remove(path), os.Mkdir(path, 0o700)); err != nil {
				return err
			}
		}
		return nil
	})
	results, err := m.Fork(t.Context(), ForkRequest{Snapshot: "py", N: 1})
	if err != nil {
		t.Fatal(err)
	}
	if results[0].Err == nil {
		t.Error("Fork succeeded")
	}
	w.nothing(t, m)
}

func FuzzDecodeRecord(f *testing.F) {
	id := newID()
	r := record{Version: recordVersion, Info: Info{ID: id, State: Running}}
	data, err := json.Marshal(r)
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(data), string(data[:30]), "", "null", "{}", "[]", `{"version":2}`, `{"version":-1}`, `{"version":1,"id":"../x"}`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data, id)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrUnsupported) {
				t.Errorf("error without a category: %v", err)
			}
			return
		}
		if r.ID != id || r.Version != recordVersion {
			t.Errorf("record of %q, version %d", r.ID, r.Version)
		}
	})
}

func TestIDs(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 1000 {
		id := newID()
		if !isID(id) || seen[id] {
			t.Errorf("bad id %q", id)
		}
		seen[id] = true
	}
	for _, bad := range []string{"", "sb-", "sb-../../../../", "sb-ABCDEFGHIJKL", "sb-abcdefghijk1", "xx-abcdefghijkl"} {
		if isID(bad) {
			t.Errorf("%q is no id", bad)
		}
	}
}

// TestPins: the last machine's end frees the snapshot.
func TestPins(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	m := w.manager(t)
	snap := w.template(t, m)
	id := fork(t, m, 1)[0]
	f, err := os.Open(filepath.Join(snap.Dir(), "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	try := func() error { return durable.TryLockFile(f, false) }
	if err := try(); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("lock while a fork runs: %v", err)
	}
	if err := m.Kill(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := try(); err != nil {
		t.Errorf("lock afterwards: %v", err)
	}
}

// TestMuteGuest: a guest whose answer does not come, because of how its last
// host ended, is asked again.
func TestMuteGuest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.manager(t, lasting)
	w.template(t, first)
	id := fork(t, first, 1)[0]
	sh(t, first, id, "echo before > file")
	closeManager(t, first)

	second := w.manager(t, lasting)
	w.engine.onStep(failOnce("say", 1, func(ctx context.Context) error { return ctx.Err() }))
	if got := sh(t, second, id, "cat file"); got != "before" {
		t.Errorf("file holds %q", got)
	}
	killAll(t, second)
	w.nothing(t, second)
}
