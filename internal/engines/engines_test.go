package engines

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm/qemu"
)

// anyNumber of runs: those killed early may not have been noted.
const anyNumber = -1

// On every kind of host, auto finds an engine and forcing KVM says why not.
func TestChoose(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		behaviour string
		kernel    bool
		change    func(t *testing.T, h *host)
		auto      string
		reason    string // of qemu-kvm
		hint      string // part of it
		runs      int
	}{
		"works": {behaviour: "works", auto: QEMUKVM, reason: "at this boot, a probe machine ran", runs: 1},
		"works_with_kernel": {
			behaviour: "works", kernel: true, auto: QEMUKVM,
			reason: "at this boot, a probe machine and a kernel ran", runs: 2,
		},
		"hangs": {
			behaviour: "hangs", auto: QEMUTCG, hint: "rm ", runs: anyNumber,
			change: func(_ *testing.T, h *host) { h.bareBound = 50 * time.Millisecond },
			reason: "/dev/kvm opens, but a probe machine had not ended after 50ms",
		},
		"hangs_with_kernel": {
			behaviour: "hangs-with-kernel", kernel: true, auto: QEMUTCG, hint: "rm ", runs: anyNumber,
			change: func(_ *testing.T, h *host) { h.kernelBound = 50 * time.Millisecond },
			reason: "/dev/kvm opens, but a kernel in a probe machine had not ended after 50ms",
		},
		"breaks": {
			behaviour: "breaks", auto: QEMUTCG, hint: "rm ", runs: 1,
			reason: `/dev/kvm opens, but a probe machine broke down: "KVM internal error. Suberror: 1"`,
		},
		"refuses": {
			behaviour: "refuses", auto: QEMUTCG, hint: "rm ", runs: 1,
			reason: `/dev/kvm opens, but a probe machine ended with status 1: "Could not access KVM kernel module"`,
		},
		"resets": {
			behaviour: "resets", kernel: true, auto: QEMUTCG, hint: "use qemu-tcg", runs: 2,
			reason: `/dev/kvm opens, but a kernel in a probe machine ended with status 0: "Booting\x1b[2J from ROM.."`,
		},
		"no_flag": {
			behaviour: "works", auto: QEMUTCG, hint: "nested virtualisation",
			change: func(t *testing.T, h *host) { write(t, h.cpuinfo, cpuinfo("fpu vmxnet")) },
			reason: "the CPU shows neither vmx nor svm",
		},
		"amd": {
			behaviour: "works", auto: QEMUKVM, reason: "at this boot, a probe machine ran", runs: 1,
			change: func(t *testing.T, h *host) { write(t, h.cpuinfo, cpuinfo("fpu svm")) },
		},
		"no_device": {
			behaviour: "works", auto: QEMUTCG, hint: "modprobe",
			change: func(_ *testing.T, h *host) { h.device = "/no/such/kvm" },
			reason: "open /no/such/kvm: no such file or directory",
		},
		"no_cpuinfo": {
			behaviour: "works", auto: QEMUTCG,
			change: func(_ *testing.T, h *host) { h.cpuinfo = "/no/such/cpuinfo" },
			reason: "read CPU flags: open /no/such/cpuinfo: no such file or directory",
		},
		"kernel_is_gone": {
			behaviour: "works", auto: QEMUKVM, reason: "at this boot, a probe machine ran", runs: 1,
			change: func(_ *testing.T, h *host) { h.cfg.Kernel = "/no/such/vmlinux" },
		},
		"state_is_gone": {
			behaviour: "works", auto: QEMUKVM, reason: "at this boot, a probe machine ran", runs: 1,
			change: func(_ *testing.T, h *host) { h.cfg.StateDir = "" },
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := fakeHost(t, tt.behaviour)
			if tt.kernel {
				giveKernel(t, h)
			}
			if tt.change != nil {
				tt.change(t, h)
			}
			engine, err := h.choose(t.Context())
			if err != nil || engine.Name() != tt.auto {
				t.Fatalf("auto chose %v, %v; want %s", engine, err, tt.auto)
			}
			if got := runs(t, h.cfg.QEMU); tt.runs != anyNumber && got != tt.runs {
				t.Errorf("%d probes ran, want %d", got, tt.runs)
			}
			report := h.survey(t.Context())[1]
			if report.Reason != tt.reason || !strings.Contains(report.Hint, tt.hint) {
				t.Errorf("reason %q, hint %q", report.Reason, report.Hint)
			}
			h.cfg.Name = QEMUKVM
			engine, err = h.choose(t.Context())
			if want := tt.auto == QEMUKVM; want != (err == nil) {
				t.Fatalf("%s by name: %v, %v", QEMUKVM, engine, err)
			}
			if err != nil && (!errors.Is(err, errdef.ErrUnavailable) || !strings.Contains(err.Error(), tt.reason)) {
				t.Errorf("%s by name: %v", QEMUKVM, err)
			}
		})
	}
}

