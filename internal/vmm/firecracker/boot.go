package firecracker

import (
	"context"
	"fmt"
	"strings"

	"github.com/tinevm/tine/internal/network"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// guestCID is the guest's address on its vsock. Each machine has its own, so all
// can have the same.
const guestCID = 3

// boot tells a Firecracker that runs nothing yet what its machine is, and lets it
// run. There is no metadata service (MMDS), as no card is told of one.
func (m *machine) boot(ctx context.Context, spec vmm.StartSpec) error {
	ctx, cancel := m.engine.bounded(ctx)
	defer cancel()
	shape := spec.Machine
	steps := []struct {
		what string
		do   func(context.Context) error
	}{
		{"configure machine", func(ctx context.Context) error {
			return m.client.PutMachineConfig(ctx, api.MachineConfig{
				VCPUs: shape.VCPUs, MemMiB: shape.MemoryMiB, CPUTemplate: m.engine.template.name,
			})
		}},
		{"configure CPU", m.bootCPU},
		{"name kernel", func(ctx context.Context) error {
			return m.client.PutBootSource(ctx, api.BootSource{Kernel: kernelFile, Initrd: initrdFile, Args: m.engine.cmdline(spec)})
		}},
		{"give root image", m.bootRoot},
		{"give scratch disk", func(ctx context.Context) error {
			if shape.DiskMiB == 0 {
				return nil
			}
			return m.client.PutDrive(ctx, api.Drive{ID: diskName, Path: diskName})
		}},
		{"give network card", func(ctx context.Context) error {
			if !shape.Net {
				return nil
			}
			return m.client.PutNetworkInterface(ctx, api.NetworkInterface{
				ID: "net", Tap: network.TapName, MAC: vmm.GuestNet().GuestMAC.String(),
			})
		}},
		{"give vsock", func(ctx context.Context) error {
			return m.client.PutVsock(ctx, api.Vsock{CID: guestCID, Path: agentSocket})
		}},
		{"give entropy device", m.client.PutEntropy},
		{"start", m.client.Start},
	}
	for _, step := range steps {
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return nil
}

func (m *machine) bootCPU(ctx context.Context) error {
	if m.engine.template.custom == nil {
		return nil
	}
	return m.client.PutCPUConfig(ctx, m.engine.template.custom)
}

// bootRoot gives the root image, to be read only: as persistent memory, which the
// guest reads in place, from the host's page cache, or where Firecracker has no
// such device as a disk.
func (m *machine) bootRoot(ctx context.Context) error {
	if m.engine.version.Has(api.PmemDevices) {
		return m.client.PutPmem(ctx, api.Pmem{ID: rootFile, Path: rootFile, ReadOnly: true})
	}
	return m.client.PutDrive(ctx, api.Drive{ID: rootFile, Path: rootFile, ReadOnly: true})
}

// cmdline is what Firecracker's machine needs of a guest kernel. Its devices are
// found by ACPI. A keyboard controller is there to reset by, and nothing else on
// it is looked for, which would take a second. No device needs a bounce buffer,
// which would take 64 MiB of the guest's memory.
func (e *Engine) cmdline(spec vmm.StartSpec) string {
	words := []string{
		"console=ttyS0 quiet reboot=k panic=-1 pci=off swiotlb=noforce random.trust_cpu=on 8250.nr_uarts=1",
		"i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests tine.link=vsock",
	}
	disk := "/dev/vda"
	if !e.version.Has(api.PmemDevices) {
		words = append(words, "tine.root="+disk)
		disk = "/dev/vdb"
	}
	if spec.Machine.DiskMiB > 0 {
		words = append(words, "tine.disk="+disk)
	}
	if spec.Machine.Net {
		words = append(words, vmm.GuestNet().Option())
	}
	if spec.Boot.Cmdline != "" {
		words = append(words, spec.Boot.Cmdline)
	}
	return strings.Join(words, " ")
}
