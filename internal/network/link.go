package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// Link is a guest's network, as its daemon sees it. It is safe for concurrent
// use; ReadPacket is for one goroutine at a time.
type Link struct {
	tcp *net.TCPListener
	udp *net.UDPConn
	oob []byte // for ReadPacket

	mu     sync.Mutex
	files  []*os.File // tcp, udp, and the one by which the guest is sent packets
	closed bool
}

var _ vmm.Link = (*Link)(nil)

// Open makes a Link of the files that Setup returned, less the tap. It owns them,
// also when it fails.
func Open(files []*os.File) (_ *Link, err error) {
	defer func() {
		if err != nil {
			closeFiles(files)
		}
	}()
	if len(files) != countFiles-1 {
		return nil, fmt.Errorf("%w: network of %d files", errdef.ErrInvalid, len(files))
	}
	l := &Link{oob: make([]byte, 256), files: files}
	ln, err := net.FileListener(files[fileTCP-1])
	if err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	var ok bool
	if l.tcp, ok = ln.(*net.TCPListener); !ok {
		return nil, errors.Join(fmt.Errorf("%w: network has a %T", errdef.ErrInvalid, ln), ln.Close())
	}
	conn, err := net.FilePacketConn(files[fileUDP-1])
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open network: %w", err), ln.Close())
	}
	if l.udp, ok = conn.(*net.UDPConn); !ok {
		return nil, errors.Join(fmt.Errorf("%w: network has a %T", errdef.ErrInvalid, conn), conn.Close(), ln.Close())
	}
	kind, err := unix.GetsockoptInt(int(files[fileRaw-1].Fd()), unix.SOL_SOCKET, unix.SO_TYPE)
	if err == nil && kind != unix.SOCK_RAW {
		err = fmt.Errorf("%w: network has a socket of type %d", errdef.ErrInvalid, kind)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open network: %w", err), conn.Close(), ln.Close())
	}
	return l, nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written to it
	}
}

// Recover takes the files of a Link from a process that has them under the
// numbers fds, as the monitor of a machine does that an earlier daemon started.
func Recover(pid int, fds []int) (*Link, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("recover network of process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(pidfd) }()
	var files []*os.File
	for _, fd := range fds {
		got, err := unix.PidfdGetfd(pidfd, fd, 0)
		if err != nil {
			closeFiles(files)
			return nil, fmt.Errorf("recover network of process %d: %w", pid, err)
		}
		files = append(files, os.NewFile(uintptr(got), "link"))
	}
	return Open(files)
}

// Accept waits for a connection of the guest.
func (l *Link) Accept() (net.Conn, netip.AddrPort, error) {
	conn, err := l.tcp.AcceptTCP()
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	// The connection has the address that the guest meant.
	local, ok := conn.LocalAddr().(*net.TCPAddr)
	if !ok {
		return nil, netip.AddrPort{}, errors.Join(fmt.Errorf("%w: connection to %v", errdef.ErrInvalid, conn.LocalAddr()), conn.Close())
	}
	dst := local.AddrPort()
	return conn, netip.AddrPortFrom(dst.Addr().Unmap(), dst.Port()), nil
}

// ReadPacket waits for a UDP packet of the guest.
func (l *Link) ReadPacket(p []byte) (n int, src, dst netip.AddrPort, err error) {
	n, oobn, _, src, err := l.udp.ReadMsgUDPAddrPort(p, l.oob)
	if err != nil {
		return 0, src, dst, err
	}
	dst, err = destination(l.oob[:oobn])
	return n, netip.AddrPortFrom(src.Addr().Unmap(), src.Port()), dst, err
}

// destination finds where a packet was meant to go in what the kernel says of it.
func destination(oob []byte) (netip.AddrPort, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for i := range messages {
		m := &messages[i]
		if m.Header.Level != unix.SOL_IP || m.Header.Type != unix.IP_RECVORIGDSTADDR || len(m.Data) < 8 {
			continue
		}
		// struct sockaddr_in: family, port, address.
		port := binary.BigEndian.Uint16(m.Data[2:])
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Data[4:8])), port), nil
	}
	return netip.AddrPort{}, fmt.Errorf("%w: packet without a destination", errdef.ErrInvalid)
}

