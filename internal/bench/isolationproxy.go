package bench

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/progress"
	"github.com/tinevm/tine/internal/sandbox"
)

//go:embed httpload.py
var httpProgram string

const (
	httpPort   = 8000 // of httpload.py
	httpAnswer = "hello"
)

// How often the proxy is asked.
const proxyWarm, proxyAsks = 3, 50

// proxy measures requests to a web server in a guest, through the daemon on a
// unix socket, as clients on this host come.
func (w *ward) proxy(ctx context.Context) (err error) {
	path := filepath.Join(w.dirs.root, "api.sock")
	var cfg net.ListenConfig
	ln, err := cfg.Listen(ctx, "unix", path)
	if err != nil {
		return err
	}
	serving, stop := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- w.sub.d.Serve(serving, ln) }()
	defer func() { stop(); err = errors.Join(err, <-served) }()
	f, err := forkOne(ctx, w.sub.d.Sandboxes, sandbox.ForkRequest{Snapshot: w.sub.snap.Digest, NoPool: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.end(ctx)) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	return f.with(ctx, func(ctx context.Context, c *guest.Client) error {
		return w.askProxy(ctx, c, &http.Client{Transport: transport, Timeout: sampleTime}, fmt.Sprintf("http://tine/v1/sandboxes/%s/ports/%d/", f.id, httpPort))
	})
}

// askProxy starts the web server and measures requests to it beside the start of
// a program.
func (w *ward) askProxy(ctx context.Context, c *guest.Client, client *http.Client, url string) error {
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"python3", "-uc", httpProgram}})
	if err != nil {
		return err
	}
	defer p.Close() //nolint:errcheck,contextcheck // never fails, and does not wait
	if _, err = (&worker{process: p}).line(ctx); err != nil {
		return fmt.Errorf("start a web server: %w", err)
	}
	var gets, execs []float64
	for i := range proxyWarm + proxyAsks {
		progress.ReportAmount(ctx, step, "measuring a request through the proxy", int64(i+1), proxyWarm+proxyAsks)
		begin := time.Now()
		if err = get(ctx, client, url); err != nil {
			return err
		}
		took := time.Since(begin)
		begin = time.Now()
		if err = askExec(ctx, c); err != nil {
			return err
		}
		if i >= proxyWarm {
			gets, execs = append(gets, ms(took)), append(execs, ms(time.Since(begin)))
		}
	}
	w.add(IsolationRow{
		Row: Row{Step: "GET through the proxy", Unit: Milliseconds}, FloorIs: "exec of /bin/true by the agent's session",
		Note: "the daemon is asked on a unix socket; the guest's server is Python, and each request is a new connection in the guest",
	}, gets, execs)
	return nil
}

// get asks once and checks the answer.
func get(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK || string(body) != httpAnswer {
		return fmt.Errorf("%w: GET %s: %s: %q", errdef.ErrUnavailable, url, resp.Status, body)
	}
	return nil
}
