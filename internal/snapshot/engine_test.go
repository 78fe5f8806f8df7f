package snapshot

import (
	"errors"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/fake"
)

func TestRestorableBy(t *testing.T) {
	t.Parallel()
	intel := testHost()
	intel.CPU.Vendor, intel.Template = "GenuineIntel", ""
	for name, tt := range map[string]struct {
		here   *vmm.Host
		change func(*Manifest)
		want   error
		text   string
		hint   string
	}{
		"depends on nothing":     {nil, func(*Manifest) {}, nil, "", ""},
		"would not depend on it": {nil, func(m *Manifest) { m.Host = testHost() }, nil, "", ""},
		"this host":              {testHost(), func(m *Manifest) { m.Host = testHost() }, nil, "", ""},
		"engine": {
			testHost(), func(m *Manifest) { m.Engine = "qemu-kvm" }, errdef.ErrConflict,
			"snapshot py was made by qemu-kvm 1, this is fake 1", "--replace py",
		},
		"version": {
			nil, func(m *Manifest) { m.EngineVersion = "2" }, errdef.ErrConflict, "by fake 2, this is fake 1", "--replace py",
		},
		"does not say": {
			testHost(), func(*Manifest) {}, errdef.ErrUnsupported, "does not say which CPU and kernel it was made on", "--replace py",
		},
		"CPU": {
			intel, func(m *Manifest) { m.Host = testHost(); m.Host.Template = "" }, errdef.ErrUnsupported,
			"snapshot py cannot be used on this host: unsupported: it was made on AMD EPYC", "make the snapshot anew on this host",
		},
	} {
		engine := fake.New()
		engine.SetHost(tt.here)
		snap := Snapshot{Tag: "py", Manifest: testManifest()}
		tt.change(&snap.Manifest)
		err := snap.RestorableBy(engine)
		switch {
		case tt.want == nil:
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		case !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) || !strings.Contains(errdef.Hint(err), tt.hint):
			t.Errorf("%s: %v, hint %q", name, err, errdef.Hint(err))
		}
	}
}
