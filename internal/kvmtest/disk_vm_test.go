//go:build vm

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/jail"
	"github.com/tinevm/tine/internal/vmtest"
)

// repository is where the outer guest has what tests look for in theirs.
const repository = "/tine"

// diskSize is the size of the outer guest's disk, which is sparse.
const diskSize = "6G"

// tools are the host's programs that tests in the outer guest start.
func tools() []string {
	return []string{
		"qemu-system-x86_64", "mkfs.ext4", "ip", "nsenter", "sh", "cp", "cat", "ls", "rm", "sleep", "true", "grep", "head",
	}
}

// stage is a directory that becomes the outer guest's root.
type stage struct {
	t    *testing.T
	root string
}

// makeDisk makes the outer guest's disk: programs of this host with what they
// are linked with, the test program, and the shared image.
func makeDisk(t *testing.T, p plan, of suite, init, program string) string {
	t.Helper()
	s := stage{t: t, root: filepath.Join(of.dir(t), "root")}
	if err := os.RemoveAll(s.root); err != nil {
		t.Fatal(err)
	}
	s.skeleton()
	s.addProgram(init, "/init")
	for _, name := range tools() {
		s.addHost(lookPath(t, name))
	}
	s.addHost(firmware(t)...)
	s.addProgram(program, p.Program)
	for name, path := range of.monitors() {
		s.addProgram(os.Getenv(name), path)
	}
	s.addRepository(p)
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	s.write(planFile, string(data))
	disk := filepath.Join(of.dir(t), "disk")
	if err = os.RemoveAll(disk); err != nil {
		t.Fatal(err)
	}
	command(t, lookPath(t, "mkfs.ext4"), "-q", "-F", "-O", "^has_journal,^metadata_csum", "-E", "root_owner=0:0,lazy_itable_init=1,nodiscard", "-d", s.root, disk, diskSize)
	return disk
}

// skeleton makes what every root has.
func (s stage) skeleton() {
	for _, dir := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "root", "dev", "proc", "sys", "run", "tmp", "tests", "var/lib"} {
		s.check(os.MkdirAll(filepath.Join(s.root, dir), 0o755))
	}
	s.check(os.Chmod(filepath.Join(s.root, "tmp"), 0o777|fs.ModeSticky))
	for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
		s.check(os.Symlink("usr/"+dir, filepath.Join(s.root, dir)))
	}
	s.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
	s.write("/etc/group", "root:x:0:\nnogroup:x:65534:\n")
	s.write("/etc/hosts", "127.0.0.1 localhost\n")
	s.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
	s.write("/etc/nsswitch.conf", "hosts: files dns\n")
	s.write("/etc/mke2fs.conf", "")
}

// addRepository adds what tests look for in the repository, and their state.
func (s stage) addRepository(p plan) {
	vmtest.Image(s.t) // so that it is there
	s.write(filepath.Join(repository, "go.mod"), "module outer\n")
	for _, name := range []string{"tine", "tine-agent"} {
		s.addProgram(vmtest.Program(s.t, name), filepath.Join(repository, "bin", name))
	}
	s.check(os.MkdirAll(filepath.Join(s.root, p.Dir), 0o755))
	images := filepath.Join(vmtest.StateDir(s.t), "images")
	s.check(filepath.WalkDir(images, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(images, path)
		if err != nil || e.IsDir() {
			return err
		}
		s.add(path, filepath.Join(repository, ".cache/state/images", name))
		return nil
	}))
}

// addHost adds files of this host at their own paths, with what they are linked
// with.
func (s stage) addHost(paths ...string) {
	for _, path := range paths {
		files, err := jail.Closure(s.t.Context(), path, nil)
		s.check(err)
		for _, file := range files {
			s.add(file, file)
		}
	}
}

// addProgram adds a program at another path, with what it is linked with.
func (s stage) addProgram(program, path string) {
	files, err := jail.Closure(s.t.Context(), program, nil)
	s.check(err)
	for _, file := range files {
		if file == program {
			s.add(file, path)
		} else {
			s.add(file, file)
		}
	}
}

// add adds a file, unless there is one already: as another name of it where that
// is possible.
func (s stage) add(file, path string) {
	real, err := filepath.EvalSymlinks(file)
	s.check(err)
	target := filepath.Join(s.root, path)
	s.check(os.MkdirAll(filepath.Dir(target), 0o755))
	err = os.Link(real, target)
	switch {
	case err == nil || errors.Is(err, fs.ErrExist):
	default:
		s.check(copyFile(real, target))
	}
}

func copyFile(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // only read
	info, err := src.Stat()
	if err != nil {
		return err
	}
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, info.Mode().Perm())
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

func (s stage) write(path, text string) {
	target := filepath.Join(s.root, path)
	s.check(os.MkdirAll(filepath.Dir(target), 0o755))
	s.check(os.WriteFile(target, []byte(text), 0o644))
}

func (s stage) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// firmware is what QEMU loads beside what it is linked with: its firmware, and
// the accelerators where they are modules.
func firmware(t *testing.T) []string {
	t.Helper()
	var files []string
	for dir := range strings.Lines(command(t, "qemu-system-x86_64", "-L", "help")) {
		for _, pattern := range []string{"*.bin", "*.rom", "../../lib/*/qemu/accel-*-x86_64.so"} {
			found, err := filepath.Glob(filepath.Join(strings.TrimSpace(dir), pattern))
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, found...)
		}
	}
	return files
}

// lookPath finds a program of this host, also where only root looks.
func lookPath(t *testing.T, name string) string {
	t.Helper()
	for _, name := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Fatalf("no %s here; make setup-tests installs it", name)
	return ""
}

// command runs a program and returns what it said.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, errOut.String())
	}
	return out.String()
}
