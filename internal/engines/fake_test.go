package engines

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Under a name that begins with one of these, this test binary is a monitor that
// behaves as the rest of the name says.
const (
	fakePrefix     = "qemu-fake-"
	fakeFirePrefix = "firecracker-fake-"
)

func TestMain(m *testing.M) {
	// os.Exit would have the race detector wait a second.
	if behaviour, ok := strings.CutPrefix(filepath.Base(os.Args[0]), fakePrefix); ok {
		syscall.Exit(fakeQEMU(behaviour))
	}
	if behaviour, ok := strings.CutPrefix(filepath.Base(os.Args[0]), fakeFirePrefix); ok {
		syscall.Exit(fakeFirecracker(behaviour))
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

// fakeFirecracker is a Firecracker whose guest is always well, if nothing else is.
func fakeFirecracker(behaviour string) int {
	if slices.Contains(os.Args, "--version") {
		return sayVersion(behaviour)
	}
	if !note(os.Args) {
		return 3
	}
	kernel, words, err := readConfig()
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		return 4
	}
	switch behaviour {
	case "hangs":
		time.Sleep(time.Hour)
	case "hangs-with-child":
		child := exec.Command(os.Args[0], os.Args[1:]...)
		child.Stdout, child.Stderr = os.Stdout, os.Stderr // and so it holds the caller's pipes
		child.ExtraFiles = []*os.File{os.NewFile(3, ""), os.NewFile(4, "")}
		_ = child.Run()
	case "hangs-with-kernel":
		if kernel {
			time.Sleep(time.Hour)
		}
	case "floods":
		for {
			fmt.Println(strings.Repeat(words, 1000))
		}
	case "exits":
		return 1
	case "refuses":
		fmt.Fprintln(os.Stderr, "2026-11-29T07:46:00.326753708 [tine-probe:fc_vcpu 0] Received KVM_EXIT_INTERNAL_ERROR signal")
		return 0
	case "says-and-hangs":
		fmt.Println(words)
		time.Sleep(time.Hour)
	case "says-and-fails":
		fmt.Println(words)
		return 148
	case "mute":
		return 0
	case "mute-kernel":
		if kernel {
			fmt.Println("Kernel panic - not syncing: something else")
			return 0
		}
	}
	fmt.Println("[ 0.1] " + words)
	return 0
}

func sayVersion(behaviour string) int {
	said := "Firecracker v1.16.1"
	switch word := strings.TrimPrefix(behaviour, "version-"); word {
	case "other":
		said = "QEMU emulator version 9.9.9 (fake)"
	case "flood":
		said += strings.Repeat("x", 1<<20)
	case "fails":
		return 1
	case "hangs":
		if word != behaviour {
			time.Sleep(time.Hour)
		}
	default:
		if word != behaviour {
			said = "Firecracker v" + word
		}
	}
	fmt.Println(said + "\n")
	return 0
}

// readConfig says whether the machine that is asked for has a real kernel, and
// what a good guest of its would say.
func readConfig() (kernel bool, words string, err error) {
	file := slices.Index(os.Args, "--config-file")
	if !slices.Contains(os.Args, "--no-api") || file < 0 {
		return false, "", fmt.Errorf("unexpected arguments %q", os.Args)
	}
	text, err := os.ReadFile(os.Args[file+1])
	if err != nil {
		return false, "", err
	}
	var config struct {
		Boot struct {
			Path string `json:"kernel_image_path"`
			Args string `json:"boot_args"`
		} `json:"boot-source"`
		Machine struct {
			CPUs   int `json:"vcpu_count"`
			Memory int `json:"mem_size_mib"`
		} `json:"machine-config"`
		Drives *[]any `json:"drives"`
	}
	if err = json.Unmarshal(text, &config); err != nil {
		return false, "", err
	}
	if config.Machine.CPUs != 1 || config.Machine.Memory < 16 || config.Drives == nil {
		return false, "", fmt.Errorf("unexpected configuration %s", text)
	}
	image, err := os.ReadFile(config.Boot.Path)
	switch {
	case err != nil:
		return false, "", err
	case bytes.Equal(image, elfImage()):
		return false, elfWords, nil
	case string(image) == "a kernel" && strings.Contains(config.Boot.Args, "console=ttyS0"):
		return true, rootMissing, nil
	}
	return false, "", fmt.Errorf("unexpected kernel of %d bytes", len(image))
}

// note leaves a line about a run where runs looks for it.
func note(args []string) bool {
	f, err := os.OpenFile(args[0]+".runs", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return false
	}
	_, err = fmt.Fprintln(f, args)
	return err == nil && f.Close() == nil
}

// runs is how often the fake monitor at path ran machines.
func runs(t *testing.T, path string) int {
	t.Helper()
	data, err := os.ReadFile(path + ".runs")
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return bytes.Count(data, []byte("\n"))
}

// fakeHost is a host whose CPU shows vmx, with a QEMU that behaves so, and without
// Firecracker.
func fakeHost(t *testing.T, behaviour string) *host {
	t.Helper()
	dir := t.TempDir()
	h := newHost(Config{
		StateDir: filepath.Join(dir, "state"), QEMU: filepath.Join(dir, fakePrefix+behaviour),
		Firecracker: "/no/such/firecracker",
	})
	h.cpuinfo, h.device = filepath.Join(dir, "cpuinfo"), filepath.Join(dir, "kvm")
	write(t, h.cpuinfo, cpuinfo("fpu vmx sse2"))
	write(t, h.device, "")
	if err := os.Mkdir(h.cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	linkSelf(t, h.cfg.QEMU)
	// A fake that does what it should gets all the time it needs.
	h.bareBound, h.kernelBound = time.Minute, time.Minute
	return h
}

func linkSelf(t *testing.T, path string) {
	t.Helper()
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// giveFirecracker lets h have one that behaves so.
func giveFirecracker(t *testing.T, h *host, behaviour string) {
	t.Helper()
	h.cfg.Firecracker = filepath.Join(filepath.Dir(h.cpuinfo), fakeFirePrefix+behaviour)
	linkSelf(t, h.cfg.Firecracker)
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
