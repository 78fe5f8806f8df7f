package linux

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// maxIovecs is how many extents the kernel takes in one call.
const maxIovecs = 1024

// Extent is a range of a process's addresses.
type Extent struct{ Addr, Size uint64 }

// ReadMemory fills p with what process pid has at the extents, one after the
// other; their sizes add up to len(p). It needs no stop of the process, and so
// what it reads is of one instant only for a process that does not run.
func ReadMemory(pid int, p []byte, extents []Extent) error {
	m := mover{pid: pid, call: unix.ProcessVMReadv, file: (*os.File).ReadAt, mode: os.O_RDONLY}
	return processError("read memory of", pid, m.move(p, extents))
}

// WriteMemory is ReadMemory in the other direction. It writes to what the
// process may only read, too, and then makes private copies of pages.
func WriteMemory(pid int, p []byte, extents []Extent) error {
	m := mover{pid: pid, call: unix.ProcessVMWritev, file: (*os.File).WriteAt, mode: os.O_WRONLY}
	return processError("write memory of", pid, m.move(p, extents))
}

// mover moves bytes between this process and another.
type mover struct {
	pid  int
	call func(pid int, local []unix.Iovec, remote []unix.RemoteIovec, flags uint) (int, error)
	file func(f *os.File, p []byte, off int64) (int, error) // where the calls are not allowed
	mode int
}

func (m *mover) move(p []byte, extents []Extent) error {
	var size uint64
	for _, e := range extents {
		size += e.Size
	}
	if size != uint64(len(p)) {
		return fmt.Errorf("%w: %d bytes for extents of %d", errdef.ErrInvalid, len(p), size)
	}
	remote := make([]unix.RemoteIovec, len(extents))
	for i, e := range extents {
		remote[i] = unix.RemoteIovec{Base: uintptr(e.Addr), Len: int(e.Size)}
	}
	for len(p) > 0 {
		n, err := m.some(p, remote[:min(len(remote), maxIovecs)])
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EFAULT) {
			return m.rest(p, remote) // seccomp filters of containers deny the calls
		}
		if err != nil {
			return err
		}
		p, remote = p[n:], advance(remote, n)
	}
	return nil
}

func (m *mover) some(p []byte, remote []unix.RemoteIovec) (int, error) {
	local := []unix.Iovec{{Base: &p[0], Len: uint64(len(p))}}
	n, err := retry(func() (int, error) { return m.call(m.pid, local, remote, 0) })
	if err == nil && n <= 0 {
		return 0, unix.EFAULT
	}
	return n, err
}

// advance drops the first n bytes of extents.
func advance(remote []unix.RemoteIovec, n int) []unix.RemoteIovec {
	for len(remote) > 0 && n >= remote[0].Len {
		n -= remote[0].Len
		remote = remote[1:]
	}
	if n > 0 {
		remote[0].Base += uintptr(n)
		remote[0].Len -= n
	}
	return remote
}

// rest does what the calls do, page by page, through the memory file.
func (m *mover) rest(p []byte, remote []unix.RemoteIovec) error {
	f, err := os.OpenFile(procPath(m.pid, "mem"), m.mode, 0)
	if err != nil {
		return err
	}
	for _, r := range remote {
		n, moveErr := m.file(f, p[:r.Len], int64(r.Base))
		if moveErr != nil {
			err = fmt.Errorf("at %#x: %w", uint64(r.Base)+uint64(n), moveErr)
			break
		}
		p = p[r.Len:]
	}
	_ = f.Close() // nothing is buffered
	if err != nil && !processHasMemory(m.pid) {
		return unix.ESRCH
	}
	return err
}

// processHasMemory reports whether a process is there and has not ended.
func processHasMemory(pid int) bool {
	st, err := readStat(pid)
	return err == nil && !st.dead()
}

// CheckAlive returns errdef.ErrNotFound for a process that has ended, be it a
// zombie or gone. A dying process looks as if it had no pages: who asks for its
// pages asks this afterwards.
func CheckAlive(pid int) error {
	if !processHasMemory(pid) {
		return processError("find", pid, unix.ESRCH)
	}
	return nil
}

// FindPrivateMapping is FindMapping for a file that the process maps privately.
// A file that is mapped shared is errdef.ErrUnsupported, for no page of it is
// the process's own. A file that was removed meanwhile is found all the same.
func FindPrivateMapping(pid int, path string) ([]Mapping, error) {
	data, err := readProc(pid, "maps", maxMaps)
	if err != nil {
		return nil, err
	}
	var found []Mapping
	for line := range bytes.Lines(data) {
		m, name, parseErr := parseMapping(strings.TrimSuffix(string(line), "\n"))
		if parseErr != nil {
			return nil, fmt.Errorf("read mappings of process %d: %w", pid, parseErr)
		}
		if name != path && name != path+" (deleted)" {
			continue
		}
		if perms := strings.Fields(string(line))[1]; !strings.HasSuffix(perms, "p") {
			return nil, fmt.Errorf("%w: process %d shares its mapping of %s", errdef.ErrUnsupported, pid, path)
		}
		found = append(found, m)
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("%w: mapping of %s in process %d", errdef.ErrNotFound, path, pid)
	}
	return found, nil
}
