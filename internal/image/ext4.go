package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/ext4"
	"github.com/tinevm/tine/internal/progress"
)

// ext4Source is a filesystem in a file of this host, as other microVMs boot
// from. It is read, never mounted.
type ext4Source struct {
	path   string
	limits Limits
}

func newExt4Source(text string, limits Limits) (ext4Source, error) {
	abs, err := localPath("ext4", text)
	return ext4Source{path: abs, limits: limits}, err
}

// identity is the digest of everything in the filesystem: not of the file,
// most of which may be free.
func (s ext4Source) identity(ctx context.Context) (string, error) {
	progress.Report(ctx, step, "reading "+s.path)
	return identityOf("ext4", func(w io.Writer) error { return s.archive(ctx, w) })
}

func (s ext4Source) unpack(ctx context.Context, t *tree, _ string) (RunConfig, error) {
	progress.Report(ctx, step, "copying "+s.path)
	err := stream(func(w io.Writer) error { return s.archive(ctx, w) },
		func(r io.Reader) error { return t.unpack(ctx, r, unpackOptions{}) })
	return RunConfig{Env: []string{defaultPath}}, err
}

// archive writes the filesystem as an archive whose bytes depend on nothing but
// what is in it. It leaves out devices, sockets and pipes, as that of a
// directory does.
func (s ext4Source) archive(ctx context.Context, w io.Writer) error {
	err := s.read(ctx, w)
	if err != nil {
		return fmt.Errorf("filesystem image %s: %w", s.path, err)
	}
	return nil
}

func (s ext4Source) read(ctx context.Context, w io.Writer) error {
	// A pipe that nobody writes to must not stop us: it is refused below.
	f, err := os.OpenFile(s.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: no such file", errdef.ErrNotFound)
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: it is not a regular file", errdef.ErrInvalid)
	}
	disk, err := ext4.Open(f, info.Size())
	if err != nil {
		return err
	}
	a := &diskArchiver{ctx: ctx, fs: disk, out: tar.NewWriter(w), room: s.limits.Bytes, links: map[uint32]string{}}
	if err = disk.Walk(ctx, s.limits.Entries, a.add); err != nil {
		return err
	}
	return a.out.Close()
}

type diskArchiver struct {
	ctx   context.Context // the archive is one call
	fs    *ext4.FS
	out   *tar.Writer
	room  int64             // for contents
	links map[uint32]string // inodes of files with more names
}

// lostAndFound is where repairs put what has lost its name.
const lostAndFound = "lost+found"

func (a *diskArchiver) add(name string, in *ext4.Inode) error {
	hdr := &tar.Header{
		Name: name, Mode: int64(in.Mode), Uid: int(in.UID), Gid: int(in.GID), ModTime: in.ModTime, Format: tar.FormatPAX,
	}
	switch in.Type {
	case ext4.Dir:
		if name == lostAndFound {
			return nil // what is in it, if anything, brings it along
		}
		hdr.Typeflag = tar.TypeDir
		hdr.Name += "/"
		return a.out.WriteHeader(hdr)
	case ext4.Symlink:
		var err error
		hdr.Typeflag = tar.TypeSymlink
		if hdr.Linkname, err = a.fs.Readlink(in); err != nil {
			return fmt.Errorf("%.200q: %w", name, err)
		}
		return a.out.WriteHeader(hdr)
	case ext4.Regular:
		if err := a.addFile(hdr, in); err != nil {
			return fmt.Errorf("%.200q: %w", name, err)
		}
		return nil
	default:
		return nil
	}
}

func (a *diskArchiver) addFile(hdr *tar.Header, in *ext4.Inode) error {
	if first, again := a.links[in.Number]; again {
		hdr.Typeflag, hdr.Linkname = tar.TypeLink, first
		return a.out.WriteHeader(hdr)
	}
	if in.Links > 1 {
		a.links[in.Number] = hdr.Name
	}
	if in.Size > a.room {
		return fmt.Errorf("%w: more than %d bytes are left for the root tree", errdef.ErrExhausted, a.room)
	}
	a.room -= in.Size
	if in.Capability != nil {
		hdr.PAXRecords = map[string]string{"SCHILY.xattr." + capabilityXattr: string(in.Capability)}
	}
	hdr.Typeflag, hdr.Size = tar.TypeReg, in.Size
	if err := a.out.WriteHeader(hdr); err != nil {
		return err
	}
	return a.fs.Copy(a.ctx, a.out, in)
}
