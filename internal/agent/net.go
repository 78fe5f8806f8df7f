package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/guestproto"
)

// netConfig is what the kernel's command line says of the network card.
type netConfig struct {
	guest      netip.Prefix
	gateway    netip.Addr // and DNS server
	gatewayMAC net.HardwareAddr
}

// parseNet reads ADDRESS/BITS,GATEWAY,MAC: the guest's IPv4 address, and its
// gateway's addresses, on the same link.
func parseNet(text string) (c netConfig, err error) {
	bad := func(what string) (netConfig, error) {
		return netConfig{}, fmt.Errorf("%w: %s=%q: %s", errdef.ErrInvalid, optNet, text, what)
	}
	words := strings.Split(text, ",")
	if len(words) != 3 {
		return bad("want ADDRESS/BITS,GATEWAY,MAC")
	}
	if c.guest, err = netip.ParsePrefix(words[0]); err != nil || !host(c.guest.Addr()) || c.guest.Bits() == 0 {
		return bad("not an IPv4 address and prefix: " + words[0])
	}
	if c.gateway, err = netip.ParseAddr(words[1]); err != nil || !host(c.gateway) {
		return bad("not an IPv4 address: " + words[1])
	}
	if c.gateway == c.guest.Addr() || !c.guest.Contains(c.gateway) {
		return bad("the gateway is no neighbour of the guest")
	}
	const ethernet, group = 6, 1
	if c.gatewayMAC, err = net.ParseMAC(words[2]); err != nil || len(c.gatewayMAC) != ethernet || c.gatewayMAC[0]&group != 0 {
		return bad("not the address of a network card: " + words[2])
	}
	return c, nil
}

// host reports whether a is an IPv4 address that one host can have.
func host(a netip.Addr) bool {
	return a.Is4() && !a.IsUnspecified() && !a.IsMulticast() && !a.IsLoopback() && a != netip.AddrFrom4([4]byte{255, 255, 255, 255})
}

// network configures the network card, if there is one, and tells programs of
// the DNS server. What it sets up is frozen with the machine, and as true in
// every fork.
func (b *boot) network() error {
	text := b.option(optNet, "")
	if text == "" {
		return nil
	}
	config, err := parseNet(text)
	if err != nil {
		return err
	}
	var name string
	err = waitFor("network card", deviceTime, func() bool {
		name = findCard("/sys/class/net")
		return name != ""
	})
	if err != nil {
		return err
	}
	if b.card, err = openCard(name, config); err != nil {
		return err
	}
	return errors.Join(
		withoutIPv6("/proc/sys/net/ipv6/conf", name),
		b.card.configure(),
		replaceFile("/etc/resolv.conf", resolvConf(config.gateway)),
	)
}

// findCard is the name of the first network interface below class that has the
// driver of the machine's card, or "".
func findCard(class string) string {
	drivers, _ := filepath.Glob(class + "/*/device/driver")
	for _, driver := range drivers {
		if target, err := os.Readlink(driver); err == nil && filepath.Base(target) == "virtio_net" {
			return filepath.Base(filepath.Dir(filepath.Dir(driver)))
		}
	}
	return ""
}

// withoutIPv6 keeps an interface from having IPv6 addresses of its own making,
// and from looking for routers, where the kernel has IPv6 at all.
func withoutIPv6(conf, name string) error {
	err := writeControl(filepath.Join(conf, name, "disable_ipv6"), "1")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// resolvConf names the DNS server. It is one hop away and answers, or refuses,
// at once: whoever waits for it longer waits for nothing.
func resolvConf(server netip.Addr) string {
	return "nameserver " + server.String() + "\noptions timeout:3 attempts:2\n"
}

// replaceFile puts a file of the machine's in the place of whatever was at path
// but a directory: what a symbolic link there leads to stays as it is.
func replaceFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	fresh := path + ".tine"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(fresh, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(fresh, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(fresh))
	}
	return nil
}

// card is the machine's network card, and a socket to configure it by, which is
// kept: to ask whether it is up costs a fork one system call.
type card struct {
	name   string
	config netConfig
	socket int
}

func openCard(name string, config netConfig) (*card, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return &card{name: name, config: config, socket: fd}, nil
}

// raise sees that the card is up. One that its guest has taken down has lost
// its routes and neighbours, so it is configured anew.
func (c *card) raise() error {
	flags, err := c.flags()
	if err != nil || flags&unix.IFF_UP != 0 {
		return err
	}
	return c.configure()
}

