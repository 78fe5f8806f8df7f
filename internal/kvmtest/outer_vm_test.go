//go:build vm

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/vmtest"
)

// outerTime bounds the life of the outer guest.
const outerTime = 20 * time.Minute

// modules are those that the outer guest needs beside what every guest has: KVM,
// and what jail and network of an inner guest are made of.
func modules() []string {
	return []string{"kvm_amd", "tun", "nf_tables", "nft_tproxy", "nft_limit", "vhost_vsock", "loop", "veth"}
}

func nonce(t *testing.T) string {
	t.Helper()
	return rand.Text()
}

// cacheDir is where the outer guest's kernel and disk are.
func cacheDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(vmtest.StateDir(t), "kvmtest")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// firstProcess builds this package's program.
func firstProcess(t *testing.T) string {
	t.Helper()
	init := filepath.Join(cacheDir(t), "init")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-o", init, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // nothing to link with is there yet
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the first process: %v\n%s", err, out)
	}
	return init
}

// boot is the kernel of the outer guest, and its initramfs.
func boot(t *testing.T, init string) image.Image {
	t.Helper()
	store, err := image.Open(image.Config{Dir: filepath.Join(cacheDir(t), "images"), Agent: init, Modules: modules()})
	if err != nil {
		t.Fatal(err)
	}
	// The root of this image is not used: the disk has it.
	img, _, err := store.Build(t.Context(), image.BuildRequest{Name: "outer", Source: "dir:" + t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = store.GC(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	return img
}

// outer runs a plan in an outer guest, passing on what the tests say, and returns
// what it reported; nothing, if it did not. A boot that gets stuck, as one in some
// forty did when the guest had two processors, says nothing of what is to be
// tested, and another is tried. Once the plan has begun none is.
func outer(t *testing.T, g outerGuest, nonce string) result {
	t.Helper()
	start := time.Now()
	for try := range bootTries {
		if g.run(t) {
			break
		}
		t.Logf("boot %d of the outer guest got stuck; its console:\n%s", try+1, tail(t, g.console()))
	}
	t.Logf("the outer guest was there for %.0f s", time.Since(start).Seconds())
	r, err := readReport(nonce, g.report())
	if err != nil {
		t.Errorf("the outer guest ended before its plan did: %v; its console:\n%s", err, tail(t, g.console()))
	}
	return r
}

// The bounds of a boot of the outer guest: how long it may take, where it takes
// 3 to 10 seconds, and how often it is tried.
const (
	bootTime  = 90 * time.Second
	bootTries = 3
)

type outerGuest struct {
	img       image.Image
	disk, dir string
}

func (g outerGuest) report() string  { return filepath.Join(g.dir, "report") }
func (g outerGuest) console() string { return filepath.Join(g.dir, "console") }

// run runs the guest until it ends, and says whether it has begun a job.
func (g outerGuest) run(t *testing.T) (began bool) {
	t.Helper()
	for _, path := range []string{g.report(), g.console()} {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), outerTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", g.args()...)
	stuck := time.AfterFunc(bootTime, cancel)
	defer stuck.Stop()
	// Not os.Stdout itself: it may be a file, which QEMU would empty.
	out := &ear{prefix: filepath.Base(g.dir) + "| ", heard: func() { began = stuck.Stop() }}
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // a child's death signal comes when the thread that started it ends
	defer runtime.UnlockOSThread()
	if err := cmd.Run(); err != nil && began {
		t.Errorf("the outer guest: %v", err)
	}
	return began
}

// args are QEMU's. The guest has one processor: with two, its timers' interrupts
// have been seen to leave no time for machines inside, for minutes, on a busy host.
func (g outerGuest) args() []string {
	return []string{
		"-name", "tine-outer", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-M", "q35", "-accel", "tcg,tb-size=512", "-cpu", "EPYC,check=off", "-smp", "1", "-m", "2560",
		"-kernel", g.img.KernelPath(), "-initrd", g.img.InitrdPath(),
		"-append", "console=ttyS0 panic=-1 mitigations=off cryptomgr.notests no_timer_check tsc=reliable",
		"-drive", "if=none,id=disk,format=raw,cache=unsafe,file=" + g.disk, "-device", "virtio-blk-pci,drive=disk",
		"-device", "virtio-rng-pci",
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=output,path=/dev/stdout", "-device", "virtserialport,chardev=output,name=" + outputPort,
		"-chardev", "file,id=report,path=" + g.report(), "-device", "virtserialport,chardev=report,name=" + resultPort,
		"-chardev", "file,id=console,path=" + g.console(), "-serial", "chardev:console",
	}
}

// ear passes on the lines that it hears, and says when it hears the first.
type ear struct {
	prefix string
	line   []byte
	heard  func()
	once   sync.Once
}

func (e *ear) Write(p []byte) (int, error) {
	e.once.Do(e.heard)
	for _, b := range p {
		if e.line = append(e.line, b); b == '\n' || len(e.line) >= maxLine {
			if _, err := os.Stdout.WriteString(e.prefix + strings.TrimSuffix(string(e.line), "\n") + "\n"); err != nil {
				return 0, err
			}
			e.line = e.line[:0]
		}
	}
	return len(p), nil
}

// readReport reads what an outer guest has reported.
func readReport(nonce, path string) (r result, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return result{}, err
	}
	if err = json.Unmarshal(data, &r); err != nil {
		return result{}, err
	}
	if r.Nonce != nonce {
		return result{}, fmt.Errorf("the report is of another run")
	}
	return r, nil
}

func tail(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const most = 8 << 10
	return bytes.TrimSpace(data[max(0, len(data)-most):])
}
