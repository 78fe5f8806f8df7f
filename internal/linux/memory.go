package linux

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/tinevm/tine/internal/errdef"
)

// PageSize is the unit of PrivatePages and PunchZeros on every machine that
// Tine runs on (x86-64).
const PageSize = 4096

// maxMaps bounds how much of a list of mappings is read: 65530 mappings, the
// kernel's own limit, fit in it.
const maxMaps = 16 << 20

// Memory is what a process uses, in bytes.
type Memory struct {
	// RSS is what it has in memory.
	RSS int64 `json:"rss"`
	// Private is what the host gets back when the process dies: its anonymous
	// pages, in memory or swapped out. Pages that it has written to in a
	// private mapping of a file are among them, for they are copies; pages that
	// it has only read are page cache, and are not, even when nobody else maps
	// them. Pages shared with a process forked from it count for both.
	Private int64 `json:"private"`
	// Shared is the page cache that it maps: the rest of RSS.
	Shared int64 `json:"shared"`
	// Anonymous is the part of Private that is in memory.
	Anonymous int64 `json:"anonymous"`
}

// MemoryUse reports what a process uses.
func MemoryUse(pid int) (Memory, error) {
	data, err := readProc(pid, "smaps_rollup", 16<<10)
	if err != nil {
		return Memory{}, err
	}
	if len(data) == 0 {
		return Memory{}, fmt.Errorf("%w: process %d", errdef.ErrNotFound, pid)
	}
	return parseRollup(data)
}

func parseRollup(data []byte) (Memory, error) {
	sizes := map[string]int64{}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 52)
		if err != nil || kib < 0 {
			return Memory{}, fmt.Errorf("%w: memory use line %q", errdef.ErrInvalid, line)
		}
		sizes[fields[0]] = kib << 10
	}
	rss, ok := sizes["Rss:"]
	if !ok {
		return Memory{}, fmt.Errorf("%w: memory use without Rss", errdef.ErrInvalid)
	}
	anon := sizes["Anonymous:"]
	return Memory{RSS: rss, Private: anon + sizes["SwapPss:"], Shared: max(0, rss-anon), Anonymous: anon}, nil
}

// Mapping is a range of a process's addresses that shows a file from Offset.
type Mapping struct {
	Start, End, Offset uint64
}

// FindMapping returns where a process maps the file path, in address order.
// The path is compared as the kernel prints it: absolute, with no links.
func FindMapping(pid int, path string) ([]Mapping, error) {
	data, err := readProc(pid, "maps", maxMaps)
	if err != nil {
		return nil, err
	}
	var found []Mapping
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		m, name, err := parseMapping(lines.Text())
		if err != nil {
			return nil, fmt.Errorf("read mappings of process %d: %w", pid, err)
		}
		if name == path {
			found = append(found, m)
		}
	}
	return found, lines.Err()
}

// parseMapping reads "start-end perms offset dev inode   path".
func parseMapping(line string) (Mapping, string, error) {
	fields := strings.SplitN(line, " ", 6)
	if len(fields) < 5 {
		return Mapping{}, "", fmt.Errorf("%w: mapping %q", errdef.ErrInvalid, line)
	}
	start, end, _ := strings.Cut(fields[0], "-")
	var m Mapping
	var errs [3]error
	m.Start, errs[0] = strconv.ParseUint(start, 16, 64)
	m.End, errs[1] = strconv.ParseUint(end, 16, 64)
	m.Offset, errs[2] = strconv.ParseUint(fields[2], 16, 64)
	if errors.Join(errs[:]...) != nil || m.End < m.Start {
		return Mapping{}, "", fmt.Errorf("%w: mapping %q", errdef.ErrInvalid, line)
	}
	if len(fields) < 6 {
		return m, "", nil
	}
	return m, strings.TrimLeft(fields[5], " "), nil
}

