package api

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/tinevm/tine/internal/errdef"
)

// What a machine does.
const (
	NotStarted = "Not started"
	Running    = "Running"
	Paused     = "Paused"
)

// Instance is what Firecracker says of itself.
type Instance struct {
	ID      string `json:"id"`          // of --id
	State   string `json:"state"`       // NotStarted, Running or Paused
	Version string `json:"vmm_version"` // of Firecracker
	App     string `json:"app_name"`    // "Firecracker"
}

// settle wants one of the three states.
func (i *Instance) settle() error {
	switch i.State {
	case NotStarted, Running, Paused:
		return nil
	default:
		return fmt.Errorf("the machine's state is %q, which is not known", clean(i.State, maxVersion))
	}
}

// Instance asks for the state of the machine: GET /. An answer with a state that
// is none of the three is an error.
func (c *Client) Instance(ctx context.Context) (Instance, error) {
	var i Instance
	if err := c.get(ctx, "/", &i); err != nil {
		return Instance{}, err
	}
	return i, nil
}

// versionAnswer is what Firecracker says of its version.
type versionAnswer struct {
	Version string `json:"firecracker_version"`
	parsed  Version
}

func (a *versionAnswer) settle() (err error) {
	a.parsed, err = ParseVersion(a.Version)
	return err
}

// FetchVersion asks for the version: GET /version.
func (c *Client) FetchVersion(ctx context.Context) (Version, error) {
	var a versionAnswer
	err := c.get(ctx, "/version", &a)
	return a.parsed, err
}

// MachineConfig is the size of a machine. Before boot only.
type MachineConfig struct {
	VCPUs  int  `json:"vcpu_count"`    // 1 to 32; 1 or even with SMT
	MemMiB int  `json:"mem_size_mib"`  // more than 0; even with HugePages2M
	SMT    bool `json:"smt,omitempty"` // threads of one core; x86-64 only
	// TrackDirtyPages has KVM note which pages the guest writes, for snapshots of
	// type Diff.
	TrackDirtyPages bool `json:"track_dirty_pages,omitempty"`
	// CPUTemplate is one of Firecracker's own: T2, T2S, T2CL, T2A or C3; "" leaves
	// what was there. Firecracker advises to use PutCPUConfig in its place.
	CPUTemplate string `json:"cpu_template,omitempty"`
	// HugePages is "" or HugePages2M. A snapshot of a machine with them can not be
	// loaded from a file.
	HugePages string `json:"huge_pages,omitempty"`
}

// settle has what is not there be "", as it was put: some versions say None.
func (m *MachineConfig) settle() error {
	if m.CPUTemplate == "None" {
		m.CPUTemplate = ""
	}
	if m.HugePages == "None" {
		m.HugePages = ""
	}
	return nil
}

// HugePages2M backs guest memory with pages of 2 MiB.
const HugePages2M = "2M"

// PutMachineConfig sets the size of the machine: PUT /machine-config.
func (c *Client) PutMachineConfig(ctx context.Context, m MachineConfig) error {
	return c.put(ctx, "/machine-config", m)
}

// MachineConfig asks for the size of the machine: GET /machine-config.
func (c *Client) MachineConfig(ctx context.Context) (MachineConfig, error) {
	var m MachineConfig
	if err := c.get(ctx, "/machine-config", &m); err != nil {
		return MachineConfig{}, err
	}
	return m, nil
}

// PutCPUConfig sets what of the CPU the guest sees: PUT /cpu-config, before boot
// only. The template is JSON in the form of CpuConfig in Firecracker's OpenAPI
// document, and is sent as it is.
func (c *Client) PutCPUConfig(ctx context.Context, template json.RawMessage) error {
	return c.put(ctx, "/cpu-config", template)
}

// BootSource is what a machine boots. Before boot only; Firecracker opens the
// files at once.
type BootSource struct {
	Kernel string `json:"kernel_image_path"`     // a path
	Initrd string `json:"initrd_path,omitempty"` // a path; not in 1.10 with huge pages
	// Args is the kernel's command line; without one Firecracker has its own.
	Args string `json:"boot_args,omitempty"`
}

// PutBootSource sets what the machine boots: PUT /boot-source.
func (c *Client) PutBootSource(ctx context.Context, b BootSource) error {
	return c.put(ctx, "/boot-source", b)
}

