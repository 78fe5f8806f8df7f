package metrics_test

import (
	"bytes"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/metrics"
)

func text(t *testing.T, m *metrics.Metrics, s metrics.Sample) string {
	t.Helper()
	var b bytes.Buffer
	if err := m.Write(&b, s); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestForkd sees that forkd's gauges have its names, words and values.
func TestForkd(t *testing.T) {
	t.Parallel()
	got := text(t, metrics.New("1.2.3"), metrics.Sample{
		Snapshots: 3, Sandboxes: map[string]int{"running": 2, "suspended": 1}, Branches: 1, BranchCap: 4,
	})
	for _, want := range []string{
		"# HELP forkd_snapshots_total Number of snapshots known to the controller.\n# TYPE forkd_snapshots_total gauge\nforkd_snapshots_total 3\n",
		"# HELP forkd_sandboxes_active Number of active sandboxes (child VMs).\n# TYPE forkd_sandboxes_active gauge\nforkd_sandboxes_active 3\n",
		"# HELP forkd_branches_in_flight Number of BRANCH operations currently writing memory.bin.\n# TYPE forkd_branches_in_flight gauge\nforkd_branches_in_flight 1\n",
		"# HELP forkd_branch_concurrency_cap Configured maximum concurrent BRANCH operations.\n# TYPE forkd_branch_concurrency_cap gauge\nforkd_branch_concurrency_cap 4\n",
		"# HELP forkd_build_info Build version of the controller binary.\n# TYPE forkd_build_info gauge\nforkd_build_info{version=\"1.2.3\"} 1\n",
		"\ntine_snapshots_total 3\n", "\ntine_sandboxes_active 3\n", "\ntine_branches_in_flight 1\n",
		"\ntine_branch_concurrency_cap 4\n", "\ntine_build_info{version=\"1.2.3\"} 1\n",
		"\ntine_sandboxes{state=\"running\"} 2\n", "\ntine_sandboxes{state=\"suspended\"} 1\n",
	} {
		if !strings.Contains("\n"+got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
}

func TestCounted(t *testing.T) {
	t.Parallel()
	m := metrics.New("dev")
	m.Fork(true, time.Millisecond)
	m.Fork(false, 80*time.Millisecond)
	m.Exec("exec", time.Second)
	m.Snapshot(3 * time.Second)
	m.Branch("live", 2*time.Millisecond, time.Second)
	m.Request("GET", "/v1/sandboxes/{id}", 404, time.Millisecond)
	m.Request("BREW", "none", 405, time.Millisecond)
	m.Failure("not_found")
	m.Event("created")
	m.Run("deterministic", "ok")
	m.Verified("mismatch")
	m.StreamOpened()
	m.OutOfMemory()
	got := text(t, m, metrics.Sample{
		Private: 5, Shared: 7, Measured: 1, Pools: []metrics.Pool{{Snapshot: "py", Ready: 1, Want: 2}},
		Charged: 9, Charges: 1, Net: metrics.Net{Networks: 3, Connections: 4, BytesUp: 5, BytesDown: 6, Denied: 7},
	})
	for _, want := range []string{
		`tine_fork_seconds_count{source="pool"} 1`, `tine_fork_seconds_bucket{source="restore",le="0.1"} 1`,
		`tine_exec_seconds_count{verb="exec"} 1`, `tine_snapshot_create_seconds_count 1`,
		`tine_branch_pause_seconds_count{mode="live"} 1`, `tine_branch_seconds_count{mode="live"} 1`,
		`tine_http_request_seconds_count{method="GET",route="/v1/sandboxes/{id}",status="4xx"} 1`,
		`tine_http_request_seconds_count{method="other",route="none",status="4xx"} 1`,
		`tine_failures_total{cause="not_found"} 1`, `tine_events_total{type="created"} 1`, `tine_event_streams 1`,
		`tine_runs_total{mode="deterministic",outcome="ok"} 1`, `tine_verifications_total{result="mismatch"} 1`,
		`tine_sandbox_memory_private_bytes 5`, `tine_sandbox_memory_shared_bytes 7`,
		`tine_sandbox_oom_total 1`, `tine_sandbox_memory_charged_bytes 9`, `tine_sandbox_memory_charged 1`,
		`tine_egress_networks 3`, `tine_egress_connections 4`, `tine_egress_bytes_total{direction="up"} 5`,
		`tine_egress_bytes_total{direction="down"} 6`, `tine_egress_denied_total 7`,
		`tine_pool_ready{snapshot="py"} 1`, `tine_pool_want{snapshot="py"} 2`,
	} {
		if !strings.Contains(got, want+"\n") {
			t.Errorf("no %q", want)
		}
	}
}

// TestTwo sees that two daemons of one process do not share a registry.
func TestTwo(t *testing.T) {
	t.Parallel()
	a, b := metrics.New("a"), metrics.New("b")
	a.Failure("denied")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { _ = a.Write(&bytes.Buffer{}, metrics.Sample{}) })
	}
	wg.Wait()
	if strings.Contains(text(t, b, metrics.Sample{}), `cause="denied"`) {
		t.Error("b has counted what a did")
	}
}
