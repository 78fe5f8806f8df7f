// Package ext4 reads ext2, ext3 and ext4 filesystems from image files that
// nobody vouches for.
//
// It never writes, mounts or recovers anything. Whatever an image says, reading
// it ends: each directory is entered once, no more blocks of metadata are read
// than the filesystem has, and what is handed out is bounded by the caller's
// limits. What contradicts itself is errdef.ErrInvalid. Checksums are not
// verified.
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/tinevm/tine/internal/errdef"
)

// Where the superblock is, and what it begins with.
const (
	superOffset = 1024
	superSize   = 1024
	superMagic  = 0xEF53
)

// Features that change how a filesystem is read.
const (
	featFiletype   = 0x2
	featRecover    = 0x4
	featExtents    = 0x40
	feat64Bit      = 0x80
	featMMP        = 0x100
	featFlexBG     = 0x200
	featEAInode    = 0x400
	featCsumSeed   = 0x2000
	featLargeDir   = 0x4000
	featInlineData = 0x8000
	featEncrypt    = 0x10000
	featCasefold   = 0x20000
	// known are those that reading copes with. Of the last three it does so
	// until it meets a file that uses them.
	known = featFiletype | featExtents | feat64Bit | featMMP | featFlexBG | featEAInode | featCsumSeed | featLargeDir |
		featCasefold | featInlineData | featEncrypt
)

const (
	// maxBlocks bounds a filesystem: 2^34 blocks are 64 TiB, of 4 KiB each.
	maxBlocks = 1 << 34
	// minInode is the size of an inode of the first version.
	minInode = 128
	// rootInode is the number of the root directory.
	rootInode = 2
)

// FS is a filesystem in an image. It is for one reader at a time.
type FS struct {
	r io.ReaderAt

	blockSize, blocks uint64
	inodes            uint32
	inodesPerGroup    uint32
	inodeSize         uint64
	descSize, descs   uint64 // of a group descriptor, and where they begin
	wide              bool   // block numbers have 64 bits

	// budget is how many blocks of metadata may still be read: no more than
	// there are, since no two things share one.
	budget uint64
}

// Open reads what describes the filesystem in the size bytes of r.
func Open(r io.ReaderAt, size int64) (*FS, error) {
	if size < superOffset+superSize {
		return nil, invalid("the image is too short for a filesystem")
	}
	b := make([]byte, superSize)
	if err := readAt(r, b, superOffset); err != nil {
		return nil, err
	}
	if u16(b, 0x38) != superMagic {
		return nil, invalid("there is no ext2, ext3 or ext4 filesystem in it")
	}
	if err := checkFeatures(u32(b, 0x60)); err != nil {
		return nil, err
	}
	f := &FS{r: r, wide: u32(b, 0x60)&feat64Bit != 0}
	if err := f.shape(b); err != nil {
		return nil, err
	}
	if f.blocks > uint64(size)/f.blockSize {
		return nil, invalid("the image is cut short: it has %d bytes, and its filesystem %d blocks of %d", size, f.blocks, f.blockSize)
	}
	f.budget = f.blocks
	return f, nil
}

func checkFeatures(incompat uint32) error {
	if incompat&featRecover != 0 {
		return errdef.WithHint(invalid("the filesystem was not unmounted: its journal has to be replayed"), "run e2fsck -fy on the image")
	}
	if more := incompat &^ known; more != 0 {
		return fmt.Errorf("%w: filesystem with features %#x", errdef.ErrUnsupported, more)
	}
	return nil
}

// shape takes from a superblock where everything is.
func (f *FS) shape(b []byte) error {
	logSize := u32(b, 0x18)
	if logSize > 6 {
		return invalid("blocks of 2^%d KiB", logSize)
	}
	f.blockSize = 1024 << logSize
	f.blocks = uint64(u32(b, 0x4))
	f.descSize = 32
	if f.wide {
		f.blocks |= uint64(u32(b, 0x150)) << 32
		f.descSize = uint64(u16(b, 0xFE))
	}
	f.inodes, f.inodesPerGroup = u32(b, 0x0), u32(b, 0x28)
	f.inodeSize = minInode
	if u32(b, 0x4C) > 0 { // the revision
		f.inodeSize = uint64(u16(b, 0x58))
	}
	first, perGroup := uint64(u32(b, 0x14)), uint64(u32(b, 0x20))
	switch {
	case f.blocks == 0 || f.blocks > maxBlocks || first >= f.blocks:
		return invalid("a filesystem of %d blocks, the first one %d", f.blocks, first)
	case perGroup == 0 || perGroup > 8*f.blockSize*16 || f.inodesPerGroup == 0:
		return invalid("groups of %d blocks and %d inodes", perGroup, f.inodesPerGroup)
	case f.inodeSize < minInode || f.inodeSize > f.blockSize || f.inodeSize&(f.inodeSize-1) != 0:
		return invalid("inodes of %d bytes", f.inodeSize)
	case f.descSize < 32 || f.descSize > f.blockSize || f.wide && f.descSize < 64:
		return invalid("group descriptors of %d bytes", f.descSize)
	}
	groups := (f.blocks - first + perGroup - 1) / perGroup
	if uint64(f.inodes) > groups*uint64(f.inodesPerGroup) || f.inodes < rootInode {
		return invalid("%d inodes in %d groups", f.inodes, groups)
	}
	f.descs = (superOffset/f.blockSize + 1) * f.blockSize // they follow the block of the superblock
	return nil
}

// block reads a block of metadata into buf.
func (f *FS) block(n uint64, buf []byte) error {
	if n == 0 || n >= f.blocks {
		return invalid("block %d is outside of the filesystem", n)
	}
	if f.budget == 0 {
		return invalid("more metadata than the filesystem has blocks")
	}
	f.budget--
	return readAt(f.r, buf[:f.blockSize], int64(n*f.blockSize))
}

func readAt(r io.ReaderAt, buf []byte, offset int64) error {
	n, err := r.ReadAt(buf, offset)
	switch {
	case n == len(buf):
		return nil
	case errors.Is(err, io.EOF):
		return invalid("the image is cut short")
	default:
		return fmt.Errorf("read filesystem: %w", err)
	}
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errdef.ErrInvalid, fmt.Sprintf(format, args...))
}

func u16(b []byte, at int) uint16 { return binary.LittleEndian.Uint16(b[at:]) }
func u32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
