package agent

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
	"github.com/tinevm/tine/internal/vmm"
)

const goodNet = "172.30.0.2/30,172.30.0.1,02:74:69:6e:65:01"

func TestParseNet(t *testing.T) {
	t.Parallel()
	for text, good := range map[string]bool{
		goodNet: true,
		"10.0.0.1/8,10.255.255.254,02:00:00:00:00:00": true,
		"10.0.0.1/31,10.0.0.0,02-00-00-00-00-00":      true,
		"":                                            false,
		"172.30.0.2/30,172.30.0.1":                    false, // no MAC
		goodNet + ",":                                 false,
		goodNet + ",x":                                false,
		"172.30.0.2,172.30.0.1,02:74:69:6e:65:01":            false, // no prefix
		"172.30.0.2/33,172.30.0.1,02:74:69:6e:65:01":         false,
		"172.30.0.2/0,172.30.0.1,02:74:69:6e:65:01":          false,
		"172.30.0.2/30,172.30.0.2,02:74:69:6e:65:01":         false, // its own gateway
		"172.30.0.2/30,172.30.0.5,02:74:69:6e:65:01":         false, // on another link
		"172.30.0.2/30,,02:74:69:6e:65:01":                   false,
		"172.30.0.2/30,172.30.0.1,":                          false,
		"172.30.0.2/30,172.30.0.1,02:74:69:6e:65":            false,
		"172.30.0.2/30,172.30.0.1,01:74:69:6e:65:01":         false, // a group's
		"172.30.0.2/30,172.30.0.1,0:1:2:3:4:5:6:7":           false,
		"fd00::2/64,fd00::1,02:74:69:6e:65:01":               false,
		"::ffff:172.30.0.2/126,172.30.0.1,02:74:69:6e:65:01": false,
		"224.0.0.2/30,224.0.0.1,02:74:69:6e:65:01":           false,
		"127.0.0.2/30,127.0.0.1,02:74:69:6e:65:01":           false,
		"0.0.0.0/30,0.0.0.1,02:74:69:6e:65:01":               false,
	} {
		c, err := parseNet(text)
		switch {
		case good && err != nil:
			t.Errorf("%q: %v", text, err)
		case !good && !errors.Is(err, errdef.ErrInvalid):
			t.Errorf("%q: %+v, %v, want ErrInvalid", text, c, err)
		}
	}
}

// TestParseNetOfEngines: what engines write is read as what they mean.
func TestParseNetOfEngines(t *testing.T) {
	t.Parallel()
	n := vmm.GuestNet()
	text, ok := strings.CutPrefix(n.Option(), optNet+"=")
	c, err := parseNet(text)
	if !ok || err != nil || c.guest != n.Guest || c.gateway != n.Gateway || !bytes.Equal(c.gatewayMAC, n.GatewayMAC) {
		t.Errorf("%q is %+v, %v", n.Option(), c, err)
	}
}

func FuzzParseNet(f *testing.F) {
	for _, text := range []string{
		goodNet, "", ",,", "10.0.0.1/8,10.255.255.254,02-00-00-00-00-00", "fd00::2/64,fd00::1,02:74:69:6e:65:01",
		"1.2.3.4/32,1.2.3.4,0200.0000.0001", "255.255.255.255/1,128.0.0.1,02:74:69:6e:65:01", "1.1.1.1%eth0/8,1.1.1.2,x",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parseNet(text)
		if err != nil {
			if !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if !c.guest.Addr().Is4() || !c.gateway.Is4() || !c.guest.Contains(c.gateway) || c.gateway == c.guest.Addr() || len(c.gatewayMAC) != 6 {
			t.Errorf("%q is %+v", text, c)
		}
		again, err := parseNet(fmt.Sprintf("%s,%s,%s", c.guest, c.gateway, c.gatewayMAC))
		if err != nil || again.guest != c.guest || again.gateway != c.gateway || !bytes.Equal(again.gatewayMAC, c.gatewayMAC) {
			t.Errorf("%q is %+v, and then %+v, %v", text, c, again, err)
		}
	})
}

// TestLayouts: those of the kernel, on 64-bit machines.
func TestLayouts(t *testing.T) {
	t.Parallel()
	if got := unsafe.Sizeof(rtentry{}); got != 120 {
		t.Errorf("struct rtentry has %d bytes", got)
	}
	if got := unsafe.Offsetof(rtentry{}.flags); got != 56 {
		t.Errorf("rt_flags is at %d", got)
	}
	if got := unsafe.Sizeof(arpreq{}); got != 68 {
		t.Errorf("struct arpreq has %d bytes", got)
	}
	if got := unsafe.Offsetof(arpreq{}.device); got != 52 {
		t.Errorf("arp_dev is at %d", got)
	}
}

