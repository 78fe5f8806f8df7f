package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// kernelSource is where a kernel and its modules come from.
type kernelSource interface {
	// identity is everything that determines the kernel, as far as it can be
	// known without fetching it.
	identity(ctx context.Context) (string, error)
	// archive gives consume an archive that has the kernel and the modules
	// where a root filesystem has them.
	archive(ctx context.Context, scratch string, consume func(context.Context, io.Reader) error) error
}

// debianKernel is Debian's kernel for virtual machines.
type debianKernel struct{ suite string }

func (d debianKernel) identity(context.Context) (string, error) { return "debian:" + d.suite, nil }

func (d debianKernel) archive(ctx context.Context, scratch string, consume func(context.Context, io.Reader) error) error {
	args := []string{"--variant=extract", "--include=linux-image-cloud-amd64"}
	return mmdebstrap(ctx, scratch, "kernel", args, d.suite, consume)
}

// dirKernel is a kernel in a directory of this host.
type dirKernel struct{ dirSource }

func (d dirKernel) archive(ctx context.Context, _ string, consume func(context.Context, io.Reader) error) error {
	return d.stream(ctx, func(r io.Reader) error { return consume(ctx, r) })
}

// kernelArtifact is an unpacked kernel and the modules that guests need.
type kernelArtifact struct {
	Version string `json:"version"`
	Kernel  Blob   `json:"kernel"`
	// Modules is a cpio archive without end mark, to be put in an initramfs.
	Modules Blob `json:"modules"`
}

func (a kernelArtifact) blobs() []Blob { return []Blob{a.Kernel, a.Modules} }

// kernel returns the kernel of a source.
func (s *Store) kernel(ctx context.Context, src kernelSource, refresh bool) (kernelArtifact, bool, error) {
	id, err := src.identity(ctx)
	if err != nil {
		return kernelArtifact{}, false, err
	}
	key, err := cacheKey("kernel", id, moduleNeeds(s.modules))
	if err != nil {
		return kernelArtifact{}, false, err
	}
	return cached(ctx, s, kernelDir, key, refresh, func(ctx context.Context, scratch string) (kernelArtifact, error) {
		art, err := s.buildKernel(ctx, src, scratch)
		if err != nil {
			return kernelArtifact{}, err
		}
		return art, unchanged(ctx, src.identity, id)
	})
}

func (s *Store) buildKernel(ctx context.Context, src kernelSource, scratch string) (art kernelArtifact, err error) {
	progress.Report(ctx, step, "fetching the kernel")
	files, err := newBundle(filepath.Join(scratch, "kernel-files"), s.limits)
	if err != nil {
		return kernelArtifact{}, err
	}
	defer func() { err = errors.Join(err, files.close()) }()
	if err = src.archive(ctx, scratch, files.collect); err != nil {
		return kernelArtifact{}, err
	}
	progress.Report(ctx, step, "unpacking the kernel")
	name, err := files.kernel()
	if err != nil {
		return kernelArtifact{}, err
	}
	packed, err := files.read(name, maxKernel)
	if err != nil {
		return kernelArtifact{}, err
	}
	elf, err := unpackKernel(packed)
	if err != nil {
		return kernelArtifact{}, fmt.Errorf("unpack kernel %s: %w", name, err)
	}
	version, err := files.version(name)
	if err != nil {
		return kernelArtifact{}, err
	}
	set, err := loadModules(files, s.modules)
	if err != nil {
		return kernelArtifact{}, fmt.Errorf("read modules of kernel %s: %w", version, err)
	}
	art.Version = version
	art.Kernel, err = s.putBlob(scratch, func(w io.Writer) error {
		_, writeErr := w.Write(elf)
		return writeErr
	})
	if err != nil {
		return kernelArtifact{}, err
	}
	art.Modules, err = s.putBlob(scratch, set.writeCPIO)
	return art, err
}

// bundle is the few files of a kernel archive that are of use, in one file.
type bundle struct {
	file   *os.File
	size   int64
	limits Limits
	spans  map[string]span // by name in the archive
}

type span struct{ offset, size int64 }

