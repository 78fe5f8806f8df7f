package ext4_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/ext4"
)

// tool finds a program of e2fsprogs, also where only root looks. Without it
// nothing here is tested, so that is a failure.
func tool(t testing.TB, name string) string {
	t.Helper()
	for _, path := range []string{name, "/sbin/" + name, "/usr/sbin/" + name} {
		if found, err := exec.LookPath(path); err == nil {
			return found
		}
	}
	t.Fatalf("%s is missing: install the package e2fsprogs", name)
	return ""
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), tool(t, name), args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// mkfs makes a filesystem of what is in dir.
func mkfs(t testing.TB, dir, size string, flags ...string) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "image")
	args := append([]string{"-q", "-F", "-E", "root_owner=0:0", "-d", dir}, flags...)
	run(t, "mke2fs", append(args, image, size)...)
	return image
}

func put(t testing.TB, dir, name string, content []byte) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, content, 0o640); err != nil {
		t.Fatal(err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// sourceTree has one of everything that a filesystem has two ways to store.
func sourceTree(t testing.TB, many int) string {
	t.Helper()
	dir := t.TempDir()
	random := rand.NewChaCha8([32]byte{1})
	for _, size := range []int{0, 1, 59, 60, 61, 1023, 1024, 4096, 4097, 13 << 10, 300 << 10, 5 << 20} {
		content := make([]byte, size)
		_, _ = random.Read(content) // it never fails
		put(t, dir, fmt.Sprintf("sizes/%d", size), content)
	}
	put(t, dir, "sparse", nil)
	f, err := os.OpenFile(filepath.Join(dir, "sparse"), os.O_WRONLY, 0)
	must(t, err)
	for _, at := range []int64{0, 100_000, 3 << 20, 9 << 20} {
		_, err = f.WriteAt(bytes.Repeat([]byte("x"), 5000), at)
		must(t, err)
	}
	must(t, f.Truncate(10<<20))
	must(t, f.Close())
	for i := range many { // more than a block of names, so that there is an index
		put(t, dir, fmt.Sprintf("many/a-name-that-takes-its-room-%d", i), []byte(strconv.Itoa(i)))
	}
	put(t, dir, "names/ünïcode and spaces", []byte("u"))
	put(t, dir, "names/"+strings.Repeat("n", 255), []byte("long"))
	put(t, dir, strings.Repeat("deep/", 100)+"file", []byte("down here"))
	must(t, os.Symlink("short", filepath.Join(dir, "link")))
	must(t, os.Symlink("/"+strings.Repeat("long/", 40), filepath.Join(dir, "longlink")))
	must(t, os.Link(filepath.Join(dir, "sizes/61"), filepath.Join(dir, "twin")))
	must(t, os.Chmod(filepath.Join(dir, "sizes"), 0o700|fs.ModeSticky))
	old := time.Unix(4_000_000_000, 0) // more than 31 bits
	must(t, os.Chtimes(filepath.Join(dir, "twin"), old, old))
	return dir
}

// item is what is compared of a file.
type item struct {
	Type    ext4.Type
	Mode    uint32
	Size    int64
	Content string // or where it leads
}

// read reads all of an image.
func read(ctx context.Context, image []byte, most int64) (map[string]item, error) {
	disk, err := ext4.Open(bytes.NewReader(image), int64(len(image)))
	if err != nil {
		return nil, err
	}
	items := map[string]item{}
	err = disk.Walk(ctx, 100_000, func(path string, in *ext4.Inode) error {
		it := item{Type: in.Type, Mode: in.Mode}
		switch in.Type {
		case ext4.Regular:
			if most -= in.Size; most < 0 {
				return errdef.ErrExhausted
			}
			var content bytes.Buffer
			if copyErr := disk.Copy(ctx, &content, in); copyErr != nil {
				return copyErr
			}
			it.Size, it.Content = in.Size, content.String()
		case ext4.Symlink:
			if it.Content, err = disk.Readlink(in); err != nil {
				return err
			}
		}
		items[path] = it
		return nil
	})
	return items, err
}

// expected is what there is in a directory of this host.
func expected(t *testing.T, dir string) map[string]item {
	t.Helper()
	items := map[string]item{}
	must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		must(t, err)
		info, err := e.Info()
		must(t, err)
		name, err := filepath.Rel(dir, path)
		must(t, err)
		it := item{Mode: uint32(info.Mode().Perm())}
		if info.Mode()&fs.ModeSticky != 0 {
			it.Mode |= 0o1000
		}
		switch {
		case e.IsDir():
			it.Type = ext4.Dir
		case e.Type() == fs.ModeSymlink:
			it.Type = ext4.Symlink
			it.Content, err = os.Readlink(path)
		default:
			data, readErr := os.ReadFile(path)
			it.Type, it.Size, it.Content, err = ext4.Regular, info.Size(), string(data), readErr
		}
		must(t, err)
		items[name] = it
		return nil
	}))
	return items
}

