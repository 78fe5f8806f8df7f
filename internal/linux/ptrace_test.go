package linux

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// What is read and written are the pages asked for, in one go and in many, and
// by the file where the calls are not allowed.
func TestReadWriteMemory(t *testing.T) {
	t.Parallel()
	path := filledFile(t)
	cmd, _ := startChild(t, path, "")
	pid := cmd.Process.Pid
	found, err := FindPrivateMapping(pid, path)
	if err != nil || len(found) != 1 {
		t.Fatalf("found %v, %v", found, err)
	}
	base := found[0].Start
	var extents []Extent
	var data []byte
	for i := range 2500 { // more than the kernel takes at once, and some that touch
		size := uint64(3 + i%2)
		extents = append(extents, Extent{Addr: base + uint64(i)*100, Size: size})
		data = append(data, bytes.Repeat([]byte{byte(i)}, int(size))...)
	}
	if err = WriteMemory(pid, data, extents); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if err = ReadMemory(pid, got, extents); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read something else: %v", err)
	}
	if content, readErr := os.ReadFile(path); readErr != nil || strings.Trim(string(content), "x") != "" {
		t.Errorf("the file has changed: %v", readErr)
	}

	slices.Reverse(data)
	denied := func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error) { return 0, unix.EPERM }
	write := mover{pid: pid, call: denied, file: (*os.File).WriteAt, mode: os.O_WRONLY}
	read := mover{pid: pid, call: denied, file: (*os.File).ReadAt, mode: os.O_RDONLY}
	if err = write.move(data, extents[:2]); !errors.Is(err, errdef.ErrInvalid) {
		t.Errorf("sizes that differ: %v", err)
	}
	if err = errors.Join(write.move(data, extents), read.move(got, extents)); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read something else by the file: %v", err)
	}
}

func TestReadMemoryErrors(t *testing.T) {
	t.Parallel()
	path := filledFile(t)
	cmd, end := startChild(t, path, "")
	pid := cmd.Process.Pid
	page := make([]byte, PageSize)
	nowhere := []Extent{{Addr: PageSize, Size: PageSize}}
	if err := ReadMemory(pid, page, nowhere); err == nil || errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("read of nothing: %v", err)
	}
	if err := CheckAlive(pid); err != nil {
		t.Error(err)
	}
	found, err := FindPrivateMapping(pid, path)
	if err != nil {
		t.Fatal(err)
	}
	end()
	if _, err = cmd.Process.Wait(); err != nil {
		t.Fatal(err)
	}
	at := []Extent{{Addr: found[0].Start, Size: PageSize}}
	_, findErr := FindPrivateMapping(pid, path)
	for what, err := range map[string]error{
		"read": ReadMemory(pid, page, at), "write": WriteMemory(pid, page, at), "find": findErr, "check": CheckAlive(pid),
	} {
		if !errors.Is(err, errdef.ErrNotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A thread that was stopped and looked at goes on.
func TestTracee(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread() // not unlocked: the thread goes with the test
	cmd := exec.CommandContext(t.Context(), "cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout = &out
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tracee, err := Seize(cmd.Process.Pid)
	if errors.Is(err, errdef.ErrUnsupported) && os.Getuid() != 0 {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err = tracee.Interrupt(); err != nil {
		t.Fatal(err)
	}
	stop, err := tracee.Wait()
	if err != nil || stop.Event != unix.PTRACE_EVENT_STOP {
		t.Fatalf("stop %+v, %v", stop, err)
	}
	mask, err := tracee.SignalMask()
	if err != nil {
		t.Fatal(err)
	}
	if err = tracee.SetSignalMask(^uint64(0)); err != nil {
		t.Fatal(err)
	}
	if got, maskErr := tracee.SignalMask(); maskErr != nil || got|1<<(unix.SIGKILL-1)|1<<(unix.SIGSTOP-1) != ^uint64(0) {
		t.Errorf("mask %x, %v", got, maskErr)
	}
	if err = errors.Join(tracee.SetSignalMask(mask), tracee.SetOptions(unix.PTRACE_O_TRACESYSGOOD)); err != nil {
		t.Fatal(err)
	}
	if err = tracee.SetOptions(1 << 30); !errors.Is(err, errdef.ErrUnsupported) {
		t.Errorf("options that do not exist: %v", err)
	}
	if err = tracee.Detach(); err != nil {
		t.Fatal(err)
	}
	_, err = in.Write([]byte("still here"))
	err = errors.Join(err, in.Close(), cmd.Wait())
	if err != nil || out.String() != "still here" {
		t.Errorf("got %q, %v", out.String(), err)
	}
	if _, err = Seize(cmd.Process.Pid); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("seize of a dead process: %v", err)
	}
	if _, err = tracee.Wait(); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("wait for a dead process: %v", err)
	}
	if err = WaitChild(cmd.Process.Pid); err != nil {
		t.Errorf("wait for no child: %v", err)
	}
}

func TestFiltered(t *testing.T) {
	t.Parallel()
	if _, err := Filtered(os.Getpid()); err != nil {
		t.Error(err)
	}
	if _, err := Filtered(1 << 30); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("no process: %v", err)
	}
}
