// Package apitest is a strict stand-in for Firecracker's HTTP interface, as
// httptest is for a web server. It boots nothing.
//
// It serves one version of the interface: fields and requests that this version
// does not have are refused, as are those in the wrong order or of the wrong
// type, with Firecracker's own status and words (without the line and column).
// A snapshot is really written, in a form of its own, and loading one looks at
// the files. The socket of the vsock device is there, and leads to a function.
// What is configured is opened, where Firecracker opens it at that time, but for
// taps, and looked into no further: a kernel is any file.
//
// It has what package api asks for, and answers to the rest of the interface
// (balloon, mmds, memory hotplug, unplugging) as to requests that do not exist.
//
// Its facts are from Firecracker's sources (src/firecracker/src/api_server,
// src/vmm/src/rpc_interface.rs, persist.rs and vmm_config) at v1.10.1 to v1.16.1.
// TestAgainstFirecracker compares it with a real one.
package apitest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/tinevm/tine/internal/vmm/firecracker/api"
)

// Config is what a Firecracker is started with. The zero value is the newest
// version, with nobody in its guest.
type Config struct {
	Version string // "" is api.Newest
	ID      string // "" is anonymous-instance
	PCI     bool   // --enable-pci
	// MaxPayload bounds bodies, in bytes; 0 is Firecracker's 51200.
	MaxPayload int
	// Guest says what answers on a port of the guest; nil, or a nil function:
	// nobody. The function is called for each connection, in a goroutine of its own,
	// and the connection is closed when it returns. It must return when the
	// connection ends. It is called again for a guest that was loaded.
	Guest func(port uint32) func(net.Conn)
	// Dump writes what is in guest memory into the file of a snapshot, which has
	// the right size already; nil writes nothing.
	Dump func(mem io.WriterAt, diff bool) error
	// Faults are as if set by Server.Fault, by "PUT /snapshot/load" and the like.
	Faults map[string]Fault
	// KVM is the path of KVM's device, which is opened when a machine is made, after
	// its memory is mapped; "" opens none.
	KVM string
	// Seen is told of each request that has come whole, before it is answered; nil
	// is not.
	Seen func(Request)
}

// Request is one that the server has got whole, refused or not.
type Request struct {
	Method, Path string
	Body         string // "" without one
}

// Server is one Firecracker process, of which there is one machine. It is safe
// for concurrent use.
type Server struct {
	cfg      Config
	version  api.Version
	listener net.Listener

	mu       sync.Mutex // requests are carried out one after the other
	machine  *machine
	requests []Request
	faults   map[string]Fault
	conns    map[net.Conn]bool

	ctx  context.Context // ends when the process does
	end  context.CancelFunc
	work sync.WaitGroup
	code int
}

// New starts a server for a test, on a socket in a directory of the test's, and
// ends it with the test.
func New(t testing.TB, cfg Config) (s *Server, socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "api.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = Serve(listener, cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, socket
}

// Serve answers on listener, which becomes the server's. Close the server.
func Serve(listener net.Listener, cfg Config) (*Server, error) {
	if cfg.Version == "" {
		cfg.Version = api.Newest.String()
	}
	if cfg.ID == "" {
		cfg.ID = "anonymous-instance"
	}
	if cfg.MaxPayload == 0 {
		cfg.MaxPayload = 51200
	}
	version, err := api.ParseVersion(cfg.Version)
	if err != nil {
		return nil, err
	}
	ctx, end := context.WithCancel(context.Background())
	s := &Server{
		cfg: cfg, version: version, listener: listener,
		faults: map[string]Fault{}, conns: map[net.Conn]bool{}, ctx: ctx, end: end,
	}
	maps.Copy(s.faults, cfg.Faults)
	s.machine = newMachine(s)
	if l, ok := listener.(*net.UnixListener); ok {
		l.SetUnlinkOnClose(false) // neither does Firecracker
	}
	s.work.Go(s.accept)
	return s, nil
}

// Requests are those that came so far, in order.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// State is the machine's: api.NotStarted, api.Running or api.Paused.
func (s *Server) State() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.machine.state
}

// Done is closed when the process has ended: by Close, a fault, Exit or a
// snapshot that it could not load.
func (s *Server) Done() <-chan struct{} { return s.ctx.Done() }

// Exit ends the process, as when its guest shuts down. Code is the process's.
func (s *Server) Exit(code int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.exit(code)
}

// exit is Exit for who holds the lock.
func (s *Server) exit(code int) {
	if s.ctx.Err() != nil {
		return
	}
	s.code = code
	s.end()
	_ = s.listener.Close()
	for conn := range s.conns {
		_ = conn.Close()
	}
	s.machine.close()
}