// A verdict holds for a boot, a QEMU and a kind of probe, and no longer.
func TestVerdictIsKept(t *testing.T) {
	t.Parallel()
	h := fakeHost(t, "works")
	path := h.verdictPath("qemu")
	edit := func(old, change string) func() {
		return func() {
			data, err := os.ReadFile(path)
			if err != nil || !strings.Contains(string(data), old) {
				t.Fatalf("no %s in %s: %v", old, data, err)
			}
			write(t, path, strings.Replace(string(data), old, change, 1))
		}
	}
	steps := []struct {
		name   string
		change func()
		runs   int // from the start on
	}{
		{"first", func() {}, 1},
		{"again", func() {}, 1},
		{"other_boot", edit(`"boot_id": "`, `"boot_id": "not`), 2},
		{"other_qemu", edit("9.9.9", "9.9.8"), 3},
		{"other_format", edit(`"version": 2`, `"version": 1`), 4},
		{"damaged", func() { write(t, path, "{") }, 5},
		{"too_long", func() { write(t, path, strings.Repeat(" ", 1<<20)) }, 6},
		{"kernel_known", func() { giveKernel(t, h) }, 8},
		{"kernel_again", func() {}, 8},
		{"kernel_unknown", func() { h.cfg.Kernel = "" }, 8},
		{"not_kept", func() { h.cfg.StateDir += "/missing" }, 9},
	}
	for _, s := range steps {
		s.change()
		h.cfg.Name = QEMUKVM
		if _, err := h.choose(t.Context()); err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if got := runs(t, h.cfg.QEMU); got != s.runs {
			t.Fatalf("%s: %d probes so far, want %d", s.name, got, s.runs)
		}
	}
}

// Being called off is no verdict, and not a reason to take another engine.
func TestChooseCancelled(t *testing.T) {
	t.Parallel()
	h := fakeHost(t, "hangs")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for runs(t, h.cfg.QEMU) == 0 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if engine, err := h.choose(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, %v", engine, err)
	}
	<-ctx.Done()
	if _, err := os.Stat(h.verdictPath("qemu")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a verdict was kept: %v", err)
	}
}

func TestChooseByName(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]error{
		QEMUTCG: nil, Firecracker: errdef.ErrUnavailable, "qemu": errdef.ErrInvalid, "../x": errdef.ErrInvalid,
	} {
		h := fakeHost(t, "works")
		h.cfg.Name = name
		engine, err := h.choose(t.Context())
		if !errors.Is(err, want) || (engine == nil) != (err != nil) {
			t.Errorf("%s: got %v, %v; want %v", name, engine, err, want)
		}
		if errors.Is(err, errdef.ErrInvalid) && !strings.HasSuffix(err.Error(), "want one of auto, firecracker, qemu-kvm, qemu-tcg") {
			t.Errorf("%s: %v names no others", name, err)
		}
	}
}

