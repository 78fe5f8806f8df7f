//go:build vm

package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/egress"
	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/network"
	"github.com/tinevm/tine/internal/sandbox"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmm/firecracker"
	"github.com/tinevm/tine/internal/vmtest"
)

// TestJailed: what the host sees of a machine's monitor.
func TestJailed(t *testing.T) {
	l := newLab(t)
	ids := l.fork(t, 2)
	users := map[string]bool{}
	for _, id := range ids {
		info, err := l.Get(id)
		if err != nil {
			t.Fatal(err)
		}
		proc := fmt.Sprintf("/proc/%d/", info.PID)
		status, err := os.ReadFile(proc + "status")
		if err != nil {
			t.Fatal(err)
		}
		fields := map[string]string{}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			fields[name] = strings.TrimSpace(value)
		}
		for name, want := range map[string]string{
			"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0000000000000000", "CapPrm": "0000000000000000",
			"CapBnd": "0000000000000000", "CapAmb": "0000000000000000", "CapInh": "0000000000000000", "Groups": "",
		} {
			if fields[name] != want {
				t.Errorf("%s of its monitor is %q, want %q", name, fields[name], want)
			}
		}
		if uid := strings.Fields(fields["Uid"])[0]; len(uid) != 10 || users[uid] {
			t.Errorf("user of its monitor is %s, others' are %v", uid, users)
		} else {
			users[uid] = true
		}
		for _, kind := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup"} {
			ours, ownErr := os.Readlink("/proc/self/ns/" + kind)
			theirs, theirErr := os.Readlink(proc + "ns/" + kind)
			if ownErr != nil || theirErr != nil || ours == theirs {
				t.Errorf("%s namespace of its monitor: %q, ours %q, %v, %v", kind, theirs, ours, ownErr, theirErr)
			}
		}
		entries, err := os.ReadDir(proc + "root")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			own := e.Name() == "run" && l.Engine.Name() == firecracker.Name
			if !own && !slices.Contains([]string{"etc", "lib", "lib64", "usr"}, e.Name()) {
				t.Errorf("its monitor sees /%s", e.Name())
			}
		}
		for _, fd := range openFiles(t, info.PID) {
			if strings.HasSuffix(fd, "/memory") && !strings.HasPrefix(fd, "r ") {
				t.Errorf("its monitor can write to the snapshot: %s", fd)
			}
		}
	}
}

// openFiles are the files that a process has open, each with how.
func openFiles(t *testing.T, pid int) (found []string) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		path, err := os.Readlink(filepath.Join(dir, e.Name()))
		info, statErr := os.Lstat(filepath.Join(dir, e.Name()))
		if err != nil || statErr != nil {
			t.Fatal(err, statErr)
		}
		how := "r "
		if info.Mode()&0o200 != 0 {
			how = "rw "
		}
		found = append(found, how+path)
	}
	return found
}

// TestQuotas: a machine that takes more than it may ends, or waits, and others
// do not notice.
func TestQuotas(t *testing.T) {
	l := newLab(t)
	good := l.fork(t, 1)[0]
	greedy := l.fork(t, 1, func(r *sandbox.ForkRequest) { r.Limits = vmm.Limits{MemoryMiB: 160} })[0]
	_, err := l.run(within(t, time.Minute), greedy, guest.ExecSpec{Argv: []string{"python3", "-c", "import os; b = os.urandom(1 << 20) ; a = [bytearray(b) for i in range(150)]; print(len(a))"}})
	if err == nil {
		t.Error("150 MiB fit into a machine that may take 160 with its monitor")
	}
	eventually(t, "the end of the greedy one", func() bool { i, _ := l.Get(greedy); return i.State == sandbox.Dead })
	info, err := l.Get(greedy)
	if err != nil || !info.OutOfMemory || !strings.Contains(info.Reason, "out of memory") {
		t.Errorf("%+v, %v", info, err)
	}
	slow := l.fork(t, 1, func(r *sandbox.ForkRequest) { r.Limits = vmm.Limits{CPUMillis: 300} })[0]
	if _, err = l.run(within(t, time.Minute), slow, guest.ExecSpec{Argv: []string{"python3", "-c", "for i in range(200000): pass"}}); err != nil {
		t.Error(err)
	}
	usage, err := l.Usage(slow)
	if err != nil || usage.Throttled == 0 || usage.PrivateBytes < 4<<20 || usage.PIDs == 0 {
		t.Errorf("%+v, %v", usage, err)
	}
	if res, err := l.run(within(t, time.Minute), good, guest.ExecSpec{Argv: []string{"echo", "fine"}}); err != nil || string(res.Stdout) != "fine\n" {
		t.Errorf("another sandbox: %q, %v", res.Stdout, err)
	}
}

