package api_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm/firecracker/api"
	"github.com/tinevm/tine/internal/vmm/firecracker/apitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counter is a listener that counts its connections.
type counter struct {
	net.Listener
	n atomic.Int32
}

func (c *counter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err == nil {
		c.n.Add(1)
	}
	return conn, err
}

// pair is a stand-in for Firecracker, and a client of it.
func pair(t *testing.T, cfg apitest.Config) (*apitest.Server, *api.Client, *counter) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	counted := &counter{Listener: l}
	s, err := apitest.Serve(counted, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	c, err := api.Dial(bounded(t), socket, s.Done())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return s, c, counted
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// ok is an answer with a body.
func ok(body string) string {
	return fmt.Sprintf("HTTP/1.1 200 \r\nServer: Firecracker API\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

// A peer that does not speak as Firecracker does costs one error and one
// connection, in bounded time and memory.
func TestBadServers(t *testing.T) {
	t.Parallel()
	const head = "HTTP/1.1 200 \r\nServer: Firecracker API\r\n"
	good := `{"id":"a","state":"Running","vmm_version":"1.16.1","app_name":"Firecracker"}`
	length := fmt.Sprintf("Content-Length: %d\r\n", len(good))
	tests := map[string]struct {
		fault    apitest.Fault
		want     string
		category error // nil is none
	}{
		"hangs":                   {apitest.Hang, "", context.DeadlineExceeded},
		"hangs in the head":       {apitest.SayAndHang(head), "", context.DeadlineExceeded},
		"hangs in the body":       {apitest.SayAndHang(head + "Content-Length: 10\r\n\r\n{"), "", context.DeadlineExceeded},
		"hangs up":                {apitest.HangUp, "connection ended", errdef.ErrUnavailable},
		"hangs up in the status":  {apitest.Say("HTTP/1.1 20"), "connection ended", errdef.ErrUnavailable},
		"hangs up in the head":    {apitest.Say(head + "Content-Le"), "connection ended", errdef.ErrUnavailable},
		"hangs up before a body":  {apitest.Say(head + length + "\r\n"), "connection ended", errdef.ErrUnavailable},
		"hangs up in the body":    {apitest.Say(head + length + "\r\n" + good[:20]), "connection ended", errdef.ErrUnavailable},
		"garbage":                 {apitest.Say("\x00\x1b[2J garbage\r\n\r\n"), "not HTTP", nil},
		"another protocol":        {apitest.Say("SSH-2.0-OpenSSH_9.2\r\n"), "not HTTP", nil},
		"HTTP of another kind":    {apitest.Say("HTTP/1.1 abc\r\n\r\n"), "not HTTP", nil},
		"a header without colon":  {apitest.Say(head + "nonsense\r\n\r\n"), "not HTTP", nil},
		"a status without an end": {apitest.Flood("HTTP/1.1 200 "), "headers of the answer are longer", nil},
		"a header without an end": {apitest.Flood(head + "X: "), "headers of the answer are longer", nil},
		"headers without an end":  {apitest.Say(head + strings.Repeat("X: y\r\n", 1<<14)), "headers of the answer are longer", nil},
		"10 GiB":                  {apitest.Flood(head + "Content-Length: 10737418240\r\n\r\n"), "more than 1048576", nil},
		"a byte more than 1 MiB":  {apitest.Flood(head + "Content-Length: 1048577\r\n\r\n"), "more than 1048576", nil},
		"a body without an end":   {apitest.Flood(head + "\r\n"), "does not say how long", nil},
		"a negative length":       {apitest.Say(head + "Content-Length: -1\r\n\r\n"), "not HTTP", nil},
		"a length past 64 bits":   {apitest.Say(head + "Content-Length: 99999999999999999999\r\n\r\n"), "not HTTP", nil},
		"a length in words":       {apitest.Say(head + "Content-Length: ten\r\n\r\n"), "not HTTP", nil},
		"two lengths":             {apitest.Say(head + length + "Content-Length: 3\r\n\r\n" + good), "not HTTP", nil},
		"chunks":                  {apitest.Say(head + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), "in chunks", nil},
		"chunks and a length":     {apitest.Say(head + length + "Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"), "in chunks", nil},
		"100 Continue":            {apitest.Say("HTTP/1.1 100 \r\n\r\n" + head + length + "\r\n" + good), "status 100", nil},
		"101":                     {apitest.Say("HTTP/1.1 101 \r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), "status 101", nil},
		"204 without content":     {apitest.Say("HTTP/1.1 204 \r\n\r\n"), "status 204", nil},
		"204 with content":        {apitest.Say("HTTP/1.1 204 \r\n" + length + "\r\n" + good), "is to have no content", nil},
		"a redirection":           {apitest.Say("HTTP/1.1 302 \r\nLocation: /\r\nContent-Length: 0\r\n\r\n"), "status 302", nil},
		"201":                     {apitest.Say("HTTP/1.1 201 \r\n" + length + "\r\n" + good), "status 201", nil},
		"no JSON":                 {apitest.Say(head + "Content-Length: 4\r\n\r\n\x1b[2J"), "not the JSON", nil},
		"half a JSON":             {apitest.Say(head + "Content-Length: 4\r\n\r\n" + good[:4]), "not the JSON", nil},
		"JSON of another kind":    {apitest.Say(head + "Content-Length: 2\r\n\r\n[]"), "not the JSON", nil},
		"nothing":                 {apitest.Say(head + "Content-Length: 0\r\n\r\n"), "not the JSON", nil},
		"two JSONs":               {apitest.Say(head + "Content-Length: 5\r\n\r\n{} {}"), "more than one", nil},
		"another state":           {apitest.Say(ok(`{"state":"\u001b[2J"}`)), `"?[2J", which is not known`, nil},
		"an empty object":         {apitest.Say(head + "Content-Length: 2\r\n\r\n{}"), "not known", nil},
		"too many connections": {
			apitest.Say("HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }"),
			"Too many open connections", errdef.ErrExhausted,
		},
		"a refusal that is no JSON": {apitest.Say("HTTP/1.1 400 \r\nContent-Length: 5\r\n\r\n\x1b[2Jx"), "status 400: ?[2Jx", nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, c, counted := pair(t, apitest.Config{})
			s.Fault("GET", "/", tt.fault)
			ctx := bounded(t)
			if errors.Is(tt.category, context.DeadlineExceeded) {
				short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
				ctx = short
			}
			_, err := c.Instance(ctx)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			if strings.Contains(fmt.Sprint(err), "\x1b") || len(fmt.Sprint(err)) > 2<<10 {
				t.Errorf("unbounded, or not fit to be printed: %q", err)
			}
			if tt.category != nil && !errors.Is(err, tt.category) || tt.category == nil && errdef.Code(err) != "internal" {
				t.Errorf("%v is in category %s, want %v", err, errdef.Code(err), tt.category)
			}
			s.Fault("GET", "/", nil)
			if i, err := c.Instance(bounded(t)); err != nil || i.State != api.NotStarted {
				t.Errorf("the next request: %+v, %v", i, err)
			}
			if n := counted.n.Load(); n != 2 {
				t.Errorf("there were %d connections, want another after the fault", n)
			}
		})
	}
}

func TestFloodTakesLittleMemory(t *testing.T) { //nolint:paralleltest // it measures the process
	s, c, _ := pair(t, apitest.Config{})
	s.Fault("GET", "/", apitest.Flood("HTTP/1.1 200 \r\nContent-Length: 1048577\r\n\r\n"))
	s.Fault("GET", "/vm/config", apitest.Flood("HTTP/1.1 200 \r\nX: "))
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for range 10 {
		if _, err := c.Instance(bounded(t)); err == nil {
			t.Error("a flood was an answer")
		}
		if _, err := c.VMConfig(bounded(t)); err == nil {
			t.Error("a flood was an answer")
		}
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > 8<<20 { // the server's buffers too
		t.Errorf("20 floods took %d bytes", grown)
	}
}

// One connection does for all requests, refused ones too.
func TestOneConnection(t *testing.T) {
	t.Parallel()
	s, c, counted := pair(t, apitest.Config{})
	ctx := bounded(t)
	for range 20 {
		if _, err := c.Instance(ctx); err != nil {
			t.Fatal(err)
		}
		if err := c.Pause(ctx); !errors.Is(err, errdef.ErrConflict) {
			t.Fatalf("got %v", err)
		}
	}
	// Two answers in one: the second is nobody's.
	s.Fault("GET", "/version", apitest.SayAndHang("HTTP/1.1 200 \r\nContent-Length: 32\r\n\r\n{\"firecracker_version\":\"1.16.1\"}HTTP/1.1 200 \r\n"))
	if _, err := c.FetchVersion(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Instance(ctx); err != nil {
		t.Fatal(err)
	}
	if n := counted.n.Load(); n != 2 {
		t.Errorf("%d connections", n)
	}
}

func TestWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	s, c, _ := pair(t, apitest.Config{})
	s.Fault("GET", "/vm/config", apitest.Hang)
	hung, cancel := context.WithCancelCause(bounded(t))
	done := make(chan error)
	go func() {
		_, err := c.VMConfig(hung)
		done <- err
	}()
	for len(s.Requests()) < 2 { // version, and this
		runtime.Gosched()
	}
	short, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer stop()
	if _, err := c.Instance(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("while another request hangs: %v", err)
	}
	why := errors.New("had enough")
	cancel(why)
	if err := <-done; !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Instance(bounded(t)); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestClose(t *testing.T) {
	t.Parallel()
	s, c, _ := pair(t, apitest.Config{})
	s.Fault("GET", "/", apitest.Hang)
	done := make(chan error)
	go func() {
		_, err := c.Instance(bounded(t))
		done <- err
	}()
	for len(s.Requests()) < 2 {
		runtime.Gosched()
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("the request under way: %v", err)
	}
	if _, err := c.MachineConfig(bounded(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a request after: %v", err)
	}
}

func TestDeath(t *testing.T) {
	t.Parallel()
	s, c, _ := pair(t, apitest.Config{})
	s.Fault("GET", "/", apitest.Die)
	for range 3 {
		if _, err := c.Instance(bounded(t)); !errors.Is(err, errdef.ErrUnavailable) {
			t.Errorf("got %v", err)
		}
	}
}

func TestDialWaits(t *testing.T) {
	// Of a length that no address takes.
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "s")
	type result struct {
		c   *api.Client
		err error
	}
	done := make(chan result)
	ctx := bounded(t)
	go func() {
		c, err := api.Dial(ctx, socket, nil)
		done <- result{c, err}
	}()
	// Something else in the directory is not the socket.
	if err := os.WriteFile(filepath.Join(dir, "other"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// A socket comes under another name, with nobody listening, as between
	// Firecracker's bind and its listen.
	t.Chdir(dir)
	stale, err := net.Listen("unix", "s")
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()
	select {
	case r := <-done:
		t.Fatalf("dialled nobody: %v", r.err)
	case <-time.After(50 * time.Millisecond):
	}
	if err = os.Remove("s"); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", "s")
	if err != nil {
		t.Fatal(err)
	}
	s, err := apitest.Serve(l, apitest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	defer r.c.Close()
	if r.c.Version() != api.Newest {
		t.Errorf("version %v", r.c.Version())
	}
}

func TestDialGivesUp(t *testing.T) {
	t.Parallel()
	dead := make(chan struct{})
	close(dead)
	silent := filepath.Join(t.TempDir(), "silent")
	l, err := net.Listen("unix", silent) // the kernel accepts
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	full := filepath.Join(t.TempDir(), "file")
	if err = os.WriteFile(full, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	old, oldSocket := apitest.New(t, apitest.Config{Version: "1.9.1"})
	_, newSocket := apitest.New(t, apitest.Config{Version: "2.0.0"})
	_, laterSocket := apitest.New(t, apitest.Config{Version: "1.17.0-dev"})
	_, oddSocket := apitest.New(t, apitest.Config{Faults: map[string]apitest.Fault{
		"GET /version": apitest.Say(ok(`{"firecracker_version":"\u001b"}`)),
	}})
	tests := map[string]struct {
		path string
		died <-chan struct{}
		want error
	}{
		"no directory":            {filepath.Join(t.TempDir(), "no", "s"), nil, errdef.ErrNotFound},
		"nobody comes":            {filepath.Join(t.TempDir(), "s"), nil, context.DeadlineExceeded},
		"dead, no socket":         {filepath.Join(t.TempDir(), "s"), dead, errdef.ErrUnavailable},
		"dead, and silent":        {silent, dead, errdef.ErrUnavailable},
		"silent":                  {silent, nil, context.DeadlineExceeded},
		"a file":                  {full, dead, errdef.ErrUnavailable},
		"too long a name":         {filepath.Join(t.TempDir(), strings.Repeat("x", 120)), nil, errdef.ErrInvalid},
		"too old":                 {oldSocket, old.Done(), errdef.ErrUnsupported},
		"too new":                 {newSocket, nil, errdef.ErrUnsupported},
		"newer, and the same API": {laterSocket, nil, nil},
		"no version":              {oddSocket, nil, errdef.ErrInvalid},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			if errors.Is(tt.want, context.DeadlineExceeded) {
				ctx, cancel = context.WithTimeout(t.Context(), 30*time.Millisecond)
			}
			defer cancel()
			c, err := api.Dial(ctx, tt.path, tt.died)
			if c != nil {
				c.Close()
			}
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v", err)
			}
			if errors.Is(tt.want, errdef.ErrUnsupported) && errdef.Hint(err) == "" {
				t.Error("no hint")
			}
		})
	}
}

// What is sent is what the version has, and what it has not is not sent.
func TestRequests(t *testing.T) {
	t.Parallel()
	ctx := bounded(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		call  func(*api.Client) error
		since string // "" is any
		body  string
		later string // of a later version, when that is different
	}{
		"PUT /machine-config":       {func(c *api.Client) error { return c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 2, MemMiB: 64}) }, "", `{"vcpu_count":2,"mem_size_mib":64}`, ""},
		"PUT /cpu-config":           {func(c *api.Client) error { return c.PutCPUConfig(ctx, []byte(`{"kvm_capabilities":[]}`)) }, "", `{"kvm_capabilities":[]}`, ""},
		"PUT /boot-source":          {func(c *api.Client) error { return c.PutBootSource(ctx, api.BootSource{Kernel: file, Args: "quiet"}) }, "", `{"kernel_image_path":"FILE","boot_args":"quiet"}`, ""},
		"PUT /drives/a":             {func(c *api.Client) error { return c.PutDrive(ctx, api.Drive{ID: "a", Path: file}) }, "", `{"drive_id":"a","path_on_host":"FILE","is_root_device":false,"is_read_only":false}`, ""},
		"PUT /pmem/b":               {func(c *api.Client) error { return c.PutPmem(ctx, api.Pmem{ID: "b", Path: file, ReadOnly: true}) }, "1.14.0", `{"id":"b","path_on_host":"FILE","read_only":true}`, ""},
		"PUT /network-interfaces/n": {func(c *api.Client) error { return c.PutNetworkInterface(ctx, api.NetworkInterface{ID: "n", Tap: "t"}) }, "", `{"iface_id":"n","host_dev_name":"t"}`, ""},
		"PUT /entropy":              {func(c *api.Client) error { return c.PutEntropy(ctx) }, "", `{}`, ""},
		"PUT /serial":               {func(c *api.Client) error { return c.PutSerial(ctx, file) }, "1.14.0", `{"serial_out_path":"FILE"}`, ""},
		"PUT /logger":               {func(c *api.Client) error { return c.PutLogger(ctx, api.Logger{Path: file, Level: "Debug"}) }, "", `{"log_path":"FILE","level":"Debug"}`, ""},
		"PUT /metrics":              {func(c *api.Client) error { return c.PutMetrics(ctx, file) }, "", `{"metrics_path":"FILE"}`, ""},
		"PUT /snapshot/load":        {func(c *api.Client) error { return fatal(c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m"})) }, "", `{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"}}`, ""},
		"tracked": {
			func(c *api.Client) error {
				return fatal(c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m", TrackDirtyPages: true, Resume: true}))
			}, "",
			`{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"},"enable_diff_snapshots":true,"resume_vm":true}`,
			`{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"},"track_dirty_pages":true,"resume_vm":true}`,
		},
		"network": {
			func(c *api.Client) error {
				return fatal(c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m", Networks: []api.NetworkOverride{{ID: "n", Tap: "t"}}}))
			}, "1.12.0",
			`{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"},"network_overrides":[{"iface_id":"n","host_dev_name":"t"}]}`, "",
		},
		"vsock": {
			func(c *api.Client) error {
				return fatal(c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m", Vsock: "v"}))
			}, "1.16.0",
			`{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"},"vsock_override":{"uds_path":"v"}}`, "",
		},
		"clock": {
			func(c *api.Client) error {
				return fatal(c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m", ClockRealtime: true}))
			}, "1.16.0",
			`{"snapshot_path":"s","mem_backend":{"backend_path":"m","backend_type":"File"},"clock_realtime":true}`, "",
		},
	}
	for _, version := range []string{"1.10.0", "1.11.0", "1.12.0", "1.13.0", "1.14.0", "1.15.0", "1.16.1"} {
		for name, tt := range tests {
			t.Run(version+" "+name, func(t *testing.T) {
				t.Parallel()
				s, c, _ := pair(t, apitest.Config{Version: version})
				err := tt.call(c)
				requests := s.Requests()[1:]
				if v, since := parse(t, version), tt.since; since != "" && v.Compare(parse(t, since)) < 0 {
					if !errors.Is(err, errdef.ErrUnsupported) || errdef.Hint(err) == "" || len(requests) > 0 {
						t.Errorf("got %v, and %v was sent", err, requests)
					}
					return
				}
				want := tt.body
				if tt.later != "" && parse(t, version).Has(api.LoadTrackDirtyPages) {
					want = tt.later
				}
				if err != nil || len(requests) != 1 || strings.ReplaceAll(requests[0].Body, file, "FILE") != want {
					t.Errorf("sent %v, got %v, want %s", requests, err, want)
				}
			})
		}
	}
}

// fatal is nil for the refusal of a snapshot that is not there: the request was
// understood.
func fatal(err error) error {
	if e, ok := errors.AsType[*api.Error](err); ok && strings.Contains(e.Message, "Failed to open snapshot file") {
		return nil
	}
	return err
}

func parse(t *testing.T, s string) api.Version {
	t.Helper()
	v, err := api.ParseVersion(s)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestRefusedHere(t *testing.T) {
	t.Parallel()
	s, c, _ := pair(t, apitest.Config{})
	ctx := bounded(t)
	for name, err := range map[string]error{
		"no name":            c.PutDrive(ctx, api.Drive{}),
		"a name with a path": c.PutDrive(ctx, api.Drive{ID: "../actions"}),
		"a name with a line": c.PutPmem(ctx, api.Pmem{ID: "x HTTP/1.1\r\n"}),
		"a long name":        c.PutNetworkInterface(ctx, api.NetworkInterface{ID: strings.Repeat("x", 65)}),
		"another alphabet":   c.MoveDrive(ctx, "é", "/"),
		"no JSON":            c.PutCPUConfig(ctx, []byte("{")),
		"too much":           c.PutBootSource(ctx, api.BootSource{Args: strings.Repeat("x", 51200)}),
	} {
		if !errors.Is(err, errdef.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(s.Requests()); n != 1 {
		t.Errorf("%d requests were sent", n)
	}
}

func TestCategories(t *testing.T) {
	t.Parallel()
	ctx := bounded(t)
	dir := t.TempDir()
	tests := map[string]struct {
		call func(*api.Client) error
		want error // nil is none
	}{
		"paused before start":   {func(c *api.Client) error { return c.Pause(ctx) }, errdef.ErrConflict},
		"snapshot before start": {func(c *api.Client) error { return c.CreateSnapshot(ctx, api.Snapshot{State: "s", Mem: "m"}) }, errdef.ErrConflict},
		"loaded too late": {func(c *api.Client) error {
			return errors.Join(c.PutEntropy(ctx), c.LoadSnapshot(ctx, api.Load{State: "s", Mem: "m"}))
		}, errdef.ErrConflict},
		"too many CPUs":    {func(c *api.Client) error { return c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 33, MemMiB: 64}) }, errdef.ErrInvalid},
		"a negative size":  {func(c *api.Client) error { return c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 1, MemMiB: -1}) }, errdef.ErrInvalid},
		"an unknown level": {func(c *api.Client) error { return c.PutLogger(ctx, api.Logger{Level: "x"}) }, errdef.ErrInvalid},
		"an unknown field": {func(c *api.Client) error { return c.PutCPUConfig(ctx, []byte(`{"x":1}`)) }, errdef.ErrUnsupported},
		"no kernel":        {func(c *api.Client) error { return c.Start(ctx) }, nil},
		"no file":          {func(c *api.Client) error { return c.PutDrive(ctx, api.Drive{ID: "a", Path: filepath.Join(dir, "no")}) }, nil},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, c, _ := pair(t, apitest.Config{})
			err := tt.call(c)
			e, ok := errors.AsType[*api.Error](err)
			if !ok || e.Status != 400 || e.Message == "" {
				t.Fatalf("got %v", err)
			}
			if tt.want != nil && !errors.Is(err, tt.want) || tt.want == nil && errdef.Code(err) != "internal" {
				t.Errorf("%v is in category %s", err, errdef.Code(err))
			}
		})
	}
	full := &api.Error{Status: 400, Message: "Create snapshot error: Cannot perform flush on the snapshot backing file: No space left on device (os error 28)"}
	if !errors.Is(full, errdef.ErrExhausted) {
		t.Errorf("%v is in category %s", full, errdef.Code(full))
	}
}

// The life of a machine, of its snapshot, and of a machine from that.
func TestLife(t *testing.T) {
	t.Parallel()
	ctx := bounded(t)
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(in("kernel"), []byte("kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, c, _ := pair(t, apitest.Config{})
	steps := []error{
		c.PutMachineConfig(ctx, api.MachineConfig{VCPUs: 1, MemMiB: 16}),
		c.PutBootSource(ctx, api.BootSource{Kernel: in("kernel")}),
		c.PutPmem(ctx, api.Pmem{ID: "root", Path: in("kernel"), ReadOnly: true, Root: true}),
		c.PutNetworkInterface(ctx, api.NetworkInterface{ID: "net", Tap: "tap0"}),
		c.PutVsock(ctx, api.Vsock{CID: 3, Path: in("v")}),
		c.Start(ctx), c.FlushMetrics(ctx), c.Pause(ctx),
		c.CreateSnapshot(ctx, api.Snapshot{Type: api.Full, State: in("state"), Mem: in("mem")}),
		c.Resume(ctx),
	}
	if err := errors.Join(steps...); err != nil {
		t.Fatal(err)
	}
	config, err := c.VMConfig(ctx)
	want := api.VMConfig{
		BootSource:        api.BootSource{Kernel: in("kernel")},
		MachineConfig:     api.MachineConfig{VCPUs: 1, MemMiB: 16},
		Drives:            []api.Drive{},
		Pmem:              []api.Pmem{{ID: "root", Path: in("kernel"), ReadOnly: true, Root: true}},
		NetworkInterfaces: []api.NetworkInterface{{ID: "net", Tap: "tap0"}},
		Vsock:             &api.Vsock{CID: 3, Path: in("v")},
	}
	if diff := cmp.Diff(want, config); err != nil || diff != "" {
		t.Errorf("%v, %s", err, diff)
	}
	_, fork, _ := pair(t, apitest.Config{})
	if err = fork.LoadSnapshot(ctx, api.Load{
		State: in("state"), Mem: in("mem"), Vsock: in("w"), Networks: []api.NetworkOverride{{ID: "net", Tap: "tap1"}},
	}); err != nil {
		t.Fatal(err)
	}
	if i, instanceErr := fork.Instance(ctx); instanceErr != nil || i.State != api.Paused {
		t.Errorf("%+v, %v", i, instanceErr)
	}
	config, err = fork.VMConfig(ctx)
	if err != nil || config.Vsock.Path != in("w") || config.NetworkInterfaces[0].Tap != "tap1" {
		t.Errorf("%+v, %v", config, err)
	}
}
