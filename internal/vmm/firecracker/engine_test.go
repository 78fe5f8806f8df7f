package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/vmm"
)

// TestEngine is what holds of a Firecracker in the jail and of one that is free.
func TestEngine(t *testing.T) {
	t.Parallel()
	for mode, config := range map[string]func(*testing.T, Config) Config{
		"free": func(_ *testing.T, c Config) Config { return c }, "jailed": jailed,
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			e := openEngine(t, config(t, fakeConfig(t, "1.16.1")))
			for name, test := range map[string]func(*testing.T, *Engine){
				"life": life, "stream": stream, "adoption": adoption, "fill": fill, "fill fails": fillFails, "saves": saves,
				"hostile state": hostileState, "full disk": fullDisk, "freeze fails": freezeFails, "refuses": refuses, "hostile socket": hostileSocket,
				"KVM": noKVM, "failures": failures, "cancelled": cancelled, "disk": disk, "end": end,
			} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					test(t, e)
				})
			}
		})
	}
}

// life: a machine is booted, frozen, goes on, and is restored.
func life(t *testing.T, e *Engine) {
	ctx := t.Context()
	spec := toBoot(t, "../ödd id,/with all sorts of things that are longer than any that there is")
	vm := start(t, e, spec)
	if _, err := vm.Memory(); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("memory of a template: %v", err)
	}
	if _, err := vm.FreezeDisk(ctx); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("freeze the disk of a machine that runs: %v", err)
	}
	device := filepath.Join(t.TempDir(), "device")
	try(t, vm.Freeze(ctx, device))
	paused(t, vm, true)
	try(t, vm.Resume(ctx))
	paused(t, vm, false)
	info, err := os.Stat(spec.Memory)
	if err != nil || info.Size() != 64*mib {
		t.Errorf("memory: %v, %v", info, err)
	}
	try(t, checkState(device))
	fork := restore(t, e, vmm.RestoreSpec{Common: again(t, vmm.RestoreSpec{Common: spec.Common}, "").Common, Memory: spec.Memory, Device: device})
	paused(t, fork, false)
	if err = fork.Freeze(ctx, device+"2"); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("freeze a fork: %v", err)
	}
	space, err := fork.Memory()
	try(t, err)
	if space.PID != fork.PID() || len(space.Ranges) != 1 {
		t.Errorf("memory is at %+v", space)
	}
	if err = fork.SaveDevice(ctx, device+"2"); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("save the state of a machine that runs: %v", err)
	}
	for what, err := range map[string]error{
		"halted": fork.Halted(ctx), "answer": fork.Answer(), "limits": fork.SetLimits(vmm.Limits{PIDs: 1}),
	} {
		if !errors.Is(err, errdef.ErrUnsupported) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if e.keeper.Jail != nil { // it has files of its own
		if got := entries(t, fork.Handle().Dir); len(got) > 0 {
			t.Errorf("files in the machine's directory: %q", got)
		}
	}
}

func paused(t *testing.T, vm vmm.VM, want bool) {
	t.Helper()
	if got, err := vm.Paused(t.Context()); err != nil || got != want {
		t.Errorf("paused: %v, %v, want %v", got, err, want)
	}
}

// stream: what is said to the agent arrives, also when the machine was saved
// meanwhile, which costs it its connections.
func stream(t *testing.T, e *Engine) {
	ctx := t.Context()
	vm := restore(t, e, again(t, frozen(t, e, toBoot(t, "t")), "f"))
	s, err := vm.Dial(ctx)
	try(t, err)
	defer func() { try(t, s.Close()) }()
	say(t, s, "first")
	for _, text := range []string{"second", "third"} {
		try(t, vm.Pause(ctx))
		try(t, vm.SaveDevice(ctx, filepath.Join(t.TempDir(), "device")))
		try(t, vm.Resume(ctx))
		say(t, s, text)
	}
	try(t, vm.Pause(ctx))
	try(t, vm.Resume(ctx))
	say(t, s, "last")
}