// eventually waits until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for late := time.Now().Add(time.Minute); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(late) {
			t.Fatalf("in vain waited for %s", what)
		}
	}
}

// internet is a namespace of the test's own with a web server and a name server,
// joined to this one by a pair of interfaces.
type internet struct {
	server netip.Addr // of the web server
	dns    string
	names  map[string]string // to address
}

// newInternet uses addresses that are set aside for documentation.
func newInternet(t *testing.T) *internet {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: not root: cannot make a network namespace")
	}
	world := &internet{server: netip.MustParseAddr("203.0.113.2"), dns: "203.0.113.2:53"}
	world.names = map[string]string{
		"api.example.com": world.server.String(), "other.example.org": world.server.String(),
		"rebind.example.com": "127.0.0.1", "private.example.com": "10.0.0.1", "meta.example.com": "169.254.169.254",
	}
	ready := make(chan error)
	stop := make(chan struct{})
	go world.live(ready, stop)
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	// What is sent to its addresses must not go anywhere else.
	if route, err := exec.Command("ip", "route", "get", world.server.String()).CombinedOutput(); err != nil || !strings.Contains(string(route), "dev tine-test0") {
		t.Fatalf("the test's server is not where it should be: %v: %s", err, route)
	}
	t.Cleanup(func() {
		close(stop) // the interface goes with the namespace
		eventually(t, "the end of the test's namespace", func() bool {
			_, err := net.InterfaceByName("tine-test0")
			return err != nil
		})
	})
	return world
}

// live keeps a thread in a namespace of its own until stop closes. It must not be
// the process's first, which never ends, and whose namespace counts as that of
// the process.
func (n *internet) live(ready chan error, stop chan struct{}) {
	runtime.LockOSThread() // and never unlocked: the namespace ends with the thread
	if unix.Gettid() == os.Getpid() {
		go n.live(ready, stop)
		<-stop
		return
	}
	ready <- n.serve(stop)
	<-stop
}

// serve makes the namespace of this thread, and serves in it until stop closes.
func (n *internet) serve(stop chan struct{}) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	// Only this thread is elsewhere: the process's namespace is the host's.
	host := []string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", os.Getpid()), "ip"}
	for _, args := range [][]string{
		append(slices.Clone(host), "link", "add", "tine-test0", "type", "veth", "peer", "name", "eth0", "netns", strconv.Itoa(unix.Gettid())),
		append(slices.Clone(host), "addr", "add", "203.0.113.1/24", "dev", "tine-test0"),
		append(slices.Clone(host), "link", "set", "tine-test0", "up"),
		{"ip", "addr", "add", n.server.String() + "/24", "dev", "eth0"},
		{"ip", "link", "set", "eth0", "up"},
		{"ip", "link", "set", "lo", "up"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", args, err, out)
		}
	}
	web, err := net.Listen("tcp", n.server.String()+":80")
	if err != nil {
		return err
	}
	names, err := net.ListenPacket("udp", n.dns)
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, "hello %s %s", r.Host, r.Header.Get("X-Api-Key"))
	})}
	resolver := &dns.Server{PacketConn: names, Handler: dns.HandlerFunc(n.resolve)}
	go func() { _ = srv.Serve(web) }()
	go func() { _ = resolver.ActivateAndServe() }()
	go func() {
		<-stop
		_ = errors.Join(srv.Close(), resolver.Shutdown())
	}()
	return nil
}

