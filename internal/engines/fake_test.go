package engines

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Under a name that begins with fakePrefix, this test binary is a QEMU that
// behaves as the rest of the name says.
const fakePrefix = "qemu-fake-"

func TestMain(m *testing.M) {
	if behaviour, ok := strings.CutPrefix(filepath.Base(os.Args[0]), fakePrefix); ok {
		syscall.Exit(fakeQEMU(behaviour)) // os.Exit would have the race detector wait a second
	}
	os.Exit(m.Run())
}

func fakeQEMU(behaviour string) int {
	if slices.Contains(os.Args, "--version") {
		fmt.Println("QEMU emulator version 9.9.9 (fake)")
		return 0
	}
	if slices.Contains(os.Args, "-L") { // it has no firmware
		return 0
	}
	if !note(os.Args) {
		return 3
	}
	kernel := slices.Contains(os.Args, "-kernel")
	switch {
	case behaviour == "hangs", behaviour == "hangs-with-kernel" && kernel:
		time.Sleep(time.Hour)
	case behaviour == "breaks":
		fmt.Fprintln(os.Stderr, "KVM internal error. Suberror: 1")
		time.Sleep(time.Hour)
	case behaviour == "floods":
		for {
			fmt.Fprintln(os.Stderr, strings.Repeat("x", 1<<16))
		}
	case behaviour == "refuses":
		fmt.Fprintln(os.Stderr, "qemu: warning: old CPU\nCould not access KVM kernel module\nand more")
		return 1
	case behaviour == "resets" && kernel:
		fmt.Print("Booting\x1b[2J from ROM..\n")
		return 0
	case kernel:
		fmt.Println("Kernel panic - not syncing: VFS: " + rootMissing)
		return 0
	}
	rom, err := os.ReadFile("/dev/fd/3")
	if err != nil || !bytes.Equal(rom, romImage()) {
		return 4
	}
	return romStatus
}

// note leaves a line about a run where runs looks for it.
func note(args []string) bool {
	f, err := os.OpenFile(filepath.Join(filepath.Dir(args[0]), "runs"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return false
	}
	_, err = fmt.Fprintln(f, args)
	return err == nil && f.Close() == nil
}

// runs is how often a fake QEMU ran machines.
func runs(t *testing.T, h *host) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(filepath.Dir(h.cfg.QEMU), "runs"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return bytes.Count(data, []byte("\n"))
}

// fakeHost is a host whose CPU shows vmx, with a QEMU that behaves so.
func fakeHost(t *testing.T, behaviour string) *host {
	t.Helper()
	dir := t.TempDir()
	h := newHost(Config{
		StateDir: filepath.Join(dir, "state"), QEMU: filepath.Join(dir, fakePrefix+behaviour),
	})
	h.cpuinfo, h.device = filepath.Join(dir, "cpuinfo"), filepath.Join(dir, "kvm")
	write(t, h.cpuinfo, cpuinfo("fpu vmx sse2"))
	write(t, h.device, "")
	if err := os.Mkdir(h.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, h.cfg.QEMU)
	}
	if err != nil {
		t.Fatal(err)
	}
	// A fake that does what it should gets all the time it needs.
	h.romBound, h.kernelBound = time.Minute, time.Minute
	return h
}

// giveKernel lets the probe of h have a kernel.
func giveKernel(t *testing.T, h *host) {
	t.Helper()
	h.cfg.Kernel = filepath.Join(filepath.Dir(h.cpuinfo), "vmlinux")
	write(t, h.cfg.Kernel, "a kernel")
}

func cpuinfo(flags string) string {
	return "processor\t: 0\nvmx flags\t: ept vmx\nflags\t\t: " + flags + "\n\nprocessor\t: 1\nflags\t\t: vmx\n"
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