// adoption: another engine, of the same Firecracker, finds the machine by what is
// written down of it.
func adoption(t *testing.T, e *Engine) {
	ctx := t.Context()
	spec := frozen(t, e, withDisk(t, toBoot(t, "t")))
	vm := restore(t, e, again(t, spec, "f"))
	try(t, vm.Pause(ctx))
	before, err := vm.FreezeDisk(ctx)
	try(t, err)
	kept, err := json.Marshal(vm.Handle())
	try(t, err)
	try(t, vm.Detach())
	var handle vmm.Handle
	try(t, json.Unmarshal(kept, &handle))
	other := like(e)
	mine, err := other.Adopt(ctx, handle)
	try(t, err)
	paused(t, mine, true)
	try(t, mine.SaveDevice(ctx, filepath.Join(t.TempDir(), "device")))
	after, err := mine.FreezeDisk(ctx)
	if diff := cmp.Diff(before, after); err != nil || diff != "" {
		t.Errorf("disk of an adopted machine: %v (-want +got):\n%s", err, diff)
	}
	_, err = mine.Memory()
	try(t, err)
	try(t, mine.Resume(ctx))
	s, err := mine.Dial(ctx)
	try(t, err)
	say(t, s, "hello")
	try(t, s.Close())
	old := like(e)
	old.version.Patch = 7
	if _, err = old.Adopt(ctx, handle); !errors.Is(err, errdef.ErrConflict) {
		t.Errorf("adopt a machine of another version: %v", err)
	}
	try(t, mine.Kill(ctx))
	<-vm.Done()
	if _, err = other.Adopt(ctx, handle); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("adopt a machine that is gone: %v", err)
	}
}

// like is another engine of the same Firecracker and jail.
func like(e *Engine) *Engine {
	other := *e
	return &other
}

// fill: memory is completed before the machine is made.
func fill(t *testing.T, e *Engine) {
	spec := again(t, frozen(t, e, toBoot(t, "t")), "f")
	calls := 0
	spec.Fill = func(_ context.Context, space guestmem.Space) error {
		calls++
		_, err := space.WriteAt([]byte("filled"), 4096)
		return err
	}
	vm := restore(t, e, spec)
	space, err := vm.Memory()
	try(t, err)
	got := make([]byte, 6)
	_, err = space.ReadAt(got, 4096)
	if err != nil || string(got) != "filled" || calls != 1 {
		t.Errorf("memory has %q after %d calls, %v", got, calls, err)
	}
	image, err := os.ReadFile(spec.Memory)
	if err != nil || string(image[4096:4102]) == "filled" {
		t.Errorf("the image was written to, or %v", err)
	}
}

func fillFails(t *testing.T, e *Engine) {
	spec := again(t, frozen(t, e, toBoot(t, "t")), "f")
	errFill := errors.New("a layer is gone")
	spec.Fill = func(context.Context, guestmem.Space) error { return errFill }
	if vm, err := e.Restore(t.Context(), spec); !errors.Is(err, errFill) {
		t.Errorf("%v, %v", vm, err)
	}
}

// saves: device state is saved again and again, and nothing is left of it.
func saves(t *testing.T, e *Engine) {
	ctx := t.Context()
	vm := restore(t, e, again(t, frozen(t, e, toBoot(t, "t")), "f"))
	before := entries(t, vm.Handle().Dir)
	dir := t.TempDir()
	for i := range 20 {
		try(t, vm.Pause(ctx))
		device := filepath.Join(dir, string(rune('a'+i)))
		try(t, vm.SaveDevice(ctx, device))
		try(t, checkState(device))
		if err := vm.SaveDevice(ctx, device); !errors.Is(err, os.ErrExist) {
			t.Errorf("save over a file: %v", err)
		}
		noState(t, vm)
		try(t, vm.Resume(ctx))
	}
	noState(t, vm)
	if diff := cmp.Diff(before, entries(t, vm.Handle().Dir)); diff != "" {
		t.Errorf("(-before +after):\n%s", diff)
	}
}

// noState sees that a machine's Firecracker has left no device state.
func noState(t *testing.T, vm vmm.VM) {
	t.Helper()
	if _, err := vm.(*machine).place.Read(stateFile, maxState); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("device state is left: %v", err)
	}
}

