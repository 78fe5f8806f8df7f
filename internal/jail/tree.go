package jail

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// treeVersion is part of a tree's name: another way to make trees makes others.
const treeVersion = "1"

// loaderCache is where the loader looks for libraries that lie elsewhere than in
// its own directories.
const loaderCache = "/etc/ld.so.cache"

// makeTree makes a directory below dir that has the program, the libraries that
// it is linked with and the other files, at their own paths, and nothing else.
// It is made of copies, so that a launcher puts one mount in place and not one
// for each file. It also has empty directories for mounts, which lie in its root.
// A tree that is there already is used again.
func makeTree(ctx context.Context, dir, program string, others []string, mounts ...string) (string, error) {
	files, err := Closure(ctx, program, others)
	if err != nil {
		return "", fmt.Errorf("find what %s needs: %w", program, err)
	}
	for _, mount := range mounts {
		for _, file := range files {
			if strings.HasPrefix(file, mount+"/") {
				return "", fmt.Errorf("%w: %s would not be seen: it lies in %s", errdef.ErrUnsupported, file, mount)
			}
		}
	}
	name, err := treeName(files, mounts)
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	if _, err = os.Stat(path); err == nil {
		return path, nil
	}
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	stage, err := os.MkdirTemp(dir, "new-")
	if err != nil {
		return "", err
	}
	defer func() { _ = os.RemoveAll(stage) }() // if it is there still, it is of no use
	for _, file := range files {
		if err = copyInto(stage, file); err != nil {
			return "", fmt.Errorf("copy %s: %w", file, err)
		}
	}
	for _, mount := range mounts {
		if err = os.Mkdir(filepath.Join(stage, mount), 0o700); err != nil {
			return "", err
		}
	}
	if err = openToAll(stage); err != nil {
		return "", err
	}
	if err = os.Rename(stage, path); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, syscall.ENOTEMPTY) {
		return "", err
	}
	return path, nil
}

// Closure is the paths of the program and the other files, and of what those of
// them that are programs or shared libraries are linked with, sorted.
func Closure(ctx context.Context, program string, others []string) ([]string, error) {
	found := map[string]bool{}
	for _, file := range append([]string{program}, others...) {
		found[file] = true
		linked, err := linkedWith(ctx, file)
		if err != nil {
			return nil, err
		}
		for _, lib := range linked {
			found[lib] = true
		}
	}
	if _, err := os.Stat(loaderCache); err == nil {
		found[loaderCache] = true
	}
	files := make([]string, 0, len(found))
	for file := range found {
		files = append(files, filepath.Clean(file))
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}

// treeName tells a tree from those of other files, or of other versions of them.
func treeName(files, mounts []string) (string, error) {
	h := sha256.New()
	_, _ = fmt.Fprintln(h, treeVersion) // a hash takes all
	for _, file := range files {
		info, err := os.Stat(file)
		if err != nil {
			return "", err
		}
		_, _ = fmt.Fprintln(h, file, info.Size(), info.ModTime().UnixNano())
	}
	for _, mount := range mounts {
		_, _ = fmt.Fprintln(h, "mount", mount)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

// openToAll lets everybody read a tree and execute what is in it, whatever umask
// this process has made it under.
func openToAll(root string) error {
	return filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		mode := fs.FileMode(0o555)
		if e.IsDir() {
			mode = 0o755 // for us to remove it
		}
		return os.Chmod(path, mode) //nolint:gosec // nobody else can get at it
	})
}

// copyInto copies a file to its own path below root.
func copyInto(root, file string) (err error) {
	target := filepath.Join(root, file)
	if err = os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
		return err
	}
	src, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }() // only read
	dst, err := os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// linkedWith asks the loader of a file what it would load with it. A file that
// has no loader is linked with nothing.
func linkedWith(ctx context.Context, file string) ([]string, error) {
	loader, err := loaderOf(file)
	if err != nil || loader == "" {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, loader, "--list", file).Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s --list %s: %w", errdef.ErrUnavailable, loader, file, err)
	}
	return append(parseLoaderList(string(out)), loader), nil
}

// parseLoaderList reads lines as "libm.so.6 => /lib/libm.so.6 (0x7f…)".
func parseLoaderList(out string) []string {
	var libs []string
	for line := range strings.Lines(out) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), "=> ")
		if end := strings.LastIndex(path, " (0x"); end >= 0 {
			path = path[:end]
		}
		if filepath.IsAbs(path) {
			libs = append(libs, path)
		}
	}
	return libs
}

// openTree makes a mount of the tree, which only reads, and is nowhere yet. It
// needs the rights of root; a launcher without them makes its own.
func openTree(path string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open tree: %w", err)
	}
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
		Propagation: unix.MS_PRIVATE,
	}
	if err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return -1, errors.Join(fmt.Errorf("protect tree: %w", err), unix.Close(fd))
	}
	return fd, nil
}

// enterTree makes the tree the root of this mount namespace, and lets go of all
// that was there.
func enterTree(path string, fds []int) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts apart: %w", err)
	}
	tree := -1
	if path != "" {
		fd, err := openTree(path)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		tree = fd
	} else if len(fds) > 0 {
		tree = fds[0]
	}
	// Any directory will do: it is not there any more when this is done.
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, "/proc", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("put tree in place: %w", err)
	}
	if err := unix.Fchdir(tree); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	return unix.Chdir("/")
}
