package network

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// A connection to anywhere arrives, with where it was to go, and carries what it
// is given.
func TestConnections(t *testing.T) {
	t.Parallel()
	s := newStack(t)
	go func() {
		for {
			conn, dst, err := s.link.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			go func() {
				_, _ = fmt.Fprintln(conn, dst)
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	sent := make([]byte, 1<<20)
	_, _ = rand.Read(sent)
	var wg sync.WaitGroup
	for _, to := range []string{"203.0.113.9:80", "10.1.2.3:65535", "172.30.0.1:1", "172.30.0.1:53", "8.8.8.8:1", "192.168.0.1:22", "169.254.169.254:80"} {
		conn := s.dial(t, netip.MustParseAddrPort(to))
		wg.Go(func() {
			go func() {
				_, _ = conn.Write(sent)
				_ = conn.(*net.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if want := append([]byte(to+"\n"), sent...); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes came back from %s, want %d; %v", len(got), to, len(want), err)
			}
		})
	}
	wg.Wait()
}

// Packets arrive with where they were to go, and the guest gets packets from
// whatever address we say.
func TestPackets(t *testing.T) {
	t.Parallel()
	s := newStack(t)
	conn := s.listen(t)
	self := netip.MustParseAddrPort(conn.LocalAddr().String())
	buf := make([]byte, 1<<16)
	for _, to := range []string{"1.1.1.1:53", "172.30.0.1:53", "10.0.0.1:1", "203.0.113.9:65535"} {
		dst := netip.MustParseAddrPort(to)
		for _, payload := range []string{"hello", "", strings.Repeat("x", maxPayload), strings.Repeat("y", 9000)} {
			if _, err := conn.WriteTo([]byte(payload), net.UDPAddrFromAddrPort(dst)); err != nil {
				t.Fatal(err)
			}
			if got, where := s.read(t); got != payload || where != dst {
				t.Errorf("%d bytes to %v, want %d to %v", len(got), where, len(payload), dst)
			}
			for _, src := range []netip.AddrPort{dst, netip.MustParseAddrPort("198.51.100.1:9")} {
				if err := s.link.WritePacket([]byte(payload), src, self); err != nil {
					t.Error(err)
				}
				if len(payload) > maxPayload {
					continue // dropped: the next to arrive is another
				}
				n, from, err := conn.ReadFrom(buf)
				if err != nil || string(buf[:n]) != payload || from.String() != src.String() {
					t.Errorf("guest got %d bytes from %v, want %d from %v; %v", n, from, len(payload), src, err)
				}
			}
		}
	}
}

// A tap that is taken by its name is one as any other, also for the second who
// takes it, and nobody takes it twice.
func TestNamed(t *testing.T) {
	t.Parallel()
	w := wireOf(t, nil, func() ([]int, error) { return SetupNamed(-1, -1, os.Geteuid()) })
	for range 2 {
		if err := takeTap(w.tap); err != nil {
			t.Fatal(err)
		}
		var other *os.File
		within(t, w.ns, func() (err error) { other, err = os.OpenFile("/dev/net/tun", os.O_RDWR|unix.O_NONBLOCK, 0); return err })
		if err := takeTap(other); !errors.Is(err, unix.EBUSY) {
			t.Errorf("tap that is taken: %v", err)
		}
		if got, _ := w.heard(t, "hello"); got != "hello" {
			t.Errorf("heard %q", got)
		}
		if err := w.link.WritePacket([]byte("answer"), netip.MustParseAddrPort("198.51.100.7:99"), netip.AddrPortFrom(guest(), 5)); err != nil {
			t.Error(err)
		}
		if replies := w.replies(t); len(replies) != 1 || !bytes.HasSuffix(replies[0], []byte("answer")) {
			t.Errorf("guest got %x", replies)
		}
		if err := w.tap.Close(); err != nil { // as when a monitor ends
			t.Fatal(err)
		}
		w.tap = other
	}
}

func takeTap(tun *os.File) error {
	req, err := unix.NewIfreq(TapName)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	raw, err := tun.SyscallConn()
	if err != nil {
		return err
	}
	var takeErr error
	err = raw.Control(func(fd uintptr) { takeErr = unix.IoctlIfreq(int(fd), unix.TUNSETIFF, req) })
	return errors.Join(err, takeErr)
}

// seen is all that a network namespace has.
func seen(t *testing.T, ns *os.File) (text string) {
	t.Helper()
	within(t, ns, func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			a := l.Attrs()
			text += fmt.Sprintln("link", a.Index, a.Name, a.Flags, a.MTU, a.HardwareAddr)
		}
		addrs, addrErr := netlink.AddrList(nil, netlink.FAMILY_ALL)
		for _, a := range addrs {
			text += fmt.Sprintln("address", a.LinkIndex, a.IPNet)
		}
		routes, routeErr := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
		for _, r := range routes {
			text += fmt.Sprintln("route", r)
		}
		rules, ruleErr := netlink.RuleList(netlink.FAMILY_ALL)
		for _, r := range rules {
			text += fmt.Sprintln("rule", r)
		}
		neighbours, neighErr := netlink.NeighList(0, netlink.FAMILY_ALL)
		for _, n := range neighbours {
			text += fmt.Sprintln("neighbour", n.LinkIndex, n)
		}
		tables, tableErr := (&nftables.Conn{}).ListTables()
		for _, table := range tables {
			text += fmt.Sprintln("table", table.Name)
		}
		for _, name := range []string{"ipv4/ip_forward", "ipv4/conf/all/rp_filter", "ipv6/conf/all/disable_ipv6"} {
			value, _ := os.ReadFile("/proc/sys/net/" + name)
			text += fmt.Sprintln(name, string(value))
		}
		return errors.Join(err, addrErr, routeErr, ruleErr, neighErr, tableErr)
	})
	return text
}

// A host's own network is the same before, during and after. The host is a
// namespace here, for others change the real one's.
func TestHostIsUntouched(t *testing.T) {
	t.Parallel()
	needRoot(t)
	host, err := namespace(nil, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		card := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth1"}
		nft := &nftables.Conn{}
		nft.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "firewall"})
		return errors.Join(
			netlink.LinkSetUp(lo), netlink.LinkAdd(card), netlink.LinkSetUp(card),
			netlink.AddrAdd(card, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 5), Mask: net.CIDRMask(24, 32)}}),
			nft.Flush(),
		)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = host.Close() }()
	before := seen(t, host)
	if !strings.Contains(before, "192.0.2.5/24") || !strings.Contains(before, "firewall") {
		t.Fatalf("host is %s", before)
	}
	t.Run("during", func(t *testing.T) {
		w := newWire(t, host)
		w.quiet(t)
		if diff := cmp.Diff(before, seen(t, host)); diff != "" {
			t.Error(diff)
		}
	})
	if diff := cmp.Diff(before, seen(t, host)); diff != "" {
		t.Error(diff)
	}
}

