package apitest

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc64"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// stateMagic begins the stand-in's own device states. Firecracker's begin
// otherwise, and neither can read the other's. What they have in common is their
// checksum.
const stateMagic = "apitest device state\n"

// stateSize is about what the state of a small machine has in Firecracker's form.
const stateSize = 20 << 10

// checksum is the one at the end of device states: the CRC-64 of Redis and of the
// crate crc64, which does not invert what hash/crc64 does. That of bytes and their
// checksum is 0.
func checksum(data []byte) uint64 {
	const jones = 0x95ac9329ac4bc9b5 // the bits in Go's order
	return ^crc64.Update(^uint64(0), crc64.MakeTable(jones), data)
}

// state is what a device state has behind the magic.
type state struct {
	Format   string // of the versions that can load it
	Config   map[string]any
	Drives   devices
	Pmem     devices
	Networks devices
	Entropy  bool
	VsockCID uint64
	Vsock    string // path, "" without
}

// formats are the versions of Firecracker's format, and which release had them
// first: SNAPSHOT_VERSION in src/vmm/src/persist.rs.
var formats = []struct{ since, format string }{
	{"1.16.0", "10.0.0"},
	{"1.15.0", "9.0.0"},
	{"1.13.0", "8.0.0"},
	{"1.12.0", "6.0.0"},
	{"1.11.0", "5.0.0"},
	{"1.10.1", "4.0.0"},
	{"1.10.0", "3.0.0"},
}

func formatOf(v api.Version) string {
	for _, f := range formats {
		if known(v, []string{f.since}) {
			return f.format
		}
	}
	return "0.0.0"
}

// createSnapshot writes the device state, and then memory.
func (m *machine) createSnapshot(v map[string]any) outcome {
	if m.state != api.Paused {
		return refuse("Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running")
	}
	if m.vsock != nil {
		m.vsock.reset()
	}
	if step, err := m.writeState(v["snapshot_path"].(string)); err != nil {
		return refuse("Create snapshot error: Cannot perform %s on the snapshot backing file: %s", step, osError(err))
	}
	diff := v["snapshot_type"] == "Diff"
	if step, err := m.writeMemory(v["mem_file_path"].(string), diff); err != nil {
		return refuse("Create snapshot error: Cannot perform %s on the memory backing file: %s", step, osError(err))
	}
	if diff && m.config["track_dirty_pages"] != true && !known(m.s.version, []string{"1.13.0"}) {
		return refuse("Create snapshot error: Cannot get dirty bitmap: No such file or directory (os error 2)")
	}
	return outcome{}
}

func (m *machine) writeState(path string) (step string, err error) {
	content := state{
		Format: formatOf(m.s.version), Config: m.filled(), Drives: m.drives, Pmem: m.pmem, Networks: m.networks, Entropy: m.entropy,
	}
	if m.vsock != nil {
		content.VsockCID, content.Vsock = m.vsock.cid, m.vsock.path
	}
	data, err := json.Marshal(content)
	if err != nil {
		panic(err)
	}
	data = append([]byte(stateMagic), data...)
	data = append(data, bytes.Repeat([]byte("\n"), max(0, stateSize-len(data)))...)
	data = binary.LittleEndian.AppendUint64(data, checksum(data))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return "open", err
	}
	_, err = f.Write(data)
	if closed := f.Close(); err == nil {
		err = closed
	}
	return "flush", err
}

// memory is the size of guest memory, bytes.
func (m *machine) memory() int64 {
	return int64(m.config["mem_size_mib"].(uint64)) << 20
}

func (m *machine) writeMemory(path string, diff bool) (step string, err error) {
	_, missing := os.Stat(path)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return "open", err
	}
	defer f.Close() //nolint:errcheck // nothing is buffered
	info, err := f.Stat()
	if err != nil {
		return "get_metadata", err
	}
	if !errors.Is(missing, fs.ErrNotExist) && info.Size() != m.memory() {
		if err = f.Truncate(0); err != nil {
			return "truncate", err
		}
	}
	if err = f.Truncate(m.memory()); err != nil {
		return "set_length", err
	}
	if m.s.cfg.Dump != nil {
		return "flush", m.s.cfg.Dump(f, diff)
	}
	return "", nil
}

// loadSnapshot looks at the files of a snapshot, and has its devices. When it
// fails for any reason but that it came too late, the process ends.
func (m *machine) loadSnapshot(v map[string]any) outcome {
	const parse = "An error occurred when deserializing the json body of a request: "
	backend, _ := v["mem_backend"].(map[string]any)
	file, isFile := v["mem_file_path"].(string)
	switch {
	case backend != nil && isFile:
		return refuse(parse + "too many fields: either `mem_backend` or `mem_file_path` exclusively is required.")
	case backend == nil && !isFile:
		return refuse(parse + "missing field: either `mem_backend` or `mem_file_path` is required.")
	case backend != nil:
		file = backend["backend_path"].(string)
	}
	o := outcome{deprecated: isFile || v["enable_diff_snapshots"] == true}
	switch {
	case m.state != api.NotStarted:
		o.fault = postBoot
		return o
	case m.boot:
		o.fault = "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
		return o
	}
	if err := m.load(v, file, backend != nil && backend["backend_type"] == "Uffd"); err != nil {
		o.fault, o.fatal = "Load snapshot error: Failed to restore from snapshot: "+err.Error(), true
		return o
	}
	if v["resume_vm"] == true {
		m.setState(api.Running)
	} else {
		m.setState(api.Paused)
	}
	return o
}