func TestRead(t *testing.T) {
	t.Parallel()
	dir := sourceTree(t, 800)
	want := expected(t, dir)
	delete(want, ".")
	for name, flags := range map[string][]string{
		"ext2-1k":   {"-t", "ext2", "-b", "1024", "-I", "128"},
		"ext2-4k":   {"-t", "ext2", "-b", "4096"},
		"ext3":      {"-t", "ext3"},
		"ext4":      {"-t", "ext4"},
		"ext4-1k":   {"-t", "ext4", "-b", "1024"},
		"64bit":     {"-t", "ext4", "-O", "64bit,metadata_csum"},
		"32bit":     {"-t", "ext4", "-O", "^64bit,^metadata_csum"},
		"bigalloc":  {"-t", "ext4", "-O", "bigalloc"},
		"typeless":  {"-t", "ext2", "-O", "^filetype"},
		"plain":     {"-O", "none"},
		"ea-inodes": {"-t", "ext4", "-O", "ea_inode,large_dir"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			image, err := os.ReadFile(mkfs(t, dir, "96M", flags...))
			must(t, err)
			got, err := read(t.Context(), image, 1<<30)
			must(t, err)
			delete(got, "lost+found")
			delete(got, ".") // its mode is the tool's own choice
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff[:min(len(diff), 4000)])
			}
		})
	}
}

// TestReadLargeBlocks has blocks whose size 16 bits cannot say.
func TestReadLargeBlocks(t *testing.T) {
	t.Parallel()
	dir := sourceTree(t, 10)
	want := expected(t, dir)
	delete(want, ".")
	image, err := os.ReadFile(mkfs(t, dir, "48M", "-t", "ext4", "-b", "65536", "-O", "^has_journal"))
	must(t, err)
	got, err := read(t.Context(), image, 1<<30)
	must(t, err)
	delete(got, "lost+found")
	delete(got, ".")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff[:min(len(diff), 4000)])
	}
}

// edit changes an image with the debugger of e2fsprogs.
func edit(t *testing.T, image string, commands ...string) {
	t.Helper()
	script := filepath.Join(t.TempDir(), "script")
	must(t, os.WriteFile(script, []byte(strings.Join(commands, "\n")+"\n"), 0o600))
	run(t, "debugfs", "-w", "-f", script, image)
}

func TestInode(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put(t, dir, "ping", []byte("p"))
	put(t, dir, "plain", []byte("p"))
	capability := []byte("\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	value := filepath.Join(t.TempDir(), "value")
	must(t, os.WriteFile(value, capability, 0o600))
	for _, flags := range [][]string{{"-t", "ext4", "-I", "256"}, {"-t", "ext2", "-I", "128"}} {
		image := mkfs(t, dir, "4M", flags...)
		edit(t, image,
			"ea_set ping user.other x", "ea_set -f "+value+" ping security.capability",
			"sif ping uid 70000", "sif ping gid 80000", "sif ping mode 0104755", "sif ping mtime @1600000000",
			"mknod null c 1 3", "mknod disk b 8 0", "mknod pipe p")
		data, err := os.ReadFile(image)
		must(t, err)
		disk, err := ext4.Open(bytes.NewReader(data), int64(len(data)))
		must(t, err)
		found := map[string]ext4.Inode{}
		must(t, disk.Walk(t.Context(), 100, func(path string, in *ext4.Inode) error {
			found[path] = *in
			return nil
		}))
		ping := found["ping"]
		if ping.UID != 70000 || ping.GID != 80000 || ping.Mode != 0o4755 || ping.ModTime.Unix() != 1_600_000_000 || ping.Links != 1 {
			t.Errorf("%v: got %+v", flags, ping)
		}
		if !bytes.Equal(ping.Capability, capability) || found["plain"].Capability != nil {
			t.Errorf("%v: capabilities: got %x and %x", flags, ping.Capability, found["plain"].Capability)
		}
		for name, kind := range map[string]ext4.Type{"null": ext4.Char, "disk": ext4.Block, "pipe": ext4.Pipe} {
			if found[name].Type != kind {
				t.Errorf("%v: %s has type %#x", flags, name, found[name].Type)
			}
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put(t, dir, "file", []byte("content"))
	image, err := os.ReadFile(mkfs(t, dir, "2M", "-t", "ext4"))
	must(t, err)
	with := func(at int, value uint32) []byte {
		crooked := bytes.Clone(image)
		binary.LittleEndian.PutUint32(crooked[1024+at:], value)
		return crooked
	}
	for name, test := range map[string]struct {
		image []byte
		want  error
		says  string
	}{
		"empty":        {nil, errdef.ErrInvalid, "too short"},
		"zeros":        {make([]byte, 1<<20), errdef.ErrInvalid, "no ext2"},
		"cut":          {image[:1<<20], errdef.ErrInvalid, "cut short"},
		"huge-blocks":  {with(0x18, 50), errdef.ErrInvalid, "blocks of"},
		"many-blocks":  {with(0x4, 1<<31), errdef.ErrInvalid, "cut short"},
		"no-groups":    {with(0x20, 0), errdef.ErrInvalid, "groups of"},
		"no-inodes":    {with(0x28, 0), errdef.ErrInvalid, "groups of"},
		"first-block":  {with(0x14, 1<<31), errdef.ErrInvalid, "first"},
		"small-inodes": {with(0x58, 3), errdef.ErrInvalid, "inodes of"},
		"not-clean":    {with(0x60, 0x46), errdef.ErrInvalid, "journal"},
		"unknown":      {with(0x60, 1<<31), errdef.ErrUnsupported, "features"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := ext4.Open(bytes.NewReader(test.image), int64(len(test.image)))
			if !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v that says %q", err, test.want, test.says)
			}
		})
	}
}

// TestCrooked gives images that contradict themselves.
func TestCrooked(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		commands []string
		says     string
	}{
		"cycle":         {[]string{"link a a/b/again"}, "within itself"},
		"two-names":     {[]string{"link a/b twin"}, "two names"},
		"root-in-root":  {[]string{"link / a/root"}, "within itself"},
		"removed":       {[]string{"sif file links_count 0"}, "was removed"},
		"outside":       {[]string{"sif file block[2] 0", "sif file flags 0", "sif file block[0] 0x7fffffff"}, "outside"},
		"no-extents":    {[]string{"sif file block[0] 7"}, "damaged"},
		"name-of-slash": {nil, "has the name"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			put(t, dir, "file", []byte("content"))
			put(t, dir, "a/b/c", []byte("content"))
			put(t, dir, "evil-name", nil)
			path := mkfs(t, dir, "2M", "-t", "ext4", "-O", "^has_journal,^metadata_csum")
			if test.commands != nil {
				edit(t, path, test.commands...)
			}
			image, err := os.ReadFile(path)
			must(t, err)
			if test.commands == nil {
				image = bytes.Replace(image, []byte("evil-name"), []byte("../../etc"), 1)
			}
			_, err = read(t.Context(), image, 1<<24)
			if !errors.Is(err, errdef.ErrInvalid) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("got %v, want %v that says %q", err, errdef.ErrInvalid, test.says)
			}
		})
	}
}

