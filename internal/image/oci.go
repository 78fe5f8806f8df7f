package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/progress"
)

// The bounds on what describes a container image.
const (
	maxLayers    = 512
	maxConfig    = 8 << 20
	maxIndexes   = 4 // one in the other
	maxManifests = 1024
)

// platform is the one that guests have.
func platform() v1.Platform { return v1.Platform{OS: "linux", Architecture: "amd64"} }

// layoutSource is an image in an OCI layout directory.
type layoutSource struct {
	path string
	tag  string // "" where the layout has one image
}

// archiveSource is an image in an archive that "docker save" wrote.
type archiveSource struct {
	path string
	tag  *name.Tag // nil where the archive has one image
}

// registrySource is an image in a registry.
type registrySource struct {
	ref name.Reference
}

func newLayoutSource(text string) (source, error) {
	path, tag := splitTag(text)
	path, err := localPath("oci", path)
	return layoutSource{path: path, tag: tag}, err
}

func newArchiveSource(text string) (source, error) {
	path, tag := splitTag(text)
	path, err := localPath("docker-archive", path)
	if err != nil || tag == "" {
		return archiveSource{path: path}, err
	}
	parsed, err := name.NewTag(tag)
	if err != nil {
		return nil, fmt.Errorf("%w: image source docker-archive: %w", errdef.ErrInvalid, err)
	}
	return archiveSource{path: path, tag: &parsed}, nil
}

func newRegistrySource(text string) (source, error) {
	ref, err := name.ParseReference(text)
	if err != nil {
		return nil, fmt.Errorf("%w: image reference: %w", errdef.ErrInvalid, err)
	}
	return registrySource{ref: ref}, nil
}

// splitTag cuts PATH:TAG, unless all of it is the path of something.
func splitTag(text string) (path, tag string) {
	if _, err := os.Stat(text); err == nil {
		return text, ""
	}
	path, tag, _ = strings.Cut(text, ":")
	return path, tag
}

func (s layoutSource) identity(context.Context) (string, error) {
	img, err := s.image()
	if err != nil {
		return "", err
	}
	digest, err := img.Digest()
	return "oci:" + digest.String(), err
}

func (s layoutSource) unpack(ctx context.Context, t *tree, _ string) (RunConfig, error) {
	img, err := s.image()
	if err != nil {
		return RunConfig{}, err
	}
	return unpackImage(ctx, t, img)
}

func (s layoutSource) image() (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: OCI layout %s", errdef.ErrNotFound, s.path)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: OCI layout %s: %w", errdef.ErrInvalid, s.path, err)
	}
	found, err := s.find(index, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: OCI layout %s: %w", errdef.ErrInvalid, s.path, err)
	}
	if len(found) != 1 {
		err = fmt.Errorf("%w: OCI layout %s: %d images for linux/amd64, want one", errdef.ErrInvalid, s.path, len(found))
		return nil, errdef.WithHint(err, "name one as oci:PATH:TAG")
	}
	return found[0], nil
}

// find returns the images for guests' platform, in nested indexes too.
func (s layoutSource) find(index v1.ImageIndex, depth int) ([]v1.Image, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if depth > maxIndexes || len(manifest.Manifests) > maxManifests {
		return nil, errors.New("too many indexes")
	}
	var found []v1.Image
	for _, desc := range manifest.Manifests {
		if !s.wanted(desc, depth) {
			continue
		}
		images, findErr := s.resolve(index, desc, depth)
		if findErr != nil {
			return nil, findErr
		}
		found = append(found, images...)
	}
	return found, nil
}

func (s layoutSource) wanted(desc v1.Descriptor, depth int) bool {
	if depth == 0 && s.tag != "" && desc.Annotations["org.opencontainers.image.ref.name"] != s.tag {
		return false
	}
	return desc.Platform == nil || desc.Platform.Satisfies(platform())
}

func (s layoutSource) resolve(index v1.ImageIndex, desc v1.Descriptor, depth int) ([]v1.Image, error) {
	switch {
	case desc.MediaType.IsIndex():
		inner, err := index.ImageIndex(desc.Digest)
		if err != nil {
			return nil, err
		}
		return s.find(inner, depth+1)
	case desc.MediaType.IsImage():
		img, err := index.Image(desc.Digest)
		if err != nil {
			return nil, err
		}
		return []v1.Image{img}, checkDigest(img, desc.Digest)
	default:
		return nil, nil
	}
}

// checkDigest makes sure that the manifest is the one that was asked for.
func checkDigest(img v1.Image, want v1.Hash) error {
	got, err := img.Digest()
	if err == nil && got != want {
		err = fmt.Errorf("manifest %s has digest %s", want, got)
	}
	return err
}

func (s archiveSource) identity(ctx context.Context) (string, error) {
	progress.Report(ctx, step, "reading "+s.path)
	b, err := hashFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: image archive %s", errdef.ErrNotFound, s.path)
	}
	if err != nil {
		return "", fmt.Errorf("read image archive: %w", err)
	}
	tag := ""
	if s.tag != nil {
		tag = s.tag.Name()
	}
	return "docker-archive:" + b.Digest + ":" + tag, nil
}

