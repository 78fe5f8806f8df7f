package apitest

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// machine is the one machine of a process: what was configured, and its state.
// Whoever calls a method holds the server's lock.
type machine struct {
	s     *Server
	state string
	// boot: something was configured that only a machine which boots has. Then
	// nothing can be loaded.
	boot    bool
	metrics bool // are on

	config   map[string]any
	source   map[string]any // nil: none
	drives   devices
	pmem     devices
	networks devices
	entropy  bool
	vsock    *vsockDevice
	mapped   []byte // guest memory, if it was loaded
}

// devices are those of one kind, by their names.
type devices map[string]map[string]any

func newMachine(s *Server) *machine {
	return &machine{
		s: s, state: api.NotStarted,
		config: map[string]any{"vcpu_count": uint64(1), "mem_size_mib": uint64(128)},
		drives: devices{}, pmem: devices{}, networks: devices{},
	}
}

func (m *machine) close() {
	if m.vsock != nil {
		m.vsock.close()
	}
	_ = unix.Munmap(m.mapped) // EINVAL if there is none
	m.mapped = nil
}

// setState lets connections to the guest go on, or stops them.
func (m *machine) setState(state string) {
	m.state = state
	if m.vsock != nil {
		m.vsock.setRunning(state == api.Running)
	}
}

// Firecracker's words for requests at the wrong time.
const (
	preBoot  = "The requested operation is not supported before starting the microVM."
	postBoot = "The requested operation is not supported after starting the microVM."
)

// endpoint is a request that there is: method and first word of the path.
type endpoint struct {
	schema schema
	since  []string
	// id: the path has the name of a device, which is in the body too, by this name.
	id string
	// when it is allowed; "" is always.
	when string
	run  func(*machine, map[string]any) outcome
}

// When a request is allowed.
const (
	before    = "before the machine starts"
	after     = "after the machine has started"
	hotplug   = "before, and with a PCI bus after"
	alwaysYes = ""
)

func endpoints() map[string]endpoint {
	return map[string]endpoint{
		"GET ":                   {run: (*machine).instance},
		"GET version":            {run: (*machine).version},
		"GET machine-config":     {run: (*machine).machineConfig},
		"GET vm":                 {run: (*machine).vmConfig},
		"PUT machine-config":     {schema: machineConfig, when: before, run: (*machine).putConfig},
		"PUT cpu-config":         {schema: cpuConfig, when: before, run: nothing},
		"PUT boot-source":        {schema: bootSource, when: before, run: (*machine).putSource},
		"PUT drives":             {schema: drive, id: "drive_id", when: hotplug, run: (*machine).putDrive},
		"PATCH drives":           {schema: driveUpdate, id: "drive_id", when: after, run: (*machine).patchDrive},
		"PUT pmem":               {schema: pmem, id: "id", when: hotplug, since: []string{"1.14.0"}, run: (*machine).putPmem},
		"PUT network-interfaces": {schema: network, id: "iface_id", when: hotplug, run: (*machine).putNetwork},
		"PUT vsock":              {schema: vsock, when: before, run: (*machine).putVsock},
		"PUT entropy":            {schema: entropy, when: before, run: (*machine).putEntropy},
		"PUT serial":             {schema: serial, when: before, since: []string{"1.14.0"}, run: nothing},
		"PUT logger":             {schema: logger, when: before, run: (*machine).putLogger},
		"PUT metrics":            {schema: metrics, when: before, run: (*machine).putMetrics},
		"PUT actions":            {schema: action, run: (*machine).act},
		"PATCH vm":               {schema: vmState, when: after, run: (*machine).patchState},
		"PUT snapshot/create":    {schema: snapshotCreate, when: after, run: (*machine).createSnapshot},
		"PUT snapshot/load":      {schema: snapshotLoad, run: (*machine).loadSnapshot},
	}
}

