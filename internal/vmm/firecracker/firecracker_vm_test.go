//go:build vm

package firecracker_test

import (
	"os"
	"testing"

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