// configure gives the card its address, a route to all the world, and its only
// neighbour, for whom nobody need ask on the link then: a fork's first packet is
// the one that was to be sent. To do so again does no harm.
func (c *card) configure() error {
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"set address", func() error { return c.setAddress(unix.SIOCSIFADDR, c.config.guest.Addr()) }},
		{"set netmask", func() error { return c.setAddress(unix.SIOCSIFNETMASK, netmask(c.config.guest.Bits())) }},
		{"bring up", c.up},
		{"set default route", c.setRoute},
		{"name gateway's address", c.setNeighbour},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("network card %s: %s: %w", c.name, step.name, err)
		}
	}
	return nil
}

func netmask(bits int) netip.Addr {
	return netip.AddrFrom4([4]byte(net.CIDRMask(bits, 32)))
}

func (c *card) setAddress(request uint, a netip.Addr) error {
	req, err := unix.NewIfreq(c.name)
	if err != nil {
		return err
	}
	if err = req.SetInet4Addr(a.AsSlice()); err != nil {
		return err
	}
	return os.NewSyscallError("ioctl", unix.IoctlIfreq(c.socket, request, req))
}

func (c *card) flags() (uint16, error) {
	req, err := unix.NewIfreq(c.name)
	if err != nil {
		return 0, err
	}
	err = unix.IoctlIfreq(c.socket, unix.SIOCGIFFLAGS, req)
	return req.Uint16(), os.NewSyscallError("ioctl SIOCGIFFLAGS", err)
}

func (c *card) up() error {
	flags, err := c.flags()
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(c.name)
	if err != nil {
		return err
	}
	req.SetUint16(flags | unix.IFF_UP)
	return os.NewSyscallError("ioctl SIOCSIFFLAGS", unix.IoctlIfreq(c.socket, unix.SIOCSIFFLAGS, req))
}

// rtentry is struct rtentry of linux/route.h.
type rtentry struct {
	_                     uint64
	dst, gateway, genmask unix.RawSockaddrInet4
	flags                 uint16
	_                     int16
	_, _                  uint64
	_                     int16   // metric
	_                     uintptr // the device's name: it follows from the gateway
	_, _                  uint64  // MTU and window
	_                     uint16  // round-trip time
}

// setRoute adds the default route, unless it is there.
func (c *card) setRoute() error {
	any4 := netip.IPv4Unspecified()
	route := rtentry{
		dst: sockaddr(any4), gateway: sockaddr(c.config.gateway), genmask: sockaddr(any4),
		flags: unix.RTF_UP | unix.RTF_GATEWAY,
	}
	err := c.ioctl(unix.SIOCADDRT, unsafe.Pointer(&route)) //nolint:gosec // x/sys has no wrapper for this ioctl
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return os.NewSyscallError("ioctl SIOCADDRT", err)
}

// arpreq is struct arpreq of linux/if_arp.h.
type arpreq struct {
	address  unix.RawSockaddrInet4
	hardware unix.RawSockaddr
	flags    int32
	_        unix.RawSockaddr // a netmask
	device   [unix.IFNAMSIZ]byte
}

// The flags of an entry that is complete and stays, of linux/if_arp.h.
const arpComplete, arpPermanent = 0x02, 0x04

// setNeighbour says for good which hardware address the gateway has.
func (c *card) setNeighbour() error {
	entry := arpreq{
		address: sockaddr(c.config.gateway), hardware: unix.RawSockaddr{Family: unix.ARPHRD_ETHER},
		flags: arpComplete | arpPermanent,
	}
	for i, b := range c.config.gatewayMAC {
		entry.hardware.Data[i] = int8(b)
	}
	copy(entry.device[:unix.IFNAMSIZ-1], c.name)
	err := c.ioctl(unix.SIOCSARP, unsafe.Pointer(&entry)) //nolint:gosec // x/sys has no wrapper for this ioctl
	return os.NewSyscallError("ioctl SIOCSARP", err)
}

func (c *card) ioctl(request uint, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.socket), uintptr(request), uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

func sockaddr(a netip.Addr) unix.RawSockaddrInet4 {
	return unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.As4()}
}

// stepNetwork: addresses are the same in every fork, but its network card must
// be up.
func (a *Agent) stepNetwork(context.Context, *guestproto.Identity) error { return a.sys.raiseNetwork() }
