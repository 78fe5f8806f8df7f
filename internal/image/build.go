package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// step is the progress step that builds report under.
const step = "image"

// The bounds on the lists of a request.
const (
	maxWarmup  = 64
	maxImports = 256
	maxText    = 4096
)

// BuildRequest says what image to build.
type BuildRequest struct {
	// Name is the name that the image gets; an image that has it loses it.
	Name string
	// Source says where the root tree comes from: "debian:SUITE+PKG+PKG",
	// "dir:PATH", "ext4:PATH", "oci:PATH", "docker-archive:PATH" or "docker:REF".
	Source string
	// Kernel says where the kernel comes from: "debian:SUITE", or "dir:PATH"
	// with vmlinuz (or vmlinux) and lib/modules. Empty: Debian's.
	Kernel string
	// Warmup are shell commands to run in the guest before it is frozen.
	Warmup []string
	// Imports are modules for the warm interpreter to load.
	Imports []string
	// Refresh builds anew what the cache has.
	Refresh bool
}

// Validate reports what is wrong with the request.
func (r BuildRequest) Validate() error {
	if err := checkName(r.Name); err != nil {
		return err
	}
	if err := checkList("warm-up commands", r.Warmup, maxWarmup); err != nil {
		return err
	}
	return checkList("imports", r.Imports, maxImports)
}

func checkList(what string, list []string, most int) error {
	if len(list) > most {
		return fmt.Errorf("%w: %d %s: at most %d", errdef.ErrInvalid, len(list), what, most)
	}
	for _, text := range list {
		if text == "" || len(text) > maxText {
			return fmt.Errorf("%w: %s: want 1 to %d bytes each", errdef.ErrInvalid, what, maxText)
		}
	}
	return nil
}

// Build makes the image that the request describes and gives it its name. It
// says whether all of it was there already. It reports progress.
func (s *Store) Build(ctx context.Context, req BuildRequest) (img Image, hit bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("build image %s: %w", req.Name, err)
		}
	}()
	if err = req.Validate(); err != nil {
		return Image{}, false, err
	}
	src, err := parseSource(req.Source, s.limits)
	if err != nil {
		return Image{}, false, err
	}
	kernelSrc, err := parseKernelSource(req.Kernel)
	if err != nil {
		return Image{}, false, err
	}
	lock, err := s.lockShared(ctx)
	if err != nil {
		return Image{}, false, err
	}
	defer func() { err = errors.Join(err, durable.Unlock(lock)) }()

	var (
		root             rootArtifact
		boot             kernelArtifact
		rootHit, bootHit bool
		group, groupCtx  = errgroup.WithContext(ctx)
	)
	group.Go(func() (err error) {
		root, rootHit, err = s.root(groupCtx, src, req.Refresh)
		return err
	})
	group.Go(func() (err error) {
		boot, bootHit, err = s.kernel(groupCtx, kernelSrc, req.Refresh)
		return err
	})
	if err = group.Wait(); err != nil {
		return Image{}, false, err
	}
	initrd, err := s.initrd(ctx, boot)
	if err != nil {
		return Image{}, false, err
	}
	img, fresh, err := s.commit(req.Name, Manifest{
		Version: manifestVersion, Source: req.Source,
		Root: root.Root, Kernel: boot.Kernel, Initrd: initrd, KernelVersion: boot.Version,
		Config: root.Config, Interpreters: root.Interpreters,
		Warmup: req.Warmup, Imports: req.Imports,
	})
	return img, rootHit && bootHit && !fresh, err
}

// commit stores the manifest when it is new, and names it.
func (s *Store) commit(name string, m Manifest) (img Image, fresh bool, err error) {
	data, err := json.Marshal(m)
	if err != nil {
		return Image{}, false, fmt.Errorf("encode manifest: %w", err)
	}
	if len(data) > maxManifest {
		return Image{}, false, fmt.Errorf("%w: manifest of %d bytes: at most %d", errdef.ErrInvalid, len(data), maxManifest)
	}
	digest := digestOf(data)
	path, err := s.manifestPath(digest)
	if err != nil {
		return Image{}, false, err
	}
	if _, err = os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		fresh = true
		err = durable.WriteFile(path, data, 0o600)
	}
	if err != nil {
		return Image{}, false, fmt.Errorf("store manifest: %w", err)
	}
	if err = s.setName(name, digest); err != nil {
		return Image{}, false, err
	}
	img, err = s.byDigest(digest)
	img.Name = name
	return img, fresh, err
}

func (s *Store) setName(name, digest string) error {
	path, err := s.namePath(name)
	if err != nil {
		return err
	}
	if now, readErr := s.digestOfName(name); readErr == nil && now == digest {
		return nil
	}
	return durable.WriteFile(path, []byte(digest+"\n"), 0o600)
}

// rootArtifact is a built root filesystem.
type rootArtifact struct {
	Root         Blob          `json:"root"`
	Config       RunConfig     `json:"config"`
	Interpreters []Interpreter `json:"interpreters,omitempty"`
}

func (a rootArtifact) blobs() []Blob { return []Blob{a.Root} }

// root returns the root filesystem of a source.
func (s *Store) root(ctx context.Context, src source, refresh bool) (rootArtifact, bool, error) {
	id, err := src.identity(ctx)
	if err != nil {
		return rootArtifact{}, false, err
	}
	key, err := cacheKey("root", id, privileged())
	if err != nil {
		return rootArtifact{}, false, err
	}
	return cached(ctx, s, rootDir, key, refresh, func(ctx context.Context, scratch string) (rootArtifact, error) {
		art, err := s.buildRoot(ctx, src, scratch)
		if err != nil {
			return rootArtifact{}, err
		}
		return art, unchanged(ctx, src.identity, id)
	})
}

// unchanged makes sure that what was read is what the cache will say it was.
func unchanged(ctx context.Context, identity func(context.Context) (string, error), id string) error {
	now, err := identity(ctx)
	if err == nil && now != id {
		err = fmt.Errorf("%w: the source changed while it was read", errdef.ErrConflict)
	}
	return err
}

func (s *Store) buildRoot(ctx context.Context, src source, scratch string) (art rootArtifact, err error) {
	t, err := newTree(scratch, s.limits)
	if err != nil {
		return rootArtifact{}, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	config, err := src.unpack(ctx, t, scratch)
	if err != nil {
		return rootArtifact{}, err
	}
	if err = t.finish(config); err != nil {
		return rootArtifact{}, err
	}
	progress.Report(ctx, step, "writing the root filesystem")
	file, err := makeEROFS(ctx, t.dir, scratch)
	if err != nil {
		return rootArtifact{}, err
	}
	blob, err := s.adoptBlob(file)
	return rootArtifact{Root: blob, Config: config, Interpreters: t.interpreters()}, err
}
