//go:build vm

package firecracker_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
	"github.com/tinevm/tine/internal/vmtest"
)

// binary is the Firecracker to test. Where there is none nothing is tested, and
// the test says so.
func binary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("FIRECRACKER")
	if path == "" {
		t.Skip("NOT TESTED: FIRECRACKER does not name a Firecracker; make test-kvm FIRECRACKER=/path runs this where there is no KVM")
	}
	return path
}

func open(t *testing.T, jailed *jail.Config) *firecracker.Engine {
	t.Helper()
	e, err := firecracker.New(t.Context(), firecracker.Config{Binary: binary(t), Jail: jailed})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Logf("Firecracker %s", e.Version())
	return e
}

// stamps: the page with the generation id, and with it that of VMClock.
const stamps = 2

func setup(t *testing.T, engine vmm.Engine) vmmtest.Setup {
	t.Helper()
	img := vmtest.Image(t)
	return vmmtest.Setup{
		Engine: engine, Boot: vmtest.Boot(img), Root: img.RootPath(), Stamps: stamps, FormatDisk: image.FormatDisk,
	}
}

func TestFirecracker(t *testing.T) { vmmtest.Run(t, setup(t, open(t, vmtest.Jail(t)))) }

func TestFirecrackerWithoutJail(t *testing.T) { vmmtest.Run(t, setup(t, open(t, nil))) }

func TestFirecrackerDisk(t *testing.T) { vmmtest.RunDisk(t, setup(t, open(t, vmtest.Jail(t)))) }

// withoutAVX2 is a CPU template that hides one feature: bit 5 of EBX in leaf 7.
const withoutAVX2 = `{"cpuid_modifiers": [{"leaf": "0x7", "subleaf": "0x0", "flags": 1,
	"modifiers": [{"register": "ebx", "bitmap": "0bxxxxxxxxxxxxxxxxxxxxxxxxxx0xxxxx"}]}]}`

// TestFirecrackerCPUTemplate: a guest sees what the template leaves of the CPU.
func TestFirecrackerCPUTemplate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "template.json")
	if err := os.WriteFile(path, []byte(withoutAVX2), 0o600); err != nil {
		t.Fatal(err)
	}
	if flags := hostFlags(t); !strings.Contains(flags, " avx2 ") {
		t.Skipf("NOT TESTED: this host's CPU has no AVX2 to hide: %s", flags)
	}
	e, err := firecracker.New(t.Context(), firecracker.Config{Binary: binary(t), CPUTemplate: path, Jail: vmtest.Jail(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	s := setup(t, e)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	vm, err := e.Start(ctx, vmm.StartSpec{Boot: s.Boot, Common: vmm.Common{
		ID: "template", Dir: t.TempDir(), Root: s.Root, DieWithParent: true, Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = vm.Kill(context.WithoutCancel(ctx)) }()
	stream, err := vm.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := guest.Dial(ctx, stream)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	res, err := c.Run(ctx, guest.ExecSpec{Argv: []string{"grep", "-m1", "^flags", "/proc/cpuinfo"}}, nil, 1<<16)
	if err != nil {
		t.Fatal(err)
	}
	if flags := string(res.Stdout); !strings.Contains(flags, " sse2 ") || strings.Contains(flags, " avx2 ") {
		t.Errorf("the guest's CPU has %s", flags)
	}
	if template := e.Caps().Host.Template; !strings.HasPrefix(template, "template.json@") {
		t.Errorf("snapshots are said to be for template %q", template)
	}
}

func hostFlags(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\nflags")
	line, _, _ := strings.Cut(rest, "\n")
	return line + " "
}
