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
	"github.com/tinevm/tine/internal/vmm"
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

func testHost() *vmm.Host {
	cpu := vmm.CPU{Vendor: "AuthenticAMD", Family: 25, Model: 1, Stepping: 2, Name: "AMD EPYC <Milan>", Flags: digestOf([]byte("fpu\nsvm\n"))}
	return &vmm.Host{CPU: cpu, Template: "T2A", Kernel: "6.1.112"}
}

// hostManifest is goodManifest of an engine that depends on its host.
func hostManifest(t testing.TB) ([]byte, Manifest) {
	t.Helper()
	_, m := goodManifest(t)
	m.Host = testHost()
	data, _, err := m.encode()
	if err != nil {
		t.Fatal(err)
	}
	return data, m
}

func TestHostManifest(t *testing.T) {
	t.Parallel()
	plain, _ := goodManifest(t)
	data, m := hostManifest(t)
	want := strings.Replace(string(plain), "  \"machine\"", `  "host": {
    "cpu": {
      "vendor": "AuthenticAMD",
      "family": 25,
      "model": 1,
      "stepping": 2,
      "name": "AMD EPYC \u003cMilan\u003e",
      "flags": "`+m.Host.CPU.Flags+`"
    },
    "template": "T2A",
    "kernel": "6.1.112"
  },
  "machine"`, 1)
	if diff := cmp.Diff(want, string(data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	got, err := decodeManifest(data)
	if diff := cmp.Diff(m, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	for name, change := range map[string][2]string{
		"another field": {`"kernel"`, `"kernel_version": "6",` + "\n    \"kernel\""},
		"no kernel":     {",\n    \"kernel\": \"6.1.112\"", ""},
		"kernel":        {`"6.1.112"`, `"six"`},
		"huge kernel":   {`"6.1.112"`, `"6.1.` + strings.Repeat("1", 1<<16) + `"`},
		"huge vendor":   {`"AuthenticAMD"`, `"` + strings.Repeat("A", 1<<16) + `"`},
		"huge name":     {`"AMD EPYC \u003cMilan\u003e"`, `"` + strings.Repeat("A", 1<<16) + `"`},
		"huge template": {`"T2A"`, `"` + strings.Repeat("A", 1<<16) + `"`},
		"no template":   {`"T2A"`, `""`},
		"escape":        {`"T2A"`, `"\u001b[2J"`},
		"negative":      {`"stepping": 2`, `"stepping": -2`},
		"fraction":      {`"stepping": 2`, `"stepping": 2.5`},
		"words":         {`"family": 25`, `"family": "25"`},
		"flags":         {`"flags": "sha256:`, `"flags": "sha512:`},
	} {
		bad := strings.Replace(want, change[0], change[1], 1)
		if _, err = decodeManifest([]byte(bad)); bad == want || !errors.Is(err, errdef.ErrInvalid) || len(err.Error()) > 500 {
			t.Errorf("%s: %.300v", name, err)
		}
	}
	for name, value := range map[string]string{"null": "null", "empty": "{}", "list": "[]", "text": `"AMD"`} {
		bad := strings.Replace(string(plain), `  "machine"`, `  "host": `+value+`,`+"\n  \"machine\"", 1)
		if _, err = decodeManifest([]byte(bad)); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestManifestIsTheCallers: what is remembered of a manifest does not change
// with what was returned of it.
func TestManifestIsTheCallers(t *testing.T) {
	t.Parallel()
	data, want := hostManifest(t)
	var known decoded
	for range 3 {
		m, err := known.manifest(digestOf(data), data)
		if diff := cmp.Diff(want, m); err != nil || diff != "" {
			t.Fatalf("%v (-want +got):\n%s", err, diff)
		}
		m.Host.Kernel, m.Warmup[0] = "7.0", "sh"
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
	hosted, _ := hostManifest(f)
	f.Add(hosted)
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
