// Package image builds and keeps guest images: an immutable root filesystem, a
// kernel and an initramfs, named by the digest of the manifest that lists them.
//
// A manifest and the blobs it names never change once they are stored, and
// nothing is stored under its name before it is complete and on disk. Any
// number of processes may use one store at once: a lock per artifact lets one
// of them build it while the others wait for the result.
//
// It knows nothing of machines or snapshots. docs/formats/image.md describes
// what it writes.
package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/errdef"
)

// manifestVersion is the version of the manifest and of the way its blobs are
// made. It is part of every cache key.
const manifestVersion = 1

// maxManifest bounds what is read of a manifest or cache file.
const maxManifest = 1 << 20

// Config is what a store needs.
type Config struct {
	// Dir is the store's directory. It is created when it is missing.
	Dir string
	// Agent is the path of the static guest agent that becomes /init.
	Agent string
	// Modules names modules that the kernel must have and that initramfs's get
	// beside those that every guest needs. The file modules/order.d/more of the
	// initramfs has the order to load them in.
	Modules []string
	// Logger receives what is not worth an error; nil discards it.
	Logger *slog.Logger
	// Limits bound what one source may unpack; zero fields mean the defaults.
	Limits Limits
}

// Limits bound the root tree that a source may bring in.
type Limits struct {
	// Bytes is the sum of all file contents, before holes and links.
	Bytes int64
	// Entries is the number of archive entries, over all layers.
	Entries int
}

const (
	defaultMaxBytes   = 16 << 30
	defaultMaxEntries = 1 << 20
)

// Validate reports what is wrong with the configuration.
func (c Config) Validate() error {
	if c.Dir == "" {
		return fmt.Errorf("%w: image store: no directory", errdef.ErrInvalid)
	}
	if c.Limits.Bytes < 0 || c.Limits.Entries < 0 {
		return fmt.Errorf("%w: image store: negative limit", errdef.ErrInvalid)
	}
	return nil
}

// Store keeps images in one directory. It is safe for concurrent use, by
// several processes too.
type Store struct {
	dir     string
	agent   string
	modules []string
	log     *slog.Logger
	limits  Limits
}

// Image is one stored image.
type Image struct {
	// Name is the name it was found by, or "" when that was a digest.
	Name string `json:"name,omitempty"`
	// Digest is "sha256:" and the hex SHA-256 of the manifest's bytes.
	Digest string `json:"digest"`
	// Manifest says what the image consists of.
	Manifest Manifest `json:"manifest"`
	// CreatedAt is when the manifest was first stored here.
	CreatedAt time.Time `json:"created_at"`

	store *Store
}

// Manifest lists an image's parts. Its JSON has no times in it, so equal parts
// make equal digests.
type Manifest struct {
	Version       int           `json:"version"`
	Source        string        `json:"source"`
	Root          Blob          `json:"root"`
	Kernel        Blob          `json:"kernel"`
	Initrd        Blob          `json:"initrd"`
	KernelVersion string        `json:"kernel_version"`
	Config        RunConfig     `json:"config"`
	Warmup        []string      `json:"warmup,omitempty"`
	Imports       []string      `json:"imports,omitempty"`
	Interpreters  []Interpreter `json:"interpreters,omitempty"`
}

// Blob is a file named by its content.
type Blob struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// RunConfig says how the image wants its programs run.
type RunConfig struct {
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkDir    string   `json:"workdir,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
}

// Interpreter is a language runtime that was found in the root tree and that
// the agent can keep warm.
type Interpreter struct {
	Name string   `json:"name"`
	Argv []string `json:"argv"`
}

// The directories of a store.
const (
	blobDir     = "blobs/sha256"
	manifestDir = "manifests"
	nameDir     = "names"
	rootDir     = "roots"
	kernelDir   = "kernels"
	lockDir     = "locks"
	stagingDir  = "staging"
)

// Open opens the store in c.Dir, creating it when it is missing, and removes
// what builds that died have left there.
func Open(c Config) (*Store, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("open image store %s: %w", c.Dir, err)
	}
	s := &Store{dir: dir, agent: c.Agent, modules: c.Modules, log: c.Logger, limits: c.Limits}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.limits.Bytes == 0 {
		s.limits.Bytes = defaultMaxBytes
	}
	if s.limits.Entries == 0 {
		s.limits.Entries = defaultMaxEntries
	}
	for _, d := range []string{blobDir, manifestDir, nameDir, rootDir, kernelDir, lockDir, stagingDir} {
		if err = os.MkdirAll(s.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("open image store: %w", err)
		}
	}
	if err = s.removeLeftovers(); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	return s, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir}, elem...)...)
}

// RootPath is the file of the root filesystem.
func (i Image) RootPath() string { return i.store.blobPath(i.Manifest.Root) }

// KernelPath is the file of the uncompressed kernel.
func (i Image) KernelPath() string { return i.store.blobPath(i.Manifest.Kernel) }

// InitrdPath is the file of the initramfs.
func (i Image) InitrdPath() string { return i.store.blobPath(i.Manifest.Initrd) }

// SizeBytes is the sum of the sizes of the image's files, which other images
// may share.
func (i Image) SizeBytes() int64 {
	return i.Manifest.Root.Size + i.Manifest.Kernel.Size + i.Manifest.Initrd.Size
}

var (
	nameRE   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,63}$`)
	digestRE = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)
	prefixRE = regexp.MustCompile(`^[0-9a-f]{8,64}$`)
)

// checkName says whether name may be part of a path.
func checkName(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%w: image name %q: want a letter, digit or _ and then up to 63 of letters, digits, '.', '_', '-'", errdef.ErrInvalid, name)
	}
	return nil
}

