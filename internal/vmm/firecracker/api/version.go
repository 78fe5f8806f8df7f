package api

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// Version is a version of Firecracker: what it reports on GET /version, and
// what its releases are named by. Versions are compared as semver.org says,
// but for what follows a "+", which says nothing of the interface.
type Version struct {
	Major, Minor, Patch int
	// Pre is what a version before the release is called: "dev" of "1.17.0-dev".
	Pre string
}

// maxVersion bounds the text of a version.
const maxVersion = 64

// ParseVersion reads "1.16.1", "v1.16.1" or "1.17.0-dev". Whatever else is
// ErrInvalid.
func ParseVersion(s string) (Version, error) {
	bad := func() (Version, error) {
		return Version{}, fmt.Errorf("%w: %q is no version of Firecracker", errdef.ErrInvalid, clean(s, maxVersion))
	}
	if len(s) > maxVersion {
		return bad()
	}
	text, _, _ := strings.Cut(strings.TrimPrefix(s, "v"), "+")
	numbers, pre, hasPre := strings.Cut(text, "-")
	fields := strings.Split(numbers, ".")
	if len(fields) != 3 || hasPre && pre == "" {
		return bad()
	}
	var n [3]int
	for i, field := range fields {
		number, err := strconv.ParseUint(field, 10, 16)
		if err != nil {
			return bad()
		}
		n[i] = int(number)
	}
	if strings.ContainsFunc(pre, func(r rune) bool { return !wordRune(r) && r != '.' && r != '-' }) {
		return bad()
	}
	return Version{n[0], n[1], n[2], pre}, nil
}

// wordRune is an ASCII letter, a digit or an underscore.
func wordRune(r rune) bool {
	return r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
}

// String is the version as Firecracker writes it: without a "v".
func (v Version) String() string {
	s := fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch)
	if v.Pre != "" {
		s += "-" + v.Pre
	}
	return s
}

// Compare is negative if v came before w, positive if after, and 0 if they are
// the same. What comes before a release is older than the release.
func (v Version) Compare(w Version) int {
	if c := cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch)); c != 0 {
		return c
	}
	switch {
	case v.Pre == w.Pre:
		return 0
	case v.Pre == "":
		return 1
	case w.Pre == "":
		return -1
	default:
		return strings.Compare(v.Pre, w.Pre)
	}
}

// Oldest and Newest are the first version that this package speaks to, and the
// last one whose documents and sources it was written by.
var (
	Oldest = Version{Major: 1, Minor: 10}
	Newest = Version{Major: 1, Minor: 16, Patch: 1}
)

// Check says whether this package speaks to version v: nil, or ErrUnsupported
// with a hint. A later 1.x is taken for a Newest with things that are not known
// here, since Firecracker promises by its versions not to break its interface
// before 2.0 (RELEASE_POLICY.md in its sources).
func (v Version) Check() error {
	switch {
	case v.Major > Newest.Major:
		return errdef.WithHint(fmt.Errorf("%w: Firecracker %v: the interface of %d.x is not known", errdef.ErrUnsupported, v, v.Major),
			fmt.Sprintf("install Firecracker %v", Newest))
	case v.Compare(Oldest) < 0:
		return errdef.WithHint(fmt.Errorf("%w: Firecracker %v is older than %v", errdef.ErrUnsupported, v, Oldest),
			fmt.Sprintf("install Firecracker %v", Newest))
	}
	return nil
}

// Feature is something that not every version from Oldest on has.
type Feature int

