package metrics

import "github.com/prometheus/client_golang/prometheus"

// sampler says a Sample as gauges.
type sampler struct {
	version string
	sample  Sample
}

// Describe says nothing: what there is depends on the sample.
func (s *sampler) Describe(chan<- *prometheus.Desc) {}

// Collect says the sample. forkd's gauges have its names and words, and ours
// beside them.
func (s *sampler) Collect(out chan<- prometheus.Metric) {
	all := 0
	for state, n := range s.sample.Sandboxes {
		all += n
		gauge(out, "tine_sandboxes", "Number of sandboxes, by state.", float64(n), "state", state)
	}
	for _, prefix := range []string{"forkd", "tine"} {
		gauge(out, prefix+"_snapshots_total", "Number of snapshots known to the controller.", float64(s.sample.Snapshots))
		gauge(out, prefix+"_sandboxes_active", "Number of active sandboxes (child VMs).", float64(all))
		gauge(out, prefix+"_branches_in_flight", "Number of BRANCH operations currently writing memory.bin.", float64(s.sample.Branches))
		gauge(out, prefix+"_branch_concurrency_cap", "Configured maximum concurrent BRANCH operations.", float64(s.sample.BranchCap))
		gauge(out, prefix+"_build_info", "Build version of the controller binary.", 1, "version", s.version)
	}
	gauge(out, "tine_sandbox_memory_private_bytes", "Memory that vanishes with its sandbox, summed over those measured.", float64(s.sample.Private))
	gauge(out, "tine_sandbox_memory_shared_bytes", "Memory that a sandbox shares with others or the page cache, summed over those measured.", float64(s.sample.Shared))
	gauge(out, "tine_sandbox_memory_measured", "Number of sandboxes whose memory was measured.", float64(s.sample.Measured))
	gauge(out, "tine_sandbox_memory_charged_bytes", "Memory that counts against the limits of sandboxes, summed over those counted.", float64(s.sample.Charged))
	gauge(out, "tine_sandbox_memory_charged", "Number of sandboxes whose memory is counted in tine_sandbox_memory_charged_bytes.", float64(s.sample.Charges))
	s.net(out)
	for _, p := range s.sample.Pools {
		gauge(out, "tine_pool_ready", "Number of warm forks that are parked.", float64(p.Ready), "snapshot", p.Snapshot)
		gauge(out, "tine_pool_want", "Number of warm forks that are to be parked.", float64(p.Want), "snapshot", p.Snapshot)
	}
}

func (s *sampler) net(out chan<- prometheus.Metric) {
	n := s.sample.Net
	gauge(out, "tine_egress_networks", "Number of machines that have a network now.", float64(n.Networks))
	gauge(out, "tine_egress_connections", "Number of connections and UDP flows of sandboxes that are open.", float64(n.Connections))
	total(out, "tine_egress_bytes_total", "Bytes of payload that sandboxes have sent (up) and got (down).", float64(n.BytesUp), "direction", "up")
	total(out, "tine_egress_bytes_total", "Bytes of payload that sandboxes have sent (up) and got (down).", float64(n.BytesDown), "direction", "down")
	total(out, "tine_egress_denied_total", "Connections, datagrams and names of sandboxes that were denied.", float64(n.Denied))
}

// gauge sends one value; labels are a name and a value, or nothing.
func gauge(out chan<- prometheus.Metric, name, help string, value float64, labels ...string) {
	send(out, prometheus.GaugeValue, name, help, value, labels)
}

// total is gauge for what never falls.
func total(out chan<- prometheus.Metric, name, help string, value float64, labels ...string) {
	send(out, prometheus.CounterValue, name, help, value, labels)
}

func send(out chan<- prometheus.Metric, kind prometheus.ValueType, name, help string, value float64, labels []string) {
	var names, values []string
	for i := 0; i+1 < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	m, err := prometheus.NewConstMetric(prometheus.NewDesc(name, help, names, nil), kind, value, values...)
	if err != nil { // a value that is not UTF-8: Gather tells of it
		m = prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(err), err)
	}
	out <- m
}