// hexOf returns the hex part of a valid digest.
func hexOf(digest string) (string, error) {
	if !digestRE.MatchString(digest) {
		return "", fmt.Errorf("%w: digest %q", errdef.ErrInvalid, digest)
	}
	return strings.TrimPrefix(digest, "sha256:"), nil
}

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// blobPath is where b is kept. A manifest is checked when it is read, so its
// digests are valid here.
func (s *Store) blobPath(b Blob) string {
	return s.path(blobDir, strings.TrimPrefix(b.Digest, "sha256:"))
}

func (s *Store) manifestPath(digest string) (string, error) {
	hexed, err := hexOf(digest)
	if err != nil {
		return "", err
	}
	return s.path(manifestDir, hexed+".json"), nil
}

func (s *Store) namePath(name string) (string, error) {
	if err := checkName(name); err != nil {
		return "", err
	}
	return s.path(nameDir, name), nil
}

// Get finds an image by its name, its digest, or the first eight or more hex
// digits of its digest.
func (s *Store) Get(ref string) (Image, error) {
	if strings.HasPrefix(ref, "sha256:") {
		return s.byDigest(ref)
	}
	digest, err := s.digestOfName(ref)
	if err == nil {
		img, loadErr := s.byDigest(digest)
		img.Name = ref
		return img, loadErr
	}
	if errors.Is(err, errdef.ErrNotFound) && prefixRE.MatchString(ref) {
		return s.byPrefix(ref)
	}
	return Image{}, err
}

func (s *Store) digestOfName(name string) (string, error) {
	path, err := s.namePath(name)
	if err != nil {
		return "", err
	}
	data, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%w: image %s", errdef.ErrNotFound, name)
	}
	if err != nil {
		return "", fmt.Errorf("read image name %s: %w", name, err)
	}
	digest := strings.TrimSpace(string(data))
	if !digestRE.MatchString(digest) { // what it named must not pass for unused
		err = fmt.Errorf("%w: image %s is damaged: its name leads nowhere", errdef.ErrUnavailable, name)
		return "", errdef.WithHint(err, "remove it with tine image rm "+name+", and build it again")
	}
	return digest, nil
}

func (s *Store) byPrefix(prefix string) (Image, error) {
	found, err := filepath.Glob(s.path(manifestDir, prefix+"*.json"))
	if err != nil {
		return Image{}, fmt.Errorf("find image %s: %w", prefix, err)
	}
	switch len(found) {
	case 0:
		return Image{}, fmt.Errorf("%w: image %s", errdef.ErrNotFound, prefix)
	case 1:
		return s.byDigest("sha256:" + strings.TrimSuffix(filepath.Base(found[0]), ".json"))
	default:
		return Image{}, fmt.Errorf("%w: image %s: %d digests begin so", errdef.ErrInvalid, prefix, len(found))
	}
}

// byDigest loads a manifest and checks it against its digest.
func (s *Store) byDigest(digest string) (Image, error) {
	path, err := s.manifestPath(digest)
	if err != nil {
		return Image{}, err
	}
	data, err := readSmall(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, fmt.Errorf("%w: image %s", errdef.ErrNotFound, digest)
	}
	if err != nil {
		return Image{}, fmt.Errorf("read image %s: %w", digest, err)
	}
	if got := digestOf(data); got != digest {
		return Image{}, fmt.Errorf("read image %s: content has digest %s", digest, got)
	}
	m, err := decodeManifest(data)
	if err != nil {
		return Image{}, fmt.Errorf("read image %s: %w", digest, err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return Image{}, fmt.Errorf("read image %s: %w", digest, err)
	}
	return Image{Digest: digest, Manifest: m, CreatedAt: info.ModTime(), store: s}, nil
}

func decodeManifest(data []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return Manifest{}, fmt.Errorf("decode manifest: %w", err)
	}
	if m.Version != manifestVersion {
		return Manifest{}, fmt.Errorf("%w: manifest version %d", errdef.ErrUnsupported, m.Version)
	}
	for _, b := range m.blobs() {
		if _, err := hexOf(b.Digest); err != nil {
			return Manifest{}, fmt.Errorf("decode manifest: %w", err)
		}
	}
	return m, nil
}

func (m Manifest) blobs() []Blob { return []Blob{m.Root, m.Kernel, m.Initrd} }

// List returns the named images, by name.
func (s *Store) List() ([]Image, error) {
	entries, err := os.ReadDir(s.path(nameDir))
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var images []Image
	for _, e := range entries {
		if checkName(e.Name()) != nil {
			continue // a writer's temporary file
		}
		img, getErr := s.Get(e.Name())
		if errors.Is(getErr, errdef.ErrNotFound) {
			continue // removed since ReadDir
		}
		if getErr != nil { // Get says so to whoever wants this one; the others are there
			s.log.Warn("image left out of the list: it is damaged", "image", e.Name(), "error", getErr)
			continue
		}
		images = append(images, img)
	}
	return images, nil
}

// Remove takes the name from its image. The image itself stays until GC.
func (s *Store) Remove(name string) error {
	path, err := s.namePath(name)
	if err != nil {
		return err
	}
	err = os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: image %s", errdef.ErrNotFound, name)
	}
	if err != nil {
		return fmt.Errorf("remove image %s: %w", name, err)
	}
	return durable.SyncDir(filepath.Dir(path))
}

// readSmall reads a file of the store, of bounded size.
func readSmall(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxManifest {
		return nil, fmt.Errorf("%s is too big: %d bytes", path, info.Size())
	}
	return os.ReadFile(path)
}
