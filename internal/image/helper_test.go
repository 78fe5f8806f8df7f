package image

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// needMkfs fails where root filesystems cannot be made: a skip would let all
// of the store go untested.
func needMkfs(t *testing.T) {
	t.Helper()
	if _, err := toolMkfs.find(); err != nil {
		t.Fatalf("%v: install the package %s", err, toolMkfs.pkg)
	}
}

// openStore opens a store with a stand-in for the agent.
func openStore(t *testing.T) *Store {
	t.Helper()
	needMkfs(t)
	return openStoreAt(t, t.TempDir(), "agent")
}

func openStoreAt(t *testing.T, dir, agent string) *Store {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent")
	writeFile(t, path, agent)
	s, err := Open(Config{Dir: dir, Agent: path})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	old := time.Unix(1_600_000_000, 0)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
}

// extract unpacks an image's root filesystem with the tool's own reader.
func extract(t *testing.T, img Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "out")
	out, err := exec.CommandContext(t.Context(), "fsck.erofs", "--extract="+dir, img.RootPath()).CombinedOutput()
	if err != nil {
		t.Fatalf("fsck.erofs (package %s): %v\n%s", toolMkfs.pkg, err, out)
	}
	return dir
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// entry is one entry of a test archive. What is left out is taken from type.
type entry struct {
	name, content, link string
	kind                byte
	mode                int64
	pax                 map[string]string
}

func file(name, content string) entry {
	return entry{name: name, content: content, kind: tar.TypeReg, mode: 0o644}
}
func dir(name string) entry           { return entry{name: name, kind: tar.TypeDir, mode: 0o755} }
func symlink(name, link string) entry { return entry{name: name, link: link, kind: tar.TypeSymlink} }

func hardlink(name, link string) entry {
	return entry{name: name, link: link, kind: tar.TypeLink}
}

func tarOf(t *testing.T, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		hdr := &tar.Header{
			Name: e.name, Typeflag: e.kind, Linkname: e.link, Mode: e.mode, Size: int64(len(e.content)),
			ModTime: time.Unix(1_600_000_000, 0), PAXRecords: e.pax,
		}
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// elfKernel is the least that passes for an unpacked kernel.
func elfKernel() []byte {
	var buf bytes.Buffer
	hdr := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64}
	copy(hdr.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	_ = binary.Write(&buf, binary.LittleEndian, hdr) // a Buffer never fails
	buf.WriteString(strings.Repeat("a kernel would be here. ", 10_000))
	return buf.Bytes()
}

// koFile is a module that says no more of itself than its .modinfo.
func koFile(info ...string) []byte {
	const names = "\x00.modinfo\x00.shstrtab\x00"
	modinfo := strings.Join(info, "\x00") + "\x00"
	start := uint64(64)
	hdr := elf.Header64{
		Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64,
		Shoff: start + uint64(len(modinfo)+len(names)), Shentsize: 64, Shnum: 3, Shstrndx: 2,
	}
	copy(hdr.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	var buf bytes.Buffer
	for _, part := range []any{
		hdr, []byte(modinfo), []byte(names),
		elf.Section64{},
		elf.Section64{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: start, Size: uint64(len(modinfo))},
		elf.Section64{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: start + uint64(len(modinfo)), Size: uint64(len(names))},
	} {
		_ = binary.Write(&buf, binary.LittleEndian, part) // a Buffer never fails
	}
	return buf.Bytes()
}

// bzImage wraps a payload as the kernel's build does.
func bzImage(payload []byte) []byte {
	const setup, offset = 1, 64
	image := make([]byte, (setup+1)*sector+offset, (setup+1)*sector+offset+len(payload))
	image[offSetupSectors] = setup
	copy(image[offMagic:], bootMagic)
	binary.LittleEndian.PutUint16(image[offVersion:], 0x20f)
	binary.LittleEndian.PutUint32(image[offPayload:], offset)
	binary.LittleEndian.PutUint32(image[offPayloadLength:], uint32(len(payload)))
	return append(image, payload...)
}

// kernelTree makes a directory with a kernel and the modules that guests need,
// whose dependencies are those of Linux 6.1.
func kernelTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "boot/vmlinuz-6.1.0-test"), string(bzImage(gzipPayload(t, elfKernel()))))
	for name, deps := range testModules() {
		content := koFile("license=GPL", "depends="+deps, "name="+name)
		writeFile(t, filepath.Join(dir, "lib/modules/6.1.0-test/kernel", name+".ko"), string(content))
	}
	writeFile(t, filepath.Join(dir, "lib/modules/6.1.0-test/modules.builtin"), "kernel/crypto/crc32c_generic.ko\n")
	return dir
}

func testModules() map[string]string {
	return map[string]string{
		"virtio_ring": "", "virtio": "virtio_ring", "virtio_pci_modern_dev": "", "virtio_pci_legacy_dev": "",
		"virtio_pci":     "virtio_ring,virtio_pci_modern_dev,virtio_pci_legacy_dev,virtio",
		"virtio_console": "virtio,virtio_ring", "libnvdimm": "", "nfit": "libnvdimm", "nd_btt": "libnvdimm",
		"nd_pmem": "libnvdimm,nd_btt", "nd_virtio": "virtio_ring,libnvdimm", "virtio_pmem": "nd_virtio,virtio,libnvdimm",
		"libcrc32c": "crc32c_generic", "erofs": "libcrc32c", "overlay": "", "virtio-blk": "virtio,shared", "virtio_net": "shared,virtio_ring", "shared": "",
		"ext4": "jbd2,mbcache", "jbd2": "", "mbcache": "", "unwanted": "",
		"virtio_mmio": "virtio,virtio_ring", "virtio-rng": "virtio,virtio_ring", "vsock": "", "vmw_vsock_virtio_transport_common": "vsock",
		"vmw_vsock_virtio_transport": "virtio,vmw_vsock_virtio_transport_common,virtio_ring,vsock",
	}
}
