package apitest

// The structures of Firecracker's requests, in the order of their fields there,
// which errors list: src/vmm/src/vmm_config and src/vmm/src/logger/logging.rs.

var (
	str  = text("a string")
	path = text("path string")
	u8   = unsigned("u8", 8)
	u16  = unsigned("u16", 16)
	u32  = unsigned("u32", 32)
	u64  = unsigned("u64", 64)
	size = unsigned("usize", 64)
)

// opt is a field of type Option: it may be left out, or be null.
func opt(name string, k kind, since ...string) field {
	return field{name, k, true, true, since}
}

// def is a field with a default: it may be left out, and not be null.
func def(name string, k kind, since ...string) field {
	return field{name, k, true, false, since}
}

func req(name string, k kind) field { return field{name: name, kind: k} }

var bucket = schema{"TokenBucketConfig", []field{req("size", u64), opt("one_time_burst", u64), req("refill_time", u64)}, true}

var limiter = within(schema{"RateLimiterConfig", []field{opt("bandwidth", within(bucket)), opt("ops", within(bucket))}, false})

var cpuTemplate = variant("C3", "T2", "T2S", "None", "T2CL", "T2A")

var machineConfig = schema{"MachineConfig", []field{
	req("vcpu_count", u8), req("mem_size_mib", size), def("smt", boolean),
	opt("cpu_template", cpuTemplate), def("track_dirty_pages", boolean), def("huge_pages", variant("None", "2M")),
}, false}

var bootSource = schema{"BootSourceConfig", []field{
	req("kernel_image_path", str), opt("initrd_path", str), opt("boot_args", str),
}, false}

// cpuConfig is not looked into.
var cpuConfig = schema{"CustomCpuTemplate", []field{
	def("kvm_capabilities", anything), def("cpuid_modifiers", anything), def("msr_modifiers", anything),
}, false}

var drive = schema{"BlockDeviceConfig", []field{
	req("drive_id", str), opt("partuuid", str), req("is_root_device", boolean),
	def("cache_type", variant("Unsafe", "Writeback")), opt("is_read_only", boolean), opt("path_on_host", str),
	opt("rate_limiter", limiter), opt("io_engine", variant("Async", "Sync")), opt("socket", str),
}, false}

var driveUpdate = schema{"BlockDeviceUpdateConfig", []field{
	req("drive_id", str), opt("path_on_host", str), opt("rate_limiter", limiter),
}, false}

var pmem = schema{"PmemConfig", []field{
	req("id", str), req("path_on_host", str), def("root_device", boolean), def("read_only", boolean),
	opt("rate_limiter", limiter, "1.16.0"),
}, false}

var network = schema{"NetworkInterfaceConfig", []field{
	req("iface_id", str), req("host_dev_name", str), opt("guest_mac", mac), opt("mtu", u16, "1.16.0"),
	opt("rx_rate_limiter", limiter), opt("tx_rate_limiter", limiter),
}, false}

var vsock = schema{"VsockDeviceConfig", []field{opt("vsock_id", str), req("guest_cid", u32), req("uds_path", str)}, false}

var entropy = schema{"EntropyDeviceConfig", []field{opt("rate_limiter", limiter)}, false}

var serial = schema{"SerialConfig", []field{
	opt("serial_out_path", path), opt("rate_limiter", within(bucket), "1.16.0"),
}, false}

var logger = schema{"LoggerConfig", []field{
	opt("log_path", path), opt("level", level), opt("show_level", boolean), opt("show_log_origin", boolean), opt("module", str),
}, false}

var metrics = schema{"MetricsConfig", []field{req("metrics_path", path)}, false}

var action = schema{"ActionBody", []field{req("action_type", variant("FlushMetrics", "InstanceStart", "SendCtrlAltDel"))}, false}

var vmState = schema{"Vm", []field{req("state", variant("Paused", "Resumed"))}, false}

var snapshotCreate = schema{"CreateSnapshotParams", []field{
	def("snapshot_type", variant("Diff", "Full")), req("snapshot_path", path), req("mem_file_path", path),
}, false}

var snapshotLoad = schema{"LoadSnapshotConfig", []field{
	req("snapshot_path", path), opt("mem_file_path", path),
	opt("mem_backend", within(schema{"MemBackendConfig", []field{
		req("backend_path", path), req("backend_type", variant("File", "Uffd")),
	}, false})),
	def("enable_diff_snapshots", boolean), def("track_dirty_pages", boolean, "1.13.0"), def("resume_vm", boolean),
	def("network_overrides", listOf(schema{"NetworkOverride", []field{req("iface_id", str), req("host_dev_name", str)}, true}), "1.12.0"),
	opt("vsock_override", within(schema{"VsockOverride", []field{req("uds_path", str)}, true}), "1.16.0"),
	def("clock_realtime", boolean, "1.16.0", "1.15.1", "1.14.4"),
}, false}
