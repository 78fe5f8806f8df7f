//go:build vm

package qemu_test

import (
	"testing"

	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmm/vmmtest"
	"github.com/tinevm/tine/internal/vmtest"
)

func TestTCG(t *testing.T) {
	engine, err := qemu.New(t.Context(), qemu.Config{Accel: qemu.TCG})
	if err != nil {
		t.Fatal(err)
	}
	img := vmtest.Image(t)
	vmmtest.Run(t, vmmtest.Setup{Engine: engine, Boot: vmtest.Boot(img), Root: img.RootPath()})
}
