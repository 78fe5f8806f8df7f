package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/client"
	"github.com/tinevm/tine/internal/audit"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/vmm/fake"
)

// docs/bench.md says how to run these, and what they have measured.

// benched serves a daemon on the socket in its state directory. It ends with
// the benchmark, and so do its sandboxes.
func benched(b *testing.B, cfg Config) (*Daemon, *client.Client) {
	b.Helper()
	d, err := Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	late := context.WithoutCancel(b.Context())
	b.Cleanup(func() {
		for _, info := range d.Sandboxes.List() {
			if killErr := d.Sandboxes.Kill(late, info.ID); killErr != nil {
				b.Error(killErr)
			}
		}
		if closeErr := d.Close(late); closeErr != nil {
			b.Error(closeErr)
		}
	})
	socket := filepath.Join(cfg.StateDir, "tine.sock")
	listeners, err := d.Listen(b.Context(), Addresses{Socket: socket})
	if err != nil {
		b.Fatal(err)
	}
	c, err := client.New(client.Config{Socket: socket})
	if err != nil {
		b.Fatal(err)
	}
	ctx, stop := context.WithCancel(late)
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listeners...) }()
	b.Cleanup(func() {
		c.Close()
		stop()
		if serveErr := <-served; serveErr != nil {
			b.Error(serveErr)
		}
	})
	return d, c
}

// benchedFake has n sandboxes that are no machines.
func benchedFake(b *testing.B, n int, memory AuditConfig) (*Daemon, *client.Client) {
	b.Helper()
	d, c := benched(b, Config{StateDir: stateDir(b), Engine: fake.New(), Audit: memory})
	template(b, d)
	fork(b, d, n)
	return d, c
}

// auditWay is a way to remember what is done.
type auditWay struct {
	name string
	AuditConfig
}

func audits() []auditWay {
	return []auditWay{
		{"none", AuditConfig{Off: true}},
		{"interval", AuditConfig{Sync: audit.SyncInterval}},
		{"always", AuditConfig{Sync: audit.SyncAlways}},
	}
}

// BenchmarkExecFake is BenchmarkVMExec where no machine takes its time: the
// command is run by an agent in this process.
func BenchmarkExecFake(b *testing.B) {
	for _, way := range audits() {
		b.Run("audit="+way.name, func(b *testing.B) {
			d, c := benchedFake(b, 1, way.AuditConfig)
			compareExec(b, d, c)
		})
	}
}

// compareExec runs /bin/true over HTTP and, by turns, by the agent alone.
func compareExec(b *testing.B, d *Daemon, c *client.Client) {
	b.Helper()
	id := d.Sandboxes.List()[0].ID
	argv := []string{"/bin/true"}
	overHTTP := func() error {
		r, err := c.Exec(b.Context(), id, client.ExecRequest{Args: argv})
		return errors.Join(err, succeeded(int(r.ExitCode)))
	}
	alone := func() error {
		return d.Sandboxes.With(b.Context(), id, func(ctx context.Context, g *guest.Client) error {
			r, err := g.Run(ctx, guest.ExecSpec{Argv: argv, Timeout: 30 * time.Second}, nil, 1<<20)
			return errors.Join(err, succeeded(r.Exit.Code))
		})
	}
	for range 10 { // what runs for the first time is not what is measured
		timed(b, overHTTP)
		timed(b, alone)
	}
	var daemons, agents []time.Duration
	for b.Loop() {
		daemons = append(daemons, timed(b, overHTTP))
		agents = append(agents, timed(b, alone))
	}
	b.ReportMetric(0, "ns/op") // of both
	b.ReportMetric(millis(median(daemons)), "p50-http-ms")
	b.ReportMetric(millis(median(agents)), "p50-agent-ms")
	b.ReportMetric(millis(median(daemons))/millis(median(agents)), "ratio")
}

func succeeded(code int) error {
	if code != 0 {
		return fmt.Errorf("exit code %d", code)
	}
	return nil
}

func timed(b *testing.B, f func() error) time.Duration {
	b.Helper()
	start := time.Now()
	if err := f(); err != nil {
		b.Fatal(err)
	}
	return time.Since(start)
}

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// BenchmarkList lists a thousand sandboxes that are no machines. The floor is a
// handler that has the answer ready.
func BenchmarkList(b *testing.B) {
	d, _ := benchedFake(b, 1000, AuditConfig{})
	daemon := &lister{socket: d.path("tine.sock")}
	for _, path := range []string{"/v1/sandboxes", "/v1/sandboxes?limit=50"} {
		b.Run(path[len("/v1/"):], func(b *testing.B) {
			daemon.open(b)
			var answer bytes.Buffer
			if err := daemon.get(b.Context(), path, &answer); err != nil {
				b.Fatal(err)
			}
			floor := &lister{socket: filepath.Join(stateDir(b), "floor.sock")}
			serveBytes(b, floor.socket, answer.Bytes())
			floor.open(b)
			compareRates(b, daemon, floor, path)
			b.ReportMetric(float64(answer.Len())/1024, "KiB")
		})
	}
}

// compareRates asks both by turns, with as many clients as there are
// processors, who share these with the server.
func compareRates(b *testing.B, daemon, floor *lister, path string) {
	b.Helper()
	const each = 5
	clients := runtime.GOMAXPROCS(0)
	var took, least time.Duration
	rounds := 0
	for b.Loop() {
		took += daemon.round(b, path, clients, each)
		least += floor.round(b, path, clients, each)
		rounds++
	}
	requests := float64(rounds * clients * each)
	b.ReportMetric(0, "ns/op") // of both
	b.ReportMetric(requests/took.Seconds(), "req/s")
	b.ReportMetric(requests/least.Seconds(), "floor-req/s")
	b.ReportMetric(took.Seconds()/least.Seconds(), "ratio")
}

// lister is a server that lists sandboxes.
type lister struct {
	socket string
	http   http.Client
}

func (l *lister) open(b *testing.B) {
	var dialer net.Dialer
	l.http.Transport = &http.Transport{
		MaxIdleConnsPerHost: runtime.GOMAXPROCS(0),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", l.socket)
		},
	}
	b.Cleanup(l.http.CloseIdleConnections)
}

func (l *lister) get(ctx context.Context, path string, to io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://tine"+path, nil)
	if err != nil {
		return err
	}
	resp, err := l.http.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("answered %s", resp.Status)
	}
	_, err = io.Copy(to, resp.Body)
	return err
}

// round is how long it takes when some clients at once ask a few times each.
func (l *lister) round(b *testing.B, path string, clients, each int) time.Duration {
	b.Helper()
	var work sync.WaitGroup
	errs := make([]error, clients)
	start := time.Now()
	for i := range clients {
		work.Go(func() {
			for range each {
				errs[i] = errors.Join(errs[i], l.get(b.Context(), path, io.Discard))
			}
		})
	}
	work.Wait()
	took := time.Since(start)
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
	return took
}

// serveBytes answers everything with the same bytes, until the benchmark ends.
func serveBytes(b *testing.B, socket string, answer []byte) {
	b.Helper()
	var lc net.ListenConfig
	ln, err := lc.Listen(b.Context(), "unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	srv := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(answer) // the client will say what is wrong
	})}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	b.Cleanup(func() {
		if err := srv.Close(); err != nil {
			b.Error(err)
		}
		if err := <-served; !errors.Is(err, http.ErrServerClosed) {
			b.Error(err)
		}
	})
}
