//go:build vm

package qemu_test

import (
	"context"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
	"github.com/tinevm/tine/internal/vmtest"
)

func TestEngine(t *testing.T) {
	engine := vmtest.Engine(t)
	img := vmtest.Image(t)
	vmmtest.Run(t, vmmtest.Setup{Engine: engine, Boot: vmtest.Boot(img), Root: img.RootPath()})
}

// TestConsole: what the kernel says can be read while the machine runs.
func TestConsole(t *testing.T) {
	engine := vmtest.Engine(t)
	img, dir := vmtest.Image(t), t.TempDir()
	boot := vmtest.Boot(img)
	boot.Cmdline = "loglevel=7"
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	vm, err := engine.Start(ctx, vmm.StartSpec{Boot: boot, Common: vmm.Common{
		ID: "console", Dir: dir, Root: img.RootPath(), DieWithParent: true, Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := vm.Kill(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	console := vm.(interface {
		Console(ctx context.Context) (string, error)
	})
	for tick := time.NewTicker(50 * time.Millisecond); ; <-tick.C {
		text, err := console.Console(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if text != "" {
			return
		}
	}
}