// Close ends the process, and waits for what it does. Its sockets stay where
// they are, as those of a process that was killed.
func (s *Server) Close() {
	s.Exit(0)
	s.work.Wait()
}

// maxConns is how many connections there can be.
const maxConns = 10

const tooMany = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\n" +
	"Content-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }"

func (s *Server) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		if !s.hold(conn) {
			_, _ = io.WriteString(conn, tooMany)
			_ = conn.Close()
			continue
		}
		s.work.Go(func() {
			s.serve(conn)
			s.release(conn)
		})
	}
}

func (s *Server) hold(conn net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.conns) == maxConns || s.ctx.Err() != nil {
		return false
	}
	s.conns[conn] = true
	return true
}

func (s *Server) release(conn net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, conn)
	_ = conn.Close()
}

// serve answers requests until the connection ends.
func (s *Server) serve(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		request, err := http.ReadRequest(in)
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_, _ = conn.Write(unreadable("Invalid request."))
			}
			return
		}
		body, refused := s.readBody(request)
		if refused != nil {
			_, _ = conn.Write(refused)
			return // Firecracker takes the rest for more requests
		}
		alive, err := s.answer(conn, request, body)
		if err != nil || !alive {
			return
		}
	}
}

// readBody reads what a request carries, or says why its head is refused.
func (s *Server) readBody(request *http.Request) (body, refused []byte) {
	switch request.Method {
	case http.MethodGet, http.MethodPut, http.MethodPatch:
	default:
		if request.Method != http.MethodDelete || !known(s.version, []string{"1.16.0"}) {
			return nil, unreadable("Invalid HTTP Method: Unsupported HTTP method.")
		}
	}
	if request.ContentLength > int64(s.cfg.MaxPayload) {
		return nil, unreadable(fmt.Sprintf("Request payload with size %d is larger than the limit of %d allowed by server.",
			request.ContentLength, s.cfg.MaxPayload))
	}
	body, err := io.ReadAll(io.LimitReader(request.Body, int64(s.cfg.MaxPayload)))
	if err != nil {
		return nil, unreadable("Invalid request.")
	}
	return body, nil
}

// unreadable is what the HTTP server under Firecracker answers by itself. It is
// not JSON, and not what the OpenAPI document says.
func unreadable(reason string) []byte {
	return response(http.StatusBadRequest, false,
		[]byte(`{ "error": "`+reason+"\nAll previous unanswered requests will be dropped.\" }"))
}

// answer carries out a request and writes what comes of it. With alive false
// the connection ends.
func (s *Server) answer(conn net.Conn, request *http.Request, body []byte) (alive bool, err error) {
	s.mu.Lock()
	seen := Request{request.Method, request.URL.Path, string(body)}
	s.requests = append(s.requests, seen)
	if s.cfg.Seen != nil {
		s.cfg.Seen(seen)
	}
	if fault, ok := s.faults[request.Method+" "+request.URL.Path]; ok {
		s.mu.Unlock()
		return fault(s, conn), nil
	}
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return false, nil
	}
	a := s.machine.handle(request.Method, request.URL.Path, body)
	_, err = conn.Write(a.bytes())
	if a.fatal {
		s.exit(1)
	}
	return !a.fatal, err
}

// outcome is what comes of a request.
type outcome struct {
	value      any    // of a request for something
	fault      string // of one that was refused
	deprecated bool
	fatal      bool // the process ends
}

func refuse(format string, args ...any) outcome { return outcome{fault: fmt.Sprintf(format, args...)} }

func (o outcome) bytes() []byte {
	switch {
	case o.fault != "":
		return response(http.StatusBadRequest, o.deprecated, faultBody(o.fault))
	case o.value != nil:
		body, err := json.Marshal(o.value)
		if err != nil {
			panic(err)
		}
		return response(http.StatusOK, o.deprecated, body)
	}
	return response(http.StatusNoContent, o.deprecated, nil)
}

func faultBody(message string) []byte {
	body, err := json.Marshal(map[string]string{"fault_message": message})
	if err != nil {
		panic(err)
	}
	return body
}

// response is an answer, byte for byte as Firecracker writes it.
func response(status int, deprecated bool, body []byte) []byte {
	head := fmt.Sprintf("HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n", status)
	if deprecated {
		head += "Deprecation: true\r\n"
	}
	if status != http.StatusNoContent {
		head += fmt.Sprintf("Content-Type: application/json\r\nContent-Length: %d\r\n", len(body))
	}
	return append([]byte(head+"\r\n"), body...)
}
