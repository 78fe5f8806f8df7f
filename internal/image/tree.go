package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// The bounds on one path.
const (
	maxPath  = 4096
	maxHops  = 40 // symbolic links on the way to one entry, as in Linux
	maxXattr = 1 << 10
)

// capabilityXattr is the only extended attribute that images keep.
const capabilityXattr = "security.capability"

// tree is a root filesystem while it is put together: a directory into which
// archives are unpacked, one over the other. Every operation goes through an
// os.Root, so that nothing an archive says can reach out of it. Symbolic links
// on the way to an entry are followed as if the tree were the root directory.
type tree struct {
	dir     string
	root    *os.Root
	asRoot  bool // ownership and capabilities are kept
	limits  Limits
	bytes   int64
	entries int
	// dirs are the directories known to be there, with what finish is to set.
	// No part of their names is a link.
	dirs map[string]*tar.Header
}

// newTree makes an empty tree in the directory scratch.
func newTree(scratch string, limits Limits) (*tree, error) {
	dir := filepath.Join(scratch, "tree")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make root tree: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("make root tree: %w", err)
	}
	t := &tree{dir: dir, root: root, asRoot: privileged(), limits: limits, dirs: map[string]*tar.Header{}}
	t.dirs["."] = impliedDir()
	return t, nil
}

func (t *tree) close() error { return t.root.Close() }

// privileged says whether this process can give files to other users.
func privileged() bool { return os.Geteuid() == 0 }

// impliedDir describes a directory that no archive has an entry for.
func impliedDir() *tar.Header {
	return &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(0, 0)}
}

// unpackOptions say how one archive is unpacked.
type unpackOptions struct {
	// drop says whether to leave out the entry of that clean, relative name.
	drop func(name string, dir bool) bool
	// whiteouts: the archive is an OCI layer, whose .wh. entries remove.
	whiteouts bool
}

// unpack unpacks an archive over what is in the tree.
func (t *tree) unpack(ctx context.Context, r io.Reader, opt unpackOptions) error {
	archive := tar.NewReader(r)
	layer := map[string]bool{} // what this archive itself brought, with all parents, for opaque directories
	for {
		hdr, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if err = ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err = t.count(hdr); err != nil {
			return err
		}
		name, err := cleanName(hdr.Name)
		if err != nil {
			return err
		}
		if opt.drop != nil && opt.drop(name, hdr.Typeflag == tar.TypeDir) {
			continue
		}
		if err = t.entry(hdr, name, archive, layer, opt.whiteouts); err != nil {
			return fmt.Errorf("unpack %q: %w", name, err)
		}
	}
}

// countEntry charges an entry, or a directory that one implies, to the limit.
func (t *tree) countEntry() error {
	t.entries++
	if t.entries > t.limits.Entries {
		return fmt.Errorf("%w: root tree: more than %d entries", errdef.ErrExhausted, t.limits.Entries)
	}
	return nil
}

// count charges an entry and its content to the limits.
func (t *tree) count(hdr *tar.Header) error {
	if err := t.countEntry(); err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeReg {
		return nil
	}
	if hdr.Size > t.limits.Bytes-t.bytes {
		return fmt.Errorf("%w: root tree: more than %d bytes", errdef.ErrExhausted, t.limits.Bytes)
	}
	t.bytes += hdr.Size
	return nil
}

// cleanName turns an archive's name into a clean one, relative to the tree. A
// leading slash means the tree's root, as every unpacker has it.
func cleanName(name string) (string, error) {
	if len(name) > maxPath || slices.Contains(strings.Split(name, "/"), "..") {
		return "", fmt.Errorf("%w: archive entry %.200q: not a path inside the tree", errdef.ErrInvalid, name)
	}
	return path.Clean("./" + name), nil
}

// entry unpacks one entry.
func (t *tree) entry(hdr *tar.Header, name string, content io.Reader, layer map[string]bool, whiteouts bool) error {
	at, err := t.place(name)
	if err != nil {
		return err
	}
	if base := path.Base(at); whiteouts && strings.HasPrefix(base, whiteoutPrefix) {
		return t.whiteout(path.Dir(at), base, layer)
	}
	for part := at; !layer[part]; part = path.Dir(part) {
		layer[part] = true // "." ends it: its own parent is itself
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return t.putDir(hdr, at)
	case tar.TypeReg:
		return t.putFile(hdr, at, content)
	case tar.TypeSymlink:
		return t.putSymlink(hdr, at)
	case tar.TypeLink:
		return t.putLink(hdr, at)
	default:
		return nil // devices, pipes: the guest's /dev has what it needs
	}
}

// place is where in the tree the entry of that name goes: its directory with
// all links followed and missing parts made, and its own last element.
func (t *tree) place(name string) (string, error) {
	if name == "." {
		return name, nil
	}
	dir, err := t.follow(path.Dir(name), true)
	return path.Join(dir, path.Base(name)), err
}

