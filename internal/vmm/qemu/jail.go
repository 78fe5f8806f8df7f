package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmm/process"
)

// openJail opens the jail that this engine's machines run in.
func (e *Engine) openJail(ctx context.Context, cfg jail.Config) (err error) {
	cfg.Program = e.binary
	if cfg.Others, err = dataFiles(ctx, e.binary); err != nil {
		return fmt.Errorf("find QEMU's files: %w", err)
	}
	if e.accel == KVM {
		if _, err = os.Stat(kvmDevice); err != nil {
			return err
		}
	}
	e.keeper.Jail, err = jail.Open(ctx, cfg)
	return err
}

const kvmDevice = "/dev/kvm"

// firmware is what machines of Tine's kind load by name, if QEMU has it: the
// BIOS, and what starts a kernel that is given as a file.
func firmware() []string {
	return []string{"bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "linuxboot.bin", "multiboot_dma.bin", "pvh.bin"}
}

// dataFiles finds the firmware and the modules of a QEMU.
func dataFiles(ctx context.Context, binary string) ([]string, error) {
	out, err := exec.CommandContext(ctx, binary, "-L", "help").Output()
	if err != nil {
		return nil, fmt.Errorf("%w: ask %s where its firmware is: %w", errdef.ErrUnavailable, binary, err)
	}
	var files []string
	for dir := range strings.Lines(string(out)) {
		for _, name := range firmware() {
			path := filepath.Join(strings.TrimSpace(dir), name)
			if _, err := os.Stat(path); err == nil {
				files = append(files, path)
			}
		}
	}
	// The accelerators may be modules. Where those are, only QEMU's build knows.
	prefix := filepath.Dir(filepath.Dir(binary))
	for _, dir := range []string{"lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu"} {
		found, err := filepath.Glob(filepath.Join(prefix, dir, "accel-*-x86_64.so"))
		if err != nil {
			return nil, err
		}
		files = append(files, found...)
	}
	return files, nil
}

// fileSlack is for QEMU's log, and for what an overlay has beside its data.
const fileSlack = 64 << 20

// largestFile is how long QEMU may make a file: its disk's overlay, or while a
// template boots its memory.
func (l *launcher) largestFile() int64 {
	largest := int64(l.spec.Machine.DiskMiB) << 20
	largest += largest / 64 // of metadata
	if l.image == "" {
		largest = max(largest, int64(l.spec.Machine.MemoryMiB)<<20)
	}
	return largest + fileSlack
}

// settle waits until a jailed QEMU has opened its files.
func (m *machine) settle(ctx context.Context, p *process.Started) error {
	if !p.Jailed() {
		return nil
	}
	_, err := m.monitor(ctx) // it answers when the machine is made
	if err = errors.Join(err, p.Settled()); err != nil {
		return m.gone(err)
	}
	return nil
}
