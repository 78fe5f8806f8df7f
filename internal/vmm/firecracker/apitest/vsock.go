package apitest

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
)

// vsockDevice is the host's end of a vsock device: its socket, and the
// connections that came by it.
type vsockDevice struct {
	s        *Server
	cid      uint64
	path     string
	listener net.Listener

	mu      sync.Mutex
	wake    sync.Cond // when running or closed changes
	running bool
	closed  bool
	stale   bool // a snapshot was taken: connections end when the guest runs
	conns   map[net.Conn]bool
	port    uint32 // the last one of the host's
}

// maxSocketPath is what an address takes, without its zero.
const maxSocketPath = 107

// newVsock makes the socket. It returns Firecracker's words when it can not.
func newVsock(s *Server, cid uint64, path string) (*vsockDevice, string) {
	if len(path) > maxSocketPath {
		return nil, "path must be shorter than SUN_LEN"
	}
	listener, err := new(net.ListenConfig).Listen(s.ctx, "unix", path)
	if err != nil {
		return nil, osError(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	d := &vsockDevice{s: s, cid: cid, path: path, listener: listener, conns: map[net.Conn]bool{}, port: 1 << 30}
	d.wake.L = &d.mu
	s.work.Go(d.accept)
	return d, ""
}

func (d *vsockDevice) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	_ = d.listener.Close()
	for conn := range d.conns {
		_ = conn.Close()
	}
	d.wake.Broadcast()
}

// setRunning lets the guest answer, or stops it. A guest that runs again after a
// snapshot has lost its connections: the device was reset. Firecracker has hosts
// find out when they next send something, and here they find out at once.
func (d *vsockDevice) setRunning(running bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running = running
	if running && d.stale {
		d.stale = false
		for conn := range d.conns {
			_ = conn.Close()
		}
	}
	d.wake.Broadcast()
}

// reset is what a snapshot does to connections.
func (d *vsockDevice) reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stale = true
}

func (d *vsockDevice) accept() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		d.s.work.Go(func() {
			defer d.release(conn)
			if d.hold(conn) {
				d.connect(conn)
			}
		})
	}
}

// hold waits until the guest runs.
func (d *vsockDevice) hold(conn net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for !d.running && !d.closed {
		d.wake.Wait()
	}
	d.conns[conn] = true
	return !d.closed
}

func (d *vsockDevice) release(conn net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, conn)
	_ = conn.Close()
}

// connect reads "CONNECT PORT\n", and hands the connection to who listens.
func (d *vsockDevice) connect(conn net.Conn) {
	port, ok := readConnect(conn)
	if !ok || d.s.cfg.Guest == nil {
		return
	}
	handle := d.s.cfg.Guest(port)
	if handle == nil {
		return
	}
	if _, err := fmt.Fprintf(conn, "OK %d\n", d.nextPort()); err == nil {
		handle(conn)
	}
}

func (d *vsockDevice) nextPort() uint32 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.port++
	return d.port - 1
}

// maxConnect is how long Firecracker lets the line be.
const maxConnect = 32

func readConnect(conn net.Conn) (port uint32, ok bool) {
	var line []byte
	for len(line) < maxConnect && (len(line) == 0 || line[len(line)-1] != '\n') {
		var one [1]byte
		if _, err := conn.Read(one[:]); err != nil {
			return 0, false
		}
		line = append(line, one[0])
	}
	words := strings.Fields(string(line))
	if len(words) < 2 || !strings.EqualFold(words[0], "connect") {
		return 0, false
	}
	number, err := strconv.ParseUint(words[1], 10, 32)
	return uint32(number), err == nil
}