// follow walks to a directory as the guest would, every link taken relative to
// the tree. It makes missing directories if it may, and else returns
// fs.ErrNotExist.
func (t *tree) follow(dir string, create bool) (string, error) {
	if t.dirs[dir] != nil {
		return dir, nil
	}
	at, rest, hops := ".", strings.Split(dir, "/"), 0
	for len(rest) > 0 {
		elem := rest[0]
		rest = rest[1:]
		switch elem {
		case "", ".":
			continue
		case "..":
			at = path.Dir(at)
			continue
		}
		next := path.Join(at, elem)
		target, err := t.enter(next, create)
		if err != nil {
			return "", err
		}
		if target == "" {
			at = next
			continue
		}
		if hops++; hops > maxHops {
			return "", fmt.Errorf("%w: too many symbolic links", errdef.ErrInvalid)
		}
		if path.IsAbs(target) {
			at = "."
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return at, nil
}

// enter makes sure that next is a directory, or returns the target when it is
// a symbolic link.
func (t *tree) enter(next string, create bool) (target string, err error) {
	if t.dirs[next] != nil {
		return "", nil
	}
	info, err := t.root.Lstat(next)
	switch {
	case errors.Is(err, fs.ErrNotExist) && create:
		t.dirs[next] = impliedDir()
		return "", errors.Join(t.countEntry(), t.root.Mkdir(next, 0o700))
	case err != nil:
		return "", err
	case info.Mode().Type() == fs.ModeSymlink:
		return t.root.Readlink(next)
	case !info.IsDir():
		return "", fmt.Errorf("%w: %s is not a directory", errdef.ErrInvalid, next)
	}
	return "", nil
}

// clear removes what is at a place, with all that is in it.
func (t *tree) clear(at string) error {
	if at == "." {
		return fmt.Errorf("%w: the root must stay a directory", errdef.ErrInvalid)
	}
	if err := t.forget(at); err != nil {
		return err
	}
	return t.root.RemoveAll(at)
}

// forget takes a directory and those in it from the known ones.
func (t *tree) forget(at string) error {
	if t.dirs[at] == nil {
		return nil
	}
	return fs.WalkDir(t.root.FS(), at, func(name string, _ fs.DirEntry, err error) error {
		delete(t.dirs, name)
		return err
	})
}

func (t *tree) putDir(hdr *tar.Header, at string) error {
	if t.dirs[at] == nil {
		if err := t.clear(at); err != nil {
			return err
		}
		if err := t.root.Mkdir(at, 0o700); err != nil {
			return err
		}
	}
	t.dirs[at] = hdr
	return nil
}

func (t *tree) putFile(hdr *tar.Header, at string, content io.Reader) error {
	if err := t.clear(at); err != nil {
		return err
	}
	f, err := t.root.OpenFile(at, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	if err == nil {
		err = t.setFile(f, hdr)
	}
	return errors.Join(err, f.Close())
}

// setFile gives a file its owner, capabilities, mode and time, in the order in
// which none undoes another.
func (t *tree) setFile(f *os.File, hdr *tar.Header) error {
	mode := hdr.FileInfo().Mode()
	if t.asRoot {
		if err := f.Chown(hdr.Uid, hdr.Gid); err != nil {
			return err
		}
		if err := setCapability(f, hdr); err != nil {
			return err
		}
	} else {
		mode |= 0o400 // the image tool must be able to read it
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	return unix.Futimes(int(f.Fd()), timevals(hdr.ModTime))
}

func setCapability(f *os.File, hdr *tar.Header) error {
	value, ok := hdr.PAXRecords["SCHILY.xattr."+capabilityXattr]
	if !ok || len(value) > maxXattr {
		return nil
	}
	err := unix.Fsetxattr(int(f.Fd()), capabilityXattr, []byte(value), 0)
	if err != nil {
		return fmt.Errorf("set %s: %w", capabilityXattr, err)
	}
	return nil
}

func (t *tree) putSymlink(hdr *tar.Header, at string) error {
	if len(hdr.Linkname) == 0 || len(hdr.Linkname) >= maxPath {
		return fmt.Errorf("%w: link target of %d bytes", errdef.ErrInvalid, len(hdr.Linkname))
	}
	if err := t.clear(at); err != nil {
		return err
	}
	if err := t.root.Symlink(hdr.Linkname, at); err != nil {
		return err
	}
	if t.asRoot {
		if err := t.root.Lchown(at, hdr.Uid, hdr.Gid); err != nil {
			return err
		}
	}
	return t.setLinkTime(at, hdr.ModTime)
}

// setLinkTime sets the time of a symbolic link itself, which os.Root cannot.
func (t *tree) setLinkTime(at string, when time.Time) error {
	dir, err := t.root.Open(path.Dir(at))
	if err != nil {
		return err
	}
	ts, err := unix.TimeToTimespec(clampTime(when))
	if err == nil {
		err = unix.UtimesNanoAt(int(dir.Fd()), path.Base(at), []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}
	return errors.Join(err, dir.Close())
}

func (t *tree) putLink(hdr *tar.Header, at string) error {
	name, err := cleanName(hdr.Linkname)
	if err != nil {
		return err
	}
	dir, err := t.follow(path.Dir(name), false)
	if err != nil {
		return err
	}
	old := path.Join(dir, path.Base(name))
	if old == at {
		return fmt.Errorf("%w: a hard link to itself", errdef.ErrInvalid)
	}
	info, err := t.root.Lstat(old)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return fmt.Errorf("%w: a hard link to directory %s", errdef.ErrInvalid, old)
	}
	if err = t.clear(at); err != nil {
		return err
	}
	return t.root.Link(old, at)
}

// latest is the last second that an EROFS inode can hold. Later times, and
// those before 1970, are moved to the nearest that it can.
const latest = 1<<32 - 1

func clampTime(when time.Time) time.Time {
	return time.Unix(min(max(when.Unix(), 0), latest), 0)
}

func timevals(when time.Time) []unix.Timeval {
	tv := unix.NsecToTimeval(clampTime(when).UnixNano())
	return []unix.Timeval{tv, tv}
}
