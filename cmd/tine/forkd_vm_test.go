//go:build vm

package main_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/durable"
	"github.com/tinevm/tine/internal/vmtest"
)

// clients are the published programs that must work as they are.
var clients = []string{"forkd==0.5.3", "forkd-mcp==0.2.1"}

// TestForkdClients drives real machines through forkd's published clients.
func TestForkdClients(t *testing.T) {
	h := newOwnHost(t)
	const token = "for-the-tests-of-forkds-clients"
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	url := h.serveTCP("--token-file", file)
	rootfs := shellRootfs(t)
	for _, script := range []string{"controller.py", "sandbox.py", "mcp_tools.py"} {
		t.Run(script, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, filepath.Join(venv(t), "bin", "python3"), filepath.Join("testdata", "clients", script))
			cmd.Env = append(os.Environ(), "FORKD_URL="+url, "FORKD_TOKEN="+token, "TINE_URL=", "TINE_TOKEN=",
				"FORKD_TARGET="+freeAddress(t), "FORKD_KERNEL="+rootfs, "FORKD_ROOTFS="+rootfs, // any file will do for a kernel
				"PATH="+asForkd(t)+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
			if ids := h.ids(); len(ids) != 0 {
				t.Errorf("left behind: %v", ids)
				h.must(append([]string{"rm"}, ids...)...) // the next client is to find nothing
			}
		})
	}
}

// shellRootfs is a filesystem image with this host's shell, and what the loader
// says that it needs. Its path is always the same, so that the store of images
// that tests share has one of it.
func shellRootfs(t *testing.T) string {
	t.Helper()
	const script = `set -e
mkdir -p bin etc
cp -L /bin/sh bin/sh
for lib in $(ldd /bin/sh | grep -o '/[^ ]*'); do mkdir -p ".${lib%/*}"; cp -L "$lib" ".$lib"; done
echo as a file >etc/made
ln etc/made twin
rm -f "$1"
PATH=$PATH:/sbin:/usr/sbin mke2fs -q -t ext4 -d . "$1" 32M`
	path := filepath.Join(vmtest.StateDir(t), "shell.ext4")
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "sh", path)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make a root filesystem: %v\n%s", err, out)
	}
	return path
}

// asForkd is a directory in which tine has the name forkd.
func asForkd(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Symlink(vmtest.Program(t, "tine"), filepath.Join(dir, "forkd")); err != nil {
		t.Fatal(err)
	}
	return dir
}

// serveTCP starts a daemon and returns its address.
func (h *host) serveTCP(flags ...string) string {
	h.t.Helper()
	addr := freeAddress(h.t)
	cmd := h.command(context.WithoutCancel(h.t.Context()), append([]string{"serve", "--listen", addr}, flags...)...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		_ = cmd.Process.Kill() // unless it has ended
		_ = cmd.Wait()         // how it ends is of no interest
		if h.t.Failed() {
			h.t.Logf("the daemon: %s", log.String())
		}
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
			return "http://" + addr
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("the daemon does not answer: %v", err)
		}
	}
}

// freeAddress is one that nobody listened on a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ln.Close() }()
	return ln.Addr().String()
}

// venv is a Python environment with the clients, made once for all runs. It
// never skips: what cannot be installed is not tested.
func venv(t *testing.T) string {
	t.Helper()
	cache, err := filepath.Abs(filepath.Join("..", "..", ".cache"))
	if err != nil {
		t.Fatal(err)
	}
	if err = os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := durable.Lock(t.Context(), filepath.Join(cache, "clients.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if unlockErr := durable.Unlock(lock); unlockErr != nil {
			t.Error(unlockErr)
		}
	}()
	dir, want := filepath.Join(cache, "clients"), strings.Join(clients, "\n")
	if has, readErr := os.ReadFile(filepath.Join(dir, "has")); readErr == nil && string(has) == want {
		return dir
	}
	if err = os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	install(t, "python3", "-m", "venv", dir)
	install(t, filepath.Join(dir, "bin", "python3"), append([]string{
		"-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check",
	}, clients...)...)
	if err = os.WriteFile(filepath.Join(dir, "has"), []byte(want), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func install(t *testing.T, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, name, args...).CombinedOutput(); err != nil {
		t.Fatalf("forkd's clients cannot be installed, and without them nobody knows whether they work: %s %q: %v\n%s\n"+
			"This test needs python3 with venv and pip (scripts/setup.sh), and a package index that pip can reach.", name, args, err, out)
	}
}

// TestForgeGateway goes the way of Forge's client, in real machines.
func TestForgeGateway(t *testing.T) {
	h := newHost(t)
	gateway := h.serveTCP() + "/v1/sandbox"
	var box struct {
		ID string `json:"id"`
	}
	if err := json.Unmarshal(ask(t, 201, "POST", gateway, ""), &box); err != nil {
		t.Fatal(err)
	}
	box.ID = gateway + "/" + box.ID
	for _, tt := range []struct{ route, body, stdout string }{
		{"shell", `{"command":"uname -s; pwd"}`, "Linux\n/root\n"},
		{"execute", `{"code":"print(6*7)","runtime":"python"}`, "42\n"},
		{"execute", `{"code":"echo $((6*7))","runtime":"shell"}`, "42\n"},
	} {
		var result struct {
			Success         bool   `json:"success"`
			Stdout          string `json:"stdout"`
			ExitCode        *int   `json:"exitCode"`
			ExitCodeSnake   *int   `json:"exit_code"`
			ExecutionTime   *int   `json:"executionTime"`
			ExecutionTimeMS *int   `json:"execution_time_ms"`
		}
		if err := json.Unmarshal(ask(t, 200, "POST", box.ID+"/"+tt.route, tt.body), &result); err != nil {
			t.Fatal(err)
		}
		if !result.Success || result.Stdout != tt.stdout || result.ExitCode == nil || result.ExitCodeSnake == nil ||
			result.ExecutionTime == nil || result.ExecutionTimeMS == nil {
			t.Errorf("%s %s: %+v", tt.route, tt.body, result)
		}
	}
	ask(t, 400, "POST", box.ID+"/execute", `{"code":"1","runtime":"node"}`) // the image has no node
	content := strings.Repeat("\x00\xff", 1<<20)
	ask(t, 204, "POST", box.ID+"/upload", `{"path":"dir/file","data":"`+base64.StdEncoding.EncodeToString([]byte(content))+`"}`)
	if got := ask(t, 200, "GET", box.ID+"/download?path="+url.QueryEscape("dir/file"), ""); string(got) != content {
		t.Errorf("downloaded %d bytes, want %d", len(got), len(content))
	}
	short, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(short, "POST", box.ID+"/shell", strings.NewReader(`{"command":"touch /tmp/began; exec sleep 4321"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if _, err = http.DefaultClient.Do(req); !errors.Is(err, context.DeadlineExceeded) { //nolint:bodyclose // there is none
		t.Fatalf("the request ended with %v", err)
	}
	const count = `{"command":"ls /tmp/began; cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep [4]321'"}`
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left := string(ask(t, 200, "POST", box.ID+"/shell", count))
		if strings.Contains(left, `"/tmp/began\n0\n"`) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the command outlives its client: %s", left)
		}
	}
	ask(t, 204, "DELETE", box.ID, "")
	ask(t, 404, "DELETE", box.ID, "")
}

// ask makes a request that must be answered with that status.
func ask(t *testing.T, status int, method, url, body string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != status {
		t.Fatalf("%s %s: %d %.500s, %v; want %d", method, url, resp.StatusCode, data, err, status)
	}
	return data
}
