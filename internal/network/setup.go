// Package network makes the network that a machine's card is at: a namespace
// that has a tap and no way out. Whatever the guest sends, and wherever to, ends
// in two sockets there, one for TCP and one for UDP, which the daemon holds: what
// is to leave the host it carries itself (package egress). So the host's own
// network is never touched: no address, route, rule or interface of it comes or
// goes with a sandbox, and there is nothing to clean up. The namespace, with all
// that is in it, is gone as soon as nobody has a file of it.
//
// A launcher in the jail calls Setup in the namespace that it was born into; Open
// makes a vmm.Link of what that returned, and Recover finds it again after the
// daemon has been away.
//
// The kernel's part: tproxy in Documentation/networking/tproxy.rst, and
// IP_TRANSPARENT and IP_RECVORIGDSTADDR of ip(7).
package network

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// TapName is the name of the tap, for programs that take it by its name.
const TapName = "tap0"

const (
	// relayPort is where the two sockets listen. Nobody has to know it.
	relayPort = 1
	// table is the routing table by which every address is this namespace's own.
	table = 100
	// backlog is how many connections may wait to be accepted.
	backlog = 256
)

// The files that Setup returns, in this order.
const (
	fileTap = iota
	fileTCP
	fileUDP
	fileRaw
	countFiles
)

// Setup makes the network in the namespace of this thread, in which there is
// nothing yet. It returns the descriptors of the tap, of the two sockets that
// hear the guest, and of one that speaks to it; the caller closes them. tun is
// the device /dev/net/tun, opened in that namespace, or -1 if it is to be opened
// here; the caller closes that too. Setup needs CAP_NET_ADMIN there, and returns
// errdef.ErrUnsupported on a kernel without taps or nftables.
func Setup(tun int) (fds []int, err error) {
	tap, err := openTap(tun)
	if err != nil {
		return nil, fmt.Errorf("make tap: %w", err)
	}
	return setUp(tap)
}