// handle carries out one request.
func (m *machine) handle(method, url string, body []byte) outcome {
	words := strings.Split(strings.TrimSuffix(strings.TrimLeft(url, "/"), "/"), "/")
	name := words[0]
	invalid := func(name string) outcome { return refuse("Invalid request method and/or path: %s %s.", method, name) }
	switch {
	case method == http.MethodGet && len(body) > 0:
		return refuse("GET request cannot have a body.")
	case method != http.MethodGet && method != http.MethodDelete && len(body) == 0:
		return refuse("Empty %s request.", method)
	case name == "snapshot" && method == http.MethodPut:
		if len(words) < 2 {
			return refuse("Missing snapshot operation type.")
		}
		if name = "snapshot/" + words[1]; name != "snapshot/create" && name != "snapshot/load" {
			return invalid("/" + name)
		}
	case name == "vm" && method == http.MethodGet && (len(words) < 2 || words[1] != "config"):
		return invalid(name)
	}
	e, ok := endpoints()[method+" "+name]
	if !ok || !known(m.s.version, e.since) {
		return invalid(name)
	}
	if e.id != "" {
		if o := checkID(words); o.fault != "" {
			return o
		}
	}
	var values map[string]any
	if method != http.MethodGet {
		var err error
		if values, err = e.schema.decode(body, m.s.version); err != nil {
			return refuse("An error occurred when deserializing the json body of a request: %v.", err)
		}
		if e.id != "" && values[e.id] != words[1] {
			return mismatch(name, words[1], values[e.id])
		}
	}
	if o := m.allowed(e.when); o.fault != "" {
		return o
	}
	return e.run(m, values)
}

func checkID(words []string) outcome {
	if len(words) < 2 || words[1] == "" {
		return refuse("The ID cannot be empty.")
	}
	for _, r := range words[1] {
		if r != '_' && !unicode.IsLetter(r) && !unicode.IsNumber(r) {
			return refuse("API Resource IDs can only contain alphanumeric characters and underscores.")
		}
	}
	return outcome{}
}

func mismatch(endpoint, inPath string, inBody any) outcome {
	if endpoint == "network-interfaces" {
		return refuse("The id from the path [%s] does not match the id from the body [%v]!", inPath, inBody)
	}
	return refuse("The id from the path does not match the id from the body!")
}

func (m *machine) allowed(when string) outcome {
	started := m.state != api.NotStarted
	switch {
	case when == before && started:
		return refuse(postBoot)
	case when == after && !started:
		return refuse(preBoot)
	case when == hotplug && started && !known(m.s.version, []string{"1.16.0"}):
		return refuse(postBoot)
	case when == hotplug && started && !m.s.cfg.PCI:
		return refuse("PCI is not enabled")
	}
	return outcome{}
}

func nothing(*machine, map[string]any) outcome { return outcome{} }

func (m *machine) instance(map[string]any) outcome {
	return outcome{value: map[string]string{
		"id": m.s.cfg.ID, "state": m.state, "vmm_version": m.s.version.String(), "app_name": "Firecracker",
	}}
}

func (m *machine) version(map[string]any) outcome {
	return outcome{value: map[string]string{"firecracker_version": m.s.version.String()}}
}

func (m *machine) machineConfig(map[string]any) outcome {
	return outcome{value: m.filled()}
}

// filled is the configuration with its defaults.
func (m *machine) filled() map[string]any {
	all := map[string]any{"smt": false, "track_dirty_pages": false, "huge_pages": "None"}
	maps.Copy(all, m.config)
	if t := all["cpu_template"]; t == nil || t == "None" {
		delete(all, "cpu_template")
	}
	return all
}

func (m *machine) vmConfig(map[string]any) outcome {
	all := map[string]any{
		"balloon": nil, "drives": m.drives.list(), "boot-source": m.source, "cpu-config": nil, "logger": nil,
		"machine-config": m.filled(), "metrics": nil, "mmds-config": nil, "network-interfaces": m.networks.list(),
		"vsock": nil, "entropy": nil,
	}
	if m.source == nil {
		all["boot-source"] = map[string]any{"kernel_image_path": "", "initrd_path": nil, "boot_args": nil}
	}
	if known(m.s.version, []string{"1.14.0"}) {
		all["pmem"], all["memory-hotplug"] = m.pmem.list(), nil
	}
	if m.vsock != nil {
		all["vsock"] = map[string]any{"guest_cid": m.vsock.cid, "uds_path": m.vsock.path}
	}
	if m.entropy {
		all["entropy"] = map[string]any{"rate_limiter": nil}
	}
	return outcome{value: all}
}

// list are the devices by name; Firecracker has them in the order they came in.
func (d devices) list() []map[string]any {
	list := []map[string]any{}
	for _, name := range slices.Sorted(maps.Keys(d)) {
		list = append(list, d[name])
	}
	return list
}

// maxVCPUs is Firecracker's.
const maxVCPUs = 32