// PrivatePages calls yield with each range of pages between start and end that
// are the process's own: in a private mapping of a file, those that it has
// written to, be they in memory or swapped out. Ranges come in order, whole
// pages, and never touch; yield returns false to stop. The answer is of one
// instant only for a process that does not run.
func PrivatePages(pid int, start, end uint64, yield func(start, end uint64) bool) error {
	if start%PageSize != 0 || end%PageSize != 0 || end < start {
		return fmt.Errorf("%w: page range %#x-%#x", errdef.ErrInvalid, start, end)
	}
	f, err := os.Open(procPath(pid, "pagemap"))
	if err != nil {
		return processError("read pages of", pid, err)
	}
	defer func() { _ = f.Close() }() // only read
	j := joiner{yield: yield}
	err = scanPages(f, start, end, &j)
	if errors.Is(err, unix.ENOTTY) { // before Linux 6.7
		err = readPagemap(f, start, end, &j)
	}
	if err != nil {
		return processError("read pages of", pid, err)
	}
	j.flush()
	return nil
}

// joiner puts ranges that touch together before it yields them.
type joiner struct {
	yield      func(start, end uint64) bool
	start, end uint64
	stopped    bool
}

// add reports whether more is wanted.
func (j *joiner) add(start, end uint64) bool {
	if j.end == start && j.end > j.start {
		j.end = end
		return !j.stopped
	}
	j.flush()
	j.start, j.end = start, end
	return !j.stopped
}

func (j *joiner) flush() {
	if j.end > j.start && !j.stopped {
		j.stopped = !j.yield(j.start, j.end)
	}
	j.start, j.end = 0, 0
}

// The PAGEMAP_SCAN ioctl of linux/fs.h.
const (
	pagemapScan   = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)
	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
)

type pageRegion struct{ start, end, _ uint64 } // the last: its categories

type scanArg struct {
	size, flags, start, end, walkEnd uint64
	vec                              *pageRegion // 64 bits wide here
	vecLen, maxPages                 uint64
	inverted, mask, anyOf, returned  uint64
}

// scanPages asks for what is present or swapped and not a page of a file.
func scanPages(f *os.File, start, end uint64, j *joiner) error {
	regions := make([]pageRegion, 512)
	for start < end {
		arg := scanArg{
			start: start, end: end, vec: &regions[0], vecLen: uint64(len(regions)),
			inverted: pageIsFile, mask: pageIsFile, anyOf: pageIsPresent | pageIsSwapped,
			returned: pageIsPresent | pageIsSwapped,
		}
		arg.size = uint64(unsafe.Sizeof(arg))
		n, err := retry(func() (int, error) { return scanOnce(f, &arg) })
		if err != nil {
			return err
		}
		for _, r := range regions[:n] {
			if !j.add(r.start, r.end) {
				return nil
			}
		}
		if arg.walkEnd <= start {
			return fmt.Errorf("page scan stuck at %#x", start)
		}
		start = arg.walkEnd
	}
	return nil
}

func scanOnce(f *os.File, arg *scanArg) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), pagemapScan, uintptr(unsafe.Pointer(arg))) //nolint:gosec // G103: arg is the struct of linux/fs.h
	runtime.KeepAlive(f)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// readPagemap does what scanPages does by reading eight bytes a page.
func readPagemap(f *os.File, start, end uint64, j *joiner) error {
	const present, swapped, file = 1 << 63, 1 << 62, 1 << 61
	buf := make([]byte, 64<<10)
	for start < end {
		want := buf[:min(uint64(len(buf)), (end-start)/PageSize*8)]
		n, err := f.ReadAt(want, int64(start/PageSize*8))
		for ; n >= 8; n, want = n-8, want[8:] {
			e := binary.LittleEndian.Uint64(want)
			if e&(present|swapped) != 0 && e&file == 0 && !j.add(start, start+PageSize) {
				return nil
			}
			start += PageSize
		}
		if errors.Is(err, io.EOF) { // past the last address that can be mapped
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}