// SetupNamed does what Setup does, for a program that opens /dev/net/tun by itself
// and takes the tap by its name, TapName, with the flags IFF_TAP, IFF_NO_PI and
// IFF_VNET_HDR. The first descriptor that it returns is what the program is to be
// given for that device. The tap is for user, as this namespace has its number, and
// nobody has it yet; it stays when the program lets go of it. maker and taker are
// that device, opened twice, or -1; the tap is free to be taken when every copy of
// maker is closed.
func SetupNamed(maker, taker, user int) (_ []int, err error) {
	tap, err := openTap(maker)
	if err != nil {
		return nil, fmt.Errorf("make tap: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Close(tap)) }()
	for _, step := range []struct {
		name  string
		call  uint
		value int
	}{{"TUNSETOWNER", unix.TUNSETOWNER, user}, {"TUNSETPERSIST", unix.TUNSETPERSIST, 1}} {
		if err = unix.IoctlSetInt(tap, step.call, step.value); err != nil {
			return nil, fmt.Errorf("make tap: %w: %s: %w", errdef.ErrUnsupported, step.name, err)
		}
	}
	free, err := openTun(taker)
	if err != nil {
		return nil, fmt.Errorf("open tap device: %w", err)
	}
	return setUp(free)
}

// setUp does all but the tap, whose descriptor it owns.
func setUp(tap int) (fds []int, err error) {
	fds = append(fds, tap)
	defer func() {
		if err != nil {
			for _, fd := range fds {
				err = errors.Join(err, unix.Close(fd))
			}
			fds = nil
		}
	}()
	if err = configure(); err != nil {
		return fds, fmt.Errorf("configure network: %w", err)
	}
	if err = installRules(&nftables.Conn{}); err != nil {
		return fds, fmt.Errorf("%w: install nftables rules: %w", errdef.ErrUnsupported, err)
	}
	for _, open := range []func() (int, error){listenTCP, listenUDP, openRaw} {
		fd, err := open()
		if err != nil {
			return fds, fmt.Errorf("open sockets: %w", err)
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// openTap makes the tap. Packets on it have a header of virtio's, as all cards
// of machines have agreed on with their guests.
func openTap(tun int) (fd int, err error) {
	if fd, err = openTun(tun); err != nil {
		return -1, err
	}
	req, err := unix.NewIfreq(TapName)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			err = fmt.Errorf("%w: TUNSETIFF: %w", errdef.ErrUnsupported, err)
		}
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// openTun opens the device that taps are made and taken by, or copies a descriptor
// of it.
func openTun(tun int) (fd int, err error) {
	if tun >= 0 {
		fd, err = unix.FcntlInt(uintptr(tun), unix.F_DUPFD_CLOEXEC, 0)
	} else if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0); err != nil {
		err = errdef.WithHint(fmt.Errorf("%w: open /dev/net/tun: %w", errdef.ErrUnsupported, err), "modprobe tun")
	}
	if err != nil {
		return -1, err
	}
	if err = unix.SetNonblock(fd, true); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// configure gives the tap its address, and makes every other address one of this
// namespace's own, for what comes in by the tap.
func configure() error {
	for name, value := range map[string]string{
		"ipv6/conf/all/disable_ipv6":             "1", // guests have IPv4 only
		"ipv6/conf/" + TapName + "/disable_ipv6": "1",
		"ipv4/conf/" + TapName + "/rp_filter":    "0", // the rules look at the source
	} {
		// They only save work: the rules drop IPv6, and where /proc/sys is read-only,
		// as under systemd's ProtectKernelTunables, the defaults do.
		err := os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o600)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EROFS) {
			return err
		}
	}
	n := vmm.GuestNet()
	link, err := netlink.LinkByName(TapName)
	if err != nil {
		return err
	}
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	gateway := &netlink.Addr{IPNet: &net.IPNet{IP: n.Gateway.AsSlice(), Mask: net.CIDRMask(n.Guest.Bits(), 32)}}
	rule := netlink.NewRule()
	rule.IifName, rule.Table = TapName, table
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"bring loopback up", func() error { return netlink.LinkSetUp(loopback) }},
		{"set hardware address", func() error { return netlink.LinkSetHardwareAddr(link, n.GatewayMAC) }},
		{"set address", func() error { return netlink.AddrAdd(link, gateway) }},
		// All networks of the host share a table of neighbours, which a guest could
		// fill with what it says of itself.
		{"listen to no neighbour", func() error { return netlink.LinkSetARPOff(link) }},
		{"bring tap up", func() error { return netlink.LinkSetUp(link) }},
		// It is the only neighbour, and was told our address in the same way.
		{"name the guest", func() error {
			return netlink.NeighSet(&netlink.Neigh{
				LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: n.Guest.Addr().AsSlice(), HardwareAddr: n.GuestMAC,
			})
		}},
		{"take every address", func() error {
			return netlink.RouteAdd(&netlink.Route{
				LinkIndex: loopback.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
				Type: unix.RTN_LOCAL, Table: table, Scope: netlink.SCOPE_HOST,
			})
		}},
		{"route what the guest sends", func() error { return netlink.RuleAdd(rule) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
	}
	return nil
}

// transparent opens a socket that may have the address of any other host.
func transparent(kind int) (fd int, err error) {
	fd, err = unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1),
		unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1),
	)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrInet4{Port: relayPort})
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func listenTCP() (int, error) {
	fd, err := transparent(unix.SOCK_STREAM)
	if err != nil {
		return -1, err
	}
	if err = unix.Listen(fd, backlog); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

func listenUDP() (int, error) { return transparent(unix.SOCK_DGRAM) }

// openRaw opens the socket by which the guest is sent packets that come from any
// address and port: the header is ours to write.
func openRaw() (int, error) {
	return unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
}
