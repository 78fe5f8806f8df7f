package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

// cpioEntry is what the test's own reader makes of an entry.
type cpioEntry struct {
	mode    int64
	content string
}

// readCPIO reads a newc archive, by the format's description in the kernel's
// documentation.
func readCPIO(t *testing.T, data []byte) (entries map[string]cpioEntry, names []string) {
	t.Helper()
	entries = map[string]cpioEntry{}
	for len(data) >= 110 {
		field := func(i int) int64 {
			v, err := strconv.ParseInt(string(data[6+8*i:14+8*i]), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
		if string(data[:6]) != "070701" {
			t.Fatalf("magic %q", data[:6])
		}
		mode, size, nameSize := field(1), field(6), field(11)
		name := string(data[110 : 110+nameSize-1])
		start := (110 + nameSize + 3) &^ 3
		if name == cpioEnd {
			return entries, names
		}
		entries[name] = cpioEntry{mode: mode, content: string(data[start : start+size])}
		names = append(names, name)
		data = data[(start+size+3)&^3:]
	}
	t.Fatal("archive has no end")
	return nil, nil
}

func kernelFiles(t *testing.T, dir string) *bundle {
	t.Helper()
	files, err := newBundle(filepath.Join(t.TempDir(), "files"), anyLimits())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = files.close() })
	err = dirKernel{dirSource{dir}}.archive(t.Context(), "", func(ctx context.Context, r io.Reader) error { return files.collect(ctx, r) })
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestInitrd(t *testing.T) {
	t.Parallel()
	set, err := loadModules(kernelFiles(t, kernelTree(t)), nil)
	if err != nil {
		t.Fatal(err)
	}
	var modules, initrd bytes.Buffer
	if err = set.writeCPIO(&modules); err != nil {
		t.Fatal(err)
	}
	if err = writeInitrd(&initrd, strings.NewReader("agent"), 5, &modules); err != nil {
		t.Fatal(err)
	}
	got, names := readCPIO(t, initrd.Bytes())
	want := []string{
		"modules", "modules/order", "modules/order.d", "modules/order.d/blk", "modules/order.d/e820", "modules/order.d/ext4", "modules/order.d/mmio", "modules/order.d/net", "modules/order.d/nvdimm", "modules/order.d/rng", "modules/order.d/vsock",
		"dev", "proc", "sys", "newroot", "dev/console", "dev/null", "init",
	}
	for name := range testModules() {
		if name != "unwanted" {
			want = append(want, "modules/"+strings.ReplaceAll(name, "-", "_")+".ko")
		}
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(slices.Values(names))); diff != "" {
		t.Error(diff)
	}
	if e := got["init"]; e.mode != 0o100755 || e.content != "agent" {
		t.Errorf("init: %+v", e)
	}
	if e := got["dev/console"]; e.mode != 0o020600 {
		t.Errorf("dev/console: %+v", e)
	}
	order := got["modules/order"].content
	wantOrder := []string{
		"virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio", "virtio_pci", "virtio_console",
		"libnvdimm", "nd_virtio", "virtio_pmem", "nd_btt", "nd_pmem", "libcrc32c", "erofs", "overlay",
	}
	if diff := cmp.Diff("/modules/"+strings.Join(wantOrder, ".ko\n/modules/")+".ko\n", order); diff != "" {
		t.Error(diff)
	}
	for feature, want := range map[string]string{
		"blk": "/modules/shared.ko\n/modules/virtio_blk.ko\n", "net": "/modules/shared.ko\n/modules/virtio_net.ko\n",
		"mmio": "/modules/virtio_mmio.ko\n", "rng": "/modules/virtio_rng.ko\n", "nvdimm": "/modules/nfit.ko\n", "e820": "",
		"vsock": "/modules/vsock.ko\n/modules/vmw_vsock_virtio_transport_common.ko\n/modules/vmw_vsock_virtio_transport.ko\n",
		"ext4":  "/modules/jbd2.ko\n/modules/mbcache.ko\n/modules/ext4.ko\n",
	} {
		if got := got["modules/order.d/"+feature].content; got != want {
			t.Errorf("%s: %q, want %q", feature, got, want)
		}
	}
	for line := range strings.Lines(order) {
		if _, ok := got[strings.TrimSpace(line)[1:]]; !ok {
			t.Errorf("%s is not in the archive", line)
		}
	}
	checkWithTool(t, initrd.Bytes(), names)
}

// checkWithTool has the system's cpio read the archive, where there is one.
func checkWithTool(t *testing.T, archive []byte, names []string) {
	t.Helper()
	path, err := exec.LookPath("cpio")
	if err != nil {
		t.Log("no cpio here: only this test's own reader has read the archive")
		return
	}
	cmd := exec.CommandContext(t.Context(), path, "-t", "--quiet")
	cmd.Stdin = bytes.NewReader(archive)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(names, strings.Fields(string(out))); diff != "" {
		t.Error(diff)
	}
}

func TestModuleDependencies(t *testing.T) {
	t.Parallel()
	required := map[string]string{"virtio_pci": "", "virtio_console": "", "nd_pmem": "", "erofs": "", "overlay": ""}
	for name, tc := range map[string]struct {
		info map[string][]string
		want error
	}{
		"enough":        {nil, nil},
		"missing_dep":   {map[string][]string{"erofs": {"depends=nowhere"}}, errdef.ErrNotFound},
		"missing_soft":  {map[string][]string{"erofs": {"softdep=pre: nowhere", "depends="}}, nil},
		"circle":        {map[string][]string{"erofs": {"depends=overlay"}, "overlay": {"depends=erofs"}}, errdef.ErrInvalid},
		"built_in_dep":  {map[string][]string{"erofs": {"depends=crc32c-generic"}}, nil},
		"several_lines": {map[string][]string{"erofs": {"license=GPL", "depends=overlay,nd-pmem", "softdep=pre: overlay post: nowhere"}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tree := t.TempDir()
			for mod := range required {
				writeFile(t, filepath.Join(tree, "lib/modules/6/kernel", mod+".ko"), string(koFile(tc.info[mod]...)))
			}
			writeFile(t, filepath.Join(tree, "lib/modules/6/modules.builtin"), "kernel/crypto/crc32c_generic.ko\n")
			if _, err := loadModules(kernelFiles(t, tree), nil); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestMoreModules(t *testing.T) {
	t.Parallel()
	files := kernelFiles(t, kernelTree(t))
	set, err := loadModules(files, []string{"unwanted", "erofs"})
	if err != nil {
		t.Fatal(err)
	}
	if got := set.order(moreModules); got != "/modules/unwanted.ko\n" {
		t.Errorf("order %q: want what is not loaded at boot, and only that", got)
	}
	var archive bytes.Buffer
	if err = errors.Join(set.writeCPIO(&archive), writeInitrd(&archive, strings.NewReader(""), 0, strings.NewReader(""))); err != nil {
		t.Fatal(err)
	}
	if got, _ := readCPIO(t, archive.Bytes()); got["modules/order.d/more"].content != "/modules/unwanted.ko\n" || got["modules/unwanted.ko"].content == "" {
		t.Errorf("the archive has %+v", got["modules/order.d/more"])
	}
	if _, err = loadModules(files, []string{"no_such"}); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a module that the kernel lacks: %v, want %v", err, errdef.ErrNotFound)
	}
}

func TestModulesRequired(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	writeFile(t, filepath.Join(tree, "lib/modules/6/kernel/overlay.ko"), string(koFile("depends=")))
	if _, err := loadModules(kernelFiles(t, tree), nil); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("got %v, want %v", err, errdef.ErrNotFound)
	}
	if set, err := loadModules(kernelFiles(t, t.TempDir()), nil); err != nil || len(set.content) != 0 {
		t.Errorf("a kernel without modules: %v", err)
	}
}

func TestKernelFiles(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		files   []string
		kernel  string
		version string
		want    error
	}{
		"debian":       {[]string{"boot/vmlinuz-6.1-x", "boot/System.map-6.1-x", "lib/modules/6.1-x/kernel/a.ko"}, "boot/vmlinuz-6.1-x", "6.1-x", nil},
		"usr_merged":   {[]string{"boot/vmlinuz-6.1-x", "usr/lib/modules/6.1-x/kernel/a.ko.xz"}, "boot/vmlinuz-6.1-x", "6.1-x", nil},
		"beside":       {[]string{"usr/lib/modules/6.1-x/vmlinuz", "usr/lib/modules/6.1-x/kernel/a.ko"}, "usr/lib/modules/6.1-x/vmlinuz", "6.1-x", nil},
		"bare":         {[]string{"vmlinux"}, "vmlinux", "", nil},
		"none":         {[]string{"lib/modules/6.1-x/kernel/a.ko"}, "", "", errdef.ErrNotFound},
		"two":          {[]string{"boot/vmlinuz-1", "boot/vmlinuz-2"}, "", "", errdef.ErrInvalid},
		"two_versions": {[]string{"vmlinuz", "lib/modules/1/kernel/a.ko", "lib/modules/2/kernel/a.ko"}, "vmlinuz", "", errdef.ErrInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tree := t.TempDir()
			for _, f := range tc.files {
				writeFile(t, filepath.Join(tree, f), "x")
			}
			files := kernelFiles(t, tree)
			kernel, err := files.kernel()
			if kernel != tc.kernel {
				t.Errorf("kernel is %q, want %q", kernel, tc.kernel)
			}
			version := ""
			if err == nil {
				version, err = files.version(kernel)
			}
			if version != tc.version || !errors.Is(err, tc.want) {
				t.Errorf("got %q, %v; want %q, %v", version, err, tc.version, tc.want)
			}
		})
	}
}

func FuzzDependencies(f *testing.F) {
	f.Add(koFile("depends=a,b", "softdep=pre: c post: d"))
	f.Add(elfKernel()[:64])
	f.Fuzz(func(_ *testing.T, content []byte) {
		_, _, _ = dependencies(content) // must return
	})
}
