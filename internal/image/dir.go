package image

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// dirSource is a directory of this host, taken as the root tree.
type dirSource struct {
	path string
}

func newDirSource(text string) (dirSource, error) {
	abs, err := localPath("dir", text)
	return dirSource{path: abs}, err
}

// identity is the digest of everything in the directory.
func (d dirSource) identity(ctx context.Context) (string, error) {
	progress.Report(ctx, step, "reading "+d.path)
	return identityOf("dir", func(w io.Writer) error { return d.archive(ctx, w) })
}

// identityOf is the digest of an archive.
func identityOf(kind string, archive func(io.Writer) error) (string, error) {
	h := sha256.New()
	if err := archive(h); err != nil {
		return "", err
	}
	return kind + ":" + hex.EncodeToString(h.Sum(nil)), nil
}

func (d dirSource) unpack(ctx context.Context, t *tree, _ string) (RunConfig, error) {
	progress.Report(ctx, step, "copying "+d.path)
	err := d.stream(ctx, func(r io.Reader) error { return t.unpack(ctx, r, unpackOptions{}) })
	return RunConfig{Env: []string{defaultPath}}, err
}

// stream gives the directory to consume as an archive.
func (d dirSource) stream(ctx context.Context, consume func(io.Reader) error) error {
	return stream(func(w io.Writer) error { return d.archive(ctx, w) }, consume)
}

// stream gives what archive writes to consume.
func stream(archive func(io.Writer) error, consume func(io.Reader) error) error {
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := archive(w)
		done <- errors.Join(err, w.CloseWithError(err))
	}()
	err := consume(r)
	if err == nil {
		_, err = io.Copy(io.Discard, r) // what follows the archive's end
	}
	_ = r.CloseWithError(errStopped) // lets the archiver go; never fails
	if archiveErr := <-done; err == nil {
		err = archiveErr
	}
	return err
}

var errStopped = errors.New("nobody reads the archive any more")

// archive writes the directory as an archive whose bytes depend on nothing but
// what is in it. It stays on one filesystem, and leaves out devices, sockets
// and pipes.
func (d dirSource) archive(ctx context.Context, w io.Writer) error {
	info, err := os.Stat(d.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return fmt.Errorf("%w: directory %s", errdef.ErrNotFound, d.path)
	}
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return fmt.Errorf("read directory: %w", err)
	}
	a := &archiver{root: root, out: tar.NewWriter(w), links: map[[2]uint64]string{}}
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return a.add(name, e)
	})
	if err == nil {
		err = a.out.Close()
	}
	if err = errors.Join(err, root.Close()); err != nil {
		return fmt.Errorf("read directory %s: %w", d.path, err)
	}
	return nil
}

type archiver struct {
	root   *os.Root
	out    *tar.Writer
	device uint64
	links  map[[2]uint64]string // device and inode of files with more names
}

func (a *archiver) add(name string, e fs.DirEntry) error {
	info, err := e.Info()
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%w: no owner of %s", errdef.ErrUnsupported, name)
	}
	if name == "." {
		a.device = st.Dev
	}
	hdr := &tar.Header{
		Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(info.ModTime().Unix(), 0), Format: tar.FormatPAX,
	}
	switch info.Mode().Type() {
	case fs.ModeDir:
		return a.addDir(hdr, st)
	case fs.ModeSymlink:
		hdr.Typeflag = tar.TypeSymlink
		if hdr.Linkname, err = a.root.Readlink(name); err != nil {
			return err
		}
		return a.out.WriteHeader(hdr)
	case 0:
		return a.addFile(hdr, st)
	default:
		return nil
	}
}

// addDir skips what is mounted in the tree, and keeps the mount point.
func (a *archiver) addDir(hdr *tar.Header, st *syscall.Stat_t) error {
	hdr.Typeflag = tar.TypeDir
	hdr.Name += "/"
	if st.Dev != a.device {
		return errors.Join(a.out.WriteHeader(hdr), fs.SkipDir)
	}
	return a.out.WriteHeader(hdr)
}

func (a *archiver) addFile(hdr *tar.Header, st *syscall.Stat_t) error {
	if st.Nlink > 1 {
		id := [2]uint64{st.Dev, st.Ino}
		if first, ok := a.links[id]; ok {
			hdr.Typeflag, hdr.Linkname = tar.TypeLink, first
			return a.out.WriteHeader(hdr)
		}
		a.links[id] = hdr.Name
	}
	f, err := a.root.OpenFile(hdr.Name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	if hdr.PAXRecords, err = capabilityRecord(f); err != nil {
		return err
	}
	hdr.Typeflag, hdr.Size = tar.TypeReg, st.Size
	if err = a.out.WriteHeader(hdr); err != nil {
		return err
	}
	if _, err = io.CopyN(a.out, f, st.Size); errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %s shrank while it was read", errdef.ErrConflict, hdr.Name)
	}
	return err
}

func capabilityRecord(f *os.File) (map[string]string, error) {
	buf := make([]byte, maxXattr)
	n, err := unix.Fgetxattr(int(f.Fd()), capabilityXattr, buf)
	switch {
	case errors.Is(err, unix.ENODATA), errors.Is(err, unix.ENOTSUP):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read %s of %s: %w", capabilityXattr, path.Base(f.Name()), err)
	}
	return map[string]string{"SCHILY.xattr." + capabilityXattr: string(buf[:n])}, nil
}

// parseKernelSource reads "debian:SUITE" or "dir:PATH"; "" is Debian's.
func parseKernelSource(text string) (kernelSource, error) {
	if text == "" {
		text = "debian:bookworm"
	}
	scheme, rest, _ := strings.Cut(text, ":")
	switch {
	case scheme == "debian" && suiteRE.MatchString(rest) && len(rest) <= 64:
		return debianKernel{suite: rest}, nil
	case scheme == "dir":
		d, err := newDirSource(rest)
		return dirKernel{d}, err
	}
	err := fmt.Errorf("%w: kernel source %.200q", errdef.ErrInvalid, text)
	return nil, errdef.WithHint(err, "use debian:SUITE, or dir:PATH of a directory with vmlinuz and lib/modules")
}
