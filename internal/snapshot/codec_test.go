package snapshot

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/errdef"
)

func goodManifest(t testing.TB) ([]byte, Manifest) {
	t.Helper()
	m := testManifest()
	m.Version = Version
	m.Memory, m.Device = File{digestOf([]byte("m")), 1}, File{digestOf([]byte("d")), 2}
	data, _, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	return data, m
}

// The bytes of a manifest are its identity: they must not change by accident.
func TestManifestVector(t *testing.T) {
	t.Parallel()
	data, m := goodManifest(t)
	const want = `{
  "version": 1,
  "engine": "fake",
  "engine_version": "1",
  "machine": {
    "memory_mib": 1,
    "vcpus": 1
  },
  "image": "sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d",
  "memory": {
    "digest": "sha256:62c66a7a5dd70c3146618063c344e531e6d4b59e379808443ce962b3abd63c5a",
    "size": 1
  },
  "device": {
    "digest": "sha256:18ac3e7343f016890c510e93f935261169d9e3f565436429830faf0934f4f8e4",
    "size": 2
  },
  "warmup": [
    "python3",
    "-c",
    "import json"
  ],
  "languages": [
    "python"
  ]
}
`
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got, err := decodeManifest(data)
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

// layeredManifest is goodManifest of a layer.
func layeredManifest(t testing.TB) ([]byte, Manifest) {
	t.Helper()
	_, m := goodManifest(t)
	m.Layer, m.Memory, m.Parent = m.Memory, File{}, digestOf([]byte("parent"))
	data, _, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	return data, m
}

// diskManifest is goodManifest of a machine with a disk of two files.
func diskManifest(t testing.TB) ([]byte, Manifest) {
	t.Helper()
	_, m := goodManifest(t)
	m.Machine.DiskMiB = 1
	m.Disk = []File{{Digest: digestOf([]byte("raw")), Size: 1 << 20}, {Digest: digestOf([]byte("top")), Size: 3}}
	data, _, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	return data, m
}

func TestDiskManifest(t *testing.T) {
	t.Parallel()
	plain, _ := goodManifest(t)
	data, m := diskManifest(t)
	want := strings.Replace(string(plain), `"vcpus": 1`, "\"vcpus\": 1,\n    \"disk_mib\": 1", 1)
	want = strings.Replace(want, "  \"warmup\"", `  "disk": [
    {
      "digest": "`+m.Disk[0].Digest+`",
      "size": 1048576
    },
    {
      "digest": "`+m.Disk[1].Digest+`",
      "size": 3
    }
  ],
  "warmup"`, 1)
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got, err := decodeManifest(data)
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for name, spoil := range map[string]func(m *Manifest){
		"no files":     func(m *Manifest) { m.Disk = nil },
		"no disk":      func(m *Manifest) { m.Machine.DiskMiB = 0 },
		"negative":     func(m *Manifest) { m.Machine.DiskMiB = -1 },
		"another size": func(m *Manifest) { m.Machine.DiskMiB = 2 },
		"many files":   func(m *Manifest) { m.Disk = slices.Repeat(m.Disk, MaxDisk) },
		"no digest":    func(m *Manifest) { m.Disk = []File{{Size: 1 << 20}} },
		"no size":      func(m *Manifest) { m.Disk = []File{m.Disk[0], {Digest: m.Disk[1].Digest, Size: -1}} },
	} {
		bad := m
		spoil(&bad)
		if _, _, err = bad.encode(); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestNetManifest: a manifest says of a network card that it is there, and
// otherwise nothing, as it did before there were any.
func TestNetManifest(t *testing.T) {
	t.Parallel()
	plain, m := goodManifest(t)
	m.Machine.Net = true
	data, _, err := m.encode()
	want := strings.Replace(string(plain), `"vcpus": 1`, "\"vcpus\": 1,\n    \"net\": true", 1)
	if diff := cmp.Diff(want, string(data)); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	got, err := decodeManifest(data)
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, err = decodeManifest([]byte(strings.Replace(want, `"net": true`, `"net": false`, 1))); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("another way to say that there is none: %v", err)
	}
}

func TestLayeredManifest(t *testing.T) {
	t.Parallel()
	whole, _ := goodManifest(t)
	data, m := layeredManifest(t)
	want := strings.Replace(string(whole), `"memory": {`, `"layer": {`, 1)
	want = strings.Replace(want, "  ]\n}\n", "  ],\n  \"parent\": \""+digestOf([]byte("parent"))+"\"\n}\n", 1)
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got, err := decodeManifest(data)
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	neither, both, orphan := m, m, m
	neither.Layer, both.Memory, orphan.Parent = File{}, m.Layer, ""
	for name, bad := range map[string]Manifest{"neither": neither, "both": both, "orphan": orphan} {
		if _, _, err = bad.encode(); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	empty := strings.Replace(string(data), `  "layer"`, `  "memory": {"digest": "", "size": 0},`+"\n"+`  "layer"`, 1)
	if _, err = decodeManifest([]byte(empty)); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("an empty memory: %v", err)
	}
}

func TestDecodeManifestRefuses(t *testing.T) {
	t.Parallel()
	data, _ := goodManifest(t)
	good := string(data)
	tests := map[string]struct {
		text string
		want error
	}{
		"empty":         {"", errdef.ErrInvalid},
		"not-json":      {"tine", errdef.ErrInvalid},
		"null":          {"null", errdef.ErrUnsupported},
		"version-0":     {strings.Replace(good, `"version": 1`, `"version": 0`, 1), errdef.ErrUnsupported},
		"version-2":     {strings.Replace(good, `"version": 1`, `"version": 2`, 1), errdef.ErrUnsupported},
		"unknown-field": {strings.Replace(good, `"engine"`, `"motor": 1, "engine"`, 1), errdef.ErrInvalid},
		"other-spacing": {strings.Replace(good, "  ", "", 1), errdef.ErrInvalid},
		"trailing":      {good + "{}", errdef.ErrInvalid},
		"bad-digest":    {strings.Replace(good, "sha256:6105", "sha256:61O5", 1), errdef.ErrInvalid},
		"negative-size": {strings.Replace(good, `"size": 1`, `"size": -1`, 1), errdef.ErrInvalid},
		"too-long":      {strings.Repeat(" ", maxJSON) + good, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if m, err := decodeManifest([]byte(tt.text)); !errors.Is(err, tt.want) {
				t.Errorf("got %+v, %v; want %v", m, err, tt.want)
			}
		})
	}
}

func FuzzDecodeManifest(f *testing.F) {
	data, _ := goodManifest(f)
	f.Add(data)
	layered, _ := layeredManifest(f)
	f.Add(layered)
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := decodeManifest(data)
		if err != nil {
			return
		}
		again, digest, err := m.encode()
		if err != nil || !bytes.Equal(data, again) || digest != digestOf(data) {
			t.Errorf("%q became %q, %v", data, again, err)
		}
	})
}

func FuzzDecodeTag(f *testing.F) {
	good := tagFile{Version: Version, Digest: digestOf(nil), Facts: Facts{CreatedAt: time.Unix(1, 0).UTC(), BootMS: 3, Warning: "w", Follows: digestOf(nil), PauseMS: 1.25, Auto: true}}
	data, err := good.encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"version":1,"digest":"sha256:"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		tag, err := decodeTag(data)
		if err != nil {
			return
		}
		again, err := tag.encode()
		if errors.Is(err, errdef.ErrInvalid) {
			return // escapes can make it longer than is allowed
		}
		if back, backErr := decodeTag(again); err != nil || backErr != nil || !cmp.Equal(tag, back) {
			t.Errorf("%q became %q: %v, %v", data, again, err, backErr)
		}
	})
}