func newBundle(path string, limits Limits) (*bundle, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("collect kernel files: %w", err)
	}
	return &bundle{file: f, limits: limits, spans: map[string]span{}}, nil
}

func (b *bundle) close() error { return b.file.Close() }

// collect takes the useful files out of an archive.
func (b *bundle) collect(ctx context.Context, r io.Reader) error {
	archive := tar.NewReader(r)
	for entries := 0; ; entries++ {
		hdr, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read kernel archive: %w", err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if entries >= b.limits.Entries {
			return fmt.Errorf("%w: kernel archive: more than %d entries", errdef.ErrExhausted, b.limits.Entries)
		}
		name := path.Clean("./" + hdr.Name)
		if hdr.Typeflag != tar.TypeReg || !isKernel(name) && !isModuleFile(name) {
			continue
		}
		if err = b.add(name, hdr.Size, archive); err != nil {
			return fmt.Errorf("collect kernel file %s: %w", name, err)
		}
	}
}

func (b *bundle) add(name string, size int64, r io.Reader) error {
	if size > b.limits.Bytes-b.size {
		return fmt.Errorf("%w: more than %d bytes", errdef.ErrExhausted, b.limits.Bytes)
	}
	if _, err := io.CopyN(b.file, r, size); err != nil {
		return err
	}
	b.spans[name] = span{offset: b.size, size: size}
	b.size += size
	return nil
}

// read returns the content of a file, which must not have more than most bytes.
func (b *bundle) read(name string, most int64) ([]byte, error) {
	sp := b.spans[name]
	if sp.size > most {
		return nil, fmt.Errorf("%w: %s: more than %d bytes", errdef.ErrExhausted, name, most)
	}
	data := make([]byte, sp.size)
	if _, err := b.file.ReadAt(data, sp.offset); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}

// names returns the collected names that match, in order.
func (b *bundle) names(match func(string) bool) []string {
	var found []string
	for name := range b.spans {
		if match(name) {
			found = append(found, name)
		}
	}
	slices.Sort(found)
	return found
}

// isKernel says whether name is where kernels are kept.
func isKernel(name string) bool {
	base, dir := path.Base(name), path.Dir(name)
	if !strings.HasPrefix(base, "vmlinuz") && !strings.HasPrefix(base, "vmlinux") {
		return false
	}
	return dir == "." || dir == "boot" || moduleTree(name) == dir
}

// isModuleFile says whether name is a module or the list of built-in ones.
func isModuleFile(name string) bool {
	dir := moduleTree(name)
	return dir != "" && (name == dir+"/modules.builtin" || moduleName(name) != "")
}

// moduleTree is the directory of one kernel's modules that name is in, or "".
func moduleTree(name string) string {
	parts := strings.Split(strings.TrimPrefix(name, "usr/"), "/")
	if len(parts) < 4 || parts[0] != "lib" || parts[1] != "modules" {
		return ""
	}
	prefix := name[:len(name)-len(strings.Join(parts, "/"))]
	return prefix + path.Join(parts[:3]...)
}

// kernel is the name of the one kernel in the bundle.
func (b *bundle) kernel() (string, error) {
	found := b.names(isKernel)
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%w: kernel source has no vmlinuz", errdef.ErrNotFound)
	case 1:
		return found[0], nil
	default:
		return "", fmt.Errorf("%w: kernel source has %d kernels: %s", errdef.ErrInvalid, len(found), strings.Join(found, ", "))
	}
}

// version is the kernel's release: the name of its tree of modules, or what
// its own name says.
func (b *bundle) version(kernel string) (string, error) {
	var trees []string
	for name := range b.spans {
		if dir := moduleTree(name); dir != "" && !slices.Contains(trees, dir) {
			trees = append(trees, dir)
		}
	}
	switch len(trees) {
	case 0:
		_, version, _ := strings.Cut(path.Base(kernel), "-")
		return version, nil
	case 1:
		return path.Base(trees[0]), nil
	default:
		slices.Sort(trees)
		return "", fmt.Errorf("%w: kernel source has modules of %d kernels: %s", errdef.ErrInvalid, len(trees), strings.Join(trees, ", "))
	}
}
