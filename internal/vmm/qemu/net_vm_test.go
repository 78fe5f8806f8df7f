//go:build vm

package qemu_test

import (
	"context"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tinevm/tine/internal/guest"
	"github.com/tinevm/tine/internal/guestmem"
	"github.com/tinevm/tine/internal/vmm"
	"github.com/tinevm/tine/internal/vmtest"
)

// answer is what hears the guest of vm from now on: it says name to whoever
// connects to the gateway's port 7, and then all that it hears.
func answer(t *testing.T, vm vmm.VM, name string) {
	t.Helper()
	link, err := vm.Link()
	try(t, err)
	t.Cleanup(func() { try(t, link.Close()) })
	go func() {
		for {
			conn, dst, err := link.Accept()
			if err != nil {
				return // closed
			}
			if want := netip.AddrPortFrom(vmm.GuestNet().Gateway, 7); dst != want {
				t.Errorf("a connection to %v, want %v", dst, want)
			}
			go func() {
				_, _ = io.WriteString(conn, name+"\n")
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
}

// caller prints the server's name, and whether it has said again, in order, a
// megabyte that is sent to it.
const caller = `
import os, socket
s = socket.create_connection(("172.30.0.1", 7), 20)
f = s.makefile("rb")
name = f.readline().decode().strip()
part = os.urandom(65536)
same = True
for _ in range(16):
    s.sendall(part)
    same = same and f.read(len(part)) == part
print(name, same)`

// speak has the guest call the server on its link, which has the machine's name.
func (r *rig) speak(t *testing.T, c *guest.Client, id string) {
	t.Helper()
	if got, want := shell(t, c, `python3 -c "$0"`, caller), id+" True\n"; got != want {
		t.Errorf("on its link the guest of %s hears %q, want %q", id, got, want)
	}
}

func TestNet(t *testing.T) {
	r := newRig(t, vmm.Machine{MemoryMiB: 256, VCPUs: 1, Net: true})
	t.Run("configured", r.netConfigured)
	t.Run("forks", r.netForks)
	t.Run("taken-down", r.netTakenDown)
	t.Run("branch", r.netBranch)
	t.Run("no-card", r.noCard)
}

// netConfigured: what the guest has of its network.
func (r *rig) netConfigured(t *testing.T) {
	c := client(t, r.restore(t, "configured", r.device, nil))
	for script, want := range map[string]string{
		"cat /etc/resolv.conf":                              "nameserver 172.30.0.1\noptions timeout:3 attempts:2\n",
		"stat -c %F-%a /etc/resolv.conf":                    "regular file-644\n",
		"cd /sys/class/net && for i in *; do echo $i; done": "eth0\nlo\n",
		"cat /sys/class/net/eth0/address":                   "02:74:69:6e:65:02\n",
		"cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6; grep eth0 /proc/net/if_inet6 || echo none": "1\nnone\n",
		"awk '/eth0/ {print $1, $3, $4, $6}' /proc/net/arp":                                        "172.30.0.1 0x6 02:74:69:6e:65:01 eth0\n",
		"awk '/eth0/ {print $2, $3, $8}' /proc/net/route":                                          "00000000 01001EAC 00000000\n00001EAC 00000000 FCFFFFFF\n",
		"grep -c localhost /etc/hosts":                                                             "2\n",
	} {
		if got := shell(t, c, script); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
}

// netForks: each fork speaks with its own link, and they all have one address.
func (r *rig) netForks(t *testing.T) {
	clients := map[string]*guest.Client{}
	for _, id := range []string{"one", "two"} {
		clients[id] = r.identified(t, r.restore(t, id, r.device, nil), id)
	}
	for range 2 {
		for id, c := range clients {
			r.speak(t, c, id)
		}
	}
}

func (r *rig) identified(t *testing.T, vm vmm.VM, id string) *guest.Client {
	t.Helper()
	stream, err := vm.Dial(bound(t))
	try(t, err)
	c, err := guest.DialIdentity(bound(t), stream, guest.NewIdentity(id, id))
	try(t, err)
	t.Cleanup(func() { _ = c.Close() }) // its machine may be gone before it
	return c
}

// netTakenDown: a card that the guest has taken down comes up with the next
// identity, with all that it had.
func (r *rig) netTakenDown(t *testing.T) {
	vm := r.restore(t, "down", r.device, nil)
	c := client(t, vm)
	shell(t, c, `python3 -c "$0"`, `
import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH22x", b"eth0", 0))`)
	if got := shell(t, c, "cat /sys/class/net/eth0/flags; grep -c eth0 /proc/net/route || :"); got != "0x1002\n0\n" && got != "0x2\n0\n" {
		t.Errorf("it is not down: %q", got)
	}
	try(t, c.Close())
	r.speak(t, r.identified(t, vm, "again"), "down")
}

// netBranch: a machine is branched with a connection open. Its connection goes
// on, and its branch has a card that works, on another link.
func (r *rig) netBranch(t *testing.T) {
	src := r.restore(t, "src", r.device, nil)
	c := client(t, src)
	p, err := c.Exec(bound(t), guest.ExecSpec{Argv: []string{"python3", "-uc", `
import socket
s = socket.create_connection(("172.30.0.1", 7), 20)
f = s.makefile("rb")
print(f.readline().decode().strip())
while line := input():
    s.sendall(line.encode() + b"\n")
    print(f.readline().decode().strip())`}, Stdin: true})
	try(t, err)
	hear := func(want string) {
		t.Helper()
		var said strings.Builder
		for !strings.HasSuffix(said.String(), "\n") {
			out, nextErr := p.Next(bound(t))
			try(t, nextErr)
			if said.Write(out.Data); out.Exit != nil {
				t.Fatalf("it has ended: %q", said.String())
			}
		}
		if said.String() != want+"\n" {
			t.Errorf("on the open connection: %q, want %q", said.String(), want)
		}
	}
	hear("src")
	try(t, src.Pause(bound(t)))
	device := filepath.Join(r.work, "src.device")
	try(t, src.SaveDevice(bound(t), device))
	space, err := src.Memory()
	try(t, err)
	frozen, err := space.Copy(bound(t))
	try(t, err)
	try(t, src.Resume(bound(t)))
	fork := r.restore(t, "branch", device, func(_ context.Context, to guestmem.Space) error { return copyPages(to, frozen) })
	try(t, frozen.Close())
	r.speak(t, r.identified(t, fork, "branch"), "branch")
	_, err = io.WriteString(p.Stdin(), "still here\n")
	try(t, err)
	hear("still here")
	r.speak(t, c, "src")
}

// noCard: a machine without a network card has none, and its guest's files are
// the image's.
func (r *rig) noCard(t *testing.T) {
	img := vmtest.Image(t)
	dir := filepath.Join(r.work, "plain")
	try(t, os.Mkdir(dir, 0o700))
	vm, err := r.engine.Start(bound(t), vmm.StartSpec{Boot: vmtest.Boot(img), Common: vmm.Common{
		ID: "plain", Dir: dir, Root: r.root, DieWithParent: true, Machine: vmm.Machine{MemoryMiB: 192, VCPUs: 1},
	}})
	try(t, err)
	t.Cleanup(func() { try(t, vm.Kill(context.WithoutCancel(t.Context()))) })
	got := shell(t, client(t, vm), `cd /sys/class/net && for i in *; do echo $i; done
grep -o 'tine\.net[^ ]*' /proc/cmdline; grep -o '^virtio_net' /proc/modules; ls /etc/resolv.conf; :`)
	if got != "lo\n" {
		t.Errorf("without a network card: %q", got)
	}
}
