package api

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/metrics"
	"github.com/tinevm/tine/internal/publish"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/wire"
)

const (
	// sampleAge is how old a sample may be: many scrapers cost as much as one.
	sampleAge = 5 * time.Second
	// sampleTime bounds how long sandboxes are measured for a sample.
	sampleTime = time.Second
)

// Observe returns what Events are to be observed with so that m counts them, and
// what ports, which may be nil, have published for a sandbox ends with it.
func Observe(m *metrics.Metrics, ports *publish.Ports) func(sandbox.Event) {
	return func(e sandbox.Event) {
		m.Event(string(e.Type))
		if ports != nil && (e.Type == sandbox.Removed || e.Type == sandbox.Died) {
			ports.End(e.Sandbox)
		}
		took := millisOf(e.Data.TookMS)
		switch {
		case e.Type == sandbox.OutOfMemory:
			m.OutOfMemory()
		case e.Type == sandbox.Created:
			m.Fork(e.Data.FromPool, took)
		case e.Type == sandbox.Branched:
			m.Branch(e.Data.Mode, millisOf(e.Data.PauseMS), took)
		case e.Type == sandbox.SnapshotCreated && e.Data.TookMS > 0:
			m.Snapshot(took)
		}
	}
}

func millisOf(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }

// metricsText is the answer to getMetrics.
type metricsText struct{ body []byte }

// VisitGetMetricsResponse writes it.
func (t metricsText) VisitGetMetricsResponse(w http.ResponseWriter) error {
	w.Header().Set("Content-Type", metrics.ContentType)
	_, err := w.Write(t.body)
	return err
}

// GetMetrics answers GET /metrics.
func (s *server) GetMetrics(ctx context.Context, _ wire.GetMetricsRequestObject) (wire.GetMetricsResponseObject, error) {
	sample, err := s.sample.get(ctx, s.look)
	if err != nil {
		return nil, err
	}
	var text bytes.Buffer
	if err = s.Metrics.Write(&text, sample); err != nil {
		return nil, err
	}
	return metricsText{text.Bytes()}, nil
}

// lastSample is the last look at the daemon. One is taken at a time, and who
// comes meanwhile waits for it.
type lastSample struct {
	mu sync.Mutex
	at time.Time
	metrics.Sample
}

func (l *lastSample) get(ctx context.Context, look func(context.Context) (metrics.Sample, error)) (metrics.Sample, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.at) < sampleAge {
		return l.Sample, nil
	}
	sample, err := look(ctx)
	if err != nil {
		return sample, err
	}
	l.Sample, l.at = sample, time.Now()
	return sample, nil
}

// look takes a sample. Sandboxes that there is no time to measure are only
// counted.
func (s *server) look(context.Context) (metrics.Sample, error) {
	snaps, err := s.snapshots()
	if err != nil {
		return metrics.Sample{}, err
	}
	sample := metrics.Sample{Snapshots: len(snaps), Sandboxes: map[string]int{
		string(sandbox.Running): 0, string(sandbox.Suspended): 0, string(sandbox.Dead): 0,
	}}
	deadline := time.Now().Add(sampleTime)
	counts := true // this host does
	for _, box := range s.Sandboxes.List() {
		sample.Sandboxes[string(box.State)]++
		if box.State != sandbox.Running || time.Now().After(deadline) {
			continue
		}
		if private, shared, err := s.Sandboxes.Memory(box.ID); err == nil { // else it has just ended
			sample.Private, sample.Shared, sample.Measured = sample.Private+private, sample.Shared+shared, sample.Measured+1
		}
		if !counts {
			continue
		}
		usage, err := s.Sandboxes.Usage(box.ID)
		if counts = !errors.Is(err, errdef.ErrUnsupported); err == nil {
			sample.Charged, sample.Charges = sample.Charged+usage.MemoryBytes, sample.Charges+1
		}
	}
	if s.Load == nil {
		return sample, nil
	}
	load := s.Load()
	sample.Branches, sample.BranchCap = load.Branches, load.BranchCap
	sample.Net = metrics.Net{
		Networks: int64(load.Net.Networks), Connections: load.Net.Connections,
		BytesUp: load.Net.BytesUp, BytesDown: load.Net.BytesDown, Denied: load.Net.Denied,
	}
	for _, p := range load.Pools {
		sample.Pools = append(sample.Pools, metrics.Pool{Snapshot: p.Snapshot, Ready: p.Ready, Want: p.Want})
	}
	return sample, nil
}

// timed notes how long commands and code took.
func (s *server) timed(next wire.StrictHandlerFunc, operation string) wire.StrictHandlerFunc {
	verbs := map[string]string{"ExecSandbox": "exec", "EvalSandbox": "eval"}
	verb, ok := verbs[operation]
	if !ok {
		return next
	}
	return func(ctx context.Context, w http.ResponseWriter, r *http.Request, request any) (any, error) {
		start := time.Now()
		response, err := next(ctx, w, r, request)
		if _, later := response.(execEvents); err == nil && !later {
			s.Metrics.Exec(verb, time.Since(start))
		}
		return response, err
	}
}

// recorderOf finds the recorder that w writes to, or nil.
func recorderOf(w http.ResponseWriter) *recorder {
	for {
		switch x := w.(type) {
		case *recorder:
			return x
		case interface{ Unwrap() http.ResponseWriter }:
			w = x.Unwrap()
		default:
			return nil
		}
	}
}

// noteFailure leaves the code of a failure for count.
func noteFailure(w http.ResponseWriter, code string) {
	if rec := recorderOf(w); rec != nil {
		rec.code = code
	}
}

// noteRoute leaves the pattern of a request's route for count.
func noteRoute(w http.ResponseWriter, pattern string) {
	if rec := recorderOf(w); rec != nil {
		rec.route = pattern
	}
}

// noteStream says that an answer lasts as long as its client wants it to.
func noteStream(w http.ResponseWriter) {
	if rec := recorderOf(w); rec != nil {
		rec.stream = true
	}
}

// count notes a request that has been answered.
func (s *server) count(rec *recorder, r *http.Request, took time.Duration) {
	if rec.code != "" && r.Context().Err() == nil { // nobody fails for a client that has left
		s.Metrics.Failure(rec.code)
	}
	if rec.stream || rec.status == 0 { // a WebSocket has taken the connection over
		return
	}
	s.Metrics.Request(r.Method, routeOf(rec.route), rec.status, took)
}

// routeOf is a pattern's path, or "none" where there was no route.
func routeOf(pattern string) string {
	_, path, ok := strings.Cut(pattern, " ")
	if !ok {
		return cmp.Or(pattern, "none")
	}
	return path
}

// see makes what the daemon is watched by.
func (s *server) see() {
	if s.Metrics == nil {
		s.Metrics = metrics.New(s.Version)
	}
	if s.Events == nil {
		s.Events = NewEvents(nil)
	}
	s.Snapshots = telling{s.Snapshots, s.Events}
	s.logger = slog.New(WithRequestIDs(s.logger.Handler()))
	s.keys = newKeys(maxKeys, maxKept)
	s.followers = make(chan struct{}, maxFollowers)
}
