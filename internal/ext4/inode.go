package ext4

import (
	"fmt"
	"time"

	"github.com/tinevm/tine/internal/errdef"
)

// Flags of inodes.
const (
	flagEncrypt = 0x800
	flagExtents = 0x80000
	flagInline  = 0x10000000
)

// Type is what an inode stands for.
type Type uint16

// The types.
const (
	Pipe    Type = 0x1000
	Char    Type = 0x2000
	Dir     Type = 0x4000
	Block   Type = 0x6000
	Regular Type = 0x8000
	Symlink Type = 0xA000
	Socket  Type = 0xC000
)

// Inode is a file, of whatever type.
type Inode struct {
	Number   uint32
	Type     Type
	Mode     uint32 // permissions, with set-user-id and its like
	UID, GID uint32
	Links    int
	Size     int64
	ModTime  time.Time // of whole seconds
	// Capability is the value of security.capability, or nil.
	Capability []byte

	flags uint32
	body  [60]byte // the map of its blocks, or a short symbolic link
}

// inode reads an inode.
func (f *FS) inode(n uint32) (*Inode, error) {
	if n == 0 || n > f.inodes {
		return nil, invalid("inode %d: the filesystem has %d", n, f.inodes)
	}
	raw, err := f.rawInode(n)
	if err != nil {
		return nil, err
	}
	mode := u16(raw, 0)
	in := &Inode{
		Number: n, Type: Type(mode & 0xF000), Mode: uint32(mode & 0o7777),
		UID: uint32(u16(raw, 0x2)) | uint32(u16(raw, 0x78))<<16, GID: uint32(u16(raw, 0x18)) | uint32(u16(raw, 0x7A))<<16,
		Links: int(u16(raw, 0x1A)), Size: int64(u32(raw, 0x4)), flags: u32(raw, 0x20),
	}
	copy(in.body[:], raw[0x28:])
	in.ModTime = modTime(raw)
	if in.Type == Regular || in.Type == Dir {
		in.Size |= int64(u32(raw, 0x6C)) << 32
	}
	switch {
	case in.Links == 0:
		return nil, invalid("inode %d is in a directory, and was removed", n)
	case in.Size < 0:
		return nil, invalid("inode %d: its size is too large", n)
	case in.flags&(flagInline|flagEncrypt) != 0:
		return nil, fmt.Errorf("%w: inode %d: its content is in the inode, or encrypted", errdef.ErrUnsupported, n)
	}
	in.Capability, err = f.capability(raw)
	if err != nil {
		return nil, fmt.Errorf("inode %d: %w", n, err)
	}
	return in, nil
}

// rawInode reads an inode's bytes from its group's table.
func (f *FS) rawInode(n uint32) ([]byte, error) {
	group, index := uint64((n-1)/f.inodesPerGroup), uint64((n-1)%f.inodesPerGroup)
	desc := make([]byte, f.descSize)
	if err := readAt(f.r, desc, int64(f.descs+group*f.descSize)); err != nil {
		return nil, err
	}
	table := uint64(u32(desc, 0x8))
	if f.wide {
		table |= uint64(u32(desc, 0x28)) << 32
	}
	last := (index*f.inodeSize + f.inodeSize - 1) / f.blockSize
	if table == 0 || table >= f.blocks || last >= f.blocks-table {
		return nil, invalid("the inodes of group %d are outside of the filesystem", group)
	}
	raw := make([]byte, f.inodeSize)
	return raw, readAt(f.r, raw, int64(table*f.blockSize+index*f.inodeSize))
}

// modTime has 34 bits where the inode has room for them.
func modTime(raw []byte) time.Time {
	seconds := int64(int32(u32(raw, 0x10)))
	if len(raw) >= 0x8C && int(u16(raw, 0x80))+minInode >= 0x8C {
		seconds += int64(u32(raw, 0x88)&3) << 32
	}
	return time.Unix(seconds, 0)
}

// Extended attributes: what their storage begins with, and the longest that a
// capability is.
const (
	xattrMagic    = 0xEA020000
	xattrSecurity = 6 // stands for "security."
	xattrHeader   = 32
	xattrEntry    = 16
	maxCapability = 1 << 10
)

// capability finds security.capability behind the inode, or in the block for
// what has no room there.
func (f *FS) capability(raw []byte) ([]byte, error) {
	if len(raw) > minInode+4 {
		at := minInode + int(u16(raw, 0x80))
		if at%4 == 0 && at+4 <= len(raw) && u32(raw, at) == xattrMagic {
			if value, err := findCapability(raw[at+4:], 0); value != nil || err != nil {
				return value, err
			}
		}
	}
	n := uint64(u32(raw, 0x68))
	if f.wide {
		n |= uint64(u16(raw, 0x76)) << 32
	}
	if n == 0 {
		return nil, nil
	}
	if n >= f.blocks {
		return nil, invalid("its attributes are outside of the filesystem")
	}
	buf := make([]byte, f.blockSize) // not of the budget: inodes share such blocks
	if err := readAt(f.r, buf, int64(n*f.blockSize)); err != nil {
		return nil, err
	}
	if u32(buf, 0) != xattrMagic {
		return nil, invalid("its attributes are damaged")
	}
	return findCapability(buf, xattrHeader)
}

// findCapability looks through attributes that begin at first. Their values are
// in area too.
func findCapability(area []byte, first int) ([]byte, error) {
	for at := first; at+4 <= len(area) && u32(area, at) != 0; {
		if at+xattrEntry > len(area) {
			return nil, invalid("its attributes are damaged")
		}
		nameLen, index := int(area[at]), area[at+1]
		name := area[at+xattrEntry:]
		if nameLen > len(name) {
			return nil, invalid("its attributes are damaged")
		}
		if index == xattrSecurity && string(name[:nameLen]) == "capability" {
			offset, size := int64(u16(area, at+2)), int64(u32(area, at+8))
			if u32(area, at+4) != 0 || size > maxCapability || offset+size > int64(len(area)) {
				return nil, invalid("its capabilities are damaged")
			}
			return append([]byte{}, area[offset:offset+size]...), nil
		}
		at += xattrEntry + (nameLen+3)&^3
	}
	return nil, nil
}
