package snapshot

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// Version is the version of the manifests and tags that this package writes,
// and the only one it reads.
const Version = 1

// maxJSON bounds a manifest, and a tag.
const maxJSON = 1 << 20

// maxWord bounds the names in a manifest.
const maxWord = 256

// Manifest says all that determines what a fork of the snapshot does, and
// nothing else, so that equal snapshots have equal digests.
type Manifest struct {
	Version int `json:"version"`
	// Engine and EngineVersion wrote the device state; no other reads it.
	Engine        string `json:"engine"`
	EngineVersion string `json:"engine_version"`
	// Host is where it was written, if that engine's device state depends on it:
	// vmm.Caps.Host. A branch has that of what it stands on.
	Host *vmm.Host `json:"host,omitempty"`
	// Machine is the shape that a fork must have.
	Machine vmm.Machine `json:"machine"`
	// Image is the digest of the image, which pins root, kernel and initramfs.
	Image string `json:"image"`
	// Memory, Layer and Device are filled in by Commit. A snapshot has the whole
	// memory, or a layer: the pages in which it differs from its parent.
	Memory File `json:"memory,omitzero"`
	Layer  File `json:"layer,omitzero"`
	Device File `json:"device"`
	// Disk are the files of the scratch disk, oldest first, if the machine has
	// one. Commit fills them in too. They are all of the disk: of it a snapshot
	// needs nothing from its parent.
	Disk []File `json:"disk,omitempty"`
	// Warmup is the command that ran before the snapshot was taken.
	Warmup []string `json:"warmup,omitempty"`
	// Languages are those with a warm interpreter.
	Languages []string `json:"languages,omitempty"`
	// Parent is the digest of the snapshot that this one was branched from, and
	// is kept for as long as this one is. A layer has one always.
	Parent string `json:"parent,omitempty"`
}

// File is one file of a snapshot.
type File struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// Layered reports whether the snapshot is a layer on its parent, rather than
// the whole memory.
func (m *Manifest) Layered() bool { return m.Layer != File{} }

// content is a file that a manifest names.
type content struct {
	name string
	File
}

// contents are the files of the snapshot: its memory or layer first.
func (m *Manifest) contents() []content {
	all := []content{{memoryFile, m.Memory}, {deviceFile, m.Device}}
	if m.Layered() {
		all[0] = content{layerFile, m.Layer}
	}
	for i, f := range m.Disk {
		all = append(all, content{diskFile(i), f})
	}
	return all
}

// encode returns the one way to write a valid manifest, and its digest.
func (m *Manifest) encode() (data []byte, digest string, err error) {
	if err = m.validate(); err != nil {
		return nil, "", err
	}
	data, err = json.MarshalIndent(m, "", "  ")
	if err != nil {
		return nil, "", fmt.Errorf("encode manifest: %w", err)
	}
	data = append(data, '\n')
	if len(data) > maxJSON {
		return nil, "", fmt.Errorf("%w: manifest of %d bytes, %d allowed", errdef.ErrInvalid, len(data), maxJSON)
	}
	return data, digestOf(data), nil
}

// decodeManifest reads only what encode writes, byte for byte.
func decodeManifest(data []byte) (Manifest, error) {
	var m Manifest
	if err := decodeStrict(data, &m, &m.Version); err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	again, _, err := m.encode()
	if err != nil {
		return Manifest{}, fmt.Errorf("read manifest: %w", err)
	}
	if !bytes.Equal(data, again) {
		return Manifest{}, fmt.Errorf("%w: manifest is not in its canonical form", errdef.ErrInvalid)
	}
	return m, nil
}

// decoded remembers manifests by their digests, so that walking a long chain
// again and again need not decode it again and again.
type decoded struct {
	mu sync.Mutex
	// of has at most maxDecoded entries.
	of map[string]Manifest
}

const maxDecoded = 4096