// TestNothingIsLeft: the namespace lasts for as long as somebody has a file of
// it. One end of a pair of cards in it goes with it, and so does the other.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	outside, err := namespace(nil, func() error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = outside.Close() }()
	within(t, w.ns, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "inside"}, PeerName: "canary", PeerNamespace: netlink.NsFd(outside.Fd()),
		})
	})
	if err = errors.Join(w.ns.Close(), w.tap.Close()); err != nil {
		t.Fatal(err)
	}
	there := func() (there bool) {
		within(t, outside, func() error {
			_, findErr := netlink.LinkByName("canary")
			if _, gone := errors.AsType[netlink.LinkNotFoundError](findErr); gone {
				return nil
			}
			there = true
			return findErr
		})
		return there
	}
	if !there() {
		t.Error("the namespace is gone while its sockets are open")
	}
	if err = w.link.Close(); err != nil {
		t.Error(err)
	}
	for there() { // until the kernel gets around to it
		<-time.After(10 * time.Millisecond)
	}
}

// holder is a process that has the files of a network from descriptor 3 on, and
// then one that is no socket.
func holder(t *testing.T) (w *wire, pid int, end func()) {
	t.Helper()
	w = newWire(t, nil)
	cmd := exec.CommandContext(t.Context(), "/bin/cat")
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }() // the process has its own
	cmd.ExtraFiles = append(append([]*os.File{}, w.link.files...), null)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(end)
	return w, cmd.Process.Pid, end
}

