//go:build vm

package engines

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmtest"
)

// The probes themselves are right: where machines run, they say so.
func TestProbeTCG(t *testing.T) {
	h := newHost(Config{})
	h.bareBound, h.kernelBound = time.Minute, time.Minute
	kernel := vmtest.Image(t).KernelPath()
	for name, probe := range map[string]string{"rom": "", "rom_and_kernel": kernel} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			fault, err := h.probe(t.Context(), qemuProber{h.cfg.QEMU, qemu.TCG}, probe)
			if fault != "" || err != nil {
				t.Errorf("got %q, %v", fault, err)
			}
			t.Logf("took %v", time.Since(start))
		})
	}
}

// Whatever the KVM of this host is worth, the probes come to an answer. Where
// the CPU shows no virtualisation the answer must be no.
func TestProbeKVM(t *testing.T) {
	h := newHost(Config{})
	if _, err := os.Stat(h.device); err != nil {
		t.Skipf("no KVM to probe: %v", err)
	}
	shown, err := virtualisation(h.cpuinfo)
	if err != nil {
		t.Fatal(err)
	}
	kernel := vmtest.Image(t).KernelPath()
	q := qemuProber{h.cfg.QEMU, qemu.KVM}
	for name, probe := range map[string]func() (string, error){
		"rom":    func() (string, error) { return h.probeBare(t.Context(), q) },
		"kernel": func() (string, error) { return h.probeKernel(t.Context(), q, kernel) },
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			fault, err := probe()
			took := time.Since(start)
			if err != nil || took > h.bareBound+h.kernelBound {
				t.Errorf("%v after %v", err, took)
			}
			if fault == "" && !shown {
				t.Error("KVM passed on a CPU without virtualisation")
			}
			if name, _ := vmtest.NamedEngine(); fault != "" && name == QEMUKVM {
				t.Error("KVM did not pass")
			}
			t.Logf("after %v: %q", took, fault)
		})
	}
}

// Auto decides at once, and what it chose says its version.
func TestChooseHere(t *testing.T) {
	cfg := Config{StateDir: t.TempDir(), Kernel: vmtest.Image(t).KernelPath(), Firecracker: os.Getenv("FIRECRACKER")}
	start := time.Now()
	engine, err := Choose(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if want, ok := vmtest.NamedEngine(); ok && engine.Name() != want {
		t.Errorf("chose %s, want %s", engine.Name(), want)
	}
	t.Logf("chose %s, version %s, after %v", engine.Name(), engine.Version(), time.Since(start))
	for _, r := range Survey(t.Context(), cfg) {
		t.Logf("%+v", r)
		if strings.TrimSpace(r.Reason) == "" {
			t.Errorf("%s has no reason", r.Name)
		}
	}
}
