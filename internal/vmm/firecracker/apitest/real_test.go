package apitest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// firecrackerEnv names a real Firecracker to compare with.
const firecrackerEnv = "TINE_FIRECRACKER"

// exchange is one request of the comparison. In it $DIR is a directory of each
// side's own, in which there is an empty file "file".
type exchange struct {
	method, path, body string
	// loose compares the status alone: words of a JSON parser.
	loose bool
}

// conversations are each held with a fresh process. What is asked of it needs no
// guest.
var conversations = map[string][]exchange{
	"nothing configured": {
		{"GET", "/", "", false},
		{"GET", "/version", "", false},
		{"GET", "/version/more", "", false},
		{"GET", "//version", "", false},
		{"GET", "/machine-config", "", false},
		{"GET", "/vm/config", "", false},
		{"GET", "/vm", "", false},
		{"GET", "/nope", "", false},
		{"GET", "/", "{}", false},
		{"PUT", "/nope", "{}", false},
		{"PUT", "/vm", "", false},
		{"PATCH", "/vm", "", false},
		{"PATCH", "/boot-source", "{}", false},
		{"DELETE", "/boot-source", "", false},
	},
	"machine-config": {
		{"PUT", "/machine-config", "{", true},
		{"PUT", "/machine-config", "nope", true},
		{"PUT", "/machine-config", `"x"`, false},
		{"PUT", "/machine-config", `7`, false},
		{"PUT", "/machine-config", `{}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":"1","mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":null,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":[],"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":{},"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":300,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":-1,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1.5,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"vcpu_count":1,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"VCPU_COUNT":1,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"mem_size_mib":64} x`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"mem_size_mib":64,"smt":1}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"mem_size_mib":64,"smt":null}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"mem_size_mib":64,"huge_pages":"1G"}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":1,"mem_size_mib":64,"cpu_template":"X"}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":0,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":33,"mem_size_mib":64}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":3,"mem_size_mib":64,"smt":true}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":3,"mem_size_mib":0}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":3,"mem_size_mib":63,"huge_pages":"2M"}`, false},
		{"GET", "/machine-config", "", false},
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"track_dirty_pages":true,"cpu_template":null}`, false},
		{"GET", "/machine-config", "", false},
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"cpu_template":"T2"}`, false},
		{"GET", "/machine-config", "", false},
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"huge_pages":"2M"}`, false},
		{"GET", "/machine-config", "", false},
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"cpu_template":"None"}`, false},
		{"GET", "/machine-config", "", false},
	},
	"boot-source": {
		{"PUT", "/boot-source", `{}`, false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/nope"}`, false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","initrd_path":"$DIR/nope"}`, false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","boot_args":"` + strings.Repeat("x", 3000) + `"}`, false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","args":"x"}`, false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","boot_args":"quiet","initrd_path":null}`, false},
		{"GET", "/vm/config", "", false},
	},
	"huge pages and initrd": {
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"huge_pages":"2M"}`, false},
		{"GET", "/machine-config", "", false},
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","initrd_path":"$DIR/file"}`, false},
		{"GET", "/vm/config", "", false},
	},
	"initrd and huge pages": {
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file","initrd_path":"$DIR/file"}`, false},
		{"PUT", "/machine-config", `{"vcpu_count":2,"mem_size_mib":64,"huge_pages":"2M"}`, false},
	},
	"drives": {
		{"PUT", "/drives", `{}`, false},
		{"PUT", "/drives/", `{}`, false},
		{"PUT", "/drives/a-b", `{}`, false},
		{"PUT", "/drives/a", `{}`, false},
		{"PUT", "/drives/a", `{"drive_id":"b","is_root_device":false}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":false}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":false,"path_on_host":"$DIR/nope"}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":false,"path_on_host":"$DIR/file","socket":"x"}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":false,"path_on_host":"$DIR/file","cache_type":"x"}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":false,"path_on_host":"$DIR/file","rate_limiter":{"x":1}}`, false},
		{"PUT", "/drives/a", `{"drive_id":"a","is_root_device":true,"path_on_host":"$DIR/file","is_read_only":true}`, false},
		{"PUT", "/drives/b", `{"drive_id":"b","is_root_device":true,"path_on_host":"$DIR/file","is_read_only":true}`, false},
		{"PUT", "/pmem/c", `{"id":"c","path_on_host":"$DIR/file","root_device":true}`, false},
		{"GET", "/vm/config", "", false},
		{"PATCH", "/drives/a", `{"drive_id":"a","nope":1}`, false},
		{"PATCH", "/drives/a", `{"drive_id":"a","path_on_host":"$DIR/file"}`, false},
	},
	"pmem": {
		{"PUT", "/pmem", `{}`, false},
		{"PUT", "/pmem/a", `{"id":"a"}`, false},
		{"PUT", "/pmem/a", `{"id":"b","path_on_host":"$DIR/file"}`, false},
		{"PUT", "/pmem/a", `{"id":"a","path_on_host":"$DIR/file","is_read_only":true}`, false},
		{"PUT", "/pmem/a", `{"id":"a","path_on_host":"$DIR/nope","root_device":true}`, false},
		{"PUT", "/pmem/b", `{"id":"b","path_on_host":"$DIR/file","root_device":true}`, false},
		{"PUT", "/drives/c", `{"drive_id":"c","is_root_device":true,"path_on_host":"$DIR/file"}`, false},
	},
	"network": {
		{"PUT", "/network-interfaces/a", `{"iface_id":"a"}`, false},
		{"PUT", "/network-interfaces/a", `{"iface_id":"b","host_dev_name":"tap"}`, false},
		{"PUT", "/network-interfaces/a", `{"iface_id":"a","host_dev_name":"tap","guest_mac":"zz"}`, false},
		{"PUT", "/network-interfaces/a", `{"iface_id":"a","host_dev_name":"tap","mtu":70000}`, false},
		{"PUT", "/network-interfaces/a", `{"iface_id":"a","host_dev_name":"averyveryverylongname"}`, false},
	},
	"vsock": {
		{"PUT", "/vsock", `{"guest_cid":3}`, false},
		{"PUT", "/vsock", `{"guest_cid":3,"uds_path":"$DIR/nope/v"}`, false},
		{"PUT", "/vsock", `{"guest_cid":3,"uds_path":"$DIR/file"}`, false},
		{"PUT", "/vsock", `{"guest_cid":3,"uds_path":"$DIR/` + strings.Repeat("x", 120) + `"}`, false},
		{"PUT", "/vsock", `{"guest_cid":4294967296,"uds_path":"$DIR/v"}`, false},
		{"PUT", "/vsock", `{"guest_cid":3,"uds_path":"$DIR/v"}`, false},
		{"GET", "/vm/config", "", false},
		{"PUT", "/vsock", `{"guest_cid":4,"uds_path":"$DIR/v","vsock_id":"x"}`, false},
		{"PUT", "/vsock", `{"guest_cid":4,"uds_path":"$DIR/w"}`, false},
	},
	"small devices": {
		{"PUT", "/entropy", `{"x":1}`, false},
		{"PUT", "/entropy", `{}`, false},
		{"PUT", "/serial", `{"x":1}`, false},
		{"PUT", "/serial", `{"serial_out_path":7}`, false},
		{"PUT", "/serial", `{"serial_out_path":"$DIR/nope/x"}`, false},
		{"PUT", "/logger", `{"level":"x"}`, false},
		{"PUT", "/logger", `{"log_path":"$DIR/nope/x"}`, false},
		{"PUT", "/logger", `{"log_path":"$DIR/log","level":"warning"}`, false},
		{"PUT", "/metrics", `{}`, false},
		{"PUT", "/metrics", `{"metrics_path":"$DIR/nope/x"}`, false},
		{"PUT", "/metrics", `{"metrics_path":"$DIR/metrics"}`, false},
		{"PUT", "/metrics", `{"metrics_path":"$DIR/metrics"}`, false},
		{"PUT", "/cpu-config", `{"x":1}`, false},
		{"PUT", "/cpu-config", `{}`, false},
	},
	"out of order": {
		{"PUT", "/actions", `{}`, false},
		{"PUT", "/actions", `{"action_type":"Nope"}`, false},
		{"PUT", "/actions", `{"action_type":"InstanceStart"}`, false},
		{"PUT", "/actions", `{"action_type":"FlushMetrics"}`, false},
		{"PATCH", "/vm", `{"state":"Paused"}`, false},
		{"PATCH", "/vm", `{"state":"Resumed"}`, false},
		{"PATCH", "/vm", `{"state":"Running"}`, false},
		{"PUT", "/snapshot", `{}`, false},
		{"PUT", "/snapshot/x", `{}`, false},
		{"PUT", "/snapshot/create", `{}`, false},
		{"PUT", "/snapshot/create", `{"snapshot_path":"$DIR/s","mem_file_path":"$DIR/m","snapshot_type":"x"}`, false},
		{"PUT", "/snapshot/create", `{"snapshot_path":"$DIR/s","mem_file_path":"$DIR/m"}`, false},
	},
	"pmem of no size": {
		{"PUT", "/boot-source", `{"kernel_image_path":"$DIR/file"}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/s","mem_backend":{"backend_path":"$DIR/m","backend_type":"File"}}`, false},
	},
	"load, badly": {
		{"PUT", "/snapshot/load", `{}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x"}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","mem_file_path":"y","mem_backend":{"backend_path":"x","backend_type":"File"}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","mem_backend":{"backend_path":"x","backend_type":"File","x":1}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","mem_backend":{"backend_path":"x","backend_type":"x"}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","mem_backend":{"backend_path":"x"}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","network_overrides":[{"iface_id":"x"}]}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","vsock_override":{}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"x","nope":{}}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/nope","mem_backend":{"backend_path":"$DIR/file","backend_type":"File"}}`, false},
		{"GET", "/", "", false}, // it has ended
	},
	"load an empty file": {
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/file","mem_backend":{"backend_path":"$DIR/file","backend_type":"File"}}`, false},
		{"GET", "/", "", false},
	},
	"load by the old names": {
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/file","mem_file_path":"x","enable_diff_snapshots":true,"track_dirty_pages":true}`, false},
	},
	"load after a device": {
		{"PUT", "/entropy", `{}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/file","mem_backend":{"backend_path":"$DIR/file","backend_type":"File"}}`, false},
		{"GET", "/", "", false},
	},
	"load after what is allowed": {
		{"PUT", "/logger", `{"level":"Error"}`, false},
		{"PUT", "/metrics", `{"metrics_path":"$DIR/metrics"}`, false},
		{"PUT", "/serial", `{}`, false},
		{"PUT", "/cpu-config", `{}`, false},
		{"PUT", "/snapshot/load", `{"snapshot_path":"$DIR/nope","mem_backend":{"backend_path":"$DIR/file","backend_type":"File"}}`, false},
	},
	"another method": {{"POST", "/vm", "{}", false}},
	"too long":       {{"PUT", "/boot-source", `{"kernel_image_path":"` + strings.Repeat("x", 51200) + `"}`, false}},
}