func TestWalkStops(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i := range 10 {
		put(t, dir, strconv.Itoa(i), nil)
	}
	image, err := os.ReadFile(mkfs(t, dir, "2M"))
	must(t, err)
	walk := func(ctx context.Context, most int) error {
		disk, err := ext4.Open(bytes.NewReader(image), int64(len(image)))
		must(t, err)
		return disk.Walk(ctx, most, func(string, *ext4.Inode) error { return nil })
	}
	if err := walk(t.Context(), 5); !errors.Is(err, errdef.ErrExhausted) {
		t.Errorf("more names than allowed: got %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := walk(ctx, 100); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits any more: got %v", err)
	}
}

// smallImages are the bases of what is broken.
func smallImages(t testing.TB) [][]byte {
	t.Helper()
	dir := t.TempDir()
	put(t, dir, "file", bytes.Repeat([]byte("content"), 3000))
	put(t, dir, "a/b/c", []byte("content"))
	must(t, os.Symlink(strings.Repeat("long/", 20), filepath.Join(dir, "link")))
	for i := range 40 {
		put(t, dir, fmt.Sprintf("many/name-of-some-length-%d", i), nil)
	}
	var images [][]byte
	for _, flags := range [][]string{{"-t", "ext4", "-O", "^has_journal", "-b", "1024"}, {"-t", "ext2", "-b", "1024"}} {
		image, err := os.ReadFile(mkfs(t, dir, "256k", append(flags, "-N", "128")...))
		must(t, err)
		images = append(images, image)
	}
	return images
}

// survive reads what may be crooked: it must end, and say that it is.
func survive(t *testing.T, image []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := read(ctx, image, 1<<22)
	if err != nil && !errors.Is(err, errdef.ErrInvalid) && !errors.Is(err, errdef.ErrExhausted) && !errors.Is(err, errdef.ErrUnsupported) {
		t.Fatalf("got %v", err)
	}
}

// TestBroken changes bytes where the structure is, and cuts images short.
func TestBroken(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewChaCha8([32]byte{2}))
	for _, image := range smallImages(t) {
		for range 200 {
			broken := bytes.Clone(image)
			for range 1 + random.IntN(8) {
				broken[1024+random.IntN(64<<10)] = byte(random.IntN(256))
			}
			survive(t, broken)
			survive(t, broken[:random.IntN(len(broken))])
		}
	}
}

// FuzzRead changes an image: data is a row of places and what is put there.
func FuzzRead(f *testing.F) {
	images := smallImages(f)
	f.Add(byte(0), []byte{0, 4, 0, 1})
	f.Add(byte(1), []byte{0x38, 4, 0, 0, 0x60, 4, 0, 0x80})
	f.Fuzz(func(t *testing.T, which byte, data []byte) {
		broken := bytes.Clone(images[int(which)%len(images)])
		for r := bytes.NewReader(data); ; {
			var change [4]byte
			if _, err := io.ReadFull(r, change[:]); err != nil {
				break
			}
			at := int(change[0]) | int(change[1])<<8 | int(change[2]&3)<<16
			broken[at%len(broken)] = change[3]
		}
		survive(t, broken)
	})
}
