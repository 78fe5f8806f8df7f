package jail

import (
	"errors"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

func sockets(t testing.TB) (a, b int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeAll(fds[:]) })
	return fds[0], fds[1]
}

func countFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestMessages(t *testing.T) {
	t.Parallel()
	a, b := sockets(t)
	sent := job{Path: "/p", Args: []string{"p", "ä \x00"}, Env: []string{"A=b"}, Files: 2, FileBytes: 1 << 63, DieWithParent: true, Landlock: 6}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer closeAll(pipe[:])
	if err := sendMessage(a, sent, pipe[1], pipe[0]); err != nil {
		t.Fatal(err)
	}
	var got job
	fds, err := receiveMessage(b, &got)
	if err != nil || len(fds) != 2 {
		t.Fatalf("%d files, %v", len(fds), err)
	}
	defer closeAll(fds)
	if diff := cmp.Diff(sent, got); diff != "" {
		t.Error(diff)
	}
	if _, err = unix.Write(fds[0], []byte("x")); err != nil {
		t.Error(err)
	}
	if _, err = unix.Read(fds[1], make([]byte, 1)); err != nil {
		t.Error(err)
	}
	for _, fd := range fds {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("file would be inherited: %x, %v", flags, err)
		}
	}
}

func TestHungUp(t *testing.T) {
	t.Parallel()
	a, b := sockets(t)
	if err := unix.Shutdown(a, unix.SHUT_RDWR); err != nil {
		t.Fatal(err)
	}
	if _, err := receiveMessage(b, &answer{}); !errors.Is(err, errHungUp) {
		t.Errorf("receive: %v", err)
	}
	if err := sendMessage(b, answer{}); !errors.Is(err, errHungUp) {
		t.Errorf("send: %v", err)
	}
}

func TestFailureKeepsItsCategory(t *testing.T) {
	t.Parallel()
	a, b := sockets(t)
	if err := sendMessage(a, failure(errdef.ErrUnsupported)); err != nil {
		t.Fatal(err)
	}
	var got answer
	if _, err := receiveMessage(b, &got); err != nil || !errors.Is(got.err(), errdef.ErrUnsupported) {
		t.Errorf("got %v, %v", got.err(), err)
	}
}

// FuzzReceive: whatever comes is a message or an error, and no file of an error
// stays open. It runs alone, as it counts files.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(`{"error":"x","code":"denied"}`), uint8(0), uint8(0))
	f.Add([]byte(`{"listener":true}`), uint8(1), uint8(0))
	f.Add([]byte(`{"entrances":-1,"files":2,"args":["x"]}`), uint8(1), uint8(1))
	f.Add([]byte(`{"tree":"/","link":true,"tun":true}`), uint8(2), uint8(2))
	f.Add([]byte(`{"error":7}`), uint8(5), uint8(0))
	f.Add([]byte{}, uint8(3), uint8(0))
	f.Add([]byte{}, uint8(0), uint8(0))
	f.Add(make([]byte, maxMessage+1), uint8(200), uint8(1))
	f.Add([]byte("garbage"), uint8(253), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, files, kind uint8) {
		a, b := sockets(t)
		fds := make([]int, min(int(files), maxRights))
		var rights []byte
		if len(fds) > 0 {
			rights = unix.UnixRights(fds...) // copies of descriptor 0
		}
		if err := unix.Sendmsg(a, data, rights, nil, 0); err != nil {
			t.Skip("too long for the kernel")
		}
		before := countFiles(t)
		v := []any{&answer{}, &job{}, &setup{}}[kind%3]
		got, err := receiveMessage(b, v)
		if (err != nil && len(got) != 0) || (err == nil && len(got) != len(fds)) {
			t.Errorf("%d files of %d, error %v", len(got), len(fds), err)
		}
		if j, ok := v.(*job); ok && err == nil && len(got) != j.Files {
			if err := become(setup{}, *j, got); !errors.Is(err, errdef.ErrInvalid) {
				t.Errorf("job of %d files with %d: %v", j.Files, len(got), err)
			}
		}
		closeAll(got)
		if after := countFiles(t); after != before {
			t.Errorf("%d files before, %d after", before, after)
		}
	})
}