// A network is found again in a process that has its files. What else that
// process has to offer is refused, and not kept. Not parallel: it counts files.
func TestRecover(t *testing.T) {
	w, pid, end := holder(t)
	before := count(t)
	for name, tt := range map[string]struct {
		fds []int
		is  error
	}{
		"none":          {nil, errdef.ErrInvalid},
		"few":           {[]int{3, 4}, errdef.ErrInvalid},
		"many":          {[]int{3, 4, 5, 5}, errdef.ErrInvalid},
		"not-open":      {[]int{3, 4, 99}, unix.EBADF},
		"negative":      {[]int{3, -1, 5}, unix.EBADF},
		"swapped":       {[]int{4, 3, 5}, nil},
		"tcp-twice":     {[]int{3, 3, 5}, nil},
		"udp-for-raw":   {[]int{3, 4, 4}, errdef.ErrInvalid},
		"file-for-raw":  {[]int{3, 4, 6}, unix.ENOTSOCK},
		"file-for-udp":  {[]int{3, 6, 5}, unix.ENOTSOCK},
		"raw-for-udp":   {[]int{3, 5, 5}, errdef.ErrInvalid},
		"raw-for-tcp":   {[]int{5, 4, 5}, nil},
		"file-for-tcp":  {[]int{6, 4, 5}, unix.ENOTSOCK},
		"only-the-file": {[]int{6, 6, 6}, unix.ENOTSOCK},
	} {
		l, err := Recover(pid, tt.fds)
		if err == nil || (tt.is != nil && !errors.Is(err, tt.is)) {
			t.Errorf("%s: %v, want %v", name, err, tt.is)
		}
		if l != nil {
			_ = l.Close()
		}
		if now := count(t); now != before {
			t.Fatalf("%s: %d files before, %d now", name, before, now)
		}
	}
	if err := w.link.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Recover(pid, []int{3, 4, 5})
	if err != nil {
		t.Fatal(err)
	}
	w.link = again
	w.quiet(t)
	if !w.connect(t, 4000, netip.MustParseAddrPort("203.0.113.9:80")) {
		t.Error("no connection")
	}
	conn, dst, err := w.link.Accept()
	if err != nil || dst.String() != "203.0.113.9:80" {
		t.Fatalf("connection to %v, %v", dst, err)
	}
	_ = conn.Close()
	end()
	before = count(t)
	if _, err = Recover(pid, []int{3, 4, 5}); !errors.Is(err, unix.ESRCH) {
		t.Errorf("of a process that has ended: %v", err)
	}
	if now := count(t); now != before {
		t.Errorf("%d files before, %d now", before, now)
	}
}

// A monitor that was taken over has our sockets too, and can make system calls on
// them wait. Close comes back all the same.
func TestCloseOfSocketsThatWait(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	var wg sync.WaitGroup
	for _, f := range w.link.files[:fileRaw-1] {
		if err := unix.SetNonblock(int(f.Fd()), false); err != nil {
			t.Fatal(err)
		}
	}
	wg.Go(func() {
		if conn, _, err := w.link.Accept(); err == nil {
			t.Error("a connection", conn.Close())
		}
	})
	wg.Go(func() {
		for {
			if _, _, _, err := w.link.ReadPacket(make([]byte, 1)); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	})
	for !inCall(t, unix.SYS_ACCEPT4) || !inCall(t, unix.SYS_RECVMSG) {
	}
	if err := w.link.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// inCall reports whether a thread of this process is in a system call.
func inCall(t *testing.T, number int) bool {
	t.Helper()
	threads, err := filepath.Glob("/proc/self/task/*/syscall")
	if err != nil || len(threads) == 0 {
		t.Skipf("NOT TESTED: the kernel does not tell what threads do: %v", err)
	}
	for _, path := range threads {
		data, _ := os.ReadFile(path) // the thread may have ended
		if strings.HasPrefix(string(data), strconv.Itoa(number)+" ") {
			return true
		}
	}
	return false
}

// After Close, whoever waits is told so, and nothing is sent.
func TestClose(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, _, err := w.link.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
	})
	wg.Go(func() {
		if _, _, _, err := w.link.ReadPacket(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
			t.Errorf("ReadPacket: %v", err)
		}
	})
	for range 3 {
		wg.Go(func() {
			src, dst := netip.MustParseAddrPort("1.1.1.1:1"), netip.AddrPortFrom(guest(), 1)
			for {
				err := w.link.WritePacket([]byte("x"), src, dst)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if err := errors.Join(w.link.Close(), w.link.Close()); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

// What is no tap device cannot make a tap: the host cannot have networks then,
// and nothing is left open. Not parallel: it counts files.
func TestNoTaps(t *testing.T) {
	needRoot(t)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = null.Close() }()
	before := count(t)
	ns, err := namespace(nil, func() error {
		fds, setupErr := Setup(int(null.Fd()))
		if len(fds) > 0 {
			t.Errorf("files %v", fds)
		}
		return setupErr
	})
	if !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("Setup: %v", err)
	}
	if err = ns.Close(); err != nil {
		t.Error(err)
	}
	if now := count(t); now != before {
		t.Errorf("%d files before, %d now", before, now)
	}
}

// A namespace in which there is a network already gets no other, and keeps what
// it has.
func TestSetupTwice(t *testing.T) {
	t.Parallel()
	w := newWire(t, nil)
	within(t, w.ns, func() error {
		if fds, err := Setup(-1); err == nil || len(fds) > 0 {
			t.Errorf("files %v, %v", fds, err)
		}
		return nil
	})
	w.quiet(t)
	if got := w.neighbours(t); len(got) != 1 || got[0].HardwareAddr.String() != vmm.GuestNet().GuestMAC.String() {
		t.Errorf("neighbours: %v", got)
	}
}
