//go:build vm

package engines

import (
	"encoding/binary"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/vmm/qemu"
	"github.com/tinevm/tine/internal/vmtest"
)

// The kernel of Firecracker's probe runs where machines run: a firmware brings an
// emulated processor to 64-bit mode and enters it.
func TestELFInTCG(t *testing.T) {
	for name, tt := range map[string]struct {
		work []byte
		says bool
	}{
		"works":   {work(), true},
		"fails":   {[]byte{0x31, 0xc0, 0xc3}, false}, // xorl %eax, %eax; ret
		"crashes": {[]byte{0x0f, 0x0b}, false},       // ud2
	} {
		t.Run(name, func(t *testing.T) {
			end, err := enterELF(t, elfFile(elfProgram(tt.work))).run(t.Context(), time.Minute)
			if err != nil || end.late != 0 || end.status != 0 {
				t.Errorf("%v, %v", end, err)
			}
			if want := map[bool]string{true: elfWords}[tt.says]; strings.TrimSpace(end.console) != want {
				t.Errorf("it says %q, want %q", end.console, want)
			}
		})
	}
}

// enterELF is a QEMU with image in memory and a firmware that jumps to its entry.
func enterELF(t *testing.T, image []byte) probe {
	t.Helper()
	rom := romImage()
	jump := binary.LittleEndian.AppendUint32([]byte{0xb8}, elfAddress+elfHeaders) // movl $..., %eax
	copy(rom[0x6c:], append(jump, 0xff, 0xe0))                                    // jmp *%rax
	args := qemuProber{accel: qemu.TCG}.machine("16M")
	board := slices.Index(args, "-M") + 1
	args[board] = strings.Replace(args[board], "i8042=off", "i8042=on", 1)
	return probe{
		binary: newHost(Config{}).cfg.QEMU,
		args:   append(args, "-serial", "stdio", "-bios", "/dev/fd/3", "-device", "loader,file=/dev/fd/4"),
		files:  []*os.File{keep(t, rom), keep(t, image)},
	}
}

func keep(t *testing.T, data []byte) *os.File {
	t.Helper()
	f, err := memoryFile("tine-test", data)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // nothing that lasts
	return f
}

// realFirecracker is a prober by the Firecracker that the environment names.
func realFirecracker(t *testing.T) firecrackerProber {
	t.Helper()
	binary := os.Getenv("FIRECRACKER")
	if binary == "" {
		t.Skip("NOT TESTED: no Firecracker: set FIRECRACKER to the path of one")
	}
	if _, err := os.Stat("/dev/kvm"); err != nil {
		t.Skipf("NOT TESTED: Firecracker needs KVM: %v", err)
	}
	return firecrackerProber{binary}
}

// Firecracker's probe passes on a KVM that works, and nothing else does.
func TestFirecrackerProbe(t *testing.T) {
	f := realFirecracker(t)
	h := newHost(Config{})
	shown, err := virtualisation(h.cpuinfo)
	if err != nil {
		t.Fatal(err)
	}
	if !shown {
		t.Skip("NOT TESTED: this CPU shows no virtualisation")
	}
	h.bareBound, h.kernelBound = time.Minute, time.Minute // a nested machine is slow
	kernel := vmtest.Image(t).KernelPath()
	for name, step := range map[string]func() (string, error){
		"bare":   func() (string, error) { return h.probeBare(t.Context(), f) },
		"kernel": func() (string, error) { return h.probeKernel(t.Context(), f, kernel) },
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			if fault, err := step(); fault != "" || err != nil {
				t.Errorf("%q, %v", fault, err)
			}
			t.Logf("took %v", time.Since(start))
		})
	}
}

// A kernel that is broken fails on any KVM, and one that needs nothing of the
// processor but that it runs shows, also on a KVM that is worth nothing, that
// Firecracker takes the configuration and passes the words on.
func TestFirecrackerProbeTells(t *testing.T) {
	f := realFirecracker(t)
	const short, long = 2 * time.Second, time.Minute // a nested machine is slow
	for name, tt := range map[string]struct {
		kernel []byte
		bound  time.Duration
		fault  string // how it begins; empty: it passes
	}{
		"well":    {elfFile(elfProgram([]byte{0xb8, workAnswer, 0, 0, 0, 0xc3})), long, ""}, // movl $0x2a, %eax; ret
		"fails":   {elfFile(elfProgram([]byte{0x31, 0xc0, 0xc3})), long, "ended with status 0"},
		"crashes": {elfFile(elfProgram([]byte{0x0f, 0x0b})), long, "ended with status"},
		"stands":  {elfFile([]byte{0xfa, 0xf4, 0xeb, 0xfd}), short, "had not ended after 2s"}, // cli; hlt for ever
		"cut":     {elfImage()[:100], long, "ended with status 1: "},
		"no_elf":  {[]byte("a kernel"), long, "ended with status 1: "},
	} {
		t.Run(name, func(t *testing.T) {
			run, err := f.probe(keep(t, tt.kernel), elfWords, 16, "")
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			fault, err := try(t.Context(), "it", tt.bound, run)
			if err != nil || (fault == "") != (tt.fault == "") || !strings.HasPrefix(strings.TrimPrefix(fault, "it "), tt.fault) {
				t.Errorf("%q, %v", fault, err)
			}
			t.Logf("after %v: %q", time.Since(start), fault)
		})
	}
}