// reply is what came back, without what is not compared.
type reply struct {
	Status     string
	Deprecated string
	Body       any
}

var position = regexp.MustCompile(` at line \d+ column \d+`)

// TestAgainstFirecracker holds the same conversations with this package and with
// a real Firecracker.
func TestAgainstFirecracker(t *testing.T) {
	t.Parallel()
	program := os.Getenv(firecrackerEnv)
	if program == "" {
		t.Skipf("NOT COMPARED with a real Firecracker: %s does not name one", firecrackerEnv)
	}
	version, err := exec.CommandContext(t.Context(), program, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	v := strings.TrimPrefix(strings.Fields(string(version))[1], "v")
	for name, conversation := range conversations {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			realDir, fakeDir := scene(t), scene(t)
			real, fake := startReal(t, program, realDir), filepath.Join(fakeDir, "api.sock")
			listener, err := net.Listen("unix", fake)
			if err != nil {
				t.Fatal(err)
			}
			s, err := Serve(listener, Config{Version: v})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(s.Close)
			realConn, fakeConn := dial(t, real), dial(t, fake)
			for _, e := range conversation {
				want, got := realConn.ask(e, realDir), fakeConn.ask(e, fakeDir)
				if e.loose {
					want.Body, got.Body = nil, nil
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s %s %.200s (-Firecracker +apitest):\n%s", e.method, e.path, e.body, diff)
				}
			}
		})
	}
}

