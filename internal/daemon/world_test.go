package daemon

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/image"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
)

// putImage writes an image py of empty files, by docs/formats/image.md.
func putImage(t testing.TB, dir string) {
	t.Helper()
	put := func(data []byte, names ...string) {
		path := filepath.Join(append([]string{dir}, names...)...)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	hexOf := func(data []byte) string {
		sum := sha256.Sum256(data)
		return hex.EncodeToString(sum[:])
	}
	m := image.Manifest{Version: 1, Source: "test"}
	for _, b := range []*image.Blob{&m.Root, &m.Kernel, &m.Initrd} {
		put(nil, "blobs", "sha256", hexOf(nil))
		b.Digest = "sha256:" + hexOf(nil)
	}
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	put(data, "manifests", hexOf(data)+".json")
	put([]byte("sha256:"+hexOf(data)+"\n"), "names", "py")
}

// journal is a log that tests read while it is written.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

func (j *journal) logger() *slog.Logger { return slog.New(slog.NewTextHandler(j, nil)) }

// reopen opens a daemon on a directory that another may have just left: a
// process that another test starts has that one's lock for an instant.
func reopen(t *testing.T, cfg Config) *Daemon {
	t.Helper()
	late := time.Now().Add(10 * time.Second)
	for {
		d, err := Open(t.Context(), cfg)
		if err == nil {
			return d
		}
		if !errors.Is(err, errdef.ErrConflict) || time.Now().After(late) {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// start opens a daemon on dir with the engine, and serves it until the test, or
// the function that it returns, ends it.
func start(t *testing.T, engine vmm.Engine, cfg Config) (*Daemon, *reached, func()) {
	t.Helper()
	cfg.Engine = engine
	d := reopen(t, cfg)
	r := &reached{socket: filepath.Join(cfg.StateDir, "tine.sock")}
	listeners, err := d.Listen(t.Context(), Addresses{Socket: r.socket, Listen: "127.0.0.1:0"})
	if err != nil {
		t.Fatal(err)
	}
	r.addr = listeners[1].Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx, listeners...) }()
	stop := sync.OnceFunc(func() {
		cancel()
		late := context.WithoutCancel(t.Context())
		err := <-served
		d.Settle(late)
		if err = errors.Join(err, d.Close(late)); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	t.Cleanup(stop)
	return d, r, stop
}

// reached is where a daemon answers.
type reached struct{ addr, socket string }

// ask makes one request over TCP, or the socket, on a connection of its own.
func (r *reached) ask(t *testing.T, network, method, path, body string) (int, http.Header, string) {
	t.Helper()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		if network == "unix" {
			return d.DialContext(ctx, "unix", r.socket)
		}
		return d.DialContext(ctx, "tcp", r.addr)
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+r.addr+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp.StatusCode, resp.Header, string(text)
}

// refused is an error's answer.
type refused struct {
	Error string `json:"error"`
	Code  string `json:"code"`
	Hint  string `json:"hint"`
}

// template makes the image and the snapshot py.
func template(t testing.TB, d *Daemon) {
	t.Helper()
	putImage(t, d.path("images"))
	req := sandbox.SnapshotRequest{Tag: "py", Image: "py", Machine: vmm.Machine{MemoryMiB: 64, VCPUs: 1}}
	if _, err := d.Sandboxes.CreateSnapshot(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

func fork(t testing.TB, d *Daemon, n int) []string {
	t.Helper()
	results, err := d.Sandboxes.Fork(t.Context(), sandbox.ForkRequest{Snapshot: "py", N: n, AllOrNothing: true})
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]string, n)
	for i, r := range results {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		ids[i] = r.Sandbox.ID
	}
	return ids
}

func killAll(t *testing.T, d *Daemon) {
	t.Helper()
	for _, info := range d.Sandboxes.List() {
		if err := d.Sandboxes.Kill(t.Context(), info.ID); err != nil {
			t.Error(err)
		}
	}
}
