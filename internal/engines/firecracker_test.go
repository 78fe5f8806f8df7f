package engines

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Whatever is wrong with Firecracker, or with KVM, is said, ends, and has auto take
// the next engine.
func TestChooseFirecracker(t *testing.T) {
	t.Parallel()
	const brief = 100 * time.Millisecond
	tests := map[string]struct {
		behaviour string
		kernel    bool
		change    func(t *testing.T, h *host)
		auto      string // empty: firecracker
		category  error  // of the error when it is asked for by name
		reason    string // part of it
		hint      string // part of it
	}{
		"works":             {behaviour: "works", reason: "at this boot, a probe machine ran"},
		"works_with_kernel": {behaviour: "works", kernel: true, reason: "at this boot, a probe machine and a kernel ran"},
		"without_qemu": {
			behaviour: "works", reason: "at this boot, a probe machine ran",
			change: func(_ *testing.T, h *host) { h.cfg.QEMU = "/no/such/qemu" },
		},
		"oldest": {behaviour: "version-1.10.0", reason: "at this boot, a probe machine ran"},
		"later":  {behaviour: "version-1.99.0", reason: "at this boot, a probe machine ran"},

		"none": {
			change: func(_ *testing.T, h *host) { h.cfg.Firecracker = "/no/such/firecracker" },
			auto:   QEMUKVM, category: errdef.ErrUnavailable, reason: "no such file", hint: "--firecracker",
		},
		"not_executable": {
			change: func(t *testing.T, h *host) {
				h.cfg.Firecracker = filepath.Join(t.TempDir(), "firecracker")
				write(t, h.cfg.Firecracker, "#!/bin/sh\n")
			},
			auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "permission denied", hint: "--firecracker",
		},
		"other_program": {
			behaviour: "version-other", auto: QEMUKVM, category: errdef.ErrUnavailable,
			reason: "does not say that it is Firecracker", hint: "--firecracker",
		},
		"version_fails": {
			behaviour: "version-fails", auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "exit status 1", hint: "--firecracker",
		},
		"version_hangs": {
			behaviour: "version-hangs", change: func(_ *testing.T, h *host) { h.cfg.QEMU = "/no/such/qemu"; h.askBound = brief },
			auto: "none", category: errdef.ErrUnavailable, reason: "no answer", hint: "--firecracker",
		},
		"version_garbage": {
			behaviour: "version-one", auto: QEMUKVM, category: errdef.ErrUnavailable,
			reason: "is no version of Firecracker", hint: "--firecracker",
		},
		"version_flood": {
			behaviour: "version-flood", auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "says more than", hint: "--firecracker",
		},
		"too_old": {
			behaviour: "version-1.9.0", auto: QEMUKVM, category: errdef.ErrUnsupported, reason: "1.9.0 is older", hint: "install Firecracker",
		},
		"too_new": {
			behaviour: "version-2.0.0", auto: QEMUKVM, category: errdef.ErrUnsupported, reason: "2.x is not known", hint: "install Firecracker",
		},

		"hangs": {
			behaviour: "hangs", change: func(_ *testing.T, h *host) { h.bareBound = brief }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "a probe machine had not ended after 100ms", hint: "rm ",
		},
		"hangs_with_child": {
			behaviour: "hangs-with-child", change: func(_ *testing.T, h *host) { h.bareBound = time.Second }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "a probe machine had not ended after 1s", hint: "rm ",
		},
		"hangs_with_kernel": {
			behaviour: "hangs-with-kernel", kernel: true, change: func(_ *testing.T, h *host) { h.kernelBound = brief }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "a kernel in a probe machine had not ended after 100ms", hint: "rm ",
		},
		"floods": {
			behaviour: "floods", change: func(_ *testing.T, h *host) { h.bareBound = time.Second }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "a probe machine had not ended after 1s", hint: "rm ",
		},
		"exits": {
			behaviour: "exits", auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "a probe machine ended with status 1", hint: "rm ",
		},
		"breaks_down": {
			behaviour: "refuses", auto: QEMUKVM, category: errdef.ErrUnavailable, hint: "rm ",
			reason: `a probe machine ended with status 0: "Received KVM_EXIT_INTERNAL_ERROR signal"`,
		},
		"says_and_hangs": {
			behaviour: "says-and-hangs", change: func(_ *testing.T, h *host) { h.bareBound = time.Second }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "a probe machine had not ended after 1s", hint: "rm ",
		},
		"says_and_fails": {
			behaviour: "says-and-fails", auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "ended with status 148", hint: "rm ",
		},
		"mute": {
			behaviour: "mute", auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "a probe machine ended with status 0", hint: "rm ",
		},
		"mute_kernel": {
			behaviour: "mute-kernel", kernel: true, auto: QEMUKVM, category: errdef.ErrUnavailable, hint: "rm ",
			reason: `a kernel in a probe machine ended with status 0: "Kernel panic - not syncing: something else"`,
		},

		"no_flag": {
			behaviour: "works", change: func(t *testing.T, h *host) { write(t, h.cpuinfo, cpuinfo("fpu vmxnet")) }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "the CPU shows neither vmx nor svm", hint: "qemu-tcg",
		},
		"no_device": {
			behaviour: "works", change: func(_ *testing.T, h *host) { h.device = "/no/such/kvm" }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "open /no/such/kvm: no such file or directory", hint: "modprobe",
		},
		"no_permission": {
			behaviour: "works", change: func(t *testing.T, h *host) { h.device = forbidden(t) }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "permission denied", hint: "usermod",
		},
		"device_is_no_device": {
			behaviour: "works", change: func(t *testing.T, h *host) { h.device = t.TempDir() }, auto: QEMUTCG,
			category: errdef.ErrUnavailable, reason: "is a directory",
		},
		"kernel_is_unreadable": {
			behaviour: "works", change: func(t *testing.T, h *host) {
				h.cfg.Kernel = filepath.Join(t.TempDir(), "vmlinux")
				if err := os.Symlink("/proc/self/mem", h.cfg.Kernel); err != nil {
					t.Fatal(err)
				}
			}, auto: QEMUKVM, category: errdef.ErrUnavailable, reason: "a kernel in a probe machine ended with status 4", hint: "rm ",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := fakeHost(t, "works")
			giveFirecracker(t, h, tt.behaviour)
			if tt.kernel {
				giveKernel(t, h)
			}
			if tt.change != nil {
				tt.change(t, h)
			}
			checkFirecracker(t, h, tt.category, tt.reason, tt.hint)
			nothingRuns(t, filepath.Join(filepath.Dir(h.cpuinfo), fakeFirePrefix+tt.behaviour))
			if tt.auto == QEMUTCG { // QEMU's probe has the same short bound, or the same KVM
				return
			}
			if tt.auto == "" {
				tt.auto = Firecracker
			}
			h.cfg.Name = Auto
			engine, err := h.choose(t.Context())
			if tt.auto == "none" {
				if err == nil {
					t.Errorf("auto chose %s", engine.Name())
				}
				return
			}
			if err != nil || engine.Name() != tt.auto {
				t.Errorf("auto chose %v, %v; want %s", engine, err, tt.auto)
			}
		})
	}
}