// manifest returns what data, which has that digest, says. It belongs to the
// caller.
func (d *decoded) manifest(digest string, data []byte) (Manifest, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, ok := d.of[digest]
	if !ok {
		var err error
		if m, err = decodeManifest(data); err != nil {
			return Manifest{}, err
		}
		if d.of == nil || len(d.of) == maxDecoded {
			d.of = map[string]Manifest{}
		}
		d.of[digest] = m
	}
	m.Warmup, m.Languages = slices.Clone(m.Warmup), slices.Clone(m.Languages)
	m.Disk = slices.Clone(m.Disk)
	if m.Host != nil {
		m.Host = new(*m.Host)
	}
	return m, nil
}

func (m *Manifest) validate() error {
	switch {
	case m.Version != Version:
		return fmt.Errorf("%w: manifest version %d", errdef.ErrUnsupported, m.Version)
	case !isWord(m.Engine) || !isWord(m.EngineVersion):
		return fmt.Errorf("%w: manifest: engine %q version %q", errdef.ErrInvalid, m.Engine, m.EngineVersion)
	case m.Machine.MemoryMiB <= 0 || m.Machine.VCPUs <= 0:
		return fmt.Errorf("%w: manifest: machine %+v", errdef.ErrInvalid, m.Machine)
	case m.Layered() == (m.Memory != File{}):
		return fmt.Errorf("%w: manifest: it must name memory or a layer, and not both", errdef.ErrInvalid)
	case m.Layered() && m.Parent == "":
		return fmt.Errorf("%w: manifest: a layer without a parent", errdef.ErrInvalid)
	}
	for _, lang := range m.Languages {
		if !isWord(lang) {
			return fmt.Errorf("%w: manifest: language %q", errdef.ErrInvalid, lang)
		}
	}
	errs := []error{checkDigest(m.Image), m.checkDisk()}
	if m.Host != nil {
		errs = append(errs, m.Host.Validate())
	}
	for _, f := range m.contents() {
		errs = append(errs, checkDigest(f.Digest))
		if f.Size < 0 {
			errs = append(errs, fmt.Errorf("%w: %s of negative size", errdef.ErrInvalid, f.name))
		}
	}
	if m.Parent != "" {
		errs = append(errs, checkDigest(m.Parent))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	return nil
}

func isWord(s string) bool {
	return s != "" && len(s) <= maxWord && !strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f })
}

// decodeStrict reads one JSON object of the version that this package knows,
// with no field that it does not know and nothing behind it.
func decodeStrict(data []byte, into any, version *int) error {
	if len(data) > maxJSON {
		return fmt.Errorf("%w: %d bytes or more, %d allowed", errdef.ErrInvalid, len(data), maxJSON)
	}
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &v); err != nil { // whole: also what follows the object
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if v.Version != Version {
		return fmt.Errorf("%w: version %d, this tine reads version %d", errdef.ErrUnsupported, v.Version, Version)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: %w", errdef.ErrInvalid, err)
	}
	if *version != Version {
		return fmt.Errorf("%w: two versions", errdef.ErrInvalid)
	}
	return nil
}

// readJSON reads what may be a manifest or a tag: at most one byte too many.
func readJSON(f io.Reader) ([]byte, error) { return io.ReadAll(io.LimitReader(f, maxJSON+1)) }

const digestPrefix = "sha256:"

func digestOf(data []byte) string {
	sum := sha256.Sum256(data)
	return digestPrefix + hex.EncodeToString(sum[:])
}

func checkDigest(digest string) error {
	rest, ok := strings.CutPrefix(digest, digestPrefix)
	if !ok || !isHex(rest, sha256.Size*2) {
		return fmt.Errorf("%w: digest %q", errdef.ErrInvalid, digest)
	}
	return nil
}

// isHex reports whether s is at least least, at most 64 lower-case hex digits.
func isHex(s string, least int) bool {
	return len(s) >= least && len(s) <= sha256.Size*2 && strings.Trim(s, "0123456789abcdef") == ""
}