func TestFindCard(t *testing.T) {
	t.Parallel()
	class := t.TempDir()
	card := func(name, driver string) {
		t.Helper()
		device := filepath.Join(class, name, "device")
		if err := errors.Join(os.MkdirAll(device, 0o755), os.Symlink("../../bus/drivers/"+driver, filepath.Join(device, "driver"))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(class, "lo"), 0o755); err != nil {
		t.Fatal(err)
	}
	card("enp0s1", "e1000")
	if got := findCard(class); got != "" {
		t.Errorf("without a card: %q", got)
	}
	card("ens4", "virtio_net")
	if got := findCard(class); got != "ens4" {
		t.Errorf("with a card: %q", got)
	}
}

func TestWithoutIPv6(t *testing.T) {
	t.Parallel()
	conf := t.TempDir()
	if err := withoutIPv6(conf, "eth0"); err != nil {
		t.Errorf("without the file: %v", err)
	}
	file := filepath.Join(conf, "eth0", "disable_ipv6")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("0"), 0o644), withoutIPv6(conf, "eth0")); err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(file); string(text) != "1" {
		t.Errorf("the file holds %q, %v", text, err)
	}
}

// TestReplaceFile: whatever is in the way, and never through it.
func TestReplaceFile(t *testing.T) {
	t.Parallel()
	text := resolvConf(netip.MustParseAddr("172.30.0.1"))
	if text != "nameserver 172.30.0.1\noptions timeout:3 attempts:2\n" {
		t.Errorf("resolv.conf is %q", text)
	}
	for name, prepare := range map[string]func(path string) error{
		"nothing":            func(string) error { return nil },
		"no directory":       func(path string) error { return os.Remove(filepath.Dir(path)) },
		"a file":             func(path string) error { return os.WriteFile(path, []byte(strings.Repeat("long", 100)), 0o600) },
		"a link":             func(path string) error { return os.Symlink("../elsewhere", path) },
		"a link to nowhere":  func(path string) error { return os.Symlink("/nowhere/at/all", path) },
		"a link in the way":  func(path string) error { return os.Symlink("../elsewhere", path+".tine") },
		"a half-written one": func(path string) error { return os.WriteFile(path+".tine", []byte("half"), 0o600) },
	} {
		root := t.TempDir()
		elsewhere, path := filepath.Join(root, "elsewhere"), filepath.Join(root, "etc", "resolv.conf")
		err := errors.Join(os.Mkdir(filepath.Dir(path), 0o755), os.WriteFile(elsewhere, []byte("precious"), 0o600), prepare(path))
		if err = errors.Join(err, replaceFile(path, text)); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		info, err := os.Lstat(path)
		if err != nil || !info.Mode().IsRegular() || info.Mode().Perm() != 0o644 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
		if got, err := os.ReadFile(path); string(got) != text {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if got, err := os.ReadFile(elsewhere); string(got) != "precious" {
			t.Errorf("%s: elsewhere is %q, %v", name, got, err)
		}
		if names, err := os.ReadDir(filepath.Dir(path)); len(names) != 1 {
			t.Errorf("%s: %v, %v", name, names, err)
		}
	}
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(dir+"/resolv.conf", 0o755), os.Mkdir(dir+"/resolv.conf/x", 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(dir+"/resolv.conf", text); err == nil {
		t.Error("a directory was replaced")
	}
	if names, err := os.ReadDir(dir); len(names) != 1 {
		t.Errorf("what is left: %v, %v", names, err)
	}
}

// TestNoCard: without the option there is nothing to do, and nothing is done.
func TestNoCard(t *testing.T) {
	t.Parallel()
	b := &boot{cmdline: []string{"quiet", "tine.link=virtio-serial"}}
	if err := b.network(); err != nil || b.card != nil {
		t.Errorf("%v, %v", b.card, err)
	}
	if err := (&machine{}).raiseNetwork(); err != nil {
		t.Error(err)
	}
	b.cmdline = append(b.cmdline, optNet+"=nonsense")
	if err := b.network(); !errors.Is(err, errdef.ErrInvalid) || !strings.Contains(err.Error(), "tine.net") {
		t.Errorf("nonsense: %v", err)
	}
}

// carded is a machine whose network card does as it is told.
type carded struct {
	*Fake
	err    error
	raised int
}

func (c *carded) raiseNetwork() error { c.raised++; return c.err }

// TestIdentityRaisesNetwork: a fork whose card does not come up is none.
func TestIdentityRaisesNetwork(t *testing.T) {
	t.Parallel()
	a := New(Config{Fake: NewFake(t.TempDir())})
	defer a.Close()
	sys := &carded{Fake: a.sys.(*Fake)}
	a.sys = sys
	put := func(id guestproto.Identity) error {
		_, err := a.putOnIdentity(t.Context(), nil, guestproto.Encode(&id))
		return err
	}
	id := guestproto.Identity{
		Entropy: make([]byte, 32), Clock: 1, Hostname: "h", MachineID: strings.Repeat("0", 32),
		BootID: strings.Repeat("0", 36), Generation: "g",
	}
	if err := put(id); err != nil || sys.raised != 1 {
		t.Errorf("raised %d times: %v", sys.raised, err)
	}
	if err := put(guestproto.Identity{Clock: 1, ClockOnly: true}); err != nil || sys.raised != 1 {
		t.Errorf("raised %d times by a machine that goes on: %v", sys.raised, err)
	}
	sys.err = errors.New("no carrier pigeon")
	if err := put(id); err == nil || !strings.Contains(err.Error(), "identity: network: no carrier pigeon") {
		t.Errorf("the card fails: %v", err)
	}
}

// inNetwork runs f on a thread of its own in a new network namespace.
func inNetwork(t *testing.T, f func() error) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("not root: cannot make a network namespace")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make a network namespace: %w", err)
			return
		}
		done <- f()
	}()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// makeTap makes an interface that is there for as long as the file is open.