func (m *machine) putConfig(v map[string]any) outcome {
	m.boot = true
	vcpus, mem := v["vcpu_count"].(uint64), v["mem_size_mib"].(uint64)
	smt := v["smt"] == true
	o := outcome{deprecated: v["cpu_template"] != nil}
	switch {
	case vcpus == 0 || vcpus > maxVCPUs || smt && vcpus > 1 && vcpus%2 == 1:
		o.fault = "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even number if SMT is enabled."
	case mem == 0 || v["huge_pages"] == "2M" && mem%2 == 1:
		o.fault = "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size."
	case v["huge_pages"] == "2M" && m.source["initrd_path"] != nil && !known(m.s.version, []string{"1.11.0"}):
		o.fault = "Machine config error: " + hugeInitrd
	default:
		if v["cpu_template"] == nil { // the one before stays
			v["cpu_template"] = m.config["cpu_template"]
		}
		m.config = v
	}
	return o
}

// hugeInitrd is what 1.10 says of the two.
const hugeInitrd = "Firecracker's huge pages support is incompatible with initrds."

// osError is an error of the system as Rust prints it.
func osError(err error) string {
	errno := errnoOf(err)
	return fmt.Sprintf("%s (os error %d)", describe(errno), int(errno))
}

// open opens a file as Firecracker would, and closes it.
func open(path string, flags int) error {
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// maxCommandLine is what x86-64 allows for the kernel's, with its zero.
const maxCommandLine = 2048

func (m *machine) putSource(v map[string]any) outcome {
	m.boot = true
	if v["initrd_path"] != nil && m.config["huge_pages"] == "2M" && !known(m.s.version, []string{"1.11.0"}) {
		return refuse("Boot source error: " + hugeInitrd)
	}
	if err := open(v["kernel_image_path"].(string), os.O_RDONLY); err != nil {
		return refuse("Boot source error: The kernel file cannot be opened: %s", osError(err))
	}
	if initrd, ok := v["initrd_path"].(string); ok {
		if err := open(initrd, os.O_RDONLY); err != nil {
			return refuse("Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. %s", osError(err))
		}
	}
	if args, ok := v["boot_args"].(string); ok && len(args) >= maxCommandLine {
		return refuse("Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.")
	}
	m.source = map[string]any{"kernel_image_path": v["kernel_image_path"], "initrd_path": v["initrd_path"], "boot_args": v["boot_args"]}
	return outcome{}
}

// openDrive opens the file of a drive.
func openDrive(path string, readOnly bool) outcome {
	flags := os.O_RDWR
	if readOnly {
		flags = os.O_RDONLY
	}
	if err := open(path, flags); err != nil {
		return refuse("Virtio backend error: Error manipulating the backing file: %s %s", osError(err), path)
	}
	return outcome{}
}

func (m *machine) putDrive(v map[string]any) outcome {
	name := v["drive_id"].(string)
	path, isFile := v["path_on_host"].(string)
	root := v["is_root_device"] == true
	const create = "Drive config error: Unable to create the virtio block device: "
	if o := m.hotplug(m.drives, name); o.fault != "" {
		return o
	}
	switch {
	case root && m.pmem.hasRoot("root_device", ""):
		return refuse("Drive config error: Attempt to add block as a root device while the root device defined as a pmem device")
	case root && m.drives.hasRoot("is_root_device", name):
		return refuse("Drive config error: A root block device already exists!")
	case !isFile || v["socket"] != nil:
		return refuse(create + "Invalid block config.")
	}
	if o := openDrive(path, v["is_read_only"] == true); o.fault != "" {
		return refuse("%s%s", create, o.fault)
	}
	all := map[string]any{
		"partuuid": nil, "cache_type": "Unsafe", "is_read_only": false, "rate_limiter": nil, "io_engine": "Sync", "socket": nil,
	}
	maps.Copy(all, v)
	m.drives[name] = all
	return outcome{}
}

// hotplug notes what only a machine that boots has, and refuses a name that a
// started machine has already.
func (m *machine) hotplug(d devices, name string) outcome {
	if m.state == api.NotStarted {
		m.boot = true
		return outcome{}
	}
	if _, ok := d[name]; ok {
		return refuse("Device ID in use")
	}
	return outcome{}
}

func (d devices) hasRoot(field, but string) bool {
	for name, v := range d {
		if name != but && v[field] == true {
			return true
		}
	}
	return false
}

func (m *machine) patchDrive(v map[string]any) outcome {
	name := v["drive_id"].(string)
	const update = "Drive config error: Unable to patch the block device: "
	d, ok := m.drives[name]
	if !ok {
		return refuse(update + "Failed perform action on device: Device not found Please verify the request arguments.")
	}
	if path, ok := v["path_on_host"].(string); ok {
		if o := openDrive(path, d["is_read_only"] == true); o.fault != "" {
			return refuse("%sBlock: %s Please verify the request arguments.", update, o.fault)
		}
		d["path_on_host"] = path
	}
	return outcome{}
}

func (m *machine) putPmem(v map[string]any) outcome {
	name := v["id"].(string)
	if o := m.hotplug(m.pmem, name); o.fault != "" {
		return o
	}
	root := v["root_device"] == true
	switch {
	case root && m.drives.hasRoot("is_root_device", ""):
		return refuse("Pmem config error: Attempt to add pmem as a root device while the root device defined as a block device")
	case root && m.pmem.hasRoot("root_device", name):
		return refuse("Pmem config error: A root pmem device already exist")
	}
	all := map[string]any{"root_device": false, "read_only": false}
	maps.Copy(all, v)
	if m.state != api.NotStarted {
		if fault := openPmem(all); fault != "" {
			return refuse("Pmem config error: %s", fault)
		}
	}
	m.pmem[name] = all
	return outcome{}
}

// openPmem opens the file of a pmem device, which happens when the machine
// starts.
func openPmem(v map[string]any) string {
	flags := os.O_RDWR
	if v["read_only"] == true {
		flags = os.O_RDONLY
	}
	path := v["path_on_host"].(string)
	if err := open(path, flags); err != nil {
		return "Error accessing backing file: " + osError(err)
	}
	if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Size() == 0 {
		return "Error backing file size is 0"
	}
	return ""
}

// maxTap is IFNAMSIZ, without the zero.
const maxTap = 15

func (m *machine) putNetwork(v map[string]any) outcome {
	name := v["iface_id"].(string)
	if o := m.hotplug(m.networks, name); o.fault != "" {
		return o
	}
	for other, n := range m.networks {
		if other != name && v["guest_mac"] != nil && n["guest_mac"] == v["guest_mac"] {
			return refuse("Network config error: The MAC address is already in use: %v", v["guest_mac"])
		}
	}
	if len(v["host_dev_name"].(string)) > maxTap {
		return refuse("Network config error: Could not create the network device: Open tap device failed: Invalid interface name")
	}
	m.networks[name] = v
	return outcome{}
}

func (m *machine) putVsock(v map[string]any) outcome {
	m.boot = true
	o := outcome{deprecated: v["vsock_id"] != nil}
	const bind = "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: "
	if m.vsock != nil { // the first one goes, and its socket
		m.vsock.close()
		path := m.vsock.path
		m.vsock = nil
		if err := os.Remove(path); err != nil {
			o.fault = bind + osError(err)
			return o
		}
	}
	device, fault := newVsock(m.s, v["guest_cid"].(uint64), v["uds_path"].(string))
	if fault != "" {
		o.fault = bind + fault
		return o
	}
	m.vsock = device
	return o
}

func (m *machine) putEntropy(map[string]any) outcome {
	m.boot, m.entropy = true, true
	return outcome{}
}

func (m *machine) putLogger(v map[string]any) outcome {
	if path, ok := v["log_path"].(string); ok {
		if err := touch(path, m.s.version); err != nil {
			return refuse("Logger error: Failed to open target file: %s", osError(err))
		}
	}
	return outcome{}
}

func (m *machine) putMetrics(v map[string]any) outcome {
	const start = "Metrics error: Cannot initialize the metrics system due to bad user input: "
	if err := touch(v["metrics_path"].(string), m.s.version); err != nil {
		return refuse("%s%s", start, osError(err))
	}
	if m.metrics {
		return refuse(start + "Reinitialization of metrics not allowed.")
	}
	m.metrics = true
	return outcome{}
}

// touch opens a file that Firecracker writes to. Since 1.14 it makes it, too.
func touch(path string, v api.Version) error {
	flags := os.O_WRONLY
	if known(v, []string{"1.14.0"}) {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m *machine) act(v map[string]any) outcome {
	started := m.state != api.NotStarted
	switch {
	case v["action_type"] != "InstanceStart" && !started:
		return refuse(preBoot)
	case v["action_type"] != "InstanceStart":
		return outcome{}
	case started:
		return refuse(postBoot)
	case m.source == nil:
		return refuse("Start microvm error: Cannot start microvm without kernel configuration.")
	}
	if err := m.openKVM(); err != nil {
		return refuse("Start microvm error: %v", err)
	}
	for _, v := range m.pmem.list() {
		if fault := openPmem(v); fault != "" {
			return refuse("Start microvm error: Cannot create pmem device: %s", fault)
		}
	}
	m.setState(api.Running)
	return outcome{}
}

func (m *machine) patchState(v map[string]any) outcome {
	if v["state"] == "Paused" {
		m.setState(api.Paused)
	} else {
		m.setState(api.Running)
	}
	return outcome{}
}