func (m *machine) load(v map[string]any, memory string, uffd bool) error {
	st, err := m.readState(v["snapshot_path"].(string))
	if err != nil {
		return faultf("Failed to get snapshot state from file: %v", err)
	}
	overrides, _ := v["network_overrides"].([]map[string]any)
	for _, o := range overrides {
		n, ok := st.Networks[o["iface_id"].(string)]
		if !ok {
			return faultf("Failed to get snapshot state from file: Unknown Network Device.")
		}
		n["host_dev_name"] = o["host_dev_name"]
	}
	if o, ok := v["vsock_override"].(map[string]any); ok {
		if st.Vsock == "" {
			return faultf("Failed to get snapshot state from file: Unknown Vsock Device.")
		}
		st.Vsock = o["uds_path"].(string)
	}
	st.Config["track_dirty_pages"] = v["track_dirty_pages"] == true || v["enable_diff_snapshots"] == true
	for _, number := range []string{"vcpu_count", "mem_size_mib"} {
		st.Config[number] = uint64(st.Config[number].(float64))
	}
	m.config, m.drives, m.pmem, m.networks, m.entropy = st.Config, st.Drives, st.Pmem, st.Networks, st.Entropy
	if uffd {
		return faultf("Failed to load guest memory: Error creating guest memory from uffd: apitest has none")
	}
	if err = m.mapMemory(memory); err != nil {
		return faultf("Failed to load guest memory: Error creating guest memory from file: %v", err)
	}
	if err = m.openKVM(); err != nil {
		return faultf("Failed to build microVM from snapshot: Failed to create Vm: %v", err)
	}
	return m.loadDevices(st)
}

// readState reads what writeState has written.
func (m *machine) readState(path string) (state, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return state{}, faultf("Failed to open snapshot file: %s", osError(err))
	}
	if !known(m.s.version, []string{"1.14.0"}) {
		if _, err := os.Stat(path); err != nil { // by its name, whoever opened it
			return state{}, faultf("Failed to read snapshot file metadata: %s", osError(err))
		}
	}
	const load = "Failed to load snapshot state from file: "
	if len(data) < 8 { // the checksum's size
		if known(m.s.version, []string{"1.14.0"}) {
			return state{}, faultf(load + "IO Error: File too short to contain CRC")
		}
		return state{}, faultf(load + "Snapshot file is smaller than CRC length.")
	}
	var st state
	text, ok := bytes.CutPrefix(data[:len(data)-8], []byte(stateMagic))
	if !ok || json.Unmarshal(text, &st) != nil {
		return state{}, faultf(load + "An error occurred during bitcode serialization: bitcode error")
	}
	if format := formatOf(m.s.version); st.Format != format {
		return state{}, faultf("%sInvalid data version: %s", load, st.Format)
	}
	if checksum(data) != 0 { // it comes last there, too
		return state{}, faultf(load + "CRC64 validation failed")
	}
	return st, nil
}

// mapMemory maps the file as guest memory, and opens KVM's device then.
func (m *machine) mapMemory(path string) error {
	if m.config["huge_pages"] == "2M" {
		return faultf("Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd.")
	}
	f, err := os.Open(path)
	if err != nil {
		return faultf("Failed to load guest memory: %s", osError(err))
	}
	defer f.Close() //nolint:errcheck // it was only read
	info, err := f.Stat()
	if err != nil {
		return faultf("Failed to load guest memory: %s", osError(err))
	}
	if info.Size() < m.memory() {
		return faultf("Failed to restore guest memory: Total sum of memory regions exceeds largest possible file offset")
	}
	m.mapped, err = unix.Mmap(int(f.Fd()), 0, int(m.memory()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		return faultf("Failed to load guest memory: %s", osError(err))
	}
	return nil
}

// openKVM opens KVM's device, as the machine is made.
func (m *machine) openKVM() error {
	if m.s.cfg.KVM == "" {
		return nil
	}
	if err := open(m.s.cfg.KVM, os.O_RDWR); err != nil {
		return faultf("Error creating KVM object: %s Make sure the user launching the firecracker process is configured on the /dev/kvm file's ACL.", osError(err))
	}
	return nil
}

// loadDevices opens the files of devices and makes the socket.
func (m *machine) loadDevices(st state) error {
	const build = "Failed to build microVM from snapshot: "
	for _, d := range m.drives {
		if o := openDrive(d["path_on_host"].(string), d["is_read_only"] == true); o.fault != "" {
			return faultf("%s%s%s", build, "Failed to restore devices: Error restoring MMIO devices: Block: ", o.fault)
		}
	}
	for _, p := range m.pmem {
		if fault := openPmem(p); fault != "" {
			return faultf("%s%s%s", build, "Failed to restore devices: Error restoring MMIO devices: Pmem: ", fault)
		}
	}
	if st.Vsock == "" {
		return nil
	}
	device, fault := newVsock(m.s, st.VsockCID, st.Vsock)
	if fault != "" {
		return faultf("%s%s%s", build, "Failed to restore devices: Error restoring MMIO devices: VsockUnixBackend: Error binding to the host-side Unix socket: ", fault)
	}
	m.vsock = device
	return nil
}