func makeTap(name string) (*os.File, error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	tap := os.NewFile(uintptr(fd), name)
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	return tap, err
}

// TestConfigureCard configures an interface of this machine's, in a network
// namespace of the test's, and takes it down again.
func TestConfigureCard(t *testing.T) {
	t.Parallel()
	inNetwork(t, func() error {
		tap, err := makeTap("card0")
		if err != nil {
			return err
		}
		defer tap.Close()
		config, err := parseNet(goodNet)
		if err != nil {
			return err
		}
		c, err := openCard("card0", config)
		if err != nil {
			return err
		}
		defer unix.Close(c.socket)
		var errs []error
		for i, do := range []func() error{c.raise, c.configure, c.raise} {
			if err = errors.Join(do(), c.isConfigured()); err != nil {
				errs = append(errs, fmt.Errorf("step %d: %w", i, err))
			}
		}
		errs = append(errs, c.down(), c.raise(), c.isConfigured())
		none, err := openCard("card1", config)
		if err != nil {
			return err
		}
		defer unix.Close(none.socket)
		if err = none.raise(); !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("no such card: %w", err))
		}
		if err = none.configure(); !errors.Is(err, unix.ENODEV) || !strings.Contains(err.Error(), "card1: set address") {
			errs = append(errs, fmt.Errorf("no such card: %w", err))
		}
		return errors.Join(errs...)
	})
}

func (c *card) down() error {
	req, err := unix.NewIfreq(c.name)
	if err != nil {
		return err
	}
	return unix.IoctlIfreq(c.socket, unix.SIOCSIFFLAGS, req)
}

// isConfigured asks the kernel for all that configure has set.
func (c *card) isConfigured() error {
	if flags, err := c.flags(); err != nil || flags&unix.IFF_UP == 0 {
		return fmt.Errorf("flags %#x, error %w", flags, err)
	}
	for request, want := range map[uint]string{unix.SIOCGIFADDR: "172.30.0.2", unix.SIOCGIFNETMASK: "255.255.255.252"} {
		req, err := unix.NewIfreq(c.name)
		if err != nil {
			return err
		}
		if err = unix.IoctlIfreq(c.socket, request, req); err != nil {
			return err
		}
		addr, err := req.Inet4Addr()
		if err != nil {
			return err
		}
		if got := netip.AddrFrom4([4]byte(addr)).String(); got != want {
			return fmt.Errorf("ioctl %#x says %s, want %s", request, got, want)
		}
	}
	for file, want := range map[string][]string{
		// 172.30.0.1 as the kernel shows it, and flags up and gateway.
		"/proc/thread-self/net/route": {"card0\t00000000\t01001EAC\t0003\t", "card0\t00001EAC\t00000000\t0001\t"},
		// Complete and permanent.
		"/proc/thread-self/net/arp": {"172.30.0.1       0x1         0x6         02:74:69:6e:65:01     *        card0"},
	} {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		for _, w := range want {
			if strings.Count(string(text), w) != 1 {
				return fmt.Errorf("%s says\n%s, and not, or more than once, %q", file, text, w)
			}
		}
	}
	return nil
}
