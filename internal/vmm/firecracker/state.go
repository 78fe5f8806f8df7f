package firecracker

import (
	"fmt"
	"hash/crc64"
	"io"
	"os"

	"github.com/tinevm/tine/internal/errdef"
)

// maxState is how long device state may be, in bytes: Firecracker reads no more
// (SNAPSHOT_DESERIALIZATION_BYTES_LIMIT in src/vmm/src/snapshot/mod.rs).
const maxState = 10_000_000

// minState is shorter than any: that of a machine of one vCPU has some 20 KiB.
const minState = 1 << 10

// jones is the polynomial of the checksum at the end of device state, in the
// order of bits that hash/crc64 has them in (crate crc64, and Redis, whose it is).
const jones = 0x95ac9329ac4bc9b5

// checkState reads device state and sees whether it is as Firecracker wrote it.
// What else it says is for Firecracker: its form changes with versions. Whatever
// is not device state is errdef.ErrInvalid.
func checkState(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read
	data, err := readAll(f, maxState)
	if err == nil {
		err = verifyState(data)
	}
	if err != nil {
		return fmt.Errorf("device state %s: %w", path, err)
	}
	return nil
}

// readAll reads a file of at most that many bytes.
func readAll(f *os.File, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%w: more than %d bytes", errdef.ErrInvalid, most)
	}
	return data, err
}

// verifyState: the checksum of all bytes with their checksum behind them is zero.
func verifyState(data []byte) error {
	switch {
	case len(data) < minState:
		return fmt.Errorf("%w: %d bytes are too few", errdef.ErrInvalid, len(data))
	// The sum begins with 0 and is taken as it is, which hash/crc64 inverts.
	case ^crc64.Update(^uint64(0), crc64.MakeTable(jones), data) != 0:
		return fmt.Errorf("%w: the checksum does not fit: no device state of Firecracker's", errdef.ErrInvalid)
	}
	return nil
}