// end: nothing is wrong with a machine that is gone, and all say so.
func end(t *testing.T, e *Engine) {
	ctx := t.Context()
	vm := restore(t, e, again(t, frozen(t, e, toBoot(t, "t")), "f"))
	try(t, vm.Kill(ctx))
	try(t, vm.Kill(ctx))
	<-vm.Done()
	try(t, vm.Err())
	_, pausedErr := vm.Paused(ctx)
	_, dialErr := vm.Dial(ctx)
	for what, err := range map[string]error{
		"paused": pausedErr, "dial": dialErr, "pause": vm.Pause(ctx), "resume": vm.Resume(ctx),
		"save": vm.SaveDevice(ctx, filepath.Join(t.TempDir(), "device")),
	} {
		if !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("%s: %v", what, err)
		}
	}
	try(t, vm.Detach())
	try(t, vm.Detach())
}

var update = flag.Bool("update", false, "write the files in testdata")

// TestRequests: what each version is asked, in which order, in the life of a
// template and of a machine that is restored and saved.
func TestRequests(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"1.10.1", "1.13.2", "1.14.0", "1.16.0", "1.16.1"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			checkRequests(t, fakeEngine(t, version), "testdata/requests/"+version)
		})
	}
	t.Run("jailed", func(t *testing.T) {
		t.Parallel()
		e := openEngine(t, jailed(t, fakeConfig(t, "1.16.1")))
		if !e.Caps().Net {
			t.Skipf("NOT TESTED: no network: %v", e.Caps().JailLacks)
		}
		checkRequests(t, e, "testdata/requests/jailed")
	})
	t.Run("template", func(t *testing.T) {
		t.Parallel()
		cfg := fakeConfig(t, "1.16.1")
		cfg.CPUTemplate = "T2S"
		static := told(t, start(t, openEngine(t, cfg), toBoot(t, "t")))
		cfg.CPUTemplate = filepath.Join(t.TempDir(), "own")
		try(t, os.WriteFile(cfg.CPUTemplate, []byte(`{"msr_modifiers":[]}`), 0o600))
		custom := told(t, start(t, openEngine(t, cfg), toBoot(t, "t")))
		if want := `PUT /machine-config {"vcpu_count":1,"mem_size_mib":64,"cpu_template":"T2S"}`; static[1] != want {
			t.Errorf("static template: %q", static)
		}
		if want := `PUT /cpu-config {"msr_modifiers":[]}`; custom[2] != want {
			t.Errorf("custom template: %q", custom)
		}
	})
}

func checkRequests(t *testing.T, e *Engine, golden string) {
	ctx := t.Context()
	spec := withDisk(t, toBoot(t, "t"))
	spec.Boot.Cmdline = "tine.test=1"
	spec.Machine.Net = e.keeper.Jail != nil
	vm := start(t, e, spec)
	device := filepath.Join(t.TempDir(), "device")
	try(t, vm.Freeze(ctx, device))
	booted := told(t, vm)
	try(t, vm.Kill(ctx))
	r := again(t, vmm.RestoreSpec{Common: spec.Common, Memory: spec.Memory, Device: device, Disk: []string{spec.Disk}, Paused: true}, "f")
	fork := restore(t, e, r)
	try(t, fork.Resume(ctx))
	try(t, fork.Resume(ctx)) // it runs
	try(t, fork.Pause(ctx))
	try(t, fork.SaveDevice(ctx, filepath.Join(t.TempDir(), "device")))
	try(t, fork.Resume(ctx))
	_, linkErr := fork.Link()
	if (linkErr == nil) != spec.Machine.Net {
		t.Errorf("link: %v", linkErr)
	}
	got := slices.Concat([]string{"# boot and freeze"}, booted, []string{"# restore, resume, save, resume"}, told(t, fork), []string{""})
	text := strings.Join(got, "\n")
	if *update {
		try(t, os.MkdirAll(filepath.Dir(golden), 0o755))
		try(t, os.WriteFile(golden, []byte(text), 0o644))
	}
	want, err := os.ReadFile(golden)
	try(t, err)
	if diff := cmp.Diff(string(want), text); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestTwoEngines: two daemons have machines of their own.
func TestTwoEngines(t *testing.T) {
	t.Parallel()
	one, two := fakeEngine(t, "1.16.1"), fakeEngine(t, "1.13.2")
	a, b := start(t, one, toBoot(t, "same")), start(t, two, toBoot(t, "same"))
	try(t, a.Kill(t.Context()))
	paused(t, b, false)
	if one.Version() != "1.16.1" || two.Version() != "1.13.2" || one.Name() != two.Name() {
		t.Error(one.Version(), two.Version(), one.Name(), two.Name())
	}
}