func (s archiveSource) unpack(ctx context.Context, t *tree, _ string) (RunConfig, error) {
	if err := s.check(t.limits); err != nil {
		return RunConfig{}, fmt.Errorf("image archive %s: %w", s.path, err)
	}
	img, err := tarball.ImageFromPath(s.path, s.tag)
	if err != nil {
		return RunConfig{}, fmt.Errorf("%w: image archive %s: %w", errdef.ErrInvalid, s.path, err)
	}
	return unpackImage(ctx, t, img)
}

// check bounds what the library reads of the archive as a whole.
func (s archiveSource) check(limits Limits) error {
	f, err := os.Open(s.path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	archive := tar.NewReader(f)
	for range limits.Entries {
		hdr, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
		}
		if hdr.Size > maxConfig && strings.HasSuffix(hdr.Name, ".json") {
			return fmt.Errorf("%w: %.200q has %d bytes", errdef.ErrExhausted, hdr.Name, hdr.Size)
		}
	}
	return fmt.Errorf("%w: more than %d entries", errdef.ErrExhausted, limits.Entries)
}

// identity does not ask the registry what is new there: that is for Refresh.
func (s registrySource) identity(context.Context) (string, error) {
	return "docker:" + s.ref.Name(), nil
}

func (s registrySource) unpack(ctx context.Context, t *tree, _ string) (RunConfig, error) {
	progress.Report(ctx, step, "pulling "+s.ref.Name())
	img, err := remote.Image(s.ref, remote.WithContext(ctx), remote.WithPlatform(platform()),
		remote.WithAuthFromKeychain(authn.DefaultKeychain))
	if err != nil {
		return RunConfig{}, fmt.Errorf("%w: pull %s: %w", pullCategory(err), s.ref.Name(), err)
	}
	return unpackImage(ctx, t, img)
}

func pullCategory(err error) error {
	var refused *transport.Error
	if !errors.As(err, &refused) {
		return errdef.ErrUnavailable
	}
	switch refused.StatusCode {
	case 404:
		return errdef.ErrNotFound
	case 401, 403:
		return errdef.ErrDenied
	default:
		return errdef.ErrUnavailable
	}
}

// unpackImage unpacks the layers, lowest first, each checked against the
// digest that the image's configuration has of it.
func unpackImage(ctx context.Context, t *tree, img v1.Image) (RunConfig, error) {
	config, err := imageConfig(img)
	if err != nil {
		return RunConfig{}, fmt.Errorf("read image configuration: %w", err)
	}
	layers, err := img.Layers()
	if err != nil {
		return RunConfig{}, fmt.Errorf("%w: read image layers: %w", errdef.ErrInvalid, err)
	}
	if len(layers) != len(config.RootFS.DiffIDs) || len(layers) > maxLayers {
		return RunConfig{}, fmt.Errorf("%w: image has %d layers and configuration for %d: at most %d",
			errdef.ErrInvalid, len(layers), len(config.RootFS.DiffIDs), maxLayers)
	}
	for i, layer := range layers {
		progress.ReportAmount(ctx, step, "unpacking layers", int64(i), int64(len(layers)))
		if err = unpackLayer(ctx, t, layer, config.RootFS.DiffIDs[i]); err != nil {
			return RunConfig{}, fmt.Errorf("unpack layer %d of %d: %w", i+1, len(layers), err)
		}
	}
	return runConfig(config.Config), nil
}

// imageConfig reads the image's configuration and checks it against the
// manifest's digest of it.
func imageConfig(img v1.Image) (*v1.ConfigFile, error) {
	manifest, err := img.Manifest()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if manifest.Config.Size > maxConfig {
		return nil, fmt.Errorf("%w: %d bytes: at most %d", errdef.ErrExhausted, manifest.Config.Size, maxConfig)
	}
	raw, err := img.RawConfigFile()
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if got := digestOf(raw); got != manifest.Config.Digest.String() {
		return nil, fmt.Errorf("%w: it has digest %s, not %s", errdef.ErrInvalid, got, manifest.Config.Digest)
	}
	config, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if got := config.Platform(); got != nil && !got.Satisfies(platform()) {
		return nil, fmt.Errorf("%w: image is for %s, guests are linux/amd64", errdef.ErrUnsupported, got)
	}
	return config, nil
}

func unpackLayer(ctx context.Context, t *tree, layer v1.Layer, want v1.Hash) error {
	r, err := layer.Uncompressed()
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }() // only read, and all of it below
	h := sha256.New()
	most := t.limits.Bytes + int64(t.limits.Entries)*sector*8
	hashed := io.TeeReader(io.LimitReader(r, most), h)
	if err = t.unpack(ctx, hashed, unpackOptions{whiteouts: true}); err != nil {
		return err
	}
	if _, err = io.Copy(io.Discard, hashed); err != nil { // what follows the archive's end
		return err
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != want.String() {
		return fmt.Errorf("%w: content has digest %s, not %s", errdef.ErrInvalid, got, want)
	}
	return nil
}

func runConfig(c v1.Config) RunConfig {
	env := c.Env
	if !slices.ContainsFunc(env, func(v string) bool { return strings.HasPrefix(v, "PATH=") }) {
		env = append([]string{defaultPath}, env...)
	}
	return RunConfig{Env: env, User: c.User, WorkDir: c.WorkingDir, Entrypoint: c.Entrypoint, Cmd: c.Cmd}
}
