package engines

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// verdictPath is where the verdict on KVM by a monitor is kept, or "".
func (h *host) verdictPath(monitor string) string {
	if h.cfg.StateDir == "" {
		return ""
	}
	return filepath.Join(h.cfg.StateDir, "kvm-verdict-"+monitor+".json")
}

// hardware returns why KVM cannot work, as far as it shows without a probe.
func (h *host) hardware() error {
	shown, err := virtualisation(h.cpuinfo)
	if err != nil {
		return fmt.Errorf("%w: read CPU flags: %w", errdef.ErrUnavailable, err)
	}
	if !shown {
		err = fmt.Errorf("%w: the CPU shows neither vmx nor svm", errdef.ErrUnavailable)
		return errdef.WithHint(err, "enable virtualisation in the firmware, or nested virtualisation on the host of this machine; without it there is qemu-tcg")
	}
	f, err := os.OpenFile(h.device, os.O_RDWR, 0)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return errdef.WithHint(fmt.Errorf("%w: %w", errdef.ErrUnavailable, err), "modprobe kvm_intel || modprobe kvm_amd")
	case errors.Is(err, fs.ErrPermission):
		return errdef.WithHint(fmt.Errorf("%w: %w", errdef.ErrUnavailable, err), `usermod -aG kvm "$USER", and log in again`)
	default:
		return fmt.Errorf("%w: %w", errdef.ErrUnavailable, err)
	}
}

// maxCPUInfo bounds what is read of /proc/cpuinfo: the first processor's
// entry, of about 2 KiB, is enough.
const maxCPUInfo = 64 << 10

// virtualisation says whether the first processor in a file like /proc/cpuinfo
// shows a feature that KVM needs.
func virtualisation(cpuinfo string) (bool, error) {
	f, err := os.Open(cpuinfo)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }() // only read
	lines := bufio.NewScanner(io.LimitReader(f, maxCPUInfo))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), ":")
		if strings.TrimSpace(key) != "flags" {
			continue
		}
		for flag := range strings.FieldsSeq(value) {
			if flag == "vmx" || flag == "svm" {
				return true, nil
			}
		}
		return false, nil
	}
	return false, lines.Err()
}

// refuse makes an error of a verdict against KVM.
func (h *host) refuse(v verdict) error {
	err := fmt.Errorf("%w: /dev/kvm opens, but %s", errdef.ErrUnavailable, v.Reason)
	hint := "use qemu-tcg"
	if path := h.verdictPath(v.Monitor); path != "" {
		hint += "; to have KVM probed again: rm " + path
	}
	return errdef.WithHint(err, hint)
}

// verdict returns the verdict of this boot by one version of a monitor, and comes
// to one when there is none.
func (h *host) verdict(ctx context.Context, p prober, version string) (verdict, error) {
	boot, err := linux.BootID()
	if err != nil {
		return verdict{}, err
	}
	kernel := h.kernel(ctx)
	v := verdict{
		Version: verdictVersion, BootID: boot, Monitor: p.monitor(), MonitorVersion: version, Kernel: kernel != "",
	}
	if known, ok := h.recall(ctx, v.Monitor); ok && known.answers(v) {
		return known, nil
	}
	v.Reason, err = h.probe(ctx, p, kernel)
	if err != nil {
		return verdict{}, fmt.Errorf("%w: probe KVM: %w", errdef.ErrUnavailable, err)
	}
	if v.Usable = v.Reason == ""; v.Usable {
		v.Reason = v.proof()
	}
	h.remember(ctx, v)
	return v, nil
}

// kernel is the kernel to probe with, or "".
func (h *host) kernel(ctx context.Context) string {
	if h.cfg.Kernel == "" {
		return ""
	}
	if _, err := os.Stat(h.cfg.Kernel); err != nil {
		h.log.WarnContext(ctx, "KVM is probed without a kernel", "error", err)
		return ""
	}
	return h.cfg.Kernel
}

// recall reads the verdict that was kept. One that cannot be read is none.
func (h *host) recall(ctx context.Context, monitor string) (verdict, bool) {
	path := h.verdictPath(monitor)
	if path == "" {
		return verdict{}, false
	}
	v, err := readVerdict(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.log.WarnContext(ctx, "verdict on KVM is ignored", "error", err)
	}
	return v, err == nil
}

// remember keeps a verdict. Without it the next start probes again.
func (h *host) remember(ctx context.Context, v verdict) {
	path := h.verdictPath(v.Monitor)
	if path == "" {
		return
	}
	data, err := v.encode()
	if err == nil {
		err = durable.Replace(path, data, 0o600)
	}
	if err != nil {
		h.log.WarnContext(ctx, "verdict on KVM is not kept", "error", err)
	}
}