func (n *internet) resolve(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	if a, ok := n.names[strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))]; ok && q.Question[0].Qtype == dns.TypeA {
		m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(a)})
	}
	_ = w.WriteMsg(m)
}

// hostState is all that the host's own network is, less what the test has added.
func hostState(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, args := range [][]string{
		{"ip", "-o", "link"}, {"ip", "-o", "addr"}, {"ip", "route", "show", "table", "all"}, {"ip", "rule"}, {"ip", "netns"}, {"ip", "tuntap"},
	} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		for line := range strings.Lines(string(out)) {
			if !strings.Contains(line, "tine-test0") { // the test's own, which is still on its way up
				all.WriteString(line)
			}
		}
	}
	forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	if err != nil {
		t.Fatal(err)
	}
	all.Write(forward)
	tables, err := (&nftables.Conn{}).ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		_, _ = fmt.Fprintln(&all, "table", table.Family, table.Name)
	}
	return all.String()
}

// fetch is a program that prints what a URL has, or denied.
const fetch = `
import sys, urllib.request
for url in sys.argv[1:]:
    try:
        print(urllib.request.urlopen(url, timeout=10).read().decode())
    except Exception as e:
        print("denied")`

// netLab is a lab whose daemon comes and goes, with the snapshot net-test of a
// machine that has a network card.
type netLab struct {
	*lab
	world *internet
	open  func() *sandbox.Manager
}

