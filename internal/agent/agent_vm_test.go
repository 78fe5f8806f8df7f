//go:build vm

package agent_test

import (
	"context"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmtest"
)

// boot starts a machine of the shared image with the agent as its first process.
func boot(t *testing.T) vmm.VM {
	t.Helper()
	img := vmtest.Image(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	vm, err := vmtest.Engine(t).Start(ctx, vmm.StartSpec{
		Common: vmm.Common{ID: "agent", Dir: t.TempDir(), Machine: vmm.Machine{MemoryMiB: 256, VCPUs: 1}, Root: img.RootPath(), DieWithParent: true},
		Boot:   vmtest.Boot(img),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
		defer cancel()
		if err := vm.Kill(ctx); err != nil {
			t.Errorf("kill: %v", err)
		}
	})
	return vm
}

func meet(t *testing.T, vm vmm.VM) *guest.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := vm.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	c, err := guest.Dial(ctx, stream)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func inGuest(t *testing.T, c *guest.Client, script string) string {
	t.Helper()
	res, err := c.Run(within(t), sh(script), nil, 1<<20)
	if err != nil || res.Exit.Code != 0 {
		t.Fatalf("%s: %+v, %s, %v", script, res.Exit, res.Stderr, err)
	}
	return strings.TrimSpace(string(res.Stdout))
}

func TestMachine(t *testing.T) {
	vm := boot(t)
	c := meet(t, vm)
	t.Run("changes", func(t *testing.T) { machineChanges(t, c) })
	t.Run("upper-is-hidden", func(t *testing.T) { machineHidesUpper(t, c) })
	t.Run("secrets", func(t *testing.T) { machineSecrets(t, c) })
	t.Run("fork", func(t *testing.T) { machineForks(t, c) })
	t.Run("host-vanishes", func(t *testing.T) { machineWithoutHost(t, vm, c) })
}

func machineChanges(t *testing.T, c *guest.Client) {
	start := time.Now()
	before := changes(t, c)
	t.Logf("a machine that did nothing: %d changes in %s: %q", len(before), time.Since(start), paths(before))
	inGuest(t, c, `echo new > /root/new; rm /etc/debian_version; echo more >> /etc/passwd
		rm -r /usr/share/doc && mkdir /usr/share/doc && echo x > /usr/share/doc/x
		ln -s /root/new /tmp/link; dd if=/dev/zero of=/tmp/big bs=1M count=70 2>/dev/null; echo x > /run/x; echo x > /dev/shm/x`)
	start = time.Now()
	all := map[string]guest.Change{}
	for _, ch := range changes(t, c) {
		all[ch.Path] = ch
	}
	t.Logf("%d changes in %s", len(all), time.Since(start))
	for path, want := range map[string]guestproto.ChangeKind{
		"/root": guestproto.ChangeDirectory, "/root/new": guestproto.ChangeFile, "/etc/debian_version": guestproto.ChangeDeleted,
		"/etc/passwd": guestproto.ChangeFile, "/usr/share/doc/x": guestproto.ChangeFile, "/usr/share/doc": guestproto.ChangeDirectory,
		"/tmp/link": guestproto.ChangeSymlink, "/tmp/big": guestproto.ChangeFile,
	} {
		if ch, ok := all[path]; !ok || ch.Kind != want {
			t.Errorf("%s is %+v, want a %s", path, ch, want)
		}
	}
	if !all["/usr/share/doc"].Opaque || len(all["/tmp/big"].Hash) != 0 || len(all["/root/new"].Hash) == 0 || all["/tmp/big"].Size != 70<<20 {
		t.Errorf("%+v, %+v, %+v", all["/usr/share/doc"], all["/tmp/big"], all["/root/new"])
	}
	for path := range all {
		if slices.ContainsFunc([]string{"/run", "/proc", "/sys", "/dev"}, func(p string) bool { return strings.HasPrefix(path+"/", p+"/") }) {
			t.Errorf("%s is told", path)
		}
	}
	inGuest(t, c, "rm /tmp/big")
}

// machineHidesUpper: no path leads to the overlay's parts, and what the agent
// keeps of them cannot be written to, even by root.
func machineHidesUpper(t *testing.T, c *guest.Client) {
	got := inGuest(t, c, `ls -d /upper /lower /newroot 2>/dev/null
		for fd in /proc/1/fd/*; do test -d $fd/. && touch $fd/harm 2>/dev/null && echo harm $(readlink $fd); done; true`)
	if got != "" {
		t.Errorf("got %q", got)
	}
}

func machineSecrets(t *testing.T, c *guest.Client) {
	if err := entrust(t, c, false, secret("token", "s3cret")); err != nil {
		t.Fatal(err)
	}
	got := inGuest(t, c, "cd /run/tine/secrets; stat -c '%a %u %g' . token; stat -f -c %T .; cat token")
	if got != "700 0 0\n400 0 0\ntmpfs\ns3cret" {
		t.Errorf("got %q", got)
	}
	spec := sh("echo $token; cat /run/tine/secrets/token")
	spec.User, spec.SecretEnv = "nobody", []string{"token"}
	if res, err := c.Run(within(t), spec, nil, 1000); err != nil || string(res.Stdout) != "s3cret\n" || res.Exit.Code == 0 {
		t.Errorf("%+v, %v", res, err)
	}
	if err := entrust(t, c, false); err != nil {
		t.Fatal(err)
	}
	if got = inGuest(t, c, "ls -d /run/tine/secrets 2>&1 || true"); !strings.Contains(got, "No such") {
		t.Errorf("got %q", got)
	}
}

func machineForks(t *testing.T, c *guest.Client) {
	inGuest(t, c, "rm -f /root/go /root/started")
	ctx := within(t)
	e := background(t, c, "import os; os.chdir('/root')"+strings.ReplaceAll(drawing, "%d", "2"))
	eventually(t, "the evaluation to run", func() bool { _, err := c.Stat(ctx, "/root/started", ""); return err == nil })
	start := time.Now()
	if err := c.Identify(ctx, guest.NewIdentity("fork", "gen")); err != nil {
		t.Fatal(err)
	}
	t.Logf("identity in the middle of an evaluation: %s", time.Since(start))
	start = time.Now()
	if err := c.Identify(ctx, guest.NewIdentity("fork", "gen")); err != nil {
		t.Fatal(err)
	}
	t.Logf("and again: %s", time.Since(start))
	time.Sleep(200 * time.Millisecond) // draws with the new state
	inGuest(t, c, "touch /root/go")
	<-e.done
	var got [3]int
	if e.err != nil || json.Unmarshal(e.result.ValueJSON, &got) != nil || got[1] < 100 || got[1] > got[0]-100 || got[2] != got[1] {
		t.Errorf("%s: %+v, %v", e.result.ValueJSON, e.result, e.err)
	}
}

// machineWithoutHost: a process does not stand still because of the output that
// it had for a host that is gone.
func machineWithoutHost(t *testing.T, vm vmm.VM, c *guest.Client) {
	ctx := within(t)
	p, err := c.Exec(ctx, guest.ExecSpec{Argv: []string{"python3", "-uc", `
import os, time
last, gap = time.monotonic(), 0
while not os.path.exists('/root/stop'):
    print('x' * 1000)
    now = time.monotonic()
    gap, last = max(gap, now - last), now
open('/root/gap', 'w').write(str(int(gap * 1000)))`}})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if _, err = p.Next(ctx); err != nil {
			t.Fatal(err)
		}
	}
	_ = c.Close()
	const away = 5 * time.Second
	time.Sleep(away)
	c = meet(t, vm)
	again, err := c.Attach(ctx, p.PID())
	if err != nil {
		t.Fatal(err)
	}
	if again.Dropped() == 0 {
		t.Error("nothing was dropped: it stood still")
	}
	inGuest(t, c, "touch /root/stop")
	if exit, werr := again.Wait(ctx); werr != nil || exit.Code != 0 {
		t.Fatalf("%+v, %v", exit, werr)
	}
	gap, err := strconv.Atoi(inGuest(t, c, "cat /root/gap"))
	if err != nil || time.Duration(gap)*time.Millisecond > away/2 {
		t.Errorf("it stood still for %d ms, %v", gap, err)
	}
	t.Logf("the longest pause was %d ms; %d bytes were dropped", gap, again.Dropped())
}
