package image

import (
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// The file types of a cpio mode.
const (
	cpioDir     = 0o040000
	cpioRegular = 0o100000
	cpioChar    = 0o020000
)

const cpioEnd = "TRAILER!!!"

// cpioWriter writes the "newc" format that Linux unpacks as an initramfs. It
// writes no times and numbers inodes in order, so equal files make equal
// archives.
type cpioWriter struct {
	w      io.Writer
	inode  uint32
	offset int64
	err    error
}

func newCPIO(w io.Writer) *cpioWriter { return &cpioWriter{w: w} }

func (c *cpioWriter) dir(name string) { c.header(name, cpioDir|0o755, 2, 0, 0, 0) }

func (c *cpioWriter) device(name string, major, minor uint32) {
	c.header(name, cpioChar|0o600, 1, 0, major, minor)
}

// file writes a file of exactly size bytes from r.
func (c *cpioWriter) file(name string, perm fs.FileMode, size int64, r io.Reader) {
	if c.err == nil && (size < 0 || size > math.MaxUint32) {
		c.err = fmt.Errorf("%w: %s: %d bytes do not fit an initramfs", errdef.ErrInvalid, name, size)
	}
	c.header(name, cpioRegular|uint32(perm.Perm()), 1, uint32(size), 0, 0)
	if c.err != nil {
		return
	}
	n, err := io.CopyN(c.w, r, size)
	c.offset += n
	if err != nil {
		c.err = fmt.Errorf("write %s to initramfs: %w", name, err)
	}
	c.pad()
}

// close writes the end mark and returns the first error of all.
func (c *cpioWriter) close() error {
	c.inode = 0
	c.entry(cpioEnd, 0, 0, 1, 0, 0, 0)
	return c.err
}

func (c *cpioWriter) header(name string, mode, links, size, major, minor uint32) {
	c.inode++
	c.entry(name, c.inode, mode, links, size, major, minor)
}

func (c *cpioWriter) entry(name string, inode, mode, links, size, major, minor uint32) {
	c.write(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name))
	c.pad()
}

// pad fills up to a multiple of four bytes.
func (c *cpioWriter) pad() { c.write(make([]byte, -c.offset&3)) }

func (c *cpioWriter) write(p []byte) {
	if c.err != nil {
		return
	}
	n, err := c.w.Write(p)
	c.offset += int64(n)
	if err != nil {
		c.err = fmt.Errorf("write initramfs: %w", err)
	}
}

func (c *cpioWriter) text(name, content string) {
	c.file(name, 0o644, int64(len(content)), strings.NewReader(content))
}

// raw copies entries of an archive that has no end mark.
func (c *cpioWriter) raw(r io.Reader) {
	if c.err != nil {
		return
	}
	n, err := io.Copy(c.w, r)
	c.offset += n
	if err != nil {
		c.err = fmt.Errorf("write initramfs: %w", err)
	}
}
