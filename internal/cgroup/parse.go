package cgroup

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/tinevm/tine/internal/errdef"
)

// membership is a line of /proc/PID/cgroup: a hierarchy, and the group in it
// that the process is in. The hierarchy of v2 has no controllers.
type membership struct {
	controllers []string
	path        string
}

// has reports whether the hierarchy is that of a controller of v1 or, with "",
// that of v2.
func (m membership) has(controller string) bool {
	if controller == "" {
		return m.controllers == nil
	}
	return slices.Contains(m.controllers, controller)
}

func parseMemberships(data []byte) ([]membership, error) {
	var all []membership
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "/") {
			return nil, fmt.Errorf("%w: line %q of /proc/PID/cgroup", errdef.ErrInvalid, line)
		}
		m := membership{path: fields[2]}
		if fields[1] != "" {
			m.controllers = strings.Split(fields[1], ",")
		}
		all = append(all, m)
	}
	return all, nil
}

// mount is a mounted hierarchy of control groups.
type mount struct {
	root    string // the group that is seen at point
	point   string
	v2      bool
	options []string // under v1 the controllers are among them
}

// has is like that of a membership.
func (m mount) has(controller string) bool {
	if controller == "" {
		return m.v2
	}
	return !m.v2 && slices.Contains(m.options, controller)
}

// parseMounts returns the mounts of control groups in /proc/PID/mountinfo, as
// proc(5) describes it. It passes over lines that it does not understand: they
// are about something else.
func parseMounts(data []byte) []mount {
	var all []mount
	for line := range strings.Lines(string(data)) {
		ours, theirs, found := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		left, right := strings.Fields(ours), strings.Fields(theirs)
		if !found || len(left) < 6 || len(right) < 3 || !strings.HasPrefix(right[0], "cgroup") {
			continue
		}
		all = append(all, mount{unescape(left[3]), unescape(left[4]), right[0] == "cgroup2", strings.Split(right[2], ",")})
	}
	return all
}

// unescape undoes the kernel's octal escapes of blanks and backslashes.
func unescape(path string) string {
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		if path[i] == '\\' && i+3 < len(path) {
			if c, err := strconv.ParseUint(path[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(path[i])
	}
	return b.String()
}

// parseNumber reads a file of one number. "max", which is no limit, and what
// does not fit are the largest.
func parseNumber(data []byte) (int64, error) {
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return math.MaxInt64, nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%w: number %.40q", errdef.ErrInvalid, text)
	}
	return int64(min(n, math.MaxInt64)), nil
}

// parseField finds the number in the line "key number", or 0 without one.
func parseField(data []byte, key string) (int64, error) {
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == key {
			return parseNumber([]byte(fields[1]))
		}
	}
	return 0, nil
}

// parsePIDs reads cgroup.procs. A last line without an end may have been cut
// and is left out. The number 0 is a process that has none in this namespace.
func parsePIDs(data []byte) ([]int, error) {
	var all []int
	for line := range bytes.Lines(data) {
		text, whole := bytes.CutSuffix(line, []byte("\n"))
		if !whole {
			break
		}
		pid, err := strconv.ParseUint(string(text), 10, 31)
		if err != nil {
			return nil, fmt.Errorf("%w: process number %.40q", errdef.ErrInvalid, text)
		}
		all = append(all, int(pid))
	}
	return all, nil
}

// parseIO sums the bytes that were read and written, on one device or, with
// none given, on all. It knows the lines of v2, "8:0 rbytes=1 wbytes=2", and
// those of v1, "8:0 Read 1" and "8:0 Write 2".
func parseIO(data []byte, device string) (read, written int64, err error) {
	count := func(key, value string) {
		var to *int64
		switch key {
		case "rbytes", "Read":
			to = &read
		case "wbytes", "Write":
			to = &written
		default:
			return
		}
		n, numErr := parseNumber([]byte(value))
		if numErr != nil {
			err = numErr
			return
		}
		*to += min(n, math.MaxInt64-*to)
	}
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || !strings.Contains(fields[0], ":") || device != "" && fields[0] != device {
			continue // a total, or another device
		}
		if len(fields) == 3 && !strings.Contains(fields[1], "=") {
			count(fields[1], fields[2])
			continue
		}
		for _, pair := range fields[1:] {
			key, value, _ := strings.Cut(pair, "=")
			count(key, value)
		}
	}
	return read, written, err
}

// parseParent finds the parent's number in /proc/PID/stat. It starts after the
// last parenthesis, for the name in front of it may hold anything.
func parseParent(data []byte) (int, error) {
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) < 2 {
		return 0, fmt.Errorf("%w: stat line of %d fields", errdef.ErrInvalid, len(fields))
	}
	pid, err := strconv.ParseUint(fields[1], 10, 31)
	if err != nil {
		return 0, fmt.Errorf("%w: parent %.40q", errdef.ErrInvalid, fields[1])
	}
	return int(pid), nil
}

// parseDevice reads the dev file of a block device: "8:0".
func parseDevice(data []byte) (string, error) {
	text := strings.TrimSpace(string(data))
	major, minor, _ := strings.Cut(text, ":")
	for _, number := range []string{major, minor} {
		if _, err := strconv.ParseUint(number, 10, 32); err != nil {
			return "", fmt.Errorf("%w: device number %.40q", errdef.ErrInvalid, text)
		}
	}
	return text, nil
}
