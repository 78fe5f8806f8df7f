// Package metrics counts what a daemon does and says it as Prometheus text.
//
// Each Metrics has a registry of its own, never the default one. What can be
// counted when it happens is; what only a look at the daemon can tell comes
// with each Write, as a Sample. Labels have few values: routes are patterns,
// causes are errdef's codes, and snapshots are those with a pool. The package
// knows nothing of sandboxes or of HTTP.
package metrics

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/common/expfmt"
)

// ContentType is that of what Write writes.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// quick are the bounds, in seconds, of what should take milliseconds; slow of
// what boots a machine or writes its memory.
func quick() []float64 {
	return []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
}

func slow() []float64 {
	return []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300}
}

// Metrics counts. It is safe for concurrent use.
type Metrics struct {
	version  string
	registry *prometheus.Registry

	fork     *prometheus.HistogramVec
	exec     *prometheus.HistogramVec
	snapshot prometheus.Histogram
	pause    *prometheus.HistogramVec
	branch   *prometheus.HistogramVec
	requests *prometheus.HistogramVec
	failures *prometheus.CounterVec
	events   *prometheus.CounterVec
	runs     *prometheus.CounterVec
	verified *prometheus.CounterVec
	streams  prometheus.Gauge
	oom      prometheus.Counter
}

// New returns Metrics of a daemon of this version.
func New(version string) *Metrics {
	m := &Metrics{
		version:  version,
		registry: prometheus.NewRegistry(),
		fork:     histogram("tine_fork_seconds", "Time from the request to a confirmed, unique guest.", quick(), "source"),
		exec:     histogram("tine_exec_seconds", "Time that commands (exec) and code (eval) took, as their callers saw it.", slow(), "verb"),
		snapshot: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tine_snapshot_create_seconds", Help: "Time to boot, warm up and freeze a template.", Buckets: slow(),
		}),
		pause:    histogram("tine_branch_pause_seconds", "Time that a sandbox stood still for a branch.", quick(), "mode"),
		branch:   histogram("tine_branch_seconds", "Time of a branch, until its snapshot is ready.", slow(), "mode"),
		requests: histogram("tine_http_request_seconds", "Time to answer a request; streams are left out.", quick(), "method", "route", "status"),
		failures: counter("tine_failures_total", "Requests that failed, by the code of the failure.", "cause"),
		events:   counter("tine_events_total", "Events in the life of sandboxes and snapshots.", "type"),
		runs:     counter("tine_runs_total", "Runs for the record, by mode and what they came to.", "mode", "outcome"),
		verified: counter("tine_verifications_total", "Records that were verified, by result.", "result"),
		streams:  prometheus.NewGauge(prometheus.GaugeOpts{Name: "tine_event_streams", Help: "Clients that follow the events."}),
		oom: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "tine_sandbox_oom_total", Help: "Sandboxes that ended because they went over their memory limit.",
		}),
	}
	m.registry.MustRegister(m.fork, m.exec, m.snapshot, m.pause, m.branch, m.requests, m.failures, m.events, m.runs, m.verified, m.streams, m.oom,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func histogram(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
}

// Fork notes a fork; parked says that it came from a pool.
func (m *Metrics) Fork(parked bool, took time.Duration) {
	source := "restore"
	if parked {
		source = "pool"
	}
	m.fork.WithLabelValues(source).Observe(took.Seconds())
}

// Exec notes a call of a verb, exec or eval, that reached its guest.
func (m *Metrics) Exec(verb string, took time.Duration) {
	m.exec.WithLabelValues(verb).Observe(took.Seconds())
}

// Snapshot notes a template that was made.
func (m *Metrics) Snapshot(took time.Duration) { m.snapshot.Observe(took.Seconds()) }

// Branch notes a branch: how long the sandbox stood still, and all of it.
func (m *Metrics) Branch(mode string, pause, took time.Duration) {
	m.pause.WithLabelValues(mode).Observe(pause.Seconds())
	m.branch.WithLabelValues(mode).Observe(took.Seconds())
}

// Request notes an answer. The route must be a pattern, not a path.
func (m *Metrics) Request(method, route string, status int, took time.Duration) {
	m.requests.WithLabelValues(knownMethod(method), route, strconv.Itoa(status/100)+"xx").Observe(took.Seconds())
}

// knownMethod keeps what a client makes up out of the labels.
func knownMethod(method string) string {
	switch method {
	case "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS":
		return method
	}
	return "other"
}

// Failure notes a request that failed.
func (m *Metrics) Failure(code string) { m.failures.WithLabelValues(code).Inc() }

// Event notes an event of a type.
func (m *Metrics) Event(kind string) { m.events.WithLabelValues(kind).Inc() }

// OutOfMemory notes a sandbox that went over its memory limit.
func (m *Metrics) OutOfMemory() { m.oom.Inc() }

// Run notes a run for the record. Both words are of few.
func (m *Metrics) Run(mode, outcome string) { m.runs.WithLabelValues(mode, outcome).Inc() }

// Verified notes a record that was verified.
func (m *Metrics) Verified(result string) { m.verified.WithLabelValues(result).Inc() }

// StreamOpened and StreamClosed note a client that follows the events.
func (m *Metrics) StreamOpened() { m.streams.Inc() }

// StreamClosed notes that it has left.
func (m *Metrics) StreamClosed() { m.streams.Dec() }

// Sample is what one look at the daemon tells.
type Sample struct {
	// Snapshots is how many there are.
	Snapshots int
	// Sandboxes is how many there are, by state.
	Sandboxes map[string]int
	// Private and Shared are bytes of memory, summed over Measured sandboxes.
	Private, Shared int64
	Measured        int
	// Charged is what counts against the memory limits, summed over Charges
	// sandboxes. Charges is 0 where the host does not count.
	Charged int64
	Charges int
	// Branches is how many are under way, of BranchCap.
	Branches, BranchCap int
	Pools               []Pool
	Net                 Net
}

// Net is what sandboxes' networks carry, and have carried since the daemon
// started.
type Net struct {
	Networks, Connections      int64 // now
	BytesUp, BytesDown, Denied uint64
}

// Pool is a snapshot's.
type Pool struct {
	Snapshot    string
	Ready, Want int
}

// Write writes all that was counted, and s.
func (m *Metrics) Write(w io.Writer, s Sample) error {
	now := prometheus.NewRegistry()
	if err := now.Register(&sampler{m.version, s}); err != nil {
		return fmt.Errorf("sample metrics: %w", err)
	}
	families, err := prometheus.Gatherers{m.registry, now}.Gather()
	if err != nil {
		return fmt.Errorf("gather metrics: %w", err)
	}
	enc := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	var errs []error
	for _, family := range families {
		errs = append(errs, enc.Encode(family))
	}
	return errors.Join(errs...)
}
