package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/vmm"
)

// testWorld is a world that ends with the test.
func testWorld(t *testing.T) *world {
	t.Helper()
	w, err := newWorld(onLoopback(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.close(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func dialWorld(t *testing.T, w *world, port int) *net.TCPConn {
	t.Helper()
	conn, err := w.dial(t.Context(), "tcp", netip.AddrPortFrom(there(), uint16(port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn.(*net.TCPConn)
}

func TestWorld(t *testing.T) {
	t.Parallel()
	w := testWorld(t)
	for port, want := range map[int]string{portEcho: "some bytes", portSink: "10", portGreet: welcome} {
		t.Run(fmt.Sprint(port), func(t *testing.T) {
			conn := dialWorld(t, w, port)
			if port != portGreet {
				if _, err := io.WriteString(conn, "some bytes"); err != nil {
					t.Fatal(err)
				}
				if err := conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			got, err := io.ReadAll(conn)
			if err != nil || string(got) != want {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
	for _, dst := range []string{"203.0.113.11:7", "203.0.113.10:8", "127.0.0.1:7"} {
		if _, err := w.dial(t.Context(), "tcp", netip.MustParseAddrPort(dst)); !errors.Is(err, errdef.ErrDenied) {
			t.Errorf("%s: %v", dst, err)
		}
	}
}

// TestWorldEnds: connections end with it, also those that nobody ends.
func TestWorldEnds(t *testing.T) {
	t.Parallel()
	w, err := newWorld(onLoopback(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	conn := dialWorld(t, w, portEcho)
	if _, err = conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err = conn.Read(make([]byte, 1)); err != nil { // it is served by now
		t.Fatal(err)
	}
	if err = w.close(); err != nil {
		t.Error(err)
	}
	if n, readErr := conn.Read(make([]byte, 1)); readErr == nil {
		t.Errorf("%d bytes of a connection that has ended", n)
	}
	if _, err = newWorld(func(port int) (net.Listener, error) {
		if port == portGreet {
			return nil, errDeaf
		}
		return onLoopback(t.Context())(port)
	}); !errors.Is(err, errDeaf) {
		t.Errorf("a port that cannot be had: %v", err)
	}
}

// TestBareTap: it has an address that its servers listen on, where the host has
// nothing. It and TestNamespace are not parallel: they look at all threads.
func TestBareTap(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: only root makes a namespace and a tap in it")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("NOT TESTED: this kernel has no taps: %v", err)
	}
	tap, err := newBareTap()
	if err != nil {
		t.Fatal(err)
	}
	gateway := vmm.GuestNet().Gateway
	for port, ln := range tap.world.listeners {
		if got := ln.Addr().String(); got != netip.AddrPortFrom(gateway, uint16(port)).String() {
			t.Errorf("port %d is served at %s", port, got)
		}
	}
	list, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list {
		if prefix, parseErr := netip.ParsePrefix(a.String()); parseErr == nil && prefix.Addr() == gateway {
			t.Errorf("%s is an address of the host", gateway)
		}
	}
	if err = tap.close(); err != nil {
		t.Error(err)
	}
}

// TestNamespace: what is measured leaves this process where it is.
func TestNamespace(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: only root makes a namespace")
	}
	spaces := func() string {
		paths, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil || len(paths) == 0 {
			t.Fatal(paths, err)
		}
		seen := map[string]bool{}
		for _, path := range paths {
			if space, err := os.Readlink(path); err == nil { // else the thread has ended
				seen[space] = true
			}
		}
		return fmt.Sprint(slices.Sorted(maps.Keys(seen)))
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		there := ""
		took, err := inNamespace(func() (err error) { there, err = os.Readlink("/proc/thread-self/ns/net"); return err })
		if err != nil || took <= 0 || there == own {
			t.Errorf("%v, %v, in %s of %s", took, err, there, own)
		}
	}
	if _, err := inNamespace(func() error { return errDeaf }); !errors.Is(err, errDeaf) {
		t.Errorf("what fails there: %v", err)
	}
	if got := spaces(); got != "["+own+"]" {
		t.Errorf("threads are in %s, and were in %s", got, own)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errDeaf)
	if _, err := namespace(ctx); !errors.Is(err, errDeaf) {
		t.Errorf("canceled: %v", err)
	}
}