// forbidden is a file that not even root may open for writing.
func forbidden(t *testing.T) string {
	t.Helper()
	const path = "/sys/kernel/uevent_seqnum"
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		_ = f.Close() // nothing was written
	}
	if !errors.Is(err, os.ErrPermission) {
		t.Skipf("%s is not forbidden: %v", path, err)
	}
	return path
}

// checkFirecracker asks for Firecracker by name, and for nothing else.
func checkFirecracker(t *testing.T, h *host, category error, reason, hint string) {
	t.Helper()
	h.cfg.Name = Firecracker
	engine, err := h.choose(t.Context())
	if category == nil && err != nil || !errors.Is(err, category) {
		t.Fatalf("by name: %v, %v; want %v", engine, err, category)
	}
	report := h.survey(t.Context())[0]
	if report.Usable != (err == nil) || !strings.Contains(report.Reason, reason) || !strings.Contains(report.Hint, hint) {
		t.Errorf("reported as %+v", report)
	}
	if err == nil {
		if engine.Name() != Firecracker {
			t.Errorf("by name: %s", engine.Name())
		}
		return
	}
	if !strings.Contains(err.Error(), reason) || !strings.Contains(errdef.Hint(err), hint) || len(err.Error()) > 500 {
		t.Errorf("by name: %v, hint %q", err, errdef.Hint(err))
	}
}

// nothingRuns waits until no process has program for its first argument.
func nothingRuns(t *testing.T, program string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var found []string
		lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range lines {
			if line, err := os.ReadFile(path); err == nil && bytes.HasPrefix(line, []byte(program+"\x00")) {
				found = append(found, path)
			}
		}
		if len(found) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("left behind: %v", found)
		}
	}
}

// Each monitor has a verdict of its own, as one says nothing about the other.
func TestVerdictsAreApart(t *testing.T) {
	t.Parallel()
	h := fakeHost(t, "works")
	giveFirecracker(t, h, "mute")
	for range 2 {
		engine, err := h.choose(t.Context())
		if err != nil || engine.Name() != QEMUKVM {
			t.Fatalf("chose %v, %v", engine, err)
		}
	}
	if f, q := runs(t, h.cfg.Firecracker), runs(t, h.cfg.QEMU); f != 1 || q != 1 {
		t.Errorf("probed by Firecracker %d times, by QEMU %d times", f, q)
	}
	if err := os.Rename(h.verdictPath("qemu"), h.verdictPath("firecracker")); err != nil {
		t.Fatal(err)
	}
	h.cfg.Name = Firecracker
	if engine, err := h.choose(t.Context()); err == nil {
		t.Errorf("QEMU's verdict made %s usable", engine.Name())
	}
}

// A template that is wrong is no reason to take an engine that has none.
func TestCPUTemplate(t *testing.T) {
	t.Parallel()
	for template, want := range map[string]error{"": nil, "T2": nil, "/no/such/template": errdef.ErrInvalid} {
		h := fakeHost(t, "works")
		giveFirecracker(t, h, "works")
		h.cfg.CPUTemplate = template
		engine, err := h.choose(t.Context())
		if !errors.Is(err, want) || (err == nil && engine.Name() != Firecracker) {
			t.Errorf("template %q: %v, %v", template, engine, err)
		}
	}
}

// The log says which engine there is, why not the ones before it, and that it has
// no use for a template.
func TestChooseLogs(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	h := fakeHost(t, "works")
	giveFirecracker(t, h, "mute")
	h.cfg.CPUTemplate = "T2"
	h.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if _, err := h.choose(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`level=DEBUG msg="engine is not usable" engine=firecracker error="open engine firecracker: unavailable: /dev/kvm opens, but a probe machine ended`,
		`level=INFO msg="engine is chosen" engine=qemu-kvm version="9.9.9 (fake)" reason="at this boot, a probe machine ran"`,
		`level=WARN msg="CPU template is not used`,
	} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("no %s in\n%s", want, &log)
		}
	}
}