func newNetLab(t *testing.T, world *internet) *netLab {
	t.Helper()
	store, snap := vmtest.Snapshot(t)
	dir := t.TempDir()
	l := &netLab{world: world, open: func() *sandbox.Manager {
		m, err := sandbox.NewManager(within(t, time.Minute), sandbox.Config{
			Dir: dir, Engine: vmtest.Engine(t), Snapshots: store, Images: vmtest.Images(t),
			Net: sandbox.NetConfig{Bounds: egress.Bounds{Local: network.Local()}, Upstream: []string{world.dns}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}}
	l.lab = &lab{Manager: l.open(), dir: dir, store: store, tags: []string{"net-test"}}
	_, err := l.CreateSnapshot(within(t, 2*time.Minute), sandbox.SnapshotRequest{
		Tag: "net-test", Image: snap.Manifest.Image, Replace: true, Machine: vmm.Machine{Net: true, MemoryMiB: 192},
		Warmup: []string{"python3 -c 'import urllib.request'"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *netLab) netFork(t *testing.T, reach *sandbox.Net) string {
	t.Helper()
	return l.fork(t, 1, func(r *sandbox.ForkRequest) { r.Snapshot, r.Net = "net-test", reach })[0]
}

// want has a sandbox fetch URLs, and checks what it gets.
func (l *netLab) want(t *testing.T, what, id string, wants map[string]string) {
	t.Helper()
	urls := slices.Sorted(maps.Keys(wants))
	res, err := l.run(within(t, time.Minute), id, guest.ExecSpec{Argv: append([]string{"python3", "-c", fetch}, urls...)})
	if err != nil || res.Exit.Code != 0 {
		t.Fatalf("%s: %v: %s", what, err, res.Stderr)
	}
	got := strings.Split(strings.TrimSpace(string(res.Stdout)), "\n")
	for i, url := range urls {
		if i >= len(got) || strings.TrimSpace(got[i]) != wants[url] {
			state, stateErr := l.NetState(id)
			t.Fatalf("%s: %s gives %q, want %q; %+v, %v", what, url, got, wants[url], state, stateErr)
		}
	}
}

// TestNetwork: sandboxes reach what they are allowed, by address and by name, and
// nothing else; each has its own; and the host's network is what it was.
func TestNetwork(t *testing.T) {
	world := newInternet(t)
	before := hostState(t)
	l := newNetLab(t, world)
	address, hello := "http://"+world.server.String()+"/", "hello "+world.server.String()
	const denied = "denied"
	closed, open := l.netFork(t, nil), l.netFork(t, rules(t, "203.0.113.0/24:80"))
	named := l.netFork(t, rules(t, "*.example.com:80"))

	l.want(t, "nothing is allowed", closed, map[string]string{address: denied})
	l.want(t, "an address is allowed", open, map[string]string{
		address: hello, "http://203.0.113.1/": denied, "http://127.0.0.1:8889/": denied,
	})
	l.want(t, "names are allowed", named, map[string]string{
		"http://api.example.com/": "hello api.example.com", "http://other.example.org/": denied,
		"http://rebind.example.com/": denied, "http://private.example.com/": denied, "http://meta.example.com/": denied,
	})
	state, err := l.NetState(closed)
	if err != nil || state.Stats.Denied == 0 || state.Denials[0].Reason != egress.NoRule {
		t.Errorf("denials of one that may reach nothing: %+v, %v", state, err)
	}

	// The daemon goes, and the next one carries on.
	l.close(t)
	l.Manager = l.open()
	l.want(t, "under another daemon", open, map[string]string{address: hello})
	l.want(t, "under another daemon, with nothing allowed", closed, map[string]string{address: denied})
	if _, err = l.SetNet(t.Context(), closed, rules(t, "203.0.113.2").Rules); err != nil {
		t.Fatal(err)
	}
	l.want(t, "after it was allowed", closed, map[string]string{address: hello})
	l.secret(t)
	if during := hostState(t); during != before {
		t.Errorf("with networks the host's is\n%s, and was\n%s", during, before)
	}
	l.killed(t, named)
	for _, id := range []string{closed, open, named} {
		if err = l.Kill(context.WithoutCancel(t.Context()), id); err != nil {
			t.Error(err)
		}
	}
	l.end(t)
	if after := hostState(t); after != before {
		t.Errorf("the host's network is\n%s, and was\n%s", after, before)
	}
}

// secret: what is added on the way out reaches the server, and not the guest.
func (l *netLab) secret(t *testing.T) {
	t.Helper()
	reach := rules(t, "api.example.com:80")
	reach.Secrets = []egress.Secret{{Name: "api", Header: "X-Api-Key", Value: "s3cret", Hosts: []string{"api.example.com"}, Clear: true}}
	id := l.netFork(t, reach)
	l.want(t, "with a secret", id, map[string]string{"http://api.example.com/": "hello api.example.com s3cret"})
	res, err := l.run(within(t, time.Minute), id, guest.ExecSpec{Argv: []string{"sh", "-c", "env; ls /run/tine/secrets; :"}})
	if err != nil || strings.Contains(string(res.Stdout), "s3cret") {
		t.Errorf("in the guest: %s, %v", res.Stdout, err)
	}
	if err = l.Kill(t.Context(), id); err != nil {
		t.Error(err)
	}
}

// killed: a machine that is killed with no daemon there leaves nothing for one to
// clean up but its directory.
func (l *netLab) killed(t *testing.T, id string) {
	t.Helper()
	info, err := l.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	l.close(t)
	if err = unix.Kill(info.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	l.Manager = l.open()
	eventually(t, "its death to be noticed", func() bool { i, _ := l.Get(id); return i.State == sandbox.Dead })
}

func rules(t *testing.T, texts ...string) *sandbox.Net {
	t.Helper()
	reach := &sandbox.Net{}
	for _, text := range texts {
		rule, err := egress.ParseRule(text)
		if err != nil {
			t.Fatal(err)
		}
		reach.Rules.Allow = append(reach.Rules.Allow, rule)
	}
	return reach
}