func TestNoQEMU(t *testing.T) {
	t.Parallel()
	cfg := Config{QEMU: "/no/such/qemu", Firecracker: "/no/such/firecracker"}
	if engine, err := Choose(t.Context(), cfg); !errors.Is(err, errdef.ErrUnavailable) || errdef.Hint(err) == "" || engine != nil {
		t.Errorf("got %v, %v, hint %q", engine, err, errdef.Hint(err))
	}
	for _, r := range Survey(t.Context(), cfg) {
		if r.Usable || r.Reason == "" || r.Err == nil {
			t.Errorf("got %+v", r)
		}
	}
}

// Where there can be no jail there is an engine all the same, which says so,
// unless a jail is required.
func TestRequireJail(t *testing.T) {
	t.Parallel()
	h := fakeHost(t, "works")
	h.cfg.Name = QEMUTCG
	h.cfg.Jail = &jail.Config{
		Command: []string{"/no/such/launcher"}, Dir: filepath.Join(t.TempDir(), "jail"), UIDs: filepath.Join(t.TempDir(), "uids"),
	}
	engine, err := h.choose(t.Context())
	if err != nil || engine.Caps().Jail || len(engine.Caps().JailLacks) == 0 {
		t.Fatalf("without a jail: %v, %v", engine, err)
	}
	h.cfg.RequireJail = true
	if engine, err = h.choose(t.Context()); !errors.Is(err, errdef.ErrUnsupported) || errdef.Hint(err) == "" {
		t.Errorf("a jail is required: %v, %v, hint %q", engine, err, errdef.Hint(err))
	}
}

func TestSurvey(t *testing.T) {
	t.Parallel()
	want := []Report{
		{Name: Firecracker, Usable: true, Reason: "at this boot, a probe machine ran", Version: "1.16.1"},
		{Name: QEMUKVM, Usable: true, Reason: "at this boot, a probe machine ran", Version: "9.9.9 (fake)"},
		{Name: QEMUTCG, Usable: true, Reason: "software emulation, on any host", Version: "9.9.9 (fake)"},
	}
	h := fakeHost(t, "works")
	giveFirecracker(t, h, "works")
	got := h.survey(t.Context())
	for _, r := range got {
		if r.Usable != (r.Caps.MaxVCPUs > 0) {
			t.Errorf("%s can do %+v", r.Name, r.Caps)
		}
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateErrors(), cmpopts.IgnoreFields(Report{}, "Caps")); diff != "" {
		t.Error(diff)
	}
}

// A QEMU that talks without end is killed, and little of it is kept.
func TestProbeFloods(t *testing.T) {
	t.Parallel()
	h := fakeHost(t, "floods")
	h.bareBound = time.Second
	fault, err := h.probe(t.Context(), qemuProber{h.cfg.QEMU, qemu.KVM}, "")
	if err != nil || !strings.HasPrefix(fault, "a probe machine had not ended after 1s") || len(fault) > 300 {
		t.Errorf("got %q, %v", fault, err)
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	var got tail
	for _, size := range []int{1, maxTail - 1, 2, 3 * maxTail, 10} {
		if n, err := got.Write(make([]byte, size)); n != size || err != nil {
			t.Fatalf("wrote %d of %d, %v", n, size, err)
		}
	}
	if _, err := got.Write([]byte("end\xff")); err != nil {
		t.Fatal(err)
	}
	if text := got.String(); len(text) != maxTail || !strings.HasSuffix(text, "\x00end?") {
		t.Errorf("%d bytes, ending in %q", len(text), text[max(0, len(text)-8):])
	}
}

func FuzzDecodeVerdict(f *testing.F) {
	good, err := verdict{2, "boot", "qemu", "7.2", true, false, "why"}.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":2,"boot_id":1}`))
	f.Add([]byte("{}{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		v, err := decodeVerdict(data)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("no category: %v", err)
			}
			return
		}
		again, err := v.encode()
		if err != nil {
			t.Fatal(err)
		}
		if len(again) > maxVerdict {
			return // indentation and escapes made it longer than what is read
		}
		if back, err := decodeVerdict(again); err != nil || back != v {
			t.Errorf("%+v became %+v, %v", v, back, err)
		}
	})
}
