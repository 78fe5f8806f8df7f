package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/undo"
)

// What a guest writes to its disk goes to overlays: qcow2 files, in which what
// is not there is what the file below has. They say nothing of that file, so
// that a name inside one is never followed: QEMU is told what is below what.
// Clusters have 4 KiB, as the blocks of the guest's file system do, so that
// little is written for a small write. Clusters of 64 KiB with parts of 2 KiB
// (extended L2) would be as good, but QEMU 7.2 ends itself when it joins such
// overlays. The format: docs/interop/qcow2.txt in QEMU's sources.
const (
	overlayMagic   = 0x514649fb // "QFI\xfb"
	overlayVersion = 3
	clusterBits    = 12
	clusterSize    = 1 << clusterBits
	refcountOrder  = 4   // reference counts have 16 bits
	overlayHeader  = 104 // bytes of a header without extensions

	// An L2 table is a cluster, and has 8 bytes for each cluster of the disk.
	bytesPerL2 = clusterSize / 8 * clusterSize

	// Where things are in an empty overlay. The L1 table ends it.
	refcountTable = 1 * clusterSize
	refcountBlock = 2 * clusterSize
	l1Table       = 3 * clusterSize
)

const bytesPerMiB = 1 << 20

// createOverlay makes the empty overlay of a disk of size bytes.
func createOverlay(path string, size int64) (err error) {
	var u undo.Stack
	defer func() { err = u.Run(err) }()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	u.Add(func() error { return os.Remove(path) })
	return errors.Join(writeOverlay(f, size), f.Close())
}

// emptyOverlay is the size of an overlay without anything in it, and only of
// such a one.
func emptyOverlay(size int64) int64 {
	table := 8 * l1Entries(size)
	return l1Table + (table+clusterSize-1)/clusterSize*clusterSize
}

func l1Entries(size int64) int64 { return (size + bytesPerL2 - 1) / bytesPerL2 }

func writeOverlay(f *os.File, size int64) error {
	whole := emptyOverlay(size)
	var counts []byte
	for range whole / clusterSize {
		counts = binary.BigEndian.AppendUint16(counts, 1) // each cluster is in use once
	}
	for _, part := range []struct {
		data []byte
		at   int64
	}{
		{overlayHead(size), 0},
		{binary.BigEndian.AppendUint64(nil, refcountBlock), refcountTable},
		{counts, refcountBlock},
	} {
		if _, err := f.WriteAt(part.data, part.at); err != nil {
			return err
		}
	}
	return f.Truncate(whole) // the L1 table is zeros
}

func overlayHead(size int64) []byte {
	be := binary.BigEndian
	b := be.AppendUint32(nil, overlayMagic)
	b = be.AppendUint32(b, overlayVersion)
	b = be.AppendUint64(b, 0) // no name of the file below
	b = be.AppendUint32(b, 0)
	b = be.AppendUint32(b, clusterBits)
	b = be.AppendUint64(b, uint64(size))
	b = be.AppendUint32(b, 0) // not encrypted
	b = be.AppendUint32(b, uint32(l1Entries(size)))
	b = be.AppendUint64(b, l1Table)
	b = be.AppendUint64(b, refcountTable)
	b = be.AppendUint32(b, 1) // clusters of it
	b = be.AppendUint32(b, 0) // no internal snapshots
	b = be.AppendUint64(b, 0)
	b = be.AppendUint64(b, 0) // features: none that are incompatible,
	b = be.AppendUint64(b, 0) // compatible
	b = be.AppendUint64(b, 0) // or can be cleared
	b = be.AppendUint32(b, refcountOrder)
	b = be.AppendUint32(b, overlayHeader)
	return be.AppendUint64(b, 0) // the end of extensions
}

// checkOverlay sees that r is an overlay of ours, for a disk of size bytes, and
// that there is no other file that it wants read. What is not is
// errdef.ErrInvalid: QEMU would read whatever it names, or end itself over it.
func checkOverlay(r io.ReaderAt, size int64) error {
	head := make([]byte, overlayHeader)
	n, err := r.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(head[at:]) }
	u64 := func(at int) uint64 { return binary.BigEndian.Uint64(head[at:]) }
	switch {
	case n < len(head) || u32(0) != overlayMagic || u32(4) != overlayVersion || u32(20) != clusterBits || u64(72) != 0:
		return fmt.Errorf("%w: not an overlay of a disk", errdef.ErrInvalid)
	case u32(16) != 0:
		return fmt.Errorf("%w: an overlay that names another file", errdef.ErrInvalid)
	case u64(24) != uint64(size):
		return fmt.Errorf("%w: the overlay of a disk of %d bytes, and not of %d", errdef.ErrInvalid, u64(24), size)
	case u32(32) != 0 || u32(60) != 0:
		return fmt.Errorf("%w: an overlay with encryption or snapshots in it", errdef.ErrInvalid)
	}
	return nil
}
