package image

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/tinevm/tine/internal/errdef"
)

// container makes a container image for an architecture, of layers that
// overwrite and remove.
func container(t *testing.T, arch string) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		OS: "linux", Architecture: arch,
		Config: v1.Config{Env: []string{"A=1"}, User: "app", WorkingDir: "/srv", Entrypoint: []string{"/e"}, Cmd: []string{"c"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, entries := range [][]entry{
		{file("etc/base", "base"), file("etc/gone", "x"), symlink("lib", "usr/lib"), file("usr/lib/one", "1")},
		{file("etc/.wh.gone", ""), file("lib/two", "2"), hardlink("etc/copy", "etc/base")},
	} {
		archive := tarOf(t, entries...)
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// containerTree is what container's layers come to.
var containerTree = []string{
	"etc/", "etc/base = base", "etc/copy = base", "lib -> usr/lib",
	"usr/", "usr/lib/", "usr/lib/one = 1", "usr/lib/two = 2",
}

func writeLayout(t *testing.T, images ...v1.Image) string {
	t.Helper()
	dir := t.TempDir()
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for i, img := range images {
		tag := map[string]string{"org.opencontainers.image.ref.name": []string{"one", "two"}[i]}
		if err = path.AppendImage(img, layout.WithAnnotations(tag)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func writeArchive(t *testing.T, img v1.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	tag, err := name.NewTag("example/app:1")
	if err != nil {
		t.Fatal(err)
	}
	if err = tarball.WriteToFile(path, tag, img); err != nil {
		t.Fatal(err)
	}
	return path
}

func pushImage(t *testing.T, img v1.Image) string {
	t.Helper()
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	ref, err := name.ParseReference(strings.TrimPrefix(server.URL, "http://") + "/example/app:1")
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
		mutate.IndexAddendum{Add: container(t, "arm64"), Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "arm64"}}},
	)
	if err = remote.WriteIndex(ref, index, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return ref.Name()
}

// unpackSource runs a source and returns the tree's listing.
func unpackSource(t *testing.T, text string, limits Limits) ([]string, RunConfig, error) {
	t.Helper()
	src, err := parseSource(text, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	tr := openTree(t, limits)
	config, err := src.unpack(t.Context(), tr, t.TempDir())
	return listing(t, tr.dir), config, err
}

func TestContainerSources(t *testing.T) {
	t.Parallel()
	img := container(t, "amd64")
	archive := writeArchive(t, img)
	several := writeLayout(t, img, container(t, "arm64"))
	for name, text := range map[string]string{
		"layout":      "oci:" + writeLayout(t, img),
		"layout_tag":  "oci:" + several + ":one",
		"archive":     "docker-archive:" + archive,
		"archive_tag": "docker-archive:" + archive + ":example/app:1",
		"registry":    "docker:" + pushImage(t, img),
		"bare":        pushImage(t, img),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, config, err := unpackSource(t, text, anyLimits())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(containerTree, got); diff != "" {
				t.Error(diff)
			}
			want := RunConfig{Env: []string{defaultPath, "A=1"}, User: "app", WorkDir: "/srv", Entrypoint: []string{"/e"}, Cmd: []string{"c"}}
			if diff := cmp.Diff(want, config); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestContainerSourcesRefuse(t *testing.T) {
	t.Parallel()
	img := container(t, "amd64")
	big, err := random.Image(100<<10, 20)
	if err != nil {
		t.Fatal(err)
	}
	big, err = mutate.ConfigFile(big, withPlatform(t, big))
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		source string
		want   error
	}{
		"no_layout":        {"oci:/nowhere", errdef.ErrNotFound},
		"no_archive":       {"docker-archive:/nowhere", errNotExist},
		"two_in_layout":    {"oci:" + writeLayout(t, img, big), errdef.ErrInvalid},
		"no_such_tag":      {"oci:" + writeLayout(t, img) + ":three", errdef.ErrInvalid},
		"other_platform":   {"oci:" + writeLayout(t, container(t, "arm64")), errdef.ErrUnsupported},
		"too_big":          {"oci:" + writeLayout(t, big), errdef.ErrExhausted},
		"changed_layer":    {"oci:" + spoil(t, writeLayout(t, img), func(m *v1.Manifest) v1.Hash { return m.Layers[0].Digest }), errAny},
		"changed_config":   {"oci:" + spoil(t, writeLayout(t, img), func(m *v1.Manifest) v1.Hash { return m.Config.Digest }), errdef.ErrInvalid},
		"archive_is_text":  {"docker-archive:" + textFile(t), errdef.ErrInvalid},
		"big_json":         {"docker-archive:" + bigJSON(t), errdef.ErrExhausted},
		"not_in_registry":  {"docker:" + strings.Replace(pushImage(t, img), "app", "other", 1), errdef.ErrNotFound},
		"registry_is_gone": {"docker:127.0.0.1:1/x", errdef.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, _, err := unpackSource(t, tc.source, anyLimits())
			if err == nil || !errors.Is(tc.want, errAny) && !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

var (
	errAny      = errors.New("any error")
	errNotExist = os.ErrNotExist
)

func withPlatform(t *testing.T, img v1.Image) *v1.ConfigFile {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	return config
}

// spoil changes one blob of a layout, chosen from its manifest.
func spoil(t *testing.T, dir string, choose func(*v1.Manifest) v1.Hash) string {
	t.Helper()
	src := layoutSource{path: dir}
	img, err := src.image()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := img.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "blobs/sha256", choose(manifest).Hex)
	data := []byte(readFile(t, path))
	data[len(data)/2] ^= 1
	if err = os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func textFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "text")
	writeFile(t, path, strings.Repeat("not an archive ", 100))
	return path
}

func bigJSON(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "big.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(f)
	if err = w.WriteHeader(&tar.Header{Name: "manifest.json", Size: 1 << 40, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	if err = f.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLayerDigestIsChecked(t *testing.T) {
	t.Parallel()
	layers, err := container(t, "amd64").Layers()
	if err != nil {
		t.Fatal(err)
	}
	other, err := layers[1].DiffID()
	if err != nil {
		t.Fatal(err)
	}
	if err = unpackLayer(t.Context(), openTree(t, anyLimits()), layers[0], other); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("got %v, want %v", err, errdef.ErrInvalid)
	}
}
