package firecracker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// consoleSize is how much of what Firecracker and its guest write is kept.
const consoleSize = 64 << 10

// console takes Firecracker's standard streams, to which the guest's serial port
// writes too. It is a file in memory that cannot grow, so that no guest fills
// anything with it: it keeps the beginning, and what comes later is lost, for
// which Firecracker has an error of its own that it goes on after.
type console struct{ file *os.File }

func newConsole() (*console, error) {
	fd, err := unix.MemfdCreate("console", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make console: %w", os.NewSyscallError("memfd_create", err))
	}
	c := &console{file: os.NewFile(uintptr(fd), "console")}
	err = c.file.Truncate(consoleSize)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make console: %w", err), c.file.Close())
	}
	return c, nil
}

// text is what was written. A machine of an earlier daemon's has no console here,
// and no text.
func (c *console) text() (string, error) {
	if c == nil {
		return "", nil
	}
	data, err := io.ReadAll(io.NewSectionReader(c.file, 0, consoleSize))
	return string(bytes.TrimRight(data, "\x00")), err
}

// lastLine is the last line that is not empty.
func (c *console) lastLine() string {
	text, err := c.text()
	if err != nil {
		return ""
	}
	text = strings.TrimSpace(text)
	const shown = 400
	line := text[strings.LastIndexByte(text, '\n')+1:]
	return strings.ToValidUTF8(line[:min(len(line), shown)], "?")
}

func (c *console) close() error {
	if c == nil {
		return nil
	}
	return c.file.Close()
}