// The features. Each was looked up in Firecracker's changelog (CHANGELOG.md),
// its OpenAPI document (src/firecracker/swagger/firecracker.yaml) and, for
// fields, in the structures that it decodes requests into
// (src/vmm/src/vmm_config), at every release from v1.10.0 to v1.16.1.
const (
	// NetworkOverrides: another tap for a network card on load.
	// 1.12.0; vmm_config/snapshot.rs.
	NetworkOverrides Feature = iota
	// PCI: --enable-pci on the command line, for devices on a PCI bus.
	// 1.13.0; src/firecracker/src/main.rs.
	PCI
	// LoadTrackDirtyPages: the field of that name on load. Before, it was called
	// enable_diff_snapshots, which later versions still take. The client chooses.
	// 1.13.0; vmm_config/snapshot.rs.
	LoadTrackDirtyPages
	// UntrackedDiff: snapshots of type Diff of machines whose pages are not tracked.
	// 1.13.0; get_dirty_bitmap in vstate/vm.rs.
	UntrackedDiff
	// PmemDevices: PUT /pmem. 1.14.0; vmm_config/pmem.rs.
	PmemDevices
	// SerialConfig: PUT /serial. 1.14.0; vmm_config/serial.rs.
	SerialConfig
	// ClockRealtime: have the guest's kvmclock advance on load by the time that
	// has passed. Without the field, versions before the ones that have it advance
	// it always on hosts from Linux 5.16 on, and those that have it never do.
	// 1.16.0, and by backport 1.15.1 and 1.14.4; vmm_config/snapshot.rs.
	ClockRealtime
	// VMClock: a device that tells guests of a load, and notifies them. 1.15.0, by
	// the changelog, as it has no part in this interface. 1.14 has one already that
	// it does not mention, and which notifies nobody (devices/acpi/vmclock.rs).
	VMClock
	// VsockOverride: another unix socket for the vsock device on load.
	// 1.16.0; vmm_config/snapshot.rs.
	VsockOverride
	// Hotplug: drives, pmem devices and network cards can be added to a running
	// machine on a PCI bus. 1.16.0; rpc_interface.rs.
	Hotplug
)

// since are the names of features and the versions that have them: everything
// from the first on, and the later patches of the releases of the others.
var since = map[Feature]struct {
	name  string
	first Version
	ports []Version
}{
	NetworkOverrides:    {"network overrides on load", Version{Major: 1, Minor: 12}, nil},
	PCI:                 {"a PCI bus", Version{Major: 1, Minor: 13}, nil},
	LoadTrackDirtyPages: {"track_dirty_pages on load", Version{Major: 1, Minor: 13}, nil},
	UntrackedDiff:       {"Diff snapshots without tracked pages", Version{Major: 1, Minor: 13}, nil},
	PmemDevices:         {"pmem devices", Version{Major: 1, Minor: 14}, nil},
	SerialConfig:        {"a path for the serial console", Version{Major: 1, Minor: 14}, nil},
	ClockRealtime: {
		"clock_realtime on load",
		Version{Major: 1, Minor: 16},
		[]Version{{Major: 1, Minor: 14, Patch: 4}, {Major: 1, Minor: 15, Patch: 1}},
	},
	VMClock:       {"the VMClock device", Version{Major: 1, Minor: 15}, nil},
	VsockOverride: {"another vsock socket on load", Version{Major: 1, Minor: 16}, nil},
	Hotplug:       {"devices that come later", Version{Major: 1, Minor: 16}, nil},
}

// String names the feature as errors do.
func (f Feature) String() string {
	if s, ok := since[f]; ok {
		return s.name
	}
	return fmt.Sprintf("feature %d", int(f))
}

// Since is the first version that has f, but for backports to releases before it.
func (f Feature) Since() Version { return since[f].first }

// Has reports whether version v has feature f.
func (v Version) Has(f Feature) bool {
	s, ok := since[f]
	if !ok {
		return false
	}
	for _, port := range s.ports {
		if v.Major == port.Major && v.Minor == port.Minor {
			return v.Compare(port) >= 0
		}
	}
	return v.Compare(s.first) >= 0
}

// need is nil if version v has all of features, else ErrUnsupported.
func (v Version) need(features ...Feature) error {
	for _, f := range features {
		if !v.Has(f) {
			return errdef.WithHint(fmt.Errorf("%w: Firecracker %v does not have %v", errdef.ErrUnsupported, v, f),
				fmt.Sprintf("install Firecracker %v or later", f.Since()))
		}
	}
	return nil
}
