package engines

import (
	"fmt"
	"os"
	"strings"

	"github.com/tinevm/tine/internal/vmm/qemu"
)

// qemuProber probes by QEMU.
type qemuProber struct {
	binary string
	accel  qemu.Accel
}

func (qemuProber) monitor() string { return "qemu" }

// bare has a firmware of our own, that ends QEMU with a status of its own.
func (q qemuProber) bare() (probe, error) {
	rom, err := memoryFile("tine-probe-rom", romImage())
	if err != nil {
		return probe{}, err
	}
	args := append(q.machine("16M"),
		"-bios", "/dev/fd/3",
		"-device", fmt.Sprintf("isa-debug-exit,iobase=%#x,iosize=1", romPort))
	return probe{
		binary: q.binary, args: args, files: []*os.File{rom},
		passed: func(end ending) bool { return end.status == romStatus },
	}, nil
}

func (q qemuProber) boot(path string) (probe, error) {
	args := append(q.machine("128M"),
		"-serial", "stdio", "-kernel", path,
		"-append", "console=ttyS0 quiet panic=-1 reboot=t no_timer_check 8250.nr_uarts=1 cryptomgr.notests")
	return probe{
		binary: q.binary, args: args,
		passed: func(end ending) bool { return end.status == 0 && strings.Contains(end.console, rootMissing) },
	}, nil
}

// machine is the kind of machine that the engine makes, without its devices.
func (q qemuProber) machine(memory string) []string {
	cpu := "max"
	if q.accel == qemu.KVM {
		cpu = "host"
	}
	return []string{
		"-name", "tine-probe", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "pc,hpet=off,vmport=off,usb=off,smm=off,graphics=off,i8042=off",
		"-accel", string(q.accel), "-cpu", cpu, "-m", memory,
	}
}