// Drive is a virtio-blk device over a file. Before boot; from 1.16 on (Hotplug)
// also later, on a PCI bus. Firecracker opens the file at once.
type Drive struct {
	ID       string `json:"drive_id"`     // letters, digits and _
	Path     string `json:"path_on_host"` // of the file
	Root     bool   `json:"is_root_device"`
	ReadOnly bool   `json:"is_read_only"`
	// Cache is "" or CacheUnsafe: what the guest flushes is not; or CacheWriteback.
	Cache string `json:"cache_type,omitempty"`
	// Engine is "" or EngineSync; or EngineAsync, which is io_uring.
	Engine string `json:"io_engine,omitempty"`
}

// What Drive.Cache and Drive.Engine may be.
const (
	CacheUnsafe    = "Unsafe"
	CacheWriteback = "Writeback"
	EngineSync     = "Sync"
	EngineAsync    = "Async"
)

// PutDrive adds a drive or replaces the one with its ID: PUT /drives/{id}.
func (c *Client) PutDrive(ctx context.Context, d Drive) error {
	if err := checkID(d.ID); err != nil {
		return fmt.Errorf("PUT /drives: %w", err)
	}
	return c.put(ctx, "/drives/"+d.ID, d)
}

// MoveDrive has a drive of a started machine use the file at path from now on:
// PATCH /drives/{id}. The guest is told that its size may have changed.
func (c *Client) MoveDrive(ctx context.Context, id, path string) error {
	if err := checkID(id); err != nil {
		return fmt.Errorf("PATCH /drives: %w", err)
	}
	return c.patch(ctx, "/drives/"+id, struct {
		ID   string `json:"drive_id"`
		Path string `json:"path_on_host"`
	}{id, path})
}