// Sizes of headers without options (RFC 791, RFC 768).
const (
	ipHeader  = 20
	udpHeader = 8
	// maxPayload is what fits a packet on the guest's link, whose MTU is 1500.
	maxPayload = 1500 - ipHeader - udpHeader
)

// WritePacket sends the guest a UDP packet that comes from src. One that does not
// fit the guest's link is dropped, and so is one that the guest does not take.
func (l *Link) WritePacket(p []byte, src, dst netip.AddrPort) error {
	if len(p) > maxPayload || !src.Addr().Is4() || !dst.Addr().Is4() {
		return nil
	}
	packet := udpPacket(p, src, dst)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return net.ErrClosed
	}
	to := &unix.SockaddrInet4{Addr: dst.Addr().As4()}
	raw, err := l.files[fileRaw-1].SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Control(func(fd uintptr) { sendErr = unix.Sendto(int(fd), packet, unix.MSG_DONTWAIT, to) })
	if errors.Is(sendErr, unix.EAGAIN) || errors.Is(sendErr, unix.ENOBUFS) {
		sendErr = nil // as a wire that is full does
	}
	return errors.Join(err, sendErr)
}

// udpPacket puts the two headers in front of a payload. The kernel fills in the
// checksum of the first (raw(7)).
func udpPacket(p []byte, src, dst netip.AddrPort) []byte {
	const ttl = 64
	packet := make([]byte, ipHeader+udpHeader+len(p))
	packet[0] = 0x45 // version 4, five words
	binary.BigEndian.PutUint16(packet[2:], uint16(len(packet)))
	packet[8], packet[9] = ttl, unix.IPPROTO_UDP
	from, to := src.Addr().As4(), dst.Addr().As4()
	copy(packet[offSource:], from[:])
	copy(packet[offDestination:], to[:])
	udp := packet[ipHeader:]
	binary.BigEndian.PutUint16(udp, src.Port())
	binary.BigEndian.PutUint16(udp[2:], dst.Port())
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	copy(udp[udpHeader:], p)
	binary.BigEndian.PutUint16(udp[6:], udpChecksum(from, to, udp))
	return packet
}

// udpChecksum is that of RFC 768, over the addresses too. Zero would say that
// there is none.
func udpChecksum(from, to [4]byte, udp []byte) uint16 {
	sum := uint32(unix.IPPROTO_UDP) + uint32(len(udp))
	for _, part := range [][]byte{from[:], to[:], udp} {
		for len(part) > 1 {
			sum += uint32(binary.BigEndian.Uint16(part))
			part = part[2:]
		}
		if len(part) == 1 {
			sum += uint32(part[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if sum == 0xffff {
		return 0xffff
	}
	return ^uint16(sum)
}

// Close lets go of the network. Whoever waits in Accept or ReadPacket gets
// net.ErrClosed.
func (l *Link) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.closed = true
	defer closeFiles(l.files)
	closed := make(chan error, 1)
	go func() { closed <- errors.Join(l.tcp.Close(), l.udp.Close()) }()
	timer := time.NewTimer(closeTime)
	defer timer.Stop()
	select {
	case err := <-closed:
		return err
	case <-timer.C:
	}
	// Close waits for system calls that wait themselves: the monitor, which has
	// the sockets too, has made them ones that do. This ends them for good.
	for _, f := range l.files[:fileRaw-1] {
		_ = unix.Shutdown(int(f.Fd()), unix.SHUT_RDWR) // says that they are not connected, and does it
	}
	return <-closed
}

// closeTime is what closing two sockets never takes.
const closeTime = time.Second