// scene is a directory with an empty file.
func scene(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func startReal(t *testing.T, program, dir string) string {
	t.Helper()
	socket := filepath.Join(dir, "api.sock")
	cmd := exec.Command(program, "--api-sock", socket, "--no-seccomp")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	died := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(died)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-died
	})
	c, err := api.Dial(t.Context(), socket, died) // waits for it
	if err != nil {
		t.Fatal(err)
	}
	if err = c.Close(); err != nil {
		t.Fatal(err)
	}
	return socket
}

type caller struct {
	conn net.Conn
	in   *bufio.Reader
}

func dial(t *testing.T, socket string) caller {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err = conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return caller{conn, bufio.NewReader(conn)}
}

func (c caller) ask(e exchange, dir string) reply {
	body := strings.ReplaceAll(e.body, "$DIR", dir)
	request, err := http.NewRequest(e.method, "http://localhost"+e.path, strings.NewReader(body))
	if err != nil {
		return reply{Status: err.Error()}
	}
	var b bytes.Buffer
	if err = request.Write(&b); err != nil {
		return reply{Status: err.Error()}
	}
	if _, err = c.conn.Write(b.Bytes()); err != nil {
		return reply{Status: "gone"}
	}
	response, err := http.ReadResponse(c.in, request)
	if err != nil {
		return reply{Status: "gone"}
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return reply{Status: err.Error()}
	}
	r := reply{Status: response.Status, Deprecated: response.Header.Get("Deprecation")}
	text := position.ReplaceAllString(strings.ReplaceAll(string(content), dir, "$DIR"), "")
	if err = json.Unmarshal([]byte(text), &r.Body); err != nil {
		r.Body = text
	}
	return r
}