// Pmem is a virtio-pmem device over a file, which must not be empty; its size in
// the guest is rounded up to 2 MiB. Since 1.14 (PmemDevices). Before boot; from
// 1.16 on (Hotplug) also later, on a PCI bus. Firecracker opens the file when the
// machine starts.
type Pmem struct {
	ID       string `json:"id"`           // letters, digits and _
	Path     string `json:"path_on_host"` // of the file
	Root     bool   `json:"root_device,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
}

// PutPmem adds a pmem device or replaces the one with its ID: PUT /pmem/{id}.
func (c *Client) PutPmem(ctx context.Context, p Pmem) error {
	if err := checkID(p.ID); err != nil {
		return fmt.Errorf("PUT /pmem: %w", err)
	}
	return c.put(ctx, "/pmem/"+p.ID, p, PmemDevices)
}

// NetworkInterface is a virtio-net device at a tap. Before boot; from 1.16 on
// (Hotplug) also later, on a PCI bus. Firecracker opens the tap at once.
type NetworkInterface struct {
	ID  string `json:"iface_id"`      // letters, digits and _
	Tap string `json:"host_dev_name"` // the tap's name
	// MAC is the guest's, as 06:00:ac:10:00:02; without one the guest has what it
	// likes.
	MAC string `json:"guest_mac,omitempty"`
}

// PutNetworkInterface adds a network card or replaces the one with its ID:
// PUT /network-interfaces/{id}.
func (c *Client) PutNetworkInterface(ctx context.Context, n NetworkInterface) error {
	if err := checkID(n.ID); err != nil {
		return fmt.Errorf("PUT /network-interfaces: %w", err)
	}
	return c.put(ctx, "/network-interfaces/"+n.ID, n)
}

// Vsock is a virtio-vsock device. Before boot only. Firecracker makes the socket
// and listens on it at once, so there must be nothing at Path; see DialGuest for
// connections to the guest. Those of the guest to port N of the host go to the
// socket that somebody has made at Path_N.
type Vsock struct {
	CID  uint32 `json:"guest_cid"` // 3 or more
	Path string `json:"uds_path"`  // at most 107 bytes
}

// PutVsock sets the vsock device: PUT /vsock.
func (c *Client) PutVsock(ctx context.Context, v Vsock) error {
	return c.put(ctx, "/vsock", v)
}

// PutEntropy adds a virtio-rng device: PUT /entropy, before boot only.
func (c *Client) PutEntropy(ctx context.Context) error {
	return c.put(ctx, "/entropy", struct{}{})
}

// PutSerial has what the guest writes on its serial port go to a file or pipe in
// place of Firecracker's standard output: PUT /serial, before boot only, and
// allowed before a load. It is opened, or made, when the machine starts or is
// loaded. Since 1.14 (SerialConfig).
func (c *Client) PutSerial(ctx context.Context, path string) error {
	return c.put(ctx, "/serial", struct {
		Path string `json:"serial_out_path"`
	}{path}, SerialConfig)
}

// Logger is where Firecracker logs. Before boot only, and allowed before a load.
type Logger struct {
	// Path is a file or a pipe; without one it goes on where it is. Before 1.14 the
	// file must exist.
	Path string `json:"log_path,omitempty"`
	// Level is Error, Warning, Info, Debug, Trace or Off; "" is Info.
	Level string `json:"level,omitempty"`
}

// PutLogger sets where and what Firecracker logs: PUT /logger.
func (c *Client) PutLogger(ctx context.Context, l Logger) error {
	return c.put(ctx, "/logger", l)
}

// PutMetrics has Firecracker write its metrics to a file or pipe, one JSON object
// a line, each minute and when asked (FlushMetrics): PUT /metrics. Once only,
// before boot, and allowed before a load. Before 1.14 the file must exist.
func (c *Client) PutMetrics(ctx context.Context, path string) error {
	return c.put(ctx, "/metrics", struct {
		Path string `json:"metrics_path"`
	}{path})
}

// Start boots the machine: PUT /actions with InstanceStart. It answers when the
// virtual CPUs run.
func (c *Client) Start(ctx context.Context) error { return c.act(ctx, "InstanceStart") }

// FlushMetrics has the metrics written now: PUT /actions. Of a started machine
// only.
func (c *Client) FlushMetrics(ctx context.Context) error { return c.act(ctx, "FlushMetrics") }

func (c *Client) act(ctx context.Context, action string) error {
	return c.put(ctx, "/actions", struct {
		Type string `json:"action_type"`
	}{action})
}

// Pause stops the virtual CPUs: PATCH /vm. Of a started machine only. To pause
// one that is paused does nothing. Until it is resumed Firecracker does nothing
// but to answer requests here: connections to the guest wait.
func (c *Client) Pause(ctx context.Context) error { return c.setState(ctx, "Paused") }

// Resume lets a paused machine run: PATCH /vm.
func (c *Client) Resume(ctx context.Context) error { return c.setState(ctx, "Resumed") }

func (c *Client) setState(ctx context.Context, state string) error {
	return c.patch(ctx, "/vm", struct {
		State string `json:"state"`
	}{state})
}

// SnapshotType says how much of memory is written.
type SnapshotType string

// The types of snapshot.
const (
	// Full writes all of memory.
	Full SnapshotType = "Full"
	// Diff writes the pages that have changed since the machine started, was loaded
	// or had its last snapshot of type Full, if they were tracked. If not, those that
	// are in Firecracker's page tables or the page cache, which are too many where
	// memory is a file (mincore(2)); since 1.13 (UntrackedDiff), an error before.
	Diff SnapshotType = "Diff"
)

// Snapshot names the files of a snapshot to be. Firecracker makes them. It
// writes and syncs the state first, then memory, and leaves what there is when
// one of the two fails.
type Snapshot struct {
	Type  SnapshotType `json:"snapshot_type,omitempty"` // "" is Full
	State string       `json:"snapshot_path"`           // emptied if it exists
	// Mem is where memory is written to. A file that exists and has the size of
	// memory is written over in place, and one of another size emptied first. It is
	// opened and written after the state; a path that can not be opened is an error
	// then, with the state written.
	Mem string `json:"mem_file_path"`
}

// CreateSnapshot writes a snapshot of a paused machine: PUT /snapshot/create.
func (c *Client) CreateSnapshot(ctx context.Context, s Snapshot) error {
	return c.put(ctx, "/snapshot/create", s)
}

// Load says which snapshot to load, and what is to be different.
type Load struct {
	State string // path of the device state
	// Mem is the path of the memory, which is mapped privately: the file does not
	// change, and must not while the machine lives.
	Mem string
	// TrackDirtyPages is as of MachineConfig. It is sent by the name that the
	// version has for it (LoadTrackDirtyPages).
	TrackDirtyPages bool
	// Resume lets the machine run at once. Otherwise it is Paused.
	Resume bool
	// Networks have network cards use other taps. Since 1.12 (NetworkOverrides).
	Networks []NetworkOverride
	// Vsock is the path for the vsock device's socket, "" for the one that the
	// snapshot knows. Since 1.16 (VsockOverride).
	Vsock string
	// ClockRealtime advances the guest's kvmclock by the time that has passed since
	// the snapshot. x86-64 only. See the feature of that name for the versions that
	// know it, and for what others do.
	ClockRealtime bool
}

// NetworkOverride is the tap for a network card of a snapshot.
type NetworkOverride struct {
	ID  string `json:"iface_id"`
	Tap string `json:"host_dev_name"`
}

// load is Load as it is sent.
type load struct {
	State   string `json:"snapshot_path"`
	Backend struct {
		Path string `json:"backend_path"`
		Type string `json:"backend_type"`
	} `json:"mem_backend"`
	TrackDirtyPages bool              `json:"track_dirty_pages,omitempty"`
	EnableDiff      bool              `json:"enable_diff_snapshots,omitempty"`
	Resume          bool              `json:"resume_vm,omitempty"`
	Networks        []NetworkOverride `json:"network_overrides,omitempty"`
	Vsock           *vsockOverride    `json:"vsock_override,omitempty"`
	ClockRealtime   bool              `json:"clock_realtime,omitempty"`
}

type vsockOverride struct {
	Path string `json:"uds_path"`
}

// LoadSnapshot loads a snapshot: PUT /snapshot/load. Only before anything was
// configured but logger, metrics, serial port and CPU. A Firecracker that could
// not load what it was given ends, after its answer.
func (c *Client) LoadSnapshot(ctx context.Context, l Load) error {
	body := load{State: l.State, Resume: l.Resume, Networks: l.Networks, ClockRealtime: l.ClockRealtime}
	body.Backend.Path, body.Backend.Type = l.Mem, "File"
	if c.version.Has(LoadTrackDirtyPages) {
		body.TrackDirtyPages = l.TrackDirtyPages
	} else {
		body.EnableDiff = l.TrackDirtyPages
	}
	var needs []Feature
	if len(l.Networks) > 0 {
		needs = append(needs, NetworkOverrides)
	}
	if l.Vsock != "" {
		needs = append(needs, VsockOverride)
		body.Vsock = &vsockOverride{l.Vsock}
	}
	if l.ClockRealtime {
		needs = append(needs, ClockRealtime)
	}
	return c.put(ctx, "/snapshot/load", body, needs...)
}

// VMConfig is what Firecracker says that a machine has. Of one that was loaded,
// BootSource and MachineConfig.SMT are empty.
type VMConfig struct {
	BootSource        BootSource         `json:"boot-source"`
	MachineConfig     MachineConfig      `json:"machine-config"`
	Drives            []Drive            `json:"drives"`
	Pmem              []Pmem             `json:"pmem"`
	NetworkInterfaces []NetworkInterface `json:"network-interfaces"`
	Vsock             *Vsock             `json:"vsock"`
	Entropy           *struct{}          `json:"entropy"`
}

func (v *VMConfig) settle() error { return v.MachineConfig.settle() }

// VMConfig asks for all that the machine has: GET /vm/config.
func (c *Client) VMConfig(ctx context.Context) (VMConfig, error) {
	var v VMConfig
	if err := c.get(ctx, "/vm/config", &v); err != nil {
		return VMConfig{}, err
	}
	return v, nil
}

// maxID bounds the name of a device; Firecracker itself has no bound.
const maxID = 64

// checkID lets through what Firecracker takes for a device's name, and is no
// more than a word in a URL.
func checkID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("%w: the name of a device has 1 to %d bytes", errdef.ErrInvalid, maxID)
	}
	for _, r := range id {
		if !wordRune(r) {
			return fmt.Errorf("%w: %q is no name for a device: letters, digits and _ are allowed", errdef.ErrInvalid, clean(id, maxID))
		}
	}
	return nil
}
