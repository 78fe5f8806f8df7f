package engines

import (
	"encoding/json"
	"os"
	"strings"
)

// firecrackerProber probes by Firecracker. A machine that is reset by its keyboard
// controller ends it with status 0, and so does one that breaks down, from v1.11
// on also where KVM cannot run the guest: what counts is what the guest has said.
type firecrackerProber struct{ binary string }

func (firecrackerProber) monitor() string { return "firecracker" }

func (f firecrackerProber) bare() (probe, error) {
	kernel, err := memoryFile("tine-probe-kernel", elfImage())
	if err != nil {
		return probe{}, err
	}
	return f.probe(kernel, elfWords, 16, "")
}

func (f firecrackerProber) boot(path string) (probe, error) {
	kernel, err := os.Open(path)
	if err != nil {
		return probe{}, err
	}
	return f.probe(kernel, rootMissing, 128,
		"console=ttyS0 quiet panic=-1 reboot=k pci=off no_timer_check 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests")
}

// probe is a machine with a kernel, which is its own from here on, and so much
// memory, in MiB. It passes when the guest has said words. Its serial port is
// Firecracker's standard output; the log, which would be there too, goes to
// standard error.
func (f firecrackerProber) probe(kernel *os.File, words string, memory int, cmdline string) (probe, error) {
	p := probe{
		binary: f.binary, files: []*os.File{kernel},
		args:   []string{"--id", "tine-probe", "--no-api", "--level", "Error", "--log-path", "/dev/fd/2", "--config-file", "/dev/fd/4"},
		passed: func(end ending) bool { return end.status == 0 && strings.Contains(end.console, words) },
	}
	text, err := json.Marshal(map[string]any{
		"boot-source":    map[string]any{"kernel_image_path": "/dev/fd/3", "boot_args": cmdline},
		"machine-config": map[string]any{"vcpu_count": 1, "mem_size_mib": memory},
		"drives":         []any{},
	})
	if err == nil {
		var config *os.File
		if config, err = memoryFile("tine-probe-config", text); err == nil {
			p.files = append(p.files, config)
			return p, nil
		}
	}
	closeAll(p.files)
	return probe{}, err
}
