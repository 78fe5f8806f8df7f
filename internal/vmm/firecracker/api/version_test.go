package api_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

func TestVersionOrder(t *testing.T) {
	t.Parallel()
	order := []string{"1.9.1", "1.10.0-dev", "1.10.0", "1.10.1", "1.16.0-dev", "1.16.0", "1.16.1", "1.17.0-dev", "1.17.0", "2.0.0-alpha", "2.0.0-dev", "2.0.0"}
	for i, a := range order {
		for j, b := range order {
			if got := parse(t, a).Compare(parse(t, b)); got < 0 != (i < j) || got > 0 != (i > j) {
				t.Errorf("%s to %s is %d", a, b, got)
			}
		}
	}
	if v := parse(t, "v1.16.1+fuzzing"); v != api.Newest || v.String() != "1.16.1" {
		t.Errorf("got %v", v)
	}
	for _, bad := range []string{"", "1", "1.16", "1.16.1.1", "1.16.x", "1.-1.0", "1.16.1-", "1.16.1-\x1b", "99999999.0.0", " 1.16.1"} {
		if v, err := api.ParseVersion(bad); !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%q: %v, %v", bad, v, err)
		}
	}
}

func TestVersionCheck(t *testing.T) {
	t.Parallel()
	for version, ok := range map[string]bool{
		"0.25.0": false, "1.9.1": false, "1.10.0-dev": false, "1.10.0": true, "1.16.1": true, "1.17.0-dev": true, "1.99.0": true, "2.0.0": false,
	} {
		err := parse(t, version).Check()
		if ok != (err == nil) || !ok && (!errors.Is(err, errdef.ErrUnsupported) || errdef.Hint(err) == "") {
			t.Errorf("%s: %v", version, err)
		}
	}
}

func TestFeatures(t *testing.T) {
	t.Parallel()
	all := []string{
		"1.10.0", "1.10.1", "1.11.0", "1.12.0", "1.12.1", "1.13.0", "1.13.1", "1.13.2", "1.14.0", "1.14.1", "1.14.2", "1.14.3", "1.14.4",
		"1.15.0", "1.15.1", "1.16.0-dev", "1.16.0", "1.16.1", "1.17.0-dev", "1.17.0",
	}
	tests := map[api.Feature]struct {
		first string
		not   []string // that come later
	}{
		api.NetworkOverrides:    {"1.12.0", nil},
		api.PCI:                 {"1.13.0", nil},
		api.LoadTrackDirtyPages: {"1.13.0", nil},
		api.UntrackedDiff:       {"1.13.0", nil},
		api.PmemDevices:         {"1.14.0", nil},
		api.SerialConfig:        {"1.14.0", nil},
		api.ClockRealtime:       {"1.14.4", []string{"1.15.0", "1.16.0-dev"}},
		api.VMClock:             {"1.15.0", nil},
		api.VsockOverride:       {"1.16.0", nil},
		api.Hotplug:             {"1.16.0", nil},
	}
	for f, tt := range tests {
		for _, version := range all {
			v := parse(t, version)
			want := v.Compare(parse(t, tt.first)) >= 0 && !slices.Contains(tt.not, version)
			if v.Has(f) != want {
				t.Errorf("%s has %v: %v", version, f, !want)
			}
		}
	}
	if api.Newest.Has(api.Feature(99)) {
		t.Error("it has what nobody knows")
	}
}
