package qemu

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// A file of device state is a migration stream of QEMU's: a magic number, a
// version, and sections that each begin with a byte for their kind. That of
// Freeze begins with a section of configuration, that of SaveDevice with the
// section of a device. The format: migration/savevm.c in QEMU's sources.
const (
	streamMagic    = 0x5145564d // "QEVM"
	streamVersion  = 3
	sectionFull    = 0x04
	sectionConfig  = 0x07
	streamHeadSize = 4 + 4 + 1
)

// bareState reports whether the stream at r was made by SaveDevice, rather
// than by Freeze. What is neither is errdef.ErrInvalid: QEMU would end itself
// over it, or wait for sections that do not come.
func bareState(r io.ReaderAt) (bool, error) {
	var head [streamHeadSize]byte
	if _, err := r.ReadAt(head[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	if binary.BigEndian.Uint32(head[:]) != streamMagic || binary.BigEndian.Uint32(head[4:]) != streamVersion {
		return false, fmt.Errorf("%w: not a file of QEMU's device state", errdef.ErrInvalid)
	}
	switch kind := head[8]; kind {
	case sectionConfig:
		return false, nil
	case sectionFull:
		return true, nil
	default:
		return false, fmt.Errorf("%w: device state begins with a section of kind %#x", errdef.ErrInvalid, kind)
	}
}

// maxState bounds device state; that of Tine's machines has about 55 KB.
const maxState = 64 << 20

// scratch is a file in memory that QEMU writes device state to. There is one
// for each control connection, because QEMU has no way to give a descriptor
// back while its machine is paused: remove-fd then waits for the next call
// while it runs (monitor_fdset_cleanup in QEMU 7.2). So none of those that it
// is left with is of a snapshot's file.
type scratch struct {
	mu  sync.Mutex // held while device state is written and read
	in  *os.File   // what is read here; nil until it is needed
	out *os.File   // what QEMU writes to a copy of, so that it shares its position
	set int64      // QEMU's name for out
}

// saveState has QEMU write the device state of its paused machine, and returns
// it.
func (m *monitor) saveState(ctx context.Context) ([]byte, error) {
	s := &m.scratch
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in == nil {
		if err := s.open(ctx, m); err != nil {
			return nil, err
		}
	}
	if err := s.in.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := s.out.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	// Not live: no other machine takes over, so QEMU keeps its hold on what it
	// has open.
	save := command{Execute: "xen-save-devices-state", Arguments: map[string]any{
		"filename": fmt.Sprintf("/dev/fdset/%d", s.set), "live": false,
	}}
	if _, err := m.execute(ctx, save); err != nil {
		return nil, err
	}
	return s.read()
}

// open makes the file and hands it to QEMU, which insists on a descriptor that
// is open for writing only.
func (s *scratch) open(ctx context.Context, m *monitor) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	fd, err := unix.MemfdCreate("tine-device", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make a file in memory: %w", err)
	}
	in := os.NewFile(uintptr(fd), "tine-device")
	u.Add(in.Close)
	out, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	u.Add(out.Close)
	set, err := m.addFile(ctx, out)
	if err != nil {
		return err
	}
	s.in, s.out, s.set = in, out, set
	return nil
}

// read returns what QEMU wrote, if it is a device state.
func (s *scratch) read() ([]byte, error) {
	state, err := io.ReadAll(io.NewSectionReader(s.in, 0, maxState+1))
	if err != nil {
		return nil, err
	}
	if len(state) > maxState {
		return nil, fmt.Errorf("%w: device state of more than %d bytes", errdef.ErrExhausted, maxState)
	}
	bare, err := bareState(bytes.NewReader(state))
	if err == nil && !bare {
		err = errors.New("QEMU wrote a device state with configuration")
	}
	return state, err
}

func (s *scratch) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.in == nil {
		return nil
	}
	err := errors.Join(s.in.Close(), s.out.Close())
	s.in, s.out = nil, nil
	return err
}

// addFile gives QEMU a copy of f in a set of its own: "/dev/fdset/SET" opens it.
func (m *monitor) addFile(ctx context.Context, f *os.File) (set int64, err error) {
	raw, err := m.do(ctx, command{Execute: "add-fd"}, f)
	if err != nil {
		return 0, err
	}
	var added struct {
		Set int64 `json:"fdset-id"`
	}
	err = decode(raw, &added)
	return added.Set, err
}

// addFileTo is addFile with a set that has a number already.
func (m *monitor) addFileTo(ctx context.Context, set int, f *os.File) error {
	_, err := m.do(ctx, command{Execute: "add-fd", Arguments: map[string]any{"fdset-id": set}}, f)
	return err
}
