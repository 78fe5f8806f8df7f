// Package guestmem handles the memory of machines from outside of them: it
// finds and copies the pages that a machine has changed, and keeps them in
// layers, files that hold only the pages in which one memory differs from
// another. A whole memory and the layers on top of it are an Image, which reads
// as if it were one file.
//
// What it reads is what was written, or an error: every page of a layer is
// under a checksum, and no byte of a layer file is without meaning. The package
// knows nothing of snapshots, of where layers are kept or for how long, and it
// does not make files durable. Layer files are described in
// docs/formats/layer.md.
package guestmem

import (
	"errors"
	"fmt"
	"hash/crc32"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
	"github.com/tinevm/tine/internal/linux"
)

// PageSize is the unit in which memory is compared and kept.
const PageSize = linux.PageSize

// checksum continues a CRC-32C.
func checksum(sum uint32, data []byte) uint32 {
	return crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), data)
}

// diskError puts err in the category errdef.ErrExhausted when the disk is full.
// It keeps nil.
func diskError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", errdef.ErrExhausted, err)
	}
	return err
}
